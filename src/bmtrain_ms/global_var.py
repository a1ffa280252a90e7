"""BMTrain's `config`: what it says about this process, read from the current world. Nothing can be written to it."""

from __future__ import annotations

from typing import Any, Callable, Iterator, Mapping

from .comm import is_initialized, rank, world_size
from .comm import world as current_world

_KEYS: dict[str, Callable[[], Any]] = {
    "initialized": is_initialized,
    "rank": rank,
    "world_size": world_size,
    "local_rank": lambda: current_world().launch.local_rank,
    "local_size": lambda: current_world().launch.local_size,
    "zero_rank": lambda: current_world().mesh.coordinate("shard"),
    "zero_size": lambda: current_world().mesh.shard,
    "tp_zero_rank": lambda: current_world().mesh.coordinate("shard"),
    "tp_zero_size": lambda: current_world().mesh.shard,
    "tp_rank": lambda: current_world().mesh.tp_rank,
    "tp_size": lambda: current_world().mesh.tp,
    "pipe_rank": lambda: current_world().mesh.pp_rank,
    "pipe_size": lambda: current_world().mesh.pp,
    "pipe_enabled": lambda: current_world().mesh.pp > 1,
    "micros": lambda: current_world().micro_batches or current_world().mesh.pp,
    "comm": lambda: current_world().everyone,
    "zero_comm": lambda: current_world().along("shard"),
    "tp_zero_comm": lambda: current_world().along("shard"),
    "tp_comm": lambda: current_world().along("tp"),
    "pipe_comm": lambda: current_world().along("pp"),
    "pp_zero_comm": lambda: current_world().along("shard"),
    "pp_tp_zero_comm": lambda: current_world().along("shard"),
    "topology": lambda: current_world().mesh,
}


class _Config(Mapping[str, Any]):
    """BMTrain's `config` as a mapping that cannot be written to."""

    def __getitem__(self, key: str) -> Any:
        if key not in _KEYS:
            raise KeyError(f"bmtrain_ms has no config[{key!r}]: it has {', '.join(_KEYS)}. Streams and events do not exist in it")
        return _KEYS[key]()

    def __contains__(self, key: object) -> bool:
        return key in _KEYS

    def __iter__(self) -> Iterator[str]:
        return iter(_KEYS)

    def __len__(self) -> int:
        return len(_KEYS)


config: Mapping[str, Any] = _Config()
