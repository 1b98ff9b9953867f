"""What the decode kernel is made for, in numbers that need no GPU."""

BLOCK = 64  # keys that a worker takes at a time; a page is one or two blocks
ROWS = 64  # of queries that a CTA takes: a row is a head of a new token
ROPE = 64  # columns of keys behind the values


def num_tiles(s_q: int, heads: int) -> int:
    """CTAs that a worker is, one for every `ROWS` rows of queries."""
    return -(-s_q * heads // ROWS)
