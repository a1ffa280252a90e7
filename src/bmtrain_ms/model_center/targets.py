"""What language models are to learn."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor

from ..compat.runtime import host_array


def targets_that_count(targets: Tensor, options: dict[str, Any]) -> int:
    """How many are not ignored."""
    return int((host_array(targets) != options.get("ignore_index", -100)).sum())
