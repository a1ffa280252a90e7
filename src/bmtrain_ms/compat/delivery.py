"""Gradients as they are given to who asked for them: whole, whatever autograd has found."""

from __future__ import annotations

from typing import Any, Callable, Iterable, Sequence

from mindspore import Parameter, Tensor

from .executor import GRAD_TAKES_HAS_AUX

Deliver = Callable[[Parameter, Tensor], Tensor]  # the whole gradient of a parameter, for what autograd has found


class Requested(dict):
    """The parameters that a backward pass is asked for, by id."""

    def __init__(self, params: Iterable[Parameter]):
        super().__init__((id(p), p) for p in params)
        self._of: dict[tuple[type, bool], dict[int, Parameter]] = {}

    def of(self, kind: type, others: bool = False) -> dict[int, Parameter]:
        """The parameters of a type, or all others; for who only reads. Each Block asks, and models have many parameters."""
        if (kind, others) not in self._of:
            self._of[kind, others] = {i: p for i, p in self.items() if isinstance(p, kind) is not others}
        return self._of[kind, others]


class Joined:
    """The gradients of parameters from several functions whose derivatives together are one backward pass.

    Attributes:
        grads: by id of the parameter; whole when the backward pass has ended. What no function was asked for is not there.
    """

    def __init__(self, params: Iterable[Parameter]):
        self.asked = Requested(params)
        self.grads: dict[int, Tensor] = {}

    def add(self, params: Sequence[Parameter], grads: Sequence[Tensor]) -> None:
        """What autograd has found for some of the parameters in one more function."""
        for p, grad in zip(params, grads):
            before = self.grads.get(id(p))
            self.grads[id(p)] = grad if before is None else before + grad

    def deliver(self, deliver: Deliver) -> None:
        """Replace each gradient by the whole of it, which `deliver` makes."""
        self.grads = {i: deliver(self.asked[i], found) for i, found in self.grads.items()}


def delivered(out: Any, deliver: Deliver, grad: Any, weights: Any, position: Any, *args: Any) -> Any:
    """The result of a backward pass, each parameter's gradient replaced by the whole of it.

    `grad`, `weights`, `position`, `args`: what the executor was asked for; a parameter may be among the arguments too.
    """
    arguments = args[int(GRAD_TAKES_HAS_AUX) :]
    by_list, by_place = (
        bool(weights is not None and grad.get_by_list),
        bool(grad.get_all or getattr(grad, "get_by_position", False)),
    )
    inputs, listed = out if by_list and by_place else (None, out) if by_list else (out, None)
    if by_list:
        listed = _whole(listed, as_tuple(weights), deliver)
    if inputs is not None and any(isinstance(x, Parameter) for x in arguments):
        chosen = range(len(arguments)) if grad.get_all else position if isinstance(position, (tuple, list)) else (position or 0,)
        inputs = _whole(inputs, [arguments[i] for i in chosen], deliver)
    if by_list:
        return (inputs, listed) if by_place else listed
    return inputs


def _whole(found: Any, of: Sequence[Any], deliver: Deliver) -> Any:
    """Gradients, one tensor or several, as they came."""
    whole = tuple(deliver(x, g) if isinstance(x, Parameter) else g for x, g in zip(of, as_tuple(found)))
    return whole if isinstance(found, (tuple, list)) else whole[0]


def as_tuple(x: Any) -> tuple[Any, ...]:
    """Several things, or one."""
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)
