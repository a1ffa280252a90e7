"""Bytes that a rank receives in a step, counted by the engine, beside the formula: `python -m tests.benchmarks.volume`"""

from __future__ import annotations

from typing import Any

from tests.benchmarks.harness import PAGES, SIZES, environment, table, write_page
from tests.helpers.volume import Setting, expected, received

RANKS = (2, 8, 64)
SETTINGS = {
    "ZeRO-2": Setting(zero_level=2),
    "ZeRO-3": Setting(),
    "ZeRO-3, bfloat16 gathers": Setting(gather_dtype="bfloat16"),
    "ZeRO-3, int8 gathers": Setting(gather_dtype="int8"),
    "ZeRO-3, shard_size=2": Setting(shard_size=2),
    "ZeRO-3, shard_size=8": Setting(shard_size=8),
}


def chain_of_blocks(setting: Setting) -> Any:
    """The blocks of model S by themselves: every parameter lives in a Block."""
    import bmtrain_ms as bms
    from bmtrain_ms.model_center.layer import RotaryEmbedding, TransformerBlock

    size = SIZES["S"]
    head = size.dim // size.heads
    rotary = RotaryEmbedding(head)
    blocks = [TransformerBlock(size.dim, size.ff, size.heads, head, rotary=rotary) for _ in range(size.layers)]
    return bms.TransformerBlockList(bms.Block(block, True, setting.zero_level) for block in blocks)


def main() -> None:
    """Count, compare, write the page."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    import bmtrain_ms as bms
    from bmtrain_ms.model_center.layer import Positions

    bms.init_distributed()
    size = SIZES["S"]
    positions = Positions(1, 8)
    rows: list[list[Any]] = []
    for name, setting in SETTINGS.items():
        for ranks in RANKS:
            if setting.shard_size is None or ranks >= setting.shard_size:
                counted = received(lambda s=setting: chain_of_blocks(s), (8, size.dim), (positions,), ranks, setting)
                formula = expected(counted.parameters, ranks, setting)
                rows.append([name, ranks, counted.bytes, formula, "yes" if counted.bytes == formula else "NO", counted.scalars])
    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    names = list(SETTINGS)
    of_eight = [next(row[2] for row in rows if row[0] == name and row[1] == 8) / 2**20 for name in names]
    axes.barh(names[::-1], of_eight[::-1])
    axes.set_xlabel("MiB received by each of 8 ranks in a step (blocks of model S)")
    figure.savefig(PAGES / "volume.png", dpi=100)
    write_page(
        "volume",
        "Communication volume",
        "Target: ZeRO-3 receives 3 (N-1)/N P bytes per rank and step, ZeRO-2 2 (N-1)/N P, plus O(1) scalars, to the byte.",
        f"**Result**: {'equal everywhere' if all(row[4] == 'yes' for row in rows) else 'NOT EQUAL'}.",
        f"{environment()} `python -m tests.benchmarks.volume`",
        "The four blocks of model S, one training step (forward, backward, gradient norm, update) in a simulated world of N ranks, "
        "counted by `comm.RecordingEngine`. P: bytes of the parameters, each padded to a multiple of the ranks that share it. "
        "*bfloat16* halves the two gathers, *int8* sends a byte per element and a float32 per block of 256. With *shard_size* S, "
        "gathers and the first reduce stay inside a node of S ranks, and an all-reduce of the shards crosses nodes: "
        "3 (S-1)/S P + 2 (R-1)/R P/S for R = N/S nodes. *Scalars*: bytes of the gradient norm.",
        table(["setting", "ranks", "bytes received", "formula", "equal", "scalars"], rows),
        "![bytes received](volume.png)",
        "Parameters outside of blocks (embedding, final norm, output projection) are gathered once and reduced once, whatever the "
        "level: their layers keep the full tensor from forward to backward. The model as a whole stays below the formula.",
    )


if __name__ == "__main__":
    main()
