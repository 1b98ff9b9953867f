"""Attention by cuDNN's fused kernels, which take MLA's 192/128 as they are from Hopper on.

JAX's primitives are called below its front door `jax.nn.dot_product_attention`, for two reasons:
it gives the output the shape of the queries, so that values had to be padded from 128 to 192; and
it asks the machine that traces for its GPU, so that no other machine could lower for one.
"""

import importlib

import jax
import jax.numpy as jnp

MAX_HEAD_DIM = 256  # on Hopper; older GPUs end at 128
MIN_CAPABILITY = (9, 0)
MIN_CUDNN = 91000  # the first whose keys may be wider than values
PRIMITIVES = "jax._src.cudnn.fused_attention_stablehlo"
NEEDED = ("_dot_product_attention_fwd_p_wrapper", "_dot_product_attention_bwd_p_wrapper")


def unusable() -> str | None:
    """Says why cuDNN cannot be used on this machine, None if it can."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return f"cuDNN needs a CUDA GPU, this is {jax.devices()[0].device_kind}"
    capability = jax.devices()[0].compute_capability
    if tuple(map(int, capability.split("."))) < MIN_CAPABILITY:
        return f"head dimensions of MLA need compute capability 9.0, this GPU has {capability}"
    version = _cudnn_version()
    if version < MIN_CUDNN:
        return f"keys wider than values need cuDNN {MIN_CUDNN}, this is {version}"
    return None


def why_not_lowered(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Says why cuDNN could not attend with these arguments on any GPU, None if it could."""
    if q.dtype.itemsize != 2:
        return f"cuDNN takes bfloat16 and float16, not {q.dtype}"
    for name, dim in (("d_qk", q.shape[3]), ("d_v", v.shape[3])):
        if dim % 8 or dim > MAX_HEAD_DIM:
            return f"{name}={dim} must be a multiple of 8 up to {MAX_HEAD_DIM}"
    if q.shape[1] == k.shape[1] == 1:
        return "cuDNN refuses one query with one key, s=1 and s_k=1"
    if causal and q.shape[1] != k.shape[1]:
        return f"its causal mask begins at key 0, but s={q.shape[1]} and s_k={k.shape[1]} differ"
    missing = [name for name in NEEDED if not hasattr(importlib.import_module(PRIMITIVES), name)]
    return f"jax {jax.__version__} lacks {missing}" if missing else None


def why_not(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Says why cuDNN cannot attend with these arguments here, None if it can."""
    return why_not_lowered(q, k, v, causal) or unusable()


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention of `[b, s, h, d]` arrays: the output, and the log-sum-exp `f32[b, h, s]`."""
    primitive, options, unused = _call(NEEDED[0], q, scale, causal)
    out, lse = primitive.bind(q, k, v, *unused, is_training=True, **options)
    return out, lse


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for q, k and v from what `forward` returned and the output's gradient."""
    primitive, options, unused = _call(NEEDED[1], q, scale, causal)
    d_q, d_k, d_v = primitive.bind(q, k, v, *unused, lse, out, d_out, **options)
    return d_q, d_k, d_v


def _call(name, q, scale, causal):
    """A primitive, its parameters, and empty arrays for bias, lengths, offsets and page tables."""
    module = importlib.import_module(PRIMITIVES)
    options = {
        "scale": scale,
        "seed": 0,  # of the dropout, which is off
        "dropout_rate": 0.0,
        "variadic_args": (False, False),  # no bias, no gradient of one
        "mask_type": module.MaskType.CAUSAL if causal else module.MaskType.NO_MASK,
        "layout": module.AttentionLayout.BTNH.value,
        "sliding_window_length": None,
    }
    return getattr(module, name), options, [jnp.zeros(0, q.dtype)] * 7


def _cudnn_version() -> int:
    from jax._src.lib import cuda_versions

    return 0 if cuda_versions is None else cuda_versions.cudnn_get_version()
