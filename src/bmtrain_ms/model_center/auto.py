"""A model of whatever family a folder of Hugging Face's is of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Sequence

from ..comm import world as current_world
from ..files.errors import agree_or_fail
from .model import FAMILIES, CausalLM
from .pretrained.differences import PretrainedError
from .pretrained.folder import CONFIG, read_json
from .spread import Spread
from .staged import Stages


def from_pretrained(
    folder: str | Path,
    how: Spread | None = None,
    stages: str | Sequence[int] | Stages | None = None,
    dtype: str | None = None,
    *,
    pickles: bool = False,
    **changes: Any,
) -> CausalLM:
    """A model out of a folder of Hugging Face's, of the class that its `model_type` says; see `CausalLM.from_pretrained`.

    Raises:
        PretrainedError: there is no class for it; and what `CausalLM.from_pretrained` raises. On every rank.
    """
    return family_of(folder).from_pretrained(folder, how, stages, dtype, pickles=pickles, **changes)


def family_of(folder: str | Path) -> type[CausalLM]:
    """The class of models that a folder's `model_type` says. All ranks call it.

    Raises:
        PretrainedError: there is none.
        CheckpointError: `config.json` is missing or damaged. Both on every rank.
    """
    path, error, found = Path(folder).expanduser(), None, None
    try:
        kind = read_json(path).get("model_type")
        found = next((model for model in FAMILIES if kind in model.FAMILY.model_types), None)
        if found is None:
            known = ", ".join(name for model in FAMILIES for name in model.FAMILY.model_types)
            raise PretrainedError(f"{path / CONFIG} says model_type {kind!r}, which is not among the families here: {known}")
    except Exception as caught:  # whatever it is: the other ranks wait
        error = caught
    agree_or_fail(current_world().everyone, error, f"{path / CONFIG} cannot be read")
    assert found is not None
    return found
