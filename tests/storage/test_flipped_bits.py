"""Locating a flipped bit by its CRC32C: against brute force, and where it must say no."""

import random
import time

import crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.storage.checksums import LOCATABLE, flipped_bit
from whalejax.storage.polynomials import BABY_STEPS, ONE, ORDER, logarithm, power, product, times_x

MIB = 2**20


def flipped(data, *bits):
    """A copy with bits flipped, `8 * byte + bit`."""
    copy = bytearray(data)
    for bit in bits:
        copy[bit // 8] ^= 1 << bit % 8
    return bytes(copy)


def located(data, damaged):
    return flipped_bit(crc32c.crc32c(data), crc32c.crc32c(damaged), len(data))


def single_bits(size):
    """By brute force: from the difference of checksums to the bit."""
    zeros = bytes(size)
    stored = crc32c.crc32c(zeros)
    return {stored ^ crc32c.crc32c(flipped(zeros, bit)): bit for bit in range(8 * size)}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 33, 64])
def test_every_bit_of_small_sizes(size):
    data = random.Random(size).randbytes(size)
    for bit in range(8 * size):
        assert located(data, flipped(data, bit)) == bit


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_bits_of_any_size(data):
    size = data.draw(st.integers(1, 3 * MIB))
    bit = data.draw(st.sampled_from([0, 8 * size - 1]) | st.integers(0, 8 * size - 1))
    stored = np.random.default_rng(size).bytes(size)
    assert located(stored, flipped(stored, bit)) == bit


@pytest.mark.parametrize("size", [32 * MIB, 32 * MIB + 5])
def test_first_and_last_bit_of_a_large_extent_in_time(size):
    stored = bytes(size)
    for bit in (0, 8 * size - 1):
        damaged = flipped(stored, bit)
        checksums = crc32c.crc32c(stored), crc32c.crc32c(damaged)
        begin = time.perf_counter()
        assert flipped_bit(*checksums, size) == bit
        assert time.perf_counter() - begin < 0.5  # 2 ms on an idle core


@pytest.mark.parametrize("bit", [0, 1, 12345, 8 * LOCATABLE - 1])
def test_the_largest_size(bit):
    """Without the bytes: a flipped bit changes the checksum by a power of x."""
    assert flipped_bit(0, power(32 + 8 * LOCATABLE - 1 - bit), LOCATABLE) == bit


@pytest.mark.parametrize("size", [-1, LOCATABLE + 1])
def test_sizes_whose_positions_cannot_be_told_apart_are_refused(size):
    with pytest.raises(ValueError, match=f"size={size} must be 0 to 268435455"):
        flipped_bit(0, 1, size)


def test_powers_repeat_after_the_order_and_no_earlier():
    """So the first and the last bit of 256 MiB would have one checksum."""
    assert all(ORDER % divisor for divisor in range(2, 46341))  # prime: nothing else can repeat
    assert power(ORDER) == power(0) == ONE != power(1) == times_x(ONE)
    assert 8 * LOCATABLE <= ORDER < 8 * (LOCATABLE + 1)


def test_no_difference_and_no_bytes_have_no_flipped_bit():
    assert flipped_bit(5, 5, 100) is None
    assert flipped_bit(5, 6, 0) is None


@pytest.mark.parametrize("size", [1, 3, 9])
def test_two_flipped_bits_look_like_one_only_where_the_checksum_says_so(size):
    """P has the factor x + 1, so an even number of flipped bits never does."""
    truth = single_bits(size)
    zeros = bytes(size)
    for one in range(8 * size):
        for other in range(one):
            damaged = flipped(zeros, one, other)
            assert crc32c.crc32c(zeros) ^ crc32c.crc32c(damaged) not in truth
            assert located(zeros, damaged) is None


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_any_difference_is_judged_as_brute_force_does(size, difference):
    truth = single_bits(size)
    assert flipped_bit(7, 7 ^ difference, size) == truth.get(difference)
    known = difference % (8 * size)
    assert flipped_bit(0, list(truth)[known], size) == known


def test_six_in_a_hundred_random_faults_look_like_one_bit():
    """The reason for a second checksum beside CRC32C: 2**28 bits of 2**32 differences."""
    draw, tries = random.Random(0), 800
    found = sum(flipped_bit(0, draw.getrandbits(32), 32 * MIB) is not None for _ in range(tries))
    assert abs(found / tries - 1 / 16) < 3 * (15 / 256 / tries) ** 0.5  # 3 standard deviations


@given(st.integers(-(2**40), 2**40), st.integers(-(2**40), 2**40))
@settings(deadline=None)
def test_exponents_add(one, other):
    assert product(power(one), power(other)) == power(one + other)


def test_logarithms_stop_below():
    assert logarithm(power(1000), below=1001) == 1000
    assert logarithm(power(1000), below=1000) is None


def test_logarithms_at_the_ends_of_the_table_and_between_two_giant_steps():
    powers = [ONE]
    while len(powers) < BABY_STEPS:
        powers.append(times_x(powers[-1]))
    for value in (min(powers), max(powers)):
        assert logarithm(value, below=ORDER) == powers.index(value)
    for exponent in (BABY_STEPS - 1, BABY_STEPS, ORDER - 1):
        assert logarithm(power(exponent), below=ORDER) == exponent
