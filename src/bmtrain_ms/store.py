"""Objects between ranks, and BMTrain's names for saving and loading (BMTrain: `store`).

Objects travel as JSON with arrays beside it, never as pickles: what arrives can do nothing but be data.
"""

from __future__ import annotations

import base64
import json
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from bmtrain_ms_base.absent import absent

from .checkpoint import load, load_state_dict, save, state_dict
from .comm import Engine, all_gather_bytes
from .comm import world as current_world
from .compat.runtime import from_host, host_array, numpy_dtype

__all__ = ["allgather_objects", "broadcast_object", "load", "load_state_dict", "save", "state_dict"]

_save_to_rank0 = state_dict  # BMTrain's name, which ModelCenter uses
_MARK = "__bmtrain_ms__"
_WHOLE = "state_dict(model) gives rank 0 whole arrays, save(model, file) writes them without holding the model"
__getattr__ = absent(
    __name__,
    {
        "_save_to_local_rank0": _WHOLE,
        "_save_to_infer_model": _WHOLE,
        "DistributedTensorWrapper": "a DistributedParameter says where its shard lies: owned, full_shape, gather()",
        "DistributedStateDictWrapper": "checkpoint.Checkpointer saves and loads shards",
    },
)


def broadcast_object(obj: Any, comm: Engine | None = None, src: int = 0) -> Any:
    """Rank `src`'s object on every rank; the others' argument is not looked at. All ranks call it.

    Args:
        obj: None, bool, int, float, str, bytes, lists, tuples, dicts of such, NumPy arrays and scalars; a Tensor arrives as one.

    Raises:
        TypeError: another type is in it; on every rank.
        ValueError: there is no rank `src`.
    """
    engine = comm or current_world().everyone
    if not isinstance(src, int) or not 0 <= src < engine.size:
        raise ValueError(f"src must be one of the ranks 0 to {engine.size - 1}, not {src!r}")
    return _decoded(all_gather_bytes(engine, _encoded(obj) if engine.rank == src else b"", "broadcast_object")[src])


def allgather_objects(obj: Any, comm: Engine | None = None) -> list[Any]:
    """Every rank's object, by rank; objects as in `broadcast_object`. All ranks call it."""
    engine = comm or current_world().everyone
    return [_decoded(text) for text in all_gather_bytes(engine, _encoded(obj), "allgather_objects")]


def _encoded(obj: Any) -> bytes:
    """An object that cannot be sent becomes an error on every rank, where the others would wait."""
    try:
        return json.dumps(_to_json(obj, "the object")).encode()
    except TypeError as error:
        text = str(error)
    except RecursionError:
        text = "the object is nested too deeply to be sent to other ranks, or contains itself"
    return json.dumps({_MARK: "error", "text": text}).encode()


def _decoded(text: bytes) -> Any:
    return _from_json(json.loads(text))


def _to_json(x: Any, where: str) -> Any:
    if type(x) is int and x.bit_length() > 64:  # Python writes and reads at most 4300 decimal digits
        return {_MARK: "int", "hex": hex(x)}
    if x is None or type(x) in (bool, int, float, str):
        return x
    if type(x) is list:
        return [_to_json(v, f"{where}[{i}]") for i, v in enumerate(x)]
    if type(x) is dict and all(type(k) is str for k in x) and _MARK not in x:
        return {k: _to_json(v, f"{where}[{k!r}]") for k, v in x.items()}
    if type(x) is dict:
        pairs = [[_to_json(k, f"a key of {where}"), _to_json(v, f"{where}[{k!r}]")] for k, v in x.items()]
        return {_MARK: "dict", "items": pairs}
    if type(x) is tuple:
        return {_MARK: "tuple", "items": [_to_json(v, f"{where}[{i}]") for i, v in enumerate(x)]}
    if type(x) is bytes:
        return {_MARK: "bytes", "data": base64.b64encode(x).decode()}
    if isinstance(x, (np.ndarray, np.generic, Tensor)):
        array = host_array(x) if isinstance(x, Tensor) else np.asarray(x)
        if array.dtype.kind not in "biufc" and array.dtype.name != "bfloat16":
            raise TypeError(f"{where} is an array of {array.dtype}, which cannot be sent to other ranks")
        kind = "tensor" if isinstance(x, Tensor) else "array" if isinstance(x, np.ndarray) else "scalar"
        data = base64.b64encode(array.astype(array.dtype.newbyteorder("=")).tobytes()).decode()
        return {_MARK: kind, "dtype": array.dtype.name, "shape": list(array.shape), "data": data}
    raise TypeError(
        f"{where} is a {type(x).__name__}, which cannot be sent to other ranks; numbers, strings, bytes, lists, tuples, dicts, "
        "arrays and tensors can"
    )


def _from_json(x: Any) -> Any:
    if isinstance(x, list):
        return [_from_json(v) for v in x]
    if not isinstance(x, dict):
        return x
    kind = x.get(_MARK)
    if kind is None:
        return {k: _from_json(v) for k, v in x.items()}
    if kind == "error":
        raise TypeError(x["text"])
    if kind == "dict":
        return {_from_json(k): _from_json(v) for k, v in x["items"]}
    if kind == "tuple":
        return tuple(_from_json(v) for v in x["items"])
    if kind == "int":
        return int(x["hex"], 16)
    data = base64.b64decode(x["data"])
    if kind == "bytes":
        return data
    array = np.frombuffer(data, np.uint8).copy().view(_dtype(x["dtype"])).reshape(x["shape"])
    return from_host(array) if kind == "tensor" else array if kind == "array" else array[()]


def _dtype(name: str) -> np.dtype:
    return numpy_dtype(ms.bfloat16) if name == "bfloat16" else np.dtype(name)
