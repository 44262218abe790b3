"""Problem files of a run: read and checked once, and again when anything of them is another."""

import json
from typing import Any

import pyarrow
import pytest

from nemo_paced.config import DataConfig, Duplicates, PrivilegedContext
from nemo_paced.data import rows as rows_module
from nemo_paced.data.problems import read_problems
from nemo_paced.data.prompts import PromptKind, Prompts
from nemo_paced.errors import ConfigError
from nemo_paced.files import digest
from nemo_paced.quickstart.models import write_tokenizer
from nemo_paced.run import problems as module
from nemo_paced.run.problems import RunProblems, column, digests, ids_without

KEY = "data.problems"
ROWS: list[dict[str, Any]] = [
    {"id": "a", "problem": "solve s1 =", "answer": "s3", "solution": "s4 s3", "group": "g"},
    {"id": "b", "problem": "solve s2 =", "final_answer": ["s3", "s4"]},
    {"id": "\u00e9", "problem": "solve s3 =\n\U0001d54f", "answer": 7},
]


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "problems.jsonl", ROWS)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path, run_dir, *, writes=True, tells=False, **data):
    kept = RunProblems(run_dir, writes=writes)
    return kept.read(path, key=KEY, data=DataConfig(**data), tells=tells)


@pytest.fixture
def reads(monkeypatch):
    """Files that were read row by row."""
    found = []

    def counted(path, *arguments, **options):
        found.append(path)
        return each(path, *arguments, **options)

    each = module.each_problem
    monkeypatch.setattr(module, "each_problem", counted)
    return found


@pytest.mark.parametrize("writes", [True, False])
def test_a_table_is_the_list_of_its_problems(path, tmp_path, writes, monkeypatch):
    monkeypatch.setattr(module, "BATCH", 2)
    plain = read_problems(path).problems
    table = read(path, tmp_path / "run", writes=writes)
    assert list(table) == plain and len(table) == 3
    assert [table[i] for i in range(3)] == plain and table[-1] == plain[-1]
    assert table[1:] == plain[1:] and table[::-1] == plain[::-1]
    assert plain[1] in table and list(reversed(table)) == plain[::-1]
    with pytest.raises(IndexError, match="problem 3 of 3"):
        table[3]
    assert column(table, "accepted") == [[], ["s4"], []]
    assert column(table, "solution") == column(plain, "solution") == ["s4 s3", None, None]
    assert digests(table) == digests(plain) == {p.id: digest(p.content()) for p in plain}
    assert (tmp_path / "run").exists() is writes


def test_a_file_is_read_once(path, tmp_path, reads, caplog):
    caplog.set_level("INFO")
    first = read(path, tmp_path, tells=True)
    assert reads == [path] and not caplog.text
    moved = path.rename(tmp_path / "moved.jsonl")
    again = read(moved, tmp_path)
    assert list(again) == list(first) and again.identity == first.identity and reads == [path]
    assert list(read(moved, tmp_path, writes=False)) == list(first) and reads == [path]
    assert list(read(moved, tmp_path, prompt_template="{problem}, please")) == list(first)
    assert reads == [path], "the template is no part of the problems"


def test_what_was_noticed_is_told_each_time_where_it_is_asked_for(path, tmp_path, caplog):
    caplog.set_level("INFO")
    rows = [{name: v for name, v in row.items() if name != "id"} for row in ROWS]
    write(path, [*rows, rows[0] | {"answer": "s9"}])
    read(path, tmp_path, duplicates=Duplicates.first)
    assert not caplog.text
    moved = path.rename(tmp_path / "moved.jsonl")
    for _ in range(2):
        caplog.clear()
        read(moved, tmp_path, tells=True, duplicates=Duplicates.first)
        assert "moved.jsonl: no column with ids" in caplog.text
        assert "moved.jsonl:4 answers 's9' and" in caplog.text
        assert "problems.jsonl" not in caplog.text, "it lies there no longer"


@pytest.mark.parametrize(
    "change",
    [
        {"duplicates": Duplicates.first},
        {"columns": {"answer": "id"}},
        {"prompt_template": "{problem}"},  # keeps instructions of the file's own
    ],
)
def test_other_settings_read_again(path, tmp_path, reads, change):
    read(path, tmp_path)
    read(path, tmp_path, **change)
    assert len(reads) == 2
    read(path, tmp_path, **change)
    read(path, tmp_path)
    assert len(reads) == 2


def test_other_bytes_are_read_again(path, tmp_path, reads):
    read(path, tmp_path)
    changed = [*ROWS[:2], ROWS[2] | {"answer": 8}]  # as long, in the same place
    table = read(write(path, changed), tmp_path)
    assert table[2].answer == "8" and len(reads) == 2


def test_only_what_is_asked_removes_what_is_kept_of_other_files(path, tmp_path, reads):
    """A command that is refused since the run's problems are others must not remove those."""
    kept, first = RunProblems(tmp_path), read(path, tmp_path)
    before = {p.name for p in tmp_path.glob("problems/*")}
    held_out = write(tmp_path / "other.jsonl", ROWS[:1])
    kept.read(held_out, key="data.validation_problems", data=DataConfig())
    second = read(write(path, ROWS[:2]), tmp_path)
    (tmp_path / f"problems/.{KEY}.ab.arrow.7.tmp").write_bytes(b"cut by a kill")
    assert len(list(tmp_path.glob("problems/*"))) == 3 * 2 + 1
    assert list(first) == read_problems(write(path, ROWS)).problems
    kept.remove_others(second, key=KEY)
    left = {p.name for p in tmp_path.glob("problems/*")}
    assert len(left) == 2 * 2 and not left & before and len(reads) == 3


