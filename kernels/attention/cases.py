"""Cases of attention, for tests and the benchmark."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call: `[batch, length, heads, d_qk]` queries and keys, `d_v` values."""

    batch: int = 1
    length: int
    heads: int = 2
    d_qk: int = 24
    d_v: int = 16
    dtype: str = "float32"
    causal: bool = True

    @property
    def scale(self) -> float:
        """The usual factor on the scores."""
        return self.d_qk**-0.5

    def __str__(self):
        kind = "causal" if self.causal else "full"
        return f"{self.batch}x{self.length}x{self.heads}-{self.d_qk}-{self.d_v}-{self.dtype}-{kind}"


CASES = (
    Case(length=1),
    Case(length=7, batch=3, heads=1),
    Case(length=130, causal=False),
    Case(length=257, d_qk=16, d_v=24),
    Case(length=600, causal=False),
    Case(length=700, d_qk=192, d_v=128),
    Case(length=300, d_qk=192, d_v=128, dtype="bfloat16"),
    Case(length=96, batch=2),
)
# DeepSeek-V3's head dimensions, at sizes of training and prefill on one GPU
BENCHMARK_CASES = (
    Case(batch=4, length=4096, heads=16, d_qk=192, d_v=128, dtype="bfloat16"),
    Case(batch=1, length=8192, heads=16, d_qk=192, d_v=128, dtype="bfloat16"),
)


def draw(case: Case, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normally distributed q, k and v of a case."""
    keys = jax.random.split(key, 3)
    shapes = [(case.batch, case.length, case.heads, d) for d in (case.d_qk, case.d_qk, case.d_v)]
    q, k, v = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    return q.astype(case.dtype), k.astype(case.dtype), v.astype(case.dtype)
