r"""Schemas of published problem sets: which columns of a row hold statement, answer, solution, id.

Read as published: our own columns; DAPO-Math-17k and other files for verl (``prompt`` as chat
turns, ``reward_model.ground_truth``) and its processed copy (``prompt`` as text);
Open-Reasoner-Zero (conversations); NuminaMath, OpenR1-Math, DeepScaleR, MATH and MATH-500, Minerva,
AIME and AMC in their copies (an answer, or a solution with a last ``\boxed{}``); GSM8K (the answer
after ``####``); OlympiadBench; SVAMP and ASDiv (``Body`` and ``Question``); MMLU, AQuA, ARC and SAT
(choices).
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

from nemo_paced.errors import ConfigError
from nemo_paced.grading.evidence import last_boxed
from nemo_paced.records import Problem

Row = dict[str, Any]

# Columns of a row, and what public data sets call them; the first that is there is taken.
COLUMNS: dict[str, tuple[str, ...]] = {
    "id": ("id", "unique_id", "uuid", "ID", "problem_id", "question_id", "problem_idx", "idx"),
    "problem": ("problem", "question", "Problem", "Question", "prompt", "query"),
    "answer": (
        *("answer", "Answer", "final_answer", "expected_answer", "ground_truth"),
        *("answerKey", "gold"),
    ),
    "solution": ("solution", "Solution", "rationale", "generated_solution"),
    "group": ("group", "subject", "type", "Type", "problem_type", "subfield", "data_source"),
}
_LETTERS = "ABCDEFGHIJ"
_CHATS = ("prompt", "messages", "conversations")
_CHOICES = ("choices", "options")
_BODIES = ("Body", "body", "context")
# What data sets write where there is no answer to compare with.
NO_ANSWERS = frozenset(("proof", "notfound", "not found", "nan", "n/a", "null"))

# What prompts hold beside the statement; our own template says the like.
_DAPO_BEFORE = re.compile(
    r"Solve the following math problem step by step\. The last line of your response should be of "
    r"the form Answer:[^\n]*\n\n"
)
_INSTRUCTION = re.compile(
    r"(?:Please reason step by step,? and put your final answer (?:with)?in \\boxed\{\}"
    r"|Let's think step by step and output the final answer (?:within \\boxed\{\}|after \"####\")"
    r"|Remember to put your answer on its own line after \"Answer:\")"
    r"\.?\Z"
)
# GSM8K's last line; MetaMath's repetition may follow
_AFTER_MARK = re.compile(r"(?m)^####[ \t]*([^#\s].*)(?:\n\s*The answer is.*)?\Z")
_BOX = re.compile(r"\\(?:boxed|fbox)\b")
_CALCULATOR = re.compile(r"<<[^<>]*>>")  # GSM8K: 3*4=<<3*4=12>>12
_WITH_UNIT = re.compile(r"(-?[\d.,/]+)\s*\(([^()]*)\)")  # ASDiv: 9 (apples)
_LABEL = re.compile(r"\s*\(?([A-Ja-j])[).:]\s*")


class Unanswered(ConfigError):
    """A row without an answer that a response could be compared with."""


@dataclass
class Reading:
    """How rows become problems, and what was noticed on the way.

    Attributes:
        columns: the user's column by field; a dotted name is a field of a column.
        required: refuse a file that has none of these columns; else it is read by its own.
        keep_instructions: leave instructions in statements (a bare prompt template has none).
        numbered: whether rows are known by their number, as the file has no ids.
        noticed: rows by what was done to them, or what they hold that is not used.
        sources: where each field of the first row came from.
    """

    columns: Mapping[str, str | None] = field(default_factory=dict)
    required: bool = True
    keep_instructions: bool = False
    numbered: bool = False
    noticed: Counter[str] = field(default_factory=Counter)
    sources: dict[str, str] = field(default_factory=dict)
    _own: bool = False

    def problem(self, row: Row, where: str, number: int) -> Problem:
        """The problem of a row.

        Args:
            where: file and line, for messages.
            number: of the row, from 0; decides by the first row whether the file has ids.

        Raises:
            Unanswered: there is no answer, or none that can be compared with.
            ConfigError: a field that is missing, empty or no text.
        """
        columns = sorted(row)
        if not number:
            self._own = self._reads_own(row, where)
        own = self._own_columns(row) if self._own else {}
        row = self._unpacked(row, where, chat="problem" not in own)
        if self._own:
            ours = {column for name in self.columns for column in COLUMNS[name]}
            row = {name: value for name, value in row.items() if name not in ours} | own
        found = {name: _first(row, names) for name, names in COLUMNS.items()}
        if found["answer"][1] is None and any(row.get(name) for name in _CHOICES):
            found["answer"] = _first(row, ("correct",))  # AQuA's; elsewhere it is a verdict
        if not number:
            self.numbered = found["id"][1] is None
            self.sources = {name: column for name, (column, _) in found.items() if column}
            self.sources |= {name: column for name in own if (column := self.columns[name])}
        statement = self._statement(row, found["problem"][1], where, columns)
        solution = _solution(found["solution"][1], where)
        answers, solution = self._answers(row, found["answer"], solution, where, columns)
        name = str(number) if self.numbered else identity(found["id"][1])
        if not name:
            raise ConfigError(
                f"{_missing('id', where, columns)}, or number the rows with data.columns.id=null"
            )
        return Problem(
            id=name,
            problem=statement,
            answer=answers[0],
            solution=solution,
            group=str(found["group"][1] or ""),
            accepted=tuple(answers[1:]),
        )

    def _reads_own(self, row: Row, where: str) -> bool:
        """Whether a file, of which this is the first row, has the columns that the user names."""
        named = [column for column in self.columns.values() if column]
        absent = [column for column in named if field_of(row, column) is ABSENT]
        if absent and len(absent) == len(named) and not self.required:
            self.noticed["data.columns names none of its columns: it is read by its own"] += 1
            return False
        if absent:
            raise ConfigError(
                f"{where}: data.columns names {absent[0]!r}, which is no column of it; it has "
                f"{', '.join(sorted(row))}"
            )
        return bool(self.columns)

    def _own_columns(self, row: Row) -> Row:
        """The user's columns by our names; those that a row lacks are ``None``."""
        values = {name: field_of(row, column) for name, column in self.columns.items() if column}
        return {name: None if value is ABSENT else value for name, value in values.items()}

    def _unpacked(self, row: Row, where: str, *, chat: bool) -> Row:
        """The row with what lies in chats and blocks (verl, Open-Reasoner-Zero) as columns.

        Args:
            chat: whether a chat may hold the statement.
        """
        answer, extra = _truth(row, where), row.get("extra_info")
        turns = _chat(row) if chat else None
        if answer is not ABSENT:
            row = row | {"ground_truth": answer, "answer": None}
        if isinstance(extra, dict) and extra.get("index") is not None and "id" not in row:
            row = row | {"id": extra["index"]}
        if turns is None:
            return row
        roles = [_role(turn) for turn in turns]
        if roles.count("user") != 1 or not {"user", "system"}.issuperset(roles):
            raise ConfigError(
                f"{where}: a chat of one user turn is needed (as in DAPO-Math-17k); it has the "
                f"turns {', '.join(roles) or 'none'}"
            )
        if "system" in roles:
            self.noticed["the row's system turn is left out: set data.system_prompt"] += 1
        turn = turns[roles.index("user")]
        return row | {"problem": turn.get("content", turn.get("value"))}

    def _statement(self, row: Row, value: Any, where: str, columns: list[str]) -> str:
        if isinstance(value, (list, dict, bool)):
            raise ConfigError(f"{where}: the problem is a {type(value).__name__}, not a text")
        text = "" if value is None else str(value)
        if not text.strip():
            raise ConfigError(_missing("problem", where, columns))
        body = next((row[name] for name in _BODIES if isinstance(row.get(name), str)), "")
        if body.strip() and body.strip() not in text:
            stop = "" if body.strip()[-1] in ".!?:;," else "."
            text = f"{body.strip()}{stop} {text.strip()}"
            self.noticed["the body stands before the question"] += 1
        if not self.keep_instructions:
            bare = _without_instruction(text)
            if bare != text:
                self.noticed["an instruction was taken off: data.prompt_template has its own"] += 1
            text = bare
        if choices := _choices(row, where):
            text += "\n\n" + "\n".join(f"{label}) {choice}" for label, choice in choices)
            self.noticed["multiple choice: the choices stand behind the question"] += 1
        return text

    def _answers(
        self,
        row: Row,
        answer: tuple[str | None, Any],
        solution: str | None,
        where: str,
        columns: list[str],
    ) -> tuple[list[str], str | None]:
        """Accepted answers, the first the usual one, and the solution, which may hold it."""
        column, value = answer
        if row.get("error") and column == "final_answer":
            self.noticed["a tolerance of the row's own (`error`) is not used"] += 1
        if value is None:
            value = _from_solution(solution)
            if value is None:
                raise Unanswered(_missing("answer", where, columns))
            self.noticed["the answer is what the solution marks"] += 1
            return [value], solution
        if column in _LISTS or "reward_model" in row:
            value = _listed(value)
        if choices := _choices(row, where):
            return [_label(value, row, choices, where)], solution
        several = value if isinstance(value, list) else [value]
        if not several or (isinstance(value, list) and column not in _LISTS):
            raise Unanswered(f"{where}: the answer is a list, {_shown(value)}: one text is needed")
        answers = [_answer(each, where) for each in several]
        if len(answers) > 1 and row.get("is_multiple_answer"):
            answers = [", ".join(answers)]  # all of them are asked for
        marked = [_marked(each) for each in answers]
        answers, worked = [each for each, _ in marked], marked[0][1]
        if worked is not None:
            self.noticed["the answer is what a worked solution marks"] += 1
            solution = solution or worked
        if "reward_model" in row and solution is not None and solution.strip() in answers:
            solution = None  # the processed copy of DAPO-Math-17k calls the answer so
        if _BODIES[0] in row or _BODIES[1] in row:
            answers = [_WITH_UNIT.sub(r"\1", each) for each in answers]
        return list(dict.fromkeys(answers)), solution


