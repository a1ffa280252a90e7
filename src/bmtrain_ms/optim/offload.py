"""Adam whose states and arithmetic are in host memory, so that the device holds parameters and gradients only."""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Iterable

import numpy as np
from mindspore import Parameter, Tensor, ops

from bmtrain_ms_base.memory import available_memory

from ..comm import reduce_numbers
from ..comm import world as current_world
from ..compat.device import on_host
from ..compat.runtime import from_host, host_array, values
from ..zero import DistributedParameter
from .adam import Adam, HostState, group_settings
from .base import ParamState
from .host_adam import Workers, apply_updates
from .norms import counts_here
from .update import Delta

AHEAD = 3  # gradients, and parameters, that are used, have arrived, or are on their way


class Transfer:
    """The transfers between device and host, one parameter at a time; each method runs in a thread of its own.

    `shares_memory`: parameters are in host memory already, and are changed where they are.
    """

    def __init__(self) -> None:
        self.shares_memory = on_host()

    def fetch(self, grad: Tensor) -> np.ndarray:
        """The values of a gradient, flat, on the host; valid until the optimizer's step has ended."""
        return (values(grad) if self.shares_memory else host_array(grad)).reshape(-1)

    def look(self, p: Parameter) -> np.ndarray:
        """The values of a parameter, flat, on the host: it may have been written since the last step."""
        return host_array(p).reshape(-1)

    def store(self, p: Parameter, array: np.ndarray) -> None:
        """New values of a parameter; done when it returns."""
        ops.assign(p, from_host(array))


class AdamOffloadOptimizer(Adam):
    """`AdamOptimizer` with its states, and the arithmetic, on the host (ZeRO-Offload, Ren et al., 2021) (BMTrain:
    `optim.AdamOffloadOptimizer`).

    Gradients and parameters come to the host, and parameters go back, while others are computed. Host memory for each element of a
    16-bit parameter: master 4, moments 8, the parameter's copy 2 bytes; of a float32 one: copy 4, moments 8. On CPU, where
    parameters are on the host anyway: 12 and 8. All of it is allocated at construction, and rank 0 says how much. Not counted: the
    compiler of the loops, 140 MiB for each process, and on a device the three gradients and parameters that are on their way.

    Args:
        params, lr, betas, eps, weight_decay, hold_steps, maximize: as in `AdamOptimizer`.
        record_delta: keep the mean and the variance of what a step subtracts before the learning rate; see `get_avg_delta`.
        transfer: between device and host; for tests.

    Raises:
        ValueError: as in `AdamOptimizer`.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        hold_steps: int = 0,
        record_delta: bool = False,
        maximize: bool = False,
        *,
        transfer: Transfer | None = None,
    ):
        self._transfer = transfer or Transfer()
        super().__init__(params, group_settings(lr, betas, eps, weight_decay, hold_steps, maximize))
        worlds = [p.world for p in self.parameters if isinstance(p, DistributedParameter)]
        self._world = worlds[0] if worlds else current_world()
        self._announce()
        for state in self._states.values():
            state.touch()
        self._record_delta = record_delta
        self._delta: Delta | None = None  # of the last step
        self._workers = Workers()
        self._to_host = ThreadPoolExecutor(1, "bmtrain_ms-to-host")
        self._to_device = ThreadPoolExecutor(1, "bmtrain_ms-to-device")

    @property
    def nbytes(self) -> int:
        """Host memory of this rank's states, in bytes."""
        return sum(state.nbytes() for state in self._states.values())

    def get_avg_delta(self) -> float:
        """Mean over all parameters and ranks of m̂ / (sqrt(v̂) + eps) + weight_decay * p in the last step; all ranks call it."""
        count, total, _ = self._sums()
        return total / count

    def get_var_delta(self) -> float:
        """Variance over all parameters and ranks of what `get_avg_delta` is the mean of; all ranks call it."""
        count, total, squares = self._sums()
        return max(0.0, squares / count - (total / count) ** 2)  # rounding

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._announce()
        for p in self.param_groups[-1]["params"]:
            self._states[id(p)].touch()

    def _make_state(self, p: Parameter) -> ParamState:
        return HostState(p, self._transfer.shares_memory)

    def _update(self, updates: list[tuple[dict[str, Any], Parameter, Tensor]], scale: float) -> None:
        if self._record_delta:
            self._delta = Delta(sum(_owned(p) for _, p, _ in updates if self._counts(p)))
        if self._transfer.shares_memory:
            fetch, states = self._transfer.fetch, self._states
            apply_updates(
                [states[id(p)].prepare(group, fetch(grad), scale, self._delta_of(p)) for group, p, grad in updates], self._workers
            )
            return
        later, arriving, leaving = iter(updates), deque(), []
        for group, p, _ in updates:
            while len(arriving) < AHEAD and (coming := next(later, None)):
                arriving.append(self._to_host.submit(self._arrive, *coming[1:]))
            grad, now = arriving.popleft().result()
            state = self._states[id(p)]
            update = state.prepare(group, grad, scale, self._delta_of(p), now)
            apply_updates([update], self._workers)
            if update.coefficients.rate:  # otherwise the parameter stays, and there are no new values
                leaving.append(self._to_device.submit(self._transfer.store, p, state.new_values()))
        for future in leaving:
            future.result()

    def _arrive(self, p: Parameter, grad: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return self._transfer.fetch(grad), self._transfer.look(p)

    def _counts(self, p: Parameter) -> bool:
        """Whether deltas of `p` are this rank's to count: those of ranks that store the same elements are equal."""
        return counts_here(p, self._world)

    def _delta_of(self, p: Parameter) -> Delta | None:
        return self._delta if self._delta is not None and self._counts(p) else None

    def _sums(self) -> tuple[int, float, float]:
        if not self._record_delta:
            raise RuntimeError("deltas are not recorded; make the optimizer with record_delta=True")
        if self._delta is None:
            raise RuntimeError("no step has been made yet")
        mine = [self._delta.count, self._delta.total, self._delta.squares]
        count, added, squares = reduce_numbers(self._world.everyone, mine, "delta", np.float64).tolist()
        return int(count), added, squares

    def _announce(self) -> None:
        if self._world.everyone.rank != 0:
            return
        ranks, free = self._world.launch.local_size, available_memory()
        elements = sum(p.size for p in self.parameters)
        text = (
            f"AdamOffloadOptimizer: {self.nbytes / 2**30:.3f} GiB of host memory for each of {ranks} ranks of this host "
            f"({self.nbytes / elements:.1f} bytes for each of {elements} elements)"
        )
        if free is not None:
            text += f", {free / 2**30:.1f} GiB are available"
            if ranks * self.nbytes > free:
                text += ": NOT ENOUGH. Use more ranks or hosts, or a smaller model"
        sys.stderr.write(text + "\n")


def _owned(p: Parameter) -> int:
    if not isinstance(p, DistributedParameter):
        return p.size
    return p.layout.owned_size
