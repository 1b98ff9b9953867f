"""A model small enough to wait only for its compilation; and compilation for GPUs."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig


@pytest.fixture(scope="session")
def micro() -> ModelConfig:
    """One dense layer, one MoE layer, one MTP module."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        mla=MLAConfig(
            num_attention_heads=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        moe=MoEConfig(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
        ),
        num_nextn_predict_layers=1,
        initializer_range=0.05,
        eos_token_id=0,
    )


@pytest.fixture(scope="session")
def compile_for_h100() -> Callable:
    """Runs a script that compiles for 8 H100s, with arguments; gives what it prints as JSON."""
    # `make` puts JAX's CUDA plugin there, apart: it would be found by every test on the CPU
    cuda = Path(sys.prefix) / "cuda"
    if not cuda.exists():
        pytest.skip(f"no CUDA plugin in {cuda}: make aot")

    def run(script, *arguments):
        environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "PYTHONPATH")}
        command = [sys.executable, script, cuda, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    return run
