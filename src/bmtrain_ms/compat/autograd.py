"""Differentiable functions of our own, on MindSpore's functional autograd (PyNative).

`custom_op` is what `torch.autograd.Function` is in PyTorch; 2.5 has no such thing, but a Cell with a `bprop` method is treated
that way by the executor. The cells made here carry nothing else (1 µs to make, a real `nn.Cell` takes 50–300 µs).
Parameters among the inputs get their gradient like any other input.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from itertools import zip_longest
from typing import Any, Callable, Iterator, Sequence

import wrapt
from mindspore import Parameter, Tensor, nn, ops
from mindspore._c_expression import Cell_
from mindspore.ops.composite import base as _composite

from .delivery import Deliver, Joined, Requested, as_tuple, delivered
from .executor import (
    GRAD_TAKES_HAS_AUX,
    NESTED,
    PyNativeExecutor,
    differentiated,
    executor,
    hookable,
    no_grad,
    recording,
    set_aside,
    under_way,
)

__all__ = [
    "Deliver",
    "Graph",
    "Joined",
    "Recorded",
    "backward_hooks",
    "closed",
    "custom_op",
    "custom_vjp",
    "differentiated",
    "hookable",
    "joined",
    "no_grad",
    "record",
    "recording",
    "references",
    "requested",
    "set_aside",
    "vjp",
]

Tensors = tuple[Tensor, ...]

# Called with the exception, or None, each time an outermost backward pass has ended. What they return is applied to the gradients
# of all parameters that were asked for, before anybody sees them.
backward_hooks: list[Callable[[BaseException | None], Deliver | None]] = []

_OLD = not GRAD_TAKES_HAS_AUX  # 2.5
_originals: list[tuple[Any, str, Any]] = []  # (owner, name, MindSpore's own function)
_open: list[weakref.ref[Recorded]] = []  # functions that are recorded and not differentiated yet, oldest first
_requested: list[Requested] = []  # what the outermost backward pass under way was asked for
_Grad = _composite._Grad
_grad_by_position = _Grad(get_by_position=True, sens_param=True)
_grad_by_list = _Grad(get_by_list=True, sens_param=True)
_grad_by_both = _Grad(get_by_position=True, get_by_list=True, sens_param=True)


@contextlib.contextmanager
def closed() -> Iterator[None]:
    """Refuse gradients that are taken inside the `with` statement: 2.5 may crash on tensors that another graph knows."""
    under_way.closed += 1
    try:
        yield
    except RuntimeError as error:
        if "In no_grad context" in str(error):  # MindSpore's own refusal, which does not say what to do
            raise RuntimeError(NESTED) from error
        raise
    finally:
        under_way.closed -= 1


class _Op(nn.Cell):
    """The least that the executor needs to see of a Cell with its own `bprop`."""

    def __init__(self, backward: Callable[[Tensors, Tensors], Sequence[Tensor | None]] | None):
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
        grads = self._backward(inputs, tuple(grads) if isinstance(grads, (tuple, list)) else (grads,))
        return tuple(ops.zeros_like(x) if g is None else g for x, g in zip_longest(inputs, grads))


class Graph(_Op):
    """The name under which the executor keeps what `vjp` has recorded. 2.5 keeps some 5 KB for each name for ever: reuse it."""

    def __init__(self) -> None:
        super().__init__(None)

    def __deepcopy__(self, memo: dict) -> Graph:
        return Graph()

    def __reduce__(self) -> tuple:
        return Graph, ()


def custom_op(
    forward: Callable[..., Tensors],
    backward: Callable[[Tensors], Sequence[Tensor | None]],
    *inputs: Tensor,
    captured: Callable[[], Sequence[Parameter]] = tuple,
) -> Tensors:
    """Run `forward(*inputs)` unrecorded and make `backward` its derivative.

    Args:
        forward: tensors -> tuple of floating-point tensors; may return an input itself, or one tensor twice.
        backward: gradients of the outputs -> one gradient per input; `None` stands for zero. Called at most once.
        inputs: tensors or Parameters; where none needs a gradient, `backward` is never called.
        captured: asked after `forward` has run: Parameters because of which `backward` is called too; it returns nothing for them.

    Returns:
        The outputs of `forward`, as a tuple.

    Raises:
        RuntimeError: inside a function whose gradient is taken in a function that is being differentiated itself: `backward` has
            no derivative.
    """
    return _recorded(forward, lambda _, grads: backward(grads), inputs, captured) if recording() else forward(*inputs)


def custom_vjp(
    forward: Callable[..., tuple[Tensors, Any]],
    backward: Callable[[Tensors, Any, Tensors], Sequence[Tensor | None]],
    *inputs: Tensor,
) -> Tensors:
    """`custom_op` whose forward says what its backward needs (JAX: `custom_vjp`).

    Args:
        forward: tensors -> (tuple of floating-point tensors, residuals of any kind but inputs).
        backward: (inputs, residuals, gradients of the outputs) -> one gradient per input; `None` stands for zero. The inputs are
            other objects than `forward` had: MindSpore keeps them, and who looks whether somebody else does must not find us.
        inputs: see `custom_op`.

    Returns:
        The outputs of `forward`, as a tuple.
    """
    if not recording():
        return forward(*inputs)[0]
    kept: list[Any] = []

    def run(*xs: Tensor) -> Tensors:
        outputs, residuals = forward(*xs)
        kept.append(residuals)
        return outputs

    return _recorded(run, lambda xs, grads: backward(xs, kept.pop(), grads), inputs)


def _recorded(
    forward: Callable[..., Tensors],
    backward: Callable[[Tensors, Tensors], Sequence[Tensor | None]],
    inputs: Tensors,
    captured: Callable[[], Sequence[Parameter]] = tuple,
) -> Tensors:
    if under_way.forwards > 1:
        raise RuntimeError(NESTED)
    under_way.set_aside += 1  # `set_aside()` would take 1 µs more
    try:
        with no_grad():
            outputs = _distinct(forward(*inputs), inputs)
    finally:
        under_way.set_aside -= 1
    if _OLD:
        # MindSpore's thread brings to the graph what operations have recorded; this goes past it. Where the thread is late (in the
        # first pass of a process), 2.5 forgets the history of an input: zero gradients. 0.7 µs on CPU; a device is waited for.
        executor.sync()
    recorded = executor.call_custom_bprop(_Op(backward), outputs, *inputs, *captured())
    if _OLD:  # it holds inputs of what has a `bprop` as Python's objects
        for x in inputs:
            if not isinstance(x, Parameter):
                x.held_by_graph = getattr(x, "held_by_graph", 0) + 1
    recorded = outputs if recorded is None else recorded  # 2.5 marks the outputs in place
    if under_way.hookable:
        return tuple(x.copy() for x in recorded)
    if _OLD:  # it ignores hooks on outputs of what has a `bprop`
        for x in recorded:
            x.ignores_hooks = True
    return recorded


def references(tensor: Tensor) -> int:
    """How often Python refers to a tensor; to be compared with an earlier answer.

    The inputs of a recorded `custom_op` do not count: 2.5 holds them as Python's objects, those of its own operations it does not.
    """
    return sys.getrefcount(tensor) - getattr(tensor, "held_by_graph", 0)


def _distinct(outputs: Tensors, inputs: Sequence[Tensor]) -> Tensors:
    """The outputs, none of which is an input or another output: the executor marks outputs in place.

    2.5 would forget the other uses of the tensor, and gives a Parameter that comes out as it went in a gradient of zero.
    """
    taken = {id(x) for x in inputs}
    distinct = []
    for x in outputs:
        distinct.append(_detach(x) if id(x) in taken or isinstance(x, Parameter) else x)  # shares memory, but for Parameters
        taken.add(id(x))
    return tuple(distinct)


def requested() -> Requested:
    """The parameters that the backward pass under way was asked for, by id; none outside of one."""
    return _requested[-1] if _requested else Requested(())


class Recorded:
    """A function that has run recorded, and is differentiated later: others may run, and be differentiated, in between.

    Attributes:
        outputs: what it returned.
        forgotten: an error elsewhere had MindSpore forget all that is recorded.
    """

    def __init__(self, graph: Graph, inputs: Sequence[Tensor], outputs: Tensors):
        self._graph, self._inputs, self.outputs = graph, inputs, outputs
        self.forgotten, self._spent = False, False

    def pull(self, cotangents: Tensors, weights: Sequence[Parameter] = ()) -> Tensors:
        """Gradients of (outputs * cotangents).sum() with respect to each input, then each weight; zeros where unused. Once.

        Raises:
            RuntimeError: it was pulled before; another function failed since, and MindSpore has forgotten this one with it; or
                MindSpore 2.5, and a Block would be recomputed while younger functions are recorded.
            ValueError: there is neither an input nor a weight.
        """
        if not (self._inputs or weights):
            raise ValueError("there is nothing to differentiate with respect to: neither an input nor a parameter")
        if self.forgotten:
            raise RuntimeError(
                "this function cannot be differentiated any more: an error in another one, since it was recorded, had MindSpore "
                "forget everything that is recorded. Begin again with the first micro-batch"
            )
        if self._spent:
            raise RuntimeError("this function was differentiated already, and its record is gone: record it once more")
        self._spent = True
        # A one-element tuple and its element are different outputs to the executor; the cotangent must match.
        last = cotangents[0] if len(self.outputs) == 1 else cotangents
        aux = (False,) if GRAD_TAKES_HAS_AUX else ()
        places = tuple(range(len(self._inputs))) if self._inputs else None
        how = _grad_by_both if self._inputs and weights else _grad_by_list if weights else _grad_by_position
        with _pulled(self):
            found = executor.grad(self._graph, how, list(weights) or None, places, *aux, *self._inputs, last)
        self._inputs = ()
        if not (places and weights):
            return tuple(map(_of_python, as_tuple(found)))
        return tuple(map(_of_python, (*as_tuple(found[0]), *as_tuple(found[1]))))


def record(
    function: Callable[..., Tensors], inputs: Sequence[Tensor], leaves: Sequence[Tensor] = (), graph: Graph | None = None
) -> Recorded:
    """Run `function(*inputs, *leaves)` recorded, to be differentiated later.

    Args:
        inputs: may have a history, which is not followed.
        leaves: more inputs, which have none: no Parameters either.
        graph: the one of earlier calls; not one that is in use. Several functions that are recorded at once need one each.

    Raises:
        RuntimeError: inside a function that is being differentiated, or MindSpore 2.5 would lose functions recorded later.
    """
    nested = under_way.depth > 0
    if under_way.forwards and not nested:
        raise RuntimeError(
            "a function cannot be recorded for later while another one is being differentiated, which would lose the rest of its "
            "own gradient: call record outside of value_and_grad"
        )
    if nested and under_way.younger and _OLD:
        raise RuntimeError(
            "MindSpore 2.5 loses functions that were recorded later when a Block is recomputed in the backward pass of an earlier "
            "one: use Block(use_checkpoint=False), or let backward passes come youngest first"
        )
    cell = Graph() if graph is None else graph
    detached = [*map(_detach, inputs), *leaves]
    executor.set_grad_flag(True)
    executor.new_graph(cell, *detached)
    with _explained():
        outputs = _clear_after_failure(function, None, tuple(detached), {})
    executor.end_graph(cell, outputs[0] if len(outputs) == 1 else outputs, *detached)
    recorded = Recorded(cell, detached, outputs)
    if not nested:
        executor.set_grad_flag(False)  # what comes now is not recorded, before the backward pass
        _open.append(weakref.ref(recorded))
    return recorded


@contextlib.contextmanager
def _pulled(recorded: Recorded) -> Iterator[None]:
    """Inside the `with` statement it is known whether there are younger functions that are recorded."""
    _open[:] = [reference for reference in _open if reference() is not None]
    found = [i for i, reference in enumerate(_open) if reference() is recorded]
    if not found:  # recomputation, inside of another backward pass
        yield
        return
    under_way.younger = found[0] < len(_open) - 1
    del _open[found[0]]
    try:
        yield
    finally:
        under_way.younger = False


def vjp(
    function: Callable[..., Tensors],
    inputs: Sequence[Tensor],
    cotangents: Tensors,
    leaves: Sequence[Tensor] = (),
    graph: Graph | None = None,
    captured: Callable[[], Sequence[Parameter]] = tuple,
) -> Tensors:
    """Run `function(*inputs, *leaves)` recorded and pull `cotangents` back through it at once.

    Usable inside the backward of a `custom_op`: this is what recomputation is made of.

    Args:
        inputs, leaves, graph: as in `record`.
        captured: asked after `function` has run: Parameters that it may have used without being given them.

    Returns:
        One gradient per input, leaf and captured Parameter; zeros where it was not used.
    """
    recorded = record(function, inputs, leaves, graph)
    return recorded.pull(cotangents, list(captured()))


def _of_python(x: Any) -> Tensor:
    """The Python tensor around what 2.5's executor returns where it was called from C++."""
    return x if isinstance(x, Tensor) else Tensor(x, internal=True)


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
    wrappers = [(PyNativeExecutor, "grad", _watch), *((owner, forward, _record) for owner in owners)]
    if _OLD:
        from mindspore.common._stub_tensor import StubTensor

        wrappers += [(owner, "register_hook", _refuse_what_is_ignored) for owner in (Tensor, StubTensor)]
    for owner, name, wrapper in wrappers:
        _originals.append((owner, name, vars(owner)[name]))
        wrapt.wrap_function_wrapper(owner, name, wrapper)


