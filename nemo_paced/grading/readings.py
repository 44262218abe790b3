r"""What the line behind a mark may be taken for: whole, its first sentence, the value it states.

A part stands for the line only where the rest takes nothing back and adds nothing.
"""

from __future__ import annotations

import re

from nemo_paced.grading.exact import number_words

SENTENCE_END = re.compile(r"\.\**(?=\s+[A-Z(\\$*]|\s*\Z)")
CONJUNCTION = re.compile(r",?\s(?:since|because)\s|,\s(?:not|which|as)\s")
_CORRECTION = re.compile(r"(?i)\b(?:wait|actually|correction|wrong|incorrect|mistake|hmm|sorry)\b")
_OBJECTION = re.compile(r"(?i)\b(?:no|not|or|but|either|however|instead|rather)\b")
_FORMULA = re.compile(
    r"\**\s{0,4}(?:\$\$?([^$]{1,400})\$\$?|\\\((.{1,400}?)\\\)|\\\[(.{1,400}?)\\\])"
)
_BOLD = re.compile(r"\*\*([^*\n]{1,200})\*\*")
_TAIL = re.compile(r"(?:\s+of\s+(?:the|a|an|all)\s[A-Za-z ]*)?[\s.,]*")
_REMARK = re.compile(r"(?<=[\d\w$}%)])\s+\((?=[^()]*(?:[a-z]{2}|%))(?!\s*\\?[pb]?mod)[^()]*\)\.?\Z")
_SUM = re.compile(
    r"[\d\s+\-−*/×·÷().,$%]{3,}=\s*(\\?\$?[-−]?[\d.,]*\d(?:\s[a-z]{2,}){0,3})[\s.$]*\Z"
)

_NUMBER = r"[-−]?(?:\\?\$|€|£)?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?"
_STATES = (
    r"is|are|was|were|be|has|have|had|makes?|made|costs?|pays?|paid|gets?|got|earns?|earned|sells?|sold"
    r"|needs?|takes?|took|spends?|spent|saves?|saved|receives?|received|buys?|bought|eats?|ate|reads?"
    r"|walks?|walked|runs?|ran|equals?|remains?|leaves?|left\swith|total\sof|sum\sof|uses?|used|owes?"
)
_STATED = re.compile(
    rf"(?P<before>[^\d$*\\]{{0,200}})\b(?:{_STATES})\s*:?\s*"
    rf"(?:a\stotal\sof\s|only\s|still\s|exactly\s|now\s)?"
    rf"(?P<value>{_NUMBER}|\$[^$\n]{{1,200}}\$|\\\(.{{1,200}}?\\\))"
    r"(?P<behind>(?:\s+[A-Za-z'’-]+){0,8})[\s.!]*"
)
_STATED_BOLD = re.compile(
    rf"(?P<before>[^*]{{0,300}})(?:\b(?:{_STATES})|=)\s*:?\s*(?P<value>\*\*[^*\n]{{1,80}}\*\*)"
    r"(?P<behind>(?:\s+[A-Za-z'’-]+){0,8})[\s.!]*"
)
_LEADING = re.compile(rf"(?P<value>{_NUMBER})(?P<behind>(?:\s+[A-Za-z'’-]{{2,}}){{1,8}})[\s.!]*")
# with these a number is another than it says, or none that is claimed
_DENIES = re.compile(
    r"(?i)\b(?:\w+n['’]t|not|no|none|never|cannot|neither|except|impossible|if|unless|must|could|would"
    r"|should|might|false|wrong|(?-i:may))\b"
)
_CHANGES = re.compile(
    r"(?i)\b(?:pi|sqrt|root|squared|cubed|factorial|percent|plus|minus|times(?!\sas)|divided|or|and|to"
    r"|(?<!left\s)over|hundred|thousand|million|billion|dozen|thirds?|quarters?|halves|half|tenths?"
    r"|fifths?|mod|modulo|base|degrees\sand|than(?!\s[A-Z]))\b"
)
_MORE = re.compile(r"(?i)\b(?:more|fewer|less)\s(?:than\b|[a-z]+\sthan\b)")

