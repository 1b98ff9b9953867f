import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.generation import engine as engine_module
from whalejax.generation.cache import CacheConfig
from whalejax.generation.engine import Completion, Engine
from whalejax.generation.sampling import SamplingConfig
from whalejax.model.decoder import Decoder

CACHE = CacheConfig(num_slots=3, max_length=40, page_size=8)
NEW = 11
HOT = SamplingConfig(temperature=1.0, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def engine(v3_model):
    """An engine for tests that only need one; each leaves it free."""
    return Engine(v3_model, CACHE)


@pytest.fixture
def garbage(monkeypatch):
    """Fills the tables of every stream with pages that do not exist."""
    make = engine_module._Slots.__init__

    def with_garbage(self, *args):
        make(self, *args)
        self.page_table[:] = 2**30

    monkeypatch.setattr(engine_module._Slots, "__init__", with_garbage)


def full_logits(model, prompts, completions):
    """Logits of the uncached forward over each prompt and its answer, `[request, t, vocab]`."""
    texts = [p + c.tokens for p, c in zip(prompts, completions, strict=True)]
    padded = np.zeros((len(texts), max(map(len, texts))), np.int32)
    for row, text in zip(padded, texts, strict=True):
        row[: len(text)] = text
    return np.asarray(nnx.jit(lambda m, t: m(t))(model, jnp.asarray(padded)))


def test_greedy_text_is_the_argmax_of_the_full_forward(model, prompts, garbage):
    engine = Engine(model, CACHE)
    engine._pages = jnp.full_like(engine._pages, jnp.nan)  # free pages are never read
    completions = engine.generate(prompts, max_new_tokens=NEW)
    assert [len(c.tokens) for c in completions] == [NEW] * len(prompts)
    assert {c.finish_reason for c in completions} == {"length"}
    full = full_logits(model, prompts, completions)
    for prompt, completion, scores in zip(prompts, completions, full, strict=True):
        at = np.arange(NEW) + len(prompt) - 1
        chosen = scores[at, completion.tokens]
        # a token may only differ from the argmax where the two scores round to the same
        np.testing.assert_allclose(chosen, scores[at].max(-1), atol=1e-5 * np.abs(scores).max())
        assert (np.sort(scores[at])[:, -2] < chosen).mean() > 0.9  # and nearly all are distinct
    assert len({tuple(c.tokens) for c in completions}) == len(prompts)


def test_one_decode_step_is_compiled_for_any_mix(engine, prompts):
    engine.generate(prompts[:1], max_new_tokens=2)
    engine.generate(prompts, sampling=HOT, max_new_tokens=5)
    engine.generate(prompts[3:], max_new_tokens=NEW, stop_tokens=(1, 2, 3))
    assert engine._decode._cache_size() == 1
    assert 3 <= engine._prefill._cache_size() <= 4  # buckets of 8, 16, 32, and 64 of another test


def test_text_depends_neither_on_slots_nor_on_neighbours(v3_model, engine, prompts):
    prompts = [prompt for prompt in prompts if len(prompt) <= 8]  # of one bucket, to compile less
    together = engine.generate(prompts, sampling=HOT, max_new_tokens=NEW)
    alone = Engine(v3_model, dataclasses.replace(CACHE, num_slots=1))
    assert alone.generate(prompts, sampling=HOT, max_new_tokens=NEW) == together
    assert engine.generate(prompts[:2], sampling=HOT, max_new_tokens=NEW) == together[:2]
    assert engine.generate(prompts, sampling=HOT, max_new_tokens=NEW) == together
    other = dataclasses.replace(HOT, seed=8)
    assert engine.generate(prompts, sampling=other, max_new_tokens=NEW) != together


def test_the_same_prompt_twice_is_drawn_twice(engine, prompts):
    one, two = engine.generate([prompts[1]] * 2, sampling=HOT, max_new_tokens=NEW)
    assert one != two


def test_a_stop_token_ends_an_answer_and_is_left_out(engine, prompts):
    prompt = prompts[3]
    (free,) = engine.generate([prompt], max_new_tokens=NEW)
    first = {token: free.tokens.index(token) for token in free.tokens}
    for token in (free.tokens[0], max(first, key=first.get)):  # at once, and late
        (stopped,) = engine.generate([prompt], max_new_tokens=NEW, stop_tokens=(token, 999))
        assert stopped == Completion(free.tokens[: first[token]], "stop")
    assert max(first.values()) > 2


def test_slots_and_pages_are_used_again(v3_model, engine, prompts):
    short = [prompt for prompt in prompts if len(prompt) <= 8]
    many = [short[i % len(short)] for i in range(10)]
    expected = engine.generate(many, max_new_tokens=4)
    # 3 pages of 8 hold one or two of these requests, though there are 3 slots: the others wait
    tight = Engine(v3_model, dataclasses.replace(CACHE, num_pages=3))
    assert tight.generate(many, max_new_tokens=4) == expected
    assert expected[len(short) :] == expected[: -len(short)]


def test_a_stream_gives_the_tokens_of_generate_as_they_come(engine, prompts):
    expected = engine.generate(prompts, max_new_tokens=4)
    steps = list(engine.stream(prompts, max_new_tokens=4))
    for request, completion in enumerate(expected):
        mine = [step for step in steps if step.request == request]
        assert [step.token for step in mine] == completion.tokens
        assert [step.finish_reason for step in mine] == [None, None, None, "length"]
    # three slots: the fourth request begins when one of the first three has ended
    assert {step.request for step in steps[:3]} == {0, 1, 2}
    assert {step.request for step in steps[:12]} == {0, 1, 2}


def test_two_streams_at_once_are_refused_and_a_closed_one_is_not(engine, prompts):
    expected = engine.generate(prompts[:2], max_new_tokens=3)
    first = engine.stream(prompts, max_new_tokens=3)
    next(first)
    with pytest.raises(RuntimeError, match="another stream"):
        engine.generate(prompts[:2], max_new_tokens=3)
    first.close()
    assert engine.generate(prompts[:2], max_new_tokens=3) == expected


def test_no_prompts_give_no_completions(engine):
    assert engine.generate([]) == []


@pytest.mark.parametrize(
    ("prompt", "most", "says"),
    [
        ([], 1, "prompt 1 is empty"),
        ([3, 256, 1], 1, "prompt 1 holds token 256, vocab_size=256"),
        ([3, -2, 1], 1, "prompt 1 holds token -2"),
        ([1] * 40, 1, "prompt 1 has 40 tokens, with max_new_tokens=1 more than the 40 that fit"),
        ([1] * 3, 38, "prompt 1 has 3 tokens, with max_new_tokens=38 more than the 40"),
        ([1], 0, "max_new_tokens=0 must be positive"),
    ],
    ids=["empty", "large token", "negative token", "long prompt", "long answer", "no answer"],
)
def test_what_cannot_be_answered_is_refused_before_anything_runs(engine, prompt, most, says):
    with pytest.raises(ValueError, match=says):
        engine.stream([[1], prompt], max_new_tokens=most)


def test_a_request_that_all_pages_cannot_hold_is_refused(v3_model):
    tight = Engine(v3_model, dataclasses.replace(CACHE, num_pages=2))
    with pytest.raises(ValueError, match="more than the 16 that fit"):
        tight.generate([[1] * 10], max_new_tokens=7)


def test_the_longest_that_fits_is_answered(engine):
    (completion,) = engine.generate([[1] * 39], max_new_tokens=1)
    assert len(completion.tokens) == 1


def test_the_cache_is_cut_to_the_models_context(v3_model):
    huge = Engine(v3_model, CacheConfig(num_slots=1, max_length=10**12, page_size=8))
    assert huge._pages.shape[1] * 8 == v3_model.config.max_position_embeddings
    with pytest.raises(ValueError, match="more than the 64 that fit"):
        huge.generate([[1]], max_new_tokens=10**9)


def test_a_bfloat16_model_has_a_bfloat16_cache(v3_model):
    model = Decoder(v3_model.config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    engine = Engine(model, dataclasses.replace(CACHE, num_slots=1))
    assert engine._pages.dtype == jnp.bfloat16
    (completion,) = engine.generate([[1, 2, 3]], max_new_tokens=4)
    assert len(completion.tokens) == 4 and engine._pages.dtype == jnp.bfloat16
