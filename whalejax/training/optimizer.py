"""AdamW as DeepSeek-V3 trains with (arXiv 2412.19437, section 4.2)."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from whalejax.model.sharding import path_name


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """Hyper-parameters; defaults are DeepSeek-V3's.

    Attributes:
      peak_lr: learning rate after warm-up.
      final_lr: learning rate at the end.
      warmup_steps: steps over which the rate rises from 0.
      constant_fraction: share of all steps after which the cosine decay begins.
      beta1, beta2, eps: of Adam.
      weight_decay: decoupled, on matrices only.
      clip_norm: largest global norm of the gradient.
      bias_update_speed: gamma, the step of the routers' bias.
    """

    peak_lr: float = 2.2e-4
    final_lr: float = 2.2e-5
    warmup_steps: int = 2000
    constant_fraction: float = 0.67
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    bias_update_speed: float = 1e-3

    def __post_init__(self):
        positive = ("peak_lr", "eps", "clip_norm")
        wrong = [n for n in positive if not getattr(self, n) > 0]
        wrong += [
            n
            for n in ("final_lr", "weight_decay", "warmup_steps", "bias_update_speed")
            if not getattr(self, n) >= 0
        ]
        wrong += [n for n in ("beta1", "beta2") if not 0 <= getattr(self, n) < 1]
        wrong += [n for n in ("constant_fraction",) if not 0 <= getattr(self, n) <= 1]
        if wrong:
            shown = ", ".join(f"{n}={getattr(self, n)}" for n in wrong)
            raise ValueError(f"{shown}: out of range for AdamW and its schedule")


def learning_rate(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up, a constant stretch, then a cosine to `final_lr` at `steps`."""
    warmup = min(config.warmup_steps, steps)
    decay_from = max(int(steps * config.constant_fraction), warmup)
    return optax.join_schedules(
        [
            optax.linear_schedule(0.0, config.peak_lr, max(warmup, 1)),
            optax.constant_schedule(config.peak_lr),
            optax.cosine_decay_schedule(
                config.peak_lr, max(steps - decay_from, 1), config.final_lr / config.peak_lr
            ),
        ],
        [warmup, decay_from],
    )


def decayed(params: object) -> object:
    """Marks the leaves that weight decay acts on: all but the weights of norms."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not path_name(path).endswith("norm"), params
    )


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW over a run of `steps` updates, for gradients that are clipped."""
    return optax.adamw(
        learning_rate(config, steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=decayed,
    )


def clip(grads: Any, norm: jax.Array, most: float) -> Any:
    """Scales gradients of a global norm `f32[]` down to `most` where it is larger.

    The norm is an argument, because replicas of an expert are in the tree several times.
    """
    return jax.tree.map(
        lambda g: jnp.where(norm < most, g, (g / norm.astype(g.dtype)) * most), grads
    )
