"""A language model that predicts the next token: an encoder below a projection to the vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Iterable, Sequence, TypeVar

import mindspore as ms
from mindspore import Tensor, nn

from ...comm import world as current_world
from ...compat.autograd import recording
from ...nn import ColumnParallelLinear, functional
from ...zero import undisturbed
from ..layer import Embedding, Encoder, KeyValueCache, Linear, Positions
from ..pretrained.family import Family
from ..pretrained.models import load_pretrained, model_of, prove, write_pretrained
from ..spread import Spread, spread
from ..staged import Stages
from ..targets import targets_that_count
from .config import DecoderConfig

Model = TypeVar("Model", bound="CausalLM")


class CausalLM(nn.Cell):
    """What models of all families have in common: plain; `spread` makes Blocks of the layers, `init_parameters` or `load` gives
    values.

    Args:
        config: vocab_size, dim_model, dtype, init_std, and tied.
        layers: (hidden, positions, cache) -> hidden, each.
        norm: behind the last one.
        embed_positions, embed_scale: see `Encoder`.
        head_scale: what hidden states are multiplied with before they are projected to the vocabulary.
    """

    FAMILY: ClassVar[Family]
    """What Hugging Face calls it."""
    CONFIG: ClassVar[type[DecoderConfig]]
    EARLIER_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ()
    """A part of a parameter's name, and what stood in its place in the files of earlier releases."""

    def __init__(
        self,
        config: DecoderConfig,
        layers: Iterable[nn.Cell],
        norm: nn.Cell,
        *,
        embed_positions: nn.Cell | None = None,
        embed_scale: float = 1.0,
        head_scale: float = 1.0,
    ):
        super().__init__()
        self.config, self.head_scale = config, head_scale
        self.loaded_from: Path | None = None  # a folder of Hugging Face's
        settings = {"dtype": getattr(ms, config.dtype), "init_std": config.embed_std or config.init_std}
        embed_tokens = Embedding(config.vocab_size, config.dim_model, **settings)
        self.model = Encoder(layers, norm, embed_tokens, embed_positions, embed_scale)
        self.lm_head = None if config.tied else Linear(config.dim_model, config.vocab_size, bias=False, **settings)

    @classmethod
    def from_pretrained(
        cls: type[Model],
        folder: str | Path,
        how: Spread | None = None,
        stages: str | Sequence[int] | Stages | None = None,
        dtype: str | None = None,
        *,
        pickles: bool = False,
        **changes: Any,
    ) -> Model:
        """A model of this family, out of a folder of Hugging Face's as it is: `config.json` and safetensors files.

        All ranks call it. Each opens the files, and reads the parts of them, that hold what it stores; they need no other disk in
        common. Nothing of a model is made where the config says what is not computed here, and no values are taken before all
        names, shapes and types have been looked at.

        Args:
            folder: of the model.
            how: how it is spread over the ranks, see `spread`; None: it stays plain, to be changed and spread, or used as it is.
            stages: of a pipeline, see `spread`; with them `how` is `Spread()` unless it is given.
            dtype: of the parameters; default: what the config says. Values are converted.
            pickles: read `pytorch_model.bin` where there are no safetensors files, by an interpreter that builds tensors and
                nothing else.
            changes: fields of our config that are to be others than the file's, as `tied=True` or `balance="sequence"`.

        Raises:
            PretrainedError: another family or architecture; settings that are not computed here; tensors that are missing,
                unexpected, or of another shape or type, in a table.
            CheckpointError: a file is missing, damaged or truncated. Both on every rank alike.
        """
        model = model_of(cls, folder, changes if dtype is None else {**changes, "dtype": dtype})
        if how is not None or stages is not None:
            spread(model, how or Spread(), stages)
        load_pretrained(model, folder, pickles)
        model.loaded_from = Path(folder).expanduser()
        return model

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        source: str | Path | None = None,
        max_shard_size: int | str = "5GB",
        proven: bool = True,
    ) -> None:
        """Write a folder that `transformers` loads: safetensors files, their index, the config, and what belongs beside them.

        All ranks call it, whatever the layout; rank 0 writes, a few MiB at a time. A table that is tied is written once. The new
        model takes an old one's place when it is complete.

        Args:
            folder: made if it is not there.
            source: a folder to copy the generation config, the tokenizer and chat templates from, and fields of the config that
                are not ours; default: that which the model was loaded from.
            max_shard_size: of a file, bytes or like `5GB`.
            proven: read the folder again, as another model on the same ranks, which all have to see it, and compare the logits of
                a prompt. Needs memory for the parameters once more.

        Raises:
            PretrainedError: it is written, and the logits differ or cannot be computed here; on every rank.
            CheckpointError: the model has adapters that are not merged, or it cannot be written; on every rank.
        """
        beside = self.loaded_from if source is None else Path(source).expanduser()
        write_pretrained(self, folder, beside, max_shard_size)
        if proven:
            how, stages = vars(self).get("spread_as", (None, None))
            prove(self, type(self).from_pretrained(folder, how, stages), folder)

    def construct(
        self,
        input_ids: Tensor,
        padding: Tensor | None = None,
        cache: KeyValueCache | None = None,
        documents: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """
        Args:
            input_ids: (batch, length) int32.
            padding: (batch, cached + length) bool, False where a token is padding; None: no padding.
            cache: of the tokens before these; takes these up.
            documents: (batch, length) of int, for rows that hold several documents; see `Positions`.
            last_only: the last position's logits are enough; over tensor-parallel ranks they are all there nevertheless.

        Returns:
            logits (batch, length, vocab_size), or (batch, 1, vocab_size).
        """
        positions = Positions.of(input_ids, padding, cache, documents)
        positions.last_only = last_only
        with undisturbed():
            return self.logits_of(self.model(input_ids.reshape(-1), positions, cache), positions)

    def loss(
        self,
        input_ids: Tensor,
        targets: Tensor,
        padding: Tensor | None = None,
        documents: Tensor | None = None,
        weight: float = 1.0,
        **options: Any,
    ) -> Tensor:
        """Cross entropy of the logits, which are never there for all tokens and the whole vocabulary, and the routers' losses.

        Tensor-parallel ranks are given the same arguments; that they are is noticed on CPU ranks.

        Args:
            input_ids, padding, documents: as when the model is called.
            targets: (batch, length) of int32 or int64, for each token the one to come; -100 where none is to be learnt.
            weight: what the cross entropy, and not what routers add, is multiplied with: where batches have other numbers of
                targets than others', this one's over the mean of all, so that all targets count alike.
            options: of `nn.functional.linear_cross_entropy`.

        Returns:
            float32, a scalar: the mean over the targets that count, and the mean over the tokens of what routers add, so that where
            gradients are taken the mean over ranks is that over the tokens of all (`nn.Routing.add_losses`); for `reduction="sum"`
            both times the number of targets that count; for "none" (batch * length,), without the routers'.

        Raises:
            ValueError: routers have losses, gradients are taken, and the reduction is "none".
        """
        positions = Positions.of(input_ids, padding, None, documents)
        if self.model.ranks > 1:
            current_world().along("tp").compare("weight of the loss", float(weight))
        with undisturbed():
            loss = self.loss_of(self.model(input_ids.reshape(-1), positions), targets, **options)
            loss = functional.times(loss, weight)
            if positions.routed is None:
                return loss
            reduction = options.get("reduction", "mean")
            if reduction == "none":
                if positions.routed.has_losses and recording():
                    raise ValueError('routers\' losses are means over tokens: train with reduction="mean" or "sum", not "none"')
                return loss
            counted = 1.0 if reduction == "mean" else targets_that_count(targets, options)
            return positions.routed.add_losses(loss, counted)

    def logits_of(self, hidden: Tensor, positions: Positions) -> Tensor:
        """What the encoder returns -> logits (batch, length or 1, vocab_size)."""
        hidden = positions.last_of(self._scaled(hidden))
        logits = self.model.embed_tokens.projection(hidden) if self.lm_head is None else self.lm_head(hidden)
        return functional.reshape(positions.without_padding(logits), (positions.batch, positions.wanted, -1))

    def loss_of(self, hidden: Tensor, targets: Tensor, **options: Any) -> Tensor:
        """What the encoder returns -> the loss of the logits; targets and options as those of `loss`."""
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return head.cross_entropy(self._scaled(hidden), targets.reshape(-1), **options)

    def divide(self, ranks: int) -> None:
        """Have each tensor-parallel rank compute the logits of its part of the vocabulary; a call still returns all of them."""
        if self.lm_head is not None:
            self.lm_head = ColumnParallelLinear.of(self.lm_head, gather_output=True)

    def earlier_name(self, name: str) -> str:
        """What a parameter, of that name now, is called in files of earlier releases."""
        for now, before in self.EARLIER_NAMES:
            name = name.replace(now, before)
        return name

    def _scaled(self, hidden: Tensor) -> Tensor:
        return hidden if self.head_scale == 1.0 else hidden * self.head_scale
