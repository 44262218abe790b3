"""The documents: current where they are made from the code, and true of it where they are not."""

from dataclasses import dataclass

import pytest

from nemo_paced.cli import main
from nemo_paced.compose import with_config
from scripts import make_docs
from tests import documents
from tests.documents import PAGES, ROOT
from tests.public_models import OF_RECIPE

NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def test_the_page_of_settings_is_what_make_docs_writes():
    assert make_docs.SETTINGS.read_text(encoding="utf-8") == make_docs.page()


def test_every_setting_has_a_description():
    assert not [k for name, cls in make_docs.blocks() for k in make_docs.without_meaning(cls, name)]


def test_a_setting_without_a_description_is_found():
    @dataclass
    class Planted:
        """A block."""

        told: int = 1  # what it is
        silent: int = 2
        # above it
        above: int = 3

    assert make_docs.without_meaning(Planted, "planted") == ["planted.silent"]


def test_every_setting_is_on_the_page():
    text = make_docs.SETTINGS.read_text(encoding="utf-8")
    names = {name for name, _ in make_docs.blocks()}
    for key in documents.known_settings() - names - {"stages"}:
        assert f"| `{key}` |" in text


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    assert not documents.broken_links(page)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_settings_that_are_named_exist(page):
    assert not documents.unknown_settings(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_ones_that_the_program_has(page):
    text = page.read_text(encoding="utf-8")
    known = documents.recipes(text)
    assert not [wrong for c in documents.commands(text) for wrong in documents.wrong_in(c, known)]


def test_what_is_wrong_in_a_page_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "# A heading\n[a](other.md) [b](#a-heading) [c](#no-heading) [d](https://example.org)\n"
        "`model.lr` and `model.optim.lr=1`, nemo_paced `stages[].fraction`, `stages[].share`\n"
        "```bash\nnemo-paced train --config-name none --dry \\\n    model.lr=1  # a comment\n```\n"
    )
    assert documents.broken_links(page) == ["other.md", "#no-heading"]
    text = page.read_text()
    assert documents.unknown_settings(text) == ["model.lr", "stages[].share", "model.lr"]
    (command,) = documents.commands(text)
    assert documents.wrong_in(command, {"quickstart"}) == ["none", "--dry", "model.lr"]


TROUBLES = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SOURCES = [*(ROOT / "nemo_paced").rglob("*.py"), *(ROOT / "launchers").iterdir()]


def test_messages_of_the_troubleshooting_page_are_what_the_program_says():
    quotes = documents.quoted(TROUBLES)
    assert len(quotes) > 40
    assert not documents.never_said(quotes, documents.messages(*SOURCES))


def test_a_message_that_nobody_says_is_found(tmp_path):
    source = tmp_path / "source.py"
    source.write_text(
        'def f(path, n):\n    """Is empty."""\n    log.warning("%d of %s are gone", n, path)\n'
        '    raise ValueError(f"{path} is full: {n} GiB "\n        "are needed; free some")\n'
    )
    quotes = documents.quoted(
        "**`is full: … GiB are needed`** · **`… of … are gone`**\n"
        "**`is full; … GiB`** · **`Is empty`**\nno `code`\n"
    )
    said = documents.messages(source)
    assert documents.never_said(quotes, said) == ["is full; … GiB", "Is empty"]


def yaml_recipes(page):
    text = page.read_text(encoding="utf-8")
    return [body for body in documents.fenced(text, "yaml") if "defaults:" in body]


def test_recipes_that_are_shown_are_ones_that_compose(tmp_path):
    found = []
    for number, body in enumerate(body for page in PAGES for body in yaml_recipes(page)):
        (tmp_path / f"shown_{number}.yaml").write_text(body)
        with_config(
            ["--config-path", str(tmp_path), "--config-name", f"shown_{number}"], found.append
        )
    assert len(found) >= 2 and all(config.data.problems for config in found)


def test_the_worked_example_plans_what_it_says(tmp_path, capsys):
    page = ROOT / "docs" / "worked_example.md"
    (recipe,) = yaml_recipes(page)
    (tmp_path / "math.yaml").write_text(recipe)
    (asked,) = [c for c in documents.commands(page.read_text(encoding="utf-8")) if c[0] == "plan"]
    own = ["--config-path", str(tmp_path), *OF_RECIPE["qwen3_1.7b_from_8b_2n8g_tp4"]]
    assert main([*asked, *own]) == 0
    planned = capsys.readouterr().out
    shown, *_ = documents.fenced(page.read_text(encoding="utf-8"), "text")
    for line in shown.splitlines():
        for part in line.split(" ... "):
            assert part in planned
