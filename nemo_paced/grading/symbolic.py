r"""Two answers compared as mathematics, by math-verify with what it lets pass held back.

math-verify takes an equation for its right side, a set for a tuple or an interval, and decimals for
equal at six places; what these cost is checked here first. Nothing is evaluated as code: only its
LaTeX grammar is used, never the extractor that hands text to Python's ``eval``.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from itertools import pairwise
from typing import Any

from nemo_paced.grading.answers import (
    agree,
    agree_rounded,
    items,
    named_values,
)
from nemo_paced.grading.exact import half_digit, rational
from nemo_paced.grading.notation import clean
from nemo_paced.grading.units import quantity, without_thousands

_RELATION = re.compile(r"[<>=]|\\(?:le|ge|lt|gt|ne|in|leq|geq|mid|neq)(?![a-z])|\\cup|or|and")
_WORDS = re.compile(r"\s*(?=.*[A-Za-z]{3})[A-Za-z\s]+|[A-Z\s]{2,}")
_VARIABLE = re.compile(r"\\[A-Za-z]+|([A-Za-z])(?!_)")  # in its group; else a command
_GREEK = re.compile(r"\\[A-Z][a-z]+")  # to the grammar \Delta is \delta
_MORE = r"(?:>|\\(?:gt|geq?)(?![a-z]))"
_FALLING = re.compile(rf"([^<>\\]+?)\s*({_MORE})\s*([A-Za-z])\s*({_MORE})\s*([^<>\\]+)")
_RISES = {">": "<", "\\gt": "<", "\\ge": "\\le ", "\\geq": "\\le "}
# names that programs write without a backslash
_FUNCTIONS = re.compile(
    r"(?<![\\A-Za-z])(sqrt|arcsin|arccos|arctan|sin|cos|tan|ln|log|exp|theta|alpha|beta|gamma|lambda"
    r"|infinity|infty)(?![A-Za-z])"
)
_SET, _TUPLE = re.compile(r"\\\{.*,.*\\\}", re.S), re.compile(r"[(\[].*,.*[)\]]", re.S)
_JOINED = re.compile(r"\\pm|\b(?:and|or)\b|=|\\in")
_PRECISION = 60  # digits that an irrational number is taken to

_INDEX = r"(?:_(?:\{[^{}]*\}|\w))?"
_GREEKS = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|nu|phi|psi|rho|sigma|tau|omega|pi"
_LETTER = rf"(?:[A-Za-z]|\\(?i:{_GREEKS}))'*{_INDEX}'*"
# left sides that name a value; any other is an equation: 2x, x+y, x^2, n!, |x|, 2^x
_NAME = re.compile(
    rf"{_LETTER}(?:\([^()=+*/^-]*\))?|\(\s*{_LETTER}(?:\s*,\s*{_LETTER})+\s*\)|[fghFGHPQ]'*{_INDEX}(?:\^\{{?-1\}}?)?(?:\([^()=]*\))?"
    r"|[A-Za-z][A-Za-z ]*[a-z]{2}[A-Za-z ]*|[A-Z]{2,4}|\|[A-Z]{2}\||(?:P|E|Var)\s*\([^=]*\)"
    r"|(?:[a-z]\s*)?\\(?:angle|triangle|overline|widehat|vec|hat|bar)(?![A-Za-z]).*"
    r"|\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d[^{}]*\}"
    r"|\\(?:sin|cos|tan|cot|sec|csc|log|ln|lim|sum|int|prod|det|max|min|gcd|lcm|dim|deg)(?![A-Za-z]).*",
    re.S,
)


def prepare_worker() -> None:
    """Import math-verify, and its grammar by a first use: seconds that no answer should pay."""
    symbolically_equal("x+1", "1+x", 0.0)


def symbolically_equal(extracted: str, answer: str, tolerance: float) -> bool:
    """Whether math-verify finds two answers equal; for a worker with limits of time and memory.

    Args:
        tolerance: see :func:`~nemo_paced.grading.answers.numbers_agree`.
    """
    try:
        values = _value_of_each(clean(answer), clean(extracted), tolerance)
        if values is None:
            return False
        if values != [clean(answer), clean(extracted)]:
            equal, _ = agree(values[1], values[0], tolerance)
            if equal is not None:
                return equal
        return _equal(values, tolerance)
    except MemoryError:
        raise  # no verdict
    except Exception:  # sympy raises what it likes on what is no mathematics
        return False


def _equal(texts: list[str], tolerance: float) -> bool:
    rows = [named_values(items(text)) for text in texts]
    if (rows[0] is None) != (rows[1] is None):
        return _equal_in_order(texts, rows, tolerance)
    if _other_words([_written(text) for text in texts]) or _primes(*texts):
        return False
    if any(_SET.fullmatch(a) and _TUPLE.fullmatch(b) for a, b in (texts, texts[::-1])):
        return False
    if set(_GREEK.findall(texts[0])) != set(_GREEK.findall(texts[1])):
        return False
    return _verified(texts, tolerance)


def _equal_in_order(texts: list[str], rows: list[list[str] | None], tolerance: float) -> bool:
    """Whether the values of ``x=1, y=2`` are those of ``(1,2)``, in this order."""
    values, other = (rows[0], texts[1]) if rows[0] else (rows[1], texts[0])
    assert values is not None, "one side is named"
    others = items(other)
    if len(others) == 1 and _TUPLE.fullmatch(others[0]):
        others = items(others[0][1:-1])
    if len(others) != len(values):
        return False
    found = [(agree(a, b, tolerance)[0], a, b) for a, b in zip(values, others, strict=True)]
    return all(_verified([b, a], tolerance) if equal is None else equal for equal, a, b in found)


def _verified(originals: list[str], tolerance: float) -> bool:
    from math_verify import verify

    texts = [_written(text) for text in originals]
    letters = {letter for text in texts for letter in _VARIABLE.findall(text)}
    if any(letter.isupper() and letter.lower() in letters for letter in letters):
        # to math-verify X and x are one variable
        texts = [_VARIABLE.sub(_told_apart, text) for text in texts]

    gold, ours = map(_parsed, texts)
    if not gold or not ours:
        return False
    rounded = _rounded(texts, [gold[0], ours[0]], tolerance)
    if rounded is not None:
        return rounded
    unions = [_union(text) for text in texts]
    if any(union is not None for union in unions):
        sets = [
            union if union is not None else _as_set(parsed[0], text)
            for union, parsed, text in zip(unions, (gold, ours), texts, strict=True)
        ]
        return None not in sets and bool(sets[0] == sets[1])
    if any(_is_list_for_range(*pair) for pair in (originals, originals[::-1])):
        return False
    # x <= 3 and (-oo, 3] say the same
    equal = verify(gold, ours, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(equal) or _complex_equal(gold[0], ours[0])


def _parsed(text: str) -> list[Any]:
    """What math-verify reads: an expression and the text, or nothing."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unreadable answer is no event
    # units are read before; here 2ab would lose "ab", a unit of surgery
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all",
        equations=False,
    )  # fmt: skip
    latex = [LatexExtractionConfig(normalization_config=normalization)]
    return list(parse(f"${text}$", extraction_config=latex, parsing_timeout=None))


