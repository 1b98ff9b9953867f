"""The training step compiled for 8 H100s: what is scheduled under each transfer, FP8, bytes."""

import collections
import functools
import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_for_h100.py")


@pytest.fixture(scope="module")
def compiled(compile_for_h100):
    """What the script prints of a precision, with or without overlap."""
    return functools.partial(compile_for_h100, SCRIPT)


@pytest.mark.parametrize(("precision", "capacity"), [("bf16", "2.0"), ("fp8", "none")])
def test_every_transfer_of_the_layers_hides_behind_the_other_half(compiled, precision, capacity):
    result = compiled(precision, capacity, "overlap")
    steady = [t for t in result["transfers"] if t["phase"] != "outside"]
    counts = collections.Counter((t["phase"], t["part"], t["again"], t["half"]) for t in steady)
    halves = ("half0", "half1")
    assert counts == {
        (*kind, half): 1
        for half in halves
        for kind in (
            ("forward", "dispatch", False),
            ("forward", "combine", False),
            ("backward", "dispatch", True),
            ("backward", "dispatch", False),
            ("backward", "combine", False),
        )
    }
    assert all(t["other"] > 0 for t in steady), json.dumps(steady, indent=1)
    # the combines at the loops' ends have nothing to hide behind
    assert len(result["transfers"]) == len(steady) + 2
    check_bytes(result)
    if precision == "fp8":
        check_fp8(result)


def check_bytes(result):
    """A device's arguments are its part of the state, whole but for the experts, and its batch."""
    state, batch = result["state_bytes"], result["batch_bytes"]
    assert state + batch <= result["argument_bytes"] <= (state + batch) * 1.001


def check_fp8(result):
    """Linears multiply in FP8, and what a device holds beside its state are some arrays of rows."""
    # attention has 4 linears, shared and routed experts 3 each: of each a product, the product
    # again for the backward pass (but of the shared experts' last one), and two gradients
    assert result["fp8_matmuls"] == 2 * (10 * 4 - 1)
    # gradients in float32 are as large as the weights, a third of the state; of each half there may
    # be rows, gate, up, their product, and the gradients of all four
    assert result["temporary_bytes"] < result["state_bytes"] / 3 + 16 * result["rows_bytes"]


@pytest.mark.slow
def test_without_overlap_no_transfer_hides_behind_another_half(compiled):
    steady = [t for t in compiled("bf16", "none")["transfers"] if t["phase"] != "outside"]
    assert len(steady) == 5 and all(t["other"] == 0 for t in steady)


@pytest.mark.slow
def test_with_rows_for_any_load_one_transfer_hides_behind_weights(compiled):
    """In bfloat16 those that the other half's grouped matmuls gather, for each tile of rows."""
    steady = [
        t for t in compiled("bf16", "none", "overlap")["transfers"] if t["phase"] != "outside"
    ]
    bare = [t for t in steady if t["other"] == 0]
    assert len(bare) <= 1 and all(t["gathers"] for t in bare), json.dumps(steady, indent=1)


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%product (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  ROOT %dot.1 = f32[8,8]{1,0} dot(%a, %a)
}

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %s.1 = ((f32[8,8]), f32[8,8]) all-to-all-start(%x), metadata={op_name="half0/dispatch/a"}
  %f.1 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%product, metadata={op_name="half1/f"}
  %f.2 = f32[8,8]{1,0} fusion(%x), kind=kCustom, calls=%product, metadata={op_name="half0/f"}
  %f.3 = f32[8,8]{1,0} fusion(%x), kind=kLoop, calls=%sum, metadata={op_name="half1/f"}
  %d.1 = f32[8,8]{1,0} all-to-all-done(%s.1), metadata={op_name="half0/dispatch/a"}
  %q.1 = f32[8,8] custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="half0/fp8_quantize/m"}
  %s.2 = ((f32[8,8]), f32[8,8]) all-to-all-start(%x), metadata={op_name="transpose(jvp(half1))/combine/a"}
  %m.1 = f32[8,8] custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="half0/fp8_matmul_1x1/m"}
  %m.2 = f32[8,8] custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="half0/m"}
  %q.2 = f32[8,8] custom-call(%x), custom_call_target="mosaic_gpu_v2", metadata={op_name="half0/fp8_quantize/m"}
  %m.3 = f32[8,8] custom-call(%x), custom_call_target="__cublas$gemm", metadata={op_name="half0/half1/m"}
  %d.2 = f32[8,8]{1,0} all-to-all-done(%s.2), metadata={op_name="transpose(jvp(half1))/combine/a"}
  %y = f32[8,8]{1,0} all-to-all(%x), metadata={op_name="rematted_computation/half1/dispatch/a"}
  ROOT %t = (s32[], f32[8,8]) tuple(%i, %y)
}

ENTRY %main (p: f32[8,8]) -> f32[8,8] {
  %w = (s32[], f32[8,8]) while(%p), condition=%less, body=%body
}
"""  # noqa: E501


def test_the_schedule_is_read():
    found = runpy.run_path(str(SCRIPT))["transfers"](PROGRAM)
    seen = [(t.phase, t.part, t.again, t.half, t.own, t.other) for t in found]
    assert seen == [
        ("forward", "dispatch", False, "half0", 1, 1),
        ("backward", "combine", False, "half1", 0, 2),
        ("forward", "dispatch", True, "half1", 0, 0),
    ]
