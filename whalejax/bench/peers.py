"""Peers on a GPU, where they are installed: PyTorch's cuBLASLt, DeepGEMM and FlashMLA.

They read the very arrays that our kernels read, through DLPack, and are timed by the same clock.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.bench.timing import Candidate
from whalejax.kernels.quantization import QuantizedArray


def available() -> list[str]:
    """Names of the peers that are installed."""
    modules = {"torch": "torch", "deepgemm": "deep_gemm", "flashmla": "flash_mla"}
    return [name for name, module in modules.items() if importlib.util.find_spec(module)]


def to_torch(x: jax.Array) -> Any:
    """The same memory as a torch tensor; FP8 travels as bytes, which DLPack knows."""
    import torch

    if x.dtype == jnp.float8_e4m3fn:
        raw = jax.lax.bitcast_convert_type(x, jnp.uint8)
        return torch.from_dlpack(raw).view(torch.float8_e4m3fn)
    return torch.from_dlpack(x)


def _scales(q: QuantizedArray) -> Any:
    """The scales of rows, `[..., ceil(K / 128), M]` where all scales of a column lie together."""
    return to_torch(q.stored_scales)[..., : q.shape[-2]]


def _wait(_):
    import torch

    torch.cuda.synchronize()


def _candidate(name: str, call: Callable, sets: list[tuple]) -> list[Candidate]:
    """A candidate that ran once, or none (and why, printed) if the peer refuses the arguments."""
    try:
        call(*sets[0])
        _wait(None)
    except Exception as error:
        print(f"# {name}: {str(error).splitlines()[0][:150]}")
        return []
    return [Candidate(name, call, sets, _wait)]


def dense(sets: list[tuple[QuantizedArray, QuantizedArray]]) -> list[Candidate]:
    """Peers of `fp8_matmul` on these argument sets: those that are installed and accept them."""
    if "torch" not in available():
        return []
    import torch

    one = torch.ones((), device="cuda")
    per_tensor, blocks, grouped = [], [], []
    for x, w in sets:
        a, b = to_torch(x.values), to_torch(w.values)
        # both peers want strides (1, M)
        tight = _scales(x).contiguous().t()
        w_scales = to_torch(w.scales)
        padded = torch.nn.functional.pad(w_scales, (0, -w_scales.shape[1] % 4))  # for cuBLASLt
        out = torch.empty(a.shape[0], b.shape[0], dtype=torch.bfloat16, device="cuda")
        per_tensor.append((a, b, out))
        blocks.append((a, b, tight, padded.t()[: w_scales.shape[1]], out))
        grouped.append((a, b, tight, w_scales, out))

    def tensor(a, b, out):
        return torch._scaled_mm(
            a, b.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True, out=out
        )

    def block(a, b, a_scales, b_scales, out):
        return torch._scaled_mm(a, b.t(), a_scales, b_scales, out_dtype=torch.bfloat16, out=out)

    found = [
        *_candidate("cublaslt per tensor", tensor, per_tensor),
        *_candidate("cublaslt blocks", block, blocks),
    ]
    if "deepgemm" in available():
        import deep_gemm

        def deepgemm(a, b, a_scales, b_scales, out):
            deep_gemm.fp8_gemm_nt((a, a_scales), (b, b_scales), out, disable_ue8m0_cast=True)
            return out

        found += _candidate("deepgemm", deepgemm, grouped)
    return found


def bf16(m: int, n: int, k: int) -> list[Candidate]:
    """cuBLAS in bf16 through torch, on random data."""
    if "torch" not in available():
        return []
    import torch

    size = 2 * (m * k + n * k)
    copies = max(2, -(-120_000_000 // size))
    sets = [
        (
            torch.randn(m, k, dtype=torch.bfloat16, device="cuda"),
            torch.randn(n, k, dtype=torch.bfloat16, device="cuda"),
        )
        for _ in range(copies)
    ]
    return _candidate("cublas bf16", lambda a, b: torch.mm(a, b.t()), sets)


def contiguous(sets: list[tuple], group_sizes: jax.Array) -> list[Candidate]:
    """DeepGEMM's peer of `fp8_grouped_matmul`, if it is installed."""
    if "deepgemm" not in available():
        return []
    import deep_gemm
    import torch

    layout = []
    for g, size in enumerate(map(int, group_sizes)):
        padded = -(-size // 128) * 128
        layout += [g] * size + [-1] * (padded - size)
    rows = sets[0][0].shape[0]
    layout += [-1] * (rows - len(layout))
    layout = torch.tensor(layout, dtype=torch.int32, device="cuda")
    arguments = []
    for x, w, *_ in sets:
        a, b = to_torch(x.values), to_torch(w.values)
        scales = _scales(x).t()
        out = torch.empty(a.shape[0], b.shape[1], dtype=torch.bfloat16, device="cuda")
        arguments.append((a, scales, b, to_torch(w.scales), out))

    def call(a, a_scales, b, b_scales, out):
        deep_gemm.m_grouped_fp8_gemm_nt_contiguous(
            (a, a_scales), (b, b_scales), out, layout, disable_ue8m0_cast=True
        )
        return out

    return _candidate("deepgemm", call, arguments)


def masked(sets: list[tuple], counts: jax.Array) -> list[Candidate]:
    """DeepGEMM's peer of `fp8_masked_matmul`, if it is installed."""
    if "deepgemm" not in available():
        return []
    import deep_gemm
    import torch

    mask = to_torch(counts)
    expected = int(jnp.mean(counts))
    arguments = []
    for x, w, *_ in sets:
        a, b = to_torch(x.values), to_torch(w.values)
        scales = _scales(x).transpose(1, 2)
        out = torch.empty(*a.shape[:2], b.shape[1], dtype=torch.bfloat16, device="cuda")
        arguments.append((a, scales, b, to_torch(w.scales), out))

    def call(a, a_scales, b, b_scales, out):
        deep_gemm.m_grouped_fp8_gemm_nt_masked(
            (a, a_scales), (b, b_scales), out, mask, expected, disable_ue8m0_cast=True
        )
        return out

    return _candidate("deepgemm", call, arguments)


def wgrad(sets: list[tuple[QuantizedArray, QuantizedArray]]) -> list[Candidate]:
    """DeepGEMM's peer of `fp8_matmul_wgrad`, which always adds to its output."""
    if "deepgemm" not in available():
        return []
    import deep_gemm
    import torch

    arguments = []
    for x_t, dy_t in sets:
        a, b = to_torch(dy_t.values), to_torch(x_t.values)
        out = torch.zeros(a.shape[0], b.shape[0], dtype=torch.float32, device="cuda")
        arguments.append((a, _scales(dy_t).t(), b, _scales(x_t).t(), out))

    def call(a, a_scales, b, b_scales, out):
        deep_gemm.fp8_gemm_nt(
            (a, a_scales), (b, b_scales), out, c=out, recipe=(1, 1, 128), disable_ue8m0_cast=True
        )
        return out

    return _candidate("deepgemm", call, arguments)


def kgrouped(sets: list[tuple], group_sizes: jax.Array) -> list[Candidate]:
    """DeepGEMM's peer of `fp8_grouped_matmul_wgrad`; a group's tokens lie together for it."""
    if "deepgemm" not in available():
        return []
    import deep_gemm
    import torch

    padded = [-(-int(size) // 128) * 128 for size in group_sizes]
    on_device = torch.tensor(padded, dtype=torch.int32, device="cuda")

    def by_group(values):
        parts = to_torch(values).view(torch.uint8).split(padded, dim=1)
        return torch.cat([part.flatten() for part in parts]).view(torch.float8_e4m3fn)

    arguments = []
    for x_t, dy_t, *_ in sets:
        shape = (len(padded), dy_t.shape[0], x_t.shape[0])
        out = torch.zeros(shape, dtype=torch.float32, device="cuda")
        a, b = by_group(dy_t.values), by_group(x_t.values)
        arguments.append((a, _scales(dy_t).t(), b, _scales(x_t).t(), out))

    def call(a, a_scales, b, b_scales, out):
        deep_gemm.k_grouped_fp8_gemm_nt_contiguous(
            (a, a_scales), (b, b_scales), out, padded, on_device, c=out
        )
        return out

    return _candidate("deepgemm", call, arguments)


def mla(sets: list[tuple], *, v_dim: int, scale: float) -> list[Candidate]:
    """FlashMLA on `(q, kv_pages, page_table, lengths, ...)`, planned before it is timed."""
    if "flashmla" not in available():
        return []
    import flash_mla

    def call(q, pages, table, lengths, plan):
        return flash_mla.flash_mla_with_kvcache(
            q, pages, table, lengths, v_dim, plan, softmax_scale=scale, causal=True
        )

    arguments = []
    for q, pages, table, lengths, *_ in sets:
        plan, _ = flash_mla.get_mla_metadata()
        arguments.append(
            (to_torch(q), to_torch(pages)[:, :, None], *map(to_torch, (table, lengths)), plan)
        )
        if not _candidate("flashmla", call, arguments[-1:]):  # its first call plans
            return []
    return _candidate("flashmla", call, arguments)
