"""Two final answers compared: as text, as numbers, as lists, as mathematics.

The paper grades "on the final answer after light normalisation". Text and numbers settle most
answers here, exactly and without a parser; what they leave open goes to math-verify. Nothing is
evaluated as code: of math-verify only the LaTeX grammar is used, never the extractor that hands
text to Python's ``eval``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from fractions import Fraction

from nemo_paced.grading.choices import option
from nemo_paced.grading.exact import half_digit, in_words
from nemo_paced.grading.notation import clean, normalize
from nemo_paced.grading.units import (
    NO_UNIT,
    PERCENT,
    Quantity,
    number,
    quantity,
    without_thousands,
    without_unit,
)


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
MOST_ITEMS = 40  # of a list; they are compared in pairs
MAX_SYMBOLIC_LENGTH = 1000  # characters; longer text is no final answer

_CAPITAL = re.compile(r"\(?[A-J]\)?\.?")
_LABELLED = re.compile(r"\(?[A-J](?:\)|[.:](?=\s|\Z))\s*\S")  # "E: vitamin D", "(B) 12 m"

_CHOSEN = re.compile(r"(?i:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer)\s)")
_BETWEEN_ITEMS = re.compile(
    r"\s*(?:,\s*(?:and|or)\s|,\s|;|\s(?:and|or)\s|\\(?:land|lor)(?![a-z]))\s*"
)
_MARKS = re.compile(rf"[()\[\]]|{_BETWEEN_ITEMS.pattern}")
_TUPLE = re.compile(r"([(\[])(.*)([)\]])", re.S)
# words, and no letters of a formula
_PHRASE = re.compile(r"(?=.{5})(?=[A-Za-z ]*[aeiouy])(?![A-Z]+\Z)[A-Za-z]+(?: [A-Za-z]+)*")
_NOTHING = re.compile(r"(?:there (?:is|are) )?no (?:real )?solutions?(?: exists?)?")
_BASE_WORD = re.compile(r"_\{\s*([a-z]{3,9})\s*\}")
_BASED = re.compile(r"\(?([0-9A-Za-z]{1,100})\)?(?:_\{?(\d{1,2})\}?)?", re.A)
_NAMED = re.compile(r"([A-Za-z](?:_(?:\{\w+\}|\w))?)\s*=(?!=)")
_DATE = re.compile(r"\d{1,4}\s*[-–]\s*\d{1,4}(?:\s*[-–]\s*\d{1,4})?")
_RATIO = re.compile(r"[^:]{1,60}(?::[^:]{1,60}){2,5}")
_COLON = re.compile(r"(\d{1,9})\s*:\s*(\d{1,9})\s*(?:([AaPp])\.?\s?[Mm]\.?)?")
_RESIDUE = re.compile(
    r"(?:[A-Za-z]?\s*(?:\\equiv|=|≡)\s*)?(-?\d{1,99})\s*\(?\\?[pb]?mod\s*\{?(\d{1,99})\}?\)?"
)


def agree(extracted: str, answer: str, tolerance: float) -> tuple[bool | None, Comparison]:
    """Whether two answers agree, and how it was found; ``None``: it takes a parser of mathematics.

    Args:
        extracted: read out of a response, at most ``MAX_SYMBOLIC_LENGTH`` characters.
        tolerance: see :func:`numbers_agree`.
    """
    if normalize(extracted) == normalize(answer):
        return True, Comparison.text
    ours, reference = clean(extracted), clean(answer)
    for one, other in ((ours, reference), (reference, ours)):
        if _CAPITAL.fullmatch(one) and (_LABELLED.match(other) or _CHOSEN.match(other)):
            return option(one) == option(other), Comparison.letter
    if _singular(ours) == _singular(reference) and _PHRASE.fullmatch(ours):
        return True, Comparison.text
    equal = _bases_agree(extracted, answer)
    if equal is None:
        equal = _written_alike(ours, reference)
    if equal is None:
        equal = numbers_agree(extracted, answer, tolerance)
    if equal is not None:
        return equal, Comparison.numbers
    equal = _ratios_agree(ours, reference)
    if equal is None:
        equal = _lists_agree(ours, reference, tolerance)
    return equal, Comparison.symbolic if equal is None else Comparison.lists


def _lists_agree(ours: str, reference: str, tolerance: float) -> bool | None:
    """Whether two lists hold the same; ``None``: one is none, or some item is no number."""
    our_items, their_items = items(ours), items(reference)
    if len(our_items) != len(their_items):
        # 125,216 is a list where the other side is one
        if len(our_items) == 1 and _are_numbers(their_items):
            our_items = items(ours.replace(",", ", "))
        elif len(their_items) == 1 and _are_numbers(our_items):
            their_items = items(reference.replace(",", ", "))
    named = [named_values(each) for each in (our_items, their_items)]
    if (named[0] is None) != (named[1] is None):
        values, others = (named[0], their_items) if named[0] else (named[1], our_items)
        assert values is not None, "one side is named"
        if len(others) == 1 and (inner := _TUPLE.fullmatch(others[0])):
            others = items(inner[2])
        if len(others) != len(values):
            return None
        return _all_agree(values, others, tolerance)
    if not 1 < len(our_items) == len(their_items) <= MOST_ITEMS:
        return None
    return _items_agree(our_items, their_items, tolerance)


def _are_numbers(items: Sequence[str]) -> bool:
    return all(quantity(item) is not None for item in items)


def named_values(items: Sequence[str]) -> list[str] | None:
    """The values of ``x=1, y=2``, in order; ``None``: not all are named, or two alike."""
    names = [_NAMED.match(item) for item in items]
    if len(items) < 2 or len({each[1] for each in names if each}) < len(items):
        return None
    return [_NAMED.sub("", item, count=1).strip() for item in items]


def _all_agree(ours: Sequence[str], others: Sequence[str], tolerance: float) -> bool | None:
    """Whether two rows of values agree one by one; ``None``: not told."""
    found = [_item_agrees(a, b, tolerance) for a, b in zip(ours, others, strict=True)]
    return False if False in found else (None if None in found else True)


def _ratios_agree(ours: str, reference: str) -> bool | None:
    """Whether ratios of three parts and more agree; ``None``: neither is one."""
    ratios = [_RATIO.fullmatch(text) for text in (ours, reference)]
    if not any(ratios):
        return None
    if not all(ratios):
        return False
    parts = [[number(part) for part in text.split(":")] for text in (ours, reference)]
    if any(part is None for each in parts for part in each) or len(parts[0]) != len(parts[1]):
        return normalize(ours) == normalize(reference)
    (first, *_), (other, *_) = parts
    return all(
        a is not None and b is not None and a * (other or 0) == b * (first or 0)
        for a, b in zip(*parts, strict=True)
    )


def items(answer: str) -> list[str]:
    """Items of a list such as ``1, 2 and 3``; a tuple, an interval or a matrix is one item."""
    text = clean(answer)
    if text.startswith("\\{") and text.endswith("\\}"):
        text = text[2:-2]
    if "\\begin" in text:
        return [text]
    if text.count("\\pm") == 1:
        text = _NAMED.sub("", text, count=1).strip()
        both = [text.replace("\\pm", sign, 1).strip() for sign in "+-"]
        return items(", ".join(each.removeprefix("+").strip() for each in both))
    if not re.search(r",\s", text):  # 1,000 is one number, and 1,000, 2,000 are two
        text = without_thousands(text)
        text = text.replace(",", ", ")
    found, depth, begin = [], 0, 0
    for mark in _MARKS.finditer(text):
        if mark[0] in "([":
            depth += 1
        elif mark[0] in ")]":
            depth -= 1
        elif not depth:
            found.append(text[begin : mark.start()])
            begin = mark.end()
    return [part.strip() for part in (*found, text[begin:]) if part.strip()]


def _items_agree(ours: list[str], reference: list[str], tolerance: float) -> bool | None:
    """Whether two lists hold the same, in any order; ``None``: some item is no number."""
    names = [[_NAMED.match(item) for item in each] for each in (ours, reference)]
    if any(map(any, names)) and not all(map(all, names)):
        named = 0 if all(names[0]) else 1
        if any(names[1 - named]) or len({each and _plain(each[1]) for each in names[named]}) > 1:
            return None
        # x=1 or x=-2 are 1 and -2
        bare = [_NAMED.sub("", item, count=1) for item in (ours, reference)[named]]
        ours, reference = (bare, reference) if not named else (ours, bare)
    left = list(reference)
    for item in ours:
        equal = [_item_agrees(item, other, tolerance) for other in left]
        if True not in equal:
            return None if None in equal else False
        del left[equal.index(True)]
    return True


def _item_agrees(item: str, other: str, tolerance: float) -> bool | None:
    """Whether two items of lists agree, or two tuples part by part; ``None``: not told."""
    if normalize(item) == normalize(other):
        return True
    tuples = [_TUPLE.fullmatch(clean(each)) for each in (item, other)]
    if tuples[0] is None or tuples[1] is None:
        return numbers_agree(item, other, tolerance)
    parts = [items(each[2]) for each in tuples if each]
    brackets = [(each[1], each[3]) for each in tuples if each]
    if len(parts[0]) != len(parts[1]) or brackets[0] != brackets[1]:
        return False
    return None if len(parts[0]) < 2 else _all_agree(parts[0], parts[1], tolerance)


def _singular(words: str) -> str:
    words = " ".join(words.lower().split())
    return "no solution" if _NOTHING.fullmatch(words) else words.removesuffix("s")


def _bases_agree(extracted: str, answer: str) -> bool | None:
    """Whether numbers such as ``321_8`` agree; a base that one side leaves out is the other's."""
    bare = [_BASE_WORD.sub(_digits_of_base, clean(text)) for text in (extracted, answer)]
    found = [_BASED.fullmatch(text.replace(" ", "")) for text in bare]
    if found[0] is None or found[1] is None or not (found[0][2] or found[1][2]):
        return None
    (ours, our_base), (reference, base) = (each.groups() for each in found if each)
    if not all(_is_of_base(*each.groups()) for each in found if each):
        return None  # A_1 is a point
    same = ours.lstrip("0").lower() == reference.lstrip("0").lower()
    return bool(same and (our_base or base) == base)


