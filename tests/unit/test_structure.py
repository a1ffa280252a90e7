"""The shape of the source: who imports whom, and what a module may not contain."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src" / "bmtrain_ms"

# A unit may import the units on lower levels, and those of its own level that are named. Nothing else.
LEVELS = [
    {"compat", "absent", "checks"},
    {"comm"},
    {"zero", "parallel", "distributed", "nn"},
    {"model_center", "optim", "checkpoint", "data", "loss", "lr_scheduler", "wrapper"},
    {"utils", "inspect", "debug", "benchmark", "global_var", "nccl", "store"},
    {"train"},
]
SAME_LEVEL = {("nn", "zero"), ("checkpoint", "optim"), ("optim", "lr_scheduler")}
FILES = sorted(SOURCE.rglob("*.py"))
COMMAND = sorted((ROOT / "src" / "bmtrain_ms_cli").glob("*.py"))  # on top of everything
BASE = sorted((ROOT / "src" / "bmtrain_ms_base").glob("*.py"))  # below everything


def unit_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Modules of this package that a file imports, as paths below it, at any depth of the file."""
    package = ["bmtrain_ms", *path.relative_to(SOURCE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return {name.removeprefix("bmtrain_ms.") for name in found if name.startswith("bmtrain_ms.")}


def level(unit: str) -> int:
    return next(i for i, units in enumerate(LEVELS) if unit in units)


@pytest.mark.parametrize("path", [f for f in FILES if f.parent != SOURCE or f.name != "__init__.py"], ids=str)
def test_imports_form_a_ladder(path):
    unit = unit_of(path)
    for imported in imports_of(path):
        target = imported.split(".")[0]
        if target == unit:
            continue
        assert level(target) < level(unit) or (unit, target) in SAME_LEVEL, f"{unit} must not import {target}"


@pytest.mark.parametrize("path", COMMAND, ids=str)
def test_the_command_starts_without_mindspore(path):
    """What it needs of `bmtrain_ms` it imports where it is used: importing MindSpore takes seconds."""
    assert not re.search(r"^(import|from) (bmtrain_ms|mindspore)\b", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", BASE, ids=str)
def test_the_base_knows_neither_mindspore_nor_what_is_above_it(path):
    assert not re.search(r"^\s*(import|from) (bmtrain_ms|bmtrain_ms_cli|mindspore)\b", path.read_text(), re.MULTILINE)


def test_zero_and_parallel_do_not_know_each_other_and_models_do_not_know_training():
    for path in FILES:
        targets = {name.split(".")[0] for name in imports_of(path)}
        unit = unit_of(path)
        assert not (unit == "zero" and "parallel" in targets) and not (unit == "parallel" and "zero" in targets)
        assert not (unit == "model_center" and targets & {"optim", "checkpoint", "data"})


def test_data_does_not_import_mindspore():
    for path in (SOURCE / "data").glob("*.py"):
        assert not re.search(r"^\s*(import|from) mindspore", path.read_text(), re.MULTILINE), path


def test_modules_have_no_import_cycles():
    graph = {}
    for path in FILES:
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = path
    edges = {}
    for name, path in graph.items():
        tree = ast.parse(path.read_text())
        top_level = ast.Module([n for n in tree.body if isinstance(n, (ast.Import, ast.ImportFrom))], [])
        package = ["bmtrain_ms", *path.relative_to(SOURCE).parts[:-1]]
        targets = set()
        for node in ast.walk(top_level):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = [*package[1 : len(package) - node.level + 1], *([node.module] if node.module else [])]
                for alias in node.names:
                    for candidate in (".".join([*base, alias.name]), ".".join(base)):
                        if candidate in graph and candidate != name:
                            targets.add(candidate)
                            break
        edges[name] = targets
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name in done:
            return
        for target in edges[name]:
            # a package's __init__ gathers its own modules; that is not a cycle between modules
            if not name.startswith(target + ".") and target != "__init__":
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
            assert node.end_lineno - node.lineno < 100, f"{node.name} is {node.end_lineno - node.lineno} lines long"


def test_every_public_name_has_a_docstring():
    for path in [*FILES, *BASE]:
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree) or not tree.body, path
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path}: {node.name}"


def test_no_pickle_and_no_globals():
    for path in [*FILES, *BASE]:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not isinstance(node, ast.Global), path
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [getattr(node, "module", "") or "", *(alias.name for alias in node.names)]
                assert "pickle" not in names, path
