"""The option, A to J, that a response chooses."""

from __future__ import annotations

import re
from dataclasses import replace

from nemo_paced.grading.evidence import NOTHING, Evidence, Found, find_answer, without_thought
from nemo_paced.grading.notation import clean

LONGEST_END = 10_000  # characters of a text's end in which an unmarked option is looked for

_LABEL = r"\(?[A-J]\)?(?![A-Za-z+'’])"
_SINGLE = re.compile(r"\(?([A-Ja-j])\)?\.?")
# a label before its text: "E: vitamin D", "(B) 12 m", "b) Paris"
_LABELLED = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s|\Z))\s*|\(?([a-j])\)\s+")
# a letter at the beginning that decides: "B, which is larger than A", "C because ..."
_LEADING = re.compile(
    r"(?i:(?:the\s+)?(?:option|choice|answer)\s+)?\(?([A-HJ]|I(?=[.,;:)]|\Z))\)?"
    r"(?=\s*(?:[.,;:]|\Z)|\s+(?:since|because|which|as|is\s+(?:correct|right))\b)"
)
_STATED = re.compile(
    r"\(([A-J])\)|(?i:\b(?:option|choice|letter|answer|is|be|choose|pick|select))\s+\(?([A-J])"
    r"(?![A-Za-z+'’])"
)
# what joins a second option to the first, or puts another in its place
_SECOND = re.compile(
    rf"\s*(?:,?\s*(?i:and|or)|,|&|/)\s*{_LABEL}(?=[\s.,;:?)]|\Z)|.*[;,]\s*\(?[A-J][).:]\s"
    rf"|.*\b(?i:no|wait|actually|rather)\b(?:[,.:]\s*|\s+(?=\(?[A-J]\)?\s*\Z))(?i:it\s+is\s+)?{_LABEL}",
    re.S,
)
_ANOTHER = re.compile(r"\A\W*\(?[A-J]\)?\W*\Z|(?:\A|\s)\(?[A-J](?:[.:](?=\s|\Z)|\))")
_TAKEN_BACK = re.compile(r"\s*(?i:is|was)\s+(?i:wrong|incorrect|false|not|out)\b|\s*\?")
_NOT_ONE = re.compile(
    r"(?i)\A(?:not|neither|none|all|any|anything|everything|either|both|isn['’]t)\b"
)
_REFUSED = re.compile(
    rf"(?i:(?:\bnot|n['’]t|\bcannot|\beliminate[ds]?|\bexclude[ds]?|\brule[sd]?\s+out|\bexcept|\bbut)"
    rf"(?:\s+be)?)\s+(?i:option\s+|choice\s+)?{_LABEL}"
    rf"|(?i:(?:option|choice)\s+)?{_LABEL}\s+(?:(?:is|are|was)(?:n['’]t|\s+not)\b"
    r"|(?:is|are|was)\s+(?i:wrong|incorrect|false|out|ruled\s+out|eliminated|excluded)|can(?:not|['’]t))"
)
_ASKED = re.compile(rf"{_LABEL}\s*\?")
_PRONOUNS = re.compile(r"\b(?:I|A)(?=\s+[a-z])")  # "I think", "A train": no choices
_ALONE = re.compile(r"(?<![A-Za-z'’])([A-J])(?![A-Za-z'’+])")
_LABELLED_LINE = re.compile(r"\s*\(?([A-J])[).:]\s+\S")


def find_choice(text: str, *, truncated: bool = False, unmarked: bool = True) -> Found:
    """Option, A to J, that a response chooses, as its final answer.

    It is the label of the final answer or the only one in it, if one is marked; otherwise the last
    that stands in parentheses or after "option" or "choice", else the last single letter.

    Args:
        truncated: see :func:`~nemo_paced.grading.evidence.find_answer`.
        unmarked: whether an option counts where no answer is marked.
    """
    found = find_answer(text, truncated=truncated, last_number=False)
    if found.evidence is not Evidence.none:
        letters = (option(clean(reading)) for reading in found.readings)
        letter = next((letter for letter in letters if letter), None)
        return replace(found, answer=letter)
    if truncated or not unmarked:
        return NOTHING
    text = without_thought(text).rstrip()[-LONGEST_END:]
    line = _LABELLED_LINE.match(text[text.rfind("\n") + 1 :])
    if line and not _SECOND.match(text, text.rfind("\n") + 1 + line.end(1)):
        return Found(line[1], Evidence.option)
    text = _REFUSED.sub("", text)
    if marked := _STATED.findall(text):
        return Found(marked[-1][0] or marked[-1][1], Evidence.option)
    alone = _ALONE.findall(_PRONOUNS.sub("", text))
    return Found(alone[-1], Evidence.option) if alone else NOTHING


def option(final: str) -> str | None:
    """The option that a final answer names; ``None``: none, or not one."""
    if found := _SINGLE.fullmatch(final):
        return found[1].upper()
    if _NOT_ONE.match(final):
        return None
    for form in (_LABELLED, _LEADING):
        if found := form.match(final):
            rest = final[found.end() :]
            behind = final[found.end(1) :].lstrip(")") if found[1] else rest
            if _SECOND.match(behind) or _TAKEN_BACK.match(behind) or _ANOTHER.search(rest):
                return None
            return next(group for group in found.groups() if group).upper()
    if _REFUSED.search(final) or _ASKED.search(final):
        return None
    letters = {first or second for first, second in _STATED.findall(final)}
    if not letters and len(final.split()) == 1:
        letters = set(_ALONE.findall(_PRONOUNS.sub("", final)))
    return letters.pop() if len(letters) == 1 else None
