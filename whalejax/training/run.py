"""A training run: corpus in, checkpoints, metrics, plots and a Hugging Face directory out."""

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from whalejax.data import corpus as corpora
from whalejax.data.loader import batch_at
from whalejax.data.tokens import join
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder, Execution
from whalejax.model.linear import PRECISIONS
from whalejax.model.sharding import batch_sharding
from whalejax.parallel.mesh import BATCH_AXES, EXPERT, MeshConfig, make_mesh
from whalejax.parallel.runtime import is_first, on_first, whole
from whalejax.presets import preset
from whalejax.progress import progress, stage
from whalejax.tokenizer import ByteTokenizer, Tokenizer, load
from whalejax.training.balancing import Balancer
from whalejax.training.checkpoints import Checkpoints
from whalejax.training.experts import EPLBConfig
from whalejax.training.loss import LossConfig
from whalejax.training.metrics import (
    MetricsFile,
    peak_flops,
    training_flops_per_token,
)
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.plots import plot_expert_load, plot_loss
from whalejax.training.step import (
    MAX_BAD_STEPS,
    StepConfig,
    TrainState,
    abstract_state,
    compile_heldout,
    compile_step,
    init_state,
    model_of,
    state_of,
)
from whalejax.weights import check_pretrained, from_pretrained, save_pretrained


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run.

    Attributes:
      out: folder of the run; a run found there goes on where it stopped.
      preset: the model: tiny, small, v2-lite or v3.
      from_pretrained: a Hugging Face directory to continue from, in place of a preset.
      data: a text file, a folder of them, or parquet; the Python standard library if not given.
      column: the text column of parquet files.
      tokenizer: a Hugging Face `tokenizer.json` or its folder; bytes if not given.
      steps: updates of the whole run.
      batch_size: sequences a step, all microbatches and devices together.
      length: tokens of a sequence.
      accumulate: microbatches a step.
      precision: of the computation: f64, f32, bf16, or fp8 (bf16 activations, matmuls of weights
        and their gradients in FP8); weights and optimiser are float64 in f64, else float32. f64
        needs jax_enable_x64, which the command line sets.
      rematerialise: what the backward pass computes again: none, full or dots.
      overlap: run MoE layers on two halves of each device's sequences, so that one's tokens travel
        to their experts and back while the other computes.
      capacity_factor: rows of a rank's experts, in multiples of what it gets of a balanced load;
        what is too much is left out, and counted in the metrics (overflow). None for any load.
      eval_every: steps between held-out losses; 0 for none but the last.
      save_every: steps between checkpoints.
      log_every: steps between lines of metrics.
      stop_at: step at which to stop early, as if interrupted.
      export: write the final weights to `model/`.
      seed: of weights and data order.
      mesh: devices along each axis, such as data=2,expert=4.
      eplb: balancing of experts over the ranks of the axis expert.
      loss, optimizer: their own settings.
    """

    out: Path = Path("runs/train")
    preset: str = "tiny"
    from_pretrained: Path | None = None
    data: Path | None = None
    column: str = "text"
    tokenizer: Path | None = None
    steps: int = 1000
    batch_size: int = 16
    length: int = 256
    accumulate: int = 1
    precision: Literal["f64", "f32", "bf16", "fp8"] = "f32"
    rematerialise: str = "none"
    overlap: bool = False
    capacity_factor: float | None = None
    eval_every: int = 0
    save_every: int = 200
    log_every: int = 10
    stop_at: int | None = None
    export: bool = True
    seed: int = 0
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    mesh: MeshConfig = MeshConfig()
    eplb: EPLBConfig = EPLBConfig()

    def __post_init__(self):
        positive = ("steps", "batch_size", "length", "accumulate", "save_every", "log_every")
        wrong = [n for n in positive if getattr(self, n) < 1]
        if wrong:
            shown = ", ".join(f"{n}={getattr(self, n)}" for n in wrong)
            raise ValueError(f"{shown}: must be positive")
        if self.eval_every < 0:
            raise ValueError(f"eval_every={self.eval_every} must be 0 or more")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size={self.batch_size} must be a multiple of accumulate={self.accumulate}"
            )


# what may differ between a run and its continuation
FREE_TO_CHANGE = (
    "out", "eval_every", "save_every", "log_every", "stop_at", "export", "mesh", "rematerialise",
    "eplb", "overlap",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """All that a run needs, checked before anything is written.

    Attributes:
      model: sizes.
      tokenizer: of the corpus.
      train, heldout: token ids.
      corpus: the documents' names.
      mesh: devices.
      step: what the compiled step depends on.
    """

    model: ModelConfig
    tokenizer: Tokenizer
    train: np.ndarray
    heldout: np.ndarray
    corpus: corpora.Corpus
    mesh: Mesh
    step: StepConfig


def prepare(config: TrainConfig) -> Prepared:
    """Reads and checks model, data and devices; writes nothing.

    Raises:
      ValueError: something does not fit; says what.
      FileNotFoundError: a path does not exist.
    """
    source = config.from_pretrained
    if source is not None:
        model = check_pretrained(source)
    else:
        model = preset(config.preset)
    tokenizer = ByteTokenizer()
    if config.tokenizer is not None:
        tokenizer = load(config.tokenizer)
    elif source is not None and (source / "tokenizer.json").exists():
        tokenizer = load(source)
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model vocab_size="
            f"{model.vocab_size}"
        )
    mesh = make_mesh(config.mesh)
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if config.batch_size // config.accumulate % shards:
        raise ValueError(
            f"batch_size={config.batch_size} over accumulate={config.accumulate} must be a "
            f"multiple of the {shards} devices that share a microbatch"
        )
    sequences = config.batch_size // config.accumulate // shards
    if config.overlap and sequences % 2:
        raise ValueError(
            f"overlap={config.overlap} needs an even number of sequences on each device, but "
            f"batch_size={config.batch_size} over accumulate={config.accumulate} and {shards} "
            f"devices is {sequences}"
        )
    if config.eplb.every:
        config.eplb.slots(model, mesh)
    elif model.moe is not None and model.moe.n_routed_experts % mesh.shape[EXPERT]:
        raise ValueError(
            f"n_routed_experts={model.moe.n_routed_experts} must be a multiple of "
            f"expert={mesh.shape[EXPERT]} of the mesh"
        )
    if config.data is None:
        corpus = corpora.standard_library()
    else:
        corpus = corpora.read(config.data, column=config.column)
    train, heldout = join(corpus.train, tokenizer), join(corpus.heldout, tokenizer)
    batch_at(train, step=0, batch=1, length=config.length, seed=config.seed)  # long enough?
    execution = Execution(
        precision=PRECISIONS[config.precision],
        rematerialise=config.rematerialise,
        mesh=mesh if mesh.size > 1 else None,
        overlap=config.overlap,
        capacity_factor=config.capacity_factor,
    )
    step = StepConfig(
        steps=config.steps,
        accumulate=config.accumulate,
        loss=config.loss,
        optimizer=config.optimizer,
        execution=execution,
        eplb=config.eplb,
    )
    return Prepared(
        model=model,
        tokenizer=tokenizer,
        train=train,
        heldout=heldout,
        corpus=corpus,
        mesh=mesh,
        step=step,
    )


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs, or goes on with, a training run.

    Of several processes all call it, with `config.out` on storage that they share; the first one
    writes what is no checkpoint.

    Returns:
      A summary: steps done, the last training loss, the held-out loss, tokens/s.

    Raises:
      ValueError: bad settings, before anything is written.
      FileNotFoundError: a path does not exist.
      FloatingPointError: MAX_BAD_STEPS steps in a row were not finite.
    """
    ready = prepare(config)
    on_first(record, config, ready)
    stop = config.steps if config.stop_at is None else min(config.stop_at, config.steps)
    balancer = Balancer(ready.model, ready.step, ready.mesh)
    with balancer, Checkpoints(config.out / "checkpoints") as checkpoints:
        state, start = first_state(config, ready, checkpoints)
        state = balancer.start(state)
        metrics = MetricsFile(config.out / "metrics.jsonl", resume_step=start, writes=is_first())
        state, speed = loop(config, ready, state, start, stop, checkpoints, metrics, balancer)
        checkpoints.save(stop, balancer.logical(state))
    if stop < config.steps:
        return {"steps": stop, "tokens_per_s": speed}
    heldout = evaluate(config, ready, state)
    metrics.write(step=stop, heldout_loss=heldout)
    on_first(plot, metrics.path, config.out)
    if config.export:
        announce("exporting the weights")
        on_first(
            save_pretrained,
            exported(ready, balancer.logical(state)),
            config.out / "model",
            tokenizer=ready.tokenizer,
            overwrite=True,
        )
    return {
        "steps": stop,
        "heldout_loss": heldout,
        "tokens_per_s": speed,
        "skipped": int(state.skipped),
    }