def _rounded(texts: list[str], parsed: list[Any], tolerance: float) -> bool | None:
    """Whether a decimal and a number agree but for rounding; ``None``: there is no decimal."""
    import sympy

    halves = [half_digit(text) for text in texts]
    if (halves[0] is None) == (halves[1] is None):
        return None
    values = [rational(text) for text in texts]
    for place, expression in enumerate(parsed):
        if values[place] is None:
            if not isinstance(expression, sympy.Expr) or expression.free_symbols:
                return None
            number = sympy.N(expression, _PRECISION)
            if not number.is_real:
                return False
            values[place] = Fraction(str(number))
    gold, ours = values
    if gold is None or ours is None:
        return None
    return agree_rounded(ours, gold, texts, tolerance)


def _is_list_for_range(text: str, other: str) -> bool:
    """Whether ``text`` is an inequality or in brackets and ``other`` a list of values.

    ``1, 2`` may be meant for the tuple ``(1,2)``; ``1 or 2``, ``\\pm 2`` and ``x=1, 2`` are not.
    """
    if _ORDER.search(other) or _TUPLE.fullmatch(other) or "\\infty" in other:
        return False
    several = len(items(other)) > 1
    if _ORDER.search(text) or re.search(r"\\in(?![a-z])", text):
        return several and "\\{" not in text
    return bool(_TUPLE.fullmatch(text)) and several and bool(_JOINED.search(other))


