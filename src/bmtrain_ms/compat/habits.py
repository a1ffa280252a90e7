"""What works in MindSpore and cannot work with shards: each is refused in one sentence that says what to do instead.

MindSpore's own messages come from deep inside, or there are none: `save_checkpoint` would write this rank's shard as the whole.
What is wrapped here is looked up by name when MindSpore calls it, so it does not matter how a script imports it.
"""

from __future__ import annotations

import dis
import importlib
import types
from typing import Any, Callable, Iterator

import mindspore as ms
import wrapt
from mindspore import Parameter, experimental, nn, ops
from mindspore.train import amp as _amp
from mindspore.train import serialization as _serialization

from .cells import parameter_table
from .executor import JitExecutor
from .reads import ReadCopy, no_write

try:
    _parser = importlib.import_module("mindspore.graph._parse.parser")  # 2.10
except ImportError:
    _parser = importlib.import_module("mindspore._extends.parse.parser")  # 2.5

sharded_types: list[type] = []  # of parameters; `zero.param` adds its own
in_use: list[Callable[[], bool]] = []  # whether ranks share a model now; `comm.world` adds its own
# (an optimizer of MindSpore's, its gradients) -> those that it is to get; `optim.native` adds its own
before_updates: list[Callable[[Any, Any], Any]] = []

_originals: list[tuple[Any, str, Any]] = []  # (owner, name, MindSpore's own function, or None: it is inherited)

# operations that write their first argument; some of them write memory that only MindSpore knows, so nobody would notice
_WRITING = (
    *("Assign", "AssignAdd", "AssignSub", "ScatterUpdate", "ScatterAdd", "ScatterSub", "ScatterMul", "ScatterDiv", "ScatterMax"),
    *("ScatterMin", "ScatterNdUpdate", "ScatterNdAdd", "ScatterNdSub", "ScatterNdMul", "ScatterNdDiv", "ScatterNdMax"),
    *("ScatterNdMin", "ScatterNonAliasingAdd"),
)
_OPTIMIZERS = (nn.Optimizer, experimental.optim.Optimizer)
_JIT = (
    "bmtrain_ms runs in PyNative mode, and a compiled graph cannot gather parameters: keep ms.set_context(mode=ms.PYNATIVE_MODE), "
    "and put @ms.jit on functions without parameters only"
)


def is_sharded(x: Any) -> bool:
    """Whether it is a parameter of which this rank has a shard."""
    return isinstance(x, tuple(sharded_types))


def holds_shards(cell: Any) -> bool:
    """Whether it is a Cell with such parameters, at any depth."""
    return isinstance(cell, nn.Cell) and any(is_sharded(p) for _, c in cell.cells_and_names() for p in parameter_table(c).values())


def refuse_graph_mode(what: str) -> None:
    """Raise where MindSpore would compile.

    Raises:
        RuntimeError: it is in GRAPH_MODE.
    """
    if ms.get_context("mode") == ms.GRAPH_MODE:
        raise RuntimeError(f"{what} was called in GRAPH_MODE: {_JIT}")


def refuse_parallel_mode() -> None:
    """Raise where MindSpore itself would share the work out.

    Raises:
        RuntimeError: its parallel mode is not the ordinary one.
    """
    mode = ms.get_auto_parallel_context("parallel_mode")
    if mode != ms.ParallelMode.STAND_ALONE:
        raise RuntimeError(_parallel(mode))


def _parallel(mode: Any) -> str:
    return (
        f"parallel_mode={str(mode)!r} makes MindSpore share the work out, as bmtrain_ms does already (shards, means of gradients): "
        "leave it out, or undo it with ms.reset_auto_parallel_context()"
    )


def refuse_recompute(path: str, cell: nn.Cell) -> None:
    """Raise where MindSpore would recompute a cell with the parameters that it had before it was wrapped: gradients would be 0.

    Raises:
        ValueError: `cell.recompute()` was called.
    """
    if getattr(cell, "_recompute_cell", None) is not None:
        raise ValueError(
            f"{type(cell).__name__} {path or '(the outermost)'} was set to recompute() before it was wrapped: leave that out, a "
            "Block recomputes by itself (use_checkpoint=True)"
        )


def install() -> None:
    """Wrap the functions; idempotent."""
    if _originals:
        return
    wrappers = [
        (nn.Cell, "compile_and_run", lambda wrapped, cell, args, kwargs: _unless_shards(wrapped, cell.construct, args, kwargs)),
        (JitExecutor, "compile", lambda wrapped, executor, args, kwargs: _unless_shards(wrapped, executor.fn, args, kwargs)),
        # of what these two call; MindSpore logs what is raised here
        (_parser.Parser, "__init__", lambda wrapped, _, args, kwargs: _unless_shards(wrapped, args[0], args, kwargs)),
        (_serialization, "_convert_save_obj_to_param_list", _refuse_saving),
        (_serialization, "_update_param", _load_whole),
        (_amp, "_auto_mixed_precision_rewrite", _refuse_rewriting),
        (ms.context, "_set_auto_parallel_context", _refuse_parallel),
        *((optimizer, "__call__", _update) for optimizer in _OPTIMIZERS),
        *((getattr(ops, name), "__call__", _refuse_writing) for name in _WRITING if hasattr(ops, name)),
    ]
    for owner, name, wrapper in wrappers:
        _originals.append((owner, name, vars(owner).get(name)))
        wrapt.wrap_function_wrapper(owner, name, wrapper)


