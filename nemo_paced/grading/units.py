r"""Numbers with units: ``5 cm``, ``\$18``, ``60 miles per hour``, ``3 hours 20 minutes``.

Units of school problems are known by dimension and size, so that 50 mm are 5 cm; of any other word
(apples) only the word is compared.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise

from nemo_paced.grading.exact import in_words, number_words, rational

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
        *("alpha", "beta", "gamma", "delta", "theta", "lambda", "phi", "psi", "omega", "sigma"),
        *("or", "and", "mod", "modulo", "times", "choose", "plus", "minus", "over", "squared"),
        *("cubed", "factorial", "root", "power", "base", "point", "repeating", "recurring"),
        *("halved", "doubled", "tripled", "inverse", "infinity", "remainder", "more", "less"),
        *("least", "most", "below", "above", "to", "is", "not", "no", "if", "when", "unless"),
        *("except", "until", "so", "wrong", "incorrect", "false", "rejected", "maybe", "fails"),
        *("does", "for", "otherwise", "but", "because", "since", "extraneous", "then", "score"),
        *("gross", "lakh", "crore", "tens"),
    )
)
_FRACTION_WORD = re.compile(
    r"(?:half|halve|third|quarter|fourth|fifth|sixth|seventh|eighth|ninth|tenth|eleventh|twelfth"
    r"|\w+teenth|\w+tieth|\w+dredth|\w+sandth|\w+llionth)s?|(?:hundred|thousand|\w*[bmtdq]\w+llion|dozen)s"
    r"|quadrillion"
)
# symbol: (dimension, its size in units of the dimension)
_SYMBOLS: dict[str, tuple[str, int | Fraction]] = {
    "%": ("%", 1), "°": ("angle", 1), "deg": ("angle", 1),
    "$": ("dollar", 1), "¢": ("dollar", Fraction(1, 100)), "€": ("euro", 1), "£": ("pound", 1),
    "USD": ("dollar", 1), "EUR": ("euro", 1), "GBP": ("pound", 1),
    "nm": ("length", Fraction(1, 10**5)), "µm": ("length", Fraction(1, 100)),
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
    **{each: (each, 1) for each in ("N", "J", "W", "K", "V", "C", "F", "A", "Hz", "Pa", "eV")},
    **{f"k{each}": (each, 1000) for each in ("N", "J", "W", "V", "Hz", "Pa")},
    **{each: (each, 1) for each in ("rad", "am", "pm", "pc", "°C", "°F", "Å", "unit")},
    "₹": ("rupee", 1), "¥": ("yen", 1), "month": ("month", 1), "yr": ("month", 12),
}  # fmt: skip
_NAMES: dict[str, str] = {
    "percent": "%", "degree": "°", "dollar": "$", "buck": "$", "cent": "¢", "euro": "€",
    "millimeter": "mm", "millimetre": "mm", "centimeter": "cm", "centimetre": "cm",
    "decimeter": "dm", "meter": "m", "metre": "m", "kilometer": "km", "kilometre": "km",
    "inch": "in", "inche": "in", "foot": "ft", "feet": "ft", "yard": "yd", "mile": "mi",
    "milligram": "mg", "gram": "g", "kilogram": "kg", "ounce": "oz", "pound": "lb",
    "milliliter": "mL", "millilitre": "mL", "liter": "L", "litre": "L",
    "second": "s", "minute": "min", "hour": "h", "year": "yr", "radian": "rad", "nanometer": "nm",
    "watt": "W", "joule": "J", "newton": "N", "volt": "V", "pascal": "Pa", "hertz": "Hz",
    "celsius": "°C", "fahrenheit": "°F",
}  # fmt: skip
_TIMES = {"day": 86400, "week": 7 * 86400}
_WHOLE = {"mph": "mi/h", "kph": "km/h", "kmh": "km/h", "kmph": "km/h", "fps": "ft/s"}

_UNIT = r"(?:%|[¢°$€£ÅµA-Za-z][¢°$€£ÅµA-Za-z/ .{}^\d-]*)"
_QUANTITY = re.compile(rf"(.*?[\d}}\])](?:[eE][-+]?\d+)?)(\s*)({_UNIT})")
_MONEY = re.compile(r"(-?)\s*(?:US)?(\\?\$|€|£|₹|¥|USD|EUR|GBP)\s*(?=-?[\d.])")
_PREFIX = re.compile(r"^[A-Za-z](?:_(?:\{\w+\}|\w))?\s*(?:=|\\approx)(?!=)\s*")
_PART = re.compile(r"([\d.,]+(?:/\d+)?)\s*([¢°A-Za-z]+)(?:\s*,\s*|\s+and\s+|\s+|\Z)")
_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
_TEN_TIMES = re.compile(r"(?<=\d)\s{0,4}x\s{0,4}(?=10\s{0,4}\^)")  # 3 x 10^5

_REMEMBERED = 4096  # quantities that are kept: items of lists are compared in pairs

Dimension = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Unit:
    """A unit: how often each dimension is in it, and its size."""

    dimension: Dimension
    size: Fraction

    def fits(self, other: Unit) -> bool:
        """Whether both measure the same; money may lack what it is paid for (``per hour``)."""
        if self.dimension == other.dimension:
            return True
        paid = [tuple(each for each in unit.dimension if each[1] > 0) for unit in (self, other)]
        lacks = any(paid[i] == unit.dimension for i, unit in enumerate((self, other)))
        return paid[0] == paid[1] and lacks and paid[0] in _CURRENCIES


_CURRENCIES = tuple(((name, 1),) for name in ("dollar", "euro", "pound", "rupee", "yen"))


NO_UNIT = Unit((), Fraction(1))
PERCENT = (("%", 1),)


@dataclass(frozen=True, slots=True)
class Quantity:
    """An exact value with its unit, which is ``NO_UNIT`` where none is written.

    Attributes:
        also: of a sum, its value in each unit that it names: 2 hours 30 minutes are 150 and 5/2.
    """

    value: Fraction
    unit: Unit
    also: tuple[Fraction, ...] = ()

    @property
    def size(self) -> Fraction:
        """The value in the dimension's own units."""
        return self.value * self.unit.size


