"""The parts of a run, made as its settings say: model, optimizer, schedule, batches."""

from __future__ import annotations

import dataclasses
import difflib
import re
from pathlib import Path
from typing import Any

from mindspore import Parameter

from bmtrain_ms_base.config import ConfigError, LoraSection, Settings, passes_of
from bmtrain_ms_base.config.fitting import skipped
from bmtrain_ms_base.data import Batches, GPTBatches, RampUp
from bmtrain_ms_base.data.gpt_batches import samples_for
from bmtrain_ms_base.data.gpt_index import shares_of
from bmtrain_ms_base.data.indexed import IndexedFile
from bmtrain_ms_base.data.skipping import Skipping
from bmtrain_ms_base.stages import divide

from .. import lr_scheduler
from ..comm import World, init_distributed
from ..comm import world as current_world
from ..model_center import Spread, Stages, spread
from ..model_center.auto import family_of
from ..model_center.model import FAMILIES, CausalLM
from ..model_center.pretrained.models import load_pretrained, model_of
from ..nn import add_lora
from ..optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager
from ..zero import init_parameters
from .data import load_gpt_data, load_instructions

_OUTER = re.compile(r"(^|\.)(embed_tokens|lm_head|wte|wpe|embed_positions)\.")
_SIZES_OF_TABLES = 128  # a vocabulary becomes a multiple of it, as Megatron's


def families() -> dict[str, type[CausalLM]]:
    """The families by the names that settings give them, Hugging Face's `model_type`: `llama`, `qwen3_moe` ..."""
    return {model.FAMILY.model_types[0].replace("-", ""): model for model in FAMILIES}


def size_schemas() -> dict[str, Any]:
    """What `model` may hold beside the names of its section, as JSON Schemas by name: the sizes of all families."""
    kinds = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}
    made: dict[str, Any] = {}
    for name, model in families().items():
        for field in dataclasses.fields(model.CONFIG):
            kind = kinds.get(str(field.type).split(" ")[0])
            entry = made.setdefault(field.name, {**({"type": kind} if kind else {}), "description": "a size of"})
            entry["description"] += f" {name}"
    return {name: entry for name, entry in made.items() if name != "dtype"}


def model_problems(settings: Settings) -> list[str]:
    """What is wrong with `model`, each in a line. Nothing is allocated; a process that is no rank may call it."""
    chosen, sizes = settings.model, settings.model.sizes
    if chosen.family is None:
        return []  # a folder's config is looked at by who reads it
    model = families().get(chosen.family)
    if model is None:
        near = difflib.get_close_matches(chosen.family, families(), 1)
        return [
            f"model.family: there is no {chosen.family}"
            + (f"; did you mean {near[0]}?" if near else f", but {', '.join(families())}")
        ]
    known = [field.name for field in dataclasses.fields(model.CONFIG)]
    found = []
    for name in (name for name in sizes if name not in known):
        near = difflib.get_close_matches(name, known, 1)
        found.append(
            f"model.{name}: there is no such size of {chosen.family}; "
            + (f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}")
        )
    if not found:
        try:
            found += _layout_problems(settings, config_of(settings, None))
        except (TypeError, ValueError) as error:
            found.append(f"model: {error}")
    return found


def _layout_problems(settings: Settings, config: Any) -> list[str]:
    """Where the model cannot be divided as the settings say."""
    layout, found = settings.layout, []
    if config.num_heads % layout.tp:
        found.append(f"layout.tp: {layout.tp} does not divide the {config.num_heads} heads of the model")
    experts = getattr(config, "num_experts", 0)
    if layout.ep > 1 and not experts:
        found.append(f"layout.ep: it is {layout.ep}, and the model has no experts")
    elif experts % layout.ep:
        found.append(f"layout.ep: {layout.ep} does not divide the {experts} experts of the model")
    try:
        divide(config.num_layers, layout.pp, layout.chunks, layout.stages)
    except ValueError as error:
        found.append(f"layout: {error}")
    return found


