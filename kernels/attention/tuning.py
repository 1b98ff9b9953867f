"""Block sizes of chunked attention."""

import dataclasses

# Forward and gradients on a CPU of two cores, f32, heads of 48 and 32, median time relative to
# holding all scores. At 256 tokens (b × h = 64) blocks of 64, 128, 256 take 0.68, 0.66, 1.04; at
# 512 (16) 128 and 256 take 0.70, 0.69; at 1024 (16) 64, 128, 256, 512 take 0.57, 0.47, 0.44, 0.51;
# at 4096 (4) 128, 256, 512 take 0.21, 0.20, 0.14. Whole rows of scores, unrolled without an online
# softmax, were slower than the loop at 256, 512 and 2048 tokens.
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