def uninstall() -> None:
    """Stop watching; idempotent."""
    while _originals:
        setattr(*_originals.pop())


def _clear() -> None:
    """Have MindSpore forget all that is recorded."""
    executor.clear_res()
    for reference in _open:
        recorded = reference()
        if recorded is not None:
            recorded.forgotten = True
    _open.clear()


def _record(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if under_way.closed:
        raise RuntimeError(NESTED)
    if args and hasattr(args[0], "refuse_recording"):
        args[0].refuse_recording()  # 2.5 does not say that it records what is neither a function nor a Cell
    return _clear_after_failure(wrapped, instance, args, kwargs)


def _clear_after_failure(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """Upstream goes on recording after an exception in forward; the next backward of a `custom_op` then crashes 2.5."""
    under_way.forwards += 1
    try:
        return wrapped(*args, **kwargs)
    except BaseException:
        if under_way.forwards == 1 and under_way.depth == 0:
            _clear()
        raise
    finally:
        under_way.forwards -= 1


def _refuse_what_is_ignored(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if recording() and getattr(instance, "ignores_hooks", False):
        raise RuntimeError(
            "MindSpore 2.5 ignores a hook on a tensor that a Block, or another operation of bmtrain_ms, returns: take y = y.copy() "
            "and go on with that, whose hooks work"
        )
    return wrapped(*args, **kwargs)


def _watch(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    under_way.depth += 1
    # a gradient that is taken in the forward pass of another one ends nothing: that one still has its backward pass before it
    outermost = under_way.depth == 1 and not under_way.forwards and not under_way.joins
    if outermost:
        weights = args[2]
        asked = [*(() if weights is None else as_tuple(weights)), *args[4:]]
        _requested.append(Requested(p for p in asked if isinstance(p, Parameter)))
    error: BaseException | None = None
    out: Any = None
    try:
        out = wrapped(*args, **kwargs)
    except BaseException as caught:
        error = caught
        raise
    finally:
        under_way.depth -= 1
        if outermost:
            try:
                for deliver in _ended(error):
                    out = delivered(out, deliver, *args[1:])
            finally:
                _requested.pop()
        del error  # its traceback holds this frame
    return out


def _ended(error: BaseException | None) -> list[Deliver]:
    """The outermost backward pass is over: what makes its gradients whole, if there are any."""
    if error is not None:
        _clear()  # otherwise 2.10 refuses the next, healthy, backward pass
    delivers = [hook(error) for hook in tuple(backward_hooks)]
    return [deliver for deliver in delivers if deliver is not None and error is None]


@contextlib.contextmanager
def joined(params: Sequence[Parameter]) -> Iterator[Joined]:
    """Inside the `with` statement functions that were recorded are pulled, and together they are one backward pass: gradients of
    `params`, which are given to `Joined.add` as they come, are whole when it has ended."""
    found = Joined(params)
    under_way.joins += 1
    _requested.append(found.asked)
    error: BaseException | None = None
    try:
        yield found
    except BaseException as caught:
        error = caught
        raise
    finally:
        under_way.joins -= 1
        try:
            for deliver in _ended(error):
                found.deliver(deliver)
        finally:
            _requested.pop()
        del error
