"""Cases of the dense FP8 matmuls, for tests and benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

TINY = 1e-40  # a denormal float32
OUTLIER = 1000.0  # how much larger an outlying channel of the activations is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes of `x [m, k] @ w.T`, w being `[n, k]`, and what x holds.

    Attributes:
      inputs: `"normal"`, or with normally distributed numbers elsewhere, `"outlier"`: one channel
        is 1000 times as large; `"zeros"`, `"tiny"`: every other row is zero, or denormal.
    """

    m: int
    n: int
    k: int
    out_dtype: str = "bfloat16"
    inputs: str = "normal"

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    def __str__(self):
        inputs = "" if self.inputs == "normal" else f"-{self.inputs}"
        return f"{self.m}x{self.n}x{self.k}-{self.out_dtype}{inputs}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class WgradCase:
    """Sizes of `dy.T @ x`, dy being `[m, n]` and x `[m, k]`.

    Attributes:
      accumulate: whether the product is added to an array.
    """

    m: int
    n: int
    k: int
    accumulate: bool = False

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.m * self.n * self.k

    def __str__(self):
        return f"{self.m}x{self.n}x{self.k}" + ("-accumulate" if self.accumulate else "")


# kv_a_proj of DeepSeek-V3 has 576 rows, V2-Lite's MLP 10944 columns
CASES = (
    Case(m=1, n=576, k=272),
    Case(m=63, n=576, k=128),
    Case(m=64, n=200, k=272, out_dtype="float32"),
    Case(m=65, n=24, k=16384),
    Case(m=65, n=24, k=16384, out_dtype="float32"),
    Case(m=127, n=576, k=272, out_dtype="float32"),
    Case(m=129, n=8, k=10944),
    Case(m=129, n=576, k=16),
    Case(m=130, n=200, k=512, inputs="outlier"),
    Case(m=130, n=200, k=512, inputs="zeros"),
    Case(m=130, n=200, k=512, inputs="tiny", out_dtype="float32"),
)
WGRAD_CASES = (
    WgradCase(m=1, n=64, k=272),
    WgradCase(m=130, n=272, k=144, accumulate=True),
    WgradCase(m=256, n=16, k=576),
    WgradCase(m=4096, n=32, k=48, accumulate=True),
)

# N and K of linear layers of DeepSeek-V3, then of V2-Lite.
LAYERS = (
    (2112, 7168),
    (576, 7168),
    (24576, 1536),
    (32768, 512),
    (7168, 16384),
    (4096, 7168),
    (7168, 2048),
    (3072, 2048),
    (4096, 512),
    (2048, 2048),
    (21888, 2048),
    (2048, 10944),
    (2816, 2048),
    (2048, 1408),
)
# DeepSeek-V3's at prefill, a square, and decode, as DeepGEMM times them.
BENCHMARK_CASES = (
    *(Case(m=4096, n=n, k=k) for n, k in LAYERS[:7]),
    Case(m=8192, n=8192, k=8192),
    *(
        Case(m=m, n=n, k=k)
        for m in (64, 128)
        for n, k in ((7168, 16384), (4096, 7168), (24576, 1536), (7168, 2048))
    ),
)
WGRAD_BENCHMARK_CASES = (
    WgradCase(m=4096, n=7168, k=2048),
    WgradCase(m=4096, n=4096, k=7168),
    WgradCase(m=8192, n=8192, k=8192),
)


def random_cases(number: int, seed: int = 0) -> tuple[Case, ...]:
    """Shapes near those of the real models: M from 1 to 8192, N and K up to a tile away."""
    rng = np.random.default_rng(seed)
    return tuple(
        Case(
            m=int(2 ** rng.uniform(0, 13)),
            n=max(16, n + 16 * int(rng.integers(-8, 9))),
            k=max(16, k + 16 * int(rng.integers(-8, 9))),
        )
        for n, k in rng.permutation(np.resize(LAYERS, (number, 2))).tolist()
    )


@functools.partial(jax.jit, static_argnames="case")
def draw(case: Case, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x and w of a case, float32; neighbouring rows of x differ in magnitude by up to 2^16."""
    keys = jax.random.split(key, 3)
    magnitude = jnp.exp2(jax.random.uniform(keys[2], (case.m, 1), minval=-8, maxval=8))
    x = jax.random.normal(keys[0], (case.m, case.k)) * magnitude
    if case.inputs == "outlier":
        x = x.at[:, case.k // 3].multiply(OUTLIER)
    elif case.inputs in ("zeros", "tiny"):
        x = x.at[1::2].set(0.0 if case.inputs == "zeros" else TINY)
    return x, jax.random.normal(keys[1], (case.n, case.k))


@functools.partial(jax.jit, static_argnames="case")
def draw_wgrad(case: WgradCase, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """x and dy of a case, bfloat16, and what the product is added to, or None."""
    keys = jax.random.split(key, 3)
    x = jax.random.normal(keys[0], (case.m, case.k), jnp.bfloat16)
    dy = jax.random.normal(keys[1], (case.m, case.n), jnp.bfloat16)
    total = jax.random.normal(keys[2], (case.n, case.k)) if case.accumulate else None
    return x, dy, total
