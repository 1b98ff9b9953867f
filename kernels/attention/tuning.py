"""Block sizes of chunked attention."""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """`block` queries meet `block` keys at a time."""

    block: int


def pick(length: int) -> Tuning:
    """Blocks of 256 tokens: [b, h, 256, 256] scores stay in a CPU's cache; shorter if all fit."""
    return Tuning(block=min(256, -(-length // 8) * 8))
