"""Attention by cuDNN's fused kernels; on Hopper and newer they take MLA's head dims, 192/128."""

import jax

MAX_HEAD_DIM = 256  # on Hopper; older GPUs end at 128
MIN_CUDNN = 91000  # the first whose keys may be wider than values


def unusable() -> str | None:
    """Says why cuDNN cannot be used on this machine, None if it can."""
    if jax.default_backend() != "gpu" or "cuda" not in jax.devices()[0].client.platform_version:
        return f"cuDNN needs a CUDA GPU, this is {jax.devices()[0].device_kind}"
    capability = float(jax.devices()[0].compute_capability)
    if capability < 9:
        return f"head dimensions of MLA need compute capability 9.0, this GPU has {capability}"
    version = _cudnn_version()
    if version < MIN_CUDNN:
        return f"keys wider than values need cuDNN {MIN_CUDNN}, this is {version}"
    return None


def why_not(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Says why cuDNN cannot attend with these arguments, None if it can."""
    if q.dtype.itemsize != 2:
        return f"cuDNN takes bfloat16 and float16, not {q.dtype}"
    for name, dim in (("d_qk", q.shape[3]), ("d_v", v.shape[3])):
        if dim % 8 or dim > MAX_HEAD_DIM:
            return f"{name}={dim} must be a multiple of 8 up to {MAX_HEAD_DIM}"
    return unusable()


def attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """Attention of `[b, s, h, d]` arrays."""
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    mask = MaskType.CAUSAL if causal else MaskType.NO_MASK
    return dot_product_attention(q, k, v, scale=scale, mask_type=mask)


def _cudnn_version() -> int:
    from jax._src.lib import cuda_versions

    return 0 if cuda_versions is None else cuda_versions.cudnn_get_version()
