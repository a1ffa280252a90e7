"""Cross entropy against PyTorch's formula in float64: values, gradients, options, what must not leak, and its memory."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mindspore import Tensor

from bmtrain_ms.nn.functional import cross_entropy
from bmtrain_ms.ops import device_loss, host_loss

SOURCE = Path(__file__).resolve().parents[2] / "src"
# of the largest gradient: what rounding to the logits' type costs
TOLERANCE = {ms.float32: 2e-6, ms.float16: 1e-3, ms.bfloat16: 8e-3}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])


@pytest.fixture(autouse=True)
def small_chunks(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test on both implementations, in chunks of a few rows."""
    set_chunk(monkeypatch, 32)


def set_chunk(patch: pytest.MonkeyPatch, elements: int) -> None:
    for module in (host_loss, device_loss):
        patch.setattr(module, "CHUNK", elements)


def numbers(*shape: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def reference(
    logits: np.ndarray, targets: np.ndarray, weight: Any = None, smoothing: float = 0.0, reduction: str = "mean", ignore: int = -100
) -> tuple[np.ndarray, np.ndarray]:
    """The loss, and its gradient for a cotangent of 1 + the row's number: float64, row by row."""
    rows, classes = logits.shape
    w = np.ones(classes) if weight is None else np.asarray(weight, np.float64)
    losses, grads, total = np.zeros(rows), np.zeros((rows, classes)), 0.0
    for i, t in enumerate(targets):
        if t == ignore:
            continue
        x = logits[i].astype(np.float64) - logits[i].max()
        log_p = x - np.log(np.exp(x).sum())
        share = smoothing / classes * w
        share[t] += (1.0 - smoothing) * w[t]
        losses[i] = -(share * log_p).sum()
        grads[i] = share.sum() * np.exp(log_p) - share
        total += w[t]
    if reduction == "none":
        return losses, grads * (1.0 + np.arange(rows))[:, None]
    factor = 1.0 if reduction == "sum" else 1.0 / total if total else 0.0
    return np.asarray(losses.sum() * factor), grads * factor


def run(logits: Tensor, targets: np.ndarray, weight: Any = None, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Loss and gradient; checks their types."""
    weight = None if weight is None else Tensor(np.asarray(weight, np.float32))
    seen: list[Tensor] = []

    def loss(x: Tensor) -> Tensor:
        seen.append(cross_entropy(x, Tensor(targets), weight=weight, **options))
        if seen[0].ndim:
            return (seen[0] * Tensor(1.0 + np.arange(len(targets), dtype=np.float32))).sum()
        return seen[0]

    grad = ms.grad(loss)(logits)
    assert seen[0].dtype == ms.float32 and grad.dtype == logits.dtype and grad.shape == logits.shape
    return seen[0].asnumpy(), grad.astype(ms.float32).asnumpy()


def check(x: Tensor, targets: np.ndarray, weight: Any = None, smoothing: float = 0.0, least: float = 1e-3, **options: Any) -> None:
    """Against the reference, to the rounding of the logits' type; `least`: gradient that counts as one."""
    loss, grad = run(x, targets, weight, label_smoothing=smoothing, **options)
    expected, slope = reference(x.astype(ms.float32).asnumpy(), targets, weight, smoothing, options.get("reduction", "mean"))
    assert loss.shape == expected.shape
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)  # float32, whatever the logits are
    np.testing.assert_allclose(grad, slope, rtol=0, atol=TOLERANCE[x.dtype] * max(np.abs(slope).max(), least))


# Values and gradients #


@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("ignored", [False, True], ids=["all", "some"])
def test_against_the_formula(monkeypatch, dtype, reduction, weighted, smoothing, ignored):
    """13 rows of 9 classes in chunks of 3 rows."""
    if dtype == ms.bfloat16:
        set_chunk(monkeypatch, 1 << 20)  # MindSpore on CPU cannot concatenate bfloat16
    targets = np.random.default_rng(1).integers(0, 9, 13).astype(np.int32)
    targets[[0, 1, 7, 12] if ignored else []] = -100
    weight = np.linspace(0.25, 2.0, 9) if weighted else None
    check(Tensor(numbers(13, 9)).astype(dtype), targets, weight, smoothing, reduction=reduction)


@pytest.mark.parametrize("integer", [np.int32, np.int64], ids=["int32", "int64"])
@pytest.mark.parametrize("targets", [[0, 6, 3, 3], [-100, -100, 5, -100]], ids=["all", "one"])
def test_types_of_targets(targets, integer):
    check(Tensor(numbers(4, 7)), np.array(targets, integer))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 40),
    classes=st.integers(1, 70),
    chunk=st.integers(1, 500),
    weighted=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    seed=st.integers(0, 1 << 16),
)
def test_any_size_in_any_chunks(monkeypatch, rows, classes, chunk, weighted, smoothing, reduction, seed):
    random = np.random.default_rng(seed)
    with monkeypatch.context() as patch:
        set_chunk(patch, chunk)
        targets = np.where(random.random(rows) < 0.2, -100, random.integers(0, classes, rows)).astype(np.int32)
        weight = random.uniform(0.0, 2.0, classes).astype(np.float32) if weighted else None
        check(Tensor(numbers(rows, classes, seed=seed)), targets, weight, smoothing, least=1.0 + rows, reduction=reduction)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_chunks_do_not_change_a_bit(monkeypatch, smoothing):
    targets = np.random.default_rng(1).integers(0, 9, 13).astype(np.int32)
    weight, results = np.linspace(0.25, 2.0, 9), []
    for chunk in (1, 20, 27, 1 << 16):
        set_chunk(monkeypatch, chunk)
        results.append(run(Tensor(numbers(13, 9)), targets, weight, label_smoothing=smoothing)[1])
    assert all(np.array_equal(results[0], other) for other in results)


