"""The documentation builds without a warning, and leaves nothing out."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import bmtrain_ms as bms

DOCS = Path(__file__).resolve().parents[2] / "docs"
SOURCE = DOCS.parent / "src"
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")
API = (DOCS / "api.md").read_text(encoding="utf-8")


def test_the_docs_build_without_warnings(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", str(DOCS), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text(encoding="utf-8")
    for name in ("optim.OptimManager.clip_grad_norm", "init_distributed", "loss.FusedCrossEntropy"):
        assert f'id="bmtrain_ms.{name}"' in page, name
    assert "The norm before clipping, without the loss scale" in page  # docstrings, not signatures only


@pytest.mark.parametrize("name", bms.__all__)
def test_every_public_name_is_on_the_api_page(name):
    value = getattr(bms, name)
    if name in ("CheckpointBlock", "block_layer", "layer", "param_init", "parameter", "pipe_layer", "zero_context"):
        return  # other names of what is there
    if isinstance(value, ModuleType):
        assert f"automodule:: {value.__name__}\n" in API
    elif inspect.isclass(value):
        assert f"autoclass:: {name}\n" in API
    else:
        assert re.search(rf"auto(function|data):: {name}\n", API)


def test_every_exported_name_of_a_module_has_a_docstring():
    for name in bms.__all__:
        module = getattr(bms, name)
        for exported in getattr(module, "__all__", ()) if isinstance(module, ModuleType) else ():
            value = getattr(module, exported)
            if inspect.isclass(value) or inspect.isfunction(value):
                assert inspect.getdoc(value), f"{module.__name__}.{exported}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: p.name)
def test_links_between_pages_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_of_the_architecture_page_is_that_of_the_source():
    """Every folder and file that it names is there, and every package and every file beside one is named."""
    named: dict[str, set[str]] = {}
    for line in ARCHITECTURE.split("```")[1].strip().splitlines():
        names = re.findall(r"(?<=\s)\w+(?:/|\.py)", f" {re.split('   ', line.strip())[0]}")
        if line.startswith(("src/", "tests/")):
            named[line.split("/")[1].split()[0] if line.startswith("src/") else ""] = here = set()
        else:
            here.update(names)
    for package in ("bmtrain_ms", "bmtrain_ms_base"):
        folder = SOURCE / package
        files = {path.name for path in folder.glob("*.py")} - {"__init__.py"}
        packages = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
        assert named[package] == files | packages


def test_notes_are_where_the_architecture_page_says():
    """And it knows all of them."""
    for path in SOURCE.rglob("*.py"):
        place = str(path.relative_to(SOURCE)).replace("bmtrain_ms_base/", "base/").replace("bmtrain_ms/", "")
        for note in re.findall(r"^(\[Note: .+\])$", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"{re.escape(note)}(?:(?:,| and) \[Note: [^]]+\])* `{re.escape(place)}`", ARCHITECTURE), (note, place)


def test_the_chinese_readme_shows_the_same_code():
    """And has as many sections and rows of the status table."""
    english, chinese = (path.read_text(encoding="utf-8") for path in (DOCS.parent / "README.md", DOCS / "README.zh.md"))
    blocks = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
    assert blocks.findall(english) == blocks.findall(chinese)
    for pattern in (r"^## ", r"^\|"):
        assert len(re.findall(pattern, english, re.MULTILINE)) == len(re.findall(pattern, chinese, re.MULTILINE))
    links = {(DOCS / target).resolve() for target in re.findall(r"\]\((?!http)([^)#]+)\)", chinese)}
    assert links and all(link.exists() for link in links)
