"""Cases of attention, for tests and the benchmark."""

import dataclasses

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of one call: `[batch, length, heads, d_qk]` queries, `d_v` values.

    There are `key_length` keys, or as many as queries where it is None.
    """

    batch: int = 1
    length: int
    key_length: int | None = None
    heads: int = 2
    d_qk: int = 24
    d_v: int = 16
    dtype: str = "float32"
    causal: bool = True

    @property
    def scale(self) -> float:
        """The usual factor on the scores."""
        return self.d_qk**-0.5

    @property
    def pairs(self) -> int:
        """How often a query of one head sees a key."""
        keys = self.key_length or self.length
        unseen = self.length * (self.length - 1) // 2 if self.causal else 0
        return self.length * keys - unseen

    @property
    def forward_flops(self) -> int:
        """Of the scores and the output."""
        return 2 * self.batch * self.heads * self.pairs * (self.d_qk + self.d_v)

    @property
    def backward_flops(self) -> int:
        """Of the scores once more, and of the gradients for weights, q, k and v."""
        return 2 * self.batch * self.heads * self.pairs * (3 * self.d_qk + 2 * self.d_v)

    def __str__(self):
        length = f"{self.length}" + (f"of{self.key_length}" if self.key_length else "")
        kind = "causal" if self.causal else "full"
        return f"{self.batch}x{length}x{self.heads}-{self.d_qk}-{self.d_v}-{self.dtype}-{kind}"


CASES = (
    Case(length=1),
    Case(length=7, batch=3, heads=1),
    Case(length=96, batch=2),
    Case(length=130, causal=False),
    Case(length=257, d_qk=16, d_v=24),
    Case(length=256, batch=2, heads=4, d_qk=48, d_v=32),
    Case(length=9, key_length=300),
    Case(length=150, key_length=401, causal=False),
    Case(length=513, d_qk=192, d_v=128),
    Case(length=7, dtype="float16"),
    Case(length=300, d_qk=192, d_v=128, dtype="bfloat16"),
)
# DeepSeek-V3's head dimensions, at sizes of training and prefill on one GPU; the last for JAX's
# Mosaic GPU kernel, which takes no bfloat16
BENCHMARK_CASES = (
    Case(batch=4, length=4096, heads=16, d_qk=192, d_v=128, dtype="bfloat16"),
    Case(batch=1, length=8192, heads=16, d_qk=192, d_v=128, dtype="bfloat16"),
    Case(batch=1, length=8192, heads=16, d_qk=192, d_v=128, dtype="float16"),
)
# the demo's training step, and a longer sequence, on a CPU
SMALL_BENCHMARK_CASES = (
    Case(batch=16, length=256, heads=4, d_qk=48, d_v=32),
    Case(batch=1, length=2048, heads=4, d_qk=48, d_v=32),
)


def draw(case: Case, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Normally distributed q, k and v of a case, and a gradient of the output."""
    b, s, h, s_k = case.batch, case.length, case.heads, case.key_length or case.length
    shapes = (
        (b, s, h, case.d_qk),
        (b, s_k, h, case.d_qk),
        (b, s_k, h, case.d_v),
        (b, s, h, case.d_v),
    )
    keys = jax.random.split(key, 4)
    arrays = (jax.random.normal(key, s) for key, s in zip(keys, shapes, strict=True))
    q, k, v, d_out = (x.astype(case.dtype) for x in arrays)
    return q, k, v, d_out
