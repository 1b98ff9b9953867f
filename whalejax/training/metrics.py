"""Metrics of a run: one JSON object a line, and the arithmetic of FLOPs."""

import json
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from whalejax.model.config import ModelConfig

# dense bfloat16 matmul peaks from the vendors' data sheets, TFLOP/s
PEAK_TFLOPS = {"H100": 989.0, "H200": 989.0, "A100": 312.0, "H800": 989.0}


class MetricsFile:
    """Appends to `metrics.jsonl`; on resumption forgets what lies after the restored step.

    Args:
      path: of the file.
      resume_step: the restored step; 0 for a new run.
      writes: False for a process of several that leaves the file to another.
    """

    def __init__(self, path: Path, *, resume_step: int, writes: bool = True):
        self.path, self.writes = path, writes
        if not writes:
            return
        kept = [line for line in read_metrics(path) if line["step"] <= resume_step]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(temporary, path)

    def write(self, **values: Any) -> None:
        """Appends one line; arrays become lists, numbers Python's."""
        if not self.writes:
            return
        plain = {name: _plain(value) for name, value in values.items()}
        with self.path.open("a") as file:
            file.write(json.dumps(plain) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a metrics file; a line cut off by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _plain(value: Any) -> Any:
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        array = np.asarray(value)
        return array.item() if array.ndim == 0 else array.round(5).tolist()
    return value


def active_parameters(config: ModelConfig, *, mtp: bool = True) -> int:
    """Matmul parameters that one token meets, the head included and the embedding not."""
    a, h = config.mla, config.hidden_size
    heads = a.num_attention_heads
    if a.q_lora_rank is None:
        attention = h * heads * a.qk_head_dim
    else:
        attention = a.q_lora_rank * (h + heads * a.qk_head_dim)
    attention += h * a.cache_dim + heads * a.v_head_dim * h
    attention += a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    dense = 3 * h * config.intermediate_size
    moe = 0
    if config.moe is not None:
        m = config.moe
        moe = h * m.n_routed_experts + 3 * h * (
            m.num_experts_per_tok * m.moe_intermediate_size + m.shared_intermediate_size
        )
    head = config.vocab_size * h
    total = config.num_dense_layers * (attention + dense) + head
    total += config.num_moe_layers * (attention + moe)
    if mtp:
        total += config.num_nextn_predict_layers * (attention + moe + 2 * h * h + head)
    return total


def training_flops_per_token(config: ModelConfig, length: int) -> float:
    """FLOPs of forward and backward a token: 6 a parameter, and causal attention over `length`."""
    a = config.mla
    layers = config.num_hidden_layers + config.num_nextn_predict_layers
    # a query meets (length + 1) / 2 keys on average, 2 FLOPs a multiply-add, thrice with backward
    attention = 3 * (length + 1) * a.num_attention_heads * (a.qk_head_dim + a.v_head_dim)
    return 6.0 * active_parameters(config) + layers * attention


def peak_flops(device: jax.Device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, None for devices that are not in the table."""
    for name, tflops in PEAK_TFLOPS.items():
        if name in device.device_kind:
            return tflops * 1e12
    return None
