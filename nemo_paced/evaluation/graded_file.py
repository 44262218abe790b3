"""Verdicts on responses that lie in a file, and tables of what they are and rest on."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nemo_paced.config import PacedConfig, Unanswered
from nemo_paced.data.rows import Row, paths_of, read_rows
from nemo_paced.data.schemas import COLUMNS, Reading, field_of
from nemo_paced.data.schemas import Unanswered as WithoutAnswer
from nemo_paced.errors import ConfigError
from nemo_paced.files import replacing
from nemo_paced.grading.grader import Grader, Verdict
from nemo_paced.grading.verdicts import Verdicts, percent
from nemo_paced.records import Outcome
from nemo_paced.run.progress import watched

logger = logging.getLogger(__name__)

# What files call a model's response; the first column that is there is taken.
RESPONSES = (
    *("response", "responses", "completion", "completions", "output", "outputs", "generation"),
    *("generations", "generated_text", "prediction", "model_output", "resps", "text"),
    "generated_solution",
)
LABELS = ("correct", "is_correct", "label")  # verdicts that a file has already
AT_ONCE = 256  # responses that are graded before they are written
TAIL = 300  # characters of a response's end that are shown


@dataclass(frozen=True, slots=True)
class Answered:
    """A response and what it should have answered.

    Attributes:
        id: of the row; with its number behind, where the row has several responses.
        answers: accepted ones, the first the usual one.
        truncated: whether it was cut at a limit.
        label: the file's own verdict; ``None``: it has none.
    """

    id: str
    response: str
    answers: tuple[str, ...]
    truncated: bool = False
    label: bool | None = None


class Answers:
    """Reader of responses and what they should have answered, which notes what it read.

    Args:
        config: its ``data.columns`` name other columns, as for problem files.
        response: the column with a response, or with several; ``None``: the first of ``RESPONSES``
            that the first row has.
    """

    def __init__(self, config: PacedConfig, response: str | None) -> None:
        self._data, self._response = config.data, response
        self._reading = Reading(config.data.columns, keep_instructions=True)
        self.rows = self.dropped = self.empty = 0

    def read(self, path: str) -> Iterator[Answered]:
        """Responses of a file, or of the files of a pattern, one by one.

        Raises:
            ConfigError: no such column, no text in it, no answer to compare with, or as
                :func:`~nemo_paced.data.rows.read_rows`.
        """
        for where, row in chain.from_iterable(map(read_rows, paths_of(path, key="FILE"))):
            self._response = self._response or self._column_of(row, where)
            texts = self._texts(row, where)
            try:
                problem = self._reading.problem(self._answer_of(row), where, self.rows)
            except WithoutAnswer as error:
                if self._data.unanswered is Unanswered.refuse:
                    raise ConfigError(
                        f"{error}; data.columns.answer names another column, "
                        "data.unanswered=drop leaves such rows out"
                    ) from error
                self.dropped += 1
                continue
            finally:
                self.rows += 1
            cut, labels = _cut(row, len(texts), where), _labels(row, len(texts))
            for index, text in enumerate(texts):
                name = problem.id if len(texts) == 1 else f"{problem.id}/{index}"
                answers = (problem.answer, *problem.accepted)
                yield Answered(name, text, answers, cut[index], labels[index])
        if self.rows == self.dropped:
            raise ConfigError(f"{path} holds no response with an answer to compare with")

    def notes(self) -> list[str]:
        """Sentences on what was read and left out."""
        answer = self._reading.sources.get("answer") or self._reading.sources.get("solution")
        notes = [f"responses: column {self._response!r}; answers: column {answer!r}"]
        if self.dropped:
            notes.append(f"{self.dropped} of {self.rows} rows have no answer and were left out")
        if self.empty:
            notes.append(f"{self.empty} responses are null: graded as empty ones")
        return notes

    def _column_of(self, row: Row, where: str) -> str:
        named = set(self._data.columns.values())
        found = [name for name in RESPONSES if name in row and name not in named]
        if not found:
            raise ConfigError(
                f"{where}: no column with a response: it has {', '.join(sorted(row))}; name the "
                "column with --response"
            )
        return found[0]

    def _answer_of(self, row: Row) -> Row:
        """The columns of a row that its answer may be read from, and no others.

        The statement is not needed, and a file of responses may have anything in its place.
        """
        named = {column.partition(".")[0] for column in self._data.columns.values() if column}
        taken = {*COLUMNS["id"], *COLUMNS["answer"], *COLUMNS["solution"], *_ANSWERS_BESIDE, *named}
        kept = {
            name: value
            for name, value in row.items()
            if name in taken
            and name != self._response
            and not (name in LABELS and _is_label(value))
        }
        options = kept.get("choices")
        if isinstance(options, list) and any(isinstance(each, dict) for each in options):
            del kept["choices"]  # completions of an OpenAI server
        if not isinstance(kept.get("solution", ""), (str, list)):
            del kept["solution"]
        return {"problem": "?"} | kept

    def _texts(self, row: Row, where: str) -> list[str]:
        """The responses in a field: a text, texts, lists of texts, or messages that hold one."""
        assert self._response is not None, "found at the first row"
        found = list(_flat(field_of(row, self._response)))
        if not found or not all(each is None or isinstance(each, str) for each in found):
            raise ConfigError(
                f"{where}: column {self._response!r} holds no response; the row has "
                f"{', '.join(sorted(row))}; name the column of the responses with --response"
            )
        self.empty += found.count(None)
        return [each or "" for each in found]


# where published rows keep an answer besides its column
_ANSWERS_BESIDE = ("reward_model", "extra_info", "choices", "options", "correct", "0", "1")


def _flat(value: Any) -> Iterator[Any]:
    """Texts in lists and in messages, as lm-eval and OpenAI's servers write them."""
    if isinstance(value, list):
        for each in value:
            yield from _flat(each)
    elif isinstance(value, dict):
        inner = next(
            (value[name] for name in ("text", "content", "message") if name in value), value
        )
        yield from _flat(inner) if inner is not value else [value]
    else:
        yield value


