"""Reader and writer of references.jsonl: a line a problem with its response y_T and its verdict.

``id`` and ``response_ids`` (or ``response`` as text) are what is read. A problem without a
reference says ``"dropped": true``; one that is merely missing is a mistake.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from nemo_paced.config import ReferencesConfig, WrongReferences
from nemo_paced.data.prompts import Prompts
from nemo_paced.data.rows import paths_of, read_rows
from nemo_paced.data.schemas import identity
from nemo_paced.errors import ConfigError
from nemo_paced.files import replacing
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
            "outcome": rollout.outcome,
            "attempts": self.attempts,
            "response": rollout.text,
        }


class References(Mapping[str, Response]):
    """Reference responses by problem id, made where they are asked for.

    Those of a training set, as Python integers or tokenised beforehand, would be gigabytes.

    Args:
        ids: of the problems that have one.
        make: the response of a problem.
    """

    def __init__(self, ids: Iterable[str], make: Callable[[str], Response]) -> None:
        self._ids = dict.fromkeys(ids)
        self._make = make

    def __getitem__(self, problem_id: str) -> Response:
        if problem_id not in self._ids:
            raise KeyError(problem_id)
        return self._make(problem_id)

    def __contains__(self, problem_id: object) -> bool:
        return problem_id in self._ids

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)


def solutions(problems: Sequence[Problem], prompts: Prompts) -> References:
    """The problems' expert solutions as references.

    Raises:
        ConfigError: counts and names problems that have none.
    """
    places: dict[str, int] = {}
    absent = []
    for place, problem in enumerate(problems):
        places[problem.id] = place
        if problem.solution is None:
            absent.append(problem.id)
    if absent:
        raise ConfigError(
            f"references.source is solution and {len(absent)} of {len(places)} problems have none "
            f"({', '.join(absent[:3])}): add the field, or set references.source=teacher"
        )

    def make(problem_id: str) -> Response:
        ids = prompts.response(problems[places[problem_id]].solution or "")
        return Response(f"{problem_id}/reference", problem_id, ids, ids[-1] != prompts.eos_id)

    return References(places, make)


def write_references(path: Path, references: Iterable[Reference]) -> None:
    """Write references.jsonl, one by one, in place of an earlier file only when whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, temporary.open("w") as lines:
        lines.writelines(json.dumps(reference.to_row()) + "\n" for reference in references)


def read_references(path: Path, problems: Sequence[Problem], prompts: Prompts) -> References:
    """Reference responses of a file; a problem marked as dropped is left out.

    Args:
        prompts: tokenises responses that are given as text.

    Raises:
        ConfigError: no such file, a malformed line, problems that it lacks, or only dropped ones.
    """
    found: dict[str, _Given | None] = {}
    for where, row in _rows(path):
        try:
            dropped = row.get("dropped") or False
            found[identity(row["id"])] = None if dropped else _given(row)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise ConfigError(_malformed(where, error)) from error
    ids = [problem.id for problem in problems]
    if absent := [name for name in ids if name not in found]:
        raise ConfigError(
            f"{path} lacks {len(absent)} of the {len(ids)} problems ({', '.join(absent[:3])})"
        )
    given = {name: each for name in ids if (each := found[name]) is not None}
    if not given:
        raise ConfigError(
            f"{path}: the references of all {len(ids)} problems are dropped, and nothing is "
            "left to train along; set references.wrong=keep, raise references.max_attempts, or "
            "check the verifier (grading.verifier) on a few of the responses in it"
        )

    def make(problem_id: str) -> Response:
        response, truncated = given[problem_id]
        ids = prompts.response(response) if isinstance(response, str) else tuple(response)
        return Response(f"{problem_id}/reference", problem_id, ids, truncated)

    return References(given, make)


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


class _Given(NamedTuple):
    """What a row gives: a response as text or ids, and whether it is truncated."""

    response: str | array[int]
    truncated: bool


def _given(row: dict[str, Any]) -> _Given:
    # in Parquet a column that a row lacks is null
    ids = row.get("response_ids")
    response: Any = array("i", ids) if ids else row["response"]
    if not response or not isinstance(response, (str, array)):
        raise ValueError(f"the response is {response!r}")
    if isinstance(response, str):
        response.encode()  # half of a character cannot be tokenised when its step comes
    return _Given(response, bool(row.get("truncated")))
