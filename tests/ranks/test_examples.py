"""The examples in docs/ run as their first lines say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("more", [[], ["--fp16"]], ids=["fp32", "fp16"])
def test_small_llama(tmp_path, more):
    from bmtrain_ms.data import python_documentation

    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(python_documentation()[:40]), encoding="utf-8")
    example = ROOT / "docs" / "examples" / "small_llama.py"
    command = [sys.executable, "-m", "bmtrain_ms_cli", "launch", "-n", "2", str(example), "--text", str(text), "--steps", "3"]
    saved = tmp_path / "model.safetensors"
    done = subprocess.run([*command, "--save", str(saved), *more], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert [line.split(" |")[0] for line in lines if line.startswith("step")] == ["step 0", "step 1", "step 2"]
    assert any(line.startswith("held-out loss: ") for line in lines) and any(line.startswith("The ") for line in lines)
    assert saved.stat().st_size > (4 if more else 8) * 10**6