def grade_file(
    path: str,
    config: PacedConfig,
    *,
    response: str | None = None,
    out: Path | None = None,
    shown: int = 2,
    console: Console,
) -> None:
    """Grade the responses of a file and print what became of them.

    Args:
        response: see :class:`Answers`.
        out: JSONL of the verdicts, a line a response.
        shown: verdicts of each outcome and kind of evidence that are printed, chosen by lot.

    Raises:
        ConfigError: see :class:`Answers`.
        GradingError: see :class:`~nemo_paced.grading.grader.Grader`.
    """
    _check_out(out, path)
    answers, found = Answers(config, response), Verdicts()
    sample, labelled = _Sample(shown, config.model.seed), _Labelled(shown, config.model.seed)
    with ExitStack() as stack:
        lines = None
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            lines = stack.enter_context(stack.enter_context(replacing(out)).open("w"))
        grader = stack.enter_context(Grader(config.grading))
        progress = stack.enter_context(watched(f"grade {path}", None))
        for answered, verdict in _graded(answers.read(path), grader):
            found.add(verdict)
            sample.see((verdict.outcome.value, verdict.evidence.value), answered, verdict)
            labelled.see(answered, verdict)
            if lines is not None:
                lines.write(json.dumps(_line(answered, verdict)) + "\n")
            progress(len(found))
    for note in answers.notes():
        logger.info("%s: %s", path, note)
    _show(console, found, sample, labelled)


def _check_out(out: Path | None, path: str) -> None:
    """Refuse to write where a directory or the responses themselves are.

    Raises:
        ConfigError: so.
    """
    if out is None:
        return
    if out.is_dir():
        raise ConfigError(f"--out is {str(out)!r}, a directory: name a file")
    if out.exists() and any(out.samefile(each) for each in paths_of(path, key="FILE")):
        raise ConfigError(f"--out is {str(out)!r}, the file of the responses: name another")


def _graded(answered: Iterator[Answered], grader: Grader) -> Iterator[tuple[Answered, Verdict]]:
    def grade(each: Answered) -> Verdict:
        first, *accepted = each.answers
        return grader.grade(each.response, first, accepted=accepted, truncated=each.truncated)

    with ThreadPoolExecutor(grader.config.num_workers) as threads:
        while batch := list(islice(answered, AT_ONCE)):
            yield from zip(batch, threads.map(grade, batch), strict=True)


def _line(answered: Answered, verdict: Verdict) -> dict[str, Any]:
    return {
        "id": answered.id,
        "answer": answered.answers[0],
        "truncated": answered.truncated,
        **asdict(verdict),
    }


def _cut(row: Row, number: int, where: str) -> list[bool]:
    """Whether each response was cut, by ``truncated`` or ``finish_reason``.

    Raises:
        ConfigError: ``truncated`` is neither true nor false.
    """
    cut = row.get("truncated")
    if cut is None:
        reasons = row.get("finish_reason")
        several = reasons if isinstance(reasons, list) else [reasons]
        cut = [reason == "length" for reason in several]
    elif not _is_label(cut):
        raise ConfigError(f"{where}: truncated is {cut!r}: true or false is needed")
    return [bool(each) for each in _each(cut, number, False)]


