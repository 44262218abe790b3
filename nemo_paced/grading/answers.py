"""Two final answers compared: as text, as numbers, as lists, as mathematics.

The paper grades "on the final answer after light normalisation". Text and numbers settle most
answers here, exactly and without a parser; what they leave open goes to math-verify. Nothing is
evaluated as code: of math-verify only the LaTeX grammar is used, never the extractor that hands
text to Python's ``eval``.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from nemo_paced.grading.evidence import Evidence, find_answer, last_boxed, without_thought
from nemo_paced.grading.exact import rational

MAX_SYMBOLIC_LENGTH = 1000  # characters; longer text is no final answer

_CHOICE = re.compile(r"(?<![A-Za-z'’])([A-J])(?![A-Za-z'’])")
_MARKED_CHOICE = re.compile(r"\(([A-J])\)|(?i:option|choice)\s+\(?([A-J])(?![A-Za-z])")
_PRONOUNS = re.compile(r"\b(?:I|A)(?=\s+[a-z])")  # "I think", "A train": no choices
_LETTER = re.compile(r"\(?([A-Ja-j])\)?\.?")
_LABELLED = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s|\Z))\s*")  # "E: vitamin D", "(B) 12 m"

_BETWEEN_ITEMS = re.compile(
    r"\s*(?:,\s*(?:and|or)\s|,\s|;|\s(?:and|or)\s|\\(?:land|lor)(?![a-z]))\s*"
)
_BASED = re.compile(r"([0-9A-Fa-f]{1,100})(?:_\{?(\d{1,2})\}?)?")
_LENGTH = (
    r"(?:mm|cm|km|m|in|ft|yd|inch(?:es)?|f(?:oo|ee)t|(?:centi|milli|kilo)?met(?:er|re)s?|units?)"
)
_UNIT_BEHIND = re.compile(
    rf"(?<=[\w)}}])\s+(?:(?:square|cubic|sq\.?|cu\.?)\s*)?{_LENGTH}(?:\^\{{?[23]\}}?)?\Z"
)

_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
_TEN_TIMES = re.compile(r"(?<=\d)\s*x\s*(?=10\s*\^)")  # 3 x 10^5
_QUANTITY = re.compile(r"(.*?\d\.?)(\s*)(%|[A-Za-z°][A-Za-z°/ .]*(?:\^\{?-?\d\}?)?)")
_PREFIX = re.compile(r"^(?:\\?[$€£]|[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\approx)(?!=))\s*")

_FACTORS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SHORT_UNITS = frozenset("mgshlLNJWVKCFA")
_NO_UNITS = frozenset(
    ("pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "or", "and", "mod", "times", "choose")
)
# unit: (dimension, its size in units of the dimension); units not listed are compared as text
_UNITS: dict[str, tuple[str, int | Fraction]] = {
    "%": ("%", 1), "percent": ("%", 1), "°": ("angle", 1), "degree": ("angle", 1),
    "dollar": ("dollar", 1), "cent": ("dollar", Fraction(1, 100)),
    "mm": ("length", 1), "cm": ("length", 10), "m": ("length", 1000), "km": ("length", 10**6),
    "millimeter": ("length", 1), "centimeter": ("length", 10), "meter": ("length", 1000),
    "kilometer": ("length", 10**6), "g": ("mass", 1), "gram": ("mass", 1), "kg": ("mass", 1000),
    "kilogram": ("mass", 1000), "s": ("time", 1), "second": ("time", 1), "min": ("time", 60),
    "minute": ("time", 60), "h": ("time", 3600), "hour": ("time", 3600), "day": ("time", 86400),
}  # fmt: skip

_UNICODE = {
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
    "²": "^2", "³": "^3", "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3",
}  # fmt: skip


def agree(extracted: str, answer: str, tolerance: float) -> tuple[bool | None, str]:
    """Whether two answers agree, and how it was found; ``None``: it takes a parser of mathematics.

    Args:
        extracted: read out of a response, at most ``MAX_SYMBOLIC_LENGTH`` characters.
        tolerance: see :func:`numbers_agree`.
    """
    if normalize(extracted) == normalize(answer):
        return True, "equal after normalisation"
    if _LETTER.fullmatch(_clean(answer)) and (labelled := _LABELLED.match(_clean(extracted))):
        return labelled[1] == _clean(answer).strip("().").upper(), "letter of a choice"
    equal = _bases_agree(extracted, answer)
    if equal is None:
        equal = numbers_agree(extracted, answer, tolerance)
    if equal is not None:
        return equal, "compared as numbers"
    ours, reference = items(extracted), items(answer)
    if len(ours) > 1 and len(ours) == len(reference):
        equal = _items_agree(ours, reference, tolerance)
        if equal is not None:
            return equal, "compared as lists"
    return None, ""


def items(answer: str) -> list[str]:
    """Items of a list such as ``1, 2 and 3``; a tuple, an interval or a matrix is one item."""
    text = _clean(answer)
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    if re.search(r"[()\[\]]|\\begin", text):
        return [text]
    if not re.search(r",\s", text):  # 1,000 is one number, and 1,000, 2,000 are two
        text = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)
        text = text.replace(",", ", ")
    parts = _BETWEEN_ITEMS.split(text)
    return [part.strip() for part in parts if part.strip()]


def _items_agree(ours: list[str], reference: list[str], tolerance: float) -> bool | None:
    """Whether two lists hold the same, in any order; ``None``: some item is no number."""
    left = list(reference)
    for item in ours:
        equal = [
            normalize(item) == normalize(other) or numbers_agree(item, other, tolerance)
            for other in left
        ]
        if True not in equal:
            return None if None in equal else False
        del left[equal.index(True)]
    return True


def _bases_agree(extracted: str, answer: str) -> bool | None:
    """Whether numbers such as ``321_8`` agree; a base that one side leaves out is the other's."""
    found = [_BASED.fullmatch(_clean(text).replace(" ", "")) for text in (extracted, answer)]
    if found[0] is None or found[1] is None or not (found[0][2] or found[1][2]):
        return None
    digits = [each[1].lstrip("0").lower() for each in found if each]
    bases = {int(each[2]) for each in found if each and each[2]}
    return digits[0] == digits[1] and len(bases) == 1


