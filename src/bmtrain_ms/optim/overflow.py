"""What to say when gradients are not finite, step after step."""

from __future__ import annotations

from typing import Sequence

from mindspore import Parameter

from ..comm import World, gather_json


class GradientOverflowError(ArithmeticError):
    """Step after step the gradient is not finite, whatever the loss scale; raised on every rank alike."""


def advice(bad: Sequence[Parameter], world: World, steps: int, scale: float, least: float) -> str:
    """The text of the error. All ranks call it together.

    Args:
        bad: parameters whose gradients are not finite on this rank; those of pipeline stages are others on each.
        world: the ranks.
        steps: that were skipped in a row, the last at loss scale `scale`, which is never below `least`.
    """
    found = gather_json([p.name for p in bad], world.everyone, "overflow")
    names = list(dict.fromkeys(name for of_rank in found for name in of_rank))
    which = f"those of {', '.join(names[:5])}" if names else "the norm of all of them"
    if scale <= least:
        remedy = (
            "The scale is at its least, so it is not the cause: look for NaN in the data and in the loss, lower the learning rate, "
            "or train in bfloat16 or float32"
        )
    else:
        remedy = "Start from a lower loss_scale, or raise max_skipped_steps"
    others = f" and {len(names) - 5} other parameters" if len(names) > 5 else ""
    return (
        f"{steps} steps in a row were skipped, the last at loss scale {scale:g} (least: {least:g}), because gradients are not "
        f"finite: {which}{others}. {remedy}"
    )
