"""Settings of a run from the flags of a Megatron-LM or ModelLink script. No MindSpore."""

from __future__ import annotations

import math
from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

from bmtrain_ms_base.data.gpt_batches import RampUp, samples_for

from .megatron_given import Given, MegatronError
from .megatron_model import dtype_of, model_section
from .shell import ShellError, training_command

_TARGETS = {  # of adapters: Megatron's names of layers, mcore's and the older ones, and ours
    "linear_qkv": "q_proj|k_proj|v_proj",
    "query_key_value": "q_proj|k_proj|v_proj",
    "linear_proj": "o_proj",
    "dense": "o_proj",
    "linear_fc1": "gate_proj|up_proj|c_fc",
    "dense_h_to_4h": "gate_proj|up_proj|c_fc",
    "linear_fc2": "down_proj|c_proj",
    "dense_4h_to_h": "down_proj|c_proj",
}
_STYLES = {"constant": "constant", "linear": "linear", "cosine": "cosine", "inverse-square-root": "noam", "WSD": "wsd"}
_SECTIONS = ("model", "tokenizer", "data", "layout", "batch", "optimizer", "schedule", "train", "save", "log", "lora")

Section = Dict[str, Any]


class Conversion(NamedTuple):
    """What flags have become.

    `settings`: sections of a file for `bmtrain-ms pretrain`, or, where `tuning`, for `finetune`.  `notes`: lines to be told: flags
    without meaning, defaults that count, and what is not quite the same.
    """

    settings: Dict[str, Any]
    notes: List[str]
    tuning: bool


def settings_of_script(script: str, given: Mapping[str, str], family: str | None = None) -> Conversion:
    """The settings that a shell script's training command means. Nothing is run.

    Args:
        script: its text.
        given: values of variables that count more than the script's.
        family: of the model, if the flags do not tell it rightly.

    Raises:
        MegatronError: the script or its flags cannot be taken over; a line for each reason.
    """
    try:
        words = training_command(script, given)
    except ShellError as error:
        raise MegatronError(str(error)) from error
    return settings_of_flags(words, family)


def settings_of_flags(words: Sequence[str], family: str | None = None) -> Conversion:
    """The settings that a command line means: `torchrun ... pretrain_gpt.py --num-layers 8 ...`, or its flags alone.

    Raises:
        MegatronError: flags are unknown, wrong, or would mean something that is not computed here; a line for each.
    """
    given = Given(words)
    tuning = given.has("--finetune")
    made: dict[str, Any] = {"out": given.text("--save", "runs/pretrain"), "seed": given.whole("--seed", 1234, 0)}
    _check_always(given)
    made["model"] = _pretrained(given) if tuning else model_section(given, family)
    made["tokenizer"] = _tokenizer(given)
    made["data"] = _data(given)
    made["layout"] = _layout(given)
    made["batch"] = batch = _batch(given, made["layout"])
    made["train"] = train = {"steps": _steps(given, batch), **_evaluation(given, made["data"])}
    made["optimizer"] = _optimizer(given)
    made["schedule"] = _schedule(given, batch, train["steps"], made["optimizer"])
    made["save"] = {"every": given.whole("--save-interval")} if given.has("--save-interval") else {}
    made["log"] = _log(given)
    made["lora"] = _lora(given, tuning)
    _tell_places(given, tuning)
    if given.problems:
        raise MegatronError("\n".join(given.problems))
    ordered = {name: made[name] for name in ("out", "seed")}
    ordered.update({name: made[name] for name in _SECTIONS if made[name]})
    return Conversion(ordered, given.notes, tuning)


def _check_always(given: Given) -> None:
    """What Megatron does where nothing is said, and is not done here."""
    for name in ("--attention-dropout", "--hidden-dropout"):
        if not given.has(name):
            given.problems.append(f"{name}: not given, which is Megatron's default 0.1; pretraining has none here: write {name} 0")


def _pretrained(given: Given) -> Section:
    if not given.has("--load"):
        given.problems.append("--finetune: of what is said by --load FOLDER, one of Hugging Face's; give it")
    given.notes.append(
        "--finetune: goes on from --load, which has to be a folder of Hugging Face's (bmtrain-ms convert): its config.json says "
        "family and sizes, and the flags' are not looked at. Run bmtrain-ms finetune"
    )
    return {"pretrained": given.text("--load"), "dtype": dtype_of(given)}