def announce(title: str) -> None:
    """Prints what begins now, once for all processes."""
    if is_first():
        stage(title)


def plot(metrics: Path, out: Path) -> None:
    """Draws the run's pictures."""
    plot_loss(metrics, out / "loss.png")
    plot_expert_load(metrics, out / "expert_load.png")


def exported(ready: Prepared, state: TrainState) -> Decoder:
    """The model that is written, whole: float64 as float32, which other programs read."""
    model = whole(model_of(ready.model, state))
    return jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 else x, model)


def record(config: TrainConfig, ready: Prepared) -> None:
    """Makes the run's folder and its `run.json`, or checks that a run there has these settings."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(config).items()
        if name not in FREE_TO_CHANGE
    }
    settings["model"] = dataclasses.asdict(ready.model)
    settings = json.loads(json.dumps(settings, default=str))
    path = config.out / "run.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [n for n in settings if settings[n] != before.get(n)]
        if changed:
            shown = "; ".join(f"{n}: {before.get(n)} before, {settings[n]} now" for n in changed)
            raise ValueError(
                f"{config.out} holds a run with other settings ({shown}): choose another --out"
            )
        return
    config.out.mkdir(parents=True, exist_ok=True)
    for name in ("train", "heldout"):
        names = getattr(ready.corpus, f"{name}_names")
        (config.out / f"{name}.txt").write_text("".join(f"{n}\n" for n in names))
    temporary = path.with_suffix(".tmp")  # last and at once: a kill leaves all of it or nothing
    temporary.write_text(json.dumps(settings, indent=1) + "\n")
    os.replace(temporary, path)


def first_state(
    config: TrainConfig, ready: Prepared, checkpoints: Checkpoints
) -> tuple[TrainState, int]:
    """The newest checkpoint, else the given weights, else fresh ones; and the steps done.

    Every expert is there once, whatever placement the run that wrote the checkpoint had.
    """
    latest = checkpoints.latest()
    if latest is not None:
        announce(f"resuming from step {latest}")
        abstract = abstract_state(ready.model, ready.step, ready.mesh, logical=True)
        return checkpoints.restore(latest, abstract), latest
    if config.from_pretrained is None:
        return init_state(ready.model, ready.step, ready.mesh, config.seed), 0
    announce(f"loading {config.from_pretrained}")
    master = ready.step.execution.precision.master
    model = from_pretrained(config.from_pretrained, dtype=master)
    abstract = abstract_state(ready.model, ready.step, ready.mesh, logical=True)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def copied(model):  # steps donate the state: it must share no buffer with what was read
        return jax.tree.map(jnp.copy, state_of(model, ready.step))

    return jax.jit(copied, out_shardings=out)(model), 0


def loop(
    config: TrainConfig,
    ready: Prepared,
    state: TrainState,
    start: int,
    stop: int,
    checkpoints: Checkpoints,
    metrics: MetricsFile,
    balancer: Balancer,
) -> tuple[TrainState, float]:
    """Steps from `start` to `stop`; the device always has the next step while metrics are read."""
    step_fn = compile_step(ready.model, ready.step, ready.mesh)
    report = reporter(config, ready, metrics, balancer)
    pending, began, first = None, time.perf_counter(), start
    with progress("training", total=config.steps, completed=start, shown=is_first()) as bar:
        for step, batch in enumerate(batches(config, ready, start, stop), start):
            state, values = step_fn(state, batch)
            if pending is not None:
                report(bar, *pending)
            pending = (step + 1, values, balancer.plan)
            if step == first:  # the first step compiles: it does not count for the speed
                jax.block_until_ready(state)
                began = time.perf_counter()
            done = step + 1
            if done % config.save_every == 0 and done < stop and not int(values["bad_streak"]):
                report(bar, *pending)  # first its metrics: a run killed now goes on after them
                pending = None
                checkpoints.save(done, balancer.logical(state))
            if config.eval_every and done % config.eval_every == 0 and done < config.steps:
                metrics.write(step=done, heldout_loss=evaluate(config, ready, state))
            state = balancer.after(done, state, metrics)
        if pending is not None:
            report(bar, *pending)
    jax.block_until_ready(state)
    tokens = (stop - first - 1) * config.batch_size * config.length
    return state, tokens / max(time.perf_counter() - began, 1e-9) if tokens > 0 else 0.0


def batches(config: TrainConfig, ready: Prepared, start: int, stop: int) -> Iterator[jax.Array]:
    """The batches of steps `start` to `stop`, `i32[accumulate, b, t + 1]`, sharded."""
    sharding = batch_sharding(ready.mesh, leading=1)
    shape = (config.accumulate, config.batch_size // config.accumulate, config.length + 1)
    for step in range(start, stop):
        rows = batch_at(
            ready.train,
            step=step,
            batch=config.batch_size,
            length=config.length,
            seed=config.seed,
        ).reshape(shape)
        yield placed(rows, sharding)


def placed(rows: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array that every process holds, over the devices of all; each keeps its own part."""
    return jax.make_array_from_callback(rows.shape, sharding, rows.__getitem__)


