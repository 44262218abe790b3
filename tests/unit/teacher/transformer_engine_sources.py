"""Transformer Engine's Python sources, read without importing them: it imports on CUDA alone.

Its wheel is downloaded as a file and never installed: Megatron-Core takes a package that can be
found for one that works.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = "transformer_engine"


def download_wheel(version: str, cache: Path) -> Path | None:
    """The newest of the versions by pip's index, else what an earlier run kept, else ``None``."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(cache), f"transformer-engine{version}"]
    subprocess.run(command, capture_output=True, timeout=120, check=False)
    return max(cache.glob("transformer_engine-*.whl"), key=_version, default=None)


def _version(wheel: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in wheel.name.split("-")[1].split(".") if part.isdigit())


class Sources:
    """Modules of a wheel as syntax trees; ``edit``: (old, new) text, to try what a change does."""

    def __init__(self, wheel: Path, edit: tuple[str, str] = ("", "")) -> None:
        with zipfile.ZipFile(wheel) as archive:
            self.text = {
                name: archive.read(name).decode().replace(*edit)
                for name in archive.namelist()
                if name.startswith(f"{ROOT}/") and name.endswith(".py")
            }

    def definition(self, dotted: str) -> ast.AST:
        """The function, class or module of this name, through re-exports.

        Raises:
            LookupError: there is none.
        """
        path = self._path(dotted)
        if path is not None:
            return ast.parse(self.text[path])
        owner, _, name = dotted.rpartition(".")
        path = self._path(owner) if owner else None
        if path is None:
            raise LookupError(f"{dotted}: no module {owner}")
        for node in ast.walk(ast.parse(self.text[path])):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
                return node
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self.definition(f"{_origin(node, owner, path)}.{alias.name}")
        raise LookupError(f"{dotted} is not in {path}")

    def parameters(self, dotted: str) -> set[str]:
        """Keywords that a call of this function or class takes."""
        node = self.definition(dotted)
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                    node = item
                    break
            else:  # a dataclass: its annotated fields
                fields = (item.target for item in node.body if isinstance(item, ast.AnnAssign))
                return {field.id for field in fields if isinstance(field, ast.Name)}
        assert isinstance(node, ast.FunctionDef), f"{dotted} cannot be called"
        arguments = node.args
        return {a.arg for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}

    def broken(self, calls: Iterator[tuple[str, set[str]]]) -> list[str]:
        """What of these (name, keywords) the sources do not have."""
        told = []
        for dotted, keywords in calls:
            try:
                unknown = keywords - self.parameters(dotted) if keywords else set()
                self.definition(dotted)
            except LookupError as error:
                told.append(str(error))
            else:
                told += [f"{dotted} takes no {keyword}" for keyword in sorted(unknown)]
        return told

    def _path(self, dotted: str) -> str | None:
        folder = dotted.replace(".", "/")
        found = (name for name in (f"{folder}.py", f"{folder}/__init__.py") if name in self.text)
        return next(found, None)


def uses(tree: ast.AST, aliases: dict[str, str] | None = None) -> Iterator[tuple[str, set[str]]]:
    """(dotted name, keywords of the call) of all that a tree takes from Transformer Engine."""
    known = {ROOT: ROOT, **(aliases or {})}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == ROOT:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (dotted := _dotted(node.func, known)):
            yield dotted, {k.arg for k in node.keywords if k.arg}


def base_class_calls(tree: ast.ClassDef, aliases: dict[str, str]) -> Iterator[tuple[str, set[str]]]:
    """The call of ``super().__init__`` of a class whose base is Transformer Engine's."""
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "__init__"
            and (dotted := _dotted(tree.bases[0], {ROOT: ROOT, **aliases}))
        ):
            yield dotted, {k.arg for k in node.keywords if k.arg}


def _dotted(node: ast.AST, known: dict[str, str]) -> str | None:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    if not isinstance(node, ast.Name) or node.id not in known:
        return None
    return ".".join([known[node.id], *reversed(parts)])


def _origin(node: ast.ImportFrom, owner: str, path: str) -> str:
    """The module that ``from ... import`` in ``owner`` means."""
    if not node.level:
        return node.module or ""
    package = owner if path.endswith("__init__.py") else owner.rpartition(".")[0]
    for _ in range(node.level - 1):
        package = package.rpartition(".")[0]
    return f"{package}.{node.module}" if node.module else package