def _tokenizer(given: Given) -> Section:
    name = given.first(("--tokenizer-name-or-path", "--tokenizer-model", "--vocab-file"))
    return {} if name is None else {"path": given.text(name)}


def _data(given: Given) -> Section:
    paths = given.flags.get("--data-path", [])
    if not paths:
        given.problems.append("--data-path: is missing: give the prefix of .bin and .idx, or weights and prefixes in turn")
    made: dict[str, Any] = {"length": given.whole("--seq-length")}
    if given.has("--is-instruction-dataset"):
        if len(paths) > 1:
            given.problems.append(f"--data-path {' '.join(paths)}: conversations are of one prefix: give one")
        made["rows"] = "".join(paths[:1])
    else:
        weighted = len(paths) > 1
        if weighted and (len(paths) % 2 or not all(_is_number(text) for text in paths[::2])):
            given.problems.append(f"--data-path {' '.join(paths)}: must be one prefix, or weights and prefixes in turn")
            weighted = False
        made["files"] = [float(text) if weighted and not i % 2 else text for i, text in enumerate(paths)]
        made.update(split=_split(given), packed=_packed(given))
    if given.has("--data-cache-path"):
        made["cache"] = given.text("--data-cache-path")
    if given.has("--no-shared-storage"):
        made["shared_storage"] = False
    return made


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _split(given: Given) -> str:
    """Three whole numbers; of evaluations that are not made, and parts that are not there, see `_evaluation`."""
    if not given.has("--split"):
        given.notes.append("--split: not given; Megatron's default counts: 969,30,1")
    texts = given.text("--split", "969,30,1").replace("/", ",").split(",")
    numbers = [text.strip() for text in texts if text.strip()]
    if not 1 <= len(numbers) <= 3 or not all(number.isdigit() for number in numbers) or int(numbers[0]) == 0:
        given.problems.append(f"--split {given.text('--split')}: must be up to three whole numbers, the first not 0, as 969,30,1")
        return "969,30,1"
    return ",".join([*numbers, "0", "0"][:3])


def _packed(given: Given) -> bool:
    names = ("--reset-position-ids", "--reset-attention-mask", "--eod-mask-loss")
    positions, mask, loss = (given.has(name) for name in names)
    if positions != mask:
        missing = names[0] if mask else names[1]
        given.problems.append(f"{missing}: is not given, and its twin is: documents are apart in both here; give both or none")
    elif positions:
        given.notes.append(
            "--reset-attention-mask: documents are told apart by the index, not by tokens of end-of-document, which the data "
            "need not "
            "have" + ("" if loss else "; the last token of each has no target here, as with --eod-mask-loss, which is not given")
        )
    elif loss:
        given.problems.append(
            "--eod-mask-loss: is not computed here without --reset-position-ids and --reset-attention-mask: give all or none"
        )
    return positions and mask


def _ranks(given: Given) -> int | None:
    if given.has("--worker-num"):
        return given.whole("--worker-num")
    if given.has("--nproc-per-node"):
        return given.whole("--nproc-per-node") * (given.whole("--nnodes") if given.has("--nnodes") else 1)
    given.notes.append(
        "layout.ranks: no flag of a launcher says how many ranks there are (--nproc_per_node, --nnodes; --worker_num): "
        "write layout.ranks, or start pretrain with --ranks"
    )
    return None


def _layout(given: Given) -> Section:
    ranks = _ranks(given)
    made: dict[str, Any] = {} if ranks is None else {"ranks": ranks}
    tp = made["tp"] = given.whole("--tensor-model-parallel-size", 1)
    pp = made["pp"] = given.whole("--pipeline-model-parallel-size", 1)
    made["ep"] = given.whole("--expert-model-parallel-size", 1)
    if ranks is not None and ranks % (tp * pp):
        given.problems.append(
            f"--tensor-model-parallel-size {tp} times --pipeline-model-parallel-size {pp} does not divide {ranks} ranks: change one"
        )
    _stages(given, made)
    made["recompute"] = _recompute(given)
    return made


