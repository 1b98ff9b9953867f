"""From measured times of one stage to the time of a step with each schedule."""

import dataclasses

from whalejax.parallel.dualpipe.analysis import Costs, simulate
from whalejax.parallel.dualpipe.pairing import overlap_pairs
from whalejax.parallel.dualpipe.schedules import SCHEDULES, make_schedule, why_not

OVERLAPPED_RIVAL = "interleaved+overlap"


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageTimes:
    """Seconds measured for one microbatch on a stage that is 1 / num_ranks of the model.

    Attributes:
      forward: of the forward, with its exposed communication.
      backward: of the whole backward, likewise.
      weight: of the weight gradients that can be deferred, at most `backward`.
      overlapped: of a forward and a whole backward of two microbatches, run together.
      transfer: of an activation or its gradient from one rank to another.
    """

    forward: float
    backward: float
    weight: float
    overlapped: float
    transfer: float

    def __post_init__(self):
        self.divide(1)

    def divide(self, parts: int) -> Costs:
        """Costs of a chunk that is one of equal parts of the stage.

        Computation is divided; what is transferred is as large for a small chunk as for a large.
        """
        computed = {name: getattr(self, name) / parts for name in _COMPUTED}
        return Costs(transfer=self.transfer, **computed)


_COMPUTED = ("forward", "backward", "weight", "overlapped")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """Predicted step times.

    Attributes:
      seconds: of each schedule that can have these numbers; "interleaved+overlap" is `interleaved`
        with `overlap_pairs`.
      refused: of each schedule that cannot, why.
      best: the fastest; of equals the first in the order of `SCHEDULES`.
    """

    seconds: dict[str, float]
    refused: dict[str, str]
    best: str


def predict(
    times: StageTimes, *, num_ranks: int, num_microbatches: int, chunks_per_rank: int = 2
) -> Prediction:
    """Predicts the pipelined part of a training step with every schedule, on equally many ranks.

    All schedules train the same model: chunks of `dualpipev` are halves of the stage that was
    measured, and those of `interleaved` are `chunks_per_rank`-ths. Left out, as it depends on the
    optimiser and not on the schedule's order: the sum of gradients over the two holders of each
    stage in `dualpipe`, and the update. Memory is not weighed either, see `analyse`.

    Args:
      times: measured.
      num_ranks: of the pipeline, at least 1.
      num_microbatches: of a step, at least 1.
      chunks_per_rank: of `interleaved`.

    Raises:
      ValueError: `num_ranks` or `num_microbatches` is not positive, or `chunks_per_rank` is below
        2; prints them.
    """
    if min(num_ranks, num_microbatches) < 1 or chunks_per_rank < 2:
        raise ValueError(
            f"predict: num_ranks={num_ranks} and num_microbatches={num_microbatches} must be at "
            f"least 1, chunks_per_rank={chunks_per_rank} at least 2"
        )
    seconds, refused = {}, {}
    for name in SCHEDULES:
        chunks = chunks_per_rank if name == "interleaved" else 1
        rivals = (name, OVERLAPPED_RIVAL) if name == "interleaved" else (name,)
        if fault := why_not(name, num_ranks, num_microbatches, chunks):
            refused |= dict.fromkeys(rivals, fault)
            continue
        schedule = make_schedule(name, num_ranks, num_microbatches, chunks_per_rank=chunks)
        costs = times.divide(2 if name == "dualpipev" else chunks)
        seconds[name] = _makespan(schedule, costs)
        if name == "interleaved":
            seconds[OVERLAPPED_RIVAL] = _makespan(overlap_pairs(schedule), costs)
    return Prediction(seconds=seconds, refused=refused, best=min(seconds, key=seconds.get))


def _makespan(schedule, costs):
    """Seconds from the first start to the last end."""
    return max(span.end for spans in simulate(schedule, costs) for span in spans)
