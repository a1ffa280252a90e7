"""What a run is told: a class for each section of its file. Names are those of the functions that take them."""

from __future__ import annotations

import os
from typing import Any, Dict, List, Literal, Optional, Union

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, Strict
from pydantic_core import PydanticCustomError
from typing_extensions import Annotated

_LONGEST_NAME, _LONGEST_PATH = 255, 3800  # bytes: Linux takes 4095, and a run appends names of its own


def _as_path(text: str) -> str:
    """What the system can be asked about: it raises for other texts, each time in another way."""
    try:
        names = text.encode().split(b"/")
    except UnicodeEncodeError:
        raise PydanticCustomError("path", "must be a path in UTF-8") from None
    if b"\0" in text.encode():
        raise PydanticCustomError("path", "must be a path, without NUL")
    if max(map(len, names)) > _LONGEST_NAME or len(text.encode()) > _LONGEST_PATH:
        raise PydanticCustomError("path", "must be a path that the system takes, which has shorter names")
    if text.startswith("~") and os.path.expanduser(text) == text:
        raise PydanticCustomError("path", "must be a path that is there: there is no such user")
    return text


Whole = Annotated[int, Strict()]
Number = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
Text = Annotated[str, Strict(), Field(min_length=1)]
Place = Annotated[str, Strict(), Field(min_length=1), AfterValidator(_as_path)]
Positive = Annotated[int, Strict(), Field(ge=1)]


def _doc(text: str, default: Any = None, **limits: Any) -> Any:
    return Field(default, description=text, **limits)


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class ModelSection(_Section):
    """What is trained: a family with its sizes, or a folder of Hugging Face's.

    All other names are sizes: fields of the family's config (`dim_model`, `num_layers` ...), or, with a folder, what is to be other
    than in its `config.json`.
    """

    model_config = ConfigDict(extra="allow", frozen=True, protected_namespaces=())

    family: Optional[Text] = _doc("llama, minicpm, qwen2, qwen3, ...: with sizes, from random values")
    like: Optional[Place] = _doc("a folder whose config.json says family and sizes; from random values")
    pretrained: Optional[Place] = _doc("a folder whose config.json and weights are loaded")
    dtype: Optional[Literal["float32", "float16", "bfloat16"]] = _doc("of the parameters (default: float32, or the folder's)")

    @property
    def sizes(self) -> Dict[str, Any]:
        """The names that are not of this section."""
        return dict(self.model_extra or {})


class TokenizerSection(_Section):
    """What makes tokens of text."""

    path: Optional[Place] = _doc("a folder of Hugging Face's, tokenizer.json, or another file that `bmtrain-ms prepare` takes")
    train: Optional[Annotated[int, Strict(), Field(ge=300)]] = _doc(
        "instead: train a BPE tokenizer with so many tokens on data.text, once; it is in OUT/tokenizer"
    )


class DataSection(_Section):
    """What is trained on: `text` (prepared once, into OUT/data), `files` that are prepared, or `rows` of conversations."""

    text: List[Place] = Field(default=[], description="files, folders, hf:owner/name: what `bmtrain-ms prepare --input` takes")
    key: Text = _doc("the column of the text", "text")
    handler: Optional[Literal["alpaca", "sharegpt", "openai"]] = _doc("rows of text are conversations, of this kind")
    template: Optional[Place] = _doc("of conversations: chatml, alpaca, or a file (default: the tokenizer's)")
    workers: Positive = _doc("processes that prepare text", 1)
    files: List[Union[Place, Number]] = Field(default=[], description="prefixes of .bin and .idx; or weights and prefixes in turn")
    rows: Optional[Place] = _doc("prefix of prepared conversations, PREFIX_packed_input_ids_document and its two neighbours")
    length: Positive = _doc("tokens of a row", 1024)
    split: Text = _doc("how documents are divided among training, validation and test", "950,50,0")
    packed: Flag = _doc("documents in a row do not see each other; false: a row is one text, as in Megatron", True)
    cache: Optional[Place] = _doc("folder for indices (default: beside the files)")
    shared_storage: Optional[Flag] = _doc("hosts see the same files, and checkpoints; default: looked for")


class LayoutSection(_Section):
    """Which ranks there are, and what each of them has."""

    ranks: Optional[Positive] = _doc("processes to start (default 1, or as many as a launcher started)")
    tp: Positive = _doc("tensor-parallel ranks", 1)
    pp: Positive = _doc("stages of the pipeline", 1)
    ep: Positive = _doc("data-parallel ranks that divide the experts among them", 1)
    shard_size: Optional[Positive] = _doc("shard over so many neighbouring data-parallel ranks, replicate across")
    zero_level: Literal[2, 3] = _doc("3: gather a layer's parameters again for the backward pass; 2: keep them", 3)
    recompute: Flag = _doc("layers compute again in the backward pass instead of keeping their activations", True)
    prefetch: Annotated[int, Strict(), Field(ge=0)] = _doc("layers gathered ahead; 0: nothing overlaps", 1)
    gather_dtype: Optional[Literal["float16", "bfloat16", "int8"]] = _doc("gather parameters in fewer bits")
    stages: Union[Text, List[Positive], None] = _doc("layers of each stage: numbers, or a text as `Et*3|tt|t,L`")
    schedule: Optional[Literal["1f1b", "gpipe", "interleaved"]] = _doc("order of the pipeline (default: 1f1b)")
    chunks: Positive = _doc("stages of each rank of the pipeline, interleaved", 1)


