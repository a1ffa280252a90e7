"""Make `mindspore.Parameter` subclassable.

Upstream fact (2.5.0, 2.7.2, 2.10.0): `Parameter.__new__` asks `Parameter._get_base_class` for the class to instantiate, and that
method answers for the literal class `Parameter`. `class MyParameter(Parameter)` therefore yields plain parameters.
The patch can go when `type(MyParameter(t))` derives from `MyParameter` on an unpatched MindSpore (a test says so).

[Note: no-copy path]
`_get_parameter_new_args(data, count)` adopts the caller's tensor without a copy only if `count == 4`, the reference count that
CPython 3.11 shows inside `__new__` for a temporary passed without keywords (with `name=` it shows 5, and upstream copies).
Frames that a wrapper adds change the count. So `install()` measures on this interpreter how many references the wrapper adds to
a temporary in each style of call, and the wrapper subtracts them: what copied still copies, what did not still does not.
"""

from __future__ import annotations

import copy
import functools
import sys
from typing import Any

import wrapt
from mindspore import Parameter, Tensor
from mindspore.common import parameter as _upstream

from .reads import ReadCopy

_TARGET = "mindspore.common.parameter"
_PATCHED = ("__new__", "_get_base_class", "__deepcopy__", "__reduce_ex__")

_originals: dict[str, Any] = {}
_combined: dict[tuple[type, type], type] = {}  # (user class, tensor class) -> class of the instances; by class, never by name
_added_references: dict[str, int] = {}  # by `_style` of the call; see [Note: no-copy path]


def is_installed() -> bool:
    """Whether `Parameter` is patched."""
    return bool(_originals)


def install() -> None:
    """Replace the four functions; idempotent."""
    if is_installed():
        return
    upstream = _count_references_to_temporaries()
    _originals.update({name: vars(Parameter)[name] for name in _PATCHED})
    wrapt.wrap_function_wrapper(_TARGET, "Parameter.__new__", _new)
    wrapt.wrap_function_wrapper(_TARGET, "Parameter.__deepcopy__", _deepcopy)
    wrapt.wrap_function_wrapper(_TARGET, "Parameter.__reduce_ex__", _reduce_ex)
    Parameter._get_base_class = classmethod(_get_base_class)
    _added_references.update(dict.fromkeys(upstream, 0))
    patched = _count_references_to_temporaries()
    _added_references.update({style: patched[style] - upstream[style] for style in patched})


def uninstall() -> None:
    """Put the original functions back; idempotent."""
    for name, original in _originals.items():
        setattr(Parameter, name, original)
    _originals.clear()


def original(name: str) -> Any:
    """MindSpore's own function behind `Parameter.<name>`, patched or not."""
    return _originals.get(name) or vars(Parameter)[name]


def user_class(obj: Parameter) -> type:
    """The class that was named when `obj` was made: `Parameter` or a subclass."""
    generated = {*_combined.values(), *Parameter._base_type.values()}
    return next(cls for cls in type(obj).__mro__ if cls not in generated)


def adopt(cls: type, data: Tensor) -> Any:
    """What `cls.__new__` returns, made without a copy: the new parameter shares memory with `data`."""
    return _build(cls, data, 4)


def _new(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    cls, data = args[0], args[1] if len(args) > 1 else kwargs.get("default_input")
    if data is None or _upstream_combines(data):
        return wrapped(*args, **kwargs)  # its own error, or a branch that is right for subclasses already
    return _build(cls, data, sys.getrefcount(data) - _added_references[_style(kwargs)])


def _style(kwargs: dict) -> str:
    """What decides how many references a call holds to the data."""
    return "data by keyword" if "default_input" in kwargs else "keywords" if kwargs else "positional"


def _upstream_combines(data: Any) -> bool:
    """2.10 combines Parameter with subclasses of Tensor by itself."""
    return (
        hasattr(Parameter, "_get_combined_class")
        and isinstance(data, Tensor)
        and not isinstance(data, Parameter)
        and type(data) is not Tensor
        and not isinstance(data, ReadCopy)
    )


def _build(cls: type, data: Any, count: int) -> Any:
    """The body of upstream's `__new__`, for `cls` instead of `Parameter`."""
    lazy = isinstance(data, Tensor) and data.has_init
    tensor_class, *tensor_args = Parameter._get_parameter_new_args(data, count, getattr(cls, "init_param", True))
    obj = tensor_class.__new__(cls._get_base_class(tensor_class))
    tensor_class.__init__(obj, *tensor_args)
    obj.init_mode = None
    obj.is_default_input_init = lazy
    if obj.has_init:
        obj.init_mode = data
    elif hasattr(_upstream, "offload_context"):  # 2.5: parameters can live in files; later releases dropped the feature
        _upstream._offload_if_config(obj)
    return obj


def _get_base_class(cls: type, tensor_class: type) -> type:
    if cls is Parameter:
        return _originals["_get_base_class"].__func__(tensor_class)
    key = (cls, tensor_class)
    if key not in _combined:
        _combined[key] = type(cls.__name__, key, {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    return _combined[key]


def _deepcopy(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    if user_class(instance) is Parameter:
        return wrapped(*args, **kwargs)
    memo = args[0] if args else kwargs["memodict"]
    rebuild, (cls, data, *flags, state) = instance.__reduce_ex__(4)
    duplicate = rebuild(cls, copy.deepcopy(data, memo), *flags, copy.deepcopy(state, memo))
    memo[id(instance)] = duplicate
    return duplicate


def _reduce_ex(wrapped: Any, instance: Any, args: tuple, kwargs: dict) -> Any:
    cls = user_class(instance)
    if cls is Parameter:
        return wrapped(*args, **kwargs)
    data = instance.init_mode if instance.init_mode is not None else Tensor(instance.asnumpy())
    state = {name: value for name, value in vars(instance).items() if name not in _upstream_attributes()}
    return _rebuild, (cls, data, instance.name, instance.requires_grad, instance.layerwise_parallel, state)


@functools.cache
def _upstream_attributes() -> frozenset[str]:
    """Names in the `__dict__` of a plain Parameter: MindSpore's own state, which is rebuilt and not copied."""
    return frozenset(vars(Parameter(Tensor([0.0]), name="plain")))


def _rebuild(cls: type, data: Tensor, name: str, requires_grad: bool, layerwise: bool, state: dict) -> Parameter:
    """Recreate an instance of a subclass without running the subclass's own constructor (copy, clone, pickle)."""
    obj = Parameter.__new__(cls, data)
    Parameter.__init__(obj, data, name=name, requires_grad=requires_grad, layerwise_parallel=layerwise)
    vars(obj).update(state)
    return obj


def _count_references_to_temporaries() -> dict[str, int]:
    """What `_get_parameter_new_args` is told for a temporary, by style of the call."""
    seen = []
    descriptor = vars(Parameter)["_get_parameter_new_args"]
    original_args = Parameter._get_parameter_new_args

    def observe(data: Any, count: int, init_param: bool = True) -> Any:
        seen.append(count)
        return original_args(data, count, init_param)

    Parameter._get_parameter_new_args = staticmethod(observe)
    try:
        Parameter(Tensor([0.0]))
        Parameter(Tensor([0.0]), name="temporary")
        Parameter(default_input=Tensor([0.0]))
    finally:
        Parameter._get_parameter_new_args = descriptor
    return dict(zip(("positional", "keywords", "data by keyword"), seen))