def without_unit(extracted: str, answer: str) -> tuple[str, str]:
    """Both answers, without a unit behind a formula that only one of them names."""
    both = [_clean(text) for text in (extracted, answer)]
    bare = [_UNIT_BEHIND.sub("", text) for text in both]
    if (bare[0] != both[0]) == (bare[1] != both[1]):
        return extracted, answer
    return bare[0], bare[1]


def extract_choice(text: str, *, truncated: bool = False) -> str | None:
    """Option, A to J, that a response chooses; ``None`` where there is none.

    It is the label of the final answer or the only one in it, if one is marked; otherwise the last
    that stands in parentheses or after "option" or "choice", else the last single letter.

    Args:
        truncated: see :func:`~nemo_paced.grading.evidence.find_answer`.
    """
    found = find_answer(text, truncated=truncated, last_number=False)
    if found.evidence is not Evidence.none:
        letters = (_letter(_clean(reading)) for reading in found.readings)
        return next((letter for letter in letters if letter), None)
    if truncated:
        return None
    text = without_thought(text)
    if marked := _MARKED_CHOICE.findall(text):
        return marked[-1][0] or marked[-1][1]
    single = _CHOICE.findall(_PRONOUNS.sub("", text))
    return single[-1] if single else None


def _letter(final: str) -> str | None:
    """The option that a final answer names."""
    if found := _LETTER.fullmatch(final) or _LABELLED.match(final):
        return found[1].upper()
    # two letters, as in "B or C", are no choice
    letters = set(_CHOICE.findall(_PRONOUNS.sub("", final)))
    return letters.pop() if len(letters) == 1 else None


def normalize(answer: str) -> str:
    """An answer without spaces, dollar signs, text wrappers, thousands separators and final dot.

    Words lose their case; symbols keep it (``X`` and ``x`` may be two variables).
    """
    answer = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), _clean(answer))
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)  # "1 1/2" must not become 11/2
    return answer.lower() if re.fullmatch(r"[A-Za-z]{2,}", answer) else answer