ABSENT = object()
_LISTS = ("final_answer", "ground_truth")  # columns whose lists are several accepted answers


def _truth(row: Row, where: str) -> Any:
    """The answer of a row that keeps it in a block; ``ABSENT``: it is a column, if anything."""
    if {"0", "1"} <= row.keys():
        try:
            return row["1"]["ground_truth"]["value"]
        except (KeyError, TypeError) as error:
            raise ConfigError(
                f"{where}: looks like Open-Reasoner-Zero, but the second turn has no "
                f"ground_truth.value ({error!r})"
            ) from error
    reward = row.get("reward_model")
    return reward.get("ground_truth", ABSENT) if isinstance(reward, dict) else ABSENT


def _chat(row: Row) -> list[Any] | None:
    """Turns that hold the statement; ``None``: a column does."""
    if any(isinstance(row.get(name), str) for name in COLUMNS["problem"]):
        return None
    if "0" in row and "1" in row:
        return [row["0"]]
    chats = (row[name] for name in _CHATS if isinstance(row.get(name), list))
    return next(chats, None)


def _role(turn: Any) -> str:
    role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else "?"
    return "user" if role == "human" else str(role)


def _first(row: Row, names: tuple[str, ...]) -> tuple[str | None, Any]:
    """The first column that there is and holds something, and its value."""
    for name in names:
        value = row.get(name)
        empty = value.isspace() or not value if isinstance(value, str) else _is_nan(value)
        if value is not None and not empty:
            return name, value
    return None, None


