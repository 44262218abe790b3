"""Imports point down only; the table is the architecture."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "nemo_paced"
# lowest first; a module may import its own layer's folder and what is below it
LAYERS = (
    {"errors", "records", "settings", "config", "logs", "compose"},
    {"parallel"},
    {"losses", "weights"},
    {"hf"},
    {"sizing"},
    {"data", "rollout"},
    {"teacher"},
    {"training"},
    {"evaluation", "preflight"},
    {"analysis"},
    {"quickstart", "entry"},
    {"cli"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# what the embedded problems are lies beside the quickstart; tests and the package data use it
STANDS_ALONE = {"losses": {"errors"}, "weights": {"errors", "config"}}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nemo_paced"):
            if node.module == "nemo_paced":
                yield from (alias.name for alias in node.names)
            else:
                yield node.module.split(".")[1]
        if isinstance(node, ast.Import):
            yield from (
                a.name.split(".")[1] for a in node.names if a.name.startswith("nemo_paced.")
            )


def test_imports_point_down():
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        own = parts[0].removesuffix(".py")
        if own == "__init__":
            continue
        for name in imports_of(path):
            same_level = LEVEL[name] == LEVEL[own] and name != own and len(parts) > 1
            if LEVEL[name] > LEVEL[own] or (same_level and LEVEL[own] > 1):
                wrong.append(f"{'/'.join(parts)} imports {name}")
            if own in STANDS_ALONE and name != own and name not in STANDS_ALONE[own]:
                wrong.append(f"{'/'.join(parts)} imports {name}, but {own} stands alone")
    assert not wrong, "\n".join(wrong)


def test_init_files_are_empty():
    assert not [p for p in PACKAGE.rglob("__init__.py") if p.read_text().strip()]