@lru_cache(_REMEMBERED)
def quantity(answer: str) -> Quantity | None:
    """Exact value and unit of a cleaned number with an optional unit; ``None``: it is none."""
    answer = _DEGREES.sub(r"°\1", _PREFIX.sub("", answer))
    answer = re.sub(r"(?i)\bper\s+cent\b", "%", _NOON.sub(r"\1m", answer))
    answer = re.sub(r"(?<=\d)\s*/\s*(?=[A-Za-z])", " per ", answer)
    answer = re.sub(r"(?<=\d)\s*\\Omega(?![A-Za-z])", " ohm", answer)
    if total := _sum(answer):
        return total
    money, answer = _without_currency(answer)
    found = _QUANTITY.fullmatch(answer)
    value = number(answer)
    if value is not None or found is None:
        return None if value is None else Quantity(value, unit_of(money) if money else NO_UNIT)
    body, gap, text = found[1], found[2], found[3].strip(" .")
    value = None if _TERMS.search(body) else number(body)
    words = text.split()
    if value is None or not words:
        return None
    if words[0].lower() in _FACTORS:
        value, words = value * _FACTORS[words[0].lower()], words[1:]
        if number_words(" ".join(words).lower()) or _FACTORS.keys() & set(words):
            return None  # one hundred twenty
    if words and not is_unit(words, gap=bool(gap)):
        return None
    if money and words and words[0] not in ("per", "/") and not words[0].startswith("/"):
        return Quantity(value, unit_of(money)) if _named(words[0]) == _SYMBOLS[money] else None
    name = " ".join([money, *words]) if money else " ".join(words)
    return Quantity(value, unit_of(name) if name else NO_UNIT)


_DEGREES = re.compile(r"(?i:°|\s*\bdegrees?)\s*(?:of\s+)?([CF])(?:elsius|ahrenheit)?(?![A-Za-z])")
_NOON = re.compile(r"\b([ap])\.\s?m\b\.?")
_TERMS = re.compile(r"[\d)}\s][-+]")  # 3-2 apples are no quantity


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
    text = re.sub(r"[{}]|\\cdot", " ", re.sub(r"\^\s*\{?(-?\d)\}?", r"^\1", text))
    text = re.sub(r"(?i)\s*\b(?:per|an?)\b\s*", "/", text)
    text = _WHOLE.get(text.strip(" .").lower(), text)
    top, *bottoms = text.split("/")
    dimension: Counter[str] = Counter()
    size = Fraction(1)
    for part, sign in [(top, 1), *((bottom, -1) for bottom in bottoms)]:
        power, words = 1, part.split()
        for place, word in enumerate(words):
            if word.lower().strip(".") in _POWERS:
                power = _POWERS[word.lower().strip(".")]
                continue
            if word.lower() in _RAISES:
                continue
            after = words[place + 1].lower() if place + 1 < len(words) else ""
            name, raised = _split_power(word)
            power = raised or _RAISES.get(after, power)
            kind, factor = _named(name.strip("."))
            dimension[kind] += sign * power
            size *= Fraction(factor) ** (sign * power)
            power = 1
    return Unit(tuple(sorted((k, n) for k, n in dimension.items() if n)), size)


