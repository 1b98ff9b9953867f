"""One job of several processes, and settings of XLA for it; importing sets none."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from whalejax.parallel.mesh import STAGE

AUTO = "auto"
HEARTBEAT_TIMEOUT_S = 60  # a process that died or hangs ends the others after this
SHUTDOWN_TIMEOUT_S = 30  # a process that fails waits so long for the others, then ends them
FIRST_TIMEOUT_S = 3600  # that the others give the first process for a thing it does alone

# Of `jax.jit(..., compiler_options=)`, for `overlap_microbatches` on GPUs. XLA merges matmuls of
# both half-batches that share a weight of up to so many MB, and what one waits for, both wait for.
OVERLAP_OPTIONS = {"xla_gpu_dot_merger_threshold_mb": 0}
# For pipelines: more transfers at a time, as a forward pass's can meet a backward pass's.
PIPELINE_OPTIONS = OVERLAP_OPTIONS | {"xla_gpu_experimental_parallel_collective_overlap_limit": 4}

_calls = itertools.count()  # every process counts alike, so that each message has a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """The processes of a job.

    Attributes:
      coordinator: `host:port` where process 0 listens; `auto` where Slurm, MPI or Kubernetes know
        it, and the two numbers with it; None for a job of one process.
      num_processes: of the job.
      process_id: of this process, from 0.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None

    def __post_init__(self):
        numbers = (self.num_processes, self.process_id)
        shown = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())
        if self.coordinator in (None, AUTO):
            if numbers != (None, None):
                raise ValueError(f"{shown}: numbers of processes need a coordinator's host:port")
            return
        host, _, port = self.coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"{shown}: the coordinator must be host:port, or {AUTO!r}")
        if None in numbers or not 0 <= self.process_id < self.num_processes:
            raise ValueError(f"{shown}: process_id must be one of 0 to num_processes - 1")


def join(config: JobConfig) -> None:
    """Joins the job's processes through `jax.distributed`, before the first array is made.

    Where one process ends by an error, the others end SHUTDOWN_TIMEOUT_S later; where one is
    killed or hangs, HEARTBEAT_TIMEOUT_S later, or as soon as a transfer with it fails.
    """
    if config.coordinator is None:
        return
    found = {} if config.coordinator == AUTO else {"coordinator_address": config.coordinator}
    jax.distributed.initialize(
        **found,
        num_processes=config.num_processes,
        process_id=config.process_id,
        heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        shutdown_timeout_seconds=SHUTDOWN_TIMEOUT_S,
    )


def is_first() -> bool:
    """Whether this process writes and prints for all: process 0, or the only one."""
    return jax.process_index() == 0


def on_first(f: Callable, *args: Any, **kwargs: Any) -> None:
    """Calls f in the first process alone; all processes call this, and go on once f is done.

    Raises:
      Exception: of f, in the first process.
      RuntimeError: in the others, with its message.
    """
    error = None
    if is_first():
        try:
            f(*args, **kwargs)
        except Exception as raised:
            error = raised
    message = heard_by_all("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    if message:
        raise RuntimeError(f"process 0 failed, and so the job: {message}")


def heard_by_all(text: str, *, timeout_s: float = FIRST_TIMEOUT_S) -> str:
    """The first process's text; the others wait for it.

    They wait by the coordinator: in a collective gloo waits half a minute.

    Raises:
      TimeoutError: it said nothing for `timeout_s`, or its coordinator is gone.
    """
    if jax.process_count() == 1:
        return text
    key = f"whalejax/first/{next(_calls)}"
    if is_first():
        key_value_store().key_value_set(key, text)
        return text
    try:
        return key_value_store().blocking_key_value_get(key, int(timeout_s * 1000))
    except Exception as error:  # of XLA's own class, which JAX does not make public
        raise TimeoutError(
            f"process 0 of {jax.process_count()} said nothing for {timeout_s:.0f} s "
            f"({first_line(error)})"
        ) from error


def key_value_store() -> Any:
    """Texts by key that all processes of the job share: JAX's own, by which it starts up."""
    from jax._src.distributed import global_state

    return global_state.client


def first_line(error: BaseException) -> str:
    """An error of the coordinator's without the details that follow."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def whole(tree: Any) -> Any:
    """Every array of a pytree on this host, parts of other processes' devices included.

    All processes call it; one array at a time is on the devices as a whole. In a job of one
    process arrays stay as they are.
    """
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)


def overlap_options(mesh: Mesh) -> dict[str, int] | None:
    """The compiler options with which transfers hide behind computation on a mesh's devices."""
    if mesh.devices.flat[0].platform not in ("gpu", "cuda"):
        return None
    return PIPELINE_OPTIONS if mesh.shape.get(STAGE, 1) > 1 else OVERLAP_OPTIONS
