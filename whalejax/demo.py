"""The demo: the whole journey of a token on any machine, in a few minutes.

Trains the `tiny` model on the source of the Python standard library, stops half way, resumes from
the checkpoint, measures held-out loss beside n-gram models, exports, loads the export and writes.
"""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from whalejax.progress import stage
from whalejax.training.optimizer import OptimizerConfig

PROMPTS = ("import ", "def ", "class ")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The demo's settings; the defaults fit two cores and six minutes.

    Attributes:
      out: folder of the run.
      steps: training steps; half of them before the stop, half after.
      seed: of weights, data order and sampling.
    """

    out: Path = Path("runs/demo")
    steps: int = 1400
    seed: int = 0

    def __post_init__(self):
        if self.steps < 2:
            raise ValueError(f"steps={self.steps} must be at least 2: the demo stops half way")


def demo(config: DemoConfig) -> dict[str, Any]:
    """Runs the demo and leaves everything under `config.out`; returns what `summary.json` holds."""
    from whalejax.training.run import TrainConfig, prepare, train

    began = time.perf_counter()
    settings = TrainConfig(
        out=config.out,
        preset="tiny",
        steps=config.steps,
        batch_size=4,
        seed=config.seed,
        save_every=max(config.steps // 4, 1),
        optimizer=OptimizerConfig(
            peak_lr=4e-3,
            final_lr=2e-4,
            warmup_steps=40,
            constant_fraction=0.4,
        ),
    )
    stage("training on the Python standard library, to half way")
    train(dataclasses.replace(settings, stop_at=config.steps // 2))
    stage("stopped; going on from the checkpoint")
    result = train(settings)
    stage("fitting n-gram models to the same text")
    summary = compare(result, prepare(settings))
    stage("writing with the exported weights")
    text = sample(config.out / "model", config.seed)
    (config.out / "sample.txt").write_text(text)
    summary["seconds"] = round(time.perf_counter() - began, 1)
    (config.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    show(summary, text, config.out)
    return summary


def compare(result: dict[str, Any], ready: Any) -> dict[str, Any]:
    """The model's held-out nats a byte beside those of n-gram models, and what it was made of."""
    from whalejax.data.ngram import evaluate
    from whalejax.training.metrics import active_parameters

    baselines = evaluate(ready.train, ready.heldout)
    return {
        "heldout_nats_per_byte": result["heldout_loss"],
        "unigram_nats_per_byte": baselines.unigram,
        "bigram_nats_per_byte": baselines.bigram,
        "trigram_nats_per_byte": baselines.trigram,
        "train_files": len(ready.corpus.train),
        "heldout_files": len(ready.corpus.heldout),
        "train_bytes": len(ready.train),
        "heldout_bytes": len(ready.heldout),
        "active_matmul_parameters": active_parameters(ready.model, mtp=False),
        "tokens_per_s": round(result["tokens_per_s"]),
        "steps": result["steps"],
    }


def sample(folder: Path, seed: int) -> str:
    """Text after each prompt, from the exported weights through the paged cache."""
    from whalejax.generation.engine import Engine
    from whalejax.generation.sampling import SamplingConfig
    from whalejax.tokenizer import ByteTokenizer
    from whalejax.weights import from_pretrained

    tokenizer = ByteTokenizer()
    engine = Engine(from_pretrained(folder, dtype=np.dtype("float32")))
    completions = engine.generate(
        [tokenizer.encode(prompt) for prompt in PROMPTS],
        sampling=SamplingConfig(temperature=0.6, top_p=0.95, seed=seed),
        max_new_tokens=200,
        stop_tokens=(tokenizer.eos_id,),
    )
    texts = [
        prompt + tokenizer.decode(done.tokens)
        for prompt, done in zip(PROMPTS, completions, strict=True)
    ]
    return "\n\n# ----\n".join(texts) + "\n"


def show(summary: dict[str, Any], text: str, out: Path) -> None:
    """Prints the summary and the sample."""
    console = Console()
    console.print(text, markup=False, highlight=False)
    table = Table(title="held-out text, nats per byte (lower is better)")
    table.add_column("model")
    table.add_column("nats per byte", justify="right")
    for name in ("unigram", "bigram", "trigram"):
        table.add_row(name, f"{summary[f'{name}_nats_per_byte']:.3f}")
    table.add_row("whalejax tiny", f"{summary['heldout_nats_per_byte']:.3f}")
    console.print(table)
    console.print(
        f"{summary['train_files']} files trained on, {summary['heldout_files']} held out; "
        f"{summary['steps']} steps at {summary['tokens_per_s']} tokens/s; "
        f"{summary['seconds']} s in all; everything is in {out}",
        highlight=False,
        soft_wrap=True,
    )
