"""The documents: current where they are made from the code, and true of it where they are not."""

from dataclasses import dataclass

import pytest

from scripts import make_docs
from tests import documents
from tests.documents import PAGES, ROOT

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
    text, known = page.read_text(encoding="utf-8"), documents.recipes()
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
