r"""Numbers with units: ``5 cm``, ``\$18``, ``60 miles per hour``, ``3 hours 20 minutes``.

Units of school problems are known by dimension and size, so that 50 mm are 5 cm; of any other word
(apples) only the word is compared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from nemo_paced.grading.exact import in_words, rational

_FACTORS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
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
# symbol: (dimension, its size in units of the dimension)
_SYMBOLS: dict[str, tuple[str, int | Fraction]] = {
    "%": ("%", 1), "°": ("angle", 1), "deg": ("angle", 1),
    "$": ("dollar", 1), "¢": ("dollar", Fraction(1, 100)), "€": ("euro", 1), "£": ("pound", 1),
    "USD": ("dollar", 1), "EUR": ("euro", 1), "GBP": ("pound", 1),
    "mm": ("length", 10), "cm": ("length", 100), "dm": ("length", 1000), "m": ("length", 10**4),
    "km": ("length", 10**7), "in": ("length", 254), "ft": ("length", 3048), "yd": ("length", 9144),
    "mi": ("length", 16093440),
    "mg": ("mass", 1), "g": ("mass", 1000), "kg": ("mass", 10**6),
    "ml": ("volume", 1), "mL": ("volume", 1), "cl": ("volume", 10), "l": ("volume", 1000),
    "L": ("volume", 1000), "lb": ("pound of mass", 16), "lbs": ("pound of mass", 16),
    "oz": ("pound of mass", 1),
    "ms": ("time", Fraction(1, 1000)), "s": ("time", 1), "sec": ("time", 1), "secs": ("time", 1),
    "min": ("time", 60), "mins": ("time", 60), "h": ("time", 3600), "hr": ("time", 3600),
    "hrs": ("time", 3600),
    **{each: (each, 1) for each in ("N", "J", "W", "K", "V", "C", "F", "A", "Hz", "Pa", "kW")},
    **{each: (each, 1) for each in ("rad", "am", "pm")},
}  # fmt: skip
_NAMES: dict[str, str] = {
    "percent": "%", "degree": "°", "dollar": "$", "buck": "$", "cent": "¢", "euro": "€",
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm",
    "decimeter": "dm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "ounce": "oz", "pound": "lb",
    "milliliter": "mL", "millilitre": "mL", "liter": "L", "litre": "L",
    "second": "s", "minute": "min", "hour": "h",
}  # fmt: skip
_TIMES = {"day": 86400, "week": 7 * 86400}
_WHOLE = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "fps": "ft/s"}

_QUANTITY = re.compile(r"(.*?[\d}\])])(\s*)(%|[¢°$€£A-Za-z][¢°$€£A-Za-z/ .]*(?:\^\{?-?\d\}?)?)")
_ONE_NUMBER = re.compile(r"[-+]?(?:[\d.,\s/{}]|\\frac|\\overline)+(?:\\times\s*10\^\{?-?\d+\}?)?")
_MONEY = re.compile(r"(-?)\s*(?:US)?(\\?\$|€|£|USD|EUR|GBP)\s*(?=-?[\d.])")
_PREFIX = re.compile(r"^[A-Za-z](?:_\{?\w+\}?)?\s*(?:=|\\approx)(?!=)\s*")
_PART = re.compile(r"([\d.,]+(?:/\d+)?)\s*(%|[¢°A-Za-z]+)(?:\s*,\s*|\s+and\s+|\s+|\Z)")
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
_TEN_TIMES = re.compile(r"(?<=\d)\s{0,4}x\s{0,4}(?=10\s{0,4}\^)")  # 3 x 10^5

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: how often each dimension is in it, and its size."""

    dimension: Dimension
    size: Fraction


NO_UNIT = Unit((), Fraction(1))
PERCENT = (("%", 1),)


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact value with its unit, which is ``NO_UNIT`` where none is written."""

    value: Fraction
    unit: Unit

    @property
    def size(self) -> Fraction:
        """The value in the dimension's own units."""
        return self.value * self.unit.size


def quantity(answer: str) -> Quantity | None:
    """Exact value and unit of a cleaned number with an optional unit; ``None``: it is none."""
    answer = _PREFIX.sub("", answer)
    if total := _sum(answer):
        return total
    money, answer = _without_currency(answer)
    found = _QUANTITY.fullmatch(answer)
    value = number(answer)
    if value is not None or found is None:
        return None if value is None else Quantity(value, money or NO_UNIT)
    body, gap, text = found[1], found[2], found[3].strip(" .")
    value = number(body) if _ONE_NUMBER.fullmatch(body) else None
    words = text.split()
    if value is None or not words:
        return None
    if words[0].lower() in _FACTORS:
        value, words = value * _FACTORS[words[0].lower()], words[1:]
    if words and not _is_unit(words, bool(gap)):
        return None
    unit = unit_of(" ".join(words)) if words else NO_UNIT
    return Quantity(value, money if money and unit in (NO_UNIT, money) else unit)


