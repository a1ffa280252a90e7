"""Host memory, data types and execution mode."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore._c_expression import DeviceContextManager, RuntimeConf
from mindspore.common import _stub_tensor
from mindspore.common import dtype as dtypes

from .device import on_host, rehearsed
from .executor import no_grad

_TAKES_INTERNAL = hasattr(Tensor.__init__, "__code__") and "internal" in Tensor.__init__.__code__.co_varnames  # 2.5
_numpy_type: Any = getattr(dtypes, "_dtype_to_nptype", None) or dtypes.dtype_to_nptype  # 2.10 warns of the public one, each time
_SMALL = 1 << 15  # bytes
_MAPPED = 1 << 17  # bytes; from here on glibc's malloc maps memory too, until some of it has been freed
_Result: Any = getattr(_stub_tensor, "StubTensor", ())  # what operations return on 2.5; () is no class, so nothing is one
_ALWAYS_ADDRESSED = hasattr(Tensor, "untyped_storage")  # 2.10
_results_addressed = [True]  # until one is seen that is not: what a `bprop` of a user's has made of an array
_MARK = "made on the host"
FLOATS = (
    ms.float32,
    ms.float16,
    ms.bfloat16,
    ms.float64,
)  # the likely one first: comparing types is slow


def is_float(x: Any) -> bool:
    """Whether `x` is a tensor of a floating-point type, one that can carry a gradient."""
    return isinstance(x, Tensor) and x.dtype in FLOATS


def host_array(tensor: Tensor | np.ndarray) -> np.ndarray:
    """The tensor's values as a contiguous NumPy array; waits for the operations that produce them. An array is returned as it is.

    On the host it shares memory with a tensor made by `from_host`; on a device it is a copy. Read-only use: on 2.5 the result of an
    operation is copied to the host.
    """
    array = shared_array(tensor)
    return array.copy() if array is not tensor and rehearsed() else array


def shared_array(tensor: Tensor | np.ndarray) -> np.ndarray:
    """`host_array`, which shares the memory of a tensor made by `shared_tensor` whatever the process computes on: for engines of
    CPU ranks, which a rehearsal runs over."""
    return tensor if isinstance(tensor, np.ndarray) else np.asarray(tensor.asnumpy(), order="C")


def _made_on_host(tensor: Tensor) -> bool:
    """Whether `shared_tensor` has made it: its `asnumpy` copies nothing, and to ask for its address costs an operation (2.5)."""
    return _TAKES_INTERNAL and tensor._get_user_data(_MARK) is not None


class _Memory:
    """What NumPy needs to view a tensor's memory, and to keep the tensor alive."""

    def __init__(self, tensor: Tensor, start: int, elements: int, typestr: str):
        self._tensor = tensor
        self.__array_interface__ = {"version": 3, "shape": (elements,), "typestr": typestr, "data": (start, False)}


def values(tensor: Tensor) -> np.ndarray:
    """The values of an activation or a gradient, in its shape, on the host without a copy where that is possible. Read-only use.

    `asnumpy` copies what an operation has returned at 1.4 GB/s (2.5). The array keeps the tensor alive.
    """
    if not on_host():
        return host_array(tensor)
    raw = None if isinstance(tensor, _Result) else _bytes_of_small(tensor)
    if raw is not None:
        return np.ndarray(tensor.shape, numpy_dtype(tensor.dtype), bytearray(raw))
    array = None if _made_on_host(tensor) else _memory(tensor)
    return host_array(tensor) if array is None else array.reshape(tensor.shape)


def is_zero(tensor: Tensor) -> bool:
    """Whether all elements are zero. On a device that waits for the operations that produce them."""
    raw = _bytes_of_small(tensor) if on_host() else None
    if raw is not None and raw == bytes(len(raw)):
        return True  # otherwise there still may be negative zeros
    return not values(tensor).any()


def _bytes_of_small(tensor: Tensor) -> bytes | None:
    """A copy of the values where that is the cheapest: on 2.5 to learn the address of what no operation has returned costs an
    operation, 8 to 15 µs, and an array of `asnumpy` 5. Not of a view, which MindSpore would give memory of its own."""
    small = _TAKES_INTERNAL and tensor.nbytes <= _SMALL and tensor.is_contiguous() and not tensor.storage_offset()
    return tensor.get_bytes() if small else None


def _memory(tensor: Tensor) -> np.ndarray | None:
    """The tensor's own memory on CPU, flat; None where only a copy can be had.

    It is asked for each time. That a tensor was made of an array of ours says nothing: operations may have given it other memory
    since.
    """
    _refuse_in_rehearsal()
    if not tensor.is_contiguous() or tensor.storage_offset():
        return None
    start, elements = int(addressed(tensor)._data_ptr()), math.prod(tensor.shape)
    if not start and elements and _results_addressed[0]:
        _results_addressed[0] = False
        start = int(addressed(tensor)._data_ptr())
    if not start:
        return None
    dtype = numpy_dtype(tensor.dtype)
    if dtype.isbuiltin != 1:  # bfloat16
        return np.asarray(_Memory(tensor, start, elements * dtype.itemsize, "|u1")).view(dtype)
    return np.asarray(_Memory(tensor, start, elements, dtype.str))


