"""Checkpoints of ranks that have different tensors: stages of a pipeline, experts.

What such a checkpoint says is what one rank alone would have said: all names, all parameters of a group. So it is loaded by any
other layout.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any, Iterable, Mapping, Sequence

import xxhash

from bmtrain_ms_base.layout import Layout

from ..comm import World, gather_json
from ..compat.runtime import host_array
from ..files.entries import Described, Entry
from ..files.errors import CheckpointError
from ..files.format import DTYPES, TYPE_NAMES
from ..optim import OptimManager


def ranks_differ(world: World) -> bool:
    """Whether ranks have other tensors than other ranks, and not only other parts of them."""
    return world.mesh.pp > 1 or world.mesh.ep > 1


@dataclass(frozen=True)
class Known:
    """A tensor that some rank has: its MindSpore dtype, whole shape, and whether it is of the model."""

    dtype: Any
    shape: tuple[int, ...]
    of_model: bool
    is_whole: bool


def everybodys(entries: Mapping[str, Entry], world: World) -> tuple[Mapping[str, Entry], dict[str, Known]]:
    """This rank's entries, and what all ranks have together. All ranks call it.

    Where ranks differ a tensor that is whole is not on all of them: it becomes one of a layout, which its first holder saves.

    Raises:
        CheckpointError: such a tensor is not the same on all ranks that have it; on every rank.
    """
    described = {name: Known(e.dtype, e.shape, e.of_model, e.layout is None) for name, e in entries.items()}
    if not ranks_differ(world):
        return entries, described
    mine = {
        name: [TYPE_NAMES[e.dtype], list(e.shape), e.of_model, _hash(e) if e.layout is None else None]
        for name, e in entries.items()
    }
    everybody = gather_json(mine, world.everyone, "checkpoint names")
    described, holders, hashes = {}, {}, {}
    for rank, of_rank in enumerate(everybody):
        for name, (dtype, shape, of_model, found) in of_rank.items():
            described.setdefault(name, Known(DTYPES[dtype], tuple(shape), of_model, False))
            holders.setdefault(name, []).append(rank)
            hashes.setdefault(name, set()).add(found)
    apart = [name for name, found in hashes.items() if len(found) > 1]
    if apart:
        raise CheckpointError(
            f"{apart[0]} is not the same on the ranks {holders[apart[0]]}, which have it whole: with pipeline stages or experts a "
            "checkpoint has one of it. Average it over the ranks before saving"
        )
    rank = world.everyone.rank
    placed = {
        name: replace(e, layout=Layout(e.shape, copy=holders[name].index(rank))) if e.layout is None else e
        for name, e in entries.items()
    }
    return placed, described


def _hash(entry: Entry) -> str:
    return xxhash.xxh3_64_hexdigest(host_array(entry.get()).reshape(-1).view("u1").data)


def names_elsewhere(names: Iterable[str], world: World) -> set[str]:
    """Names that other ranks have and this one does not. All ranks call it."""
    if not ranks_differ(world):
        return set()
    own = list(names)
    return {name for of_rank in gather_json(own, world.everyone, "checkpoint names") for name in of_rank} - set(own)


def without(there: Described, elsewhere: set[str], prefix: str, of_master: Any) -> Described:
    """What is there without what is another rank's: its tensors, their gradients, and masters of them.

    Args:
        prefix: of names of gradients.
        of_master: name -> that of the parameter whose master it is, or empty.
    """
    if not elsewhere:
        return there
    known = elsewhere | {prefix + name for name in elsewhere}
    return {name: x for name, x in there.items() if name not in known and of_master(name) not in elsewhere}


def check_groups(manager: OptimManager, world: World) -> None:
    """Raise CheckpointError, on every rank, where ranks have other numbers of groups: nothing could be saved of them."""
    if ranks_differ(world):
        counts = [len(driver.settings()) for driver in manager.drivers]
        _refuse_other_counts(gather_json(counts, world.everyone, "groups of optimizers"))


def _refuse_other_counts(counts: Sequence[Sequence[int]]) -> None:
    """`counts`: by rank, of each optimizer."""
    if len({len(x) for x in counts}) > 1:
        raise CheckpointError(f"ranks have other numbers of optimizers: {sorted({len(x) for x in counts})}; make as many on each")
    for i, column in enumerate(zip(*counts)):
        if len(set(column)) > 1:
            raise CheckpointError(
                f"optimizer {i} has {sorted(set(column))} groups on different ranks: make as many on each, empty where a stage has "
                "no parameter of one"
            )


def state_of_all(manager: OptimManager, world: World) -> dict[str, Any]:
    """`manager.state_dict(tensors=False)`, with the parameters of all ranks in its groups. All ranks call it.

    Raises:
        CheckpointError: ranks have other groups; on every rank.
    """
    mine = manager.state_dict(tensors=False)
    if not ranks_differ(world):
        return mine
    states = gather_json(mine, world.everyone, "checkpoint state")
    _refuse_other_counts([[len(optimizer.get("groups", ())) for optimizer in state["optimizers"]] for state in states])
    merged = copy.deepcopy(states[0])
    for i, optimizer in enumerate(merged["optimizers"]):
        if "groups" not in optimizer:
            continue
        all_groups = [state["optimizers"][i]["groups"] for state in states]
        steps = {name: step for state in states for name, step in _steps(state["optimizers"][i])}
        _join_names(optimizer["groups"], all_groups)
        optimizer["steps"] = [steps[name] for group in optimizer["groups"] for name in group["names"]]
        if "made" in optimizer:
            _join_names(optimizer["made"]["groups"], [state["optimizers"][i]["made"]["groups"] for state in states])
    return merged


def state_of_rank(state: Any, manager: OptimManager, world: World) -> Any:
    """A manager's saved state without the parameters that this rank does not have."""
    if not ranks_differ(world) or not isinstance(state, dict) or not isinstance(state.get("optimizers"), list):
        return state
    state = copy.deepcopy(state)
    for optimizer, driver in zip(state["optimizers"], manager.drivers):
        try:
            own, steps = {p.name for p in driver.parameters}, dict(_steps(optimizer))
            for groups in (optimizer["groups"], optimizer["made"]["groups"] if "made" in optimizer else []):
                for group in groups:
                    group["names"] = [name for name in group["names"] if name in own]
            optimizer["steps"] = [steps[name] for group in optimizer["groups"] for name in group["names"]]
        except (KeyError, TypeError, AttributeError):
            continue  # no state of ours, which whoever checks it says
    return state


def _steps(optimizer: Mapping[str, Any]) -> Iterable[tuple[str, int]]:
    return zip((name for group in optimizer["groups"] for name in group["names"]), optimizer["steps"])


def _join_names(groups: list[dict[str, Any]], everybody: list[list[dict[str, Any]]]) -> None:
    """Give each group the names that it has on any rank."""
    for index, group in enumerate(groups):
        group["names"] = list(dict.fromkeys(name for theirs in everybody for name in theirs[index]["names"]))