def numbers_agree(extracted: str, answer: str, tolerance: float) -> bool | None:
    """Whether two answers agree as numbers with units; ``None`` when one is no plain number.

    A unit that only one side names is let pass; a percentage is its number or a hundredth of it.

    Args:
        tolerance: relative, where a side is written with a decimal point.
    """
    ours, reference = _quantity(extracted), _quantity(answer)
    if ours is None or reference is None:
        return None
    (value, unit), (wanted, wanted_unit) = ours, reference
    if unit and wanted_unit:
        dimension, factor = _UNITS.get(unit, (unit, 1))
        wanted_dimension, wanted_factor = _UNITS.get(wanted_unit, (wanted_unit, 1))
        if dimension != wanted_dimension:
            return False
        value, wanted = value * factor, wanted * wanted_factor
    values = {value} | ({value / 100} if unit == "%" and not wanted_unit else set())
    targets = {wanted} | ({wanted / 100} if wanted_unit == "%" and not unit else set())
    inexact = "." in extracted or "." in answer
    written = re.search(r"\d\s*[eE]|\^", extracted + answer)
    whole = value.denominator == wanted.denominator == 1 and not written
    slack = Fraction(tolerance) if inexact and not whole else Fraction(0)
    return any(abs(v - t) <= slack * abs(t) for v in values for t in targets)


def symbolically_equal(extracted: str, answer: str) -> bool:
    """Whether math-verify finds two answers equal; for a worker with limits of time and memory."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unreadable answer is no event
    latex = [LatexExtractionConfig()]
    gold, ours = (
        parse(f"${_clean(text)}$", extraction_config=latex, parsing_timeout=None)
        for text in (answer, extracted)
    )
    # x <= 3 and (-oo, 3] say the same
    return bool(
        gold and ours and verify(gold, ours, timeout_seconds=None, allow_set_relation_comp=True)
    )


def _clean(answer: str) -> str:
    """An answer without Markdown, math delimiters, spacing commands and Unicode forms of LaTeX."""
    answer = "".join(_UNICODE.get(character, character) for character in answer)
    answer = unicodedata.normalize("NFKC", answer).strip()
    answer = re.sub(r"(?<!\\)\$", "", answer.strip("*` ").rstrip("*`. ")).strip("*` ").rstrip(". ")
    answer = re.sub(r"^\\[(\[]|\\[)\]]\.?$", "", answer)
    if (boxed := last_boxed(answer)) is not None:
        answer = boxed
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"(?i)^\s*answer\s*:\s*", "", answer)
    answer = re.sub(
        r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~", "", answer
    )
    answer = answer.replace("\\varnothing", "\\emptyset").replace("\\{\\}", "\\emptyset")
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(r"\^\s*\{?\\circ\}?", "°", answer.replace("{,}", ","))
    answer = answer.replace("\\%", "%").replace("\\degree", "°")
    return re.sub(r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}", answer).strip()


def _quantity(answer: str) -> tuple[Fraction, str] | None:
    """Exact value and unit ("" for none) of a number with an optional unit; or ``None``."""
    answer = _PREFIX.sub("", _clean(answer))
    found = _QUANTITY.fullmatch(answer)
    if found is None:
        value = _number(answer)
        return None if value is None else (value, "")
    body, gap, unit = found[1], found[2], found[3].strip(" .")
    value = _number(body)
    words = unit.split()
    if value is None or not words or any(word.lower() in _NO_UNITS for word in words):
        return None
    if words[0].lower() in _FACTORS:
        value, words = value * _FACTORS[words[0].lower()], words[1:]
    elif len(unit) == 1 and unit not in "%°" and not (gap and unit in _SHORT_UNITS):
        return None  # 5x is no quantity
    unit = " ".join(words)
    singular = unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit
    return value, "%" if singular.lower() == "percent" else singular


def _number(answer: str) -> Fraction | None:
    """Exact value of a written number; or ``None``."""
    answer = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), answer.strip())
    answer = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), answer)
    return rational(_TEN_TIMES.sub("*", answer))
