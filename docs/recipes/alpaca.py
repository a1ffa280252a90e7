"""Make a file of rows as Alpaca's, out of text that every Python ships: `python docs/recipes/alpaca.py OUT.parquet [ROWS]`.

Columns: `instruction`, `input`, `output`, `text`, as in `tatsu-lab/alpaca`, whose file can take this one's place.
"""

from __future__ import annotations

import re
import sys
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq

_FRAME = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that "
    "appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n{output}"
)


def rows(count: int) -> list[dict[str, str]]:
    """So many rows, or as many as there are paragraphs."""
    found: list[dict[str, str]] = []
    for topic in sorted(topics):
        for paragraph in re.split(r"\n\s*\n", topics[topic]):
            output = " ".join(paragraph.split())
            if len(output) > 40:
                row = {"instruction": "Explain this topic of Python's manual.", "input": topic, "output": output}
                found.append({**row, "text": _FRAME.format(**row)})
    return found[:count]


def main(path: str, count: str = "52002") -> None:
    """Write the file."""
    table = pa.Table.from_pylist(rows(int(count)))
    pq.write_table(table, path)
    sys.stdout.write(f"{path}: {table.num_rows} rows\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