def _stages(given: Given, layout: Section) -> None:
    chunk, pp = "--num-layers-per-virtual-pipeline-stage", layout["pp"]
    if given.has(chunk):
        layers, size = given.whole("--num-layers"), given.whole(chunk)
        if pp == 1 or layers % (pp * size):
            given.problems.append(
                f"{chunk} {size}: {layers} layers are not a multiple of it times {pp} stages"
                if pp > 1
                else f"{chunk}: is of a pipeline: give --pipeline-model-parallel-size, or leave it out"
            )
        elif layers > pp * size:
            layout.update(chunks=layers // (pp * size), schedule="interleaved")
    if given.has("--num-layer-list"):
        text = given.text("--num-layer-list")
        numbers = [part.strip() for part in text.split(",")]
        if not all(part.isdigit() and int(part) for part in numbers) or len(numbers) != pp or pp == 1:
            given.problems.append(f"--num-layer-list {text}: must be a number of layers for each of the {pp} stages, as 2,2")
        elif sum(map(int, numbers)) != given.whole("--num-layers"):
            given.problems.append(
                f"--num-layer-list {text}: is {sum(map(int, numbers))} layers, and --num-layers says another number"
            )
        elif given.has(chunk):
            given.problems.append(f"--num-layer-list: goes with {chunk} no more than in ModelLink: leave one out")
        else:
            layout["stages"] = [int(part) for part in numbers]


def _recompute(given: Given) -> bool:
    kind = given.text("--recompute-granularity", "", ("full", "selective")) if given.has("--recompute-granularity") else ""
    if kind == "selective" or given.has("--recompute-activations"):
        given.notes.append(
            "--recompute-granularity: selective is what attention does by itself where its weights are large; layers keep the rest"
        )
    return kind == "full"


def _batch(given: Given, layout: Section) -> Section:
    micro = given.whole("--micro-batch-size")
    made: dict[str, Any] = {"micro": micro}
    dp = max(1, layout["ranks"] // (layout["tp"] * layout["pp"])) if "ranks" in layout else None
    if given.has("--global-batch-size"):
        size = given.whole("--global-batch-size")
    else:
        size = micro * (dp or 1)
        if dp is None:
            given.problems.append(
                "--global-batch-size: is not given, and without the number of ranks Megatron's default, a micro-batch of each, "
                "is not "
                "known: give it, or the launcher's flags"
            )
        else:
            given.notes.append(f"--global-batch-size: not given; Megatron's default counts: {size}")
    made["size"] = size
    if dp is not None and size % (dp * micro):
        given.problems.append(
            f"--global-batch-size {size}: is not a multiple of --micro-batch-size {micro} times {dp} data-parallel ranks: "
            "change one"
        )
    if given.has("--rampup-batch-size"):
        texts = given.flags["--rampup-batch-size"]
        if len(texts) != 3 or not all(text.isdigit() for text in texts):
            given.problems.append(f"--rampup-batch-size {' '.join(texts)}: must be three whole numbers: start, increment, samples")
        else:
            made["ramp_up"] = dict(zip(("start", "increment", "samples"), map(int, texts)))
            _check_ramp(given, made)
    return made


def _check_ramp(given: Given, batch: Section) -> None:
    ramp, told = batch["ramp_up"], " ".join(given.flags["--rampup-batch-size"])
    if (
        ramp["start"] < 1
        or ramp["increment"] < 1
        or ramp["start"] > batch["size"]
        or (batch["size"] - ramp["start"]) % ramp["increment"]
    ):
        given.problems.append(f"--rampup-batch-size {told}: does not come to --global-batch-size {batch['size']}: change one")
        del batch["ramp_up"]
    elif not given.has("--train-samples"):
        given.problems.append(
            "--rampup-batch-size: goes with --train-samples only, in Megatron too: give that instead of --train-iters"
        )


def _steps(given: Given, batch: Section) -> int:
    if given.has("--train-iters") == given.has("--train-samples"):
        given.problems.append("--train-iters --train-samples: give one of them")
        return 1
    if given.has("--train-iters"):
        return given.whole("--train-iters")
    samples, ramp = given.whole("--train-samples"), RampUp(**batch["ramp_up"]) if "ramp_up" in batch else None
    least, most = 0, samples  # the last number of steps for which there are samples
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if samples_for(middle, batch["size"], ramp) <= samples else (least, middle - 1)
    if least < 1:
        given.problems.append(f"--train-samples {samples}: are not enough for a step of {batch['size']}: give more")
    return max(1, least)


def _evaluation(given: Given, data: Section) -> Section:
    if "rows" in data:
        given.notes.append("--eval-iters: conversations have no validation data here, and nothing is evaluated")
        return {}
    first, valid, test = (int(part) for part in data["split"].split(","))
    batches = given.whole("--eval-iters", 100, 0)
    if batches == 0 and valid:
        data["split"] = f"{first},0,{valid + test}"
        given.notes.append(
            "--eval-iters 0: nothing is evaluated; data.split gives the validation's documents to the test, which is not read"
        )
    elif not valid:
        given.notes.append(f"--split {data['split']}: has no validation data, and nothing is evaluated")
    if batches == 0 or not valid:
        return {}
    return {"eval_every": given.whole("--eval-interval", 1000), "eval_batches": batches}


def _optimizer(given: Given) -> Section:
    made: dict[str, Any] = {
        "lr": given.number("--lr"),
        "betas": [given.number("--adam-beta1", 0.9, 0.0), given.number("--adam-beta2", 0.999, 0.0)],
        "eps": given.number("--adam-eps", 1e-8, 0.0),
        "weight_decay": given.number("--weight-decay", 0.01, 0.0),
        "clip": given.number("--clip-grad", 1.0, 0.0),
    }
    for name, key in (("--lr", "lr"), ("--adam-eps", "eps"), ("--clip-grad", "clip")):
        if given.has(name) and made[key] <= 0:
            what = "gradients are always clipped: give a large number" if key == "clip" else "must be above 0"
            given.problems.append(f"{name} {made[key]:g}: {what}")
    for name, beta in zip(("--adam-beta1", "--adam-beta2"), made["betas"]):
        if beta >= 1:
            given.problems.append(f"{name} {beta:g}: must be below 1")
    scale = ("--initial-loss-scale", "--min-loss-scale", "--loss-scale-window", "--hysteresis")
    if dtype_of(given) == "float16":
        made.update(
            loss_scale=given.number(scale[0], 2.0**32, 1.0),
            min_loss_scale=given.number(scale[1], 1.0),
            loss_scale_steps=given.whole(scale[2], 1000),
            hysteresis=given.whole(scale[3], 2),
        )
        if made["min_loss_scale"] <= 0:
            given.problems.append(f"{scale[1]} {made['min_loss_scale']:g}: must be above 0")
    else:
        given.notes.extend(f"{name}: no meaning without --fp16: there is no loss scale" for name in scale if given.has(name))
    return made


def _schedule(given: Given, batch: Section, steps: int, optimizer: Section) -> Section:
    """The schedule's settings. Megatron's rates follow samples, ours follow steps: for batches of one size that is the same."""
    if not given.has("--lr-decay-style"):
        given.notes.append("--lr-decay-style: not given; Megatron's default counts: linear")
    name = _STYLES[given.text("--lr-decay-style", "linear", tuple(_STYLES))]
    end = _in_steps(given, "--lr-decay", batch, steps)
    made: dict[str, Any] = {"name": name, "warmup": _warmup(given, batch, end), "end": end}
    low, lr = given.number("--min-lr", 0.0, 0.0), optimizer["lr"]
    if low > lr:
        given.problems.append(f"--min-lr {low:g}: is above --lr {lr:g}: make it smaller")
    if made["warmup"] > end or (made["warmup"] == end and name != "constant"):
        given.problems.append(
            f"--lr-warmup-iters: a warm-up of {made['warmup']} steps does not fit into the {end} of --lr-decay-iters"
        )
    if "ramp_up" in batch and (name != "constant" or made["warmup"]):
        given.problems.append(
            "--rampup-batch-size: Megatron's rate follows samples and ours follows steps, which differ while the batch grows: "
            "leave it "
            "out, or give --lr-decay-style constant without a warm-up and write the schedule, in steps, into the file"
        )
    if name == "noam":
        optimizer["lr"] = lr * math.sqrt(max(1, made["warmup"]))  # noam's peak is lr / sqrt(warm-up)
        if end < steps or low > lr * math.sqrt(max(1, made["warmup"]) / steps):
            given.problems.append(
                "--lr-decay-style inverse-square-root: the rate would come down to --min-lr within the run, which is not "
                "computed here: "
                "set --min-lr 0, and --lr-decay-iters at least the number of steps"
            )
    elif name == "wsd":
        made.update(min_lr=low, **_wsd(given))
        if made["decay"] > end - made["warmup"]:
            given.problems.append(f"--lr-wsd-decay-iters {made['decay']}: does not fit behind the warm-up into {end} steps")
    elif name != "constant":
        made["min_lr"] = low
    return made


def _wsd(given: Given) -> Section:
    if not given.has("--lr-wsd-decay-style"):
        given.notes.append("--lr-wsd-decay-style: not given; Megatron's default counts: exponential")
    shape = given.text("--lr-wsd-decay-style", "exponential", ("exponential", "linear", "minus_sqrt", "cosine"))
    return {"decay": given.whole("--lr-wsd-decay-iters"), "shape": shape}


def _in_steps(given: Given, stem: str, batch: Section, default: int) -> int:
    """The number of steps that `stem`-iters or `stem`-samples says; samples have to be whole steps."""
    iters, samples = f"{stem}-iters", f"{stem}-samples"
    if given.has(iters) and given.has(samples):
        given.problems.append(f"{iters} {samples}: give one of them")
    if given.has(iters):
        return given.whole(iters, least=0 if "warmup" in stem else 1)
    size = batch["size"]
    name = samples if given.has(samples) else "--train-samples" if stem == "--lr-decay" and given.has("--train-samples") else None
    if name is None:
        return default
    count = given.whole(name, least=0 if "warmup" in stem else 1)
    if count % size and "ramp_up" not in batch:
        near = count // size * size
        given.problems.append(
            f"{name} {count}: is not a multiple of the {size} samples of a step, and rates follow steps here: give "
            + (f"{samples} " if name != samples else "")
            + f"{near or size} or {near + size}"
        )
    return default if name != samples else max(0 if "warmup" in stem else 1, count // size)


def _warmup(given: Given, batch: Section, end: int) -> int:
    if not given.has("--lr-warmup-fraction"):
        return _in_steps(given, "--lr-warmup", batch, 0)
    if given.first(("--lr-warmup-iters", "--lr-warmup-samples")):
        given.problems.append("--lr-warmup-fraction: give one of --lr-warmup-fraction, -iters and -samples")
    part = given.number("--lr-warmup-fraction", least=0.0)
    steps = part * end
    if abs(steps - round(steps)) > 1e-6:
        given.problems.append(
            f"--lr-warmup-fraction {part:g}: of {end} steps is {steps:g}, not a whole number: give --lr-warmup-iters {round(steps)}"
        )
    return round(steps)


def _log(given: Given) -> Section:
    made: dict[str, Any] = {}
    if given.has("--tensorboard-dir"):
        made["tensorboard"] = True
        given.notes.append("--tensorboard-dir: its folder is tensorboard, in out")
    if given.has("--wandb-project"):
        made["wandb"] = given.text("--wandb-project")
    return made


def _lora(given: Given, tuning: bool) -> Section:
    name = given.first(("--lora-r", "--lora-alpha", "--lora-target-modules"))
    if name is None:
        return {}
    if not tuning:
        given.problems.append(f"{name}: adapters are trained on a model that is there: give --finetune --load FOLDER")
    targets = given.flags.get("--lora-target-modules", [])
    unknown = [target for target in targets if target not in _TARGETS]
    if unknown or not targets:
        given.problems.append(
            f"--lora-target-modules {' '.join(unknown) or 'is missing'}: which layers get adapters; there are {', '.join(_TARGETS)}"
        )
    patterns = dict.fromkeys(_TARGETS[target] for target in targets if target in _TARGETS)
    return {"pattern": "|".join(patterns), "rank": given.whole("--lora-r", 16), "alpha": given.number("--lora-alpha", 32.0, 0.0)}


def _tell_places(given: Given, tuning: bool) -> None:
    """Where a run is saved, and where it goes on from."""
    if not given.has("--save"):
        given.notes.append("--save: not given; the run is in out = runs/pretrain, and the model is written there at its end")
    if given.has("--load") and not tuning and given.text("--load") != given.text("--save"):
        given.notes.append(
            f"--load {given.text('--load')}: is another folder than --save, and is not read: a run goes on from its own "
            "checkpoints in "
            "out, in the format of this project; Megatron's are not read"
        )


__all__ = ["Conversion", "MegatronError", "settings_of_flags", "settings_of_script"]