class RampUpSection(_Section):
    """How the batch grows, as Megatron's --rampup-batch-size."""

    start: Positive = Field(description="rows of the first steps")
    increment: Positive = Field(description="rows that are added each time")
    samples: Whole = Field(description="rows until the batch is whole", ge=0)


class BatchSection(_Section):
    """Rows of a step."""

    size: Positive = _doc("over all ranks", 8)
    micro: Optional[Positive] = _doc("of one forward pass of a rank (default: all that the rank has of a step)")
    ramp_up: Optional[RampUpSection] = None


class OptimizerSection(_Section):
    """AdamW, the loss scale, and the clipping of gradients."""

    name: Literal["adam", "adam_offload"] = _doc("adam_offload keeps states in host memory", "adam")
    lr: Number = _doc("the learning rate at its peak", 3e-4, gt=0)
    betas: Annotated[List[Number], Field(min_length=2, max_length=2)] = Field(default=[0.9, 0.95])
    eps: Number = _doc("Adam's", 1e-8, gt=0)
    weight_decay: Number = _doc("of matrices", 0.1, ge=0)
    decay_vectors: Flag = _doc("of biases and norms too", False)
    clip: Number = _doc("the largest norm of all gradients", 1.0, gt=0)
    mup_width: Optional[Number] = _doc("maximal update parametrisation: the rate of inner matrices is lr / mup_width", gt=0)
    loss_scale: Optional[Number] = _doc("dynamic loss scaling, from this scale (default: none; 65536 for float16)", gt=0)
    loss_scale_steps: Positive = _doc("steps without an overflow until the scale is doubled", 1024)
    min_loss_scale: Number = _doc("the smallest scale", 1.0, gt=0)
    hysteresis: Positive = _doc("overflows until the scale is halved", 1)


class ScheduleSection(_Section):
    """The learning rate of each step: up to `lr` in `warmup` steps, and down to `min_lr` at step `end`."""

    name: Literal["constant", "linear", "cosine", "wsd", "noam", "exponential"] = "cosine"
    warmup: Annotated[int, Strict(), Field(ge=0)] = _doc("steps", 0)
    end: Optional[Positive] = _doc("the step that has the smallest rate (default: train.steps)")
    decay: Optional[Positive] = _doc("wsd: how many steps before the end the rate begins to fall (default: a tenth of them)")
    min_lr: Number = _doc("linear, cosine, wsd: the rate at the end", 0.0, ge=0)
    shape: Literal["linear", "exponential", "minus_sqrt", "cosine"] = _doc("wsd: of the decay, as Megatron's", "linear")
    gamma: Number = _doc("exponential: the factor of each step", 0.95, gt=0, le=1)


class TrainSection(_Section):
    """How long, and how it is measured."""

    steps: Positive = _doc("in all, resumed ones included", 1000)
    eval_every: Optional[Positive] = _doc("steps between evaluations on validation data (default: at the end only)")
    eval_batches: Positive = _doc("of batch.size rows, in an evaluation, always the same", 10)


class FaultsSection(_Section):
    """What happens at steps that go wrong; all ranks decide alike."""

    bad_steps: Positive = _doc("training ends after so many in a row, each of them skipped", 3)
    spike: Optional[Number] = _doc(
        "a loss so many times the median of the last 64 is a bad step (default: only NaN and inf are)", gt=1
    )
    skip: List[Union[Whole, Text]] = Field(default=[], description='batches to leave out, by number from 0: [120, "130-139"]')


class SaveSection(_Section):
    """Checkpoints, in OUT/checkpoints; and the model, in OUT/model, at the end."""

    every: Optional[Positive] = _doc("steps; in the background")
    minutes: Optional[Number] = _doc("minutes; in the background", gt=0)
    keep_last: Optional[Positive] = _doc("how many to keep", 3)
    keep_every: Optional[Positive] = _doc("keep those of such steps too")
    best: Flag = _doc("keep the one with the lowest validation loss too, in OUT/best", False)
    export: Flag = _doc("write a folder of Hugging Face's at the end", True)


class LogSection(_Section):
    """OUT/log.jsonl has a line for each step; OUT/loss.png is drawn at the end."""

    tensorboard: Flag = _doc("write OUT/tensorboard", False)
    wandb: Optional[Text] = _doc("name of a project; WANDB_MODE=offline keeps it here")
    rank_norms: Flag = _doc("the norm of each rank's part of the gradients, in each line", False)
    peak_tflops: Optional[Number] = _doc("of a rank: lines say which part of them the model used", gt=0)
    trace: Optional[Place] = _doc("write what is computed and moved when, for Perfetto, to this file")


class LoraSection(_Section):
    """Train adapters only (`finetune`)."""

    pattern: Text = _doc("which Linears, a regular expression of the ends of their names", "q_proj|k_proj|v_proj|o_proj")
    rank: Positive = 8
    alpha: Number = Field(16.0, gt=0)
    dropout: Number = Field(0.0, ge=0, lt=1)


class Settings(_Section):
    """All settings of a run, see `docs/training.md`."""

    out: Place = _doc("folder of the run", "runs/pretrain")
    seed: Annotated[int, Strict(), Field(ge=0, lt=1 << 32)] = _doc("of initial values, data order and dropout", 1234)
    model: ModelSection = ModelSection()
    tokenizer: TokenizerSection = TokenizerSection()
    data: DataSection = DataSection()
    layout: LayoutSection = LayoutSection()
    batch: BatchSection = BatchSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    train: TrainSection = TrainSection()
    faults: FaultsSection = FaultsSection()
    save: SaveSection = SaveSection()
    log: LogSection = LogSection()
    lora: Optional[LoraSection] = None
