"""Shards of parameters that a module uses although they are not its own: a penalty on another layer's weights, say."""

from __future__ import annotations

from typing import Any, Sequence

from mindspore import Parameter

from ..comm import rank
from ..compat.autograd import requested
from .param import DistributedParameter


class Elsewhere:
    """What the recomputed module of a Block is known to use of parameters of elsewhere; belongs to the Block.

    Autograd never sees such a use, so gradients have to be asked for, and each one that is asked for takes memory and time. So all
    are asked for in the first backward pass, in the second, the fourth and so on, and whenever the backward pass is one for
    parameters that none before was for; in between only those that are known to be used.
    """

    def __init__(self) -> None:
        self._passes = 0
        self._used: dict[int, Parameter] = {}
        self._seen: dict[int, Parameter] = {}  # what backward passes so far were for
        self._unlooked: dict[int, Parameter] = {}  # those among them for which one did not look, and those that are used

    def __deepcopy__(self, memo: dict) -> Elsewhere:
        return Elsewhere()  # a copied Block has other parameters

    def to_ask_for(self, own: Sequence[DistributedParameter], due: bool) -> list[Parameter]:
        """The parameters whose gradients this backward pass asks the module for.

        Args:
            own: the module's own parameters, for which it is asked in any case.
            due: whether all are looked at in any case.
        """
        asked = requested().of(DistributedParameter)
        self._passes += 1
        if due or not self._passes & (self._passes - 1) or not asked.keys() <= self._seen.keys():
            self._seen.update(asked)
            known = set(map(id, own))
            return [p for i, p in asked.items() if i not in known]
        self._unlooked.update(asked)
        return [p for i, p in self._used.items() if i in asked]

    def note_use(self, p: DistributedParameter, module: Any, label: str) -> None:
        """The module's gradient of the shard of `p` was not zero: from now on it is asked for each time.

        Raises:
            RuntimeError: it may have been missing in an earlier pass, in which nobody looked.
        """
        if id(p) in self._unlooked and id(p) not in self._used:
            raise RuntimeError(
                f"rank {rank()}: {type(module).__name__} ({label}) uses the shard of {p.name}, which is no parameter of its own, "
                "and did not in its first backward pass: gradients since may be without it. Compute what is made of shards (a "
                "penalty) outside of the checkpointed Block, or give the parameter to it as an argument"
            )
        self._used[id(p)] = p
