r"""Two answers compared as mathematics, by math-verify with what it lets pass held back.

math-verify takes an equation for its right side, a set for a tuple and decimals for equal at six
places; what these cost is checked here first. Nothing is evaluated as code: only its LaTeX grammar
is used, never the extractor that hands text to Python's ``eval``.
"""

from __future__ import annotations

import logging
import re
from fractions import Fraction
from typing import Any

from nemo_paced.grading.answers import agree_rounded
from nemo_paced.grading.exact import half_digit, rational
from nemo_paced.grading.notation import clean

_RELATION = re.compile(r"[<>=]|\\(?:le|ge|lt|gt|ne|in|leq|geq|mid|neq)(?![a-z])|\\cup|or|and")
_WORDS = re.compile(r"\s*(?=.*[A-Za-z]{3})[A-Za-z\s]+|[A-Z\s]{2,}")
_VARIABLE = re.compile(r"\\[A-Za-z]+|([A-Za-z])(?!_)")  # in its group; else a command
_NAMED = re.compile(r"([A-Za-z](?:_\{?\w+\}?)?)\s*=(?!=)")
_MORE = r"(?:>|\\(?:gt|geq?)(?![a-z]))"
_FALLING = re.compile(rf"([^<>\\]+?)\s*({_MORE})\s*([A-Za-z])\s*({_MORE})\s*([^<>\\]+)")
_RISES = {">": "<", "\\gt": "<", "\\ge": "\\le ", "\\geq": "\\le "}
# a left side that is no name of a value: 2x, x+y, x^2, xy, x/2
_EXPRESSION = re.compile(
    r"\d\s*(?:\\cdot)?\s*[A-Za-z]|[A-Za-z)]\s*[-+*/]|[-+*/]\s*[A-Za-z(]|[A-Za-z)]\s*\^(?!\s*\{?-1)"
    r"|\b[a-z]{2}\b|\\frac\s*\{?[A-Za-z]\}?\s*\{?\d|\\sqrt"
)
_SET, _TUPLE = re.compile(r"\\\{.*,.*\\\}", re.S), re.compile(r"\(.*,.*\)", re.S)
_DIGITS_OF_PI = 60  # that an irrational number is taken to


def prepare_worker() -> None:
    """Import math-verify, and its grammar by a first use: seconds that no answer should pay."""
    symbolically_equal("x+1", "1+x", 0.0)


def symbolically_equal(extracted: str, answer: str, tolerance: float) -> bool:
    """Whether math-verify finds two answers equal; for a worker with limits of time and memory.

    Args:
        tolerance: see :func:`~nemo_paced.grading.answers.numbers_agree`.
    """
    texts = [_rising(clean(text)) for text in (answer, extracted)]
    if _other_words(texts) or _states_something_else(texts) or _primes(*texts):
        return False
    if any(_SET.fullmatch(a) and _TUPLE.fullmatch(b) for a, b in (texts, texts[::-1])):
        return False
    letters = {letter for text in texts for letter in _VARIABLE.findall(text)}
    if any(letter.isupper() and letter.lower() in letters for letter in letters):
        # to math-verify X and x are one variable
        texts = [_VARIABLE.sub(_told_apart, text) for text in texts]
    try:
        return _verified(texts, tolerance)
    except MemoryError:
        raise  # no verdict
    except Exception:  # sympy raises what it likes on what is no mathematics
        return False


def _verified(texts: list[str], tolerance: float) -> bool:
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # an unreadable answer is no event
    # units are read before; here 2ab would lose "ab", a unit of surgery
    normalization = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all",
        equations=False,
    )  # fmt: skip
    latex = [LatexExtractionConfig(normalization_config=normalization)]
    gold, ours = (
        parse(f"${text}$", extraction_config=latex, parsing_timeout=None) for text in texts
    )
    if not gold or not ours:
        return False
    rounded = _rounded(texts, [gold[0], ours[0]], tolerance)
    if rounded is not None:
        return rounded
    # x <= 3 and (-oo, 3] say the same
    equal = verify(gold, ours, timeout_seconds=None, allow_set_relation_comp=True)
    return bool(equal) or _complex_equal(gold[0], ours[0])


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
            number = sympy.N(expression, _DIGITS_OF_PI)
            if not number.is_real:
                return False
            values[place] = Fraction(str(number))
    gold, ours = values
    if gold is None or ours is None:
        return None
    return agree_rounded(ours, gold, texts, tolerance)


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
    return bool(sympy.simplify(values[0] - values[1]) == 0)


def _other_words(texts: list[str]) -> bool:
    """Whether one is words, which were compared as text before, or a letter stands on one side."""
    bare = [re.sub(r"\\[A-Za-z]+", " ", _NAMED.sub("", text, count=1)) for text in texts]
    if any(_WORDS.fullmatch(text) or text.strip().lower() in ("no", "on") for text in bare):
        return True  # words are no products of letters
    lettered = [bool(re.search(r"[A-DF-HJ-Za-df-hj-z]", text)) for text in bare]
    one_sided = lettered[0] != lettered[1] and not any(map(_RELATION.search, texts))
    # 2ab is no 2; sin^2 x + cos^2 x may be 1
    return one_sided and "\\" not in texts[lettered.index(True)]


def _states_something_else(texts: list[str]) -> bool:
    """Whether one is an equation that does not name the other: ``2x=10`` is no 10, ``x=10`` is.

    Nor is ``1+1=3`` a 3: what it says is wrong.
    """
    sides = [text.split("=") for text in texts]
    if len(sides[0]) == len(sides[1]) or any("\\begin" in text for text in texts):
        return False
    equation = max(sides, key=len)
    if min(len(each) for each in sides) > 1 or not all(side.strip() for side in equation):
        return False
    values = [rational(side) for side in equation]
    known = {value for value in values if value is not None}
    names = [side for side, value in zip(equation, values, strict=True) if value is None]
    if len(known) > 1:
        return True
    if not known:
        names = names[:1] if len(names[0]) <= len(names[-1]) else names[-1:]
    return any(_EXPRESSION.search(_without_calls(name)) for name in names)


def _without_calls(name: str) -> str:
    """A left side without what stands in brackets and bars: ``f(2x)`` names a value."""
    name = re.sub(r"\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|[A-Za-z]{3,}", "W", name)
    name = re.sub(r"\\frac\s*\{\s*d[^{}]*\}\s*\{\s*d[^{}]*\}", "W", name)
    return re.sub(r"(?<=[A-Za-z}])\([^()]*\)|\|[^|]*\||_\{?\w+\}?", "", name)


def _primes(gold: str, ours: str) -> bool:
    """Whether answers differ in primes or dots, which the grammar drops."""
    counts = [t.count("'") + t.count("\\prime") + t.count("dots") for t in (gold, ours)]
    return counts[0] != counts[1]


def _told_apart(found: re.Match[str]) -> str:
    return f"{found[0]}_{{1}}" if found[1] and found[1].isupper() else found[0]


def _rising(text: str) -> str:
    """A chain ``4 > x > -1`` as ``-1 < x < 4``."""
    found = _FALLING.fullmatch(text)
    if found is None:
        return text
    high, first, middle, second, low = found.groups()
    return f"{low} {_RISES[second]} {middle} {_RISES[first]} {high}"
