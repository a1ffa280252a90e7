"""A feed-forward layer of many experts, of which each token uses a few (Shazeer et al., 2017; Lepikhin et al., 2021)."""

from __future__ import annotations

from typing import Any, Callable

import mindspore as ms
from mindspore import Tensor, nn, ops

from bmtrain_ms_base.checks import number, whole
from bmtrain_ms_base.mesh import nearest_divisors
from bmtrain_ms_base.routing import DROP_POLICIES, capacity_of, kept_choices

from ..comm import Engine
from ..comm import world as current_world
from ..compat.cells import is_only_construct
from ..compat.runtime import host_array
from ..distributed import Exchange
from ..zero import DistributedModule, DistributedParameter, ParameterInitializer, empty, init
from . import functional
from .linear import Linear
from .router import ROUTERS, Choice, Router, RouterConfig, Routing


class Halves(nn.Cell):
    """A layer of two halves, `narrow(widen(x))`. As the shared layer of `MoE` it is computed one half while tokens travel to their
    experts, the other on their way back."""

    def construct(self, hidden: Tensor) -> Tensor:
        """hidden (tokens, dim) -> (tokens, dim)."""
        return self.narrow(self.widen(hidden))

    def widen(self, hidden: Tensor) -> Tensor:
        """The first half: hidden (tokens, dim) -> anything."""
        raise NotImplementedError

    def narrow(self, inner: Tensor) -> Tensor:
        """The second half: what `widen` returned -> (tokens, dim)."""
        raise NotImplementedError


class ExpertLinear(DistributedModule):
    """y = x Wᵀ with a W for each expert, of which ranks along `ep` have a part each.

    Args:
        experts: on all ranks.
        in_features, out_features: sizes of the last dim of x and y.
        dtype: of the weights, and of x.
        init_std: of the normal distribution that they start with; None: xavier normal, of each one's sizes.

    Raises:
        ValueError: the ranks along `ep` do not divide the experts.
    """

    def __init__(self, experts: int, in_features: int, out_features: int, dtype: Any = ms.float32, init_std: float | None = None):
        super().__init__()
        std = (2.0 / (in_features + out_features)) ** 0.5 if init_std is None else init_std
        self.weight = DistributedParameter(
            empty(experts, out_features, in_features, dtype=dtype),
            init_method=ParameterInitializer(init.normal_, std=std),
            ep_split=True,
        )

    def construct(self, x: Tensor, counts: Any) -> Tensor:
        """x (rows, in_features), by expert, counts (this rank's experts,) int64 of its rows -> (rows, out_features)."""
        return functional.grouped_linear(x, self.weight, counts)


ACTIVATIONS = ("silu", "gelu_tanh")


