"""Two final answers compared: as text, as numbers, as lists, as mathematics.

The paper grades "on the final answer after light normalisation". Text and numbers settle most
answers here, exactly and without a parser; what they leave open goes to math-verify. Nothing is
evaluated as code: of math-verify only the LaTeX grammar is used, never the extractor that hands
text to Python's ``eval``.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import replace
from enum import StrEnum
from fractions import Fraction

from nemo_paced.grading.evidence import (
    NOTHING,
    Evidence,
    Found,
    find_answer,
    last_boxed,
    without_thought,
)
from nemo_paced.grading.exact import rational


class Comparison(StrEnum):
    """How a final answer was compared with the reference answer."""

    text = "text"  # equal after normalisation
    numbers = "numbers"
    lists = "lists"
    letter = "letter"  # of a choice
    word = "last word"
    symbolic = "math-verify"
    own = "own verifier"
    none = "none"  # there was nothing to compare


ROUNDING = 1e-4  # tolerances up to here are there for rounded decimals
MAX_SYMBOLIC_LENGTH = 1000  # characters; longer text is no final answer

_CHOICE = re.compile(r"(?<![A-Za-z'’])([A-J])(?![A-Za-z'’])")
_MARKED_CHOICE = re.compile(r"\(([A-J])\)|(?i:option|choice)\s+\(?([A-J])(?![A-Za-z])")
_REFUSED_CHOICE = re.compile(
    r"\bnot\s+\(?[A-J]\)?(?![A-Za-z])"
    r"|(?:(?i:option|choice)\s+)?\(?\b[A-J]\)?\s+is\s+(?:wrong|incorrect|false)"
)
_PRONOUNS = re.compile(r"\b(?:I|A)(?=\s+[a-z])")  # "I think", "A train": no choices
_LETTER = re.compile(r"\(?([A-Ja-j])\)?\.?")
_CAPITAL = re.compile(r"\(?[A-J]\)?\.?")
# what takes a choice back or adds one; the text of a choice may hold "and", "not" and "no" as well
_HEDGED = re.compile(
    r"(?i:\bnot)\s+\(?[A-J](?![A-Za-z])"
    r"|\b[A-J]\)?,?\s*(?i:\b(?:and|or))\s+\(?[A-J](?![A-Za-z])"
    r"|^\(?[A-J]\)?\s+is\s+(?:wrong|incorrect|false|not)\b"
    r"|(?i:\b(?:actually|no|wait)\b),?\s+(?:it\s+is\s+)?\(?[A-J](?![A-Za-z])"
)
_LABELLED = re.compile(r"\(?([A-J])(?:\)|[.:](?=\s|\Z))\s*")  # "E: vitamin D", "(B) 12 m"

_BETWEEN_ITEMS = re.compile(
    r"\s*(?:,\s*(?:and|or)\s|,\s|;|\s(?:and|or)\s|\\(?:land|lor)(?![a-z]))\s*"
)
_BASED = re.compile(r"\(?([0-9A-Za-z]{1,100})\)?(?:_\{?(\d{1,2})\}?)?", re.A)
_LENGTH = (
    r"(?:mm|cm|km|m|in|ft|yd|inch(?:es)?|f(?:oo|ee)t|(?:centi|milli|kilo)?met(?:er|re)s?|units?)"
)
_UNIT_BEHIND = re.compile(
    rf"(?<=[\w)}}])\s+(?:(?:square|cubic|sq\.?|cu\.?)\s*)?{_LENGTH}(?:\^\{{?[23]\}}?)?\Z"
)

_NAMED = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*=(?!=)")
_DATE = re.compile(r"\d{1,4}\s*[-–]\s*\d{1,4}(?:\s*[-–]\s*\d{1,4})?")
_COLON = re.compile(r"(\d{1,9})\s*:\s*(\d{1,9})")

_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
_TEN_TIMES = re.compile(r"(?<=\d)\s{0,4}x\s{0,4}(?=10\s{0,4}\^)")  # 3 x 10^5
_ONE_NUMBER = re.compile(r"[-+]?(?:[\d.,\s/{}]|\\frac|\\overline)+(?:\\times\s*10\^\{?-?\d+\}?)?")
_QUANTITY = re.compile(r"(.*?\d[})]?)(\s*)(%|[A-Za-z°][A-Za-z°/ .]*(?:\^\{?-?\d\}?)?)")
_PREFIX = re.compile(r"^(?:\\?[$€£]|[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\approx)(?!=))\s*")

_FACTORS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_SHORT_UNITS = frozenset(
    (
        *"mgshlLNJWVKCFA",
        *("ft", "in", "yd", "mi", "lb", "lbs", "oz", "mph", "ml", "mL", "ms", "Hz", "Pa", "kW"),
        *("am", "pm", "hr", "hrs", "min", "mins", "sec", "secs", "deg", "rad"),
    )
)
# words behind a number that are no unit
_NO_UNITS = frozenset(
    (
        *("pi", "sqrt", "sin", "cos", "tan", "log", "ln", "exp", "arcsin", "arccos", "arctan"),
        *("or", "and", "mod", "modulo", "times", "choose", "plus", "minus", "over", "squared"),
        *("cubed", "factorial", "halves", "half", "thirds", "third", "quarters", "quarter"),
        *("fourths", "fifths", "tenths", "hundredths", "remainder", "more", "less", "least"),
        *("most", "below", "above", "to", "is", "not", "no", "wrong", "if", "when", "so"),
        *("fails", "does", "for", "otherwise", "but", "because", "since", "extraneous", "then"),
    )
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
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3",
}  # fmt: skip


_RAISED, _LOWERED = re.compile("[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "+-01234567890123456789")


def agree(extracted: str, answer: str, tolerance: float) -> tuple[bool | None, Comparison]:
    """Whether two answers agree, and how it was found; ``None``: it takes a parser of mathematics.

    Args:
        extracted: read out of a response, at most ``MAX_SYMBOLIC_LENGTH`` characters.
        tolerance: see :func:`numbers_agree`.
    """
    if normalize(extracted) == normalize(answer):
        return True, Comparison.text
    if _CAPITAL.fullmatch(_clean(answer)) and _LABELLED.match(_clean(extracted)):
        return _letter(_clean(extracted)) == _clean(answer).strip("()."), Comparison.letter
    equal = _bases_agree(extracted, answer)
    if equal is None:
        equal = numbers_agree(extracted, answer, tolerance)
    if equal is not None:
        return equal, Comparison.numbers
    ours, reference = items(extracted), items(answer)
    if len(ours) > 1 and len(ours) == len(reference):
        equal = _items_agree(ours, reference, tolerance)
        if equal is not None:
            return equal, Comparison.lists
    return None, Comparison.symbolic


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
    names = [[_NAMED.match(item) for item in each] for each in (ours, reference)]
    if any(map(any, names)) and not all(map(all, names)):
        return None
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
    (ours, our_base), (reference, base) = (each.groups() for each in found if each)
    if not all(_is_of_base(*each.groups()) for each in found if each):
        return None  # A_1 is a point
    same = ours.lstrip("0").lower() == reference.lstrip("0").lower()
    return bool(same and (our_base or base) == base)


def _is_of_base(digits: str, base: str | None) -> bool:
    """Whether these are digits of a base from 2 to 36, one of them decimal."""
    if not base:
        return True
    if not 2 <= int(base) <= 36 or not any(digit.isdigit() for digit in digits):
        return False
    return max(int(digit, 36) for digit in digits) < int(base)


def without_unit(extracted: str, answer: str) -> tuple[str, str]:
    """Both answers, without a unit behind a formula that only one of them names."""
    both = [_clean(text) for text in (extracted, answer)]
    bare = [_UNIT_BEHIND.sub("", text) for text in both]
    if (bare[0] != both[0]) == (bare[1] != both[1]):
        return extracted, answer
    return bare[0], bare[1]


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
        letters = (_letter(_clean(reading)) for reading in found.readings)
        letter = next((letter for letter in letters if letter), None)
        return replace(found, answer=letter)
    if truncated or not unmarked:
        return NOTHING
    text = _REFUSED_CHOICE.sub("", without_thought(text))
    if marked := _MARKED_CHOICE.findall(text):
        return Found(marked[-1][0] or marked[-1][1], Evidence.option)
    single = _CHOICE.findall(_PRONOUNS.sub("", text))
    return Found(single[-1], Evidence.option) if single else NOTHING


def _letter(final: str) -> str | None:
    """The option that a final answer names."""
    if found := _LETTER.fullmatch(final):
        return found[1].upper()
    if _HEDGED.search(final):
        return None
    if (found := _LABELLED.match(final)) and not _MARKED_CHOICE.search(final, found.end()):
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
    if _different_kinds(extracted, answer):
        return False
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
    written = [_clean(text) for text in (extracted, answer)]
    decimals = [len(found[1]) for text in written if (found := re.search(r"\.(\d+)", text))]
    powers = any(re.search(r"\d\s*[eE]|\^", text) for text in written)
    whole = value.denominator == wanted.denominator == 1 and not powers
    inexact = bool(decimals) and not whole
    slack = Fraction(tolerance) if inexact and not whole else Fraction(0)
    # a tolerance for rounding forgives no digit that was written
    digit = Fraction(1, 2 * 10 ** min(decimals)) if inexact and not powers else None
    if digit is None or tolerance > ROUNDING:
        return any(abs(v - t) <= slack * abs(t) for v in values for t in targets)
    return any(abs(v - t) <= min(slack * abs(t), digit) for v in values for t in targets)


def prepare_worker() -> None:
    """Import math-verify, and its grammar by a first use: seconds that no answer should pay."""
    symbolically_equal("x+1", "1+x")


def _different_kinds(extracted: str, answer: str) -> bool:
    """Whether answers are named apart, or one is a date, a score, a time or a ratio, and not equal.

    A parser of mathematics would take these for differences and quotients.
    """
    ours, reference = _clean(extracted), _clean(answer)
    names = [_NAMED.match(text) for text in (ours, reference)]
    if names[0] and names[1] and names[0][1] != names[1][1]:
        return True
    if _DATE.fullmatch(reference) or (_DATE.fullmatch(ours) and ours.count("-") > 1):
        return ours.replace(" ", "") != reference.replace(" ", "")
    ratios = [_COLON.fullmatch(text) for text in (ours, reference)]
    if ratios[0] and ratios[1]:
        if len(ratios[0][2]) == len(ratios[1][2]) == 2:  # times
            return ratios[0].groups() != ratios[1].groups()
        (a, b), (c, d) = (map(int, each.groups()) for each in ratios if each)
        return a * d != b * c
    return False


def symbolically_equal(extracted: str, answer: str) -> bool:
    """Whether math-verify finds two answers equal; for a worker with limits of time and memory."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    texts = [_clean(text) for text in (answer, extracted)]
    bare = [re.sub(r"\\[A-Za-z]+", " ", _NAMED.sub("", text, count=1)) for text in texts]
    if any(_WORDS.fullmatch(text) or text.strip().lower() in ("no", "on") for text in bare):
        return False  # words are no products of letters, and were compared as text
    lettered = [bool(re.search(r"[A-DF-HJ-Za-df-hj-z]", text)) for text in bare]
    one_sided = lettered[0] != lettered[1] and not any(map(_RELATION.search, texts))
    if one_sided and "\\" not in texts[lettered.index(True)]:
        return False  # 2ab is no 2; sin^2 x + cos^2 x may be 1
    if _primes(texts[0]) != _primes(texts[1]):
        return False
    letters = {letter for text in texts for letter in re.findall(_VARIABLE, text)}
    if any(letter.isupper() and letter.lower() in letters for letter in letters):
        # to math-verify X and x are one variable
        texts = [re.sub(_VARIABLE, _told_apart, text) for text in texts]
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unreadable answer is no event
    latex = [LatexExtractionConfig()]
    try:
        gold, ours = (
            parse(f"${text}$", extraction_config=latex, parsing_timeout=None) for text in texts
        )
        # x <= 3 and (-oo, 3] say the same
        return bool(
            gold and ours and verify(gold, ours, timeout_seconds=None, allow_set_relation_comp=True)
        )
    except MemoryError:
        raise  # no verdict
    except Exception:  # sympy raises what it likes on what is no mathematics
        return False


