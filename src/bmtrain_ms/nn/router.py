"""Which experts compute a token, and with what weight; and the losses that keep experts busy alike.

[Note: balance]
A balance loss is a mean over tokens: token t of group g has E / k * sum_e P[t, e] * c[g, e] / T[g], where c counts the choices of
the group's T tokens (before any is dropped) and P are scores that sum to 1: 1 where all experts have as many. Groups: what this
data-parallel rank has of the batch (`micro_batch`), what all ranks have, together with the micro-batches of the step so far
(`global_batch`: Qiu et al., 2025), or each sequence (`sequence`: DeepSeek-V3). The counts have no derivative. Micro-batches of a
pipeline are a matter of the layout, and `global_batch` would depend on their number: models in stages refuse it. The loss weighs
what it weighs against the mean loss of the tokens, whatever the number of micro-batches and ranks; also where ranks, or the
micro-batches of a pipeline, have unequal numbers of tokens (padding): the mean is that over the tokens of all of them. Several
backward passes of one step weigh alike; scale their losses where they should not. Evaluation and generation are no part of a step:
a pass whose gradient nobody takes has the counts that it makes itself, and a mean over this data-parallel rank's tokens.

It enters beside the hidden states, which stay one tensor: routers note in the pass's `Routing` what they add, `Routing.add_losses`
adds it to the loss, and in backward, where it comes first, learns how much the loss counts; routers add the gradients of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from bmtrain_ms_base.checks import number, whole
from bmtrain_ms_base.mesh import nearest_divisors

from ..comm import Engine, World, reduce_numbers
from ..comm import world as current_world
from ..compat.autograd import custom_vjp, differentiated, no_grad, recording
from ..compat.cells import parameter_table
from ..compat.runtime import from_host, host_array
from ..zero import DistributedModule, DistributedParameter, context_of, empty
from . import functional
from .linear import weight_initializer

Tensors = tuple[Tensor, ...]

SCORES = ("softmax", "sigmoid")
GROUP_SCORES = {"max": 1, "two_best": 2}
BALANCES = ("micro_batch", "global_batch", "sequence")
_LEAST = 1e-20  # added to sums that are divided by


@dataclass(frozen=True)
class RouterConfig:
    """How a router chooses; `ROUTERS` has those of known models.

    `score`: `softmax` of the logits over the experts, or `sigmoid` of each.  `renormalise`: weights are divided by their sum.
    `scale`: and multiplied with this.  `groups`, `keep_groups`, `group_score`: choose in so many of equal groups only, by their
    `max` or the sum of their `two_best` (DeepSeek-V2, V3).  `bias`: added to the scores for the choice only, and moved by
    `update_router_bias` by `bias_rate` where an expert has more or less to do than the mean (Wang et al., 2024).
    `balance`, `balance_coef`: a balance loss, see [Note: balance], and its weight.  `z_coef`: weight of the mean over tokens of
    logsumexp(logits)^2 (Zoph et al., 2022).

    Raises:
        TypeError, ValueError: a setting of another type or out of range, or that has no effect without another one.
    """

    score: str = "softmax"
    renormalise: bool = True
    scale: float = 1.0
    groups: int = 1
    keep_groups: int = 1
    group_score: str = "max"
    bias: bool = False
    bias_rate: float = 1e-3
    balance: str | None = None
    balance_coef: float = 0.0
    z_coef: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("score", SCORES), ("group_score", tuple(GROUP_SCORES)), ("balance", (None, *BALANCES))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(str, known))}, not {getattr(self, name)!r}")
        for name in ("groups", "keep_groups"):
            object.__setattr__(self, name, whole(name, getattr(self, name), 1))
        for name in ("scale", "bias_rate", "balance_coef", "z_coef"):
            value = number(name, getattr(self, name))
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and not negative, not {value}")
            object.__setattr__(self, name, value)
        if self.keep_groups > self.groups:
            raise ValueError(f"keep_groups={self.keep_groups} of groups={self.groups} cannot be kept: use at most {self.groups}")
        if (self.balance is None) != (self.balance_coef == 0.0):
            raise ValueError(f"balance={self.balance!r} and balance_coef={self.balance_coef} go together: give both or none")

    @property
    def has_losses(self) -> bool:
        """Whether the router adds something to the loss."""
        return self.balance is not None or self.z_coef > 0.0

    def check_sizes(self, experts: int, top_k: int) -> None:
        """Raise ValueError where so many experts cannot be chosen from."""
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} of {experts} experts cannot be chosen: use 1 to {experts}")
        if experts % self.groups:
            raise ValueError(
                f"groups={self.groups} does not divide {experts} experts: use {nearest_divisors(experts, self.groups)}"
            )
        of_group = experts // self.groups
        if GROUP_SCORES[self.group_score] > of_group:
            raise ValueError(f"group_score={self.group_score!r} needs groups of two experts or more, and they have {of_group}")
        if self.keep_groups * of_group < top_k:
            raise ValueError(
                f"keep_groups={self.keep_groups} groups have {self.keep_groups * of_group} experts, of which top_k={top_k} cannot "
                f"be chosen: keep {-(-top_k // of_group)}"
            )


ROUTERS = {
    "mixtral": RouterConfig(),
    "qwen3-moe": RouterConfig(),
    "minicpm-moe": RouterConfig(),
    "qwen2-moe": RouterConfig(renormalise=False),
    "grok-1": RouterConfig(renormalise=False),
    "deepseek-v2-lite": RouterConfig(renormalise=False),
    "deepseek-v2": RouterConfig(renormalise=False, scale=16.0, groups=8, keep_groups=3),
    "deepseek-v3": RouterConfig("sigmoid", True, 2.5, groups=8, keep_groups=4, group_score="two_best", bias=True),
}


class Routing:
    """What the routers of one forward pass are told of its rows, and what their losses amount to.

    Args:
        tokens: (rows,) bool, which of this rank's rows are tokens: others are sent to no expert and do not count. None: all.
        sequences: (rows,) of int from 0, which sequence of this data-parallel rank's batch a row is of, if sequences are balanced.
        in_world: default: the current world.
    """

    def __init__(self, tokens: np.ndarray | None = None, sequences: np.ndarray | None = None, *, in_world: World | None = None):
        self.tokens = None if tokens is None else np.asarray(tokens, bool)
        self.sequences = None if sequences is None else np.asarray(sequences, np.int64)
        self._world = in_world or current_world()
        self._number: int | None = None
        self._notes: list[_Note] = []
        self._pulled: Tensor | None = None

    def add_losses(self, loss: Tensor, weight: float = 1.0) -> Tensor:
        """The loss and what the routers add to it. All ranks of a stage call it together, once, behind the last router.

        What is added is the sum over this data-parallel rank's tokens, divided by the mean number of tokens of such ranks: so the
        mean over ranks, which gradients are, is that over all tokens, however many each rank has. Where no gradient is taken it is
        the mean over this rank's tokens, which knows of no other rank's.

        Args:
            loss: float32, a scalar.
            weight: of tokens in it: 1 where it is their mean; where it is their sum, of which a mean over more batches is made
                later, the number of this data-parallel rank's tokens that count. Its mean over these ranks is used.
        """
        engine, ranks = self._world.along("tp"), self._world.mesh.tp
        of_all = self._world.stage if differentiated() else engine

        def forward(loss: Tensor) -> tuple[Tensors, float]:
            if not self.has_losses:
                return (loss * 1.0,), 0.0
            of_token = self._weight_of_token(weight, of_all)
            total = engine.all_reduce([self._total().reshape(1)], label="router losses").wait()[0]
            return (loss + total.reshape(()) * of_token,), of_token

        def backward(_: Tensors, of_token: float, grads: Tensors) -> Tensors:
            self._pulled = grads[0].reshape(()) * (of_token * ranks)  # every tensor-parallel rank has all of the loss
            return grads

        return custom_vjp(forward, backward, loss)[0]

    def _weight_of_token(self, weight: float, of_all: Engine) -> float:
        mine = [0 if self.tokens is None else self.tokens.sum(), weight / self._world.mesh.tp]
        tokens, weights = reduce_numbers(of_all, mine, "router, tokens").tolist()
        return weights / max(1.0, tokens)

    def pull(self, counts: Tensor) -> None:
        """Say how much what routers add for a token counts, where not `add_losses` does: in pipeline stages."""
        self._pulled = counts

    @property
    def has_losses(self) -> bool:
        """Whether a router has noted some."""
        return any(note.values for note in self._notes)

    def _total(self) -> Tensor:
        values = [value for note in self._notes for value in note.values]
        return sum(values[1:], values[0])

    def value(self) -> float:
        """What this rank's routers add, summed over its tokens."""
        return float(host_array(self._total())) if self.has_losses else 0.0

    @property
    def pulled(self) -> Tensor:
        """The factor of what a router adds for a token, which its backward multiplies with."""
        if self._pulled is None:
            raise RuntimeError("a router has losses, and nobody adds them to the loss: return routing.add_losses(loss)")
        return self._pulled

    def number_of_sequences(self) -> int:
        """How many sequences this data-parallel rank has; asked of the tensor-parallel ranks once."""
        if self._number is None:
            mine = np.array([int(self.sequences.max(initial=0)) + 1], np.int32)
            with no_grad():
                found = self._world.along("tp").all_gather([from_host(mine)], label="router, sequences").wait()[0]
            self._number = int(host_array(found).max())
        return self._number

    def check(self, rows: int) -> np.ndarray:
        """(rows,) bool, which of so many rows are tokens.

        Raises:
            ValueError: it was made for another number of rows.
        """
        if self.tokens is None:
            self.tokens = np.ones(rows, bool)
        for name in ("tokens", "sequences"):
            told = getattr(self, name)
            if told is not None and told.shape != (rows,):
                raise ValueError(f"Routing was told {name} of shape {told.shape}, and a router has {rows} rows: one for each")
        return self.tokens

    def note(self, made: _Note) -> None:
        """Keep what a router adds."""
        self._notes.append(made)

    def noted(self, router: Router, choices: np.ndarray) -> _Note | None:
        """What this call of a router has noted before, if the pass is repeated: a Block that recomputes."""
        if not context_of(self._world).draws.replaying:
            return None
        mine = [note for note in self._notes if note.router is router]
        same = [note for note in mine if np.array_equal(note.choices, choices)]  # one may be called several times
        return (same or mine or [None])[-1]


