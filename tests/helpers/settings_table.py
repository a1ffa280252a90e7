"""The table of docs/training.md: `python -m tests.helpers.settings_table`."""

from __future__ import annotations

import json
from typing import Any, Iterator

from pydantic import BaseModel

from bmtrain_ms_base.config import Settings


def rows(model: Any = Settings, prefix: str = "") -> Iterator[str]:
    """A line for each setting."""
    for name, field in model.model_fields.items():
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        inner = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)
        if inner is not None:
            yield from rows(inner, f"{prefix}{name}.")
            continue
        default = "" if field.is_required() or field.default is None else f"`{json.dumps(field.default)}`"
        text = (field.description or "").replace("|", "\\|")
        yield f"| `{prefix}{name}` | {default} | {text} |"


if __name__ == "__main__":
    print("\n".join(rows()))