def uninstall() -> None:
    """Put MindSpore's own back; idempotent."""
    while _originals:
        owner, name, original = _originals.pop()
        if original is None:  # inherited
            delattr(owner, name)
        else:
            setattr(owner, name, original)


def _update(wrapped: Any, optimizer: Any, args: tuple, kwargs: dict) -> Any:
    """An optimizer of MindSpore's, called by somebody's own loop."""
    if args:
        for prepare in before_updates:
            args = (prepare(optimizer, args[0]), *args[1:])
    return wrapped(*args, **kwargs)


def _unless_shards(wrapped: Any, function: Any, args: tuple, kwargs: dict) -> Any:
    """Let MindSpore compile what reads no shards."""
    if any(_reads_shards(x, function) for x in _within_reach(function)):
        name = getattr(function, "__qualname__", type(function).__name__)
        raise RuntimeError(f"MindSpore is about to compile {name}, which calls a sharded model: {_JIT}")
    return wrapped(*args, **kwargs)


def _within_reach(function: Any) -> Iterator[Any]:
    """What a function that MindSpore parses may call or read."""
    yield getattr(function, "__self__", None)
    plain = function.__func__ if isinstance(function, types.MethodType) else function
    code = getattr(plain, "__code__", None)
    if code is None:
        return
    for cell in plain.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # not set yet
            continue
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    yield from (plain.__globals__[name] for name in names if name in plain.__globals__)


def _reads_shards(x: Any, function: Any) -> bool:
    """A method of a layer may be compiled if it does without the layer's parameters; an activation, say."""
    if not isinstance(x, nn.Cell) or isinstance(x, _OPTIMIZERS):  # which update shards as any other parameters
        return is_sharded(x)
    if x is getattr(function, "__self__", None) and function.__name__ != "construct":
        return any(is_sharded(p) and name in function.__code__.co_names for name, p in parameter_table(x).items())
    return holds_shards(x)


def _refuse_saving(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    saved = args[0] if args else kwargs.get("save_obj")
    found = next((p for p in _parameters_of(saved) if is_sharded(p)), None)
    if found is not None:
        raise TypeError(
            f"ms.save_checkpoint would write this rank's shard of {found.name} as if it were the whole parameter: use bms.save("
            "model, path), which all ranks call, or a bms.checkpoint.Checkpointer"
        )
    return wrapped(*args, **kwargs)


def _parameters_of(saved: Any) -> Iterator[Any]:
    """The parameters in what `save_checkpoint` takes: a Cell, a list of dicts with a name and data, or a dict of names."""
    if isinstance(saved, nn.Cell):
        yield from (p for _, p in saved.parameters_and_names())
    elif isinstance(saved, dict):
        yield from saved.values()
    elif isinstance(saved, list):
        yield from (entry.get("data") for entry in saved if isinstance(entry, dict))


def _load_whole(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    """`load_param_into_net` of a checkpoint that has the whole parameter."""
    p, new = args[:2]
    if not is_sharded(p):
        return wrapped(*args, **kwargs)
    shape = tuple(getattr(new, "shape", ()))
    if shape != p.full_shape:
        raise RuntimeError(
            f"{p.name} has the full shape {p.full_shape}, the values to load {shape}: ms.load_param_into_net needs whole "
            "parameters, also where each rank has a shard; bms.load(model, path) loads what bms.save has written"
        )
    strict = args[2] if len(args) > 2 else kwargs.get("strict_load", False)
    if new.dtype != p.dtype and not _serialization._type_convert(p, new, strict):
        raise RuntimeError(
            f"{p.name} is {p.dtype}, the values to load are {new.dtype}, which ms.load_param_into_net does not convert"
        )
    p.copy_full(new if isinstance(new, Parameter) else ms.Tensor(new))
    return None


def _refuse_rewriting(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    network = args[0] if args else kwargs.get("network")
    if holds_shards(network):
        raise RuntimeError(
            "mixed precision of this level makes another class of the model's source, which the sharded model no longer has: call "
            "amp.auto_mixed_precision first and BMTrainModelWrapper on what it returns, or use to_float or level O3"
        )
    return wrapped(*args, **kwargs)


def _refuse_parallel(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    mode = kwargs.get("parallel_mode")
    if mode not in (None, ms.ParallelMode.STAND_ALONE) and any(ask() for ask in in_use):
        raise RuntimeError(_parallel(mode))
    return wrapped(*args, **kwargs)


def _refuse_writing(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if args and isinstance(args[0], ReadCopy):
        raise RuntimeError(no_write(args[0].read_of))
    return wrapped(*args, **kwargs)