_RELATION = re.compile(r"[<>=]|\\(?:le|ge|lt|gt|ne|in|leq|geq|mid|neq)(?![a-z])|\\cup|or|and")
_WORDS = re.compile(r"\s*(?=.*[A-Za-z]{3})[A-Za-z\s]+|[A-Z\s]{2,}")
_VARIABLE = r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z_])"


def _primes(text: str) -> int:
    return text.count("'") + text.count("\\prime") + text.count("dots")


def _told_apart(found: re.Match[str]) -> str:
    return f"{found[0]}_{{1}}" if found[0].isupper() else found[0]


def _clean(answer: str) -> str:
    """An answer without Markdown, math delimiters, spacing commands and Unicode forms of LaTeX."""
    answer = _RAISED.sub(lambda f: f"^{{{f[0].translate(_DIGITS)}}}", answer)
    answer = _LOWERED.sub(lambda f: f"_{{{f[0].translate(_DIGITS)}}}", answer)
    answer = "".join(_UNICODE.get(character, character) for character in answer)
    answer = unicodedata.normalize("NFKC", answer.replace("…", "\\ldots ")).strip()
    answer = _bare(re.sub(r"(?<!\\)\$", "", _bare(answer)))
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


def _bare(answer: str) -> str:
    """An answer without Markdown around it and its full stop; an ellipsis stays."""
    answer = re.sub(r"(?<!\.)[.,;]$", "", answer.strip().strip("*` "))
    return answer.strip("*` ").removesuffix("__")