def _digits_of_base(found: re.Match[str]) -> str:
    value = in_words(found[1])
    return found[0] if value is None else f"_{{{value}}}"


def _is_of_base(digits: str, base: str | None) -> bool:
    """Whether these are digits of a base from 2 to 36, one of them decimal."""
    if not base:
        return True
    lettered = not any(digit.isdigit() for digit in digits)
    if not 2 <= int(base) <= 36 or (lettered and (len(digits) < 2 or base != "16")):
        return False
    return max(int(digit, 36) for digit in digits) < int(base)


def without_units(extracted: str, answer: str) -> tuple[str, str]:
    """Both answers, without a unit behind a formula that only one of them names."""
    both = [clean(text) for text in (extracted, answer)]
    bare = [without_unit(text) for text in both]
    if (bare[0] != both[0]) == (bare[1] != both[1]):
        return extracted, answer
    return bare[0], bare[1]


def numbers_agree(extracted: str, answer: str, tolerance: float) -> bool | None:
    """Whether two answers agree as numbers with units; ``None`` when one is no plain number.

    A unit that only one side names is let pass; a percentage is its number or a hundredth of it.

    Args:
        tolerance: relative, where a side is written with a decimal point. Up to ``ROUNDING`` it is
            there for rounding, and forgives no digit that was written.
    """
    written = clean(extracted), clean(answer)
    if _different_kinds(*written):
        return False
    ours, reference = map(quantity, written)
    if ours is None or reference is None:
        return None
    value, wanted = ours.value, reference.value
    if NO_UNIT not in (ours.unit, reference.unit):
        if not ours.unit.fits(reference.unit):
            return False
        if ours.unit.dimension == reference.unit.dimension:
            value, wanted = ours.size, reference.size
    values = {value} | ({value / 100} if _is_percentage(ours, reference) else set())
    targets = {wanted} | ({wanted / 100} if _is_percentage(reference, ours) else set())
    if ours.also and reference.unit == NO_UNIT:
        values = set(ours.also)
    if reference.also and ours.unit == NO_UNIT:
        targets = set(reference.also)
    return any(agree_rounded(v, t, written, tolerance) for v in values for t in targets)