def test_the_gradient_from_above_is_a_factor():
    targets, x = np.array([1, 0], np.int32), numbers(2, 3)
    grad = ms.grad(lambda x: cross_entropy(x, Tensor(targets)) * 1024.0)(Tensor(x))
    np.testing.assert_allclose(grad.asnumpy(), 1024.0 * reference(x, targets)[1], rtol=1e-5, atol=1e-4)


def test_other_ignore_index():
    targets, x = np.array([1, 0, 2], np.int32), numbers(3, 3)
    loss, grad = run(Tensor(x), targets, ignore_index=0)
    expected, slope = reference(x, targets, ignore=0)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, slope, atol=1e-6)


def test_a_second_backward_through_the_same_function():
    """BMTrain's makes the gradient in the memory that backward reads."""
    targets, x = np.array([1, -100, 2], np.int32), numbers(3, 4)
    tensor = Tensor(x)
    differentiated = ms.value_and_grad(lambda x: cross_entropy(x, Tensor(targets), label_smoothing=0.1))
    first, second = (differentiated(tensor) for _ in range(2))
    assert first[0].asnumpy() == second[0].asnumpy() and np.array_equal(first[1].asnumpy(), second[1].asnumpy())
    assert np.array_equal(tensor.asnumpy(), x)


def test_two_losses_of_the_same_logits():
    targets, x = np.array([1, 2, 0], np.int32), numbers(3, 4)
    both = ms.grad(lambda x: cross_entropy(x, Tensor(targets)) + cross_entropy(x, Tensor(targets[::-1].copy())))(Tensor(x))
    expected = reference(x, targets)[1] + reference(x, targets[::-1])[1]
    np.testing.assert_allclose(both.asnumpy(), expected, atol=1e-6)


VIEWS = {
    "columns": lambda x: x[:, 2:9],
    "rows": lambda x: x[1:5],
    "every other": lambda x: x[::2],
    "transposed": lambda x: x.T,
    "reshaped": lambda x: x.reshape(2, 3, 12)[1],
}


@pytest.mark.parametrize("name", VIEWS)
def test_logits_that_are_a_view(name):
    view, whole = VIEWS[name], numbers(6, 12)
    shown = view(whole)
    targets = np.arange(len(shown), dtype=np.int32) % shown.shape[1]
    value, grad = ms.value_and_grad(lambda x: cross_entropy(view(x), Tensor(targets)))(Tensor(whole) * 1.0)
    loss, slope = reference(shown, targets)
    expected = np.zeros_like(whole, np.float64)
    view(expected)[...] = slope
    assert float(value.asnumpy()) == pytest.approx(float(loss), rel=1e-6)
    np.testing.assert_allclose(grad.asnumpy(), expected, atol=1e-6)


