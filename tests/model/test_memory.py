"""What training keeps in memory, read from the compiled step: nothing runs."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from whalejax.model.decoder import REMATERIALISATION, Decoder, Execution, forward

LENGTH = 2048


@pytest.fixture(scope="module")
def compiled(v3_config):
    """Compiles the gradient of a loss at 2048 tokens for an execution."""
    config = dataclasses.replace(
        v3_config, moe=None, first_k_dense_replace=3, num_nextn_predict_layers=0
    )  # attention alone is in question, and dense layers compile faster
    graphdef, params, rest = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))), nnx.Param, ...
    )
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)

    @functools.cache
    def compile_gradient(execution):
        def value(params, rest, tokens):
            return jnp.sum(forward(nnx.merge(graphdef, params, rest), tokens, execution).hidden)

        return jax.jit(jax.grad(value)).lower(params, rest, tokens).compile()

    return compile_gradient


def holds_all_scores(compiled):
    """Whether any array has two axes of the sequence's length."""
    shapes = re.findall(r"[a-z]+\d+\[([\d,]+)\]", compiled.as_text())
    return any(shape.split(",").count(str(LENGTH)) > 1 for shape in set(shapes))


def test_training_never_holds_all_scores(compiled):
    # the definition does, so the search finds what it looks for
    assert holds_all_scores(compiled(Execution(attention="reference")))
    assert not holds_all_scores(compiled(Execution()))


def test_rematerialisation_saves_memory(compiled):
    temporary = {
        policy: compiled(Execution(rematerialise=policy)).memory_analysis().temp_size_in_bytes
        for policy in REMATERIALISATION
    }
    assert temporary["full"] < temporary["dots"] < temporary["none"]