_ORDER = re.compile(r"[<>]|\\(?:le|ge|lt|gt|leq|geq)(?![a-z])")


def _union(text: str) -> Any:
    """The set of ``x < -1 or x > 1`` or of ``x > -3 and x < 3``; ``None``: it is another thing."""
    import sympy

    for joint, join in (
        (r"\s+or\s+|\\lor", sympy.Union),
        (r"\s+and\s+|\\land", sympy.Intersection),
    ):
        parts = re.split(joint, text)
        if len(parts) > 1:
            sets = [
                _as_set(parsed[0], part) if (parsed := _parsed(part)) else None for part in parts
            ]
            return None if None in sets else join(*sets)
    return None


def _as_set(expression: Any, text: str) -> Any:
    """The set that an inequality in one variable, or a set, is; ``None``: it is none."""
    import sympy

    if isinstance(expression, sympy.Set):
        return expression
    if type(expression).__name__ == "Tuple" and len(expression) == 2:
        return sympy.Interval(*expression, text[0] == "(", text[-1] == ")")
    if isinstance(expression, sympy.Eq) or not isinstance(expression, (sympy.Rel, sympy.And)):
        return None
    if len(expression.free_symbols) != 1:
        return None
    (symbol,) = expression.free_symbols
    real = sympy.Symbol(symbol.name, real=True)
    return expression.xreplace({symbol: real}).as_set()


def _complex_equal(gold: Any, ours: Any) -> bool:
    """Whether two expressions in ``i`` alone are one complex number."""
    import sympy

    both = (gold, ours)
    if not all(isinstance(each, sympy.Expr) for each in both):
        return False
    symbols = {symbol.name for each in both for symbol in each.free_symbols}
    if symbols != {"i"}:
        return False
    values = [each.xreplace(dict.fromkeys(each.free_symbols, sympy.I)) for each in both]
    difference = values[0] - values[1]
    return bool(sympy.simplify(difference) == 0 or abs(sympy.N(difference, 30)) < 1e-20)


def _other_words(texts: list[str]) -> bool:
    """Whether one is words, which were compared as text before, or a letter stands on one side."""
    bare = [re.sub(r"\\[A-Za-z]+", " ", text) for text in texts]
    if any(_WORDS.fullmatch(text) or text.strip().lower() in ("no", "on") for text in bare):
        return not any(_NUMBERS.search(text) for text in texts)  # words are no products of letters
    lettered = [bool(re.search(r"[A-DF-HJ-Za-df-hj-z]", text)) for text in bare]
    one_sided = lettered[0] != lettered[1] and not any(map(_RELATION.search, texts))
    # 2ab is no 2; sin^2 x + cos^2 x may be 1
    return one_sided and "\\" not in texts[lettered.index(True)]


_NUMBERS = re.compile(r"\\mathbb\{[NZQRC]\}")  # sets that have a name


