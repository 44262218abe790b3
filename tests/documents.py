"""What the documents say, taken apart so that tests can hold it against the code."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from nemo_paced.cli import COMMANDS
from nemo_paced.compose import CONF, dictionaries, dotted_keys
from nemo_paced.config import PacedConfig, to_dict
from scripts.make_docs import anchor, blocks

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted(ROOT.glob("docs/*.md"))]
# what a reader puts a recipe's name for
PLACEHOLDERS = {"RECIPE", "NAME", "mine"}
ANY = "…"  # in a quoted message: whatever the program puts there

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
_SPAN = re.compile(r"`([^`\n]+)`")
_FILE = re.compile(r"\.(jsonl|json|yaml|parquet|md|py)$")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def fenced(text: str, *languages: str) -> list[str]:
    """Contents of the code blocks of these languages."""
    return [body for language, body in _FENCED.findall(text) if language in languages]


def python_of(page: Path) -> dict[str, list[str]]:
    """Python blocks of a page by the second-level heading that they are under."""
    _, *sections = re.split(r"^## ", page.read_text(encoding="utf-8"), flags=re.M)
    return {section.partition("\n")[0]: fenced(section, "python") for section in sections}


def broken_links(page: Path) -> list[str]:
    """Relative links of a page to no file, or to no heading of one."""
    broken = []
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        path, _, heading = link.partition("#")
        if ":" in path:
            continue
        target = (page.parent / path) if path else page
        if not target.exists() or (heading and heading not in _headings(target)):
            broken.append(link)
    return broken


def _headings(page: Path) -> set[str]:
    lines = _FENCED.sub("", page.read_text(encoding="utf-8")).splitlines()
    return {anchor(line.lstrip("#").strip()) for line in lines if line.startswith("#")}


def known_settings() -> set[str]:
    """Dotted names of all settings and blocks; of a stage as ``stages[].name`` and ``stages``."""
    found = {"stages", *dotted_keys(to_dict(PacedConfig()))}
    for name, cls in blocks():
        if name.endswith("[]"):
            found.update(dotted_keys(to_dict(cls()), f"{name}."))
    return found


def unknown_settings(text: str) -> list[str]:
    """What is written like a setting, in code, and is none."""
    known, heads = known_settings(), "|".join(to_dict(PacedConfig()))
    named = re.compile(rf"(?<![\w./'-])((?:{heads})(?:\[\])?\.[a-z][\w.]*\w)(?![\w*])")
    # in Python a dot is an attribute
    blocks_of_code = [body for language, body in _FENCED.findall(text) if language != "python"]
    code = [*_SPAN.findall(_FENCED.sub("", text)), *blocks_of_code]
    keys = [key for part in code for key in named.findall(part) if not _FILE.search(key)]
    return [key for key in keys if key not in known and not is_users(key)]


def is_users(key: str) -> bool:
    """Whether a key lies in a setting whose keys are the user's."""
    return key.rpartition(".")[0] in dictionaries()


def commands(text: str) -> Iterator[list[str]]:
    """Each ``nemo-paced COMMAND ...`` of the code blocks, as its arguments."""
    for body in fenced(text, "", "bash"):
        for line in body.replace("\\\n", " ").splitlines():
            if "nemo-paced " in line:
                words = shlex.split(line, comments=True)
                yield words[words.index("nemo-paced") + 1 :]


def wrong_in(arguments: list[str], recipes: set[str]) -> list[str]:
    """Of a command: no such command, flag or recipe, no such setting in an override."""
    name, *rest = arguments
    if name not in COMMANDS:
        return [name]
    known, wrong = known_settings() | {"schedule"}, []
    flags = set(re.findall(r"--[\w-]+", COMMANDS[name].usage))
    for word, following in zip_longest(rest, rest[1:], fillvalue=""):
        if word.startswith("--") and word not in flags:
            wrong.append(word)
        if word == "--config-name" and following not in recipes | PLACEHOLDERS:
            wrong.append(following)
        key, equals, _ = word.partition("=")
        if equals and "." in key and key not in known and not is_users(key):
            wrong.append(key)
    return wrong


def recipes(text: str) -> set[str]:
    """Of ``conf/``, and those that the text shows under their file's name."""
    shown = re.findall(r"my_conf/(\w+)\.yaml", text)
    return {path.stem for path in CONF.glob("*.yaml")} | set(shown)


def messages(*sources: Path) -> list[str]:
    """Strings of the code, with ``…`` for what is put into them; lines of what is not Python."""
    found = []
    for path in sources:
        text = path.read_text(encoding="utf-8")
        if path.suffix != ".py":
            found += re.sub(r"\$\{?\w+\}?", ANY, text).splitlines()
            continue
        tree = ast.parse(text)
        docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if id(node) in docstrings:
                continue
            if isinstance(node, ast.JoinedStr):
                parts = [v.value if isinstance(v, ast.Constant) else ANY for v in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[-+.\d]*[sdfg]", ANY, node.value))
    return found


def quoted(text: str) -> list[str]:
    """Messages of a page of troubles: the code of its bold lines."""
    bold = re.findall(r"^\*\*`.*$", text, re.MULTILINE)
    return [message for line in bold for message in re.findall(r"\*\*`([^`]+)`\*\*", line)]


def never_said(quotes: list[str], said: list[str]) -> list[str]:
    """Quotes that are in no string of the code."""
    return [quote for quote in quotes if not any(quote in each for each in said)]
