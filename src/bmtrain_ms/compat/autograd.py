"""Differentiable functions of our own, on MindSpore's functional autograd (PyNative).

`custom_op` is what `torch.autograd.Function` is in PyTorch; 2.5 has no such thing, but a Cell with a `bprop` method is treated
that way by the executor. The cells made here carry nothing else (1 µs to make, a real `nn.Cell` takes 50–300 µs).
Parameters among the inputs get their gradient like any other input.
"""

from __future__ import annotations

import contextlib
from typing import Any, Callable, Iterator, Sequence

import wrapt
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import Cell_
from mindspore.ops.composite import base as _composite

from .executor import GRAD_TAKES_HAS_AUX, PyNativeExecutor, executor, no_grad, recording

__all__ = ["Graph", "backward_hooks", "custom_op", "hookable", "no_grad", "recording", "vjp"]

Tensors = tuple[Tensor, ...]

# Called with the exception, or None, each time an outermost backward pass has ended.
backward_hooks: list[Callable[[BaseException | None], None]] = []

_originals: list[tuple[Any, str, Any]] = []  # (owner, name, MindSpore's own function)
_depth = [0]  # backward passes under way: recomputation nests them
_forwards = [0]  # recorded forward passes of `value_and_grad` under way
_hookable = [0]  # contexts that want hooks on outputs of `custom_op`
_Grad = _composite._Grad
_grad_by_position = _Grad(get_by_position=True, sens_param=True)


@contextlib.contextmanager
def hookable() -> Iterator[None]:
    """Let `Tensor.register_hook` work on outputs of `custom_op` too, at the cost of a copy of each; on 2.5 it would be ignored."""
    _hookable[0] += 1
    try:
        yield
    finally:
        _hookable[0] -= 1


class _Op(nn.Cell):
    """The least that the executor needs to see of a Cell with its own `bprop`."""

    def __init__(self, backward: Callable[[Tensors], Sequence[Tensor | None]] | None):
        Cell_.__init__(self, "")
        self.__dict__["_backward"] = backward

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def __del__(self) -> None:
        """nn.Cell's looks for state that is not here."""

    def bprop(self, *args: Any) -> tuple:
        """args: the inputs, the output, the gradient of the output."""
        grads = args[-1]
        inputs = args[:-2]
        grads = self._backward(tuple(grads) if isinstance(grads, (tuple, list)) else (grads,))
        return tuple(ops.zeros_like(x) if g is None else g for x, g in zip(inputs, grads))


class Graph(_Op):
    """The name under which the executor keeps what `vjp` has recorded. 2.5 keeps some 5 KB for each name for ever: reuse it."""

    def __init__(self) -> None:
        super().__init__(None)

    def __deepcopy__(self, memo: dict) -> Graph:
        return Graph()

    def __reduce__(self) -> tuple:
        return Graph, ()


def custom_op(forward: Callable[..., Tensors], backward: Callable[[Tensors], Sequence[Tensor | None]], *inputs: Tensor) -> Tensors:
    """Run `forward(*inputs)` unrecorded and make `backward` its derivative.

    Args:
        forward: tensors -> tuple of floating-point tensors; may return an input itself.
        backward: gradients of the outputs -> one gradient per input; `None` stands for zero. Called at most once.
        inputs: tensors or Parameters; where none needs a gradient, `backward` is never called.

    Returns:
        The outputs of `forward`, as a tuple.
    """
    if not recording():
        return forward(*inputs)
    with no_grad():
        outputs = forward(*inputs)
    recorded = executor.call_custom_bprop(_Op(backward), outputs, *inputs)
    recorded = outputs if recorded is None else recorded  # 2.5 marks the outputs in place
    return tuple(x.copy() for x in recorded) if _hookable[0] else recorded


def vjp(
    function: Callable[..., Tensors],
    inputs: Sequence[Tensor],
    cotangents: Tensors,
    leaves: Sequence[Tensor] = (),
    graph: Graph | None = None,
) -> Tensors:
    """Run `function(*inputs, *leaves)` recorded and pull `cotangents` back through it at once.

    Usable inside the backward of a `custom_op`: this is what recomputation is made of.

    Args:
        inputs: may have a history, which is not followed.
        leaves: more inputs, which have none: no Parameters either.
        graph: the one of earlier calls for the same function; not one that is in use.

    Returns:
        One gradient per input and leaf, zeros where it was not used.
    """
    cell = Graph() if graph is None else graph
    detached = [*map(_detach, inputs), *leaves]
    executor.set_grad_flag(True)
    executor.new_graph(cell, *detached)
    with _explained():
        outputs = _clear_after_failure(function, None, tuple(detached), {})
    # A one-element tuple and its element are different outputs to the executor; the cotangent must match.
    if len(outputs) == 1:
        outputs, cotangents = outputs[0], cotangents[0]
    executor.end_graph(cell, outputs, *detached)
    aux = (False,) if GRAD_TAKES_HAS_AUX else ()
    grads = executor.grad(cell, _grad_by_position, None, tuple(range(len(detached))), *aux, *detached, cotangents)
    return tuple(grads) if isinstance(grads, (tuple, list)) else (grads,)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if "jit_compile_info_" not in str(error):
            raise
        raise RuntimeError(
            "a function under @ms.jit is called in a checkpointed Block, and MindSpore 2.5 cannot differentiate what it has "
            "compiled in an unrecorded pass: leave @ms.jit out, or use Block(use_checkpoint=False)"
        ) from error


def _detach(x: Tensor) -> Tensor:
    """`x` without its history. A detached Parameter confuses the 2.5 executor: take its value first."""
    with no_grad():
        return ops.stop_gradient(x * 1 if isinstance(x, Parameter) else x)


def original_grad() -> Any:
    """MindSpore's own `_PyNativeExecutor.grad`, patched or not."""
    return _originals[0][2] if _originals else vars(PyNativeExecutor)["grad"]


def install() -> None:
    """Watch for the end of backward passes, and for failed forward passes; idempotent."""
    if _originals:
        return
    forward = "_pynative_forward_run"  # 2.5: a method of two classes; 2.10: a function
    owners = [owner for owner in (_composite, _composite.GradOperation, _Grad) if forward in vars(owner)]
    wrappers = [(PyNativeExecutor, "grad", _watch), *((owner, forward, _clear_after_failure) for owner in owners)]
    for owner, name, wrapper in wrappers:
        _originals.append((owner, name, vars(owner)[name]))
        wrapt.wrap_function_wrapper(owner, name, wrapper)


def uninstall() -> None:
    """Stop watching; idempotent."""
    while _originals:
        setattr(*_originals.pop())


def _clear_after_failure(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """Upstream goes on recording after an exception in forward; the next backward of a `custom_op` then crashes 2.5."""
    _forwards[0] += 1
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        if _forwards[0] == 1 and _depth[0] == 0:
            executor.clear_res()
        raise
    finally:
        _forwards[0] -= 1


def _watch(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    _depth[0] += 1
    error: BaseException | None = None
    try:
        return wrapped(*args, **kwargs)
    except BaseException as caught:
        error = caught
        raise
    finally:
        _depth[0] -= 1
        if _depth[0] == 0:
            if error is not None:
                executor.clear_res()  # otherwise 2.10 refuses the next, healthy, backward pass
            for hook in tuple(backward_hooks):
                hook(error)
        del error  # its traceback holds this frame
