"""A training run: corpus in, checkpoints, metrics, plots and a Hugging Face directory out."""

import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
from whalejax.parallel.mesh import make_mesh
from whalejax.parallel.runtime import is_first, on_first, whole
from whalejax.presets import preset
from whalejax.progress import progress, stage
from whalejax.tokenizer import ByteTokenizer, Tokenizer, load
from whalejax.training.balancing import Balancer
from whalejax.training.checkpoints import Checkpoints
from whalejax.training.config import FREE_TO_CHANGE, TrainConfig, check_mesh
from whalejax.training.metrics import (
    MetricsFile,
    peak_flops,
    training_flops_per_token,
)
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
    check_mesh(config, model, mesh)
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
        exchange=config.exchange,
    )
    step = StepConfig(
        steps=config.steps,
        accumulate=config.accumulate,
        loss=config.loss,
        optimizer=config.optimizer,
        execution=execution,
        eplb=config.eplb,
        pipeline=config.pipeline,
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
    with balancer, Checkpoints(config.out, ready.model) as checkpoints:
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
    ready.tokenizer.save(config.out)  # for who generates from a checkpoint
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
