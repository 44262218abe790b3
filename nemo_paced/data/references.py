"""Reader and writer of references.jsonl: a line a problem with its response y_T and its verdict.

``id`` and ``response_ids`` (or ``response`` as text) are what is read. A problem without a
reference says ``"dropped": true``; one that is merely missing is a mistake.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_paced.config import ReferencesConfig, WrongReferences
from nemo_paced.data.prompts import Prompts
from nemo_paced.data.rows import paths_of, read_rows
from nemo_paced.data.schemas import identity
from nemo_paced.errors import ConfigError
from nemo_paced.files import write_whole
from nemo_paced.records import Problem, Response, Rollout


@dataclass(frozen=True, slots=True)
class Reference:
    """Reference of a problem, chosen from the attempts that were sampled and graded.

    Attributes:
        rollout: the first right attempt, else the first.
        attempts: samples that were graded.
        dropped: whether the rollout is wrong and not to be trained along.
    """

    rollout: Rollout
    attempts: int
    dropped: bool

    def to_row(self) -> dict[str, Any]:
        """Line of references.jsonl; that of a dropped problem has no ids, but the text answered."""
        rollout = self.rollout
        what = {"dropped": True} if self.dropped else {"response_ids": rollout.response_ids}
        return {
            "id": rollout.problem_id,
            **what,
            "truncated": rollout.truncated,
            "correct": rollout.correct,
            "attempts": self.attempts,
            "response": rollout.text,
        }


def write_references(path: Path, references: Sequence[Reference]) -> None:
    """Write references.jsonl, in place of an earlier file only when whole."""
    write_whole(path, "".join(json.dumps(r.to_row()) + "\n" for r in references))


def read_references(
    path: Path, problems: Sequence[Problem], prompts: Prompts
) -> dict[str, Response]:
    """Reference responses by problem id; a problem marked as dropped is left out.

    Args:
        prompts: tokenises responses that are given as text.

    Raises:
        ConfigError: no such file, a malformed line, problems that it lacks, or only dropped ones.
    """
    found: dict[str, Response | None] = {}
    for where, row in _rows(path):
        try:
            dropped = row.get("dropped") or False
            found[identity(row["id"])] = None if dropped else _response(row, prompts)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(_malformed(where, error)) from error
    absent = [problem.id for problem in problems if problem.id not in found]
    if absent:
        raise ConfigError(
            f"{path} lacks {len(absent)} of the {len(problems)} problems ({', '.join(absent[:3])})"
        )
    responses = {i: response for i, response in found.items() if response is not None}
    if not any(problem.id in responses for problem in problems):
        raise ConfigError(
            f"{path}: the references of all {len(problems)} problems are dropped, and nothing is "
            "left to train along; set references.wrong=keep, raise references.max_attempts, or "
            "check the verifier (grading.verifier) on a few of the responses in it"
        )
    return responses


def made_with(path: Path, settings: ReferencesConfig) -> bool:
    """Whether a file is what ``references.wrong`` and ``max_attempts`` make of the same samples.

    Raises:
        ConfigError: a malformed line.
    """
    drop = settings.wrong is WrongReferences.drop
    for _, row in _rows(path):
        attempts = row.get("attempts") or 1
        if row.get("correct"):
            alike = attempts <= settings.attempts
        else:
            alike = attempts == settings.attempts and (row.get("dropped") or False) is drop
        if not alike:
            return False
    return True


def _rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a file of references, JSONL or Parquet, and where they stand."""
    for file in paths_of(path, key="references.path"):
        yield from read_rows(file)


def _malformed(where: str, error: Exception) -> str:
    return (
        f"{where}: a JSON object with id and response_ids (or response) is needed, or id and "
        f'"dropped": true: {error!r}'
    )


def _response(row: dict[str, Any], prompts: Prompts) -> Response:
    # in Parquet a column that a row lacks is null
    ids = tuple(row.get("response_ids") or ()) or prompts.response(row["response"])
    problem_id = identity(row["id"])
    return Response(f"{problem_id}/reference", problem_id, ids, bool(row.get("truncated")))
