"""Front door of attention: checks sizes, chooses a backend for the device lowered for, calls it."""

import functools
import importlib

import jax
from jax.ad_checkpoint import checkpoint_name

from whalejax.kernels.backend import choose

BACKENDS = {
    "cudnn": "whalejax.kernels.attention.cudnn",
    "mosaic_gpu": "whalejax.kernels.attention.hopper",
    "chunked": "whalejax.kernels.attention.chunked",
    "reference": "whalejax.kernels.attention.reference",
}
DTYPES = ("bfloat16", "float16", "float32", "float64")


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

    Padding at the end of sequences needs no mask while `causal`: no earlier query sees it.

    Args:
      q: `bf16|f16|f32|f64[b, s, h, d_qk]`.
      k: `[b, s_k, h, d_qk]` of q's dtype.
      v: `[b, s_k, h, d_v]` of q's dtype.
      scale: factor on the scores before the softmax; a Python number.
      causal: query i sees the keys 0 to i + s_k - s, so that the last query sees the last key;
        otherwise every query sees all.
      implementation: `"cudnn"`, `"mosaic_gpu"`, `"chunked"`, `"reference"` (holds all scores: for
        tests), or None for the fastest on the platform that is lowered for: cuDNN on CUDA if it
        takes these arguments, else chunked.

    Returns:
      `[b, s, h, d_v]` in q's dtype; the softmax is computed in float32, of float64 in float64.

    Raises:
      ValueError: shapes or dtypes do not fit, there are more causal queries than keys, or the
        implementation is unknown; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.

    Under `jax.checkpoint` the residuals are named `attention_out` and `attention_lse`.

    Source: FlashAttention-2 (arXiv 2307.08691); MLA in expanded form is DeepSeek-V2
    (arXiv 2405.04434), section 2.1.
    """
    _check(q, k, v, causal)
    if implementation is None:
        cuda, default = _best_on_cuda(q, k, v, causal), BACKENDS["chunked"]
    else:
        cuda = choose("attention", BACKENDS, implementation, q, k, v, causal).__name__
        default = cuda
    return _attend(q, k, v, float(scale), causal, cuda, default)


def _check(q, k, v, causal):
    shapes = f"q.shape={q.shape}, k.shape={k.shape}, v.shape={v.shape}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise ValueError(f"attention: {shapes} must each have four axes: b, s, h, d")
    b, s, h, d_qk = q.shape
    s_k = k.shape[1]
    if k.shape != (b, s_k, h, d_qk) or v.shape[:3] != (b, s_k, h):
        raise ValueError(
            f"attention: {shapes} must be [b, s, h, d_qk], [b, s_k, h, d_qk] and [b, s_k, h, d_v]"
        )
    if s_k == 0 or (causal and s > s_k):
        raise ValueError(
            f"attention: s={s} queries and s_k={s_k} keys with causal={causal}: every query must "
            f"see a key, so pass s <= s_k ({shapes})"
        )
    if not q.dtype == k.dtype == v.dtype or q.dtype.name not in DTYPES:
        raise ValueError(
            f"attention: q.dtype={q.dtype}, k.dtype={k.dtype}, v.dtype={v.dtype} must be the same, "
            f"one of {DTYPES}"
        )


def _best_on_cuda(q, k, v, causal):
    """Module path of the backend for CUDA GPUs; JAX's Mosaic kernel runs only when it is named.

    Asked of this machine's GPU if it has one; without one, a Hopper with a new cuDNN is assumed.
    """
    cudnn = importlib.import_module(BACKENDS["cudnn"])
    ask = cudnn.why_not if jax.default_backend() == "gpu" else cudnn.why_not_lowered
    return BACKENDS["chunked" if ask(q, k, v, causal) else "cudnn"]


# The gradient is defined outside the choice of platform: differentiating `platform_dependent`
# itself would save the residuals of every platform, those not taken as zeros.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5, 6))
def _attend(q, k, v, scale, causal, cuda, default):
    return _by_platform("forward", (q, k, v), scale, causal, cuda, default)[0]


def _attend_saving(q, k, v, scale, causal, cuda, default):
    out, lse = _by_platform("forward", (q, k, v), scale, causal, cuda, default)
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, out, lse)


def _attend_backward(scale, causal, cuda, default, residuals, d_out):
    return _by_platform("backward", (*residuals, d_out), scale, causal, cuda, default)


_attend.defvjp(_attend_saving, _attend_backward)


def _by_platform(function, arguments, scale, causal, cuda, default):
    """Calls `function` of the module `cuda` where lowered for CUDA, of `default` elsewhere."""

    def of(path):
        backend = importlib.import_module(path)
        return lambda *arrays: getattr(backend, function)(*arrays, scale, causal)

    if cuda == default:
        return of(default)(*arguments)
    return jax.lax.platform_dependent(*arguments, cuda=of(cuda), default=of(default))
