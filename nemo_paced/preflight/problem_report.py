"""What a problem file holds and what the models will see of it: the command ``data``."""

from __future__ import annotations

import re
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from nemo_paced.config import DataConfig, Duplicates, PacedConfig, Unanswered
from nemo_paced.data.problems import ProblemFile, each_problem
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.errors import ConfigError
from nemo_paced.preflight.files import verifier_fits
from nemo_paced.preflight.findings import Finding, Severity, error
from nemo_paced.preflight.inputs import PROBLEM_FILES
from nemo_paced.records import Problem
from nemo_paced.run.progress import watched

T = TypeVar("T")

MEASURED = 10_000  # texts of a kind that are tokenised for the statistics

# kinds of answers, the first that matches
_KINDS = {
    "integer": r"-?\$?\d[\d,]*",
    "decimal": r"-?\$?\d*\.\d+",
    "fraction": r"-?(\d+/\d+|\\[dt]?frac\{?\d+\}?\{?\d+\}?)",
    "choice": r"\(?[A-J]\)?",
    "words": r"[A-Za-z][A-Za-z .'-]+",
}


@dataclass(frozen=True, slots=True)
class Lengths:
    """Token counts of one kind of text.

    Attributes:
        tokens: of ``MEASURED`` of the texts at most.
        of: number of all texts.
        limit: most tokens, if there is such.
        above: id and tokens of each prompt above the limit, the longest first.
        kind: of prompts; ``None``: no prompts.
        without_context: problems of which the teacher has no such prompt.
    """

    what: str
    tokens: Sequence[int]
    of: int
    limit: int | None
    above: Sequence[tuple[str, int]] = ()
    kind: PromptKind | None = None
    without_context: int = 0

    @property
    def is_whole(self) -> bool:
        """Whether every text was measured."""
        return len(self.tokens) == self.of

    @property
    def share_above(self) -> str:
        """How many are above the limit, for a cell; a share where not every text was measured."""
        if self.limit is None:
            return ""
        if self.kind is not None:
            return str(len(self.above))
        above = sum(n > self.limit for n in self.tokens)
        return str(above) if self.is_whole else f"{above / len(self.tokens):.1%}"


def report(path: str, config: PacedConfig, console: Console, *, key: str, shown: int) -> None:
    """Print what a file holds, and some of its problems as the models will see them.

    Args:
        key: the setting that names the file, for messages; decides which prompts are made.
        shown: number of problems to print whole.

    Raises:
        ConfigError: a row that cannot be read, or what a run would refuse; the rest is printed.
    """
    data = config.data
    lenient = replace(data, duplicates=Duplicates.first, unanswered=Unanswered.drop)
    file = _read(path, key, lenient)
    console.rule(Text(path, style="bold"), align="left")
    _print_contents(file, console)
    prompts = _prompts(config)
    findings = list(_refused(file, data, key))
    findings += verifier_fits(config, file.problems, key)
    if prompts is None:
        console.print("No student.hf_path: name a recipe, or a model, for prompts and lengths.")
    else:
        lengths = list(_lengths(file.problems, prompts, key))
        _print_lengths(lengths, console)
        findings += _too_long(lengths, prompts, key)
        for problem in _some(file.problems, shown):
            _print_problem(problem, prompts, console, key)
        _print_ends(prompts, console)
    for finding in findings:
        console.print(str(finding), soft_wrap=True, markup=False, highlight=False)
    if any(finding.severity is Severity.error for finding in findings):
        raise ConfigError(f"{path}: a run would refuse it, for what is said above")


def _read(path: str, key: str, data: DataConfig) -> ProblemFile:
    file = ProblemFile()
    with watched(f"reading {path}", None) as progress:
        for problem in each_problem(path, file, key=key, data=data):
            file.problems.append(problem)
            if len(file.problems) % 1024 == 0:
                progress(len(file.problems))
    return file


def _prompts(config: PacedConfig) -> Prompts | None:
    if not config.student.hf_path:
        return None
    context = config.teacher.privileged_context
    return Prompts(config.student.hf_path, config.data, context, config.evaluation).with_chats()


def _refused(file: ProblemFile, data: DataConfig, key: str) -> Iterator[Finding]:
    if file.repeated and data.duplicates is Duplicates.refuse:
        yield error(
            key,
            f"{file.repeated} of {file.rows} rows repeat a problem",
            "set data.duplicates=first",
        )
    if file.unanswered and data.unanswered is Unanswered.refuse:
        yield error(
            key,
            f"{file.unanswered} of {file.rows} rows have no answer to compare with",
            "set data.unanswered=drop",
        )


def _too_long(lengths: Sequence[Lengths], prompts: Prompts, key: str) -> Iterator[Finding]:
    for row in lengths:
        if row.kind is None or row.kind is PromptKind.evaluation:
            continue  # cut, or limited by the model's context alone
        if row.without_context:
            yield error(
                "teacher.privileged_context",
                f"{row.without_context} of {row.of + row.without_context} problems have no "
                "solution for the teacher",
                "set it to answer or none",
            )
        try:
            prompts.refuse(row.above, row.kind, of=row.of)
        except ConfigError as refusal:
            yield error(key, str(refusal))


def _kinds(key: str) -> list[PromptKind]:
    trained = key == "data.problems"
    return [PromptKind.student, PromptKind.teacher] if trained else [PromptKind.evaluation]


