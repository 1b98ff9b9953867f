"""Times the FP8 matmuls and quantisers, beside their peers, all with one clock.

`python -m whalejax.bench.gemm` prints one JSON line per row and a short table last. Sections:
ceilings (copy bandwidth, cuBLAS in bf16), dense, random (20 shapes near the real ones), wgrad,
contiguous, masked, kgrouped, quantise, mlp (an expert of DeepSeek-V3, both directions).
`--tune` measures the tunings of every dense case and stores the best in the user's table, which the
kernels read before they ask the cost model. Peers (`whalejax.bench.peers`) appear where they are
installed.
"""

import functools
import sys
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.bench import peers, report
from whalejax.bench.report import CUBLAS, Bench, ours, untimed, worst_row
from whalejax.bench.timing import rotate
from whalejax.kernels import fp8_gemm, grouped_gemm, quantization
from whalejax.kernels.fp8_gemm import cases as dense_cases
from whalejax.kernels.fp8_gemm import reference as dense_reference
from whalejax.kernels.fp8_gemm.tuning import (
    USER_TABLE,
    ranked,
    read_table,
    shape_key,
    write_table,
)
from whalejax.kernels.grouped_gemm import cases as grouped_cases
from whalejax.kernels.grouped_gemm import fp8_reference as grouped_reference

SMALL = (dense_cases.Case(m=64, n=256, k=512), dense_cases.Case(m=256, n=384, k=256))  # on a CPU
TUNED_CANDIDATES = 12  # by the cost model, of each shape
QUANTISED = (8192, 7168)  # tokens and hidden size of DeepSeek-V3
EXPERT = (4096, 7168, 2048)  # tokens, hidden size and width of an expert


SECTIONS = (
    "ceilings",
    "dense",
    "random",
    "wgrad",
    "contiguous",
    "masked",
    "kgrouped",
    "quantise",
    "mlp",
)


def dense(bench: Bench, cases: tuple, op: str = "dense") -> None:
    """`fp8_matmul` beside cuBLASLt and DeepGEMM."""
    for case in cases:
        x, w = dense_inputs(case)
        sets = rotate((x, w))
        found = [ours(fp8_gemm.fp8_matmul, sets)]
        if jax.default_backend() == "gpu":
            found += peers.dense(sets) + peers.bf16(case.m, case.n, case.k)
        wanted = untimed(lambda x, w: dense_reference.fp8_matmul(x, w, jnp.float32))(x, w)
        error = worst_row(found[0].call(x, w), wanted)
        moved = case.m * case.k + case.n * case.k + 2 * case.m * case.n
        bench.time(
            op,
            f"{case.m}x{case.n}x{case.k}",
            found,
            flops=case.flops,
            moved=moved,
            errors={"whalejax": error},
        )


def dense_inputs(case: dense_cases.Case) -> tuple:
    """Random quantised operands of a case."""
    keys = jax.random.split(jax.random.key(case.m + case.n + case.k))

    def make(keys):
        x = jax.random.normal(keys[0], (case.m, case.k), jnp.bfloat16)
        w = jax.random.normal(keys[1], (case.n, case.k), jnp.bfloat16)
        return quantization.quantize(x), quantization.quantize(w, (128, 128))

    return jax.jit(make)(keys)


def wgrad(bench: Bench, cases: tuple) -> None:
    """`fp8_matmul_wgrad`, and our forward pass of as many operations."""
    for case in cases:
        x, dy, _ = dense_cases.draw_wgrad(case, jax.random.key(case.m))
        x_t, dy_t = quantization.quantize_transposed(x), quantization.quantize_transposed(dy)
        sets = rotate((x_t, dy_t))
        found = ours(fp8_gemm.fp8_matmul_wgrad, sets)
        wanted = untimed(lambda x, d: dense_reference.fp8_matmul_wgrad(x, d, None))(x_t, dy_t)
        forward = dense_inputs(dense_cases.Case(m=case.n, n=case.k, k=case.m))
        bench.time(
            "wgrad",
            str(case),
            [
                found,
                ours(fp8_gemm.fp8_matmul, rotate(forward), "whalejax forward"),
                *_on_gpu(peers.wgrad, sets),
            ],
            flops=case.flops,
            errors={"whalejax": worst_row(found.call(x_t, dy_t), wanted)},
        )


