"""The final answer of a response, read out and compared as text, as numbers, as mathematics.

The paper grades "on the final answer after light normalisation". Text and numbers settle most
answers here, exactly and without a parser; what they leave open goes to math-verify. Nothing is
evaluated as code: of math-verify only the LaTeX grammar is used, never the extractor that hands
text to Python's ``eval``.
"""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

MAX_SYMBOLIC_LENGTH = 1000  # characters; longer text is no final answer

_ANSWER_LINE = re.compile(r"(?i)answer\**\s*(?::|\bis\b:?|=)[ \t]*\**[ \t]*([^\n]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_NUMBER = re.compile(r"-?\\?\$?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?")
_CHOICE = re.compile(r"(?<![A-Za-z'’])([A-J])(?![A-Za-z'’])")
_MARKED_CHOICE = re.compile(r"\(([A-J])\)|(?i:option|choice)\s+\(?([A-J])(?![A-Za-z])")
_PRONOUNS = re.compile(r"\b(?:I|A)(?=\s+[a-z])")  # "I think", "A train": no choices

_THOUSANDS = re.compile(r"(?<![\d.,(\[{])\d{1,3}(?:,\d{3})+(?![\d,)\]}])")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?: \d{3})+(?![\d ])")
_FRACTION = re.compile(r"\\frac\s*(?:\{(-?\d+)\}|(\d))\s*(?:\{(-?\d+)\}|(\d))")
_MIXED = re.compile(r"(-?)(\d{1,50})[ ]+(\d{1,50})/(\d{1,50})")
_RATIO = re.compile(r"(-?\d{1,50}(?:\.\d{1,50})?)/(-?\d{1,50}(?:\.\d{1,50})?)")
_DECIMAL = re.compile(r"[-+]?(?:\d{1,50}(?:\.\d{0,50})?|\.\d{1,50})(?:e[-+]?\d{1,3})?", re.I)
_POWER_OF_TEN = re.compile(r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?")
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


def extract_answer(text: str) -> str | None:
    """Final answer of a response: the later of its last ``\\boxed{}`` and last ``Answer:`` line.

    Without either it is the last number; ``None`` where there is none.
    """
    boxed = last_boxed(text)
    lines = list(_ANSWER_LINE.finditer(text))
    line = lines[-1] if lines else None
    if boxed is not None and (line is None or boxed[1] >= line.start()):
        return boxed[0]
    if line is not None:
        return line[1].strip()
    numbers = _NUMBER.findall(text)
    return numbers[-1] if numbers else None


def extract_choice(text: str) -> str | None:
    """Option, A to J, that a response chooses; ``None`` where there is none.

    It is the only one in the final answer, if one is marked; otherwise the last that stands in
    parentheses or after "option" or "choice", else the last single letter.
    """
    boxed, lines = last_boxed(text), _ANSWER_LINE.findall(text)
    if boxed is not None or lines:
        final = _clean(extract_answer(text) or "")
        found = re.fullmatch(r"\(?([A-Ja-j])\)?\.?", final)
        letters = [found[1].upper()] if found else _CHOICE.findall(_PRONOUNS.sub("", final))
        # two letters, as in "B or C", are no choice
        return letters[0] if letters and len(set(letters)) == 1 else None
    if marked := _MARKED_CHOICE.findall(text):
        return marked[-1][0] or marked[-1][1]
    letters = _CHOICE.findall(_PRONOUNS.sub("", text))
    return letters[-1] if letters else None


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
    slack = Fraction(tolerance) if inexact else Fraction(0)
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


def last_boxed(text: str) -> tuple[str, int] | None:
    """Content of the last closed ``\\boxed`` and the offset of its end in ``text``; or ``None``."""
    for start in reversed(list(_BOXED.finditer(text))):
        begin = start.end()
        if text[begin : begin + 1] != "{":
            if bare := re.match(r"[^\s$\\]+", text[begin:]):
                return bare[0], begin + bare.end()
            continue
        depth = 0
        for index in range(begin, len(text)):
            depth += {"{": 1, "}": -1}.get(text[index], 0)
            if depth == 0:
                return text[begin + 1 : index].strip(), index
    return None


def _clean(answer: str) -> str:
    """An answer without Markdown, math delimiters, spacing commands and Unicode forms of LaTeX."""
    answer = "".join(_UNICODE.get(character, character) for character in answer)
    answer = unicodedata.normalize("NFKC", answer).strip().strip("*`").strip()
    answer = re.sub(r"^\\[(\[]|\\[)\]]\.?$", "", answer)
    answer = re.sub(r"(?<!\\)\$", "", answer).strip().rstrip(".").strip()
    if (boxed := last_boxed(answer)) is not None:
        answer = boxed[0]
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"(?i)^\s*answer\s*:\s*", "", answer)
    answer = re.sub(
        r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~", "", answer
    )
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
    """Exact value of an integer, decimal, fraction, mixed number or power of ten; or ``None``."""
    answer = _SPACED_THOUSANDS.sub(lambda found: found[0].replace(" ", ""), answer.strip())
    answer = _THOUSANDS.sub(lambda found: found[0].replace(",", ""), answer)
    answer = _FRACTION.sub(
        lambda f: f" {f[1] or f[2]}/{f[3] or f[4]}" if (f[3] or f[4]) != "0" else f[0], answer
    )
    answer = re.sub(r"^([-+])\s+", r"\1", answer.strip())
    scale = Fraction(1)
    if power := _POWER_OF_TEN.search(answer):
        if power.end() != len(answer):
            return None
        answer, scale = answer[: power.start()], Fraction(10) ** int(power[1])
    if mixed := _MIXED.fullmatch(answer):
        sign, whole, top, bottom = mixed.groups()
        if int(bottom) == 0:
            return None
        value = int(whole) + Fraction(int(top), int(bottom))
        return (-value if sign else value) * scale
    if ratio := _RATIO.fullmatch(answer.replace(" ", "")):
        bottom_value = Fraction(ratio[2])
        return Fraction(ratio[1]) / bottom_value * scale if bottom_value else None
    return Fraction(answer) * scale if _DECIMAL.fullmatch(answer) else None
