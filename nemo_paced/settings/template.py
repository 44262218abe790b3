r"""Prompt templates: text with fields in braces. All other braces are text, as LaTeX needs them.

``{problem}`` is a field, ``\boxed{}`` and ``\frac{1}{2}`` are text. Doubled braces are text too, as
in ``str.format``: ``{{word}}`` is the text ``{word}``, and ``{{{problem}}}`` the problem in braces.
A single word in braces that is no field is refused: it is a misspelt field more often than a text.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from nemo_paced.errors import ConfigError

_NAME = r"[A-Za-z_]\w*"
# a field in braces that are text, braces doubled around what has none, or a field
_FIELD = re.compile(
    rf"\{{\{{\{{(?P<wrapped>{_NAME})\}}\}}\}}|\{{\{{(?P<text>[^{{}}]*)\}}\}}|\{{(?P<name>{_NAME})\}}"
)
_INNERMOST = re.compile(r"\{([^{}]*)\}")


def fields(template: str) -> set[str]:
    """Names of the fields that a template holds."""
    found = (match["name"] or match["wrapped"] for match in _FIELD.finditer(template))
    return {name for name in found if name}


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with a value in place of each field; braces in values stay as they are.

    Raises:
        KeyError: a field has no value (:func:`check` refuses such a template).
    """

    def replacement(match: re.Match[str]) -> str:
        if match["name"]:
            return values[match["name"]]
        return f"{{{values[match['wrapped']] if match['wrapped'] else match['text']}}}"

    return _FIELD.sub(replacement, template)


def check(key: str, template: str, known: Collection[str], hidden: Collection[str] = ()) -> None:
    """Refuse a template with a field that there is not.

    Args:
        key: the setting, for messages.
        known: the fields that there are.
        hidden: fields that other templates have, and why not this one needs no guessing: it would
            show the student what it is to find.

    Raises:
        ConfigError: names the field, the fields that there are, and how to write it as text.
    """
    there = ", ".join(f"{{{name}}}" for name in known)
    for field in sorted(fields(template) - set(known)):
        why = "would show the student the answer" if field in hidden else "is no field"
        raise ConfigError(
            f"{key} holds {{{field}}}, which {why}: its fields are {there}; write {{{{{field}}}}} "
            f"for the text {{{field}}}"
        )
    for content in _INNERMOST.findall(_FIELD.sub("", template)):
        name = re.match(rf"\s*({_NAME})\s*($|[!:.\[])", content)
        if name and name[1] in known:
            raise ConfigError(
                f"{key} holds {{{content}}}: a field is its name alone; write {{{name[1]}}}"
            )
