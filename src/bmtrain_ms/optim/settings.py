"""Settings of a run that goes on from another one's state, where the two differ.

A state holds what was in force, and what its run was made with. What this run was made with in the same way was not chosen anew:
then what was in force goes on, e.g. a rate that was lowered by hand. What it was made with otherwise was chosen, and is told.
States of earlier versions do not say what their run was made with: then each difference counts as chosen.
"""

from __future__ import annotations

import inspect
import math
import reprlib
from typing import Any

from .driver import Driver, OtherOptimizer, Schedule

Settings = dict[str, Any]
Told = list[str]
_UNKNOWN = "unknown"


class Made:
    """What an optimizer and its schedule were made with."""

    def __init__(self, driver: Driver, schedule: Schedule, given: Any):
        """`given`: the schedule that `schedule` stands for, or None."""
        self._driver, self._schedule, self._scheduled = driver, schedule, given is not None
        self._groups: list[Settings] = driver.settings()
        self._settings = schedule.settings()

    def state_dict(self) -> dict[str, Any]:
        """What the other methods of another run take, under `made`; nothing for an optimizer of somebody else's."""
        if isinstance(self._driver, OtherOptimizer):
            return {}
        self._note_added(self._driver.settings())
        return {"made": {"groups": self._groups, "schedule": self._settings}}

    def schedule_to_load(self, saved: Any, theirs: Any, fresh: bool) -> tuple[Any, Told, Told]:
        """The saved state with what was chosen in this run; what that is, and what was written by hand here and is not used.

        Args:
            theirs: what the other run was made with; anything, if it is not known.
            fresh: whether nothing has been done with this run yet.
        """
        if self._settings is None:
            return saved, [], []
        then = theirs.get("schedule") if isinstance(theirs, dict) else None
        then = then if isinstance(then, dict) else None
        mine = _choosable(self._schedule, then is not None)
        values, used, replaced = _chosen(mine, saved, self._settings, then, fresh)
        kind = type(self._schedule).__name__
        return {**saved, **values}, [f"{kind}: {x}" for x in used], [f"{kind}: {x}" for x in replaced]

    def choose_groups(self, before: list[Settings], theirs: Any, fresh: bool, own: bool) -> tuple[Told, Told]:
        """Put back, after a state was loaded, what was chosen in this run, if its `own` is to be used; tells as `schedule_to_load`.

        Args:
            before: the groups' settings before that.
        """
        all_chosen, all_replaced = [], []
        self._note_added(before)
        others = theirs.get("groups") if isinstance(theirs, dict) else None
        scheduled = self._scheduled
        for index, (mine, loaded) in enumerate(zip(before, self._driver.settings() if before else [])):
            then = _group_of(mine, others, index)
            skipped = {"names", "own_lr", *(["lr"] if scheduled else [])}  # a schedule sets the rate
            choosable = {name: value for name, value in mine.items() if name not in skipped}
            values, told, replaced = _chosen(choosable, loaded, self._groups[index], then, fresh)
            peak = (then or {}).get("own_lr", _UNKNOWN)  # of a group under a schedule, which is not in what was loaded
            if scheduled and "own_lr" in mine and _is_rate(peak) and not _same(peak, mine["own_lr"]):
                told.append(_difference("lr of its own", mine["own_lr"], peak))
                self._driver.change_settings(index, {} if own else {"own_lr": peak})
            self._driver.change_settings(index, values if own else {})
            all_chosen += [f"group {index}: {x}" for x in told]
            all_replaced += [f"group {index}: {x}" for x in replaced]
        return all_chosen, all_replaced

    def _note_added(self, groups: list[Settings]) -> None:
        """Groups that came later (`add_param_group`) were made with what they have when they are first seen."""
        self._groups += groups[len(self._groups) :]


def _chosen(mine: Settings, saved: Settings, asked: Settings, then: Settings | None, fresh: bool) -> tuple[Settings, Told, Told]:
    """The settings of this run that were chosen otherwise than the saved; what these are, and what was only written by hand.

    Args:
        mine, saved: in force here, and there.
        asked, then: what this run was made with, and that one; None: not known.
    """
    values, used, replaced = {}, [], []
    for name, value in mine.items():
        if name not in saved or _same(value, saved[name]):
            continue
        if then is None or name not in then or not _same(asked.get(name), then[name]):
            values[name] = value
            used.append(_difference(name, value, saved[name]))
        elif fresh and not _same(value, asked.get(name)):
            replaced.append(_difference(name, value, saved[name]))
    return values, used, replaced


def _choosable(schedule: Any, all_known: bool) -> Settings:
    """What was chosen of a schedule's state: not the position in it, nor, where the other run does not tell, what it counts."""
    known: set[str] = set()
    for kind in type(schedule).__mro__:
        known.update(inspect.signature(kind.__init__).parameters)
    return {k: v for k, v in schedule.state_dict().items() if k != "num_iter" and (all_known or k in known)}


def _group_of(group: Settings, others: Any, index: int) -> Settings | None:
    """The one among `others`, which may be anything, that had the parameters of `group`, as loading finds it; None: none."""
    if not (isinstance(others, list) and all(isinstance(other, dict) for other in others)):
        return None
    if "names" not in group:  # of MindSpore's, whose groups go by their order
        return others[index] if index < len(others) else None
    lists = [other["names"] if isinstance(other.get("names"), list) else [] for other in others]
    known = [name for name in group["names"] if any(name in theirs for theirs in lists)]
    return next((other for other, theirs in zip(others, lists) if known and all(name in theirs for name in known)), None)


def _is_rate(x: Any) -> bool:
    """Whether it can be the rate that a group was given for itself; None: it was given none."""
    return x is None or (type(x) in (int, float) and 0 <= x < math.inf)


def _difference(name: str, mine: Any, saved: Any) -> str:
    return f"{name} {reprlib.repr(mine)} (saved: {reprlib.repr(saved)})"


def _same(a: Any, b: Any) -> bool:
    return _plain(a) == _plain(b)


def _plain(x: Any) -> Any:
    return [_plain(y) for y in x] if isinstance(x, (list, tuple)) else x
