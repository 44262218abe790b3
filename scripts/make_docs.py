"""Writes docs/settings.md from the dataclasses of nemo_paced/settings: ``make docs``.

A setting's meaning is the comment above or behind its field; where it has none, what the docstring
of its enum says. A value's meaning is the comment of the enum's member.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import sys
import textwrap
import tokenize
import types
import typing
from collections.abc import Iterator
from enum import Enum, EnumMeta
from pathlib import Path

import yaml

from nemo_paced.config import PacedConfig, to_dict

SETTINGS = Path(__file__).parents[1] / "docs" / "settings.md"
HEAD = """\
# Settings

Every setting of a run with its default: a YAML file says only what differs, and any setting can be
given on the command line (`model.optim.lr=1e-6`). An unknown key is refused with the nearest known
one, and so is a key that would be ignored beside another. `nemo-paced train --config-name NAME
--cfg job` prints all of them as a run would have them.

This page is made from `nemo_paced/settings/*.py` by `make docs`; edit the comments there.
"""
COLUMNS = "| setting | type | default | meaning |\n| --- | --- | --- | --- |"
LONGEST_DEFAULT = 40  # characters; longer ones are shown below the table


@dataclasses.dataclass(frozen=True)
class Setting:
    """Attributes: key, dotted; kind, its type; meaning, Markdown, empty where none is written."""

    key: str
    kind: str
    default: object
    meaning: str


def comments(cls: type) -> dict[str, str]:
    """Of each field or member of a class: the comments above and behind it, joined."""
    source = textwrap.dedent(inspect.getsource(cls))
    by_line = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found, end = {}, definition.lineno
    for node in definition.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        lines = range(end + 1, (node.end_lineno or node.lineno) + 1)
        if isinstance(target, ast.Name):
            found[target.id] = " ".join(by_line[line] for line in lines if line in by_line)
        end = lines.stop - 1
    return found


def settings_of(cls: type, prefix: str) -> Iterator[Setting]:
    """The settings of one block, without those of the blocks in it."""
    hints, told = typing.get_type_hints(cls), comments(cls)
    for field in dataclasses.fields(cls):
        if block_of(hints[field.name]) is None:
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            meaning = told[field.name]
            if enum := enum_of(hints[field.name]):
                meaning = with_values(meaning, enum)
            key = f"{prefix}.{field.name}"
            yield Setting(key, kind_of(hints[field.name]), to_dict(default), meaning)


def blocks(cls: type = PacedConfig, prefix: str = "") -> Iterator[tuple[str, type]]:
    """(dotted name, dataclass) of each block, a block before those in it."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        block = block_of(hints[field.name])
        if block is not None:
            many = "[]" if typing.get_origin(hints[field.name]) is list else ""
            name = f"{prefix}{field.name}{many}"
            yield name, block
            yield from blocks(block, f"{name}.")


def block_of(hint: object) -> type | None:
    (of,) = typing.get_args(hint) if typing.get_origin(hint) is list else (hint,)
    return of if isinstance(of, type) and dataclasses.is_dataclass(of) else None


def enum_of(hint: object) -> EnumMeta | None:
    for each in (hint, *typing.get_args(hint)):
        if isinstance(each, EnumMeta):
            return each
    return None


def kind_of(hint: object) -> str:
    if isinstance(hint, types.UnionType):
        return " or ".join("null" if a is types.NoneType else kind_of(a) for a in hint.__args__)
    if isinstance(hint, EnumMeta):
        return "choice"
    return hint.__name__ if typing.get_origin(hint) is None else str(hint).replace("typing.", "")


def with_values(meaning: str, enum: EnumMeta) -> str:
    """The field's comment, else the enum's docstring, and the values with theirs."""
    told, members = comments(enum), typing.cast("type[Enum]", enum)
    of_enum = prose(enum).partition("\n\n")[0].partition(": ")[2]
    values = [f"`{m.value}`: {told[m.name]}" if told[m.name] else f"`{m.value}`" for m in members]
    return "<br>".join([meaning or of_enum.rstrip("."), *values])


def prose(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "").replace("``", "`")


def without_meaning(cls: type, prefix: str) -> list[str]:
    return [s.key for s in settings_of(cls, prefix) if not s.meaning.partition("<br>")[0]]


def page() -> str:
    """The whole file."""
    found = list(blocks())
    links = ", ".join(f"[`{name}`](#{anchor(name)})" for name, _ in found)
    return "\n".join([HEAD, f"{links}.", *(section(name, cls) for name, cls in found)]) + "\n"


def anchor(heading: str) -> str:
    """GitHub's, of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def section(name: str, cls: type) -> str:
    settings = list(settings_of(cls, name))
    lines = [f"\n## `{name}`\n", prose(cls).removeprefix(f"`{name}`: ") + "\n", COLUMNS]
    below = []
    for setting in settings:
        default = plain(setting.default)
        if len(default) > LONGEST_DEFAULT:
            below.append(f"\nDefault of `{setting.key}`:\n\n```text\n{default}\n```")
            default = "below"
        else:
            default = f"`{default}`"
        meaning = linked(setting.meaning).replace("|", "\\|").replace("None", "null")
        lines.append(f"| `{setting.key}` | {setting.kind} | {default} | {meaning} |")
    if name.endswith("[]"):
        many = yaml.safe_dump(to_dict(getattr(PacedConfig(), name[:-2])), sort_keys=False)
        below.append(f"\nDefault of `{name[:-2]}`:\n\n```yaml\n{many}```")
    return "\n".join([*lines, *below])


def plain(value: object) -> str:
    return value if isinstance(value, str) and value else json.dumps(value)


def linked(text: str) -> str:
    """Settings that the text names, as code."""
    heads = "|".join(field.name for field in dataclasses.fields(PacedConfig))
    key = rf"(?:{heads})(?:\[\])?\.\w[\w.]*\w(?:=\w+)?"
    return re.sub(rf"(?<![`\w./])({key})(?![`\w(])", r"`\1`", text)


def main() -> int:
    missing = [key for name, cls in blocks() for key in without_meaning(cls, name)]
    if missing:
        print(f"without a description: {', '.join(missing)}", file=sys.stderr)
        return 1
    SETTINGS.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
