"""Rank arithmetic: which rank stands where on the axes of parallelism.

[Note: axes]
`pp` pipeline stages, `dp` data-parallel replicas of the model, `tp` parts of its tensors: world = pp * dp * tp, in this order, so
that tensor-parallel ranks are adjacent and pipeline neighbours world / pp apart (BMTrain's layout). The data axis has two finer
readings: dp = replica * shard, where ZeRO shards parameters over `shard` and repeats them over `replica`; and dp = edp * ep, where
experts are divided over `ep` and each is sharded over `edp`. The second factor is the adjacent one: inside a node if it can be.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

_READINGS = {"replica": ("replica", "shard"), "shard": ("replica", "shard"), "edp": ("edp", "ep"), "ep": ("edp", "ep")}
AXES = ("pp", "dp", "tp", *_READINGS)


@dataclass(frozen=True)
class Mesh:
    """Where one rank stands, see [Note: axes]. Two meshes of different shape can exist side by side; nothing here is global.

    Attributes:
        world, rank: how many ranks there are, and which this is.
        tp, pp, replica, ep: sizes of axes; those of the others follow.

    Raises:
        ValueError: a size below 1, or one that does not divide the ranks.
    """

    world: int
    rank: int
    tp: int = 1
    pp: int = 1
    replica: int = 1
    ep: int = 1

    def __post_init__(self) -> None:
        if self.world < 1 or self.tp < 1 or self.pp < 1:
            raise ValueError(f"world, tp and pp must be at least 1, not {self.world}, {self.tp}, {self.pp}")
        if not 0 <= self.rank < self.world:
            raise ValueError(f"rank {self.rank} is outside the world of {self.world} (0..{self.world - 1})")
        if self.world % (self.pp * self.tp):
            ranks = self.pp * self.tp
            fits = [n for n in range(1, self.world + 1) if self.world % (n * self.tp) == 0]
            near = [*[n for n in fits if n < self.pp][-1:], *[n for n in fits if n > self.pp][:1]]
            instead = f", or choose {' or '.join(map(str, near))} for pp" if near else ""
            raise ValueError(
                f"world size {self.world} is not divisible by pp * tp = {self.pp} * {self.tp} = {ranks}; "
                f"start a multiple of {ranks} processes{instead}"
            )
        for name in ("replica", "ep"):
            size = getattr(self, name)
            if size < 1 or self.dp % size:
                raise ValueError(
                    f"{name}={size} does not divide the {self.dp} data-parallel ranks: use {nearest_divisors(self.dp, size)}"
                )

    @classmethod
    def data_parallel(cls, world: int, rank: int, shard_size: int | None = None, tp: int = 1, pp: int = 1, ep: int = 1) -> Mesh:
        """`tp` neighbours divide tensors, `pp` stages layers, the rest of the ranks are the data axis, where parameters are sharded
        over so many neighbours (default: all) and repeated across, and experts are divided over `ep` neighbours.

        Raises:
            ValueError: the number of ranks is not a multiple of `pp * tp`, or that of data-parallel ones not of `shard_size` or
                `ep`.
        """
        dp = cls(world, rank, tp=tp, pp=pp).dp
        if shard_size is not None and (shard_size < 1 or dp % shard_size):
            raise ValueError(
                f"shard_size={shard_size} does not divide the {dp} ranks; give the number of ranks of a node, or None to "
                "shard over all"
            )
        return cls(world, rank, tp=tp, pp=pp, replica=1 if shard_size is None else dp // shard_size, ep=ep)

    @property
    def dp(self) -> int:
        """Data-parallel replicas: what gradients are averaged over."""
        return self.world // (self.pp * self.tp)

    @property
    def shard(self) -> int:
        """Over how many ranks ZeRO shards a parameter."""
        return self.dp // self.replica

    @property
    def edp(self) -> int:
        """Over how many ranks an expert's parameters are sharded."""
        return self.dp // self.ep

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

    def size(self, axis: str) -> int:
        """How many ranks there are along an axis."""
        _check_axis(axis)
        return getattr(self, axis)

    def coordinate(self, axis: str) -> int:
        """Where this rank stands along an axis."""
        _check_axis(axis)
        if axis not in _READINGS:
            return getattr(self, f"{axis}_rank")
        outer, inner = divmod(self.dp_rank, self.size(_READINGS[axis][1]))
        return outer if axis == _READINGS[axis][0] else inner

    def peers(self, *axes: str) -> list[int]:
        """The ranks that differ from this one along these axes only, in order.

        Raises:
            ValueError: an unknown axis, or two of different readings of the data axis.
        """
        for axis in axes:
            _check_axis(axis)
        readings = {_READINGS[axis] for axis in axes if axis in _READINGS}
        if len(readings) > 1 or (readings and "dp" in axes):
            raise ValueError(
                f"axes {', '.join(axes)} are different readings of the data axis: choose replica and shard, or edp and ep"
            )
        fixed = [axis for axis in ("pp", *(readings.pop() if readings else ("dp",)), "tp") if axis not in axes]
        mine = [self.coordinate(axis) for axis in fixed]
        others = (replace(self, rank=rank) for rank in range(self.world))
        return [other.rank for other in others if [other.coordinate(axis) for axis in fixed] == mine]


def nearest_divisors(size: int, wanted: int) -> str:
    """The divisors, in words, of `size` around one that is none, e.g. `2 or 4`."""
    fit = [n for n in range(1, size + 1) if size % n == 0]
    around = [*[n for n in fit if n < wanted][-1:], *[n for n in fit if n > wanted][:1]]
    return " or ".join(map(str, around))


def _check_axis(axis: str) -> None:
    if axis not in AXES:
        raise ValueError(f"unknown mesh axis {axis!r}; choose one of {', '.join(AXES)}")