# Nothing to learn from #


@DTYPES
@REDUCTIONS
def test_all_rows_ignored(dtype, reduction):
    targets = np.full(3, -100, np.int32)
    loss, grad = run(Tensor(numbers(3, 5)).astype(dtype), targets, label_smoothing=0.1, reduction=reduction)
    assert not loss.any() and not grad.any()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_rows(reduction):
    loss, grad = run(Tensor(numbers(0, 5)) * 1.0, np.zeros(0, np.int32), reduction=reduction)
    assert loss == 0.0 and grad.shape == (0, 5)


def test_a_weight_of_zero():
    """Its rows count neither in the loss nor in the divisor."""
    weight, targets, x = np.array([0.0, 1.0, 2.0]), np.array([0, 1, 2], np.int32), numbers(3, 3)
    loss, grad = run(Tensor(x), targets, weight)
    expected, slope = reference(x[1:], targets[1:], weight)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_allclose(grad[1:], slope, atol=1e-6)
    assert not grad[0].any()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_only_weights_of_zero(smoothing):
    """Nothing to divide by: 0, as where all rows are ignored (PyTorch: NaN)."""
    loss, grad = run(Tensor(numbers(2, 3)), np.array([0, 0], np.int32), [0.0, 1.0, 1.0], label_smoothing=smoothing)
    assert loss == 0.0 and not grad.any()


# Large numbers #


@pytest.mark.parametrize("offset", [100.0, 1e4, -1e6])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_common_offset_costs_no_digits(offset, smoothing):
    check(Tensor(numbers(5, 7) + np.float32(offset)), np.arange(5, dtype=np.int32), None, smoothing)


@DTYPES
def test_an_impossible_target(dtype):
    """A probability below the smallest float32 is not zero; exp does not overflow."""
    x = Tensor(np.array([[1000.0, 0.0], [0.0, 1000.0]], np.float32)).astype(dtype)
    loss, grad = run(x, np.array([0, 0], np.int32))
    assert loss == 500.0 and grad.tolist() == [[0.0, 0.0], [-0.5, 0.5]]


def test_the_largest_logits():
    largest = np.finfo(np.float32).max
    loss, grad = run(Tensor(np.array([[largest, 0.0, -largest]], np.float32)), np.array([0], np.int32))
    assert loss == 0.0 and not grad.any()


def test_a_class_that_cannot_be():
    """-inf, as masks write it, where it is not the target."""
    x = numbers(2, 4)
    x[:, 1] = -np.inf
    loss, grad = run(Tensor(x), np.array([0, 2], np.int32))
    without = np.delete(x, 1, 1)
    expected, slope = reference(without, np.array([0, 1]))
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    assert not grad[:, 1].any()
    np.testing.assert_allclose(np.delete(grad, 1, 1), slope, atol=1e-6)


BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


@BAD
@DTYPES
@REDUCTIONS
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_ignored_row_reaches_nothing(bad, dtype, reduction, smoothing):
    x, targets = numbers(3, 4), np.array([1, -100, 2], np.int32)
    clean = run(Tensor(x).astype(dtype), targets, label_smoothing=smoothing, reduction=reduction)
    for place in (0, slice(None)):
        x[1, place] = bad
        dirty = run(Tensor(x).astype(dtype), targets, label_smoothing=smoothing, reduction=reduction)
        assert all(np.array_equal(a, b) for a, b in zip(clean, dirty)) and not dirty[1][1].any()


@BAD
@REDUCTIONS
@pytest.mark.parametrize("weight", [None, [1.0, 1.0, 0.0]], ids=["plain", "weighted"])
def test_an_overflow_in_a_row_that_counts_is_not_hidden(bad, reduction, weight):
    """What a loss scaler looks for. Warnings are errors here."""
    x = numbers(2, 3)
    x[1, 2] = bad
    loss, grad = run(Tensor(x), np.array([0, 2], np.int32), weight, reduction=reduction)
    assert not np.isfinite(loss).all()
    assert np.isfinite(grad[0]).all() and (bad == -np.inf or not np.isfinite(grad[1]).all())


