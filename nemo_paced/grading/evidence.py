r"""What a response offers as its final answer, and by what mark: a box, a line, a last number.

The last mark that a response begins decides. Where it is cut off, the response has no answer: what
stood before was about to be corrected, or part of a derivation. All scans are linear in the text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from enum import StrEnum

from nemo_paced.grading.readings import (
    CONJUNCTION,
    SENTENCE_END,
    readings,
    trimmed,
    unlabelled,
)


class Evidence(StrEnum):
    """What an answer was read by."""

    box = "box"  # \boxed{} or \fbox{}
    line = "answer line"  # Answer: 42
    sentence = "sentence"  # the answer is 42
    hashes = "hashes"  # #### 42, as GSM8K's solutions end
    number = "last number"  # no mark: the last number of the text
    option = "last option"  # no mark: the last option that a text names
    word = "last word"
    own = "own verifier"  # which does not say
    cut = "cut off"  # the last mark is not followed by a whole answer
    none = "none"


@dataclass(frozen=True, slots=True)
class Found:
    """The final answer of a response.

    Attributes:
        answer: as it is written; ``None``: there is none.
        readings: what it may be taken for, the likeliest first: a line, or its first sentence.
        boxes: contents of several boxes that commas, "and" or "or" join, the last among them.
        weak: whether any other mark is a better one: "the answer must be 7", "... is even".
    """

    answer: str | None
    evidence: Evidence
    readings: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()
    weak: bool = False


NOTHING = Found(None, Evidence.none)
CUT = Found(None, Evidence.cut)
DENIED = Found(None, Evidence.none, weak=True)  # "the answer is not 7": nor is its number

_MOST_MARKS = 200  # the last of a text that are looked at
LONGEST = 1200  # characters of a line that are looked at: longer is no answer

_THOUGHT_ENDS = ("</think>", "</seed:think>", "[/THINK]", "<|END_THINKING|>", "◁/think▷")
_THOUGHT_BEGINS = ("<think>", "<seed:think>", "[THINK]", "<|START_THINKING|>", "◁think▷")
_ADVERBS = (
    r"(?:exactly|also|still|only|simply|just|indeed|clearly|then|thus|therefore|now|actually)"
)
_VERB = (
    r"\b(?:(?:is|are|was)(?:[ \t]equal[ \t]to)?|equals?|becomes|turns[ \t]out[ \t]to[ \t]be"
    r"|(?P<soft>must|should|will|has[ \t]to)[ \t](?:be(?:[ \t]equal[ \t]to)?|equal)"
    r"|comes?[ \t](?:out[ \t])?to(?:[ \t]be)?)\b"
    rf"(?:,?[ \t]{_ADVERBS}\b,?)?"
)
# "the answer, therefore, is" and "the answer in simplest form is"
_BETWEEN = r"(?:,[ \t]\w{2,12},|[ \t](?:to|in|for)[ \t][A-Za-z \t'’]{2,40}?)?"
_MARK = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])|(?m:^)[ \t]{0,8}####(?!#)"
    r"|(?i:(?<![A-Za-z])answers?(?![A-Za-z]))"
    rf"(?=[\"']?[*_\s]{{0,4}}[:=：]|{_BETWEEN}[*_ \t]{{0,4}}{_VERB}"
    r"|[*_#:} \t]{0,8}(?:\([^()\n]{1,30}\)[*_#: \t]{0,8})?(?:\r?\n|\Z))"
)
# what makes a line, or a sentence, of the word "answer"
_SAYS = re.compile(
    rf"(?P<quoted>[\"'])?[*_\s]{{0,4}}(?P<strong>[:=：](?:[ \t]?\}})?)"
    rf"|{_BETWEEN}[*_ \t]{{0,4}}(?P<weak>{_VERB}[ \t]{{0,4}}:?)"
)
_JSON = re.compile(
    r'\s*(?:"((?:[^"\\]|\\.){0,1000})"|([^\s",}\]][^,}\]\n]{0,200}))(?=\s*[,}\]\n]|\s*\Z)'
)
_HEADING = re.compile(r"[*_#:} \t]{0,8}(?:\([^()\n]{1,30}\)[*_#: \t]{0,8})?(?:\r?\n|(?P<end>\Z))")
_BEFORE_HEADING = re.compile(
    r"[#*_ \t]{0,8}(?:(?i:the|final)[ \t]){0,2}|[ \t]{0,4}(?:#|\*\*)(?:[^.\n]|(?<=\d)\.){0,30}"
    r"|\\(?:textbf|section|subsection|paragraph)\*?\{(?:(?i:the|final)[ \t]){0,2}"
)
# sentences that deny an answer, or speak of another
_UNTRUE = re.compile(
    r"(?i)(?:n['’]t|\b(?:not|never|doubt|false[ ]that|no[ ]way|suppos\w*|assum\w*|often|guess"
    r"|guessed|at[ ]first|(?:might|may|could)[ ](?:think|say|guess|believe)))\b"
)
_OTHER = re.compile(
    r"(?i)(?:\b(?:if|unless|whether)\s+(?:the\s+)?(?:final\s+|correct\s+)?"
    r"|\b(?:this|that|which|wrong|incorrect|common|other|another|each|first|initial|previous|earlier)\s+)\Z"
)
_HYPOTHESIS = re.compile(r"(?i)\b(?:if|unless|were|had)\b")
_SENTENCE = re.compile(r"[.!?\n](?=\s|\Z)")
_DENIED = re.compile(r"(?i)(?:not|neither|either|unclear|unknown|undetermined)\b")
_RELATION = re.compile(
    r"[*_\s$]{0,6}(?:[<>≤≥≠]|\\(?:ge|le|gt|lt|ne)|[\d.,]+\s+(?:mod|more|less|fewer|times)\b)"
)
_ITEM = re.compile(r"(?:\*\*)?(?:\d{1,2}[.)]|[-•>])\s+(?=\S)")  # a list's marker
_NAMED_LINE = re.compile(r"\s*\$?[A-Za-z](?:_\w+)?\s*=")
_NUMBER = re.compile(
    r"[-−]?\\?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?|[-−]?\\[dt]?frac\{\d+\}\{\d+\}"
)
# a number that stands by itself, not within a formula, a time, a list or a word
_BEFORE = re.compile(
    r"[\w^_{/:.)\]]\Z|[+*/×·<>≤≥≠√]\s*\Z|[\w)}]\s*[-−]\s*\Z|\\(?!text)[A-Za-z]+\s*\Z|\d\s+\Z"
    r"|\bnot\s\Z|\d\sin\s\Z|[(\[{][^()\[\]{}]*,\s*\Z"
)
_AFTER = re.compile(
    r"[\w^{}!:]|\s?π|\s+(?:is|was)\s+not|\s*\\(?!text|mathrm|quad|qquad|[%$)\].,;! ])"
    r"|\s*[+*/×·^<>=√]|\s(?:thousand|million|billion|hundred|dozen)\b"
)
_OPENS = re.compile(r"(?<![\w)\]*])[*_]{1,3}\Z")
_CLOSES = re.compile(r"\$?(?:\*{1,3}|_{1,3})(?![\w*(])|\$(?=\s|\Z)")
_LIST_NUMBER = re.compile(r"(?m:^)\s*\d+[.)]\s*\Z")
_GSM8K = re.compile(
    r"\**\s{0,4}[-−$€£\\(]{0,4}\.?\d(?!\d?[.):]\s+\S)|\s{0,4}[-−]?(?:\$|\\\()?[-−]?\\(?:[dt]?frac|sqrt|pi|binom)(?![A-Za-z])"
    r"|\s{0,4}(?:\(?[A-J]\)?|(?i:yes|no))[\s.]*(?:\n|\Z)|\s{0,4}\$[^$\n]{1,200}\$[\s.]*(?:\n|\Z)"
)
_MATH = re.compile(r"[\d\\=^∞∅π√]")
# words that a sentence "the answer is ..." goes on with where it gives none
_PROSE = frozenset(
    (
        *("a", "an", "again", "already", "approximately", "as", "at", "because", "both", "by"),
        *("clear", "confirmed", "consistent", "correct", "either", "expected", "for", "found"),
        *("given", "in", "incorrect", "likely", "not", "obtained", "obvious", "of", "on", "or"),
        *("perhaps", "possible", "possibly", "probably", "reasonable", "right", "so", "that"),
        *("the", "there", "this", "to", "unclear", "unique", "valid", "verified", "we", "what"),
        *("when", "where", "which", "wrong", "your", "less", "greater", "more", "fewer"),
        *("larger", "smaller", "divisible", "between", "within", "around", "about"),
        # and headings of Markdown that look like GSM8K's mark
        *("step", "part", "case", "solution", "conclusion", "note", "final", "let", "summary"),
    )
)


def find_answer(text: str, *, truncated: bool = False, last_number: bool = True) -> Found:
    """The final answer of a response, its thought left out.

    Args:
        truncated: whether the text was cut at a limit: an open line is no answer then, and without
            a mark there is none.
        last_number: whether the last number counts where nothing is marked.
    """
    text = without_thought(text)
    if truncated and _BEGUN.search(text[-40:]):
        return CUT
    weak: Found | None = None  # "the answer is positive": only where nothing else is marked
    behind = 0  # a denied answer is no last number either
    for mark in reversed(_marks(text)):
        found = _of_mark(text, mark, truncated)
        if found is DENIED:
            sentence = _SENTENCE.search(text, mark.end())
            behind = behind or (sentence.end() if sentence else len(text))
        elif found is not None:
            if not found.weak:
                return found
            weak = weak or found
    if weak is not None:
        return weak
    return NOTHING if truncated or not last_number else _last_number(text, behind)


_BEGUN = re.compile(
    r"\\(?:bo?|box|boxe|boxed|fb|fbo|fbox)\s*\Z|(?m:^)\s*#{4}\s*[-−$\\(]{0,3}(?:\\?[dt]?f?r?a?c?)?\Z"
)


_LONGEST_END = 10_000  # characters of a text's end in which a last number is looked for


def _last_number(text: str, first: int) -> Found:
    """The last number of a text, if it stands by itself and not before ``first``."""
    last = deque(_NUMBER.finditer(text, max(0, len(text) - _LONGEST_END)), 1)
    if not last:
        return NOTHING
    begin, end = last[0].span()
    before = _OPENS.sub("", text[max(0, begin - 60) : begin])  # **64** is no product
    end = _behind(_CLOSES, text, end)
    if begin < first or _BEFORE.search(before) or _AFTER.match(text, end):
        return NOTHING
    line = text[text.rfind("\n", 0, begin) + 1 :]
    if _LIST_NUMBER.match(line[:20]):
        return NOTHING
    return Found(last[0][0], Evidence.number, (last[0][0],))


def _marks(text: str) -> list[re.Match[str]]:
    """Marks of a text in order, without those that stand in a box."""
    found: list[re.Match[str]] = []
    box_end = -1
    for mark in deque(_MARK.finditer(text), _MOST_MARKS):
        is_box = mark[0].startswith("\\")
        if is_box or mark.start() >= box_end:
            found.append(mark)
        if is_box:
            box_end = max(box_end, _box_end(text, mark.end()))
    return found


def without_thought(text: str) -> str:
    """What a response says behind its thought; nothing, where the thought does not end."""
    for mark in _THOUGHT_ENDS:
        text = text[text.rfind(mark) + len(mark) :] if mark in text else text
    return "" if any(mark in text for mark in _THOUGHT_BEGINS) else text


def _of_mark(text: str, mark: re.Match[str], truncated: bool) -> Found | None:
    """The answer that a mark gives; ``None``: it is no mark, and an earlier one may be."""
    if mark[0].startswith("\\"):
        return _of_box(text, mark, truncated)
    if mark[0].endswith("#"):
        return _of_line(text, mark.end(), truncated, Evidence.hashes)
    says = _SAYS.match(text, mark.end())
    if says is None:
        return _of_heading(text, mark, truncated)
    if _OTHER.search(text, max(0, mark.start() - 40), mark.start()):
        return DENIED
    if says["quoted"] and (value := _JSON.match(text, says.end())):
        if truncated and not text[value.end() :].strip():
            return CUT  # 4 may be 42
        answer = re.sub(r"\\(.)", r"\1", value[1]) if value[1] is not None else value[2].strip()
        return Found(answer, Evidence.line, readings(answer)) if answer else None
    if says["strong"]:
        return _of_line(text, says.end(), truncated, Evidence.line)
    return _of_sentence(text, mark, says, truncated)


def _of_box(text: str, mark: re.Match[str], truncated: bool) -> Found | None:
    if (bare := _bare(text, mark.end())) and truncated and bare.end() == len(text):
        return CUT  # 4 may be 42
    if not _OPEN.match(text, mark.end()) and not bare:
        return None  # "in \\boxed format"
    content = _box_content(text, mark.end())
    if content is None:
        return CUT  # it was begun and never closed
    if not content:
        return None  # "put it into \boxed{}"
    begin = max(text.rfind("\n\n", 0, mark.start()), 0)
    near = list(_BOX.finditer(text, begin, mark.end()))[-_MOST_BOXES:]
    contents = [content]
    for earlier, later in zip(reversed(near[:-1]), reversed(near), strict=False):
        end = _box_end(text, earlier.end())
        joins = end >= 0 and _JOINS.fullmatch(text, end + 1, later.start())
        before = _box_content(text, earlier.end())
        if not joins or not before:
            break
        contents.insert(0, before)
    if len(contents) > 1:
        return Found(content, Evidence.box, (content,), tuple(contents))
    if _MINUS.search(text, max(0, mark.start() - 4), mark.start()):
        content = f"-{content}"
    return Found(content, Evidence.box, unlabelled(content))


_MINUS = re.compile(r"(?:^|[\s$=({])[-−]\s?\Z")
# between two boxes that are items of one list
_AND = r"(?:and|or|as well as|\\text\{\s*,?\s*(?:and|or)\s*\}|\\q?quad)"
_JOINS = re.compile(
    rf"[\s$.\\()\[\]]*(?:[,;&]|{_AND})[\s$,;\\()\[\]]*(?:{_AND}[\s$\\()\[\]]*){{0,2}}"
    r"(?:[A-Za-z](?:_\w)?\s*=\s*)?[\s$]*"
)
_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])")
_MOST_BOXES = 20
_LONGEST_BOX = 4000  # characters: one that is not closed by then is none
_BARE = re.compile(r"\s{0,4}(-?[\d.,]*\d|[A-Z])(?![A-Za-z\d])")
_OPEN = re.compile(r"\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.S)


def _box_content(text: str, begin: int) -> str | None:
    r"""Content of the box whose ``\boxed`` ends at ``begin``; ``None``: it is not closed."""
    opened = _OPEN.match(text, begin)
    if opened is None:
        bare = _bare(text, begin)
        return bare[1] if bare else None
    end = _box_end(text, begin)
    return text[opened.end() : end].strip() if end >= 0 else None


def _bare(text: str, begin: int) -> re.Match[str] | None:
    r"""What ``\boxed 7`` holds."""
    return None if _OPEN.match(text, begin) else _BARE.match(text, begin)


def _box_end(text: str, begin: int) -> int:
    r"""Offset of the brace that closes the box whose ``\boxed`` ends at ``begin``, or -1."""
    opened = _OPEN.match(text, begin)
    if opened is None:
        return -1
    depth = 1
    for brace in _BRACE.finditer(text, opened.end(), opened.end() + _LONGEST_BOX):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if not depth:
            return brace.start()
    return -1


_BOX_OR_BRACE = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])|\\.|[{}]", re.S)


def last_boxed(text: str) -> str | None:
    r"""Content of the last box that is closed, whatever follows; ``None``: there is none."""
    last: tuple[int, str] | None = None
    opened: list[int] = []  # of each open brace: where the content of its box begins, else -1
    box_at = -1
    for found in _BOX_OR_BRACE.finditer(text):
        if found[0] in ("\\boxed", "\\fbox"):
            brace = _OPEN.match(text, found.end())
            box_at = brace.end() if brace else -1
            if brace is None and (bare := _BARE.match(text, found.end())):
                last = found.end(), bare[1]
        elif found[0] == "{":
            opened.append(found.end() if found.end() == box_at else -1)
        elif found[0] == "}" and opened:
            begin = opened.pop()
            if begin >= 0 and (last is None or begin > last[0]):
                last = begin, text[begin : found.start()].strip()
    return None if last is None else last[1]


def _of_line(text: str, begin: int, truncated: bool, evidence: Evidence) -> Found | None:
    """The answer on the rest of a line, or on the next that holds something."""
    mark_end, begin = begin, _behind(_BLANK, text, begin)
    line, end, whole = _line(text, begin)
    if evidence is Evidence.hashes and line and not _GSM8K.match(line):
        return None  # a heading of Markdown
    item = _ITEM.match(line) if text.find("\n", mark_end, begin) >= 0 else None
    lines, is_open = [line[item.end() :] if item else line], False
    for _ in range(_MOST_LINES):
        start = _behind(_BLANK, text, end)
        following, next_end, closed = _line(text, start)
        marker = _ITEM.match(following) if item else None
        goes_on = lines[-1].endswith((",", " and", " or", ":"))
        named = _NAMED_LINE.match(lines[-1]) and _NAMED_LINE.match(following)
        if not following:
            is_open = bool(item or goes_on)  # more of it may have been to come
        if not whole or not following or not (marker or goes_on or named):
            break
        if lines[-1].endswith(":"):
            lines.clear()  # "The number is:" leads to the next line
        lines.append(following[marker.end() :] if marker else following)
        end, whole = next_end, closed
    line = trimmed(", ".join(each.strip().rstrip(",") for each in lines))
    if not line or (truncated and (is_open or not whole)):
        return CUT
    return Found(line, evidence, readings(line))


_MOST_LINES = 40  # of a list below a mark
# what stands between a mark and its answer: a formula or a fence that begins on a line of its own
_BLANK = re.compile(
    r"(?:\s|\*\*|__|>(?=\s)|\$\$(?=\s)|\\\[(?=\s)|```[a-z]{0,9}(?=\s)|-{3,9}(?=\s))*"
)
_GAP = re.compile(r"[ \t*_:}]*")


def _behind(pattern: re.Pattern[str], text: str, begin: int) -> int:
    """Offset behind what a pattern, which may match nothing, matches there."""
    found = pattern.match(text, begin)
    return found.end() if found else begin


def _line(text: str, begin: int) -> tuple[str, int, bool]:
    """What is left of a line, at most ``LONGEST`` of it, its end, and whether the line is ended."""
    newline = text.find("\n", begin, begin + LONGEST)
    end = newline if newline >= 0 else min(len(text), begin + LONGEST)
    return text[begin:end].strip(), end, newline >= 0


def _of_heading(text: str, mark: re.Match[str], truncated: bool) -> Found | None:
    """The line below a heading ``Final Answer``."""
    near = text[max(0, mark.start() - 40) : mark.start()]
    rest = _HEADING.match(text, mark.end())
    if rest is None or not _BEFORE_HEADING.fullmatch(near[near.rfind("\n") + 1 :]):
        return None
    if rest["end"] is not None and not truncated:
        return None
    return _of_line(text, rest.end(), truncated, Evidence.line)


_BEGINS_WITH_MATH = re.compile(
    r"[*_\s]{0,4}(?:[-−+$\\(\[{\d√∞π]|[A-Za-z]\s*[=+\-*/^]|(?:pi|yes|no)\b)"
)
# a letter of a choice, whatever follows: the words may be those of its text
_LETTER = re.compile(
    r"[*_\s]{0,4}(?i:(?:the\s+)?(?:option|choice)\s+)?\(?[A-HJ]\)?(?=[\s.,:;*)]|\Z)"
)
# a sentence of which "the answer is positive" is only what it speaks of
_SPOKEN_OF = re.compile(
    r"(?i)\b(?:show|prove|check|verify|know|ensure|sure|expect|require|need|mean)\w{0,3}"
    r"\s+(?:that|if|whether)\s+(?:the\s+)?(?:final\s+)?\Z"
)


def _of_sentence(
    text: str, mark: re.Match[str], says: re.Match[str], truncated: bool
) -> Found | None:
    """The answer of a sentence "the answer is ..."; ``None``: the sentence says something else."""
    begin = _behind(_GAP, text, says.end())
    line, _, whole = _line(text, begin)
    before = text[max(0, mark.start() - 80) : mark.start()]
    before = _SENTENCE.split(before)[-1]
    if _UNTRUE.search(before):
        return DENIED
    if says["soft"] and _HYPOTHESIS.search(before):
        return None
    if text.find("\n", begin, _behind(_BLANK, text, begin)) >= 0 or (truncated and not line):
        return _of_line(text, begin, truncated, Evidence.line)
    if not line:
        return None
    sentence = SENTENCE_END.search(line)
    if truncated and not whole and (sentence is None or sentence.end() >= len(line)):
        return CUT
    if _DENIED.match(line):
        return DENIED
    line = trimmed(line)
    if _LETTER.match(line):
        return Found(line, Evidence.sentence, readings(line))
    is_math = bool(_BEGINS_WITH_MATH.match(line)) and not _RELATION.match(line)
    if not _is_answer(line) or (not is_math and (says["soft"] or _SPOKEN_OF.search(before))):
        return None
    weak = bool(says["soft"]) or not _MATH.search(line)
    return Found(line, Evidence.sentence, readings(line), weak=weak)


def _is_answer(line: str) -> bool:
    """Whether what stands behind a weak mark may be an answer: no prose, no heading."""
    line = CONJUNCTION.split(line, maxsplit=1)[0]
    words = line.strip("*_ ").split(maxsplit=6)
    if not words or words[0].strip(".,;:!*").lower() in _PROSE or _RELATION.match(line):
        return False
    return bool(_MATH.search(line)) or len(words) <= 4
