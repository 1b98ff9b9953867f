"""Cases of paged MLA decode, for benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.kernels.mla.pages import FP8Pages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A batch of sequences with full pages of random keys, in random order.

    Attributes:
      batch: sequences.
      keys: of each sequence, or about so many.
      heads, s_q: of each new token, and new tokens of each sequence.
      varied: whether lengths are normally distributed around `keys`, half of it apart.
      fp8: whether the cache is in FP8.
    """

    batch: int
    keys: int
    heads: int
    s_q: int = 1
    varied: bool = False
    fp8: bool = False
    v_dim: int = 512
    rope: int = 64
    page_size: int = 64

    def __str__(self):
        varied, fp8 = " varied" * self.varied, " fp8" * self.fp8
        return f"b{self.batch} k{self.keys}{varied} h{self.heads} s{self.s_q}{fp8}"

    @property
    def lengths(self) -> np.ndarray:
        """Keys of each sequence, `i32[batch]`."""
        if not self.varied:
            return np.full(self.batch, self.keys, np.int32)
        drawn = np.random.default_rng(0).normal(self.keys, self.keys / 2, self.batch)
        return np.clip(drawn, self.s_q, 2 * self.keys).astype(np.int32)

    @property
    def flops(self) -> int:
        """Of both products, as FlashMLA counts them."""
        total = int(self.lengths.sum())
        return 2 * total * self.s_q * self.heads * (2 * self.v_dim + self.rope)

    @property
    def num_bytes(self) -> int:
        """Of keys, of queries and output in bfloat16."""
        rows = self.batch * self.s_q * self.heads
        d = self.v_dim + self.rope
        key = self.v_dim + -(-self.v_dim // 128) * 4 + 2 * self.rope if self.fp8 else 2 * d
        return int(self.lengths.sum()) * key + 2 * rows * (d + self.v_dim)


# FlashMLA's, then short contexts with few and many queries, then the long ones from FP8.
BF16_CASES = (
    *(Case(batch=128, keys=4096, heads=h, s_q=s) for h in (128, 64, 16) for s in (1, 2)),
    *(Case(batch=64, keys=8192, heads=128, s_q=s) for s in (1, 2)),
    *(Case(batch=16, keys=8192, heads=h) for h in (128, 64, 16)),
    *(Case(batch=1, keys=32768, heads=h) for h in (128, 64, 16)),
    *(Case(batch=128, keys=4096, heads=h, varied=True) for h in (128, 64, 16)),
    *(
        Case(batch=b, keys=1024, heads=h, s_q=s)
        for h in (16, 128)
        for s in (1, 4, 8)
        for b in (1, 32, 128)
    ),
)
BENCHMARK_CASES = BF16_CASES + tuple(
    dataclasses.replace(case, fp8=True) for case in BF16_CASES if case.keys > 1024
)
SMALL_CASES = tuple(
    Case(batch=2, keys=100, heads=4, s_q=2, varied=True, fp8=fp8, v_dim=64, rope=16)
    for fp8 in (False, True)
)


@functools.partial(jax.jit, static_argnames=("case", "dtype"))
def draw(
    case: Case, key: jax.Array, dtype: str
) -> tuple[jax.Array, jax.Array | FP8Pages, jax.Array, jax.Array]:
    """Queries, pages, the table of pages and lengths of a case."""
    keys = jax.random.split(key)
    d, most = case.v_dim + case.rope, -(-int(case.lengths.max()) // case.page_size)
    q = jax.random.normal(keys[0], (case.batch, case.s_q, case.heads, d), dtype)
    pages = (case.batch * most, case.page_size, d)
    kv_pages = jax.random.normal(keys[1], pages, dtype)
    if case.fp8:
        kv_pages = FP8Pages.quantize(kv_pages, case.v_dim)
    table = np.random.default_rng(1).permutation(pages[0]).astype(np.int32)
    return q, kv_pages, jnp.asarray(table.reshape(case.batch, most)), jnp.asarray(case.lengths)
