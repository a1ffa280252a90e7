"""Llama (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped queries."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Optional, Sequence

import mindspore as ms
from mindspore import Tensor, nn

from bmtrain_ms_base.checks import whole

from ...zero import undisturbed
from ..layer import Embedding, Encoder, Linear, RotaryEmbedding
from ..layer.attention import KeyValue


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama (ModelCenter's names).

    `num_heads_kv=0`: as many as `num_heads`.  `dim_head=0`: dim_model / num_heads.  `half`: float16 parameters.  `tied`: the output
    projection is the embedding's table.

    Raises:
        ValueError: sizes that do not fit together.
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
    half: bool = False
    tied: bool = False
    use_checkpoint: bool = True
    zero_level: int = 3

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
        if self.zero_level not in (2, 3):
            raise ValueError(f"zero_level must be 2 or 3, not {self.zero_level}")

    @property
    def dtype(self) -> Any:
        """Of the parameters."""
        return ms.float16 if self.half else ms.float32

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-serialisable."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """The inverse of `to_dict`; unknown names are refused."""
        unknown = set(values) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields of LlamaConfig: {sorted(unknown)}")
        return cls(**values)

    def to_json_file(self, path: str | Path) -> None:
        """Write the fields as JSON."""
        Path(path).expanduser().write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> LlamaConfig:
        """Read what `to_json_file` wrote."""
        return cls.from_dict(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))


class Llama(nn.Cell):
    """The language model. Call `init_parameters` or `load` after construction."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.input_embedding = Embedding(config.vocab_size, config.dim_model, config.dtype, config.init_std)
        self.encoder = Encoder(
            num_layers=config.num_layers,
            dim_model=config.dim_model,
            dim_ff=config.dim_ff,
            num_heads=config.num_heads,
            dim_head=config.dim_head,
            num_heads_kv=config.num_heads_kv,
            norm_eps=config.norm_eps,
            dtype=config.dtype,
            init_std=config.init_std,
            use_checkpoint=config.use_checkpoint,
            zero_level=config.zero_level,
        )
        self.output_projection = None
        if not config.tied:
            self.output_projection = Linear(
                config.dim_model, config.vocab_size, bias=False, dtype=config.dtype, init_std=config.init_std
            )
        self._rotary = RotaryEmbedding(config.dim_head, config.rope_base)

    def construct(
        self,
        input_ids: Tensor,
        padding: Optional[Tensor] = None,
        past_key_values: Optional[Sequence[KeyValue]] = None,
        use_cache: bool = False,
    ) -> Any:
        """
        Args:
            input_ids: (batch, length) int32.
            padding: (batch, past + length) bool, False where a position is padding; None: no padding.
            past_key_values: of the positions before, as returned with `use_cache`.
            use_cache: also return keys and values.

        Returns:
            logits (batch, length, vocab_size), or (logits, keys and values of every layer) with `use_cache`.
        """
        with undisturbed():
            hidden = self.input_embedding(input_ids)
            out = self.encoder(hidden, self._rotary, padding, past_key_values, use_cache)
            hidden, caches = out if use_cache else (out, None)
            head = self.input_embedding.projection if self.output_projection is None else self.output_projection
            logits = head(hidden)
        return (logits, caches) if use_cache else logits