def _labels(row: Row, number: int) -> list[bool | None]:
    name = next((name for name in LABELS if _is_label(row.get(name))), None)
    if name is None:
        return [None] * number
    return [None if each is None else bool(each) for each in _each(row[name], number, None)]


def _is_label(value: Any) -> bool:
    """Whether it is true or false, in words of JSON or as 0 and 1, or a list of them."""
    values = value if isinstance(value, list) else [value]
    return bool(values) and all(
        isinstance(each, (bool, int, float)) and each in (0, 1) for each in values
    )


def _each(value: Any, number: int, default: Any) -> list[Any]:
    values = value if isinstance(value, list) else [value]
    values = values * number if len(values) == 1 else values
    return [*values, *([default] * number)][:number]


class _Sample:
    """A few verdicts of each kind, chosen by lot among all that pass by.

    Args:
        size: how many of a kind.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.kept: dict[tuple[str, ...], list[tuple[Answered, Verdict]]] = {}
        self.seen: dict[tuple[str, ...], int] = {}
        self._size, self._draw = size, random.Random(seed)

    def see(self, kind: tuple[str, ...], answered: Answered, verdict: Verdict) -> None:
        """Let one pass by, which is kept with the chance that every other of its kind has."""
        number = self.seen[kind] = self.seen.get(kind, 0) + 1
        kept = self.kept.setdefault(kind, [])
        if len(kept) < self._size:
            kept.append((answered, verdict))
        elif (place := self._draw.randrange(number)) < self._size:
            kept[place] = answered, verdict


class _Labelled:
    """Agreement with the verdicts that a file has already."""

    def __init__(self, size: int, seed: int) -> None:
        self.number = self.counted = 0
        self.others = _Sample(size, seed)

    def see(self, answered: Answered, verdict: Verdict) -> None:
        if answered.label is None or verdict.outcome is Outcome.timed_out:
            return
        self.number += 1
        if answered.label is not verdict.correct:
            labelled = "right" if answered.label else "wrong"
            self.others.see((verdict.outcome.value, f"labelled {labelled}"), answered, verdict)

    def line(self) -> str:
        """How many verdicts are those of the file, and how many others there are, by kind."""
        others = sum(self.others.seen.values())
        line = f"as the file labels them: {self.number - others} of {self.number}"
        kinds = (f"{n} {' but '.join(kind)}" for kind, n in sorted(self.others.seen.items()))
        return "; ".join([line, *kinds])


def _show(console: Console, found: Verdicts, sample: _Sample, labelled: _Labelled) -> None:
    for (kind, other), kept in sorted(sample.kept.items(), key=_order):
        for answered, verdict in kept:
            _show_one(console, f"{kind}, {other}", answered, verdict)
    for kinds, kept in sorted(labelled.others.kept.items()):
        for answered, verdict in kept:
            _show_one(console, " but ".join(kinds), answered, verdict)
    console.print(_table(found))
    lines = [f"{len(found)} responses: {found.outcomes_line()}", found.grounds_line()]
    for line in [*lines, *([labelled.line()] if labelled.number else [])]:
        console.print(line, highlight=False, soft_wrap=True)


def _order(item: tuple[tuple[str, ...], Any]) -> tuple[int, str]:
    outcome, evidence = item[0]
    return [each.value for each in Outcome].index(outcome), evidence


def _show_one(console: Console, kind: str, answered: Answered, verdict: Verdict) -> None:
    read = "nothing" if verdict.extracted is None else _plain(verdict.extracted)
    head = f"{kind}: {answered.id}: read {read}, the answer is {_plain(answered.answers[0])}"
    head += f" ({verdict.reason})"
    console.print(head, style="bold", markup=False, highlight=False, soft_wrap=True)
    tail = answered.response.rstrip()[-TAIL:]
    lines = [line for line in tail.splitlines() if line.strip()][-4:]
    for line in lines:
        line = f"    {_plain(line)}"
        console.print(line, style="dim", markup=False, highlight=False, soft_wrap=True)


def _plain(text: str) -> str:
    """Text without what a terminal would obey."""
    return "".join(each if each.isprintable() else "�" for each in text)


def _table(found: Verdicts) -> Table:
    """A row for each kind of evidence: how many answers were read so, and what became of them."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    there = [outcome for outcome in Outcome if found.number(outcome)]
    table.add_column("answer read by")
    for outcome in there:
        table.add_column(outcome.value, justify="right")
    table.add_column("share", justify="right")
    for kind, number in found.by("evidence", *Outcome).items():
        counts = [found.by("evidence", outcome).get(kind, 0) for outcome in there]
        cells = (str(count) if count else "" for count in counts)
        table.add_row(kind, *cells, percent(number / len(found)))
    return table
