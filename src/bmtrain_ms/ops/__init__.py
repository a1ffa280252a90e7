"""The operations that a transformer spends its time in, each with its own derivative.

Here is what they promise. `ops.host` and `ops.device` are two implementations of the same names, of which one is chosen once:
by `init_distributed`, or, at the first use before that, by what MindSpore says its device is. Norms, softmax, angles and the loss
are computed in float32 whatever the dtype of the tensors; inf and nan are answers, which a loss scaler looks for.
"""

from __future__ import annotations

from types import ModuleType
from typing import Sequence

import numpy as np
from mindspore import Tensor

from ..compat.autograd import custom_vjp
from ..compat.device import on_host
from . import experts, loss
from .rules import Angles, LossRule, check_cross_entropy_options, refuse_fractions
from .seen import Seen

__all__ = [
    "Angles",
    "Seen",
    "add",
    "attention",
    "causal_mask",
    "check_cross_entropy_options",
    "choose_experts",
    "chosen",
    "combine_rows",
    "cross_entropy",
    "embedding",
    "gelu",
    "grouped_linear",
    "layer_norm",
    "linear",
    "linear_cross_entropy",
    "linears",
    "matmul",
    "merge_heads",
    "pick_rows",
    "reshape",
    "rms_norm",
    "split_heads",
    "swiglu",
    "times",
    "use",
    "use_default",
]


class _Choice:
    implementation: ModuleType | None = None


def use(name: str) -> None:
    """Compute on the `host`, with NumPy and compiled loops, or on a `device`, with MindSpore's operations.

    Raises:
        ValueError: `name` is neither.
    """
    if name == "host":
        from . import host as implementation  # and numba with it
    elif name == "device":
        from . import device as implementation
    else:
        raise ValueError(f"operations are computed on the 'host' or on a 'device', not on {name!r}")
    _Choice.implementation = implementation


def use_default() -> None:
    """Compute as everything else does, see `compat.device`."""
    use("host" if on_host() else "device")


def chosen() -> ModuleType:
    """The implementation that runs, `ops.host` or `ops.device`."""
    if _Choice.implementation is not None:
        return _Choice.implementation
    use_default()
    return chosen()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., in), weight (out, in), bias (out,) -> (..., out), in the dtype of the inputs."""
    return chosen().linear(x, weight, bias)


def linears(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """`linear` of one x with each of several weights, and as many biases, or None in their place. The gradients of x are summed
    from the last to the first."""
    return chosen().linears(x, weights, biases)


def matmul(a: Tensor, b: Tensor, transpose_a: bool = False, transpose_b: bool = False) -> Tensor:
    """a (n, k) times b (k, m), or of their transposes -> (n, m), in the type of a. It has no derivative: it is what those are
    made of."""
    return chosen().matmul(a, b, transpose_a, transpose_b)


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """ids (...) of int, table (vocab, dim) -> (..., dim). Gradients of equal ids are summed in float32, in order.

    Raises:
        TypeError: ids are no whole numbers.
    """
    refuse_fractions(ids)
    return chosen().embedding(ids, table)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dim (Zhang and Sennrich, 2019); x (..., dim), weight (dim,)."""
    return chosen().rms_norm(x, weight, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dim (Ba et al., 2016); x (..., dim), weight and bias (dim,)."""
    return chosen().layer_norm(x, weight, bias, eps)


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, as a layer adds what it has computed to the hidden states: of equal shape and type.

    Raises:
        ValueError: they are not.
    """
    if x.shape != y.shape or x.dtype != y.dtype:
        raise ValueError(f"add takes two tensors of one shape and type, not {x.shape} {x.dtype} and {y.shape} {y.dtype}")
    return chosen().add(x, y)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer, "GLU variants improve transformer", 2020); equal shapes."""
    return chosen().swiglu(gate, up)


def gelu(x: Tensor) -> Tensor:
    """GELU by its approximation with tanh, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), in float32 (`gelu_new`, GPT-2)."""
    return chosen().gelu(x)


def split_heads(x: Tensor, batch: int, heads: int, angles: Angles | None = None) -> Tensor:
    """(batch * length, heads * dim) -> (batch, heads, length, dim), rotated by the angles if there are any.

    Args:
        angles: of rotary position embedding (Su et al., 2021), halves paired.
    """
    return chosen().split_heads(x, batch, heads, angles)


def merge_heads(x: Tensor) -> Tensor:
    """(batch, heads, length, dim) -> (batch * length, heads * dim)."""
    return chosen().merge_heads(x)


def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x in another shape, one dim of which may be -1. On the host it is x's own memory, of which MindSpore 2.5 makes a copy, and
    another one in backward: write into neither x nor the result."""
    return chosen().reshape(x, shape)


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Seen | None, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """softmax(scale * q kᵀ + mask) v, softmax in float32.

    Grouped queries (Ainslie et al., 2023) need no repeated keys: the queries of one group are more rows of the same product.

    Args:
        q: (batch, kv heads, queries of the group, dim).
        k: (batch, kv heads, keys, dim).
        v: (batch, kv heads, keys, dim of the result).
        mask: which keys are seen, a `Seen`, of which memory for all pairs is never taken on the host; or float32, added to the
            scores: broadcastable to (batch, kv heads, queries, keys), where what `causal_mask` has returned, the very tensor, costs
            less than another one.
        scale: None: 1 / sqrt(dim).
        softcap: scores become softcap * tanh(score / softcap) before the mask is added; None: they stay.

    Returns:
        (batch, kv heads, queries of the group, dim of the result), of the type of `q`.
    """
    return chosen().attention(q, k, v, mask, scale, softcap)


