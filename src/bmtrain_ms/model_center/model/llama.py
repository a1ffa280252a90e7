"""Llama (Touvron et al., 2023): RMSNorm, rotary positions, SwiGLU, grouped queries.

Parameters have the names and shapes of Hugging Face's `LlamaForCausalLM`, so that a file of `bmtrain_ms.save` is one of its.
"""

from __future__ import annotations

import functools
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Callable, Optional, TypeVar

import mindspore as ms
from mindspore import Tensor, nn

from bmtrain_ms_base.checks import whole

from ...nn import ColumnParallelLinear
from ...zero import undisturbed
from ..layer import Embedding, Encoder, KeyValueCache, Linear, Positions, RMSNorm, RotaryEmbedding, TransformerBlock

# A part of a parameter's name, and what stood in its place in the files of releases before Hugging Face's names.
EARLIER_NAMES = (
    ("model.embed_tokens.", "input_embedding."),
    ("model.layers.", "encoder.layers."),
    (".input_layernorm.", ".attention_norm."),
    (".self_attn.q_proj.", ".attention.project_q."),
    (".self_attn.k_proj.", ".attention.project_k."),
    (".self_attn.v_proj.", ".attention.project_v."),
    (".self_attn.o_proj.", ".attention.attention_out."),
    (".post_attention_layernorm.", ".ffn_norm."),
    (".mlp.gate_proj.", ".ffn.w_gated."),
    (".mlp.up_proj.", ".ffn.w_in."),
    (".mlp.down_proj.", ".ffn.w_out."),
    ("model.norm.", "encoder.output_norm."),
    ("lm_head.", "output_projection."),
)

Config = TypeVar("Config")

_DTYPES = ("float32", "float16", "bfloat16")
_NO_SIZES = {  # fields of LlamaConfig in earlier releases
    "half": 'write dtype="float16" for float16 parameters',
    "use_checkpoint": "write spread(model, Spread(recompute=...))",
    "zero_level": "write spread(model, Spread(zero_level=...))",
}


def _refusing_what_is_no_size(cls: type[Config]) -> type[Config]:
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


@_refusing_what_is_no_size
@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama (ModelCenter's names).

    `num_heads_kv=0`: as many as `num_heads`.  `dim_head=0`: dim_model / num_heads.  `dtype`: of the parameters, "float32",
    "float16" or "bfloat16".  `tied`: the output projection is the embedding's table.

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
        if self.dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, not {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """All fields, JSON-serialisable."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LlamaConfig:
        """The inverse of `to_dict`; unknown names are refused.

        Those of earlier releases are taken: `half` becomes the dtype, while `use_checkpoint` and `zero_level`, which never were
        sizes, are left out, as they are now what `spread` is told.
        """
        known = {name: value for name, value in values.items() if name not in _NO_SIZES}
        if values.get("half"):
            known.setdefault("dtype", "float16")
        unknown = set(known) - {field.name for field in fields(cls)}
        if unknown:
            raise ValueError(f"unknown fields of LlamaConfig: {sorted(unknown)}")
        return cls(**known)

    def to_json_file(self, path: str | Path) -> None:
        """Write the fields as JSON."""
        Path(path).expanduser().write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def from_json_file(cls, path: str | Path) -> LlamaConfig:
        """Read what `to_json_file` wrote, in this release or an earlier one; see `from_dict`."""
        return cls.from_dict(json.loads(Path(path).expanduser().read_text(encoding="utf-8")))


class Llama(nn.Cell):
    """The language model, plain: `spread` makes Blocks of its layers, `init_parameters` or `load` gives it values."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        dtype = getattr(ms, config.dtype)
        settings = {"dtype": dtype, "init_std": config.init_std}
        rotary = RotaryEmbedding(config.dim_head, config.rope_base)
        layers = (
            TransformerBlock(
                config.dim_model,
                config.dim_ff,
                config.num_heads,
                config.dim_head,
                config.num_heads_kv,
                norm_eps=config.norm_eps,
                rotary=rotary,
                **settings,
            )
            for _ in range(config.num_layers)
        )
        norm = RMSNorm(config.dim_model, config.norm_eps, dtype)
        self.model = Encoder(layers, norm, Embedding(config.vocab_size, config.dim_model, **settings))
        self.lm_head = None if config.tied else Linear(config.dim_model, config.vocab_size, bias=False, **settings)

    def construct(
        self,
        input_ids: Tensor,
        padding: Optional[Tensor] = None,
        cache: Optional[KeyValueCache] = None,
        documents: Optional[Tensor] = None,
    ) -> Tensor:
        """
        Args:
            input_ids: (batch, length) int32.
            padding: (batch, cached + length) bool, False where a token is padding; None: no padding.
            cache: of the tokens before these; takes these up.
            documents: (batch, length) of int, for rows that hold several documents; see `Positions`.

        Returns:
            logits (batch, length, vocab_size).
        """
        positions = Positions.of(input_ids, padding, cache, documents)
        with undisturbed():
            return self.logits_of(self.model(input_ids.reshape(-1), positions, cache), positions)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        padding: Optional[Tensor] = None,
        documents: Optional[Tensor] = None,
        **options: Any,
    ) -> Tensor:
        """Cross entropy of the logits, which are never there for all tokens and the whole vocabulary.

        Args:
            input_ids, padding, documents: as when the model is called.
            targets: (batch, length) of int32 or int64, for each token the one to come; -100 where none is to be learnt.
            options: of `nn.functional.linear_cross_entropy`.

        Returns:
            float32, a scalar: the mean over the targets that count; for `reduction="none"` (batch * length,).
        """
        positions = Positions.of(input_ids, padding, None, documents)
        with undisturbed():
            return self.loss_of(self.model(input_ids.reshape(-1), positions), targets, **options)

    def logits_of(self, hidden: Tensor, positions: Positions) -> Tensor:
        """What the encoder returns -> logits (batch, length, vocab_size)."""
        logits = self.model.embed_tokens.projection(hidden) if self.lm_head is None else self.lm_head(hidden)
        return positions.without_padding(logits).reshape(positions.batch, positions.length, -1)

    def loss_of(self, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """What the encoder returns -> the loss; targets and options as those of `loss`."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.cross_entropy(hidden, targets.reshape(-1), **options)

    def divide(self, ranks: int) -> None:
        """Have each tensor-parallel rank compute the logits of its part of the vocabulary; a call still returns all of them."""
        if self.lm_head is not None:
            self.lm_head = ColumnParallelLinear.of(self.lm_head, gather_output=True)

    def earlier_name(self, name: str) -> str:
        """What a parameter, of that name now, is called in files of releases before Hugging Face's names."""
        for now, before in EARLIER_NAMES:
            name = name.replace(now, before)
        return name
