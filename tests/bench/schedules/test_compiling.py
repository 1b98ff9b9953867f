import threading

import pytest

from whalejax.bench.schedules.compiling import Compiling


class Program:
    """Compiles when it is allowed to."""

    def __init__(self, found):
        self.found, self.allowed = found, threading.Event()

    def compile(self, compiler_options):
        assert compiler_options == {"option": 1}
        assert self.allowed.wait(60)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_one_that_takes_too_long_holds_up_no_other():
    slow, quick = Program("slow"), Program("quick")
    quick.allowed.set()
    compiling = [Compiling(program, {"option": 1}) for program in (slow, quick)]
    with pytest.raises(TimeoutError, match="not ended after 0 seconds"):
        compiling[0].result(0)
    assert compiling[0].unfinished
    assert compiling[0].seconds is None
    assert compiling[1].result(60) == "quick"
    assert compiling[1].seconds >= 0
    slow.allowed.set()
    assert compiling[0].result(60) == "slow"
    assert not compiling[0].unfinished


def test_what_the_compiler_raises_comes_out():
    program = Program(ValueError("no such option"))
    program.allowed.set()
    with pytest.raises(ValueError, match="no such option"):
        Compiling(program, {"option": 1}).result(60)
