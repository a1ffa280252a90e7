"""Tests see nothing of the folder in which they were started, and leave nothing there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

ROOT = Path(__file__).resolve().parents[2]


def listing(world: Any) -> list[str]:
    return os.listdir()


@pytest.mark.ranks
def test_ranks_run_in_an_empty_folder(run_ranks: Callable):
    assert os.listdir() == [] and run_ranks(1, listing) == [[]]


def test_a_file_in_the_working_folder_fails_its_test_and_no_other(tmp_path: Path):
    """In a checkout where a user has worked."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "test_it.py").write_text(
        "import os\n"
        "def test_careless():\n    open('left', 'w').close()\n"
        "def test_careful():\n    assert not os.listdir() and not os.path.exists('runs')\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", "-p", "no:cacheprovider", "--basetemp", "temporary"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([*command, "."], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert "2 passed, 1 error" in ran.stdout, ran.stdout
    assert "files in the working folder: left; write to tmp_path" in ran.stdout
    assert not (tmp_path / "left").exists()
