"""Block sizes of chunked attention."""

import dataclasses

# Forward and backward on a CPU of two cores, f32, heads of 48 and 32, time relative to holding all
# scores: at 256 tokens (b × h = 64) blocks of 64, 128, 256 take 0.63, 0.64, 1.2; at 1024 (16)
# 0.29, 0.25, 0.32; one row of scores per block, unrolled without an online softmax, 0.8 at 256.
SMALL_BLOCK = 128
# A GPU without cuDNN for these arguments pays for each step of the loops more than for its size.
LARGE_BLOCK, LARGE_FROM = 256, 2048


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """`block` queries meet `block` keys at a time."""

    block: int

    def __post_init__(self):
        if self.block < 1:
            raise ValueError(f"block={self.block} must be at least 1")


def pick(length: int, key_length: int) -> Tuning:
    """As few blocks as the largest size allows, of one size, so that little is padding."""
    longest = max(length, key_length)
    num_blocks = -(-longest // (LARGE_BLOCK if longest > LARGE_FROM else SMALL_BLOCK))
    block = -(-longest // num_blocks)
    return Tuning(block=-(-block // 8) * 8)
