"""What routers have counted in a step under way, saved by each rank and restored on any number of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import nn

from ..comm import World
from ..files.format import is_count
from ..nn import Router

Counts = dict[str, Any]  # `step`, `own`, `all`, as `Router.counts` returns them


def routers_of(model: nn.Cell) -> dict[str, Router]:
    """This rank's routers by the names of their weights, which are the same on any layout."""
    return {cell.parameter("weight").name: cell for _, cell in model.cells_and_names() if isinstance(cell, Router)}


def router_counts(model: nn.Cell) -> dict[str, Counts]:
    """What this rank's routers have counted and somebody still waits for; JSON can hold it."""
    found = {name: router.counts() for name, router in routers_of(model).items()}
    return {name: counts for name, counts in found.items() if counts is not None}


def counts_to_restore(saved: Any, model: nn.Cell, world: World, same_ranks: bool) -> list[tuple[Router, Counts | None]]:
    """What each router of this rank gets; None: it has counted nothing.

    Args:
        saved: `router_counts` of each rank that saved; None: of an older version.
        same_ranks: as many on each axis saved: a router gets what it had here. Otherwise one rank of a stage gets the sum.

    Raises:
        ValueError: these are no counts, or of another number of experts.
    """
    routers = routers_of(model)
    if saved is None:
        return [(router, None) for router in routers.values()]
    if not isinstance(saved, list) or not all(isinstance(of_rank, dict) for of_rank in saved):
        raise ValueError("its counts of routers are no list with an object for each rank")
    found = []
    for name, router in routers.items():
        everybody = [of_rank[name] for of_rank in saved if name in of_rank]
        for counts in everybody:
            _check(name, counts, router.experts)
        mine = saved[world.everyone.rank] if same_ranks and world.everyone.rank < len(saved) else {}
        if name in mine:
            found.append((router, mine[name]))
        else:
            found.append((router, _joined(everybody, mine=world.stage.rank == 0)))
    return found


def _joined(everybody: list[Counts], mine: bool) -> Counts | None:
    if not everybody:
        return None
    last = max(counts["step"] for counts in everybody)
    total = np.sum([counts["own"] for counts in everybody if counts["step"] == last], 0) * mine
    return {"step": last, "own": total.tolist(), "all": next(c["all"] for c in everybody if c["step"] == last)}


def _check(name: str, counts: Any, experts: int) -> None:
    if not isinstance(counts, dict) or not is_count(counts["step"]):
        raise ValueError(f"the counts of router {name} are of no step")
    for kind in ("own", "all"):
        numbers = counts[kind]
        if not isinstance(numbers, list) or len(numbers) != experts or not all(map(is_count, numbers)):
            raise ValueError(f"the counts of router {name} are no numbers of its {experts} experts")
