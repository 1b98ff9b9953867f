"""Attention by the Mosaic GPU kernel that comes with JAX (FlashAttention-3, arXiv 2407.08608).

The kernel has one head dimension, so keys and values are padded with zeros to the same multiple of
64: of MLA's 192/128 it multiplies 192/192, a fifth more than needed. It has no scale either: the
queries are scaled before, and rounded again. Its buffers are float16 whatever the inputs, so that
bfloat16 does not lower (jax 0.11.2), and its backward pass knows no causal mask: gradients come
from the chunked form, on the same log-sum-exp. So it runs only when it is named.
"""

import math

import jax
import jax.numpy as jnp

from whalejax.kernels.attention import chunked
from whalejax.kernels.backend import mosaic_unusable, no_gpu

BLOCK = 64  # queries of a warpgroup, and keys of a step
QUERIES = 2 * BLOCK  # of a program: two warpgroups
MAX_HEAD_DIM = 256  # 64 × 256 float32 accumulators are 128 registers of a warpgroup's thread
SMEM_BYTES = 227 * 1024  # what a program may have on Hopper
# "Causal masking not supported [...] due to a ptxas miscompilation", says the kernel
BAD_CUDA = range(12080, 12091)


def unusable() -> str | None:
    """Says why the kernel cannot be used on this machine, None if it can."""
    return mosaic_unusable() or no_gpu() or _cuda_unusable()


def why_not_lowered(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Says why the kernel could not attend with these arguments on any GPU, None if it could."""
    if q.dtype != jnp.float16:
        return f"the kernel's buffers are float16, the arguments {q.dtype}"
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        return f"d_qk={q.shape[3]} and d_v={v.shape[3]} must be at most {MAX_HEAD_DIM}"
    if q.shape[1] != k.shape[1]:
        return f"the kernel needs s={q.shape[1]} and s_k={k.shape[1]} to be equal"
    if not causal and q.shape[1] % QUERIES:
        return f"s={q.shape[1]} must be a multiple of {QUERIES} without a causal mask"
    return mosaic_unusable() or _cuda_unusable()


def why_not(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Says why the kernel cannot attend with these arguments here, None if it can."""
    return why_not_lowered(q, k, v, causal) or unusable()


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention of `[b, s, h, d]` arrays: the output, and the log-sum-exp `f32[b, h, s]`."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    length, d_v = q.shape[1], v.shape[3]
    dim = -(-max(q.shape[3], d_v) // 64) * 64

    def pad(x):  # keys padded at the end are seen by padded queries only, whose rows are cut off
        return jnp.pad(x, ((0, 0), (0, -length % QUERIES), (0, 0), (0, dim - x.shape[3])))

    q = (q.astype(jnp.float32) * scale).astype(q.dtype)
    config = attention_mgpu.TuningConfig(
        block_q=BLOCK, block_kv=BLOCK, max_concurrent_steps=_steps(dim), causal=causal
    )
    out, (log2_lse,) = attention_mgpu.attention(pad(q), pad(k), pad(v), config, True)
    return out[:, :length, :, :d_v], log2_lse[:, :, :length] * math.log(2)


backward = chunked.backward


def _steps(dim):
    """How many steps of keys and values fit in shared memory beside the queries."""
    row = 2 * dim  # bytes
    return min(4, (SMEM_BYTES - QUERIES * row) // (2 * BLOCK * row))


def _cuda_unusable():
    from jax._src.lib import cuda_versions

    if cuda_versions is None:
        return "JAX's CUDA plugin is not installed"
    version = cuda_versions.cuda_runtime_get_version()
    return f"CUDA {version} miscompiles the kernel" if version in BAD_CUDA else None
