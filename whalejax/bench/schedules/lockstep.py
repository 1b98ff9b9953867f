"""How long a table of ticks takes if every rank waits in each tick for the slowest."""

from whalejax.parallel.dualpipe import Costs
from whalejax.parallel.dualpipe.table import NONE, Table


def lockstep_s(table: Table, costs: Costs) -> float:
    """Seconds of all ticks, each as long as its longest step and a transfer, if there is one."""
    sends = {send.tick for send in (*table.outputs, *table.gradients)}
    ranks = range(table.stages.shape[0])
    return sum(
        max(_step_s(table, costs, tick, rank) for rank in ranks) + costs.transfer * (tick in sends)
        for tick in range(table.num_ticks)
    )


def _step_s(table, costs, tick, rank):
    """Seconds of what one rank does in a tick."""
    forward, backward, weight = (
        passes.microbatch[tick, rank] != NONE
        for passes in (table.forward, table.backward, table.weight)
    )
    if forward and backward:
        return costs.overlapped + costs.weight * weight
    waits = backward and table.backward.deferred[tick, rank] != NONE
    alone = costs.forward * forward + (costs.backward - costs.weight * waits) * backward
    return alone + costs.weight * weight
