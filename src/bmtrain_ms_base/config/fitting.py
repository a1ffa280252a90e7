"""Whether the settings of a run fit together."""

from __future__ import annotations

import math
import os
import re
from typing import Iterator

from ..data.gpt_index import shares_of
from ..shortening import shown
from .sections import Settings

_MOST_FILES = 32_766  # of a blend
_MOST_SKIPPED = 1_000_000  # by a range


def problems(settings: Settings, ranks: int, tuning: bool) -> list[str]:
    """What does not fit, each in a line that says what to change.

    Args:
        ranks: how many there are or will be.
        tuning: whether a model that is there is trained on, instead of a new one.
    """
    found = [*_of_model(settings, tuning), *_of_data(settings), *_of_layout(settings, ranks), *_of_steps(settings)]
    return found


def _of_model(settings: Settings, tuning: bool) -> Iterator[str]:
    model = settings.model
    given = [name for name in ("family", "like", "pretrained") if getattr(model, name) is not None]
    if len(given) != 1:
        yield f"model: give one of family, like, pretrained, not {' and '.join(given) or 'none of them'}"
    if tuning and given and model.pretrained is None:
        yield f"model.{given[0]}: finetune goes on from a model that is there: model.pretrained; a new one is for pretrain"
    if settings.lora is not None and not tuning:
        yield "lora: adapters are for finetune"
    for name in ("like", "pretrained"):
        folder = getattr(model, name)
        if folder is not None and not os.path.isfile(os.path.join(os.path.expanduser(folder), "config.json")):
            yield f"model.{name}: there is no config.json in {folder}"
    if model.dtype == "float16" and settings.optimizer.loss_scale is None:
        yield "optimizer.loss_scale: float16 needs one (65536): without it small gradients become zero"
    if settings.lora is not None:
        try:
            re.compile(settings.lora.pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"lora.pattern: {shown(settings.lora.pattern)} is no regular expression: {error}"


def _of_data(settings: Settings) -> Iterator[str]:
    data, tokenizer = settings.data, settings.tokenizer
    given = [name for name in ("text", "files", "rows") if getattr(data, name)]
    if len(given) != 1:
        yield f"data: give one of text, files, rows, not {' and '.join(given) or 'none of them'}"
    if tokenizer.path is not None and tokenizer.train is not None:
        yield "tokenizer: give path, or train, not both"
    if tokenizer.train is not None and settings.model.pretrained is not None:
        yield "tokenizer.train: model.pretrained has a tokenizer, which its weights belong to; leave train out"
    if tokenizer.train is not None and not data.text:
        yield "tokenizer.train: it is trained on data.text, which is not given"
    vocab_size = settings.model.sizes.get("vocab_size")
    if tokenizer.train is not None and isinstance(vocab_size, int) and vocab_size < tokenizer.train:
        yield f"model.vocab_size: {vocab_size} is less than tokenizer.train={tokenizer.train}: the table would lack ids"
    if data.text and tokenizer.path is None and tokenizer.train is None and settings.model.pretrained is None:
        yield "tokenizer: data.text needs one: path, or train = 8000 for a new one"
    try:
        valid = shares_of(data.split)[1] > 0 and not data.rows and not data.handler
        if settings.train.eval_every is not None and not valid:
            yield "train.eval_every: there are no validation data: data.split has none, or data are conversations"
    except ValueError as error:
        yield f"data.split: {error}"
    if data.handler is not None and not data.text:
        yield "data.handler: it is of data.text, which is not given; rows are prepared already"
    if data.template is not None and data.handler is None:
        yield "data.template: it is for conversations; name their data.handler"
    for path in (p for p in data.text if not p.startswith("hf:") and not os.path.exists(os.path.expanduser(p))):
        yield f"data.text: there is no {path}"
    yield from _of_files(data.files)
    if (data.rows or data.handler) and settings.batch.ramp_up is not None:
        yield "batch.ramp_up: conversations have no ramp-up; leave it out"
    if (data.rows or data.handler) and not data.packed:
        yield "data.packed: conversations in a row never see each other; leave packed = false out"


def _of_files(files: list[str | float]) -> Iterator[str]:
    """One prefix, or weights and prefixes in turn; a weight may be a text, as on Megatron's command line."""
    weighted = len(files) > 1 or (len(files) == 1 and _number(files[0]) is not None)
    weights, names = (files[::2], files[1::2]) if weighted else ([], files)
    numbers = [_number(weight) for weight in weights]
    if (weighted and len(weights) != len(names)) or None in numbers or not all(isinstance(name, str) for name in names):
        yield f'data.files: several are weights and prefixes in turn, as [0.3, "a", 0.7, "b"], not {shown(files)}'
        return
    for weight, number in zip(weights, numbers):
        if number is None or not 0 < number < math.inf:
            yield f"data.files: a weight is a positive number, not {weight}"
    if math.isinf(sum(number for number in numbers if number is not None and math.isfinite(number))):
        yield "data.files: the weights are too large to be added up"
    if len(names) > _MOST_FILES:
        yield f"data.files: at most {_MOST_FILES:,} can be blended, not {len(names):,}"
    for prefix in names:
        if not all(os.path.isfile(os.path.expanduser(f"{prefix}{end}")) for end in (".bin", ".idx")):
            yield f"data.files: there is no {prefix}.bin with its .idx; make them with bmtrain-ms prepare"


def _number(given: str | float) -> float | None:
    try:
        return float(given)
    except ValueError:
        return None


def _of_layout(settings: Settings, ranks: int) -> Iterator[str]:
    layout, batch = settings.layout, settings.batch
    if layout.ranks is not None and layout.ranks != ranks:
        yield f"layout.ranks: {layout.ranks} are asked for, and a launcher has started {ranks}"
    if ranks % (layout.tp * layout.pp):
        yield f"layout: tp={layout.tp} times pp={layout.pp} does not divide {ranks} rank(s)"
        return
    dp = ranks // (layout.tp * layout.pp)
    for name, size in (("ep", layout.ep), ("shard_size", layout.shard_size or 1)):
        if dp % size:
            yield f"layout.{name}: {size} does not divide the {dp} data-parallel rank(s)"
    if layout.pp == 1 and (layout.stages or layout.schedule or layout.chunks > 1):
        yield "layout: stages, schedule and chunks are of a pipeline: set pp"
    if layout.chunks > 1 and layout.schedule not in (None, "interleaved"):
        yield f"layout.chunks: {layout.chunks} need the schedule interleaved, not {layout.schedule}"
    micro = batch.micro or 1
    unit, ramp = dp * micro, batch.ramp_up
    what = f"{dp} data-parallel rank(s)" + (f" times batch.micro={micro}" if batch.micro else "")
    sizes = [("size", batch.size)] + ([("ramp_up.start", ramp.start), ("ramp_up.increment", ramp.increment)] if ramp else [])
    for name, size in sizes:
        if size % unit:
            near = max(unit, size // unit * unit)
            yield f"batch.{name}: {size} is not a multiple of {what}; {near} or {near + unit} are"
    if ramp is not None and (ramp.start > batch.size or (batch.size - ramp.start) % ramp.increment):
        yield f"batch.ramp_up: from {ramp.start} rows, by {ramp.increment} more each time, the batch does not come to {batch.size}"


def _of_steps(settings: Settings) -> Iterator[str]:
    schedule, steps = settings.schedule, settings.train.steps
    end = schedule.end or steps
    if schedule.warmup > end:
        yield f"schedule.warmup: {schedule.warmup} steps are more than the {end} of the whole schedule"
    if schedule.name == "wsd" and schedule.warmup + (schedule.decay or max(1, end // 10)) > end:
        yield f"schedule.decay: with a warm-up of {schedule.warmup} it does not fit into {end} steps"
    if schedule.decay is not None and schedule.name != "wsd":
        yield f"schedule.decay: only wsd has one; {schedule.name} falls from the warm-up on"
    if schedule.shape != "linear" and schedule.name != "wsd":
        yield f"schedule.shape: only wsd has one, {schedule.name} has not"
    if schedule.min_lr and schedule.name not in ("linear", "cosine", "wsd"):
        yield f"schedule.min_lr: linear, cosine and wsd have one, {schedule.name} has not"
    if schedule.gamma != type(schedule)().gamma and schedule.name != "exponential":
        yield f"schedule.gamma: only exponential has one, {schedule.name} has not"
    if schedule.min_lr > settings.optimizer.lr:
        yield f"schedule.min_lr: {schedule.min_lr} is above optimizer.lr={settings.optimizer.lr}"
    if not settings.optimizer.betas[0] < 1 or not settings.optimizer.betas[1] < 1 or min(settings.optimizer.betas) < 0:
        yield f"optimizer.betas: must be at least 0 and below 1, not {settings.optimizer.betas}"
    if settings.save.best and settings.train.eval_every is None:
        yield "save.best: it is chosen by evaluations during training: set train.eval_every"
    try:
        skipped(settings.faults.skip)
    except ValueError as error:
        yield f"faults.skip: {error}"


def skipped(given: list) -> list[int]:
    """The numbers of batches that a list of numbers and ranges names, in order.

    Raises:
        ValueError: an entry is neither.
    """
    numbers: set[int] = set()
    for entry in given:
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", str(entry))
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if last < first:
            raise ValueError(f'{entry!r} is neither a number nor a range, as "130-139"')
        if last - first >= _MOST_SKIPPED:
            raise ValueError(f"{entry!r} leaves out {last - first + 1:,} batches; at most {_MOST_SKIPPED:,} can be named at once")
        numbers.update(range(first, last + 1))
    return sorted(numbers)


def passes_of(settings: Settings, ranks: int) -> tuple[int, int]:
    """Rows of a rank in one backward pass, and micro-batches that a pipeline makes of them.

    With a ramp-up, steps of all sizes are made of whole passes.
    """
    dp = ranks // (settings.layout.tp * settings.layout.pp)
    ramp = settings.batch.ramp_up
    sizes = [settings.batch.size] + ([ramp.start, ramp.increment] if ramp else [])
    own = math.gcd(*sizes) // dp if len(sizes) > 1 else settings.batch.size // dp
    micro = settings.batch.micro or (own if settings.layout.pp == 1 else max(1, own // settings.layout.pp))
    if settings.layout.pp == 1:
        return micro, 1
    while own % micro:
        micro -= 1
    return own, own // micro