def times(x: Tensor, factor: float) -> Tensor:
    """x times a number that may differ from step to step. As an operation of MindSpore's it would make another graph each time, of
    which 2.5 prints where it was recorded."""

    def backward(_: tuple[Tensor, ...], __: None, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (grads[0] * factor,)

    return custom_vjp(lambda x: ((x * factor,), None), backward, x)[0]


def causal_mask(batch: int, heads: int, queries: int, keys: int, repeats: int = 1) -> Tensor:
    """0 where a query may look, a large negative number where it may not; the last query sees all keys.

    Returns:
        float32, broadcastable to (batch, heads, repeats * queries, keys). Shared: do not write.
    """
    return chosen().causal_mask(batch, heads, queries, keys, repeats)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    weight: Tensor | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """-log softmax(logits)[target], in float32.

    Args:
        logits: (rows, classes), any float dtype; the loss is computed in float32.
        targets: (rows,) of int32 or int64.
        ignore_index: rows with this target have no loss and no gradient.
        weight: (classes,), of each class; default: ones.
        reduction: `mean` over the rows that count (with `weight`: divided by the sum of their targets' weights), 0 when there is
            none; `sum`; or `none`.
        label_smoothing: e in [0, 1): that share of the target is spread over all classes.

    Returns:
        float32, a scalar; (rows,) for `none`.

    Raises:
        TypeError: targets are not integers.
        ValueError: shapes do not fit, a target is outside [0, classes), or an option is out of range.
    """
    if logits.ndim != 2:
        raise ValueError(
            f"cross_entropy takes logits (rows, classes) and targets (rows,), not {tuple(logits.shape)} and {tuple(targets.shape)}"
        )
    rows, classes = logits.shape
    rule = LossRule.of(rows, classes, targets, ignore_index, weight, reduction, label_smoothing)
    return loss.cross_entropy(logits, rule, chosen())


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    rows: int | None = None,
) -> Tensor:
    """`cross_entropy` of the logits hidden Wᵀ, of which there never are more than those of `rows` tokens.

    Memory is that of (rows, classes) instead of (tokens, classes), for one more product, as backward makes the logits again.

    Args:
        hidden: (tokens, dim).
        weight: (classes, dim).
        targets: (tokens,) of int32 or int64.
        ignore_index, reduction, label_smoothing: as in `cross_entropy`.
        rows: tokens whose logits are there at a time; default: those that 2^26 logits belong to. Where these are all tokens, logits
            are kept for backward.

    Returns:
        float32, a scalar; (tokens,) for `none`.

    Raises:
        TypeError, ValueError: as in `cross_entropy`; `rows` below 1.
    """
    rule = LossRule.of(hidden.shape[0], weight.shape[0], targets, ignore_index, None, reduction, label_smoothing)
    return loss.linear_cross_entropy(hidden, weight, rule, chosen(), rows)


def choose_experts(scores: Tensor, top_k: int, groups: int = 1, keep: int = 1, best: int = 1) -> Tensor:
    """The experts with the highest scores, best first, and of equal ones the lowest number. It has no derivative.

    Args:
        scores: (tokens, experts) float32.
        top_k: how many of them.
        groups: equal parts of the experts, in order, of which only those of `keep` groups are chosen ...
        keep: ... the ones with the highest sums of their `best` highest scores (DeepSeek-V2: 1, V3: 2).

    Returns:
        (tokens, top_k) int32.
    """
    return chosen().choose_experts(scores, top_k, groups, keep, best)


def pick_rows(x: Tensor, index: np.ndarray, places: np.ndarray) -> Tensor:
    """x[index], a row of zeros where the index is -1; what has no gradient there has none.

    Args:
        x: (n, dim).
        index: (m,) of int, below n.
        places: (n, k) of int, the inverse: where in the result each row of x lies, -1 where it does not.

    Returns:
        (m, dim); gradients of rows that are there several times are summed in float32.
    """
    return experts.pick_rows(x, index, places, chosen())


def combine_rows(y: Tensor, weights: Tensor, places: np.ndarray, slots: np.ndarray) -> Tensor:
    """For each token the sum of k rows, each times its weight, in float32.

    Args:
        y: (n, dim).
        weights: (tokens, k) float32.
        places: (tokens, k) of int: which row of y; -1: none, and the weight has a gradient of zero.
        slots: (n,) of int, the inverse: t * k + j of each row of y, -1 where no token has it.

    Returns:
        (tokens, dim), in the type of y.
    """
    return experts.combine_rows(y, weights, places, slots, chosen())


def grouped_linear(x: Tensor, weight: Tensor, counts: np.ndarray) -> Tensor:
    """x Wᵀ with another W for each group of rows, without waiting for a device.

    Args:
        x: (rows, in), group behind group; rows behind the last one give zeros, and get gradients of zero.
        weight: (groups, out, in), of the type of x.
        counts: (groups,) of int, rows of each group, at least 0; the gradient of a W without rows is zero.

    Returns:
        (rows, out).
    """
    return chosen().grouped_linear(x, weight, counts)
