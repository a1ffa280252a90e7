"""Optimizer states as dictionaries of arrays: this rank's shards, or whole tensors that any number of ranks can load."""

from __future__ import annotations

from typing import Any, Mapping, Optional

import numpy as np
from mindspore import Parameter, Tensor

from ..compat.runtime import from_host, host_array, overwrite
from ..zero import DistributedParameter

# name -> (the parameter that the tensor is sharded as, None: the same on every rank; the tensor, written into to restore it)
StateTensors = Mapping[str, tuple[Optional[DistributedParameter], Tensor]]


def named_states(parameters: list[Parameter], states: list[dict[str, Tensor]]) -> StateTensors:
    """`exp_avg.layers.0.weight` and so on, for each parameter's tensors.

    Raises:
        ValueError: two parameters have one name.
    """
    named: dict[str, tuple[DistributedParameter | None, Tensor]] = {}
    for p, state in zip(parameters, states):
        for kind, tensor in state.items():
            name = f"{kind}.{p.name}"
            if name in named:
                raise ValueError(f"two parameters are called {p.name}; call model.check_names_and_refresh_name()")
            named[name] = (p if isinstance(p, DistributedParameter) else None, tensor)
    return named


def to_arrays(named: StateTensors, gather: bool) -> dict[str, Any]:
    """What `from_arrays` restores. With `gather` all ranks call it, and each gets whole tensors."""
    return {
        "is_whole": gather,
        "shards": {name: None if gather or like is None else _shard_of(like) for name, (like, _) in named.items()},
        "tensors": {name: _whole(name, like, x) if gather else _copy(x) for name, (like, x) in named.items()},
    }


def check_arrays(named: StateTensors, state: Mapping[str, Any], strict: bool) -> None:
    """Whether `from_arrays` would take them; nothing to check where `state` was made without tensors.

    Raises:
        ValueError: other names (strict) or shapes, or shards of another number of ranks.
    """
    if "tensors" not in state:
        return
    saved = state["tensors"]
    if strict and set(saved) != set(named):
        missing, extra = sorted(set(named) - set(saved)), sorted(set(saved) - set(named))
        raise ValueError(f"the optimizer's state does not fit; missing: {missing[:5]}, unexpected: {extra[:5]}")
    for name, (like, x) in named.items():
        if name not in saved:
            continue
        shape = tuple(x.shape) if like is None or not state["is_whole"] else like.layout.whole
        if tuple(saved[name].shape) != shape:
            raise ValueError(f"{name} has shape {tuple(saved[name].shape)} in the state, expected {shape}")
        mine, theirs = None if like is None else _shard_of(like), state["shards"][name]
        if not state["is_whole"] and mine != theirs:
            raise ValueError(
                f"{name} was saved by {_where(theirs)}, this is {_where(mine)}; save with state_dict(gather=True), or with "
                "a checkpoint.Checkpointer, to load at another number of ranks"
            )


def from_arrays(named: StateTensors, state: Mapping[str, Any]) -> None:
    """Write arrays that `check_arrays` took into the tensors."""
    for name, saved in state.get("tensors", {}).items():
        if name in named:
            like, x = named[name]
            array = np.asarray(saved, order="C")
            overwrite(x, from_host(like.layout.cut(array) if like is not None and state["is_whole"] else array))


def _copy(x: Tensor) -> np.ndarray:
    return host_array(x).reshape(x.shape).copy()  # `host_array` gives a scalar one dimension


def _shard_of(p: DistributedParameter) -> list[Any]:
    cut = [[split.dim, split.index, split.parts] for split in p.layout.splits]
    return [p.layout.index, p.layout.ranks, list(p.layout.whole), *([cut] if cut else [])]


def _where(shard: list[Any] | None) -> str:
    if shard is None:
        return "no shard"
    cut = f", cut as {shard[3]}" if len(shard) > 3 else ""
    return f"rank {shard[0]} of {shard[1]} (full shape {tuple(shard[2])}{cut})"


def _whole(name: str, like: DistributedParameter | None, x: Tensor) -> np.ndarray:
    if like is None:
        return _copy(x)
    gathered = host_array(like.world.along(like.along).all_gather([x], label=f"state {name}").wait()[0])
    return like.joined(gathered[: like.full_size].reshape(like.full_shape).copy())
