r"""What a response offers as its final answer, and by what mark: a box, a line, a last number.

The last mark that a response begins decides. Where it is cut off, the response has no answer: what
stood before was about to be corrected, or part of a derivation. All scans are linear in the text.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice


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
    """

    answer: str | None
    evidence: Evidence
    readings: tuple[str, ...] = ()
    boxes: tuple[str, ...] = ()


NOTHING = Found(None, Evidence.none)
CUT = Found(None, Evidence.cut)

_MOST_MARKS = 200  # the last of a text that are looked at
LONGEST = 1200  # characters of a line that are looked at: longer is no answer

_THOUGHT_ENDS = ("</think>", "</seed:think>", "[/THINK]", "<|END_THINKING|>", "◁/think▷")
_THOUGHT_BEGINS = ("<think>", "<seed:think>", "[THINK]", "<|START_THINKING|>", "◁think▷")
_VERB = (
    r"\b(?:(?:is|are)(?:[ \t]equal[ \t]to)?|equals?|(?:must|should|would|will|has[ \t]to)[ \t]be"
    r"|comes?[ \t](?:out[ \t])?to(?:[ \t]be)?)\b"
    r"(?:[ \t](?:then|thus|therefore|simply|just|indeed|now)\b,?)?"
)
_MARK = re.compile(
    r"\\(?:boxed|fbox)(?![A-Za-z])|(?m:^)[ \t]{0,8}####(?!#)"
    r"|(?i:\banswers?\b)"
    rf"(?=[*_\s]{{0,4}}[:=：]|[*_ \t]{{0,4}}{_VERB}|[*_#: \t]{{0,8}}(?:\r?\n|\Z))"
)
# what makes a line, or a sentence, of the word "answer"
_SAYS = re.compile(
    rf"[*_\s]{{0,4}}(?P<strong>[:=：])|[*_ \t]{{0,4}}(?P<weak>{_VERB}[ \t]{{0,4}}:?)"
)
_HEADING = re.compile(r"[*_#: \t]{0,8}(?:\r?\n|(?P<end>\Z))")
_BEFORE_HEADING = re.compile(r"[#*_ \t]{0,8}(?:(?i:the|final)[ \t]){0,2}")
_SENTENCE_END = re.compile(r"\.\**(?=\s+[A-Z(\\$*]|\s*\Z)")
_CONJUNCTION = re.compile(r",?\s(?:since|because)\s")
_CORRECTED = re.compile(
    r"(?i)\b(?:no|not|or|wait|actually|but|hmm|correction|wrong|incorrect|mistake|either)\b"
)
_FIRST_MATH = re.compile(
    r"\**\s{0,4}(?:\$\$?([^$]{1,400})\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\])"
)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_DENIED = re.compile(r"(?i)(?:not|neither|either|unclear|unknown)\b")
_TAIL = re.compile(r"(?:\s+of\s+(?:the|a|an|all)\s[A-Za-z ]*)?[\s.,]*")
_ITEM = re.compile(r"(?:\*\*)?(?:\d{1,2}[.)]|[-•>])\s+(?=\S)")  # a list's marker
_NUMBER = re.compile(
    r"[-−]?\\?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?|[-−]?\\[dt]?frac\{\d+\}\{\d+\}"
)
# a number that stands by itself, not within a formula, a time or a word
_BEFORE, _AFTER = re.compile(r"[\w^_{/:.)\]]"), re.compile(r"[\w^{}!:]|\s?π|\s+(?:is|was)\s+not")
_GSM8K = re.compile(
    r"\**\s{0,4}[-−$€£\\]{0,3}\d(?!\d?[.):]\s+\S)|\s{0,4}[-−]?(?:\$|\\\()?[-−]?\\(?:[dt]?frac|sqrt|pi)\b"
)
_MATH = re.compile(r"[\d\\=^∞∅π√]")
# words that a sentence "the answer is ..." goes on with where it gives none
_PROSE = frozenset(
    (
        *("a", "an", "also", "again", "already", "approximately", "as", "at", "because", "both"),
        *("by", "clear", "clearly", "confirmed", "consistent", "correct", "either", "exactly"),
        *("expected", "for", "found", "given", "in", "incorrect", "indeed", "just", "likely"),
        *("not", "now", "obtained", "obvious", "of", "on", "only", "or", "perhaps", "possible"),
        *("possibly", "probably", "reasonable", "right", "simply", "so", "still", "that", "the"),
        *("then", "there", "therefore", "this", "thus", "to", "unclear", "unique", "valid"),
        *("verified", "we", "what", "when", "where", "which", "wrong", "your", "less", "greater"),
        *(
            "more",
            "fewer",
            "larger",
            "smaller",
            "divisible",
            "between",
            "within",
            "around",
            "about",
        ),
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
    words: Found | None = None  # "the answer is positive": only where nothing else is marked
    for mark in reversed(_marks(text)):
        found = _of_mark(text, mark, truncated)
        if found is not None:
            if found.evidence is not Evidence.sentence or _MATH.search(found.answer or ""):
                return found
            words = words or found
    if words is not None:
        return words
    return NOTHING if truncated or not last_number else _last_number(text)


def _last_number(text: str) -> Found:
    """The last number of a text, if it stands by itself."""
    last = deque(_NUMBER.finditer(text), 1)
    if not last:
        return NOTHING
    begin, end = last[0].span()
    if _BEFORE.match(text, begin - 1) if begin else None:
        return NOTHING
    if _AFTER.match(text, end):
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
    return Found(content, Evidence.box, (content,), tuple(contents) if len(contents) > 1 else ())


# between two boxes that are items of one list
_JOINS = re.compile(
    r"[\s$.\\()\[\]]*(?:[,;&]|and|or)[\s$,;\\()\[\]]*(?:(?:and|or)[\s$]*)?"
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
    line, whole = _line(text, begin)
    if text.find("\n", mark_end, begin) >= 0:
        line = line[_behind(_ITEM, line, 0) :]
    if evidence is Evidence.hashes and line and not _GSM8K.match(line):
        return None  # a heading of Markdown
    if not line or (truncated and not whole):
        return CUT
    return Found(line, evidence, _readings(line))


# what stands between a mark and its answer: a formula or a fence that begins on a line of its own
_BLANK = re.compile(
    r"(?:\s|\*\*|__|>(?=\s)|\$\$(?=\s)|\\\[(?=\s)|```[a-z]{0,9}(?=\s)|-{3,9}(?=\s))*"
)
_GAP = re.compile(r"[ \t*_:]*")


def _behind(pattern: re.Pattern[str], text: str, begin: int) -> int:
    """Offset behind what a pattern, which may match nothing, matches there."""
    found = pattern.match(text, begin)
    return found.end() if found else begin


def _line(text: str, begin: int) -> tuple[str, bool]:
    """What is left of a line, at most ``LONGEST`` of it, and whether the line is ended."""
    end = text.find("\n", begin, begin + LONGEST)
    return text[begin : end if end >= 0 else begin + LONGEST].strip(), end >= 0


def _of_heading(text: str, mark: re.Match[str], truncated: bool) -> Found | None:
    """The line below a heading ``Final Answer``."""
    near = text[max(0, mark.start() - 40) : mark.start()]
    rest = _HEADING.match(text, mark.end())
    if rest is None or not _BEFORE_HEADING.fullmatch(near[near.rfind("\n") + 1 :]):
        return None
    if rest["end"] is not None and not truncated:
        return None
    return _of_line(text, rest.end(), truncated, Evidence.line)


_BEGINS_WITH_MATH = re.compile(r"[*_\s]{0,4}[-−+$\\(\[{\d√]|[A-Za-z]\s*=")
_PLAIN_VERB = re.compile(r"\b(?:is|are)\b")
# a sentence of which "the answer is positive" is only what it speaks of
_SPOKEN_OF = re.compile(
    r"(?i)\b(?:show|prove|check|verify|know|ensure|sure|expect|require|need|suppose|assume|mean)\w{0,3}"
    r"\s+(?:that|if|whether)\s+(?:the\s+)?(?:final\s+)?\Z"
)


def _of_sentence(
    text: str, mark: re.Match[str], says: re.Match[str], truncated: bool
) -> Found | None:
    """The answer of a sentence "the answer is ..."; ``None``: the sentence says something else."""
    begin = _behind(_GAP, text, says.end())
    line, whole = _line(text, begin)
    if text.find("\n", begin, _behind(_BLANK, text, begin)) >= 0 or (truncated and not line):
        return _of_line(text, begin, truncated, Evidence.line)
    if not line:
        return None
    sentence = _SENTENCE_END.search(line)
    if truncated and not whole and (sentence is None or sentence.end() >= len(line)):
        return CUT
    if _DENIED.match(line):
        return NOTHING
    if not _is_answer(_CONJUNCTION.split(line, maxsplit=1)[0]):
        return None
    if not _BEGINS_WITH_MATH.match(line):  # "must be below 100" and "show that it is positive"
        before = text[max(0, mark.start() - 60) : mark.start()]
        if not _PLAIN_VERB.search(says[0]) or _SPOKEN_OF.search(before):
            return None
    return Found(line, Evidence.sentence, _readings(line))


def _is_answer(line: str) -> bool:
    """Whether what stands behind a weak mark may be an answer: no prose, no heading."""
    words = line.strip("*_ ").split(maxsplit=6)
    if not words or words[0].strip(".,;:!*").lower() in _PROSE:
        return False
    return bool(_MATH.search(line)) or len(words) <= 4


def _readings(line: str) -> tuple[str, ...]:
    """What a line may be taken for: whole, its first sentence, its first formula or bold text.

    A part stands for the line only where what follows takes nothing back and adds nothing.
    """
    readings = [line]
    sentence = _SENTENCE_END.search(line)
    if sentence and sentence.start() and not _CORRECTED.search(line, sentence.end()):
        readings.append(line[: sentence.start()])
    conjunction = _CONJUNCTION.search(readings[-1])
    if conjunction and not _CORRECTED.search(line, conjunction.end()):
        readings.append(readings[-1][: conjunction.start()])
    for form in (_FIRST_MATH, _BOLD):
        found = form.match(readings[-1])
        if found and _TAIL.fullmatch(readings[-1], found.end()):
            readings.append(next(group for group in found.groups() if group))
    readings.append(_number_of_prose(readings[-1]))
    return tuple(dict.fromkeys(each.strip() for each in readings if each.strip()))


# words with which a number in a sentence is another than it says
_CHANGED = re.compile(
    r"(?i)\b(?:half|twice|double[ds]?|triple[ds]?|third|quarter|square[ds]?|root|cube[ds]?|sum|product"
    r"|times|plus|minus|power|factorial|over|divided|less|more|fewer|than|least|most|below|above"
    r"|under|between|about|around|approximately|hundred|thousand|million|billion|dozen|negative|not"
    r"|no|nor|or|either|base|mod|modulo|remainder|multiple|nearest)\b"
)


def _number_of_prose(line: str) -> str:
    """The only number of a sentence such as ``She has 48 left``; else nothing."""
    found = list(islice(_NUMBER.finditer(line), 2))
    if len(found) != 1 or _CHANGED.search(line) or _CORRECTED.search(line):
        return ""
    begin, end = found[0].span()
    around = line[:begin] + " " + line[end:]
    stands_alone = not (begin and _BEFORE.match(line, begin - 1)) and not _AFTER.match(line, end)
    words = _PROSE_WORDS.fullmatch(around)
    return found[0][0] if stands_alone and words and len(around.split()) >= 2 else ""


_PROSE_WORDS = re.compile(r"(?=.*[A-Za-z]{3})[A-Za-z\s.,'’*$-]*")