@dataclass
class _Note:
    """`load`: (groups, experts) float32, E / k * c / T.  `values`: losses, summed over this rank's tokens."""

    router: Router
    choices: np.ndarray
    load: np.ndarray | None
    values: list[Tensor] = field(default_factory=list)


class Choice(NamedTuple):
    """`experts`: (rows, k) int32, on the host.  `weights`: (rows, k) float32.  `tokens`: (rows,) bool, or None for all."""

    experts: np.ndarray
    weights: Tensor
    tokens: np.ndarray | None


class _Seen:
    """Choices since the step began: `own_counts` of this rank's tokens, `all_counts` of those of all ranks; (experts,) int64."""

    def __init__(self, experts: int):
        self.own_counts, self.all_counts, self.step = np.zeros(experts, np.int64), np.zeros(experts, np.int64), -1

    def at(self, step: int) -> _Seen:
        """Begin anew if another step has begun."""
        if step != self.step:
            self.step = step
            self.own_counts[:] = 0
            self.all_counts[:] = 0
        return self


class Router(DistributedModule):
    """Chooses `top_k` of `experts` for each token; weight and logits are float32 whatever the model's dtype.

    Args:
        dim: of the hidden states.
        experts, top_k: see there.
        config: how it chooses.
        init_std: of the normal distribution that the weight starts with; None: xavier normal.

    Raises:
        ValueError: sizes that do not fit together; the message names what does.
    """

    def __init__(
        self, dim: int, experts: int, top_k: int, config: RouterConfig = ROUTERS["mixtral"], init_std: float | None = 0.02
    ):
        super().__init__()
        self.experts, self.top_k, self.config = whole("experts", experts, 1), whole("top_k", top_k), config
        config.check_sizes(self.experts, self.top_k)
        self.weight = DistributedParameter(empty(self.experts, dim), init_method=weight_initializer(init_std))
        self.e_score_correction_bias = None
        if config.bias:
            zeros = Tensor(np.zeros(self.experts, np.float32))
            self.e_score_correction_bias = Parameter(zeros, name="e_score_correction_bias", requires_grad=False)
        self._seen = _Seen(self.experts)

    def construct(self, x: Tensor, routing: Routing | None = None) -> Choice:
        """x (rows, dim) -> each row's experts.

        Args:
            routing: of the forward pass, where there are losses, counts for a bias, or rows that are no tokens.

        Raises:
            RuntimeError: there are losses, gradients are taken, and there is no `routing` to add them to.
        """
        if routing is None and self.config.has_losses and recording():
            raise RuntimeError(
                "this router has balance losses: give each layer the Routing of the pass, and return routing.add_losses(loss)"
            )
        tokens = None if routing is None else routing.check(x.shape[0])
        logits = functional.linear(x.astype(ms.float32), self.weight)
        choice = _Choosing(self, routing, tokens)
        weights = custom_vjp(choice.forward, choice.backward, logits)[0]
        return Choice(choice.choices, weights, tokens)

    @property
    def world(self) -> World:
        """The world of the router's weight."""
        return self.parameter("weight").world

    def seen(self) -> np.ndarray:
        """(experts,) int64: how often each was chosen since the step began, by this rank's tokens, in passes that had a `Routing`
        and whose gradient was taken."""
        return self._seen.at(self.world.everyone.clock.step).own_counts

    def counts(self) -> dict[str, Any] | None:
        """The `step` that counts are of, this rank's `own`, and those of `all` ranks, for a checkpoint; None: nobody waits for any,
        on all ranks that have the router."""
        seen = self._seen
        if seen.step != self.world.everyone.clock.step and not (self.config.bias and seen.step >= 0):
            return None
        return {"step": seen.step, "own": seen.own_counts.tolist(), "all": seen.all_counts.tolist()}

    def restore_counts(self, saved: dict[str, Any] | None) -> None:
        """Go on from what `counts` returned."""
        self._seen = _Seen(self.experts)
        if saved is not None:
            self._seen.step, self._seen.own_counts[:], self._seen.all_counts[:] = saved["step"], saved["own"], saved["all"]

    def note(self, choices: np.ndarray, routing: Routing, tokens: np.ndarray, trains: bool) -> _Note:
        """Count the choices of a pass, once: what is repeated finds what was noted. Ranks may count together.

        A pass whose gradient nobody takes has losses of its own choices, and is no part of the step.
        """
        noted = routing.noted(self, choices)
        if noted is not None:
            return noted
        seen = self._seen.at(self.world.everyone.clock.step) if trains else _Seen(self.experts)
        counts = np.bincount(choices[tokens].reshape(-1), minlength=self.experts)
        seen.own_counts += counts
        kind, load = self.config.balance, None
        if kind == "sequence":
            if routing.sequences is None:
                raise ValueError("the balance of sequences needs to know them: Routing(sequences=...), one number for each row")
            counts = np.zeros((routing.number_of_sequences(), self.experts), np.int64)
            np.add.at(counts, (routing.sequences[tokens, None], choices[tokens]), 1)
            load = self._summed(counts, "tp")
        elif kind == "micro_batch":
            load = self._summed(counts[None], "tp")
        elif kind == "global_batch":
            seen.all_counts += self._summed(counts, "stage")
            load = seen.all_counts[None]
        if load is not None:
            load = (load * self.experts / np.maximum(load.sum(1, keepdims=True), 1)).astype(np.float32)
        made = _Note(self, choices, load)
        routing.note(made)
        return made

    def _summed(self, counts: np.ndarray, axis: str) -> np.ndarray:
        engine = self.world.stage if axis == "stage" else self.world.along(axis)
        with no_grad():
            total = engine.all_reduce([from_host(counts.astype(np.int32))], label=f"router, choices along {axis}").wait()[0]
        return host_array(total).reshape(counts.shape).astype(np.int64)