_LABEL = re.compile(
    r"(?:\\text(?:bf)?\{)?\([A-J]\)\}?\s*(?:\\[ ,;:!]\s*)*(?=[^\s}])(?!(?:or|and)\b)"
)
_TOKENS = re.compile(r"(?:<\|[^<>|]{1,40}\|>|</?s>|<eos>|<end_of_turn>).*\Z", re.S)
_TAGS = re.compile(r"(?:\s*</?(?:b|i|em|strong|br|p|u|span|div|code|answer)\s?/?>)+\s*\Z", re.I)
_ENDS = re.compile(r"(?:\s|✅|✓|✔|🎉|️|\$?\\(?:blacksquare|square|qed)\b\$?|■|∎|□)+\Z")
_PAIRS = (("([", ")]"), ("{", "}"), ("“", "”"))  # [0, 1) is a pair too


def trimmed(line: str) -> str:
    """A line without what does not belong to its text: tags, tokens, an unmatched bracket."""
    line = _TOKENS.sub("", line)
    while line != (shorter := _without_end(line)):
        line = shorter
    return line


def _without_end(line: str) -> str:
    line = _ENDS.sub("", _TAGS.sub("", line))
    last = line[-1:]
    for opening, closing in _PAIRS:
        counts = [sum(map(line.count, marks)) for marks in (opening, closing)]
        if last and last in closing and counts[1] > counts[0]:
            return line[:-1].rstrip("\\" if last in ")]" else "")
    return line[:-1] if last in ('"', "|", "$", "_") and line.count(last) % 2 else line


def readings(line: str) -> tuple[str, ...]:
    """What a line may be taken for, the likeliest first."""
    found = [line]
    sentence = SENTENCE_END.search(line)
    if sentence and sentence.start() and not takes_back(line[sentence.end() :]):
        found.append(line[: sentence.start()])
    conjunction = CONJUNCTION.search(found[-1])
    if conjunction and not takes_back(line[conjunction.end() :]):
        found.append(found[-1][: conjunction.start()])
    if remark := _REMARK.search(found[-1]):
        found.append(found[-1][: remark.start()])
    for form in (_FORMULA, _BOLD):
        begin = form.match(found[-1])
        if begin and _TAIL.fullmatch(found[-1], begin.end()):
            found.append(next(group for group in begin.groups() if group))
    found.append(_stated(found[-1]))
    found += unlabelled(line)[1:]
    return tuple(dict.fromkeys(each.strip() for each in found if each.strip()))


def unlabelled(answer: str) -> tuple[str, ...]:
    """An answer, and its text where it is that of a choice: ``(B) 5``."""
    found = _LABEL.match(answer)
    return (answer, answer[found.end() :].strip()) if found else (answer,)


def takes_back(rest: str) -> bool:
    """Whether what follows an answer corrects it, and is not only polite."""
    return bool(
        _CORRECTION.search(rest) or (_OBJECTION.search(rest) and re.search(r"[\d$\\]", rest))
    )


def _stated(line: str) -> str:
    """The only value of a sentence such as ``She has 48 left``; else nothing."""
    if total := _SUM.search(line):
        return "" if _DENIES.search(line) else total[1]
    for form in (_STATED, _STATED_BOLD, _LEADING):
        found = form.fullmatch(line)
        if found is None:
            continue
        behind = found["behind"]
        before = "" if form is _LEADING else found["before"]
        changed = _DENIES.search(before + behind) or _CHANGES.search(behind)
        compared = form is not _LEADING and _MORE.search(behind)
        short = any(len(word) < 2 for word in behind.split() if word not in ("a", "I"))
        if not (changed or compared or short) and not number_words(before + " " + behind):
            return found["value"].strip("*")
    return ""