def _is_percentage(one: Quantity, other: Quantity) -> bool:
    """Whether one number is a percentage and the other has no unit."""
    return one.unit.dimension == PERCENT and other.unit == NO_UNIT


def agree_rounded(
    value: Fraction, target: Fraction, written: Sequence[str], tolerance: float
) -> bool:
    """Whether two values agree but for the rounding of decimals.

    Args:
        written: both, as they are written.
        tolerance: see :func:`numbers_agree`.
    """
    powers = any(re.search(r"\d\s*[eE]|\^", text) for text in written)
    whole = value.denominator == target.denominator == 1 and not powers
    if whole or not any(re.search(r"\.\d", text) for text in written):
        return value == target
    slack = Fraction(tolerance) * abs(target)
    if tolerance <= ROUNDING:
        digits = [half for text in written if (half := half_digit(text)) is not None]
        slack = min(slack, max(digits, default=Fraction(0)))
    return abs(value - target) <= slack


def _different_kinds(ours: str, reference: str) -> bool:
    """Whether answers are named apart, or one is a date, a time, a ratio or a residue, and other.

    A parser of mathematics would take these for differences and quotients.
    """
    names = [_NAMED.match(text) for text in (ours, reference)]
    if names[0] and names[1] and _plain(names[0][1]) != _plain(names[1][1]):
        # x=2y and y=x/2 may be one equation, x=2 and y=2 are two
        values = [quantity(text.partition("=")[2].strip()) for text in (ours, reference)]
        return None not in values
    if _DATE.fullmatch(reference) or (_DATE.fullmatch(ours) and ours.count("-") > 1):
        return ours.replace(" ", "") != reference.replace(" ", "")
    ratios = [_COLON.fullmatch(text) for text in (ours, reference)]
    if not (ratios[0] and ratios[1]):
        return False
    (a, b, our_half), (c, d, half) = (each.groups() for each in ratios if each)
    if our_half or half or len(b) == len(d) == 2:  # times
        halves = {each.lower() for each in (our_half, half) if each}
        return (int(a), b) != (int(c), d) or len(halves) > 1
    return int(a) * int(d) != int(b) * int(c)


def _plain(name: str) -> str:
    return re.sub(r"[{}]", "", name)


def _written_alike(ours: str, reference: str) -> bool | None:
    """Whether two times, or two residues, agree; ``None``: they are something else."""
    if _COLON.fullmatch(ours) and _COLON.fullmatch(reference):
        return not _different_kinds(ours, reference)
    found = [_RESIDUE.fullmatch(text) for text in (ours, reference)]
    if not any(found):
        return None
    values = [
        (int(each[1]), int(each[2])) if each else (number(text), None)
        for each, text in zip(found, (ours, reference), strict=True)
    ]
    (value, modulus), (wanted, other) = values
    if value is None or wanted is None:
        return None
    if modulus is None or other is None:
        return value == wanted
    return modulus == other and (value - wanted) % max(other, 1) == 0