def field_of(row: Row, column: str) -> Any:
    """A column, or a field of one by its dotted name; ``ABSENT`` where there is none."""
    if column in row:
        return row[column]
    value: Any = row
    for part in column.split("."):
        if not isinstance(value, dict) or part not in value:
            return ABSENT
        value = value[part]
    return value


def identity(value: Any) -> str:
    """An id as text; empty: there is none. A number of pandas, 3.0, is 3."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _solution(value: Any, where: str) -> str | None:
    """An expert solution; of several the first."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, (dict, bool)):
        raise ConfigError(f"{where}: the solution is a {type(value).__name__}, not a text")
    return str(value) if value is not None and str(value).strip() else None


def _from_solution(solution: str | None) -> str | None:
    """The answer that a solution marks: behind ``####``, else in its last box."""
    if solution is None:
        return None
    if mark := _AFTER_MARK.search(solution.rstrip()):
        return _plain_number(mark[1])
    boxed = last_boxed(solution)
    return boxed or None


def _marked(answer: str) -> tuple[str, str | None]:
    """A marked answer without the solution around it, and that solution, if there is one."""
    if mark := _AFTER_MARK.search(answer):
        worked = _CALCULATOR.sub("", answer[: mark.start()]).strip()
        return _plain_number(mark[1]), worked or None
    boxed = last_boxed(answer)
    if not boxed or len(_BOX.findall(answer)) > 1:
        return answer, None
    around = re.sub(r"\\(boxed|fbox)\s*", "", answer).strip("${} .")
    return boxed, answer if len(around) > len(boxed) else None


