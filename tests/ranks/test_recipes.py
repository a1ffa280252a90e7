"""Each recipe's twin: its layout, with tiny widths."""

from __future__ import annotations

import json
import math
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.ranks import ROOT

pytestmark = pytest.mark.ranks
RECIPES = ROOT / "docs" / "recipes"
TWINS = runpy.run_path(str(RECIPES / "twin.py"))["TWINS"]


def test_every_recipe_has_a_twin():
    assert {path.stem for path in RECIPES.glob("*.toml")} == set(TWINS)
    assert (RECIPES / "grok1_40b" / "small.toml").exists()


@pytest.mark.parametrize("name", TWINS)
def test_twins_train(name: str, tmp_path: Path):
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(RECIPES / "twin.py"), name, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    out = tmp_path / "runs" / name
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    assert (out / ("adapters" if "lora" in name else "model")).is_dir()
