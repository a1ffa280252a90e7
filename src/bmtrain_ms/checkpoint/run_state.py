"""What a training state holds beside its tensors: counters, schedules, generators of random numbers, and what the caller added."""

from __future__ import annotations

import json
import operator
import platform
import random
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import numpy as np
from mindspore import nn

from ..comm import World, gather_json
from ..compat import versions
from ..files.errors import CheckpointError
from ..files.format import is_count
from ..nn import Router
from ..optim import OptimManager
from ..zero import context_of
from .routers import Counts, counts_to_restore, router_counts
from .stages import state_of_all, state_of_rank

_NUMPY_WORDS = 624  # of its generator's state


@dataclass(frozen=True)
class RunState:
    """What was saved, checked: `restore` does not fail.

    Attributes:
        step, extra: see `Checkpointer.save`.
        manager: of `OptimManager.state_dict`.
        clock, draw_step, draws: steps that were counted, those of them that were made, and random draws in the step.
        generators: states of Python's and NumPy's, of this rank; None: not saved.
        strict: whether the optimizers have the same parameters.
        routers: what this rank's routers have counted.
    """

    step: int
    extra: dict[str, Any]
    manager: dict[str, Any]
    clock: int
    draw_step: int
    draws: int
    generators: tuple[Any, Any] | None
    strict: bool
    routers: list[tuple[Router, Counts | None]]

    def restore(self, manager: OptimManager, world: World, keep: str) -> None:
        """Go on from it; `keep` as in `OptimManager.load_state_dict`."""
        manager.load_state_dict(self.manager, self.strict, keep)
        world.everyone.clock.step = self.clock
        draws = context_of(world).draws
        draws.count, draws.step = self.draws, self.draw_step
        if self.generators is not None:
            random.setstate(self.generators[0])
            np.random.set_state(self.generators[1])
        for router, counts in self.routers:
            router.restore_counts(counts)


def checked_keep(keep: Any) -> str:
    """Whose settings to keep.

    Raises:
        ValueError: nobody's.
    """
    if keep not in ("own", "saved"):
        raise ValueError(f"keep must be own or saved, not {keep!r}")
    return keep


def checked_step(step: Any) -> int:
    """The number of steps that names a checkpoint.

    Raises:
        ValueError: it is none.
    """
    if isinstance(step, (bool, np.bool_)) or not hasattr(step, "__index__") or not is_count(operator.index(step)):
        raise ValueError(f"step must be a whole number of 0 or more, not {step!r}")
    return operator.index(step)


def checked_extra(extra: Any) -> dict[str, Any]:
    """A copy of what the caller adds: what is changed later is not saved.

    Raises:
        ValueError: it is not an object that JSON can hold.
    """
    if extra is not None and not isinstance(extra, dict):
        raise ValueError(f"extra must be a dictionary, not {type(extra).__name__}: save(step, {{'position': ...}})")
    try:
        copied = json.loads(json.dumps(extra or {}))
        if not _same_keys(extra or {}, copied):
            raise TypeError("a key is no text, and would come back as one")
        return copied
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"extra must be what JSON can hold: {error}") from error


def _same_keys(given: Any, copied: Any) -> bool:
    """JSON has no keys but text, and makes text of numbers."""
    if isinstance(given, dict):
        return given.keys() == copied.keys() and all(_same_keys(x, copied[name]) for name, x in given.items())
    return not isinstance(given, (list, tuple)) or all(map(_same_keys, given, copied))


def mesh_of(world: World) -> dict[str, int]:
    """How many ranks there are along which axes; those of one rank that are newer than the format are left out."""
    mesh = world.mesh
    return {"ranks": mesh.world, "shard_size": mesh.shard, **{x: mesh.size(x) for x in ("tp", "pp", "ep") if mesh.size(x) > 1}}


