"""Arguments of a wrong type: one sentence that names the argument, at the call that gave it."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn, ops

import bmtrain_ms as bms
from bmtrain_ms import lr_scheduler
from bmtrain_ms.compat.runtime import FLOATS
from bmtrain_ms.data import TokenSampler
from bmtrain_ms.model_center import spread
from bmtrain_ms.model_center.generation import generate
from bmtrain_ms.model_center.model import Llama, LlamaConfig
from bmtrain_ms.optim import AdamOffloadOptimizer, AdamOptimizer, OptimManager
from bmtrain_ms.train import Pretrain, Trainer, TrainSettings
from bmtrain_ms_base.checks import number, whole

NAN, INF = float("nan"), float("inf")
SIZES = {"vocab_size": 9, "dim_model": 8, "num_heads": 2, "dim_ff": 8, "num_layers": 1}


class Layer(bms.DistributedModule):
    def __init__(self) -> None:
        super().__init__()
        self.weight = bms.DistributedParameter(np.ones((4, 4), np.float32))

    def construct(self, x):
        return ops.matmul(x, self.weight)


def adam(**settings: Any) -> AdamOptimizer:
    return AdamOptimizer(Layer().trainable_params(), **settings)


def managed() -> tuple[OptimManager, AdamOptimizer]:
    manager, optimizer = OptimManager(), adam()
    manager.add_optimizer(optimizer)
    return manager, optimizer


def llama() -> Llama:
    made = spread(Llama(LlamaConfig(**SIZES)))
    bms.init_parameters(made)
    return made


def parts() -> tuple[Any, ...]:
    """What a Trainer takes, but for the optimizer."""
    return Pretrain(llama()), TokenSampler(np.arange(99), 4, 2), OptimManager(), TrainSettings(1)


def init(**options: Any) -> None:
    bms.shutdown()
    try:
        bms.init_distributed(**options)
    finally:
        bms.shutdown()


def wave(**changed: Any) -> Any:
    return lr_scheduler.Cosine(**{"optimizer": adam(), "start_lr": 0.1, "warmup_iter": 1, "end_iter": 9, **changed})


CALLS: dict[str, tuple[Callable[..., Any], dict[str, list[Any]]]] = {
    "init_distributed": (
        init,
        {
            "seed": ["3", -1, 1.5, None, 1 << 33, NAN, True],
            "prefetch": ["1", 1.5, None, NAN],
            "shard_size": ["1", 1.0],
            "timeout": ["10", NAN, None],
            "gather_dtype": [["int8"], ms.float16],
        },
    ),
    "OptimManager": (
        OptimManager,
        {
            **{name: ["1024", NAN, True] for name in ("loss_scale", "grad_scale")},
            **{name: ["2", NAN, None] for name in ("loss_scale_factor", "min_loss_scale", "max_loss_scale")},
            **{name: ["10", 1.5, NAN, None] for name in ("loss_scale_steps", "hysteresis")},
            "max_skipped_steps": ["1", 1.5, NAN],
        },
    ),
    "AdamOptimizer": (
        adam,
        {
            **{name: ["0.1", NAN, None] for name in ("lr", "eps", "weight_decay", "hold_steps")},
            "betas": [0.9, None, "ab", (0.9,), ("a", "b"), (NAN, 0.9)],
        },
    ),
    "Cosine": (
        wave,
        {"start_lr": ["0.1", NAN, None], **{name: ["1", NAN, None] for name in ("warmup_iter", "end_iter", "num_iter")}},
    ),
    "TokenSampler": (
        lambda **changed: TokenSampler(**{"tokens": np.arange(99), "length": 4, "global_batch": 2, **changed}),
        {
            **{name: ["4", 1.5, None, NAN] for name in ("length", "global_batch", "seed")},
            "tokens": ["a" * 99, np.ones((9, 9), np.int32), np.ones(99), None],
        },
    ),
    "TrainSettings": (
        lambda **changed: TrainSettings(**{"steps": 9, **changed}),
        {
            **{name: ["1", 1.5, NAN, None] for name in ("steps", "bad_steps")},
            **{name: ["1", 1.5, NAN, 0] for name in ("save_every", "keep_last", "keep_every")},
            "clip": ["1", None],
            "save_minutes": ["1", NAN],
        },
    ),
    "LlamaConfig": (lambda **changed: LlamaConfig(**{**SIZES, **changed}), {name: ["8", 1.5, None, 0] for name in SIZES}),
    "generate": (
        lambda **changed: generate(llama(), [[1]], **{"max_new_tokens": 1, **changed}),
        {
            **{name: ["1", 1.5, NAN, None] for name in ("max_new_tokens", "top_k", "seed")},
            **{name: ["1", NAN, None] for name in ("temperature", "top_p")},
            "eos_id": ["1", 1.5],
        },
    ),
}


@pytest.mark.parametrize(
    "call, name, value",
    [(call, name, value) for call, (_, wrong) in CALLS.items() for name, values in wrong.items() for value in values],
)
def test_a_value_of_a_wrong_type_is_named(single_world, call, name, value, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError)) as error:
        CALLS[call][0](**{name: value})
    text = str(error.value)
    assert name in text and "\n" not in text and "supported between" not in text and len(text) < 250
    assert not list(tmp_path.iterdir())


def test_numbers_of_numpy_and_tensors_are_numbers(single_world):
    manager = OptimManager(loss_scale=Tensor(8.0), loss_scale_steps=np.int64(5), hysteresis=np.uint8(2))
    assert (manager.loss_scale, manager.loss_scale_steps, manager.hysteresis) == (8.0, 5, 2)
    assert OptimManager(loss_scale=np.float32(4)).loss_scale == 4.0
    adam(lr=np.float32(0.1), betas=[0.9, np.float64(0.99)])
    wave(start_lr=np.float32(0.1), warmup_iter=0.5, end_iter=np.int32(7))
    assert TokenSampler(np.arange(99), np.int64(4), np.int32(2), np.int64(-1)).batch(0).ids.shape == (2, 4)
    init(seed=np.int64(3), prefetch=np.int32(0), shard_size=np.int64(1))


@pytest.mark.parametrize(
    "call, text",
    [
        (lambda: AdamOptimizer(Layer()), "params must be a list of parameters, as model.trainable_params(), not a Layer"),
        (lambda: AdamOptimizer(None), "params must be a list of parameters, as model.trainable_params(), not a NoneType"),
        (lambda: AdamOptimizer(Layer().trainable_params), "as model.trainable_params(), not a method"),
        (lambda: AdamOptimizer([Layer()]), "an optimizer takes Parameters, not a Layer: give it model.trainable_params()"),
        (lambda: AdamOffloadOptimizer(Layer().parameters_and_names()), "an optimizer takes Parameters, not a tuple"),
        (lambda: AdamOptimizer([*Layer().trainable_params(), {"params": []}]), "an optimizer takes Parameters, not a dict"),
        (
            lambda: AdamOptimizer([{"params": Layer().trainable_params()}, Layer()]),
            "parameters or of groups, not of both",
        ),
        (lambda: OptimManager().add_optimizer(AdamOptimizer), "it lacks an instance: it is the class"),
        (lambda: OptimManager().add_optimizer(adam(), "cosine"), "lr_scheduler must be one of bmtrain_ms.lr_scheduler, made for"),
        (lambda: OptimManager().add_optimizer(adam(), wave()), "this Cosine was made for another optimizer"),
        (lambda: managed()[0].backward(None), "backward takes the function that computes the loss, and its arguments, not None"),
        (lambda: managed()[0].backward(3.0), "backward takes the function that computes the loss, and its arguments, not 3.0"),
        (lambda: managed()[0].clip_grad_norm([], "1"), "max_norm must be a number, not '1'"),
        (lambda: managed()[0].clip_grad_norm([], 1.0, "two"), "norm_type must be a number, not 'two'"),
        (lambda: lr_scheduler.Exponential(adam(), 0.1, 1, 9, gamma="x"), "gamma must be a number, not 'x'"),
        (lambda: lr_scheduler.WSD(adam(), 0.1, 1, 9, decay_iter="5"), "decay_iter must be a number, not '5'"),
        (lambda: lr_scheduler.WSD(adam(), 0.1, 1, 9, decay_iter=5, end_lr="5"), "end_lr must be a number, not '5'"),
        (lambda: bms.Block(Layer(), zero_level="3"), "zero_level must be 2 or 3, not '3'"),
        (lambda: bms.DistributedParameter(None), "takes a tensor, an array or bmtrain_ms.empty(...), not NoneType"),
        (lambda: bms.DistributedParameter([1.0, 2.0]), "takes a tensor, an array or bmtrain_ms.empty(...), not list"),
        (lambda: bms.empty("4"), "a dimension must be a whole number, not '4'"),
        (lambda: bms.empty(4.0, 4), "a dimension must be a whole number, not 4.0"),
        (lambda: bms.empty(-1), "a dimension must be at least 0, not -1"),
        (lambda: bms.empty(4, dtype="float32"), "dtype must be a type of MindSpore's, as mindspore.float32, not 'float32'"),
        (
            lambda: bms.empty(4, dtype=np.float32),
            "dtype must be a type of MindSpore's, as mindspore.float32, not <class 'numpy.float32'>",
        ),
        (lambda: bms.init_parameters(None), "init_parameters takes a model, not a NoneType"),
        (lambda: bms.ParameterInitializer("normal"), "func must be a function, as bmtrain_ms.init.normal_, not 'normal'"),
        (lambda: bms.load("x.safetensors", Layer()), "the model comes first, then the path: str is no Cell"),
        (lambda: bms.save("x.safetensors", Layer()), "the model comes first, then the path: str is no Cell"),
        (lambda: bms.BMTrainModelWrapper(nn.Dense(2, 2), layers="0"), "layers and buffers are lists of patterns: ['0']"),
        (lambda: Pretrain("llama"), "Pretrain takes a model, a Cell of MindSpore's, not str"),
        (lambda: Trainer(llama(), *parts()[1:]), "instead of a task, as train.Pretrain(model) it got: Llama"),
        (
            lambda: Trainer(parts()[0], None, *parts()[2:]),
            "Trainer takes a task, as train.Pretrain(model), batches, as a data.Token",
        ),
        (lambda: Trainer(parts()[0], None, *parts()[2:]), "instead of batches, as a data.TokenSampler it got: NoneType"),
        (lambda: Trainer(*parts()[:2], 1, TrainSettings(1)), "instead of an OptimManager it got: int"),
        (lambda: Trainer(*parts()[:3], {"steps": 1}), "instead of TrainSettings it got: dict"),
        (lambda: Trainer(*parts()), "the manager has no optimizer yet: call manager.add_optimizer(optimizer, schedule) first"),
    ],
)
def test_an_argument_that_is_something_else(single_world, call, text):
    with pytest.raises((TypeError, ValueError)) as error:
        call()
    assert text in str(error.value) and "\n" not in str(error.value)


def test_a_shape_may_be_one_tuple(single_world):
    assert bms.DistributedParameter(bms.empty((3, 4))).full_shape == (3, 4)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_type_of_mindspore_s_is_one(single_world, dtype):
    assert bms.DistributedParameter(bms.empty(3, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers(value):
    assert whole("x", value) == 3 and type(whole("x", value)) is int
    with pytest.raises(ValueError, match="x must be at least 4, not 3"):
        whole("x", value, 4)


@pytest.mark.parametrize("value", [True, np.bool_(True), "3", 3.0, NAN, None, [3], np.array([3, 4])])
def test_what_is_no_whole_number(value):
    with pytest.raises(TypeError, match="x must be a whole number, not"):
        whole("x", value)


@pytest.mark.parametrize("value", [2, 2.0, np.float16(2), np.int8(2), np.array(2.0), np.array([2]), Tensor(2.0)])
def test_numbers(value):
    assert number("x", value) == 2.0 and type(number("x", value)) is float
    assert number("x", 10**400) == INF and number("x", -(10**400)) == -INF


@pytest.mark.parametrize("value", [True, "2", None, [2.0], 2j, np.array([2.0, 3.0])])
def test_what_is_no_number(value):
    with pytest.raises(TypeError, match="x must be a number, not"):
        number("x", value)