def _quantity(answer: str) -> tuple[Fraction, str] | None:
    """Exact value and unit ("" for none) of a number with an optional unit; or ``None``."""
    answer = _PREFIX.sub("", _clean(answer))
    found = _QUANTITY.fullmatch(answer)
    if found is None:
        value = _number(answer)
        return None if value is None else (value, "")
    body, gap, unit = found[1], found[2], found[3].strip(" .")
    value = _number(body) if _ONE_NUMBER.fullmatch(body) else None
    words = unit.split()
    if value is None or not words:
        return None
    if words[0].lower() in _FACTORS:
        value, words = value * _FACTORS[words[0].lower()], words[1:]
    if words and not _is_unit(words, bool(gap)):
        return None
    unit = re.sub(r"[{}]", "", " ".join(words))
    singular = unit[:-1] if len(unit) > 3 and unit.endswith("s") else unit
    return value, "%" if singular.lower() == "percent" else singular


def _is_unit(words: list[str], gap: bool) -> bool:
    """Whether the words behind a number are a unit: 3x, 3 squared and 3 plus x are none."""
    bare = [re.sub(r"\^\{?-?\d\}?$", "", word).strip("/.") for word in words]
    known = [word in _UNITS or word.rstrip("s") in _UNITS or word in _SHORT_UNITS for word in bare]
    if bare[-1] != words[-1].strip("/.") and not known[-1]:
        return False  # x^2
    if not gap:
        return len(words) == 1 and known[0] and (len(words[0]) > 1 or words[0] in "%°")
    if len(words) > 3 or any(word.lower() in _NO_UNITS for word in bare):
        return False
    return all(is_known or len(word) > 2 for word, is_known in zip(bare, known, strict=True))


def _number(answer: str) -> Fraction | None:
    """Exact value of a written number; or ``None``."""
    answer = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), answer.strip())
    answer = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), answer)
    return rational(_TEN_TIMES.sub("*", answer))