def collected_state(
    model: nn.Cell, manager: OptimManager, world: World, step: int, extra: dict[str, Any], shared: bool
) -> dict[str, Any]:
    """What `checked_state` takes; JSON can hold it. All ranks call it."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    mine = {"python": random.getstate(), "numpy": [kind, keys.tolist(), position, has_gauss, cached]}
    everybody = gather_json([mine, router_counts(model)], world.everyone, "checkpoint generators")
    return {
        "step": step,
        "extra": extra,
        "manager": state_of_all(manager, world),
        "seed": world.seed,
        "clock": world.everyone.clock.step,
        "draws": context_of(world).draws.count,
        "draw_step": context_of(world).draws.step,
        "generators": [generators for generators, _ in everybody],
        "routers": [counts for _, counts in everybody],
        "mesh": mesh_of(world),
        "layout": gather_json(world.launch.local_size, world.everyone, "checkpoint layout"),
        "shared_storage": shared,
        "versions": _versions(),
    }


def checked_state(raw: Any, model: nn.Cell, manager: OptimManager, world: World, strict: bool, where: str) -> RunState:
    """What was collected; nothing is changed by looking at it.

    Args:
        strict: raise if the run had another seed, or its optimizers other parameters.
        where: what it was read from.

    Raises:
        CheckpointError: it is damaged, does not fit the manager, or (strict) is of another seed.
    """
    try:
        seed, state = raw["seed"], _parsed(raw, model, manager, world, strict)
        if type(seed) is not int:
            raise TypeError(f"its seed is {seed!r}")
    except (KeyError, TypeError, ValueError, IndexError, OverflowError, AttributeError) as error:
        what = f"its state has no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{where} cannot be loaded: {what}") from error
    if strict and seed != world.seed:
        raise CheckpointError(
            f"{where} was saved by a run with seed {seed}, this one has seed {world.seed}: dropout would differ; use "
            f"init_distributed(seed={seed}), or load with strict=False"
        )
    return state


def _parsed(raw: Any, model: nn.Cell, manager: OptimManager, world: World, strict: bool) -> RunState:
    extra, generators = raw["extra"], raw.get("generators")
    if not isinstance(extra, dict):
        raise TypeError(f"its extra is {extra!r}, not an object")
    clock, draws = raw["clock"], raw.get("draws", 0)  # single files have no draws, old ones no draw_step
    draw_step = raw.get("draw_step", clock)
    step = raw["step"] if "step" in raw else extra.get("step", clock)
    for name, number in (("step", step), ("clock", clock), ("draw_step", draw_step), ("number of draws", draws)):
        if not is_count(number):
            raise TypeError(f"its {name} is {number!r}")
    of_manager = state_of_rank(raw["manager"], manager, world)
    manager.check_state_dict(of_manager, strict)
    mine = None
    if generators is not None:
        mine = _generators(generators[world.everyone.rank if len(generators) == world.everyone.size else 0])
    routers = counts_to_restore(raw.get("routers"), model, world, raw.get("mesh") == mesh_of(world))
    return RunState(step, extra, of_manager, clock, draw_step, draws, mine, strict, routers)


def _generators(mine: Any) -> tuple[Any, Any]:
    """States that were tried on other generators."""
    version, words, gauss = mine["python"]
    python = version, tuple(words), gauss
    random.Random().setstate(python)
    kind, keys, position, has_gauss, cached = mine["numpy"]
    if not (is_count(position) and position <= _NUMPY_WORDS):  # which NumPy would believe
        raise ValueError(f"NumPy's generator is at {position!r} of {_NUMPY_WORDS} words")
    numpy = kind, np.array(keys, np.uint32), position, has_gauss, cached
    np.random.RandomState().set_state(numpy)
    return python, numpy


def _versions() -> dict[str, str]:
    try:
        own = metadata.version("bmtrain-ms")
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    python = platform.python_version()
    return {"bmtrain_ms": own, "mindspore": versions.version(), "numpy": np.__version__, "python": python}