def number(answer: str) -> Fraction | None:
    """Exact value of a written number, in digits or words; ``None``: it is none."""
    answer = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), answer.strip())
    answer = without_thousands(answer)
    value = rational(_TEN_TIMES.sub("*", answer))
    return in_words(answer) if value is None else value


def without_thousands(answer: str) -> str:
    """An answer without the commas of ``1,234,567``; a list or a tuple keeps its own."""
    return _THOUSANDS.sub(lambda found: found[0].replace(",", ""), answer)


def unit_of(text: str) -> Unit:
    """Dimension and size of a unit such as ``km/h``, ``square feet`` or ``apples``."""
    text = re.sub(r"[{}]", "", text)
    text = re.sub(r"(?i)\s*\bper\b\s*", "/", text)
    text = _WHOLE.get(text.strip(" .").lower(), text)
    top, *bottoms = text.split("/")
    dimension: Counter[str] = Counter()
    size = Fraction(1)
    for part, sign in [(top, 1), *((bottom, -1) for bottom in bottoms)]:
        power = 1
        for word in part.replace("\\cdot", " ").split():
            if word.lower().strip(".") in _POWERS:
                power = _POWERS[word.lower().strip(".")]
                continue
            name, _, raised = word.partition("^")
            power = int(raised) if re.fullmatch(r"-?\d", raised) else power
            kind, factor = _named(name.strip("."))
            dimension[kind] += sign * power
            size *= Fraction(factor) ** (sign * power)
            power = 1
    return Unit(tuple(sorted((k, n) for k, n in dimension.items() if n)), size)


_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def _named(name: str) -> tuple[str, int | Fraction]:
    """Dimension and size of one word; of one that is not known its singular."""
    if name in _SYMBOLS:
        return _SYMBOLS[name]
    word = name.lower()
    singular = word[:-1] if len(word) > 3 and word.endswith("s") else word
    for each in (word, singular):
        if each in _TIMES:
            return "time", _TIMES[each]
        if each in _NAMES:
            return _SYMBOLS[_NAMES[each]]
    return singular, 1


def _without_currency(answer: str) -> tuple[Unit | None, str]:
    """The unit of a currency sign before a number, and the rest."""
    found = _MONEY.match(answer)
    if found is None:
        return None, answer
    return unit_of(found[2].removeprefix("\\")), found[1] + answer[found.end() :]


def _sum(answer: str) -> Quantity | None:
    """The sum of parts in units of one dimension, as ``3 hours 20 minutes``."""
    parts = list(_PART.finditer(answer))
    if len(parts) < 2 or parts[0].start() or parts[-1].end() != len(answer):
        return None
    if any(a.end() != b.start() for a, b in pairwise(parts)):
        return None
    units = [_named(part[2]) for part in parts]
    values = [number(part[1]) for part in parts]
    if len({kind for kind, _ in units}) > 1 or len({size for _, size in units}) < len(units):
        return None
    total = Fraction(0)
    for value, (_, size) in zip(values, units, strict=True):
        if value is None:
            return None
        total += value * size
    return Quantity(total, Unit(((units[0][0], 1),), Fraction(1)))


def _is_unit(words: list[str], gap: bool) -> bool:
    """Whether the words behind a number are a unit: 3x, 3 squared and 3 plus x are none."""
    bare = [re.sub(r"\^\{?-?\d\}?$", "", word).strip("/.") for word in words]
    known = [_is_known(word) for word in bare]
    if bare[-1] != words[-1].strip("/.") and not known[-1]:
        return False  # x^2
    if not gap:
        return len(words) == 1 and known[0] and (len(words[0]) > 1 or words[0] in "%°¢")
    if len(words) > 3 or any(word.lower() in _NO_UNITS for word in bare):
        return False
    return all(is_known or len(word) > 2 for word, is_known in zip(bare, known, strict=True))


def _is_known(word: str) -> bool:
    """Whether a word, or every part of ``km/h``, is a unit that is not only a word."""
    parts = _WHOLE.get(word.lower(), word).split("/")
    return all(
        part in _SYMBOLS or part.lower().rstrip("s") in (*_NAMES, *_TIMES) or part.lower() in _NAMES
        for part in parts
    )
