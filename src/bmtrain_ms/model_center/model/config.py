"""Sizes of a decoder, whatever its family."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, TypeVar

from bmtrain_ms_base.checks import number, whole

from ..layer import RopeScaling

Config = TypeVar("Config")

_DTYPES = ("float32", "float16", "bfloat16")
_NO_SIZES = {  # fields of LlamaConfig in earlier releases
    "half": 'write dtype="float16" for float16 parameters',
    "use_checkpoint": "write spread(model, Spread(recompute=...))",
    "zero_level": "write spread(model, Spread(zero_level=...))",
}


def refusing_what_is_no_size(cls: type[Config]) -> type[Config]:
    """Say where fields that have gone are now; `__init__` would only say that they are unknown."""
    init: Callable[..., None] = cls.__init__

    @functools.wraps(init)
    def checked(self: Config, *args: Any, **values: Any) -> None:
        for name, advice in _NO_SIZES.items():
            if name in values:
                raise TypeError(f"{name} is no longer a field of {cls.__name__}, which holds sizes: {advice}")
        init(self, *args, **values)

    cls.__init__ = checked
    return cls


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder (ModelCenter's names); families have some more.

    `num_heads_kv=0`: as many as `num_heads`.  `dim_head=0`: dim_model / num_heads.  `rope_scaling`: a `RopeScaling`, or its fields
    as a dict.  `dtype`: of the parameters, "float32", "float16" or "bfloat16".  `tied`: the output projection is the embedding's
    table.  `init_std`: of the normal distribution that matrices begin with; `embed_std`: that of the embedding and the output
    projection, 0: the same.

    Raises:
        ValueError: sizes that do not fit together, or another dtype.
        TypeError: a field of earlier releases that is no size; the message says what to write now.
    """

    vocab_size: int = 32000
    dim_model: int = 4096
    num_heads: int = 32
    num_heads_kv: int = 0
    dim_head: int = 0
    dim_ff: int = 11008
    num_layers: int = 32
    norm_eps: float = 1e-5
    rope_base: float = 10000.0
    init_std: float = 0.02
    dtype: str = "float32"
    tied: bool = False
    rope_scaling: RopeScaling | None = None
    embed_std: float = 0.0

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ("vocab_size", "dim_model", "num_heads", "dim_ff", "num_layers"):
            set_field(self, name, whole(name, getattr(self, name), 1))
        set_field(self, "num_heads_kv", self.num_heads_kv or self.num_heads)
        if self.num_heads_kv < 1 or self.num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_heads_kv={self.num_heads_kv}")
        if not self.dim_head:
            if self.dim_model % self.num_heads:
                raise ValueError(f"dim_model={self.dim_model} is not a multiple of num_heads={self.num_heads}; set dim_head")
            set_field(self, "dim_head", self.dim_model // self.num_heads)
        if self.dim_head < 1 or self.dim_head % 2:
            raise ValueError(f"dim_head must be positive and even, not {self.dim_head}: rotary embedding turns pairs")
        for name in (field.name for field in fields(self) if isinstance(getattr(self, field.name), float)):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name} must be a finite number, not {getattr(self, name)}")
        for name in ("norm_eps", "rope_base"):
            if not number(name, getattr(self, name)) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("init_std", "embed_std"):
            if not number(name, getattr(self, name)) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")
        if isinstance(self.rope_scaling, dict):
            set_field(self, "rope_scaling", RopeScaling(**self.rope_scaling))

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-serialisable."""
        return asdict(self)

    @classmethod
    def from_dict(cls: type[Config], values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; unknown names are refused.

        Those of earlier releases are taken: `half` becomes the dtype, while `use_checkpoint` and `zero_level`, which never were
        sizes, are left out, as they are now what `spread` is told.
        """
        known = {name: value for name, value in values.items() if name not in _NO_SIZES}
        if values.get("half"):
            known.setdefault("dtype", "float16")
        unknown = set(known) - {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"unknown fields of {cls.__name__}: {sorted(unknown)}")
        return cls(**known)

    def to_json_file(self, path: str | Path) -> None:
        """Write the fields as JSON."""
        Path(path).expanduser().write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls: type[Config], path: str | Path) -> Config:
        """Read what `to_json_file` wrote, in this release or an earlier one; see `from_dict`."""
        return cls.from_dict(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))  # type: ignore[attr-defined]


@dataclass(frozen=True)
class WindowedConfig(DecoderConfig):
    """Sizes of a decoder whose attention may have a sliding window, see `DecoderConfig`.

    `window`: a token sees so many tokens, the last one of which is itself; 0: all before it.  `full_layers`: in which it sees all
    of them nevertheless, counted from 0.

    Raises:
        ValueError: a window below 0, or a layer that there is not.
    """

    window: int = 0
    full_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "window", whole("window", self.window, 0))
        object.__setattr__(self, "full_layers", tuple(whole("full_layers", n, 0) for n in self.full_layers))
        if any(n >= self.num_layers for n in self.full_layers):
            raise ValueError(f"full_layers={self.full_layers} names a layer that there is not: num_layers={self.num_layers}")

    def window_of(self, number: int) -> int | None:
        """What a token sees in a layer, counted from 0, as `Attention` is told."""
        return None if not self.window or number in self.full_layers else self.window