def _split_power(word: str) -> tuple[str, int]:
    """A word and the power written at its end, 0 where there is none: ``cm^2``, ``m2``."""
    found = re.fullmatch(r"(.+?)\^\{?(-?\d)\}?", word)
    found = found or (re.fullmatch(r"([a-z]{1,2})([23])", word) if word[:-1] in _SYMBOLS else None)
    return (found[1], int(found[2])) if found else (word, 0)


_RAISES = {"squared": 2, "cubed": 3}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


def _named(name: str) -> tuple[str, int | Fraction]:
    """Dimension and size of one word; of one that is not known its singular."""
    for each in (name, name.removesuffix("s") if len(name) > 2 else name):
        if each in _SYMBOLS:
            return _SYMBOLS[each]
    word = name.lower()
    singular = word[:-1] if len(word) > 3 and word.endswith("s") else word
    for each in (word, singular):
        if each in _TIMES:
            return "time", _TIMES[each]
        if each in _NAMES:
            return _SYMBOLS[_NAMES[each]]
        if len(each) > 1 and each in _SYMBOLS:  # KG, Km
            return _SYMBOLS[each]
    return singular, 1


def _without_currency(answer: str) -> tuple[str, str]:
    """The symbol of a currency before a number, and the rest."""
    found = _MONEY.match(answer)
    if found is None:
        return "", answer
    return found[2].removeprefix("\\"), found[1] + answer[found.end() :]


def _sum(answer: str) -> Quantity | None:
    """The sum of parts in units of one dimension, as ``3 hours 20 minutes``."""
    parts = list(_PART.finditer(answer))
    if len(parts) < 2 or parts[0].start() or parts[-1].end() != len(answer):
        return None
    if any(a.end() != b.start() for a, b in pairwise(parts)):
        return None
    units = [_named(part[2]) for part in parts]
    values = [number(part[1]) for part in parts]
    sizes = [Fraction(size) for _, size in units]
    if len({kind for kind, _ in units}) > 1:
        return None
    total = Fraction(0)
    for place, (value, size) in enumerate(zip(values, sizes, strict=True)):
        # 90 minutes behind an hour are an item of a list
        if value is None or (place and value * size >= sizes[place - 1]):
            return None
        total += value * size
    unit = Unit(((units[0][0], 1),), Fraction(1))
    return Quantity(total, unit, tuple(total / size for size in sizes))


def is_unit(words: list[str], *, gap: bool = True) -> bool:
    """Whether the words behind a number are a unit: 3x, 3 squared and 3 plus x are none.

    Args:
        gap: whether a space stands before them.
    """
    words = [each for word in words for each in (word.strip("."),) if each]
    bare = [_split_power(word)[0] for word in words]
    known = [_is_known(word) for word in words]
    if not words or (bare[-1] != words[-1] and not known[-1]):
        return False  # x^2
    if not gap:
        return all(known) and (len(words[0]) > 1 or words[0] in "%°¢€£") and len(words) <= 3
    if len(words) > 1 and all(len(word) == 1 for word in bare[:2]) and bare[0] not in "NJWKVCFA°":
        return False  # 2 m g
    if len(words) > 1 and words[-1].lower() in _RAISES and known[-2]:
        return True
    if len(words) > 5 or any(_is_no_unit(word.lower()) for word in bare):
        return False
    return all(
        is_known or (len(word) > 2 and re.search(r"(?i)[aeiouy]", word))
        for word, is_known in zip(bare, known, strict=True)
    )


def _is_no_unit(word: str) -> bool:
    return word in _NO_UNITS or bool(_FRACTION_WORD.fullmatch(word)) or number_words(word)


def _is_known(word: str) -> bool:
    """Whether a word, or every part of ``km/h``, is a unit that is not only a word."""
    if word.lower() in (*_POWERS, "per", "units"):
        return True
    parts = [_split_power(each)[0] for each in _WHOLE.get(word.lower(), word).split("/") if each]
    return bool(parts) and all(
        each in _SYMBOLS
        or each.removesuffix("s") in _SYMBOLS
        or (len(each) > 1 and each.lower() in _SYMBOLS)
        or each.lower() in _NAMES
        or each.lower().removesuffix("s") in (*_NAMES, *_TIMES)
        for each in parts
    )


def without_unit(answer: str) -> str:
    """A cleaned formula without the unit behind it, as ``5\\pi`` of ``5\\pi cm``."""
    found = _FORMULA_UNIT.fullmatch(answer)
    if found is None or not re.search(r"\d|\\", found[1]):
        return answer
    words = found[2].split()
    is_one = all(_is_known(word) for word in words) and is_unit(words)
    return found[1].strip() if is_one else answer


_FORMULA_UNIT = re.compile(rf"(.*(?:[\d)}}\]]|\\[A-Za-z]+))\s+({_UNIT})")
