"""Blocks: the unit of gathering, recomputation and reduction.

A call of a Block is made of differentiable functions of our own (`compat.autograd.custom_op`), so that autograd itself calls us at
the right moments, and gradients are right by construction: *gather* is a function from shards to full tensors, and its derivative
is *reduce*. While the inner module runs, its parameters are hidden behind the full tensors (instance attributes win over a Cell's
parameter table); it need not know about any of this.

With checkpointing the whole call is one such function. Its backward gathers once, recomputes and differentiates. Without, there
are two: the gather before the inner module, and an identity behind it whose backward gathers again into the memory that the
recorded graph reads (`Gathered.park`).
"""

from __future__ import annotations

from typing import Any

from mindspore import nn

from ..comm import rank
from ..compat.autograd import recording
from ..compat.cells import share_tables
from .call import Call, list_as_tuple
from .context import context_of
from .group import ParamGroup
from .slots import Slots


class Block(nn.Cell):
    """ZeRO around a module: gathers its parameters for the call and lets go of them afterwards (BMTrain: `Block`).

    Transparent: parameters keep their names, attributes are the inner module's. Arguments and results may be anything; tensors in
    tuples, lists and dicts at any depth receive gradients. A list or tuple as result becomes a tuple, as in BMTrain.

    A checkpointed module should be given what it uses: Parameters that it takes from elsewhere get their gradients too (a plain one
    only where an input or a parameter of the Block needs one), but other tensors do not. Parameters must not be written while the
    module runs, nor between forward and backward (noticed on CPU ranks), and gradients must not be taken inside.

    Args:
        inner_module: a Cell all of whose parameters are `DistributedParameter`. One without any is called as it is.
        use_checkpoint: recompute the forward pass in backward instead of keeping its activations.
        zero_level: 3 gathers again for backward; 2 keeps the gathered parameters from forward to backward.
        initialized: only False: BMTrain's lists of Blocks set it themselves.
        mode: `PIPE` for a Block of a `PipelineTransformerBlockList`, which keeps gathered parameters: `zero_level` is 2 then, as
            BMTrain has it. `BLOCK` for any other.

    Raises:
        TypeError: `inner_module` is not a Cell.
        ValueError: a parameter is not a `DistributedParameter`, a Block is inside, `zero_level` is not 2 or 3, `mode` is unknown,
            or `initialized` is asked for.
    """

    inner: nn.Cell
    use_checkpoint: bool
    zero_level: int
    mode: str
    _slots: Slots

    def __init__(
        self,
        inner_module: nn.Cell,
        use_checkpoint: bool = True,
        zero_level: int = 3,
        initialized: bool = False,
        mode: str = "BLOCK",
    ):
        super().__init__(auto_prefix=False)
        if initialized:
            raise ValueError(
                f"Block(initialized={initialized}) is what BMTrain's lists of Blocks say to each other: leave it out, and put the "
                "same module into the list twice to share its parameters"
            )
        if mode not in ("BLOCK", "PIPE"):
            raise ValueError(f"mode must be BLOCK, or PIPE in a PipelineTransformerBlockList, not {mode!r}")
        if not isinstance(inner_module, nn.Cell):
            raise TypeError(f"Block wraps a Cell, not a {type(inner_module).__name__}")
        if zero_level not in (2, 3):
            raise ValueError(f"zero_level must be 2 or 3, not {zero_level!r}")
        inside = [path for path, cell in inner_module.cells_and_names() if isinstance(cell, Block)]
        if inside:
            raise ValueError(
                f"rank {rank()}: there is a Block inside the Block already ({inside[0] or 'the module itself'}): wrap only one of "
                "them"
            )
        self.__dict__["inner"] = inner_module  # no Cell's attribute: it must not appear as a child with a name of its own
        self.use_checkpoint, self.mode = bool(use_checkpoint), mode
        self.zero_level = 2 if mode == "PIPE" else zero_level
        self._slots = _slots_of(inner_module)
        share_tables(self, with_cell=inner_module)
        self.training = inner_module.training

    @classmethod
    def in_place(cls, module: nn.Cell, use_checkpoint: bool = True, zero_level: int = 3) -> Block:
        """Have `module` itself act as a Block, wherever it is referred to; returns the Block that calls go through.

        `module(...)` and `module.construct(...)` do. For models whose code we do not know: `BMTrainModelWrapper` uses it.
        """
        block = cls(module, use_checkpoint, zero_level)
        block._slots.function = module.construct
        module.__dict__["construct"] = block.construct
        return block

    def __getattr__(self, name: str) -> Any:
        inner = vars(self).get("inner")
        if inner is None:
            return super().__getattr__(name)
        return getattr(inner, name)

    def __repr__(self) -> str:
        return f"Block({self.inner!r})"

    # What is asked of the Block is asked of the module: a walk over cells sees the one, and not the other. #

    def add_flags(self, **flags: Any) -> None:
        """Set flags as MindSpore does, on the inner module, too: `set_train`, `to_float` and their like go through here."""
        super().add_flags(**flags)
        if "inner" in vars(self) and self._slots.function is None:
            self.inner.add_flags(**flags)

    def register_backward_hook(self, hook_fn: Any) -> Any:
        """Register a hook as MindSpore does; it sees the gradients of the inner module."""
        return self.inner.register_backward_hook(hook_fn)

    def recompute(self, **options: Any) -> None:
        """Refused: a Block recomputes by itself."""
        raise ValueError(f"a Block recomputes by itself: leave recompute({options or ''}) out, and use Block(use_checkpoint=True)")

    def construct(self, *args: Any, **kwargs: Any) -> Any:
        slots = self._slots
        if not slots:  # nothing to gather; recomputing it would draw dropout anew
            return list_as_tuple(slots.run(*args, **kwargs))
        slots.refuse_changes()
        context = context_of(slots.world)
        for p in slots.params:
            context.note_gather(p)
        if not recording():
            return Call(slots, self.zero_level, context, args, kwargs).evaluate()
        if self.mode != "PIPE":
            slots.refuse_outside()
        call = Call(slots, self.zero_level, context, args, kwargs)
        call.refuse_complex()
        if not self.use_checkpoint:
            return call.kept()
        slots.refuse_dropout()
        return call.checkpointed()

    def accept_changes(self) -> None:
        """Gather what the module has now, some of whose layers were exchanged; not while gradients are taken. On all ranks alike.

        Raises:
            RuntimeError: gradients are being taken.
        """
        if recording():
            raise RuntimeError("a Block's module cannot be changed inside of a function that is being differentiated")
        function, slots = self._slots.function, _slots_of(self.inner)
        slots.function, self._slots = function, slots
        if slots:
            context_of(slots.world).pipeline.parameters_changed()

    def refuse_dropout(self) -> None:
        """Raise ValueError where the module has a dropout of MindSpore's, which draws another mask when it is computed again."""
        self._slots.refuse_dropout()

    @property
    def groups(self) -> list[ParamGroup]:
        """The parameters, those that travel together in one group; none where there are none."""
        return self._slots.groups if self._slots else []


def _slots_of(module: nn.Cell) -> Slots:
    """Where the parameters of a module are; from now on its cells leave it to the Block to gather them."""
    slots = Slots(module)
    for _, places in slots.places:
        for cell, _ in places:
            vars(cell).setdefault("_in_block", True)
    return slots


CheckpointBlock = Block

__all__ = ["Block", "CheckpointBlock"]