class _Choosing:
    """One call of a router as a function of the logits (rows, experts), and its derivative."""

    def __init__(self, router: Router, routing: Routing | None, tokens: np.ndarray | None):
        self.router, self.config, self.routing, self.tokens = router, router.config, routing, tokens
        self.choices, self.trains = np.zeros((0, 0), np.int32), differentiated()
        self.note: _Note | None = None

    def forward(self, logits: Tensor) -> tuple[Tensors, Tensors]:
        config = self.config
        scores = ops.softmax(logits, -1) if config.score == "softmax" else ops.sigmoid(logits)
        bias = parameter_table(self.router).get("e_score_correction_bias")
        best = GROUP_SCORES[config.group_score]
        index = functional.choose_experts(
            scores if bias is None else scores + bias, self.router.top_k, config.groups, config.keep_groups, best
        )
        self.choices = host_array(index)
        raw = ops.gather_elements(scores, 1, index)
        total = raw.sum(-1, keepdims=True) + _LEAST
        weights = raw * config.scale / total if config.renormalise else raw * config.scale
        if self.routing is not None:
            self._note(logits, scores, self.routing)
        return (weights,), (scores, index, raw, total)

    def backward(self, inputs: Tensors, residuals: Tensors, grads: Tensors) -> Tensors:
        config, (scores, index, raw, total) = self.config, residuals
        grad = grads[0] * config.scale
        if config.renormalise:
            grad = (grad - (grad * raw).sum(-1, keepdims=True) / total) / total
        grad = ops.tensor_scatter_elements(ops.zeros_like(scores), index, grad, 1)
        counts_for = self.routing.pulled if config.has_losses and self.routing is not None else None
        if counts_for is not None and config.balance is not None:
            slope = self._load() * (counts_for * config.balance_coef)
            if config.score == "sigmoid":
                every = scores.sum(-1, keepdims=True) + _LEAST
                slope = (slope - (slope * scores).sum(-1, keepdims=True) / every) / every
            grad = grad + slope
        if config.score == "softmax":
            found = scores * (grad - (grad * scores).sum(-1, keepdims=True))
        else:
            found = grad * scores * (1.0 - scores)
        if counts_for is not None and config.z_coef:
            logits = inputs[0]
            probabilities = scores if config.score == "softmax" else ops.softmax(logits, -1)
            found = found + probabilities * (_log_sums(logits) * self._marks() * (counts_for * (2.0 * config.z_coef)))
        return (found,)

    def _note(self, logits: Tensor, scores: Tensor, routing: Routing) -> None:
        config = self.config
        self.note = self.router.note(self.choices, routing, routing.check(logits.shape[0]), self.trains)
        if self.note.values or not config.has_losses:
            return
        if config.balance is not None:
            every = scores if config.score == "softmax" else scores / (scores.sum(-1, keepdims=True) + _LEAST)
            self.note.values.append((every * self._load()).sum() * config.balance_coef)
        if config.z_coef:
            sums = _log_sums(logits) * self._marks()
            self.note.values.append((sums * sums).sum() * config.z_coef)

    def _marks(self) -> Tensor:
        """(rows, 1): 1 for tokens, 0 for others."""
        return from_host(self.tokens.astype(np.float32)[:, None])

    def _load(self) -> Tensor:
        """(rows, experts): the load that a token's loss is multiplied with; zero for rows that are no tokens."""
        load, tokens = np.asarray(self.note.load), np.asarray(self.tokens)
        group = 0 if self.config.balance != "sequence" else self.routing.sequences
        rows = np.broadcast_to(load[group], (len(tokens), load.shape[1]))
        return from_host(np.where(tokens[:, None], rows, np.float32(0.0)))


