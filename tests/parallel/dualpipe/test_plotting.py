import re

import pytest

from whalejax.parallel.dualpipe import Op, analyse, plot

SMALL = analyse("dualpipe", num_ranks=2, num_microbatches=4)


def drawn(path):
    """Numbers and words of an SVG, which has each in a comment before its outlines."""
    return re.findall(r"<!-- (.+?) -->", path.read_text())


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_suffix_says_the_format(tmp_path, suffix):
    plot(SMALL, tmp_path / f"timeline{suffix}")
    written = (tmp_path / f"timeline{suffix}").read_bytes()
    assert written.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in written


def test_every_operation_has_a_box_with_its_microbatch(tmp_path):
    plot(SMALL, tmp_path / "timeline.svg")
    words = drawn(tmp_path / "timeline.svg")
    assert "dualpipe: makespan 12" in words
    for kind in ("forward", "backward", "input gradient", "weight gradient"):
        assert f"{kind}, chunk 1" in words
    # of each rank four microbatches forward and back, and one deferred weight gradient
    numbers = [word for word in words[words.index("rank") + 1 :] if word.isdigit()]
    assert len(numbers) == 2 * (4 + 4 + 1)
    assert [numbers.count(m) for m in "0123"] == [4, 5, 4, 5]


def test_measured_times_are_drawn_from_their_own_start(tmp_path):
    forward, backward = (Op("F", 0, 7),), (Op("B", 0, 7),)
    measured = [[(forward, 101.25, 101.5), (backward, 102, 102.75)], []]
    plot(measured, str(tmp_path / "measured.svg"))
    words = drawn(tmp_path / "measured.svg")
    assert words.count("7") == 2 and "forward" in words and "0" in words and "1" in words
    assert not any(word.startswith("100") for word in words)


def test_numbers_that_do_not_fit_are_left_out(tmp_path):
    forward = [(Op("F", 0, m),) for m in range(2)]
    plot([[(forward[0], 0, 1), (forward[1], 1, 1000)]], tmp_path / "timeline.svg")
    words = drawn(tmp_path / "timeline.svg")
    assert "1" in words and words.count("0") == 2  # the axes' own


@pytest.mark.parametrize(
    ("timeline", "name", "message"),
    [
        (SMALL, "timeline.pdf", "timeline.pdf' must end in .png or .svg"),
        ([[], []], "timeline.png", "no steps in a timeline of 2 ranks"),
        ([[((Op("F", 0, 0),), 2, 1)]], "timeline.png", "rank 0: .* ends before it starts"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, timeline, name, message):
    with pytest.raises(ValueError, match=message):
        plot(timeline, tmp_path / name)
    assert not list(tmp_path.iterdir())