def _value_of_each(gold: str, ours: str, tolerance: float) -> list[str] | None:
    """Both answers without the names of their values; ``None``: one states something else.

    ``x=10`` is a 10, and so is ``A = 2 \\cdot 5 = 10``; ``2x=10`` is none, nor is ``1+1=3`` a 3.
    """
    texts = [gold, ours]
    if any("\\begin" in text for text in texts):
        return [_CASES_NAME.sub("", text) for text in texts]
    sides = [[side.strip() for side in text.split("=")] for text in texts]
    lengths = [len(each) if all(each) else 1 for each in sides]
    if lengths[0] == lengths[1]:
        return _same_names(texts, sides) if lengths[0] > 1 else texts
    if min(lengths) > 1 or any(len(items(text)) > 1 for text in texts):
        return texts
    place = 0 if lengths[0] > 1 else 1
    value = _value(sides[place], tolerance)
    if value is None:
        return None
    texts[place] = value
    return texts


_CASES_NAME = re.compile(r"\A\s*[A-Za-z]\s*(?:\([A-Za-z]\))?\s*=\s*(?=\\begin)")


def _same_names(texts: list[str], sides: list[list[str]]) -> list[str] | None:
    """Two equations as they are; ``None``: they name other values, ``f(1)`` and ``f(2)``."""
    names = [each[0].replace(" ", "") for each in sides]
    calls = ["(" in name and bool(_NAME.fullmatch(name)) for name in names]
    if all(calls) and names[0] != names[1]:
        return None
    return texts


def _value(sides: list[str], tolerance: float) -> str | None:
    """The value of a chain of equal sides, one of which names it; ``None``: none does."""
    named = [bool(_NAME.fullmatch(side)) for side in sides]
    known = [found.size for side in sides if (found := quantity(side)) is not None]
    if any(value not in (known[0], known[0] / 100, known[0] * 100) for value in known):
        return None  # what it says is wrong
    if any(named):
        first = named.index(True)
        others = [side for place, side in enumerate(sides) if place != first]
        return others[-1]
    if len(known) < len(sides):
        # \sqrt{52} = 2\sqrt{13} says what is true, and 2x = 10 what may be
        closed = not any(_FREE.search(re.sub(r"\\[A-Za-z]+", " ", side)) for side in sides)
        pairs = [list(pair) for pair in pairwise(sides)]
        if not closed or not all(_verified(pair, tolerance) for pair in pairs):
            return None
    return sides[-1]


_FREE = re.compile(r"[A-DF-HJ-Za-df-hj-z]")  # letters but e and i


def _written(text: str) -> str:
    """An answer as the grammar reads it: no degrees, commands with a backslash, chains rising."""
    text = _FUNCTIONS.sub(r"\\\1", text.replace("**", "^").replace("*", "\\cdot "))
    text = re.sub(r"\\(sqrt|exp)\s*\(([^()]*)\)", r"\\\1{\2}", text).replace(
        "\\infinity", "\\infty"
    )
    text = re.sub(r"\\exp\{([^{}]*)\}", r"e^{\1}", text)
    text = _ANGLE.sub(r"\\\1(\\frac{\2\\pi}{180})", text).replace("°", "")
    text = re.sub(r"\\dot\{|\\mathrm\{", "{", text)
    if "\\pm" in text:
        text = ", ".join(items(text))
    text = text if re.search(r",\s", text) else without_thousands(text)
    found = _FALLING.fullmatch(text)
    if found is None:
        return text
    high, first, middle, second, low = found.groups()
    return f"{low} {_RISES[second]} {middle} {_RISES[first]} {high}"


_ANGLE = re.compile(r"\\(sin|cos|tan|cot|sec|csc)\s*\(?\s*(\d+(?:\.\d+)?)\s*°\s*\)?")


def _primes(gold: str, ours: str) -> bool:
    """Whether answers differ in primes or dots, which the grammar drops."""
    marks = ("'", "\\prime", "dots", "!!")
    counts = [sum(map(text.count, marks)) for text in (gold, ours)]
    return counts[0] != counts[1]


def _told_apart(found: re.Match[str]) -> str:
    return f"{found[0]}_{{1}}" if found[1] and found[1].isupper() else found[0]
