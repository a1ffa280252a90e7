"""Compiled loops: what is kept on disk, by whom, and what it computes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bmtrain_ms_base.compiled import compiled

SOURCE = Path(__file__).resolve().parents[2] / "src"
CODE = """
import sys, time
import numpy as np
sys.path.insert(0, {folder!r})
import loops
before = time.perf_counter()
loops.double(np.ones(3, np.float32))
from numba.core import config
print(sum(loops.double.stats.cache_hits.values()), sum(loops.double.stats.cache_misses.values()), repr(config.CACHE_DIR))
"""


def run(folder: Path, **variables: str) -> list[str]:
    (folder / "loops.py").write_text(
        "from bmtrain_ms_base.compiled import compiled\n"
        "@compiled(reassociate=True)\n"
        "def double(x):\n"
        "    for i in range(x.size):\n"
        "        x[i] *= 2\n"
    )
    os.utime(folder / "loops.py", (1, 1))
    env = {**os.environ, "PYTHONPATH": str(SOURCE), **variables}
    done = subprocess.run([sys.executable, "-c", CODE.format(folder=str(folder))], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_loops_are_compiled_once_and_kept(tmp_path):
    cache = tmp_path / "cache"
    assert run(tmp_path, XDG_CACHE_HOME=str(cache)) == ["0", "1", "''"]  # the setting of other users of numba stays theirs
    assert run(tmp_path, XDG_CACHE_HOME=str(cache)) == ["1", "0", "''"]
    assert list((cache / "bmtrain_ms" / "kernels").glob("*/*/*.nbc"))


def test_loops_work_where_the_folder_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    assert run(tmp_path, XDG_CACHE_HOME=str(tmp_path / "file")) == ["0", "1", "''"]


def test_the_folder_of_the_user_is_respected(tmp_path):
    cache = tmp_path / "own"
    assert run(tmp_path, NUMBA_CACHE_DIR=str(cache))[:2] == ["0", "1"]
    assert list((cache / "kernels").glob("*/*/*.nbc"))


def test_sums_in_the_order_that_is_written_unless_another_is_allowed():
    def total(x):
        out = np.float32(0)
        for i in range(x.size):
            out += x[i]
        return out

    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    assert compiled()(total)(x) == total(x)
    assert compiled(reassociate=True)(total)(x) == pytest.approx(x.sum(dtype=np.float64), rel=1e-4)


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_what_is_not_finite_stays_what_it_is(bad):
    def total(x):
        out = np.float32(0)
        for i in range(x.size):
            out += x[i]
        return out

    x = np.ones(100, np.float32)
    x[17] = bad
    assert np.array_equal(compiled(reassociate=True)(total)(x), np.float32(bad), equal_nan=True)