def reporter(
    config: TrainConfig, ready: Prepared, metrics: MetricsFile, balancer: Balancer
) -> Callable:
    """A function that logs a step's metrics and stops a run that no longer is finite."""
    tokens = config.batch_size * config.length
    flops = training_flops_per_token(ready.model, config.length) * tokens
    peak = peak_flops(ready.mesh.devices.flat[0])
    last = [time.perf_counter(), 0]

    def report(bar, step, values, plan):
        if int(values["bad_streak"]) >= MAX_BAD_STEPS:
            raise FloatingPointError(
                f"the loss or the gradient was not finite in {MAX_BAD_STEPS} steps in a row, "
                f"up to step {step}; the checkpoints in {config.out / 'checkpoints'} are intact"
            )
        bar.advance(1, loss=float(values["loss"]))
        if step % config.log_every and step != config.steps:
            return
        seconds = time.perf_counter() - last[0]
        per_step = seconds / max(step - last[1], 1) if last[1] else seconds
        rate = {"tokens_per_s": tokens / per_step} if last[1] else {}
        if peak and last[1]:
            rate["mfu"] = flops / per_step / (peak * ready.mesh.size)
        last[:] = [time.perf_counter(), step]
        named = {("expert_load" if n == "load" else n): v for n, v in values.items()}
        metrics.write(step=step, **named, **balancer.rank_load(values["load"], plan), **rate)

    return report


def evaluate(config: TrainConfig, ready: Prepared, state: TrainState) -> float:
    """Mean next-token loss over all held-out tokens but the first, in nats a token.

    Windows of `length` tokens lie end to end, each token predicted once.
    """
    if len(ready.heldout) < 2:
        return float("nan")
    loss = compile_heldout(ready.model, ready.step.execution, ready.mesh)
    length, batch = config.length, config.batch_size
    predicted = len(ready.heldout) - 1
    per_call = batch * length
    calls = -(-predicted // per_call)
    padded = np.zeros(calls * per_call + 1, np.int32)
    padded[: predicted + 1] = ready.heldout
    weights = (np.arange(calls * per_call) < predicted).astype(np.float32).reshape(-1, length)
    sharding = batch_sharding(ready.mesh)
    starts = np.arange(0, calls * per_call, length)
    windows = padded[starts[:, None] + np.arange(length + 1)]
    total = 0.0
    with progress("held-out loss", total=calls, shown=is_first()) as bar:
        for call in range(calls):
            rows = slice(call * batch, (call + 1) * batch)
            chunk = (placed(a[rows], sharding) for a in (windows, weights))
            total += float(loss(state.params, state.router_bias, state.placement, *chunk))
            bar.advance(1)
    return total / predicted
