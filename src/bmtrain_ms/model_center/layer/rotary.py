"""Rotary position embedding, and the ways to stretch it over longer texts."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.checks import number, whole

from ...nn import functional

KINDS = ("linear", "dynamic", "llama3", "yarn", "longrope")


@dataclass(frozen=True)
class RopeScaling:
    """How frequencies are changed for texts longer than a model was first trained on; names are those of Hugging Face's configs.

    `rope_type`: `linear` (Chen et al., 2023): all are divided by `factor`.  `dynamic`: the base grows with a text longer than
    `original`.  `llama3`: low frequencies are divided, high ones stay, those between are mixed.  `yarn` (Peng et al., 2023): the
    same by another rule, and cos and sin are multiplied.  `longrope` (Ding et al., 2024): each is divided by a number of its own,
    of `long_factor` in a text longer than `original`, of `short_factor` otherwise.
    `original`: positions that the model was first trained on (`original_max_position_embeddings`).  `longest`: those that it is
    made for (`max_position_embeddings`), for `longrope`.  `attention_factor`: what cos and sin are multiplied with; None: by the
    rule of the kind.

    Raises:
        ValueError: an unknown kind, or a number that is out of range or missing.
    """

    rope_type: str
    factor: float = 1.0
    original: int = 0
    longest: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.rope_type not in KINDS:
            raise ValueError(f"rope_type must be one of {', '.join(KINDS)}, not {self.rope_type!r}")
        for name in ("short_factor", "long_factor"):
            object.__setattr__(self, name, tuple(float(x) for x in getattr(self, name)))
        if not number("factor", self.factor) >= 1.0:
            raise ValueError(f"the factor of a rope scaling must be at least 1, not {self.factor}")
        if self.rope_type != "linear" and whole("original", self.original) < 1:
            raise ValueError(f"{self.rope_type} needs to know the positions first trained on: original_max_position_embeddings")
        if self.rope_type == "longrope" and not (self.short_factor and self.long_factor):
            raise ValueError("longrope needs short_factor and long_factor, a number for each frequency")
        if self.rope_type == "llama3" and not self.high_freq_factor > self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor={self.high_freq_factor} must be above low_freq_factor={self.low_freq_factor} for llama3"
            )

    def frequencies(self, dim: int, base: float, length: int) -> np.ndarray:
        """(dim / 2,) float64, in a text of so many positions."""
        plain = _frequencies(dim, base)
        if self.rope_type == "linear":
            return plain / self.factor
        if self.rope_type == "dynamic":
            stretch = self.factor * max(length, self.original) / self.original - (self.factor - 1.0)
            return _frequencies(dim, base * stretch ** (dim / (dim - 2)))
        if self.rope_type == "llama3":
            turns = self.original * plain / (2 * math.pi)
            t = np.clip((turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
            return (1.0 - t) * plain / self.factor + t * plain
        if self.rope_type == "longrope":
            factors = np.array(self.long_factor if length > self.original else self.short_factor)
            if factors.shape != plain.shape:
                raise ValueError(f"longrope has {factors.size} factors, and heads of {dim} have {plain.size} frequencies")
            return plain / factors
        low, high = (dim * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(base)) for turns in self._betas)
        low, high = max(math.floor(low), 0), min(math.ceil(high), dim - 1)
        t = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0.0, 1.0)
        return t * plain / self.factor + (1.0 - t) * plain

    @property
    def multiplier(self) -> float:
        """What cos and sin are multiplied with."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.rope_type == "yarn":
            if self.mscale and self.mscale_all_dim:
                return yarn_scale(self.factor, self.mscale) / yarn_scale(self.factor, self.mscale_all_dim)
            return yarn_scale(self.factor, 1.0)
        if self.rope_type == "longrope" and (stretch := self.longest / self.original) > 1.0:
            return math.sqrt(1.0 + math.log(stretch) / math.log(self.original))
        return 1.0

    @property
    def varies(self) -> bool:
        """Whether frequencies depend on the length of the text."""
        return self.rope_type in ("dynamic", "longrope")

    @property
    def _betas(self) -> tuple[float, float]:
        return self.beta_fast, self.beta_slow


def yarn_scale(factor: float, mscale: float) -> float:
    """0.1 * mscale * log(factor) + 1 (Peng et al., 2023)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1.0 else 1.0


class RotaryEmbedding:
    """Rotates queries and keys by angles that grow with the position (Su et al., 2021); halves paired as in HF Llama.

    Angles are made in float64 and used in float32 whatever the model's dtype: in bfloat16 positions above 256 are not exact.

    Args:
        dim_head: even.
        base: of the geometric series of frequencies.
        scaling: how they are changed for longer texts; None: they are not.
    """

    def __init__(self, dim_head: int, base: float = 10000.0, scaling: RopeScaling | None = None):
        if dim_head % 2:
            raise ValueError(f"rotary embedding needs an even dim_head, not {dim_head}")
        self.dim_head, self.base, self.scaling = dim_head, base, scaling

    def angles(self, offset: int, length: int) -> functional.Angles:
        """cos and sin at positions offset, offset + 1, ...: each (length, dim_head / 2), float32; shared: do not write."""
        return _consecutive(self.dim_head, self.base, self.scaling, offset, length)

    def angles_at(self, positions: np.ndarray) -> functional.Angles:
        """cos and sin at any positions (...) of int: each (..., dim_head / 2), float32."""
        return _angles(self.dim_head, self.base, self.scaling, positions)

    def __call__(self, x: Tensor, offset: int = 0) -> Tensor:
        """x (batch, length, heads, dim_head), at positions offset, offset + 1, ... -> the same shape and dtype."""
        batch, length, heads, dim = x.shape
        flat = x.reshape(batch * length, heads * dim)
        return functional.split_heads(flat, batch, heads, self.angles(offset, length)).transpose(0, 2, 1, 3)


@functools.lru_cache(maxsize=8)
def _consecutive(dim: int, base: float, scaling: RopeScaling | None, offset: int, length: int) -> functional.Angles:
    return _angles(dim, base, scaling, np.arange(offset, offset + length))


def _angles(dim: int, base: float, scaling: RopeScaling | None, positions: np.ndarray) -> functional.Angles:
    longest = int(positions.max(initial=0)) + 1
    frequency = _frequencies(dim, base) if scaling is None else scaling.frequencies(dim, base, longest)
    angles = positions.astype(np.float64)[..., None] * frequency
    factor = 1.0 if scaling is None else scaling.multiplier
    return (np.cos(angles) * factor).astype(np.float32), (np.sin(angles) * factor).astype(np.float32)


def _frequencies(dim: int, base: float) -> np.ndarray:
    return base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
