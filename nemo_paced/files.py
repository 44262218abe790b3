"""Atomic file writes, JSON that every program reads, and digests of plain data."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path``, whose file takes its place when the block ends well.

    A reader never sees half a file, and a process that is killed leaves the earlier one as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that replaces an earlier one only when it is whole; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            temporary.write_text(content)


def write_json(path: Path, tree: Any) -> None:
    """Write plain data as JSON, whole; NaN and infinities become null."""
    write_whole(path, json.dumps(without_nan(tree), indent=1) + "\n")


def without_nan(tree: Any) -> Any:
    """The same plain data with ``None`` for NaN and infinities, which JSON does not have."""
    if isinstance(tree, dict):
        return {key: without_nan(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hex digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(tree: Any, digits: int = 16) -> str:
    """The first ``digits`` hex digits of the SHA-256 of plain data's JSON."""
    return hashlib.sha256(json.dumps(tree).encode()).hexdigest()[:digits]
