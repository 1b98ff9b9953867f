import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.generation.cache import CacheConfig, PageAllocator, make_pages

# an owner and how many tokens it asks for; 0 gives its pages back
ACTIONS = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 40)), max_size=60)


@given(num_pages=st.integers(1, 12), page_size=st.integers(1, 9), actions=ACTIONS)
@settings(max_examples=200, deadline=None)
def test_a_page_has_one_owner_at_a_time(num_pages, page_size, actions):
    allocator, owned = PageAllocator(num_pages, page_size), {}
    for owner, tokens in actions:
        needed = -(-tokens // page_size)
        free = num_pages - sum(map(len, owned.values()))
        if tokens == 0 and owner in owned:
            allocator.free(owner)
            del owned[owner]
        elif tokens == 0 or owner in owned:
            call = allocator.free if tokens == 0 else lambda o, n=tokens: allocator.allocate(o, n)
            with pytest.raises(ValueError, match=f"owner {owner} has"):
                call(owner)
        elif needed > free:
            assert not allocator.fits(tokens)
            with pytest.raises(ValueError, match=f"{free} of {num_pages} are free"):
                allocator.allocate(owner, tokens)
        else:
            assert allocator.fits(tokens)
            owned[owner] = allocator.allocate(owner, tokens)
            assert len(owned[owner]) == needed
        held = [page for pages in owned.values() for page in pages]
        assert len(set(held)) == len(held) and set(held) <= set(range(num_pages))
        assert allocator.num_free == num_pages - len(held)


def test_too_few_pages_are_told_in_numbers():
    allocator = PageAllocator(num_pages=5, page_size=4)
    allocator.allocate(0, 9)
    with pytest.raises(ValueError, match="11 tokens need 3 pages of 4, but 2 of 5 are free"):
        allocator.allocate(1, 11)


def test_a_caller_cannot_change_what_is_owned():
    allocator = PageAllocator(num_pages=4, page_size=1)
    allocator.allocate(0, 2).append(99)
    allocator.free(0)
    assert sorted(allocator.allocate(1, 4)) == [0, 1, 2, 3]


def test_pages_have_room_for_every_slot_at_its_longest(v3_model):
    config = CacheConfig(num_slots=3, max_length=17, page_size=8)
    assert (config.pages_per_slot, config.total_pages) == (3, 9)
    pages = make_pages(v3_model.config, config, jnp.bfloat16)
    assert pages.shape == (2, 9, 8, 24 + 6) and pages.dtype == jnp.bfloat16
    fewer = CacheConfig(num_slots=3, max_length=17, page_size=8, num_pages=4)
    assert make_pages(v3_model.config, fewer, jnp.float32).shape[1] == 4


@pytest.mark.parametrize("name", ["num_slots", "max_length", "page_size", "num_pages"])
def test_impossible_sizes_are_refused(name):
    with pytest.raises(ValueError, match=f"{name}=0"):
        CacheConfig(**{name: 0})
