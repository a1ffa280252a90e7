"""What a step of the manager did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StepResult:
    """What a step did; true if it updated the parameters.

    Attributes:
        updated: False: the gradient was not finite, and the step was skipped.
        grad_norm: of the step's gradient over all ranks, before clipping and without the loss scale: what the last
            `clip_grad_norm` returned, else the 2-norm that the search for overflows computes, else (neither happened) None.
        loss_scale: the next step's.
        skipped_steps: of the whole run.
        skipped_in_a_row: ending with this one.
    """

    updated: bool
    grad_norm: float | None
    loss_scale: float
    skipped_steps: int
    skipped_in_a_row: int

    def __bool__(self) -> bool:
        return self.updated
