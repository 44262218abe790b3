"""Imports point down only; the table is the architecture (the README shows it)."""

import ast
import re
from collections import Counter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nemo_paced"
# lowest first; what stands on one line may not import its neighbours
LAYERS = (
    {"losses", "records", "errors", "logs", "files", "versions", "cpu"},
    {"settings"},
    {"config"},
    {"parallel", "compose"},
    {"hf", "grading", "serving", "weights"},
    {"sizing", "data", "refit"},
    {"rollout", "teacher"},
    {"student"},
    {"run"},
    {"training"},
    {"snr", "preflight", "evaluation"},
    {"report"},
    {"commands", "quickstart"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# every other line may import these neighbours
SHARED = {"errors", "records", "logs", "files"}
# what may be taken into somebody else's trainer by itself
STANDS_ALONE = {"losses": {"errors"}, "weights": {"errors", "config", "records", "files"}}
WIDEST = 12


def modules():
    """Each file of the package by its dotted name, without those that make folders packages."""
    for path in PACKAGE.rglob("*.py"):
        if path.name != "__init__.py":
            yield ".".join(path.relative_to(PACKAGE).with_suffix("").parts), path


MODULES = dict(modules())


def imports_of(path):
    """Modules of the package that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nemo_paced":
            base = node.module.removeprefix("nemo_paced").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                yield name if name in MODULES else base
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("nemo_paced."):
                    yield alias.name.removeprefix("nemo_paced.")


IMPORTS = {name: set(imports_of(path)) for name, path in MODULES.items()}


def test_imports_point_down():
    wrong = []
    for name, imported in IMPORTS.items():
        own = name.split(".")[0]
        for other in {each.split(".")[0] for each in imported} - {own}:
            neighbours = LEVEL[other] == LEVEL[own] and other not in SHARED
            if LEVEL[other] > LEVEL[own] or neighbours:
                wrong.append(f"{name} imports {other}")
            if own in STANDS_ALONE and other not in STANDS_ALONE[own]:
                wrong.append(f"{name} imports {other}, but {own} stands alone")
    assert not wrong, "\n".join(wrong)


def test_the_readme_shows_this_table():
    text = (PACKAGE.parent / "README.md").read_text()
    shown = text[text.index("cli\ncommands") :].partition("```")[0].splitlines()
    levels = [set(re.split(r"\s{2,}", line)[0].split(", ")) for line in reversed(shown)]
    assert levels == [names for names in LAYERS if names != {"settings"}]


def test_no_files_import_each_other_in_a_circle():
    """Files that import nothing of what is left are taken away; a circle stays."""
    left = {name: imported & MODULES.keys() for name, imported in IMPORTS.items()}
    while free := {name for name, imported in left.items() if not imported & left.keys()}:
        left = {name: imported for name, imported in left.items() if name not in free}
    assert not left, f"in a circle, or above one: {sorted(left)}"


def test_no_folder_is_wider_than_a_page():
    files = Counter(path.parent for path in MODULES.values())
    wide = {str(folder.relative_to(PACKAGE)): n for folder, n in files.items() if n > WIDEST}
    assert not wide


def test_init_files_are_empty():
    assert not [p for p in PACKAGE.rglob("__init__.py") if p.read_text().strip()]


def names_of(tree):
    """What a module defines or imports at its top level, conditional parts included."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.asname or alias.name for alias in node.names)


@pytest.mark.parametrize("folder", ["nemo_paced", "tests", "benchmarks", "scripts"])
def test_every_name_that_is_imported_is_there(folder):
    """Also in programs that only slow tests start, and in tests of other hardware."""
    known = {name: set(names_of(ast.parse(path.read_text()))) for name, path in MODULES.items()}
    missing = [
        f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {node.module}.{alias.name}"
        for path in (PACKAGE.parent / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_paced.")
        for alias in node.names
        for base in [node.module.removeprefix("nemo_paced.")]
        if alias.name not in known.get(base, ())
        and f"{base}.{alias.name}" not in MODULES
        and not (PACKAGE / base.replace(".", "/") / alias.name).is_dir()
    ]
    assert not missing