def config_of(settings: Settings, vocab_size: int | None) -> Any:
    """The config of a family with sizes; `vocab_size`: of the tokenizer, if the settings say none."""
    chosen = settings.model
    model = families()[str(chosen.family)]
    sizes = dict(chosen.sizes)
    if vocab_size is not None:
        sizes.setdefault("vocab_size", -(-vocab_size // _SIZES_OF_TABLES) * _SIZES_OF_TABLES)
    return model.CONFIG(**sizes, dtype=chosen.dtype or "float32")


def make_model(settings: Settings, vocab_size: int | None) -> CausalLM:
    """The model, spread over the ranks, with its values. All ranks call it.

    Args:
        vocab_size: of the tokens that it is to be trained on, if that is known.

    Raises:
        ConfigError: sizes that do not fit, or a vocabulary smaller than that of the tokens.
        PretrainedError: a folder does not fit; on every rank.
    """
    chosen, layout = settings.model, settings.layout
    how = Spread(layout.recompute, layout.zero_level)
    ranks = current_world().everyone.size
    _, micro_batches = passes_of(settings, ranks)
    stages = Stages(layout.stages, layout.schedule, layout.chunks, micro_batches) if layout.pp > 1 else None
    changes = {} if chosen.dtype is None else {"dtype": chosen.dtype}
    folder = chosen.pretrained or chosen.like
    try:
        if folder is not None:
            kind: Any = family_of(folder)
            model = model_of(kind, folder, {**changes, **chosen.sizes})
        else:
            kind = families()[str(chosen.family)]
            model = kind(config_of(settings, vocab_size))
        if vocab_size is not None and model.config.vocab_size < vocab_size:
            raise ConfigError(
                f"model.vocab_size: {model.config.vocab_size} is less than the tokenizer's {vocab_size}: the table would lack ids"
            )
        spread(model, how, stages)
    except (TypeError, ValueError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(f"model: {error}") from error
    if chosen.pretrained is None:
        init_parameters(model)
    else:
        load_pretrained(model, chosen.pretrained)
        model.loaded_from = Path(chosen.pretrained).expanduser()
    if settings.lora is not None:
        _add_adapters(settings.lora, model)
    return model


def _add_adapters(lora: LoraSection, model: CausalLM) -> None:
    try:
        add_lora(model, rf"({lora.pattern})$", lora.rank, lora.alpha, dropout=lora.dropout)
    except ValueError as error:
        raise ConfigError(f"lora: {error}") from error


def make_manager(settings: Settings, model: CausalLM) -> OptimManager:
    """The manager, with its optimizer and schedule."""
    chosen = settings.optimizer
    kind = AdamOptimizer if chosen.name == "adam" else AdamOffloadOptimizer
    betas = chosen.betas[0], chosen.betas[1]
    optimizer: Any = kind(_groups(settings, model), chosen.lr, betas=betas, eps=chosen.eps, weight_decay=chosen.weight_decay)
    manager = OptimManager(
        chosen.loss_scale,
        loss_scale_steps=chosen.loss_scale_steps,
        min_loss_scale=min(chosen.min_loss_scale, chosen.loss_scale or chosen.min_loss_scale),
        hysteresis=chosen.hysteresis,
    )
    manager.add_optimizer(optimizer, make_schedule(settings, optimizer))
    return manager


def _groups(settings: Settings, model: CausalLM) -> list[dict[str, Any]]:
    """Parameters that are trained, by whether they decay, and by their rate. Every rank has all groups, in one order."""
    chosen = settings.optimizer
    width = chosen.mup_width or 1.0
    kinds: dict[tuple[bool, bool], list[Parameter]] = {(decays, inner): [] for decays in (True, False) for inner in (True, False)}
    for p in model.trainable_params():
        vector = len(getattr(p, "full_shape", p.shape)) < 2  # biases and norms
        inner = chosen.mup_width is not None and not vector and not _OUTER.search(p.name)
        kinds[chosen.decay_vectors or not vector, inner].append(p)
    groups = []
    staged = current_world().mesh.pp > 1  # a stage may have none of a kind
    for (decays, inner), params in kinds.items():
        if params or (staged and (chosen.mup_width is not None or not inner)):
            group: dict[str, Any] = {"params": params, "weight_decay": chosen.weight_decay if decays else 0.0}
            groups.append({**group, "lr": chosen.lr / width} if inner else group)
    return groups


def make_schedule(settings: Settings, optimizer: Any) -> lr_scheduler.WarmupLRScheduler:
    """The schedule of the learning rate."""
    chosen, rate = settings.schedule, settings.optimizer.lr
    end = chosen.end or settings.train.steps
    given = optimizer, rate, chosen.warmup, end
    if chosen.name == "wsd":
        first = end - (chosen.decay or max(1, end // 10))
        return lr_scheduler.WSD(*given, decay_iter=first, end_lr=chosen.min_lr, shape=chosen.shape)
    if chosen.name == "exponential":
        return lr_scheduler.Exponential(*given, gamma=chosen.gamma)
    if chosen.name in ("linear", "cosine"):
        falling = lr_scheduler.Linear if chosen.name == "linear" else lr_scheduler.Cosine
        return falling(*given, end_lr=chosen.min_lr)
    return {"constant": lr_scheduler.NoDecay, "noam": lr_scheduler.Noam}[chosen.name](*given)


@dataclasses.dataclass(frozen=True)
class RunBatches:
    """What a run reads.

    `train`: of its steps.  `valid`: what it is evaluated on, or None.  `tokenizer`: what made the tokens, as far as it is known.
    `vocab_size`: of them, if it is known.
    """

    train: Skipping
    valid: Batches | None
    vocab_size: int | None


def make_batches(settings: Settings) -> RunBatches:
    """The batches; `settings.data` has `files` or `rows`, not `text` any more. All ranks call it.

    Raises:
        DataError: files are damaged, or there are not enough samples; on every rank alike.
    """
    data, batch, left_out = settings.data, settings.batch, skipped(settings.faults.skip)
    steps = settings.train.steps + len(left_out)
    if data.rows is not None:
        try:
            rows = load_instructions(data.rows, data.length, batch.size, settings.seed)
        except ValueError as error:
            raise ConfigError(f"data.rows: {error}") from error
        known = IndexedFile(f"{data.rows}_packed_input_ids_document").prepared
        return RunBatches(Skipping(rows, left_out), None, known.get("vocab_size"))
    ramp = None if batch.ramp_up is None else RampUp(**batch.ramp_up.model_dump())
    names = [str(part) for part in data.files]
    has_valid = shares_of(data.split)[1] > 0
    samples = [samples_for(steps, batch.size, ramp), settings.train.eval_batches * batch.size if has_valid else 0, 0]
    cache = None if data.cache is None else Path(data.cache).expanduser()
    told = {"cache": cache, "shared_storage": data.shared_storage}
    train, valid, _ = load_gpt_data(names, samples, data.length, data.split, settings.seed, **told)
    sizes = [IndexedFile(name).prepared.get("vocab_size") for name in names if Path(f"{name}.idx").expanduser().is_file()]
    return RunBatches(
        Skipping(GPTBatches(train, batch.size, data.packed, ramp), left_out),
        None if valid is None else GPTBatches(valid, batch.size, data.packed),
        max((size for size in sizes if size is not None), default=None),
    )


def join(settings: Settings) -> World:
    """Join the other ranks, as the layout says.

    Raises:
        ConfigError: there are others than it says.
    """
    layout = settings.layout
    try:
        made = init_distributed(
            seed=settings.seed,
            pipe_size=layout.pp if layout.pp > 1 else -1,
            tp_size=layout.tp,
            ep_size=layout.ep,
            prefetch=layout.prefetch,
            gather_dtype=layout.gather_dtype,
            shard_size=layout.shard_size,
            trace=settings.log.trace is not None,
        )
    except ValueError as error:
        raise ConfigError(f"layout: {error}") from error
    if layout.ranks is not None and layout.ranks != made.everyone.size:
        raise ConfigError(f"layout.ranks: {layout.ranks} are asked for, and there are {made.everyone.size}")
    return made
