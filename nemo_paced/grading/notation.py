"""Answers without what means nothing: Markdown, delimiters, spacing, Unicode forms of LaTeX."""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

from nemo_paced.grading.evidence import last_boxed
from nemo_paced.grading.units import without_thousands

LONGEST = 1000  # characters of an answer that are kept
_REMEMBERED = 4096  # answers whose clean form is kept: each is looked at several times

_UNICODE = {
    "−": "-", "–": "-", "‑": "-", "‐": "-", "×": "\\times ", "·": "\\cdot ", "π": "\\pi ",
    "∞": "\\infty ", "≤": "\\le ", "≥": "\\ge ", "⩽": "\\le ", "⩾": "\\ge ", "≠": "\\ne ",
    "∪": "\\cup ", "∩": "\\cap ", "∅": "\\emptyset ", "∈": "\\in ", "ℝ": "\\mathbb{R}",
    "≈": "\\approx ", "±": "\\pm ", "∘": "°", "º": "°", "˚": "°", "。": ".", "⁄": "/",
    "½": " 1/2", "¼": " 1/4", "¾": " 3/4", "⅓": " 1/3", "⅔": " 2/3", "⅕": " 1/5", "⅖": " 2/5",
    "⅗": " 3/5", "⅘": " 4/5", "⅙": " 1/6", "⅚": " 5/6", "⅛": " 1/8", "⅜": " 3/8", "⅝": " 5/8",
    "⅞": " 7/8",
}  # fmt: skip
_RAISED, _LOWERED = re.compile("[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+"), re.compile("[₀₁₂₃₄₅₆₇₈₉]+")
_DIGITS = str.maketrans("⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹₀₁₂₃₄₅₆₇₈₉", "+-01234567890123456789")
_ROOT = re.compile(r"√\s*(\d+(?:\.\d+)?|[A-Za-z]|\([^()]*\))")
# spacing commands at an end, whose comma is no comma
_SPACES = re.compile(r"(?:\s*(?<!\\)\\[!,;: ])+\s*\Z|(?:\s*\\\\)+\s*\Z|(?<!\\)\\\Z")
_TEXT = re.compile(
    r"\\(?:text(?:bf|rm|it|tt|normal)?|math(?:rm|bf|it|sf|tt)|mbox|boldsymbol|bm|underline|operatorname)"
    r"\s*\{([^{}]*)\}|\\color\{[^{}]*\}\s*\{([^{}]*)\}|\{\s*\\(?:rm|bf|it)\s+([^{}]*)\}"
)
_FONTS = re.compile(
    r"\\(?:bf|it|rm|displaystyle|textstyle|[lL]arge|LARGE|huge|small)(?![A-Za-z])\s*"
)
_SPACING = re.compile(
    r"\\(?:left|right|[bB]ig[gG]?[lr]?)(?![A-Za-z])|(?<!\\)\\[!,;: ]|\\q?quad(?![A-Za-z])|~"
)
_FIRST_WORDS = re.compile(r"\s*(?:=|\\approx|(?i:approximately|about)\b|(?i:it\s+is)\b)\s*")
_REPEATING = re.compile(r"(\.\d*?)(\d)\2\2+\s*(?:\.\.\.|\\[lc]?dots)")
# replaced in this order
_FORMS = [
    (re.compile(pattern), form)
    for pattern, form in (
        (r"\\varnothing|\\\{\\\}", r"\\emptyset"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\mathbb\s+([A-Z])", r"\\mathbb{\1}"),
        (r"\\\\\[\d+\w*\]", r"\\\\"),
        (r"\\(?:[lc]dots|dotsc?)(?![A-Za-z])|\.\.\.", r"\\dots"),
        (r"\\log_\{?e\}?(?![A-Za-z])", r"\\ln "),
        (r"(?<=[.\d])\s*\\bar(?=\s*\{?\d)", r"\\overline"),
        (r"(?<![\\A-Za-z])pi(?![A-Za-z])", r"\\pi"),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<=\d)\{,\}(?=\d{3})", ""),
        (r"\{([,:])\}", r"\1"),
        (r"\^\s*\{?\\circ\}?|\\degree(?![A-Za-z])", "°"),
        (r"\\%", "%"),
        (r"\\overline\s*\{([A-Z]{2})\}", r"\1"),
        (r"(?<=\d)\s?(?:\^\{?\s*)?(?:st|nd|rd|th)\}?\Z", ""),
        (r"\A(?:negative|minus)\s+(?=\d)", "-"),
    )
]


def normalize(answer: str) -> str:
    """An answer without spaces, dollar signs, text wrappers, thousands separators and final dot.

    Words lose their case; symbols keep it (``X`` and ``x`` may be two variables).
    """
    answer = without_thousands(clean(answer))
    answer = re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", answer)  # "1 1/2" must not become 11/2
    is_word = re.fullmatch(r"[A-Za-z]{2,}", answer) and not _are_points(answer)
    return answer.lower() if is_word else answer


def _are_points(letters: str) -> bool:
    """Whether capitals name points: ``AB``, ``PQRS``."""
    if not letters.isupper() or letters in ("NO", "OK"):
        return False
    return len(letters) == 2 or list(letters) == sorted(letters)


@lru_cache(_REMEMBERED)
def clean(answer: str) -> str:
    """An answer without Markdown, math delimiters, spacing commands and Unicode forms of LaTeX."""
    answer = _RAISED.sub(lambda f: f"^{{{f[0].translate(_DIGITS)}}}", answer)
    answer = _LOWERED.sub(lambda f: f"_{{{f[0].translate(_DIGITS)}}}", answer)
    answer = "".join(_UNICODE.get(character, character) for character in answer)
    answer = unicodedata.normalize("NFKC", answer.replace("…", "\\ldots "))[:LONGEST].strip()
    answer = _SPACES.sub(" ", answer).strip()
    answer = _bare(re.sub(r"(?<!\\)\$", "", _bare(answer)))
    answer = _bare(re.sub(r"(?<!\\)\\[()\[\]]", " ", answer))
    if (boxed := last_boxed(answer)) is not None:
        answer = boxed
    answer = re.sub(r"(?<=\d),\s*\\!\s*(?=\d{3})", "", answer)
    answer = _TEXT.sub(lambda found: f" {found[1] or found[2] or found[3] or ''}", answer)
    answer = re.sub(r"(?i)^\s*answer\s*:\s*", "", answer)
    answer = _FONTS.sub("", _SPACING.sub("", answer))
    answer = _FIRST_WORDS.sub("", answer, count=1) if _FIRST_WORDS.match(answer) else answer
    answer = _REPEATING.sub(r"\1\\overline{\2}", answer.strip())
    for pattern, form in _FORMS:
        answer = pattern.sub(form, answer)
    return _ROOT.sub(r"\\sqrt{\1}", answer).strip()


def _bare(answer: str) -> str:
    """An answer without Markdown around it and its full stop; an ellipsis stays."""
    answer = re.sub(r"(?<![.\\])[.,;]$", "", answer.strip().strip("*` "))
    return answer.strip("*` ").removesuffix("__")
