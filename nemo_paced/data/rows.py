"""Rows of problem files as they are published: JSONL, JSON and Parquet, in one file or many."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nemo_paced.errors import ConfigError

Row = dict[str, Any]
BATCH = 1024  # rows of a Parquet file that are in memory at once


def paths_of(pattern: str | Path, *, key: str) -> list[Path]:
    """The files that a path or a pattern such as ``data/train-*.parquet`` stands for, in order.

    Args:
        key: the setting that named them, for messages.

    Raises:
        ConfigError: there is none, or it is a directory.
    """
    path = Path(pattern)
    if str(pattern) and path.is_file():
        return [path]
    if path.is_dir() and str(pattern):
        raise ConfigError(
            f"{key} is {str(pattern)!r}, a directory: give a file, or a pattern such as "
            f"{path / 'train-*.parquet'} (of the splits in it only one is meant)"
        )
    found = [Path(name) for name in sorted(glob.glob(str(pattern)))]  # noqa: PTH207  absolute too
    if not found:
        raise ConfigError(f"{key} is {str(pattern)!r}: no such file; give a JSONL or Parquet file")
    return found


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Rows of a file as (where, row); ``where`` is file:line or file, row number.

    A conversation of two turns, which has no columns, is a row with the columns ``0`` and ``1``, as
    Parquet copies have it.

    Raises:
        ConfigError: not what its name says, with file and line; or it cannot be read.
    """
    try:
        if path.suffix == ".parquet":
            yield from _parquet(path)
        elif path.suffix == ".json" and _first_character(path) == "[":
            yield from _json(path)
        else:
            yield from _jsonl(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"{where}: not JSON: {error}") from error
                yield where, _as_row(row, where, line)
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text: {error}") from error


def _json(path: Path) -> Iterator[tuple[str, Row]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        where = f"{path}, row {number}"
        yield where, _as_row(row, where, repr(row))


def _parquet(path: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(BATCH):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file that can be read: {error}") from error


def _as_row(row: Any, where: str, text: str) -> Row:
    if isinstance(row, list) and len(row) == 2 and all(isinstance(turn, dict) for turn in row):
        return {"0": row[0], "1": row[1]}
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: a JSON object is needed, not {text.strip()[:40]}")
    return row


def _first_character(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1]
