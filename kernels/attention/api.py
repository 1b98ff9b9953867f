"""Front door of attention: checks sizes, chooses a backend for the device lowered for, calls it."""

import jax

from whalejax.kernels.backend import choose

BACKENDS = {
    "cudnn": "whalejax.kernels.attention.cudnn",
    "chunked": "whalejax.kernels.attention.chunked",
    "reference": "whalejax.kernels.attention.reference",
}


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    causal: bool = True,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention with values narrower than keys, as expanded MLA needs; differentiable.

    Args:
      q: `bf16|f16|f32[b, s, h, d_qk]`.
      k: `[b, s, h, d_qk]` of q's dtype.
      v: `[b, s, h, d_v]` of q's dtype.
      scale: factor on the scores before the softmax.
      causal: query i sees keys 0 to i; otherwise all.
      implementation: `"cudnn"`, `"chunked"`, `"reference"` (holds all scores: for tests), or None
        for the fastest: cuDNN on a GPU that has it, else chunked.

    Returns:
      `[b, s, h, d_v]` in q's dtype; the softmax is computed in float32.

    Raises:
      ValueError: shapes or dtypes do not fit, or the implementation is unknown; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.

    Source: FlashAttention-2 (arXiv 2307.08691) for the chunked form.
    """
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"attention: q.shape={q.shape} and k.shape={k.shape} must be the same [b, s, h, d_qk] "
            f"and v.shape={v.shape} [b, s, h, d_v]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"attention: q.dtype={q.dtype}, k.dtype={k.dtype}, v.dtype={v.dtype} must be the same"
        )
    backend = choose("attention", BACKENDS, implementation, q, k, v)
    return backend.attention(q, k, v, scale, causal)
