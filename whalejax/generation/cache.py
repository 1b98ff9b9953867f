"""The paged latent cache: its pages on the device, and who owns them on the host."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.model.config import ModelConfig, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """Sizes of the cache.

    Attributes:
      num_slots: sequences that decode at once.
      max_length: tokens of the longest sequence, prompt and answer together.
      page_size: tokens of a page.
      num_pages: pages of all slots; None for enough for every slot at its longest.
    """

    num_slots: int = 8
    max_length: int = 2048
    page_size: int = 64
    num_pages: int | None = None

    def __post_init__(self):
        check_positive(self, "num_slots", "max_length", "page_size")
        if self.num_pages is not None:
            check_positive(self, "num_pages")

    @property
    def pages_per_slot(self) -> int:
        """Pages of the longest sequence: the width of the page table."""
        return -(-self.max_length // self.page_size)

    @property
    def total_pages(self) -> int:
        """Pages that there are."""
        return self.num_slots * self.pages_per_slot if self.num_pages is None else self.num_pages


def make_pages(model: ModelConfig, config: CacheConfig, dtype: Any) -> jax.Array:
    """Empty pages `dtype[layers, pages, page_size, cache_dim]`."""
    shape = (model.num_hidden_layers, config.total_pages, config.page_size, model.mla.cache_dim)
    return jnp.zeros(shape, dtype)


class PageAllocator:
    """Hands pages out and takes them back; a page has one owner at a time.

    A sequence gets the pages of its longest possible text when it begins, so that none that began
    can run out half way.

    Args:
      num_pages: pages, numbered from 0.
      page_size: tokens of a page.
    """

    def __init__(self, num_pages: int, page_size: int):
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(num_pages - 1, -1, -1))
        self._owned: dict[int, list[int]] = {}

    @property
    def num_free(self) -> int:
        """Pages without an owner."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens."""
        return -(-tokens // self.page_size)

    def fits(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens could begin now."""
        return self.pages_for(tokens) <= self.num_free

    def allocate(self, owner: int, tokens: int) -> list[int]:
        """Gives `owner` the pages of `tokens` tokens.

        Raises:
          ValueError: the owner has pages already, or too few are free.
        """
        needed = self.pages_for(tokens)
        if owner in self._owned:
            raise ValueError(f"owner {owner} has {len(self._owned[owner])} pages already")
        if needed > self.num_free:
            raise ValueError(
                f"{tokens} tokens need {needed} pages of {self.page_size}, but {self.num_free} of "
                f"{self.num_pages} are free"
            )
        self._owned[owner] = [self._free.pop() for _ in range(needed)]
        return list(self._owned[owner])

    def free(self, owner: int) -> None:
        """Takes all pages of `owner` back.

        Raises:
          ValueError: the owner has none.
        """
        if owner not in self._owned:
            raise ValueError(f"owner {owner} has no pages")
        self._free.extend(reversed(self._owned.pop(owner)))
