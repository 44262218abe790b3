"""Reader of problem files: JSONL or Parquet, with our own columns or those of public data sets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_paced.errors import ConfigError
from nemo_paced.grading.answers import last_boxed
from nemo_paced.records import Problem

# What DAPO-Math-17k wraps around each statement; our own template says the same.
_DAPO_BEFORE = "\n\n"
_DAPO_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
# Columns of a row, and what public data sets call them; the first that is there is taken.
_COLUMNS = {
    "id": ("id", "unique_id", "ID", "problem_idx"),
    "problem": ("problem", "question", "Problem"),
    "answer": ("answer", "Answer"),
    "solution": ("solution", "Solution"),
    "group": ("group", "subject"),
}
_DAPO_FIRST_LINE = "Solve the following math problem step by step."


def load_problems(path: str | Path, *, key: str = "data.problems") -> list[Problem]:
    """Problems of a file, in its order.

    Rows hold ``id``, ``problem``, ``answer`` and optionally ``solution`` and ``group``; or

    - as in DAPO-Math-17k ``prompt`` (chat messages), ``reward_model.ground_truth`` and
      ``extra_info.index``;
    - as in MATH-500 ``unique_id``, ``problem``, ``answer``, ``solution``, ``subject`` (the group);
    - as in the copies of AIME ``id``, ``ID`` or ``problem_idx``, ``problem``, ``question`` or
      ``Problem``, and ``answer`` or ``Answer``; without one, what the ``solution`` has in its last
      ``\\boxed{}``.

    Args:
        key: the setting that named the file, for messages.

    Raises:
        ConfigError: no file, no row, a row that is no JSON, a missing or empty field, or an id
            that occurs twice; each with file and line.
    """
    path = Path(path)
    if not str(path) or not path.is_file():
        raise ConfigError(f"{key} is {str(path)!r}: no such file; give a JSONL or Parquet file")
    problems: list[Problem] = []
    first_seen: dict[str, str] = {}
    for where, row in _rows(path):
        problem = _problem(row, where)
        if problem.id in first_seen:
            raise ConfigError(
                f"{where}: id {problem.id!r} occurs before, at {first_seen[problem.id]}; ids must "
                "differ (remove the repetition)"
            )
        first_seen[problem.id] = where
        problems.append(problem)
    if not problems:
        raise ConfigError(f"{path} holds no problem ({key})")
    return problems


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a problem file as (where, row); ``where`` is file:line or file, row number."""
    if path.suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    with path.open(encoding="utf-8") as lines:
        try:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise ConfigError(f"{where}: not JSON: {error}") from error
                if not isinstance(row, dict):
                    raise ConfigError(f"{where}: a JSON object is needed, not {line.strip()[:40]}")
                yield where, row
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path}: not UTF-8 text: {error}") from error


def _parquet_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: not a Parquet file that can be read: {error}") from error
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path}, row {number}", row


def _problem(row: dict[str, Any], where: str) -> Problem:
    if "prompt" in row and "reward_model" in row:
        row = _from_dapo(row, where)
    found = {name: _first(row, columns) for name, columns in _COLUMNS.items()}
    if not found["answer"] and (boxed := last_boxed(found["solution"])) is not None:
        found["answer"] = boxed[0]
    for name in ("id", "problem", "answer"):
        if not found[name].strip():
            known = _COLUMNS[name][1:]
            raise ConfigError(
                f"{where}: field {name!r} is missing or empty (so {_is_are(known)}); it has "
                f"{', '.join(sorted(row))}"
            )
    solution = found.pop("solution") or None
    return Problem(**found, solution=solution)


def _first(row: dict[str, Any], columns: Sequence[str]) -> str:
    present = (row[column] for column in columns if row.get(column) is not None)
    return str(next(present, ""))


def _is_are(names: Sequence[str]) -> str:
    return f"{' and '.join(map(repr, names))} {'is' if len(names) == 1 else 'are'}"


def _from_dapo(row: dict[str, Any], where: str) -> dict[str, Any]:
    try:
        statement = row["prompt"][-1]["content"]
        answer = row["reward_model"]["ground_truth"]
        index = row["extra_info"]["index"]
    except (KeyError, TypeError, IndexError) as error:
        raise ConfigError(
            f"{where}: looks like DAPO-Math-17k, but prompt[-1].content, "
            f"reward_model.ground_truth or extra_info.index is missing ({error!r})"
        ) from error
    if statement.startswith(_DAPO_FIRST_LINE):
        statement = statement.partition(_DAPO_BEFORE)[2].removesuffix(_DAPO_AFTER)
    return {
        "id": index,
        "problem": statement,
        "answer": answer,
        "solution": row.get("solution"),
        "group": row.get("data_source"),
    }