def contiguous(bench: Bench, cases: tuple) -> None:
    """`fp8_grouped_matmul` beside DeepGEMM."""
    for case in cases:
        sizes = jnp.asarray(case.sizes, jnp.int32)
        rows = int(sum(-(-size // 128) * 128 for size in case.sizes))
        x, w = grouped_inputs((rows, case.k), (len(case.sizes), case.n, case.k))
        sets = rotate((x, w, sizes))
        found = [
            ours(grouped_gemm.fp8_grouped_matmul, sets),
            *_on_gpu(peers.contiguous, sets, sizes),
        ]
        wanted = untimed(
            lambda x, w, s: grouped_reference.fp8_grouped_matmul(x, w, s, jnp.float32)
        )(x, w, sizes)
        bench.time(
            "contiguous",
            f"{len(case.sizes)} groups {rows}x{case.n}x{case.k}",
            found,
            flops=2 * sum(case.sizes) * case.n * case.k,
            errors={"whalejax": worst_row(found[0].call(x, w, sizes), wanted)},
        )


def masked(bench: Bench, cases: tuple) -> None:
    """`fp8_masked_matmul` beside DeepGEMM."""
    for case in cases:
        counts = jnp.asarray(case.counts, jnp.int32)
        groups = len(case.counts)
        x, w = grouped_inputs((groups, case.max_m, case.k), (groups, case.n, case.k))
        sets = rotate((x, w, counts))
        mean = int(np.mean(case.counts))  # DeepGEMM is told the same
        matmul = functools.partial(grouped_gemm.fp8_masked_matmul, expected_rows=mean)
        found = [
            ours(matmul, sets),
            *_on_gpu(peers.masked, sets, counts),
        ]
        bench.time(
            "masked",
            f"{groups} of ~{mean} {case.n}x{case.k}",
            found,
            flops=2 * sum(case.counts) * case.n * case.k,
        )


def kgrouped(bench: Bench, cases: tuple) -> None:
    """`fp8_grouped_matmul_wgrad`, beside DeepGEMM and our forward pass of as many operations."""
    for case in cases:
        sizes = jnp.asarray(case.sizes, jnp.int32)
        rows = int(sum(-(-size // 128) * 128 for size in case.sizes))
        keys = jax.random.split(jax.random.key(rows))
        operands = tuple(
            quantization.quantize_transposed(
                jax.random.normal(key, (rows, width), jnp.bfloat16), group_sizes=sizes
            )
            for key, width in zip(keys, (case.k, case.n), strict=True)
        )
        sets = rotate((*operands, sizes))
        wanted = untimed(grouped_reference.fp8_grouped_matmul_wgrad)(*operands, sizes)
        found = ours(grouped_gemm.fp8_grouped_matmul_wgrad, sets)
        error = worst_row(found.call(*operands, sizes), wanted)
        x, w = grouped_inputs((rows, case.k), (len(case.sizes), case.n, case.k))
        forward = ours(grouped_gemm.fp8_grouped_matmul, rotate((x, w, sizes)), "whalejax forward")
        bench.time(
            "kgrouped",
            f"{len(case.sizes)} groups {rows}x{case.n}x{case.k}",
            [found, forward, *_on_gpu(peers.kgrouped, sets, sizes)],
            errors={"whalejax": error},
            flops=2 * sum(case.sizes) * case.n * case.k,
        )


def _on_gpu(find, *arguments):
    return find(*arguments) if jax.default_backend() == "gpu" else []


def grouped_inputs(x_shape: tuple[int, ...], w_shape: tuple[int, ...]) -> tuple:
    """Random quantised activations and stacked weights."""
    keys = jax.random.split(jax.random.key(sum(x_shape)))
    x = quantization.quantize(jax.random.normal(keys[0], x_shape, jnp.bfloat16))
    w = quantization.quantize(jax.random.normal(keys[1], w_shape, jnp.bfloat16), (128, 128))
    return x, w


def quantise(bench: Bench) -> None:
    """The quantisers, in bytes read and written."""
    m, k = QUANTISED if jax.default_backend() == "gpu" else (256, 512)
    x = jax.random.normal(jax.random.key(0), (m, k), jnp.bfloat16)
    d_hidden = jax.random.normal(jax.random.key(1), (m, k // 2), jnp.bfloat16)
    sets, size = rotate((x,)), m * k
    scales = size * 4 / 128
    for name, f, arguments, moved in (
        ("1x128", quantization.quantize, sets, 3 * size + scales),
        ("transposed", quantization.quantize_transposed, sets, 3 * size + scales),
        ("both", quantization.quantize_both, sets, 4 * size + 2 * scales),
        ("128x128", lambda x: quantization.quantize(x, (128, 128)), sets, 3 * size),
        ("128x128 both", lambda x: quantization.quantize_both(x, (128, 128)), sets, 4 * size),
        ("swiglu", quantization.swiglu_quantize, sets, 2.5 * size + scales / 2),
        ("swiglu gradient", quantization.swiglu_gradient, rotate((x, d_hidden)), 5 * size),
    ):
        bench.time("quantise", f"{m}x{k}", [ours(f, arguments, name)], moved=moved)


def expert_mlp(linear: Callable, x, w_gate_up, w_down, dy) -> tuple:
    """An expert's output, and the gradients of its input and weights."""

    def forward(x, w_gate_up, w_down):
        gate, up = jnp.split(linear(x, w_gate_up), 2, axis=-1)
        return linear(jax.nn.silu(gate) * up, w_down)

    y, pull = jax.vjp(forward, x, w_gate_up, w_down)
    return y, pull(dy)


def mlp(bench: Bench) -> None:
    """One expert forward and backward: FP8 with its quantisers, beside XLA in bf16."""
    m, hidden, width = EXPERT if jax.default_backend() == "gpu" else (256, 384, 128)
    shapes = ((m, hidden), (2 * width, hidden), (hidden, width), (m, hidden))
    keys = jax.random.split(jax.random.key(0), len(shapes))
    arguments = tuple(
        jax.random.normal(key, shape, jnp.bfloat16) * shape[1] ** -0.5
        for key, shape in zip(keys, shapes, strict=True)
    )

    def bf16(x, w):
        return jnp.einsum("mk,nk->mn", x, w)

    sets = rotate(arguments)
    found = [
        ours(functools.partial(expert_mlp, linear), sets, name, CUBLAS)
        for name, linear in (("whalejax fp8", fp8_gemm.fp8_linear), ("xla bf16", bf16))
    ]
    flops = 3 * 2 * m * hidden * 3 * width
    bench.time("mlp", f"{m}x{hidden}x{width}", found, flops=flops)


def tuned_matmul(x, w, tuning):
    """The matmul kernel with a tuning."""
    from whalejax.kernels.fp8_gemm import hopper

    return hopper.fp8_matmul(x, w, jnp.bfloat16, tuning)


def tune(bench: Bench, cases: tuple) -> None:
    """Measures the tunings that the cost model likes best, and stores the fastest of each case."""
    from whalejax.kernels import mosaic

    found = read_table(USER_TABLE)
    device = found.setdefault(jax.devices()[0].device_kind, {})
    for case in cases:
        x, w = dense_inputs(case)
        sets, ctas = rotate((x, w)), mosaic.num_sms()
        likely = ranked(case.m, case.n, case.k, out_itemsize=2, ctas=ctas)[:TUNED_CANDIDATES]
        tunings = {str(i): t for i, t in enumerate(likely)}
        named = [
            ours(functools.partial(tuned_matmul, tuning=t), sets, name)
            for name, t in tunings.items()
        ]
        times = bench.time("tune", f"{case.m}x{case.n}x{case.k}", named, flops=case.flops)
        best = tunings[min(times, key=lambda name: times[name].row()["burst_us"])]
        device[shape_key(case.m, case.n, case.k, 2)] = best
        write_table(USER_TABLE, found)
    print(f"# tunings written to {USER_TABLE}", flush=True)


def main(args: Sequence[str] | None = None) -> None:
    """Runs the sections that were asked for."""
    parser = report.parser("gemm", __doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--tune", action="store_true", help="measure and store tunings instead")
    args = sys.argv[1:] if args is None else args
    arguments = parser.parse_args(args)
    on_gpu = jax.default_backend() == "gpu"
    if arguments.tune and not on_gpu:
        parser.error("--tune measures kernels: it needs a CUDA GPU")
    bench = Bench("gemm", arguments, args)
    dense_all = dense_cases.BENCHMARK_CASES if on_gpu else SMALL
    runs: dict[str, Callable[[], None]] = {
        "ceilings": bench.ceilings,
        "dense": lambda: dense(bench, dense_all),
        "random": lambda: dense(
            bench, dense_cases.random_cases(20) if on_gpu else SMALL[:1], "random"
        ),
        "wgrad": lambda: wgrad(
            bench,
            dense_cases.WGRAD_BENCHMARK_CASES if on_gpu else dense_cases.WGRAD_CASES[2:3],
        ),
        "contiguous": lambda: contiguous(
            bench,
            grouped_cases.BENCHMARK_CASES if on_gpu else grouped_cases.CASES[:1],
        ),
        "masked": lambda: masked(
            bench,
            grouped_cases.MASKED_BENCHMARK_CASES if on_gpu else grouped_cases.MASKED_CASES[:1],
        ),
        "kgrouped": lambda: kgrouped(
            bench,
            grouped_cases.WGRAD_BENCHMARK_CASES if on_gpu else grouped_cases.CASES[:1],
        ),
        "quantise": lambda: quantise(bench),
        "mlp": lambda: mlp(bench),
    }
    if arguments.tune:
        tune(bench, dense_all)
    else:
        for section in arguments.sections:
            runs[section]()
    bench.table()


if __name__ == "__main__":
    main()
