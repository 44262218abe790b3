"""Answers without what means nothing: Markdown, delimiters, spacing, Unicode forms of LaTeX."""

from __future__ import annotations

import re
import unicodedata

from nemo_paced.grading.evidence import last_boxed
from nemo_paced.grading.units import without_thousands

_UNICODE = {
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ", "∞": "\\infty ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3",
}  # fmt: skip


# spacing commands at an end, whose comma is no comma
_SPACES = re.compile(r"(?:\s*(?<!\\)\\[!,;: ])+\s*\Z|(?:(?<!\\)\\ )+\Z|(?<!\\)\\\Z")
_SPACING = re.compile(r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~")
_FONTS = re.compile(
    r"\\(?:bf|it|rm|displaystyle|textstyle|[lL]arge|LARGE|huge|small|boldsymbol)(?![A-Za-z])\s*"
)
_RAISED, _LOWERED = re.compile("[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "+-01234567890123456789")


def normalize(answer: str) -> str:
    """An answer without spaces, dollar signs, text wrappers, thousands separators and final dot.

    Words lose their case; symbols keep it (``X`` and ``x`` may be two variables).
    """
    answer = without_thousands(clean(answer))
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)  # "1 1/2" must not become 11/2
    return answer.lower() if re.fullmatch(r"[A-Za-z]{2,}", answer) else answer


def clean(answer: str) -> str:
    """An answer without Markdown, math delimiters, spacing commands and Unicode forms of LaTeX."""
    answer = _RAISED.sub(lambda f: f"^{{{f[0].translate(_DIGITS)}}}", answer)
    answer = _LOWERED.sub(lambda f: f"_{{{f[0].translate(_DIGITS)}}}", answer)
    answer = "".join(_UNICODE.get(character, character) for character in answer)
    answer = unicodedata.normalize("NFKC", answer.replace("…", "\\ldots ")).strip()
    answer = _SPACES.sub(" ", answer).strip()
    answer = _bare(re.sub(r"(?<!\\)\$", "", _bare(answer)))
    answer = re.sub(r"^\\[(\[]|\\[)\]]\.?$", "", answer)
    if (boxed := last_boxed(answer)) is not None:
        answer = boxed
    answer = re.sub(r"\\(?:text|textbf|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r" \1", answer)
    answer = re.sub(r"(?i)^\s*answer\s*:\s*", "", answer)
    answer = re.sub(
        r"\\(?:left|right)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~", "", answer
    )
    answer = _FONTS.sub("", re.sub(r"\A\s*(?:\\approx|≈)\s*", "", answer))
    answer = re.sub(r"(?<=\d)\s?(?:st|nd|rd|th)\Z", "", answer.strip())
    answer = answer.replace("\\varnothing", "\\emptyset").replace("\\{\\}", "\\emptyset")
    answer = re.sub(r"\\log_\{?e\}?(?![A-Za-z])", r"\\ln ", answer)
    answer = re.sub(r"(?<=[.\d])\s*\\bar(?=\s*\{?\d)", r"\\overline", answer)
    answer = re.sub(r"\\[dtc]frac(?![A-Za-z])", r"\\frac", answer)
    answer = re.sub(r"\^\s*\{?\\circ\}?", "°", answer.replace("{,}", ","))
    answer = re.sub(r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi", answer)
    answer = answer.replace("\\%", "%").replace("\\degree", "°")
    return re.sub(r"√\s*(\w+|\([^()]*\))", r"\\sqrt{\1}", answer).strip()


def _bare(answer: str) -> str:
    """An answer without Markdown around it and its full stop; an ellipsis stays."""
    answer = re.sub(r"(?<!\.)[.,;]$", "", answer.strip().strip("*` "))
    return answer.strip("*` ").removesuffix("__")