def _refuse_in_rehearsal() -> None:
    if rehearsed():
        raise RuntimeError(
            "the address of a tensor was asked for, which on a device NumPy could do nothing with: a fault of bmtrain_ms"
        )


def address(tensor: Tensor) -> int | None:
    """Where the tensor's values start, if views share memory with what they view; None on a device, and on 2.5, where a view of
    host memory is a copy (and where asking for the address of a tensor that no operation has read yet logs an error)."""
    return int(tensor._data_ptr()) if on_host() and _ALWAYS_ADDRESSED else None


def addressed(tensor: Tensor) -> Tensor:
    """The same tensor, of which MindSpore knows the address: 2.5 gives one when an operation writes or reads it, and logs an error
    when asked for none."""
    if not (_ALWAYS_ADDRESSED or (_results_addressed[0] and isinstance(tensor, _Result))):
        ops.stop_gradient(tensor)
    return tensor


def writable_array(tensor: Tensor) -> np.ndarray | None:
    """The tensor's own memory on CPU, flat: what is written there, operations read. None where only a copy can be had."""
    return _memory(tensor) if on_host() else None


def is_at(tensor: Tensor, array: np.ndarray) -> bool:
    """Whether the tensor's values still are in the memory that `writable_array` gave for it. Cheap.

    The tensor must not have been given other data (`set_data`) since: on 2.5 asking for an address that is not there logs an error.
    """
    _refuse_in_rehearsal()
    return int(tensor._data_ptr()) == array.__array_interface__["data"][0]


class Values:
    """The values of a tensor that changes in place, on the host, looked for again only where its memory is another.

    To be forgotten where the tensor is given other data (`set_data`): on 2.5 asking for an address that is not there logs an error.
    It does not keep the tensor alive, so a tensor may have its own.

    Attributes:
        array: in the tensor's shape, contiguous, of its memory, which it keeps alive. Read-only use.
        bytes: the same, flat.
    """

    def __init__(self) -> None:
        self.array = self.bytes = np.empty(0, np.uint8)
        self._tensor = 0
        self._start = 0  # 0: its memory cannot be shared

    def __deepcopy__(self, memo: dict) -> None:
        """A copied tensor has memory of its own."""

    def __reduce__(self) -> tuple:
        return type(None), ()

    def of(self, tensor: Tensor) -> Values:
        """These, as they are now in `tensor`."""
        if id(tensor) != self._tensor or not self._start or tensor._data_ptr() != self._start:
            self._look(tensor)
        return self

    def _look(self, tensor: Tensor) -> None:
        _refuse_in_rehearsal()
        with no_grad():
            addressed(tensor)
        self.array = host_array(tensor)  # no view of our own making: it must stay when the tensor is given other data
        self.bytes = self.array.reshape(-1).view(np.uint8)
        start = self.array.__array_interface__["data"][0]
        self._tensor, self._start = id(tensor), start if tensor._data_ptr() == start else 0


def overwrite(tensor: Tensor, source: Tensor) -> None:
    """Copy the values of `source`, of equal shape and type, into the memory of `tensor`.

    Raises:
        ValueError: `tensor` is a view that begins elsewhere, or has another order: MindSpore would write nothing.
    """
    if not tensor.is_contiguous() or tensor.storage_offset():
        raise ValueError(
            f"a tensor of shape {tuple(tensor.shape)} is a view (a slice, or transposed), which cannot be written into: copy it, "
            "write into the copy, and put that back"
        )
    array = writable_array(tensor) if on_host() else getattr(tensor, "kept_on_host", None)
    if array is None:
        ops.assign(tensor, source)
    else:
        array[...] = host_array(source).reshape(-1)


def kept_on_host(array: np.ndarray) -> Tensor:
    """`from_host(array)` for `overwrite`, which writes into the flattened array on a device too, where operations read a copy.

    For who holds the array, and this very object: what MindSpore returns for it does not know.
    """
    tensor = from_host(array)
    tensor.kept_on_host = array.reshape(-1)
    return tensor


def was_copied(tensor: Tensor, array: np.ndarray) -> bool:
    """Whether operations read a copy of `tensor`, made by `from_host(array)`: on 2.5 a view of it (`w.T`, a slice) makes one."""
    return not is_at(addressed(tensor), array)


def from_host(array: np.ndarray) -> Tensor:
    """A tensor of the values of the contiguous `array`; on the host it shares memory with the array, and keeps it alive."""
    return shared_tensor(array.copy() if rehearsed() else array)


def shared_tensor(array: np.ndarray) -> Tensor:
    """`from_host` that shares memory whatever the process computes on: see `shared_array`."""
    if not (_TAKES_INTERNAL and array.flags.c_contiguous):
        return Tensor.from_numpy(array)
    tensor = Tensor(Tensor.__base__.from_numpy(array), internal=True)  # half the time: without checks of what is known
    tensor._set_user_data(_MARK, True)  # stays where autograd makes another Python object for the same tensor
    return tensor


