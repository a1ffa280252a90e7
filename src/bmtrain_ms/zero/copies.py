"""Gathered copies of all parameters of a Block."""

from __future__ import annotations

from typing import Sequence

from mindspore import Tensor

from .group import Gathered, ParamGroup, Sharded
from .passes import Pass
from .pipeline import GatherPipeline, Phase


class Copies:
    """The copies of a Block's groups, which come and go together. Belongs to one call, and to its pass."""

    def __init__(self, groups: Sequence[ParamGroup], pipeline: GatherPipeline, of: Pass):
        self._groups, self._pipeline, self._pass = groups, pipeline, of
        self._gathered: list[Gathered] = []

    def enter(self, phase: Phase) -> Copies:
        """Gather the groups, so that all of the copies are FULL."""
        try:
            for group in self._groups:
                self._gathered.append(self._pipeline.enter(group, phase, self._pass))
        except BaseException:  # of a later group: those before it are nobody's otherwise
            self.leave()
            raise
        return self

    def enter_again(self) -> None:
        """Gather the groups for backward, into the memory of their copies in forward, which the recorded graph reads."""
        for gathered in self._gathered:
            self._pipeline.enter(gathered.group, Phase.BACKWARD, self._pass, parked=gathered)

    def leave(self) -> None:
        """Release the copies: nobody needs them any more."""
        for gathered in self._gathered:
            self._pass.forget(gathered)
        self._pipeline.leave(self._gathered)
        self._gathered = []

    def keep(self) -> None:
        """Have the pass keep the copies until its backward."""
        for gathered in self._gathered:
            if not self._pipeline.holds(gathered):
                self._pass.keep(gathered)

    def park(self) -> None:
        """Let go of the copies' memory until backward; a recorded graph refers to it."""
        for gathered in self._gathered:
            self._pass.keep(gathered)
        self._pipeline.park(self._gathered)

    def tensors(self) -> list[Tensor]:
        """The full tensors, those of the first group first; waits for them."""
        return [tensor for gathered in self._gathered for tensor in gathered.tensors()]

    @property
    def prints(self) -> tuple[int, ...]:
        """The prints of the shards, when `verify` looked last."""
        return tuple(x for gathered in self._gathered for x in gathered.prints)

    def verify(self) -> None:
        """Raise RuntimeError where a parameter was written since it was gathered, or a copy."""
        for gathered in self._gathered:
            gathered.verify()

    def verify_again(self, before: Sequence[int]) -> None:
        """Raise RuntimeError in backward where parameters are not those of which forward had the prints `before`."""
        start = 0
        for gathered in self._gathered:
            stop = start + len(gathered.group.params)
            gathered.verify_again(tuple(before[start:stop]))
            start = stop

    def owns(self, tensor: Tensor) -> bool:
        """Whether `tensor` is one of the full tensors, or a view of one."""
        return any(gathered.owns(tensor) for gathered in self._gathered)

    def copied(self) -> list[Sharded]:
        """Parameters of whose full tensors MindSpore has made a copy, see `Gathered.copied`."""
        return [p for gathered in self._gathered for p in gathered.copied()]
