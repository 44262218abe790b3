"""Reader of problem files: JSONL, JSON or Parquet, with our own columns or published ones."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path

from nemo_paced.config import DataConfig, Duplicates, Unanswered
from nemo_paced.data.rows import paths_of, read_rows
from nemo_paced.data.schemas import Reading
from nemo_paced.data.schemas import Unanswered as WithoutAnswer
from nemo_paced.errors import ConfigError
from nemo_paced.records import Problem

logger = logging.getLogger(__name__)

NAMED = 3  # rows or ids that a message names


@dataclass
class ProblemFile:
    """What a problem file holds, and what was done to read it.

    Attributes:
        problems: in the file's order.
        rows: all of them, left out ones included.
        sources: column that each field of the first row came from.
        notes: sentences on what was changed or left out, for a person.
        warnings: the same on what may be a mistake in the file.
        repeated: rows that repeat a problem, left out.
        unanswered: rows without an answer, left out.
    """

    problems: list[Problem]
    rows: int
    sources: dict[str, str]
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    repeated: int = 0
    unanswered: int = 0


def load_problems(
    path: str | Path, *, key: str = "data.problems", data: DataConfig | None = None
) -> list[Problem]:
    """Problems of a file, in its order; what :func:`read_problems` noticed is logged.

    Args:
        path, key, data: as there.

    Raises:
        ConfigError: as there.
    """
    file = read_problems(path, key=key, data=data)
    for note in file.notes:
        logger.info("%s: %s", path, note)
    for warning in file.warnings:
        logger.warning("%s: %s", path, warning)
    return file.problems


def read_problems(
    path: str | Path, *, key: str = "data.problems", data: DataConfig | None = None
) -> ProblemFile:
    """Read a file, or the files of a pattern such as ``data/train-*.parquet``.

    Rows have the columns of :mod:`nemo_paced.data.schemas`, or those that ``data.columns`` names.

    Args:
        key: the setting that named the file, for messages.
        data: its ``columns``, ``duplicates``, ``unanswered`` and ``prompt_template``.

    Raises:
        ConfigError: no file, no row, a row that is no JSON, a missing or empty field, a repeated
            problem or one without an answer (where those are refused), or an id that two problems
            have; each with file and line.
    """
    data = data or DataConfig()
    bare = data.prompt_template.strip() == "{problem}"
    required = key == "data.problems"
    reading = Reading(data.columns, required=required, keep_instructions=bare)
    kept = _Kept(data.duplicates)
    unanswered: list[str] = []
    count = 0
    for where, row in chain.from_iterable(map(read_rows, paths_of(path, key=key))):
        try:
            kept.add(reading.problem(row, where, count), where)
        except WithoutAnswer as refusal:
            if data.unanswered is Unanswered.refuse:
                raise ConfigError(
                    f"{refusal}; data.unanswered=drop leaves such rows out"
                ) from refusal
            unanswered.append(where)
        count += 1
    if not kept.problems:
        raise ConfigError(f"{path} holds no problem ({key})")
    notes = [f"{rows} of {count} rows: {what}" for what, rows in reading.noticed.items()]
    if reading.numbered:
        notes.append("no column with ids: a problem's id is the number of its row, from 0")
    if unanswered:
        notes.append(
            f"{len(unanswered)} of {count} rows have no answer to compare with and were left out: "
            f"{_some(unanswered)}"
        )
    if kept.repeated:
        notes.append(f"{kept.repeated} of {count} rows repeat a problem and were left out")
    return ProblemFile(
        problems=kept.problems,
        rows=count,
        sources=reading.sources,
        notes=notes,
        warnings=kept.warnings(),
        repeated=kept.repeated,
        unanswered=len(unanswered),
    )


class _Kept:
    """Problems that are kept, by id and by text."""

    def __init__(self, duplicates: Duplicates) -> None:
        self.problems: list[Problem] = []
        self.repeated = 0
        self._first = duplicates is Duplicates.first
        self._by_id: dict[str, tuple[str, str]] = {}  # where, text
        self._by_text: dict[str, tuple[str, str]] = {}  # where, answer
        self._contradictions: list[str] = []

    def add(self, problem: Problem, where: str) -> None:
        """Keep a problem, unless it repeats an earlier one.

        Raises:
            ConfigError: it does, and repetitions are refused; or it has another's id.
        """
        text = " ".join(problem.problem.split())
        of_id, of_text = self._by_id.get(problem.id), self._by_text.get(text)
        if of_id is not None and of_id[1] != text:
            raise ConfigError(
                f"{where}: id {problem.id!r} occurs before, at {of_id[0]}, with another problem; "
                "ids must differ (data.columns.id=null numbers the rows instead)"
            )
        if of_text is not None and of_text[1] != problem.answer:
            self._contradictions.append(
                f"{where} answers {problem.answer!r} and {of_text[0]} {of_text[1]!r}"
            )
        if of_id is None and of_text is None:
            self._by_id[problem.id] = where, text
            self._by_text[text] = where, problem.answer
            self.problems.append(problem)
            return
        if not self._first:
            raise ConfigError(self._refusal(problem, where, of_id or of_text))
        self.repeated += 1

    def warnings(self) -> list[str]:
        if not self._contradictions:
            return []
        return [
            f"{len(self._contradictions)} repetitions of a problem have another answer; the first "
            f"is taken: {_some(self._contradictions)}"
        ]

    def _refusal(self, problem: Problem, where: str, earlier: tuple[str, str] | None) -> str:
        assert earlier is not None, "a repetition has an earlier one"
        what = f"id {problem.id!r}" if problem.id in self._by_id else "the same problem"
        other = f", with another answer ({self._contradictions[0]})" if self._contradictions else ""
        return (
            f"{where}: {what} occurs before, at {earlier[0]}{other}; remove the repetition, or "
            "take the first of each with data.duplicates=first"
        )


def _some(items: list[str]) -> str:
    more = f", and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + more
