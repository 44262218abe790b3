"""The command ``data`` on files as they are published."""

import json

import pytest

from nemo_paced.commands.preflight import data
from nemo_paced.compose import ASSETS
from nemo_paced.errors import ConfigError
from tests import chat_templates

TEXT = "Ann has {} pens and buys 4. How many has she?"


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def shown(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments):
        data([str(argument) for argument in arguments])
        return capsys.readouterr().out

    return run


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return chat_templates.write(tmp_path_factory.mktemp("student"), "qwen3")


def test_what_was_read_is_told_without_a_model(shown, tmp_path):
    rows = [
        {"question": TEXT.format(n), "answer": f"It is <<{n}+4={n + 4}>>.\n#### {n + 4}"}
        for n in range(3)
    ]
    out = shown(write(tmp_path / "gsm8k.jsonl", *rows))
    for words in (
        "3 of 3 rows", "problem from `question`, answer from `answer`", "3 integer", "3 of 3",
        "the answer is what a worked solution marks", "a problem's id is the number of its row",
        "No student.hf_path",
    ):  # fmt: skip
        assert words in out


def test_problems_are_shown_as_the_models_see_them(shown, tmp_path, student):
    rows = [
        {"id": n, "problem": TEXT.format(n), "answer": str(n + 4), "solution": "Count."}
        for n in range(5)
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    thinking = "data.chat_template_kwargs.enable_thinking=false"
    out = shown(path, f"student.hf_path={student}", thinking, "--show", 2)
    assert out.count("as the student sees it") == out.count("as the teacher sees it") == 2
    assert "problem 0 as" in out and "problem 2 as" in out
    assert "<|im_start|>user" in out and "</think>" in out and "Count." in out
    assert "Responses end with <eos>, <|im_end|>." in out
    (line,) = [line for line in out.splitlines() if line.startswith("student prompt")]
    assert line.split()[-2:] == ["1024", "0"]
    evaluated = shown(path, f"student.hf_path={student}", "--evaluated", "--show", 1)
    assert "as it is evaluated" in evaluated and "teacher" not in evaluated


def test_what_a_run_would_refuse_is_told_at_once(shown, tmp_path, student, capsys):
    rows = [{"problem": TEXT.format(n) * n, "answer": str(n)} for n in range(1, 5)]
    path = write(tmp_path / "p.jsonl", *rows, rows[0], {"problem": "Why?", "answer": "proof"})
    arguments = [path, f"student.hf_path={student}", "teacher.privileged_context=answer"]
    with pytest.raises(ConfigError, match="a run would refuse it, for what is said above"):
        shown(*arguments, "data.max_prompt_length=350")
    out = capsys.readouterr().out
    for words in (
        "1 of 6 rows repeat a problem; set data.duplicates=first",
        "1 of 6 rows have no answer to compare with; set data.unanswered=drop",
        "student prompts are above data.max_prompt_length 350",
    ):
        assert words in out
    shown(*arguments, "data.duplicates=first", "data.unanswered=drop")


def test_what_files_hold_is_no_markup(shown, tmp_path, student):
    rows = [
        {
            "problem": f"[b]Which [/asy] {n}?",
            "answer": "[a,b][/x]",
            "group": "[red]",
            "id": f"[/{n}]",
        }
        for n in range(2)
    ]
    path = write(tmp_path / "p.jsonl", *rows)
    out = shown(path, f"student.hf_path={student}", "teacher.privileged_context=answer")
    for words in ("[a,b][/x]", "[red] 2", "[b]Which [/asy] 1?", "problem [/1] as the student"):
        assert words in out


def test_letters_of_choices_ask_for_another_verifier(shown, tmp_path):
    rows = [{"question": f"{n}?", "choices": ["red", "blue"], "answer": n % 2} for n in range(4)]
    path = write(tmp_path / "mmlu.jsonl", *rows)
    assert "set grading.verifier=multiple_choice" in shown(path)
    assert "verifier" not in shown(path, "grading.verifier=multiple_choice")


def test_the_files_of_a_recipe_are_shown_without_one_on_the_command_line(shown):
    out = shown("--config-name", "quickstart", "--show", "1")
    for name in ("train", "heldout", "forgetting"):
        assert str(ASSETS / f"problems_{name}.jsonl") in out.replace("\n", "")
    with pytest.raises(ConfigError, match="no file: name one, or a recipe"):
        shown()
    with pytest.raises(ConfigError, match=r"nix.jsonl.*no such file"):
        shown("nix.jsonl")
