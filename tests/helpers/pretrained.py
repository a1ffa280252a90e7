"""Folders of Hugging Face's with tiny models: what transformers 5.24 writes of them, with values of ours."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from bmtrain_ms.files.consolidated import ConsolidatedReader

DATA = Path(__file__).resolve().parents[1] / "data"
# family -> {"config": its config.json, "tensors": {name: shape}}
WRITTEN: dict[str, Any] = json.loads((DATA / "transformers-5.24.json").read_text())


def values_of(family: str) -> dict[str, np.ndarray]:
    """Values of all its tensors; no two elements are the same."""
    found, first = {}, 1
    for name, shape in WRITTEN[family]["tensors"].items():
        size = math.prod(shape)
        found[name] = np.arange(first, first + size, dtype=np.float32).reshape(shape) / 8192
        first += size
    return found


def make(folder: Path, family: str, tensors: dict[str, np.ndarray] | None = None, **changes: Any) -> Path:
    """A folder, written by the `safetensors` library; `changes`: of the config."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**WRITTEN[family]["config"], **changes}))
    safetensors.numpy.save_file(values_of(family) if tensors is None else tensors, folder / "model.safetensors")
    return folder


def bits(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of all tensors."""
    with ConsolidatedReader(folder) as reader:
        return {
            name: (str(info.dtype), info.shape, reader.read_flat(name, 0, info.count).tobytes())
            for name, info in reader.tensors.items()
        }