def test_an_overflow_of_the_gradient_is_inf():
    x = Tensor(np.zeros((1, 2), np.float16))
    grad = ms.grad(lambda x: cross_entropy(x, Tensor(np.array([0], np.int32))) * 1e6)(x)
    assert grad.asnumpy().tolist() == [[-np.inf, np.inf]]


# Errors #

INTS, LOGITS = np.array([0, 1], np.int32), numbers(2, 3)
ERRORS = [
    ((LOGITS, np.zeros(3, np.int32)), {}, "cross_entropy takes logits (rows, classes) and targets (rows,), not (2, 3) and (3,)"),
    ((LOGITS[None], INTS[None]), {}, "cross_entropy takes logits (rows, classes) and targets (rows,), not (1, 2, 3) and (1, 2)"),
    ((LOGITS, np.array([0, 3], np.int32)), {}, "targets lie in [0, 3], the logits have 3 classes"),
    ((LOGITS, np.array([-1, 0], np.int32)), {}, "targets lie in [-1, 0], the logits have 3 classes"),
    ((LOGITS, np.array([-100, 7], np.int32)), {}, "targets lie in [7, 7], the logits have 3 classes"),
    ((LOGITS, INTS), {"weight": np.ones(2, np.float32)}, "weight must have shape (3,), one for each class, not (2,)"),
    ((LOGITS, INTS), {"reduction": "avg"}, "reduction must be one of mean, sum, none, not 'avg'"),
    ((LOGITS, INTS), {"label_smoothing": 1.0}, "label_smoothing must be in [0, 1), not 1.0"),
    ((LOGITS, INTS), {"label_smoothing": -0.1}, "label_smoothing must be in [0, 1), not -0.1"),
    ((LOGITS, INTS), {"label_smoothing": np.nan}, "label_smoothing must be in [0, 1), not nan"),
]


@pytest.mark.parametrize("inputs, options, text", ERRORS, ids=[text for *_, text in ERRORS])
def test_errors(inputs, options, text):
    options = {name: Tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    with pytest.raises(ValueError) as info:
        cross_entropy(*map(Tensor, inputs), **options)
    assert str(info.value) == text


def test_probabilities_are_no_targets():
    with pytest.raises(TypeError, match="targets are class indices, int32 or int64, not float32"):
        cross_entropy(Tensor(LOGITS), Tensor(np.array([0.2, 1.7], np.float32)))


# Memory #

MEASURE = """
import mindspore as ms, numpy as np
from mindspore import Tensor
import bmtrain_ms as bms
from bmtrain_ms_base.memory import reset_peak_memory, resident_memory
from bmtrain_ms.compat.runtime import from_host
from bmtrain_ms.nn.functional import cross_entropy

bms.init_distributed(seed=0)

def measure(function, *args):
    reset_peak_memory()
    before = resident_memory()[0]
    kept = function(*args)
    print(resident_memory()[1] - before)

def step(rows, classes):
    logits = from_host(np.zeros((rows, classes), np.float32)) * 1.0
    targets = Tensor(np.arange(rows, dtype=np.int32))
    weight = Tensor(np.ones(classes, np.float32))
    loss = lambda x: cross_entropy(x, targets, weight=weight, label_smoothing=0.1)
    measure(loss, logits)
    measure(ms.grad(loss), logits)

step(64, 256)
step(4096, 8192)
"""


def test_memory_is_the_gradient_and_little_more():
    """128 MiB of logits. PyTorch's float32 path keeps log_softmax too, twice that."""
    env = {**os.environ, "PYTHONPATH": str(SOURCE), "GLOG_v": "3"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", MEASURE], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    forward, backward = (int(line) / 2**20 for line in done.stdout.split()[-2:])
    assert forward < 16 and 120 < backward < 128 + 16, f"{forward:.1f} MiB, {backward:.1f} MiB"