def _plain_number(text: str) -> str:
    """A number without thousands separators; other text as it is."""
    text = text.strip()
    grouped = re.fullmatch(r"-?\$?\d{1,3}(,\d{3})+(\.\d+)?", text)
    return text.replace(",", "") if grouped else text


def _answer(value: Any, where: str) -> str:
    """An answer as text.

    Raises:
        Unanswered: it is none, or of a kind that cannot be compared with.
    """
    if isinstance(value, float):
        if not math.isfinite(value):
            raise Unanswered(f"{where}: the answer is {value}")
        value = int(value) if value.is_integer() else value
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise Unanswered(
            f"{where}: the answer is {_shown(value)}, a {type(value).__name__}: a text or a number "
            "is needed"
        )
    text = str(value).strip()
    if text.lower() in NO_ANSWERS or not text:
        raise Unanswered(f"{where}: the answer is {text!r}: nothing to compare a response with")
    return text


def _listed(value: Any) -> Any:
    """A list that is written as JSON in a text, as the list; everything else as it is."""
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            inner = json.loads(value)
        except ValueError:
            return value
        if isinstance(inner, list) and all(isinstance(each, str) for each in inner):
            return inner
    return value


def _choices(row: Row, where: str) -> list[tuple[str, str]]:
    """Choices of a row by their letter; none: it is no multiple choice."""
    given: Any = next((row[name] for name in _CHOICES if row.get(name)), None)
    if isinstance(given, dict):
        # ARC's, or MedQA's by letter
        given = given.get("text") or _lettered(given)
    elif given is None:
        given = _lettered(row)
    if isinstance(given, str):
        given = _split_choices(given)
    if given is None:
        return []
    if not isinstance(given, list) or not 2 <= len(given) <= 10:
        raise ConfigError(
            f"{where}: choices are {_shown(given)}: 2 to 10 are needed, as a list or by letter"
        )
    texts = [str(each) for each in given]
    labelled = [_LABEL.match(text) for text in texts]
    if all(
        match and match[1].upper() == letter
        for match, letter in zip(labelled, _LETTERS, strict=False)
    ):
        texts = [text[match.end() :] for text, match in zip(texts, labelled, strict=True) if match]
    return list(zip(_LETTERS, texts, strict=False))


def _lettered(fields: Row) -> list[Any] | None:
    """Choices in fields called A, B and so on; ``None``: there are none."""
    letters = list(takewhile(lambda letter: fields.get(letter) is not None, _LETTERS))
    return [fields[letter] for letter in letters] if len(letters) > 1 else None


def _split_choices(text: str) -> list[str]:
    """Choices of a text such as ``A) 1 B) 2``, whose letters follow each other."""
    begins: list[re.Match[str]] = []
    for letter in _LETTERS:
        label = re.compile(rf"(?:^|\s)\(?{letter}[).:](?:\s|$)")
        found = label.search(text, begins[-1].end() if begins else 0)
        if found is None:
            break
        begins.append(found)
    ends = [*(match.start() for match in begins), len(text)][1:]
    return [text[m.end() : end].strip() for m, end in zip(begins, ends, strict=True)]


def _label(value: Any, row: Row, choices: list[tuple[str, str]], where: str) -> str:
    """The letter of the right choice, which a row names by index from 0, letter, label or text."""
    letters, texts = zip(*choices, strict=True)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(letters):
        return letters[value]
    if isinstance(value, str):
        named = value.strip("(). ").upper()
        for names in (_own_labels(row), letters, texts):
            if (name := value.strip() if names is texts else named) in names:
                return letters[list(names).index(name)]
    raise Unanswered(
        f"{where}: the answer is {_shown(value)}, and the choices are {', '.join(letters)}"
    )


def _own_labels(row: Row) -> list[str]:
    """ARC's labels of the choices, some of which are numbers from 1."""
    given: Row = next((row[name] for name in _CHOICES if isinstance(row.get(name), dict)), {})
    return [str(label).upper() for label in given.get("label") or []]


def _without_instruction(text: str) -> str:
    bare = _DAPO_BEFORE.sub("", text, count=1) if _DAPO_BEFORE.match(text) else text
    whole = bare.rstrip()
    end = _INSTRUCTION.search(whole)
    bare = whole[: end.start()].rstrip() if end else bare
    return bare if bare.strip() else text


def _missing(name: str, where: str, columns: list[str]) -> str:
    known = ", ".join(map(repr, COLUMNS[name][1:]))
    return (
        f"{where}: field {name!r} is missing or empty (so are {known}); it has "
        f"{', '.join(columns)}; name its column with data.columns.{name}"
    )


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
