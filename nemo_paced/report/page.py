"""The HTML page of a report: self-contained, for narrow and wide screens, light or dark."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup

from nemo_paced.files import write_whole
from nemo_paced.report.sections.section import Section


@dataclass(frozen=True, slots=True)
class Part:
    """Sections that belong together; with a title they are folded away under it."""

    sections: Sequence[Section]
    title: str = ""


def write_page(path: Path, title: str, lead: Sequence[str], parts: Sequence[Part]) -> Path:
    """Write an HTML page, whole or not at all, and return ``path``.

    Args:
        lead: sentences above all sections.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    text = environment.get_template("report.html.j2").render(title=title, lead=lead, parts=parts)
    write_whole(path, text)
    return path


def _breakable(text: str) -> Markup:
    """A name or path that may be broken after its dots, slashes and underscores."""
    return Markup("<wbr>").join(re.split(r"(?<=[._/])", text))
