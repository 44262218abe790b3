"""Reader of problem files: JSONL, JSON or Parquet, with our own columns or published ones."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from nemo_paced.config import DataConfig, Duplicates, Unanswered
from nemo_paced.data.rows import paths_of, read_rows
from nemo_paced.data.schemas import Reading
from nemo_paced.data.schemas import Unanswered as WithoutAnswer
from nemo_paced.errors import ConfigError
from nemo_paced.records import Problem

logger = logging.getLogger(__name__)

NAMED = 3  # rows or ids that a message names


@dataclass
class Contents:
    """What a problem file holds besides its problems, and what was done to read it.

    Attributes:
        rows: all of them, left out ones included.
        sources: column that each field of the first row came from.
        notes: sentences on what was changed or left out, for a person.
        warnings: the same on what may be a mistake in the file.
        repeated: rows that repeat a problem, left out.
        unanswered: rows without an answer, left out.
    """

    rows: int = 0
    sources: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    repeated: int = 0
    unanswered: int = 0

    def tell(self, path: str | Path, moved: Mapping[str, str] | None = None) -> None:
        """Log the notes and warnings of a file.

        Args:
            moved: where its files lie now, by where they lay when they were read.
        """
        told = [(logging.INFO, note) for note in self.notes]
        told += [(logging.WARNING, warning) for warning in self.warnings]
        for level, text in told:
            for before, now in (moved or {}).items():
                text = text.replace(before, now)
            logger.log(level, "%s: %s", path, text)


@dataclass
class ProblemFile(Contents):
    """What a problem file holds; see :class:`Contents` for the rest.

    Attributes:
        problems: in the file's order.
    """

    problems: list[Problem] = field(default_factory=list)


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
    file.tell(path)
    return file.problems


def read_problems(
    path: str | Path, *, key: str = "data.problems", data: DataConfig | None = None
) -> ProblemFile:
    """Read a file, or the files of a pattern such as ``data/train-*.parquet``.

    Args:
        path, key, data: see :func:`each_problem`.

    Raises:
        ConfigError: see :func:`each_problem`.
    """
    file = ProblemFile()
    file.problems = list(each_problem(path, file, key=key, data=data or DataConfig()))
    return file


def each_problem(
    path: str | Path, contents: Contents, *, key: str, data: DataConfig
) -> Iterator[Problem]:
    """Problems of a file, or of the files of a pattern, one by one.

    Rows have the columns of :mod:`nemo_paced.data.schemas`, or those that ``data.columns`` names.

    Args:
        contents: is filled when the last problem was read; ``rows`` counts them on the way.
        key: the setting that named the file, for messages.
        data: its ``columns``, ``duplicates``, ``unanswered`` and ``prompt_template``.

    Raises:
        ConfigError: no file, no row, a row that is no JSON, a missing or empty field, a repeated
            problem or one without an answer (where those are refused), or an id that two problems
            have; each with file and line.
    """
    reading = Reading(
        data.columns, required=key == "data.problems", keep_instructions=keeps_instructions(data)
    )
    kept = _Kept(data.duplicates)
    unanswered: list[str] = []
    for where, row in chain.from_iterable(map(read_rows, paths_of(path, key=key))):
        try:
            problem = reading.problem(row, where, contents.rows)
        except WithoutAnswer as refusal:
            if data.unanswered is Unanswered.refuse:
                raise ConfigError(
                    f"{refusal}; data.unanswered=drop leaves such rows out"
                ) from refusal
            unanswered.append(where)
        else:
            if kept.add(problem, where):
                yield problem
        contents.rows += 1
    count = contents.rows
    if count in (0, kept.repeated + len(unanswered)):
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
    contents.sources, contents.notes, contents.warnings = reading.sources, notes, kept.warnings()
    contents.repeated, contents.unanswered = kept.repeated, len(unanswered)


def keeps_instructions(data: DataConfig) -> bool:
    """Whether statements keep the instructions that a file writes into them."""
    return data.prompt_template.strip() == "{problem}"


class _Kept:
    """What was kept, by id and by text; texts by their digests, a file may hold a million."""

    def __init__(self, duplicates: Duplicates) -> None:
        self.repeated = 0
        self._first = duplicates is Duplicates.first
        self._by_id: dict[str, tuple[str, bytes]] = {}  # where, text
        self._by_text: dict[bytes, tuple[str, str]] = {}  # where, answer
        self._contradictions: list[str] = []

    def add(self, problem: Problem, where: str) -> bool:
        """Whether a problem is to be kept: it repeats no earlier one.

        Raises:
            ConfigError: it does, and repetitions are refused; or it has another's id.
        """
        text = _text_digest(problem, where)
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
            return True
        if not self._first:
            raise ConfigError(self._refusal(problem, where, of_id or of_text))
        self.repeated += 1
        return False

    def warnings(self) -> list[str]:
        if not self._contradictions:
            return []
        return [
            f"{len(self._contradictions)} repetitions of a problem have another answer; the first "
            f"is taken: {_some(self._contradictions)}"
        ]

    def _refusal(self, problem: Problem, where: str, earlier: tuple[str, Any] | None) -> str:
        assert earlier is not None, "a repetition has an earlier one"
        what = f"id {problem.id!r}" if problem.id in self._by_id else "the same problem"
        other = f", with another answer ({self._contradictions[0]})" if self._contradictions else ""
        return (
            f"{where}: {what} occurs before, at {earlier[0]}{other}; remove the repetition, or "
            "take the first of each with data.duplicates=first"
        )


def _text_digest(problem: Problem, where: str) -> bytes:
    """A digest of the statement's words.

    Raises:
        ConfigError: a text is none that can be written.
    """
    try:
        others = (problem.id, problem.answer, problem.solution or "", problem.group)
        for other in (*others, *problem.accepted):
            other.encode()
        words = " ".join(problem.problem.split()).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"{where}: holds {error.object[error.start]!r}, half of a character: mend the text"
        ) from error
    return hashlib.blake2b(words, digest_size=16).digest()


def _some(items: list[str]) -> str:
    more = f", and {len(items) - NAMED} more" if len(items) > NAMED else ""
    return "; ".join(items[:NAMED]) + more