class Experts(nn.Cell):
    """down(activation(gate x) * up x), of each expert; a parameter holds all experts of its rank.

    Args:
        experts: on all ranks.
        dim: of the hidden states.
        dim_ff: of an expert's inner layer.
        dtype, init_std: see `ExpertLinear`.
        activation: `silu`, or `gelu_tanh`, which is GELU by its approximation with tanh (Grok-1).

    Raises:
        ValueError: another activation.
    """

    def __init__(
        self,
        experts: int,
        dim: int,
        dim_ff: int,
        dtype: Any = ms.float32,
        init_std: float | None = None,
        activation: str = "silu",
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {activation!r}")
        self.activation = activation
        self.gate_proj = ExpertLinear(experts, dim, dim_ff, dtype, init_std)
        self.up_proj = ExpertLinear(experts, dim, dim_ff, dtype, init_std)
        self.down_proj = ExpertLinear(experts, dim_ff, dim, dtype, init_std)

    def construct(self, x: Tensor, counts: Any) -> Tensor:
        """x (rows, dim), by expert, counts (this rank's experts,) int64 of its rows -> (rows, dim); zeros behind the last one's."""
        gate, up = self.gate_proj(x, counts), self.up_proj(x, counts)
        inner = functional.swiglu(gate, up) if self.activation == "silu" else functional.gelu(gate) * up
        return self.down_proj(inner, counts)

    @property
    def engine(self) -> Engine:
        """The ranks over which experts are divided."""
        return self.gate_proj.parameter("weight").world.along("ep")


class MoE(nn.Cell):
    """A router, experts, and maybe a dense layer of all tokens, which is computed while they travel to their experts and back.

    Parameters are called `gate.weight` (and `gate.e_score_correction_bias`), `experts.gate_proj.weight`, `experts.up_proj.weight`
    and `experts.down_proj.weight`, which are Hugging Face's names without the number of the expert, (experts, out, in);
    `shared_experts.*` (DeepSeek), or `shared_expert.*` and `shared_expert_gate.weight` (Qwen2).

    No token is dropped unless there is a capacity. Then what is dropped depends on the rows that a rank has, so results depend on
    the layout as well; without, they are those of one rank for any.

    Args:
        dim: of the hidden states.
        dim_ff: of an expert's inner layer.
        experts: on all ranks; `init_distributed(ep_size=...)` says over how many they are divided.
        top_k: how many experts a token uses.
        router: how they are chosen.
        shared: a Cell, (rows, dim) -> (rows, dim), whose result is added; None: none. Also on the tokens' way back something is
            computed if it is a `Halves`, as `FeedForward` is.
        shared_gate: that result is multiplied with the sigmoid of a projection of the hidden states.
        capacity: an expert computes at most ceil(tokens * top_k / experts * capacity) tokens of each rank; None: all.
        drop: which ones it keeps: those with the highest weights (`probs`), or the first (`position`).
        dtype: of the experts, and of the hidden states; the router's is float32.
        init_std: of the normal distribution that weights start with; None: xavier normal.
        activation: of the experts, see `Experts`.

    Raises:
        ValueError: sizes that do not fit together, or an option out of range or without effect; the message names what fits.
    """

    def __init__(
        self,
        dim: int,
        dim_ff: int,
        experts: int,
        top_k: int,
        router: RouterConfig = ROUTERS["mixtral"],
        shared: nn.Cell | None = None,
        *,
        shared_gate: bool = False,
        capacity: float | None = None,
        drop: str | None = None,
        dtype: Any = ms.float32,
        init_std: float | None = 0.02,
        activation: str = "silu",
    ):
        super().__init__()
        experts, ranks = whole("experts", experts, 1), current_world().mesh.ep
        if experts % ranks:
            fit = nearest_divisors(experts, ranks)
            raise ValueError(f"{experts} experts cannot be divided over ep_size={ranks} ranks: use ep_size={fit}")
        if capacity is not None and not 0.0 < number("capacity", capacity) < float("inf"):
            raise ValueError(f"capacity must be a positive number, or None for no limit, not {capacity}")
        if drop not in (None, *DROP_POLICIES):
            raise ValueError(f"drop must be one of {', '.join(DROP_POLICIES)}, not {drop!r}")
        if drop is not None and capacity is None:
            raise ValueError(f"drop={drop!r} has no effect without a capacity: give both, or none")
        if shared_gate and shared is None:
            raise ValueError("shared_gate=True needs a shared layer: give it as `shared`")
        self.capacity, self.drop = capacity, drop or DROP_POLICIES[0]
        self.gate = Router(dim, experts, top_k, router, init_std)
        self.experts = Experts(experts, dim, dim_ff, dtype, init_std, activation)
        self.shared_experts = None if shared_gate else shared
        self.shared_expert = shared if shared_gate else None
        self.shared_expert_gate = Linear(dim, 1, False, dtype, init_std) if shared_gate else None

    def construct(self, hidden: Tensor, routing: Routing | None = None) -> Tensor:
        """hidden (rows, dim) -> (rows, dim).

        All ranks along `ep` call it together, also those without tokens. Over tensor-parallel ranks the rows are each one's part.

        Args:
            routing: of the forward pass: which rows are tokens; it takes the router's losses up.
        """
        choice = self.gate(hidden, routing)
        exchange = Exchange(self.experts.engine, choice.experts, self._kept(choice), self.gate.experts)
        ticket = exchange.send(hidden)
        first, second = self._shared()
        inner = first(hidden)
        rows = self.experts(exchange.receive(ticket), exchange.counts)
        ticket = exchange.give_back(rows)
        shared = second(hidden, inner)
        out = exchange.combine(exchange.returned(ticket), choice.weights)
        return out if shared is None else out + shared

    def _kept(self, choice: Choice) -> Any:
        if self.capacity is None:
            return kept_choices(choice.experts, choice.tokens)
        tokens = len(choice.experts) if choice.tokens is None else int(choice.tokens.sum())
        limit = capacity_of(tokens, self.gate.experts, self.gate.top_k, self.capacity)
        weights = host_array(choice.weights) if self.drop == "probs" else None
        return kept_choices(choice.experts, choice.tokens, limit, weights)

    def _shared(self) -> tuple[Callable[[Tensor], Any], Callable[[Tensor, Any], Tensor | None]]:
        """What the shared layer does while tokens travel to their experts: hidden -> anything; and then on their way back: that ->
        its result. One that cannot be taken apart does all of it on the way there."""
        layer = self.shared_expert if self.shared_experts is None else self.shared_experts
        if layer is None:
            return lambda hidden: None, lambda hidden, inner: None
        gate = self.shared_expert_gate

        def gated(hidden: Tensor, out: Tensor) -> Tensor:
            return out if gate is None else out * ops.sigmoid(gate(hidden))

        if isinstance(layer, Halves) and type(layer).construct is Halves.construct and is_only_construct(layer):
            return layer.widen, lambda hidden, inner: gated(hidden, layer.narrow(inner))
        return layer, gated
