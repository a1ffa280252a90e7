"""Rank arithmetic: which rank stands where on the axes `pp`, `dp`, `tp`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mesh:
    """`world = pp * dp * tp` ranks; tensor-parallel ranks are adjacent, pipeline neighbours `world / pp` apart (BMTrain's layout).

    Two meshes of different shape can exist side by side; nothing here is global.

    Raises:
        ValueError: the world is not divisible by pp * tp.
    """

    world: int
    rank: int
    tp: int = 1
    pp: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or self.tp < 1 or self.pp < 1:
            raise ValueError(f"world, tp and pp must be at least 1, not {self.world}, {self.tp}, {self.pp}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is outside the world of {self.world} (0..{self.world - 1})")
        if self.world % (self.pp * self.tp):
            raise ValueError(
                f"world size {self.world} is not divisible by pp * tp = {self.pp} * {self.tp} = {self.pp * self.tp}; "
                f"start a multiple of {self.pp * self.tp} processes"
            )

    @property
    def dp(self) -> int:
        """Data-parallel replicas: what gradients are averaged over."""
        return self.world // (self.pp * self.tp)

    @property
    def pp_rank(self) -> int:
        """This rank's pipeline stage."""
        return self.rank // (self.world // self.pp)

    @property
    def tp_rank(self) -> int:
        """Which slice of a tensor-parallel parameter this rank holds."""
        return self.rank % self.tp

    @property
    def dp_rank(self) -> int:
        """Which part of the batch this rank reads."""
        return self.rank % (self.world // self.pp) // self.tp

    def peers(self, axis: str) -> list[int]:
        """The global ranks that differ from this one only along `axis` (`pp`, `dp` or `tp`), in order."""
        per_stage = self.world // self.pp
        in_stage = self.rank % per_stage
        if axis == "pp":
            return [stage * per_stage + in_stage for stage in range(self.pp)]
        first = self.pp_rank * per_stage
        if axis == "tp":
            start = first + self.dp_rank * self.tp
            return list(range(start, start + self.tp))
        if axis == "dp":
            return [first + i * self.tp + self.tp_rank for i in range(self.dp)]
        raise ValueError(f"unknown mesh axis {axis!r}; choose pp, dp or tp")