def untouched_zeros(length: int, dtype: Any) -> np.ndarray:
    """(length,) zeros that take no memory until they are written. `np.zeros` takes it where the process has freed memory before.

    Raises:
        MemoryError: there are not so many addresses, or a limit is reached.
    """
    dtype = numpy_dtype(dtype)
    nbytes = length * dtype.itemsize
    if nbytes < _MAPPED:
        return np.zeros(length, dtype)
    try:
        return np.frombuffer(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype)
    except (OSError, OverflowError) as error:
        raise MemoryError(f"unable to allocate {nbytes / 2**30:,.0f} GiB") from error


def zeros(length: int, dtype: Any) -> Tensor:
    """(length,) zeros, the same tensor each time: for those who only read. On CPU they take no memory, as nobody writes them."""
    return _zeros(length, dtype, on_host())


@functools.cache
def _zeros(length: int, dtype: Any, host: bool) -> Tensor:
    if not host:
        return ops.zeros((length,), dtype)
    with no_grad():
        return addressed(from_host(untouched_zeros(length, dtype)))


@functools.cache
def numpy_dtype(dtype: Any) -> np.dtype:
    """NumPy's name for a MindSpore type, or NumPy's own; bfloat16 is MindSpore's extension type."""
    if isinstance(dtype, np.dtype):
        return dtype
    return np.dtype(_numpy_type(dtype))


def configure_cpu(threads: int) -> None:
    """The PyNative settings that suit CPU ranks: operations run in the calling thread, on `threads` cores.

    Asynchronous dispatch, the default, hands every operation to threads that spin while they wait: measured 24 ms against
    1,116 ms for eight 512x256x256 matmuls with their gradients on one core (2.5), 29 against 168 ms (2.10).

    Raises:
        RuntimeError: an operation has run before, asynchronously; MindSpore ignores the switch from then on.
    """
    started = DeviceContextManager.get_instance().get_device_context("CPU")
    if started is not None and started.initialized() and not RuntimeConf.get_instance().is_launch_blocking():
        raise RuntimeError(
            "init_distributed must come before the first MindSpore operation of the process: CPU ranks run operations "
            "synchronously, and MindSpore cannot change to that later"
        )
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("CPU")
    # each call puts MindSpore's folder in front once more: after some 1,900 worlds no process could be started any more
    if "LD_LIBRARY_PATH" in os.environ:
        os.environ["LD_LIBRARY_PATH"] = ":".join(dict.fromkeys(os.environ["LD_LIBRARY_PATH"].split(":")))
    ms.runtime.launch_blocking()
    _let_waiting_threads_sleep()
    from mindspore.device_context.cpu import op_tuning

    with contextlib.suppress(RuntimeError):  # MindSpore takes it once per process; the first world's share stays
        op_tuning.threads_num(threads)
    _limit_blas(threads)


def _limit_blas(threads: int) -> None:
    """Have NumPy's matrix products use so many threads: OpenBLAS has counted the cores before this process got its share.

    More threads than cores wait for each other spinning. Another BLAS (MKL, Accelerate) is left to its own settings.
    """
    library = ctypes.CDLL(str(np.core._multiarray_umath.__file__))  # finds what this one is linked with
    for name in ("openblas_set_num_threads64_", "openblas_set_num_threads", "scipy_openblas_set_num_threads64_"):
        if hasattr(library, name):
            getattr(library, name)(ctypes.c_int(threads))
            return


def _let_waiting_threads_sleep() -> None:
    """Turn off the spinning of MindSpore's dispatch threads, a switch that only its C++ has.

    The first compiled function of a process (most of `nn.optim`) starts one that takes a core for good, and kernels wait for it:
    measured on 2.5, 138 ms against 11 ms for a step of twenty 256 x 256 layers.
    """
    for name in ("libmindspore_runtime_pipeline.so", "libmindspore_backend.so"):  # 2.10, 2.5
        path = Path(str(ms.__file__)).parent / "lib" / name
        library = ctypes.CDLL(str(path)) if path.exists() else None  # loaded already
        if hasattr(library, "_ZN9mindspore7runtime8Pipeline7SetSpinEb"):
            pipeline = library._ZN9mindspore7runtime8Pipeline3GetEv  # mindspore::runtime::Pipeline::Get()
            pipeline.restype = ctypes.c_void_p
            set_spin = library._ZN9mindspore7runtime8Pipeline7SetSpinEb  # mindspore::runtime::Pipeline::SetSpin(bool)
            set_spin.argtypes, set_spin.restype = [ctypes.c_void_p, ctypes.c_bool], None
            set_spin(pipeline(), False)
            return


def configure_ascend(device_id: int) -> None:
    """PyNative mode on the given card of this host."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.set_device("Ascend", device_id)
