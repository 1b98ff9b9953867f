"""The settings of a training run, and whether they fit its model and its devices."""

import dataclasses
from pathlib import Path
from typing import Literal

from jax.sharding import Mesh

from whalejax.model.config import ModelConfig
from whalejax.parallel.mesh import EXPERT, MeshConfig, batch_devices
from whalejax.training.experts import EPLBConfig
from whalejax.training.loss import LossConfig
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.pipeline import PipelineConfig, check_pipeline


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
      exchange: how tokens get to the experts of other devices: all_to_all, all_gather, ragged, or
        peer, kernels that read other GPUs' memory, for GPUs of one process. None for all_to_all.
      eval_every: steps between held-out losses; 0 for none but the last.
      save_every: steps between checkpoints.
      log_every: steps between lines of metrics.
      stop_at: step at which to stop early, as if interrupted.
      export: write the final weights to `model/`.
      seed: of weights and data order.
      mesh: devices along each axis, such as data=2,expert=4.
      eplb: balancing of experts over the ranks of the axis expert.
      pipeline: the schedule of the ranks of the axis stage.
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
    exchange: Literal["all_to_all", "all_gather", "ragged", "peer"] | None = None
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
    pipeline: PipelineConfig = PipelineConfig()

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
    "eplb", "overlap", "exchange", "pipeline",
)  # fmt: skip


def check_mesh(config: TrainConfig, model: ModelConfig, mesh: Mesh) -> None:
    """Checks that a run's batch, experts and stages can be shared out over its devices.

    Raises:
      ValueError: they cannot; prints what does not fit.
    """
    shards, sequences = batch_devices(mesh), config.batch_size // config.accumulate
    if sequences % shards:
        raise ValueError(
            f"batch_size={config.batch_size} over accumulate={config.accumulate} must be a "
            f"multiple of the {shards} devices that share a microbatch"
        )
    if config.overlap and sequences // shards % 2:
        raise ValueError(
            f"overlap={config.overlap} needs an even number of sequences on each device, but "
            f"batch_size={config.batch_size} over accumulate={config.accumulate} and {shards} "
            f"devices is {sequences // shards}"
        )
    if config.eplb.every:
        config.eplb.slots(model, mesh)
    elif model.moe is not None and model.moe.n_routed_experts % mesh.shape[EXPERT]:
        raise ValueError(
            f"n_routed_experts={model.moe.n_routed_experts} must be a multiple of "
            f"expert={mesh.shape[EXPERT]} of the mesh"
        )
    check_pipeline(model, config.pipeline, mesh, sequences)
