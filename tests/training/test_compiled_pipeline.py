"""A training step through DualPipe compiled for 8 H100s: what hides each transfer, and bytes."""

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_pipeline_for_h100.py")


def hides(transfer):
    """Whether a matmul of another microbatch is scheduled under a transfer."""
    return any(of and of != transfer["of"] for of in transfer["under"])


@pytest.mark.parametrize(
    ("precision", "rematerialise", "capacity", "transfers"),
    [
        ("bf16", "none", "2.0", 4),  # dispatch and combine, there and back
        ("fp8", "none", "none", 4),
        pytest.param("fp8", "full", "none", 5, marks=pytest.mark.slow),  # and dispatch again
    ],
)
def test_every_transfer_of_the_steady_state_hides_behind_another_microbatch(
    compile_for_h100, precision, rematerialise, capacity, transfers
):
    result = compile_for_h100(SCRIPT, precision, rematerialise, capacity)
    print({name: value for name, value in result.items() if name.endswith("bytes")})
    shown = json.dumps(result["transfers"], indent=1)
    exchanges = [t for t in result["transfers"] if t["kind"] == "all-to-all"]
    assert len(exchanges) == 2 * transfers, shown  # the body has two turns
    assert all(map(hides, exchanges)), shown
    between_stages = [t for t in result["transfers"] if t["kind"] == "collective-permute"]
    # activations and gradients go to the same rank: XLA may send both at once
    assert 2 <= len(between_stages) <= 4, shown
    assert all(t["asynchronous"] and t["under"] for t in between_stages), shown
    assert result["ring_copies"] == []
    assert result["argument_bytes"] < 1.01 * result["state_bytes"]


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%product (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%a, %a)
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %s.1 = ((f32[8,8]), f32[8,8]) all-to-all-start(%x), metadata={op_name="jit(step)/ticks_4_8/while/body/turn0/forward/jvp(dispatch)/a"}
  %f.1 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%product, metadata={op_name="jit(step)/ticks_4_8/while/body/turn0/backward/f"}
  %f.2 = f32[8,8]{1,0} fusion(%x), kind=kLoop, calls=%sum, metadata={op_name="jit(step)/ticks_4_8/while/body/turn1/backward/f"}
  %d.1 = f32[8,8]{1,0} all-to-all-done(%s.1)
  %s.2 = (f32[8,8], f32[8,8]) collective-permute-start(%x), metadata={op_name="jit(step)/ticks_4_8/while/body/turn1/transfer/p"}
  %d.2 = f32[8,8]{1,0} collective-permute-done(%s.2)
  %r.1 = f32[5,8,8]{2,1,0} copy(%x)
  %y = f32[8,8]{1,0} all-to-all(%x), metadata={op_name="jit(step)/ticks_4_8/while/body/turn1/backward/a"}
  ROOT %t = (s32[], f32[8,8]) tuple(%i, %y)
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %w = (s32[], f32[8,8]) while(%p), condition=%less, body=%body
}
"""  # noqa: E501


def test_the_schedule_is_read(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)
    script = runpy.run_path(str(SCRIPT))
    found = [(t.of, t.asynchronous, t.under) for t in script["steady_transfers"](PROGRAM, "4_8")]
    assert found == [
        ("turn0 forward", True, ["turn0 backward"]),
        ("turn1 transfer", True, []),
        ("turn1 backward", False, []),
    ]
    assert not list(script["steady_transfers"](PROGRAM, "0_4"))
    assert script["ring_copies"](PROGRAM) == ["r.1"]
