"""Cases of the grouped FP8 matmuls, for tests and benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.kernels.groups import ALIGNMENT


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Groups of rows one after another, each starting on a multiple of 128.

    Attributes:
      sizes: rows of each group.
      n, k: every group's weight is `[n, k]`.
      spare: tiles of 128 rows past the last group.
      out_dtype: of the product.
    """

    sizes: tuple[int, ...]
    n: int
    k: int
    spare: int = 0
    out_dtype: str = "bfloat16"

    @property
    def starts(self) -> list[int]:
        """Each group's first row."""
        ends = np.cumsum([-(-size // ALIGNMENT) * ALIGNMENT for size in self.sizes])
        return [0, *ends[:-1].tolist()]

    @property
    def m(self) -> int:
        """All rows, padding included."""
        padded = sum(-(-size // ALIGNMENT) for size in self.sizes)
        return (padded + self.spare) * ALIGNMENT

    @property
    def flops(self) -> int:
        """Multiplications and additions of rows that are no padding."""
        return 2 * sum(self.sizes) * self.n * self.k

    def __str__(self):
        sizes = (
            "+".join(map(str, self.sizes))
            if len(set(self.sizes)) > 1
            else f"{len(self.sizes)}x{self.sizes[0]}"
        )
        return f"{sizes}-{self.n}x{self.k}-{self.out_dtype}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedCase:
    """The first `counts[g]` of `max_m` rows of each group, times its weight `[n, k]`."""

    counts: tuple[int, ...]
    max_m: int
    n: int
    k: int
    out_dtype: str = "bfloat16"

    @property
    def flops(self) -> int:
        """Multiplications and additions of the rows that count."""
        return 2 * sum(self.counts) * self.n * self.k

    def __str__(self):
        mean = sum(self.counts) // len(self.counts)
        counts = f"{len(self.counts)}x{mean}of{self.max_m}"
        return f"{counts}-{self.n}x{self.k}-{self.out_dtype}"


def spread(groups: int, mean: int, max_m: int) -> tuple[int, ...]:
    """Counts of a layer's groups: uniform within 30 % of the mean, as DeepGEMM draws them."""
    low, high = int(mean * 0.7), int(mean * 1.3)
    counts = np.random.default_rng(groups).integers(low, high + 1, groups)
    return tuple(np.minimum(counts, max_m).tolist())


CASES = (
    Case(sizes=(0, 1, 127, 128, 130), n=144, k=272),
    Case(sizes=(130, 0, 0, 1), n=200, k=128, spare=2, out_dtype="float32"),
    Case(sizes=(0, 300, 0), n=24, k=400, out_dtype="float32"),
    Case(sizes=(0, 0, 0), n=64, k=128, spare=2),
    Case(sizes=(256,), n=64, k=272),
)
MASKED_CASES = (
    MaskedCase(counts=(200, 0, 65, 1), max_m=200, n=136, k=272),
    MaskedCase(counts=(0, 0), max_m=7, n=24, k=128, out_dtype="float32"),
    MaskedCase(counts=(64, 64, 64), max_m=64, n=64, k=400, out_dtype="float32"),
)

# Experts of DeepSeek-V3 and others, as DeepGEMM times them: gate and up together, then down.
BENCHMARK_CASES = tuple(
    Case(sizes=(rows,) * groups, n=n, k=k)
    for groups, rows in ((4, 8192), (8, 4096))
    for n, k in (
        (4096, 7168),
        (7168, 2048),
        (6144, 7168),
        (7168, 3072),
        (4096, 4096),
        (4096, 2048),
    )
)
MASKED_BENCHMARK_CASES = tuple(
    MaskedCase(counts=spread(groups, mean, 4096), max_m=4096, n=n, k=k)
    for groups, mean in ((6, 1024), (32, 192), (4, 256), (2, 512))
    for n, k in ((4096, 7168), (7168, 2048))
)
WGRAD_BENCHMARK_CASES = tuple(
    Case(sizes=(rows,) * groups, n=n, k=k, out_dtype="float32")
    for groups, rows in ((4, 8192), (8, 4096), (16, 2048))
    for n, k in ((4096, 7168), (7168, 2048))
)


def real_rows(case: Case) -> np.ndarray:
    """`bool[m]`: the row belongs to a group and is not padding."""
    rows = np.zeros(case.m, bool)
    for start, size in zip(case.starts, case.sizes, strict=True):
        rows[start : start + size] = True
    return rows


@functools.partial(jax.jit, static_argnames="case")
def draw(case: Case, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and sizes of a case, float32; padding rows and weights of empty groups are NaN."""
    keys = jax.random.split(key)
    x = jax.random.normal(keys[0], (case.m, case.k))
    w = jax.random.normal(keys[1], (len(case.sizes), case.n, case.k))
    sizes = jnp.asarray(case.sizes, jnp.int32)
    x = jnp.where(jnp.asarray(real_rows(case))[:, None], x, jnp.nan)
    return x, jnp.where((sizes > 0)[:, None, None], w, jnp.nan), sizes


@functools.partial(jax.jit, static_argnames="case")
def draw_masked(case: MaskedCase, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x, w and counts of a case, float32; rows past a count are NaN, and unused weights."""
    keys = jax.random.split(key)
    groups = len(case.counts)
    x = jax.random.normal(keys[0], (groups, case.max_m, case.k))
    w = jax.random.normal(keys[1], (groups, case.n, case.k))
    counts = jnp.asarray(case.counts, jnp.int32)
    real = jnp.arange(case.max_m)[None] < counts[:, None]
    x = jnp.where(real[..., None], x, jnp.nan)
    return x, jnp.where((counts > 0)[:, None, None], w, jnp.nan), counts