def _log_sums(logits: Tensor) -> Tensor:
    """(rows, 1): log of the sum of exp."""
    largest = logits.max(-1, keepdims=True)
    return largest + ops.log(ops.exp(logits - largest).sum(-1, keepdims=True))


def update_router_bias(model: nn.Cell) -> None:
    """Move the biases of all routers by what the step's tokens have chosen: bias += rate * sign(mean count - count).

    Once for a step, after it was made, by all ranks together; counts are those of all ranks and micro-batches whose passes had a
    `Routing`, and a gradient: not evaluation. After a skipped step leave it out: what was chosen then is forgotten.
    """
    routers = [cell for _, cell in model.cells_and_names() if isinstance(cell, Router) and cell.config.bias]
    routers = list({id(router): router for router in routers}.values())
    if not routers:
        return
    counts = np.concatenate([router._seen.own_counts for router in routers]).astype(np.float64)
    counts = reduce_numbers(routers[0].world.stage, counts, "router, bias")
    for router in routers:
        mine, counts = counts[: router.experts], counts[router.experts :]
        bias: Any = parameter_table(router)["e_score_correction_bias"]
        step = np.sign(mine.mean() - mine) * router.config.bias_rate
        bias.set_data(from_host((host_array(bias) + step).astype(np.float32)))
        router.restore_counts(None)
