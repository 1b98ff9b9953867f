import itertools
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalejax.bench.schedules import hiding

INTERVALS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda pair: (pair[0], sum(pair)))
)


def ticks(intervals):
    return {tick for start, end in intervals for tick in range(start, end)}


@given(first=INTERVALS, second=INTERVALS)
def test_intervals_are_sets_of_ticks(first, second):
    assert hiding.length(first) == len(ticks(first))
    assert hiding.shared(first, second) == len(ticks(first) & ticks(second))
    apart = hiding.merged(first)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(apart))


@pytest.mark.parametrize(
    ("name", "operation", "kind"),
    [
        ("ncclDevKernel_SendRecv(ncclDevKernelArgs)", "all-to-all-start.3", "all-to-all"),
        ("ncclDevKernel_SendRecv", "while.1/cond.2/collective-permute-start", "collective-permute"),
        ("ncclDevKernel_SendRecv", "all_to_all.92.1", "all-to-all"),
        ("ncclDevKernel_SendRecv", "ragged_all_to_all.3", "ragged-all-to-all"),
        ("ncclDevKernel_SendRecv", "ppermute.288.1", "collective-permute"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "psum.582.1", "all-reduce"),
        ("ncclDevKernel_SendRecv", None, "send-recv"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", None, "collective"),
        ("RaggedAllToAllKernel", "ragged-all-to-all.7", "ragged-all-to-all"),
        ("MemcpyD2D", "copy.4", "copy"),
        ("Memset", None, "copy"),
        ("loop_add_fusion", "while.1/loop_add_fusion.2", "compute"),
        ("mosaic_gpu_fp8_matmul", "all-to-all-done.3/custom-call.5", "compute"),
    ],
)
def test_kernels_are_told_apart(name, operation, kind):
    assert hiding.kind_of(name, {} if operation is None else {"hlo_op": operation}) == kind


def event(name, operation, start, duration):
    return SimpleNamespace(
        name=name, stats=[("hlo_op", operation)], start_ns=start, duration_ns=duration
    )


def test_what_hides_is_found_over_the_streams_of_a_plane():
    a, b = 1_000_000, 2_000_000
    compute = [event("gemm", "while.1/gemm", 0, 4 * a), event("gemm", "gemm", 5 * a, a)]
    moving = [
        event("ncclDevKernel_SendRecv", "all-to-all-start.1", 3 * a, b),  # a half of it
        event("ncclDevKernel_SendRecv", "all-to-all-start.2", 5 * a, a),  # all of it
        event("ncclDevKernel_SendRecv", "collective-permute-start", 7 * a, b),  # nothing
    ]
    plane = SimpleNamespace(
        lines=[
            SimpleNamespace(name="Stream #13(Compute)", events=compute),
            SimpleNamespace(name="Stream #20(Compute)", events=moving),
            SimpleNamespace(name="XLA Ops", events=[event("gemm", "gemm", 0, 9 * a)]),
        ]
    )
    assert hiding.hidden(hiding.kernels_of(plane)) == {
        "span_ms": 9,
        "compute_ms": 5,
        "all-to-all_ms": 3,
        "all-to-all_hidden": pytest.approx(2 / 3, abs=1e-4),
        "collective-permute_ms": 2,
        "collective-permute_hidden": 0,
    }


def test_a_profile_without_a_gpu_has_no_plane_of_one(tmp_path):
    called = []
    path = hiding.profile(lambda: called.append(True), tmp_path)
    assert called
    assert path.suffixes[-2:] == [".xplane", ".pb"]
    assert hiding.gpu_planes(path) == {}