def _print_contents(file: ProblemFile, console: Console) -> None:
    problems = file.problems
    rows = [("problems", f"{len(problems)} of {file.rows} rows")]
    fields = [f"{name} from `{column}`" for name, column in file.sources.items()]
    rows.append(("columns", ", ".join(fields)))
    kinds = Counter(_kind(problem.answer) for problem in problems)
    rows.append(("answers", ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())))
    if several := sum(bool(problem.accepted) for problem in problems):
        rows.append(("", f"{several} problems accept several"))
    longest = max(problems, key=lambda problem: len(problem.answer))
    rows.append(("", f"the longest, of {longest.id!r}: {_cut(longest.answer, 80)}"))
    solved = sum(problem.solution is not None for problem in problems)
    rows.append(("solutions", f"{solved} of {len(problems)}" if solved else "none"))
    if groups := Counter(problem.group for problem in problems if problem.group):
        most = ", ".join(f"{_cut(name, 40)} {count}" for name, count in groups.most_common(6))
        rows.append(("groups", most + (f", and {len(groups) - 6} more" if len(groups) > 6 else "")))
    rows += [("note", note) for note in file.notes]
    rows += [("warning", warning) for warning in file.warnings]
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    for name, text in rows:
        # as text: what files hold may look like markup
        table.add_row(Text(name, style="yellow" if name == "warning" else ""), Text(text))
    console.print(table)


def _lengths(problems: Sequence[Problem], prompts: Prompts, key: str) -> Iterator[Lengths]:
    for kind in _kinds(key):
        asked = problems
        if kind is PromptKind.teacher and prompts.needs_solution:
            asked = [problem for problem in problems if problem.solution is not None]
        limit = None if kind is PromptKind.evaluation else prompts.limit(kind)[1]
        what = f"{kind.value} prompt"
        some = _some(asked, MEASURED)
        with watched(f"{what}s", len(some)) as progress:
            tokens = prompts.lengths(some, kind, progress)
        above: list[tuple[str, int]] = []
        if limit is not None:
            with watched(f"{what}s above {limit} tokens", len(asked)) as progress:
                above = prompts.above(asked, kind, limit, progress)
        without = len(problems) - len(asked)
        yield Lengths(what, tokens, len(asked), limit, above, kind, without)
    solved = [problem.solution for problem in problems if problem.solution is not None]
    tokens = prompts.tokens(_some(solved, MEASURED))
    yield Lengths("solution", tokens, len(solved), prompts.data.max_response_length)


def _print_lengths(lengths: Sequence[Lengths], console: Console) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("tokens", "mean", "median", "99 %", "longest", "limit", "above it"):
        table.add_column(name, justify="left" if name == "tokens" else "right")
    for row in lengths:
        if not row.tokens:
            continue
        ordered = sorted(row.tokens)
        longest = row.above[0][1] if row.above else ordered[-1]
        table.add_row(
            row.what,
            f"{statistics.fmean(ordered):.0f}",
            str(ordered[len(ordered) // 2]),
            str(ordered[min(len(ordered) - 1, len(ordered) * 99 // 100)]),
            str(longest) if row.above or row.is_whole else f"{longest}*",
            "" if row.limit is None else str(row.limit),
            row.share_above,
        )
    console.print(table)
    if not all(row.is_whole for row in lengths):
        console.print(
            f"Lengths are those of {MEASURED} problems, evenly apart (* the longest of these); "
            "prompts above the limit were looked for among all.",
            highlight=False,
        )


def _print_problem(problem: Problem, prompts: Prompts, console: Console, key: str) -> None:
    for kind in _kinds(key):
        try:
            ids = prompts.encoded(problem, kind)
        except ConfigError as refusal:
            console.print(f"{problem.id}: {refusal}", markup=False, soft_wrap=True)
            continue
        title = f"problem {problem.id} as the {kind.value} sees it, {len(ids)} tokens"
        if kind is PromptKind.evaluation:
            title = f"problem {problem.id} as it is evaluated, {len(ids)} tokens"
        answer = f"answer: {_cut(problem.answer, 60)}"
        console.print(
            Panel(_visible(ids, prompts), title=Text(title), subtitle=Text(answer), expand=True)
        )


def _visible(ids: Sequence[int], prompts: Prompts) -> Text:
    """A prompt with its special tokens set off."""
    text, run = Text(), list[int]()
    special = prompts.tokenizer.added_tokens_decoder

    def flush() -> None:
        text.append(prompts.tokenizer.decode(run, skip_special_tokens=False))
        run.clear()

    for token in ids:
        if token in special:
            flush()
            text.append(str(special[token]), style="reverse cyan")
        else:
            run.append(token)
    flush()
    return text


def _print_ends(prompts: Prompts, console: Console) -> None:
    names = prompts.tokenizer.convert_ids_to_tokens(list(prompts.stop_token_ids))
    line = f"Responses end with {', '.join(names)}"
    if prompts.opens_thought:
        line += "; they begin inside a thought that the template opens"
    if not prompts.has_chat:
        line += "; prompts go through no chat template"
    console.print(line + ".", markup=False, highlight=False)


def _some(each: Sequence[T], count: int) -> list[T]:
    """The first and others, evenly apart."""
    count = min(count, len(each))
    return [each[index * len(each) // count] for index in range(count)]


def _kind(answer: str) -> str:
    return next((k for k, form in _KINDS.items() if re.fullmatch(form, answer)), "expression")


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def files_of(config: PacedConfig) -> dict[str, str]:
    """Problem files of a configuration by their setting."""
    files = {f"data.{name}": getattr(config.data, name) for name in PROBLEM_FILES}
    return {key: path for key, path in files.items() if path}
