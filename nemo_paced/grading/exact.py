r"""Exact values of written numbers: ``1,234``, ``2^{-98}``, ``0.\overline{3}``, ``3 \cdot 10^5``.

Floats cannot tell ``2^{-98}`` from ``2^{-99}`` where answers are compared at some digits; fractions
can. A number is read by its grammar, never evaluated as code, in time that grows with its length;
one whose value would be too large to hold is read as none.
"""

from __future__ import annotations

import re
from fractions import Fraction

_DIGITS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"),
    *("eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen"),
    "nineteen",
)
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_WORDS = {word: value for value, word in enumerate(_DIGITS)} | {
    ten if not digit else f"{ten}-{_DIGITS[digit]}": 10 * place + digit
    for place, ten in enumerate(_TENS, 2)
    for digit in range(10)
}

_PARTS = {
    **{"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6},
    **{"seventh": 7, "eighth": 8, "ninth": 9, "tenth": 10, "hundredth": 100},
}
_LONGEST_WORDS = 80  # characters of a number in words

LONGEST = 300  # characters of a written number
_BITS = 1 << 16  # of a numerator or denominator
_DEEPEST = 40  # brackets within brackets

_TOKEN = re.compile(
    r"\s*(?:(?:\d+\.\d*|\.\d*)(?:\(\d+\)|\\(?:overline|dot)\{?\d+\}?)|(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
    r"|\\(?:frac|cdot|times|div)(?![A-Za-z])|[-+*/^(){}\[\]!])"
)
_NUMBER = re.compile(
    r"(\d*)\.?(\d*)(?:\((\d+)\)|\\(?:overline|dot)\{?(\d+)\}?)?(?:[eE]([-+]?\d+))?"
)
_DECIMAL = re.compile(
    r"[-+]?[\d,]*\.(?P<after>\d+)\s*"
    r"(?:[eE](?P<e>[-+]?\d{1,5})|(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?(?P<ten>[-+]?\d{1,5})\}?)?"
)
_MIXED = re.compile(r"(?<![\d.^/{])(\d+)\s+(\d+)/(\d+)(?![\d.])")
_MIXED_FRAC = re.compile(r"(?<![\d.^/{])(\d+)\s*(\\frac\s*\{\d+\}\s*\{\d+\})")
_SHORT_FRAC = re.compile(r"\\frac\s*(\d)\s*(\d)")
_HALF_SHORT_FRAC = re.compile(r"\\frac\s*(?:(\d)\s*(\{)|(\{[^{}]*\})\s*(\d))")


def rational(text: str) -> Fraction | None:
    """Exact value of a number written in digits, LaTeX or both; ``None``: it is no such number.

    Integers, decimals, repeating decimals, fractions, mixed numbers, sums, products, powers and
    factorials of them.
    """
    if not 0 < len(text) <= LONGEST:
        return None
    text = _SHORT_FRAC.sub(r"\\frac{\1}{\2}", text)
    text = _HALF_SHORT_FRAC.sub(_braced, text)
    text = _MIXED.sub(r"(\1+\2/\3)", text)
    text = _MIXED_FRAC.sub(r"(\1+\2)", text)
    tokens = _tokens(text)
    if tokens is None:
        return None
    try:
        return _Reader(tokens).whole()
    except _NoNumber:
        return None


def in_words(text: str) -> Fraction | None:
    """Value of a number in words: ``forty-two``, ``five hundred``, ``two thirds``."""
    if not text.isascii() or len(text) > _LONGEST_WORDS:
        return None
    words = [word for word in text.lower().replace("-", " ").split() if word != "and"]
    sign = -1 if words[:1] in (["negative"], ["minus"]) else 1
    words = words[1:] if sign < 0 else words
    if len(words) > 1 and words[-1].removesuffix("s") in _PARTS:
        top = _whole_in_words(words[:-1])
        return None if top is None else Fraction(sign * top, _PARTS[words[-1].removesuffix("s")])
    value = _whole_in_words(words)
    return None if value is None else Fraction(sign * value)


def _whole_in_words(words: list[str]) -> int | None:
    """Value of ``five hundred forty two``; ``None``: it is no number."""
    total = 0
    for place, name in ((1000, "thousand"), (100, "hundred"), (1, "")):
        if name and name in words:
            at = words.index(name)
            count = _whole_in_words(words[:at])
            if count is None:
                return None
            total, words = total + place * count, words[at + 1 :]
    rest = _WORDS.get("-".join(words)) if words else (0 if total else None)
    return None if rest is None else total + rest


def number_words(text: str) -> bool:
    """Whether a text names a number in words, such as ``thirty``."""
    return any(word in _WORDS for word in text.lower().split())


def half_digit(text: str) -> Fraction | None:
    """Half a unit of the last digit of a decimal: what rounding may have taken from it.

    ``None``: the text is no decimal, or one with operations.
    """
    found = _DECIMAL.fullmatch(text.strip())
    if found is None:
        return None
    exponent = int(found["e"] or found["ten"] or 0)
    if abs(exponent) > 9999:
        return None
    return Fraction(1, 2 * 10 ** len(found["after"])) * Fraction(10) ** exponent


def _braced(found: re.Match[str]) -> str:
    first, brace, given, second = found.groups()
    return f"\\frac{{{first}}}{brace}" if first else f"\\frac{given}{{{second}}}"


class _NoNumber(Exception):
    """What is written is no number, or one beyond the bounds."""


def _tokens(text: str) -> list[str] | None:
    found, at, text = [], 0, text.strip()
    while at < len(text):
        token = _TOKEN.match(text, at)
        if token is None:
            return None
        found.append(token[0].strip())
        at = token.end()
    return found or None


class _Reader:
    """Reader of ``sum := product {+- product}`` and what is below it, by recursive descent."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._at = 0
        self._depth = 0

    def whole(self) -> Fraction:
        value = self._sum()
        if self._at < len(self._tokens):
            raise _NoNumber
        return value

    def _next(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _take(self, *tokens: str) -> str:
        """The next token if it is one of these, and it is passed; else an empty text."""
        token = self._next()
        if token and token in tokens:
            self._at += 1
            return token
        return ""

    def _sum(self) -> Fraction:
        value = self._product()
        while sign := self._take("+", "-"):
            other = self._product()
            value = value + other if sign == "+" else value - other
        return _bounded(value)

    def _product(self) -> Fraction:
        value = self._signed()
        while sign := self._take("*", "/", "\\cdot", "\\times", "\\div"):
            other = self._signed()
            if sign in ("/", "\\div"):
                value = _quotient(value, other)
            else:
                value = _bounded(value * other)
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while found := self._take("-", "+"):
            sign = -sign if found == "-" else sign
        return sign * self._power()

    def _power(self) -> Fraction:
        base = self._atom()
        if self._take("!"):
            base = _factorial(base)
            if self._next() == "!":
                raise _NoNumber  # n!! is another function
        if not self._take("^"):
            return base
        exponent = self._signed()
        if exponent.denominator != 1 or (not base and exponent <= 0):
            raise _NoNumber
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if size * abs(exponent.numerator) > _BITS:
            raise _NoNumber
        return Fraction(base**exponent.numerator)

    def _atom(self) -> Fraction:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise _NoNumber
        token = self._next()
        self._at += 1
        if token == "\\frac":
            value = _quotient(self._bracketed("{"), self._bracketed("{"))
        elif token in ("(", "{", "["):
            self._at -= 1
            value = self._bracketed(token)
        elif token and (token[0].isdigit() or token[0] == "."):
            value = _value(token)
        else:
            raise _NoNumber
        self._depth -= 1
        return value

    def _bracketed(self, opening: str) -> Fraction:
        if not self._take(opening):
            raise _NoNumber
        value = self._sum()
        if not self._take({"(": ")", "{": "}", "[": "]"}[opening]):
            raise _NoNumber
        return value


def _value(token: str) -> Fraction:
    """Value of digits with a point, a repeating part or an exponent."""
    found = _NUMBER.fullmatch(token)
    if found is None:
        raise _NoNumber
    whole, after, bracketed, overlined, exponent = found.groups()
    value = Fraction(int(whole + after or "0"), 10 ** len(after))
    if repeating := bracketed or overlined:
        value += Fraction(int(repeating), 10 ** len(after) * (10 ** len(repeating) - 1))
    if exponent:
        if abs(int(exponent)) > 9999:
            raise _NoNumber
        value *= Fraction(10) ** int(exponent)
    return value


def _quotient(top: Fraction, bottom: Fraction) -> Fraction:
    if not bottom:
        raise _NoNumber
    return _bounded(top / bottom)


def _factorial(value: Fraction) -> Fraction:
    if value.denominator != 1 or not 0 <= value <= 1000:
        raise _NoNumber
    product = 1
    for factor in range(2, value.numerator + 1):
        product *= factor
    return _bounded(Fraction(product))


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > _BITS:
        raise _NoNumber
    return value
