"""Powers of x modulo CRC32C's polynomial, and their logarithms.

A polynomial of degree below 32 over the bits is an int, as CRC32C has it: x**0 is the highest bit,
x**31 the lowest. The polynomial P is x + 1 times a primitive polynomial of degree 31, so
x**0, x**1, … repeat after 2**31 - 1, and no earlier: that number is prime.
"""

import functools

import numpy as np

ONE = 0x80000000
X32 = 0x82F63B78  # x**32 mod P: P itself without its highest term
ORDER = 2**31 - 1
BABY_STEPS = 2**16


def times_x(value: int) -> int:
    """`value * x mod P`."""
    return (value >> 1) ^ (X32 if value & 1 else 0)


def times(values: np.ndarray, factor: int) -> np.ndarray:
    """`values * factor mod P`, `u32[N]`; multiplication by a constant is linear in the bits."""
    product = np.zeros_like(values)
    for bit in range(31, -1, -1):
        product ^= (values >> np.uint32(bit) & np.uint32(1)) * np.uint32(factor)
        factor = times_x(factor)
    return product


def product(one: int, other: int) -> int:
    """`one * other mod P`."""
    result = 0
    for bit in range(31, -1, -1):
        result ^= other if one >> bit & 1 else 0
        other = times_x(other)
    return result


def power(exponent: int) -> int:
    """`x**exponent mod P`; a negative exponent divides."""
    exponent %= ORDER
    result, square = ONE, times_x(ONE)
    while exponent:
        if exponent & 1:
            result = product(result, square)
        square = product(square, square)
        exponent >>= 1
    return result


def logarithm(value: int, below: int) -> int | None:
    """The `k` in `range(below)` with `x**k mod P == value`; None if there is none.

    Baby-step giant-step: `value / x**(i * BABY_STEPS)` for all i, of which one is a small power.
    """
    giants = _geometric(value, power(-BABY_STEPS), -(-min(below, ORDER) // BABY_STEPS))
    powers, exponents = _baby_steps()
    nearest = np.minimum(np.searchsorted(powers, giants), BABY_STEPS - 1)
    hits = np.flatnonzero(powers[nearest] == giants)
    if not len(hits):
        return None
    exponent = int(hits[0]) * BABY_STEPS + int(exponents[nearest[hits[0]]])
    return exponent if exponent < below else None


def _geometric(first: int, ratio: int, count: int) -> np.ndarray:
    """`first * ratio**i` for i below `count`, `u32[count]`; doubles what there is."""
    terms = np.array([first], np.uint32)
    while len(terms) < count:
        terms = np.concatenate([terms, times(terms, ratio)])
        ratio = product(ratio, ratio)
    return terms[:count]


@functools.cache
def _baby_steps() -> tuple[np.ndarray, np.ndarray]:
    """The first powers of x in ascending order, and their exponents."""
    powers = _geometric(ONE, times_x(ONE), BABY_STEPS)
    exponents = np.argsort(powers)
    return powers[exponents], exponents
