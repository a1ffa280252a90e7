"""The shape of the source: who imports whom, and what a module may not contain."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "bmtrain_ms"

# [Note: ladder] A unit, a file or folder right below `bmtrain_ms`, imports units on lower levels only. docs/architecture.md
# draws it. `bmtrain_ms_base`, which has no units, is below all of it, and the command above.
LEVELS = [
    {"compat"},
    {"ops"},
    {"comm"},
    {"zero", "distributed"},
    {"parallel", "files"},
    {"optim", "nn"},
    {"model_center", "lr_scheduler", "wrapper", "loss"},
    {"checkpoint"},
    {"train", "data", "utils", "inspect", "debug", "benchmark", "global_var", "nccl", "store"},
]
FILES = sorted(SOURCE.rglob("*.py"))
COMMAND = sorted((ROOT / "src" / "bmtrain_ms_cli").glob("*.py"))
BASE = sorted((ROOT / "src" / "bmtrain_ms_base").rglob("*.py"))


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT / "src").with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    """What a file imports, as whole names of modules and of what is taken from them: also in functions and `if TYPE_CHECKING`, as
    who reads the file has to know both."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    package = list(path.relative_to(ROOT / "src").parts[:-1])
    found = set()
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def level(unit: str) -> int:
    return next(i for i, units in enumerate(LEVELS) if unit in units)


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != SOURCE or f.name != "__init__.py"], ids=str)
def test_imports_form_a_ladder(path):
    unit = unit_of(path)
    for imported in imports_of(path):
        top, *rest = imported.split(".")
        assert top != "bmtrain_ms_cli"
        if top == "bmtrain_ms" and rest[0] != unit:
            assert level(rest[0]) < level(unit), f"{unit} must not import {rest[0]}"


@pytest.mark.parametrize("path", COMMAND, ids=str)
def test_the_command_starts_without_mindspore(path):
    """What it needs of `bmtrain_ms` it imports where it is used: importing MindSpore takes seconds."""
    assert not re.search(r"^(import|from) (bmtrain_ms|mindspore)\b", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", BASE, ids=str)
def test_the_base_knows_neither_mindspore_nor_what_is_above_it(path):
    assert not {name.split(".")[0] for name in imports_of(path)} & {"bmtrain_ms", "bmtrain_ms_cli", "mindspore"}


def test_the_base_can_be_imported_where_mindspore_is_absent():
    names = [module_of(path) for path in BASE]
    code = (
        "import importlib, sys\n"
        "sys.modules['mindspore'] = sys.modules['bmtrain_ms'] = None  # an ImportError for who asks\n"
        f"for name in {names!r}: importlib.import_module(name)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_zero_does_not_know_parallel_and_models_do_not_know_training():
    for path in FILES:
        targets = {name.split(".")[1] for name in imports_of(path) if name.startswith("bmtrain_ms.")}
        unit = unit_of(path)
        assert not (unit == "zero" and "parallel" in targets)
        assert not (unit == "model_center" and targets & {"optim", "checkpoint", "data"})


def test_no_file_imports_one_that_imports_it():
    """Not by way of others either, not for its types, and not in a function."""
    paths = {module_of(path): path for path in [*FILES, *BASE, *COMMAND]}
    edges: dict[str, set[str]] = {}
    for name, path in paths.items():
        edges[name] = set()
        for imported in imports_of(path):
            target = imported if imported in paths else imported.rpartition(".")[0]
            # a package's __init__ gathers its own modules; that is not a cycle between modules
            if target in paths and target != name and not name.startswith(target + "."):
                edges[name].add(target)
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for target in sorted(edges[name]):
            visit(target, (*trail, name))
        done.add(name)

    for name in edges:
        visit(name, ())


def test_private_names_of_mindspore_are_used_in_compat_only():
    pattern = re.compile(r"_c_expression|_pynative_executor|mindspore(\.\w+)*\._\w+|import _\w+.*mindspore")
    for path in [*FILES, *COMMAND]:
        if path in COMMAND or unit_of(path) != "compat":
            assert not pattern.search(path.read_text()), path


@pytest.mark.parametrize("path", [*FILES, *COMMAND, *BASE], ids=str)
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is {node.end_lineno - node.lineno} lines long"


def test_every_public_name_has_a_docstring():
    for path in [*FILES, *BASE]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_docstrings_stand_alone():
    """None is a fragment that only its neighbours complete: `Of both.`, `By path.`, `All flat.`"""
    for path in [*FILES, *BASE, *COMMAND]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
                words = re.split(r"\.(?:\s|$)", node.value.value.strip())[0].split()
                assert len(words) >= 3 and words[0] not in ("Of", "By"), f"{path}:{node.lineno}: {' '.join(words)}"


def test_no_pickle_and_no_globals():
    for path in [*FILES, *BASE]:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
                assert "pickle" not in names, path