@pytest.mark.parametrize("damaged", ["*.arrow", "*.json"])
@pytest.mark.parametrize("left", [b"", b"[1]", b'{"checked": []}', b"ARROW1 cut"])
def test_what_is_damaged_is_made_anew(path, tmp_path, reads, damaged, left):
    plain = list(read(path, tmp_path))
    (file,) = tmp_path.glob(f"problems/{damaged}")
    file.write_bytes(left)
    assert list(read(path, tmp_path)) == plain and len(reads) == 2
    assert list(read(path, tmp_path)) == plain and len(reads) == 2


def test_a_file_that_is_refused_leaves_no_table(path, tmp_path):
    write(path, [*ROWS, ROWS[0]])
    with pytest.raises(ConfigError, match="occurs before"):
        read(path, tmp_path)
    assert not list(tmp_path.glob("problems/*"))


def test_a_folder_that_cannot_be_written_to_is_told_of(path, tmp_path):
    (tmp_path / "problems").write_text("a file")
    with pytest.raises(ConfigError, match="problems cannot be written to"):
        read(path, tmp_path)


def test_a_text_that_cannot_be_written_names_its_row(path, tmp_path):
    write(path, [ROWS[0], ROWS[1] | {"problem": "half \ud835 of one"}])
    with pytest.raises(ConfigError, match=r"jsonl:2: holds '\\ud835', half of a character"):
        read(path, tmp_path)
    write(path, [ROWS[0], ROWS[1] | {"final_answer": ["1", "\ud835"]}])
    with pytest.raises(ConfigError, match=r"jsonl:2: holds '\\ud835', half of a character"):
        read(path, tmp_path)


@pytest.mark.parametrize("fails", ["file_digest", "each_problem"])
def test_a_file_that_cannot_be_read_is_named(path, tmp_path, monkeypatch, fails):
    def broken(*given, **options):
        raise PermissionError(13, "Permission denied", str(path))

    if fails == "file_digest":
        monkeypatch.setattr(module, "file_digest", broken)
    else:
        monkeypatch.setattr(rows_module, "_jsonl", broken)
    with pytest.raises(ConfigError, match=r"problems\.jsonl cannot be read: .*Permission denied"):
        read(path, tmp_path)


def test_a_full_disk_costs_no_finished_check(path, tmp_path, checks, monkeypatch, caplog):
    table, kept = read(path, tmp_path), RunProblems(tmp_path)

    def full(*given):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    kept.check(table, checks(), PromptKind.student, key=KEY)
    assert "No space left on device; prompts will be checked again" in caplog.text
    with pytest.raises(ConfigError, match=r"cannot be written to: .*No space left"):
        read(write(path, ROWS[:1]), tmp_path)


def test_a_file_system_that_cannot_map_files_will_do(path, tmp_path, monkeypatch):
    def refused(*given):
        raise OSError(19, "No such device")

    monkeypatch.setattr(pyarrow, "memory_map", refused)
    for _ in range(2):
        assert list(read(path, tmp_path)) == read_problems(path).problems


def test_ids_of_problems_without_a_field(path, tmp_path):
    table = read(path, tmp_path)
    for problems in (table, list(table)):
        assert ids_without(problems, "solution") == ["b", "\u00e9"]
        assert ids_without(problems, "answer") == []


@pytest.fixture
def checks(tmp_path, monkeypatch):
    """Makes prompts of some settings, and counts how often they are really checked."""
    write_tokenizer(tmp_path / "student")
    done = []

    def made(**data):
        settings = DataConfig(prompt_template="{problem}", **data)
        return Prompts(tmp_path / "student", settings, PrivilegedContext.none)

    check = Prompts.check

    def counted(self, problems, kind, progress=None):
        done.append(kind)
        check(self, problems, kind, progress)

    monkeypatch.setattr(Prompts, "check", counted)
    made.done = done
    return made


def test_prompts_are_checked_once(path, tmp_path, checks):
    table, kept = read(path, tmp_path), RunProblems(tmp_path)
    for kind in (PromptKind.student, PromptKind.teacher, PromptKind.student, PromptKind.teacher):
        kept.check(table, checks(), kind, key=KEY)
    assert checks.done == ["student", "teacher"]
    RunProblems(tmp_path, writes=False).check(table, checks(), PromptKind.student, key=KEY)
    assert len(checks.done) == 2
    kept.check(table, checks(max_prompt_length=9), PromptKind.student, key=KEY)
    assert len(checks.done) == 3, "another limit"
    other = read(write(path, ROWS[:2]), tmp_path)
    kept.check(other, checks(), PromptKind.student, key=KEY)
    assert len(checks.done) == 4, "other problems"
    kept.check(table, checks(), PromptKind.student, key=KEY)
    assert len(checks.done) == 4


def test_prompts_that_are_too_long_are_refused_each_time(path, tmp_path, checks):
    table = read(path, tmp_path)
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"above data\.max_prompt_length 3"):
            RunProblems(tmp_path).check(
                table, checks(max_prompt_length=3), PromptKind.student, key=KEY
            )
    assert len(checks.done) == 2


def test_nothing_is_kept_where_nothing_may_be_written(path, tmp_path, checks):
    kept = RunProblems(tmp_path / "run", writes=False)
    table = kept.read(path, key=KEY, data=DataConfig())
    for _ in range(2):
        kept.check(table, checks(), PromptKind.student, key=KEY)
    assert len(checks.done) == 2 and not (tmp_path / "run").exists()


def test_a_reader_of_another_release_reads_again(path, tmp_path, reads, monkeypatch):
    read(path, tmp_path)
    monkeypatch.setattr(module, "_READERS", module._READERS[1:])
    table = read(path, tmp_path)
    assert len(reads) == 2 and list(table) == read_problems(path).problems
