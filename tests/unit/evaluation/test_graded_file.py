import io
import json
import logging

import pytest
from rich.console import Console

from nemo_paced import cli
from nemo_paced.config import DataConfig, GradingConfig, PacedConfig, Unanswered
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.graded_file import Answered, Answers, grade_file


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path, *rows, response=None, **data):
    return list(Answers(PacedConfig(data=DataConfig(**data)), response).read(write(path, *rows)))


def shown(path, *rows, shown=2, grading=None, **options):
    console = Console(file=io.StringIO(), width=80)
    config = PacedConfig(grading=grading or GradingConfig(num_workers=1))
    grade_file(write(path, *rows), config, shown=shown, console=console, **options)
    return console.file.getvalue()


@pytest.mark.parametrize(
    ("row", "data", "response"),
    [
        ({"response": "r", "answer": "7", "truncated": True, "correct": False}, {}, None),
        ({"text": "7?", "response": "r", "answer": "7", "truncated": 1, "correct": 0}, {}, None),
        (
            {"outputs": [{"text": "r"}], "problem": None, "choices": [{"index": 0}], "answer": 7,
             "truncated": True, "label": 0.0},
            {},
            None,
        ),
        (
            {"response": "r", "label": "7", "truncated": True, "correct": False},
            {"columns": {"answer": "label"}},
            None,
        ),
        (
            {"completion": "r", "ground_truth": 7, "finish_reason": "length", "label": False},
            {},
            None,
        ),
        (
            {"resps": [["r"]], "target": "7", "truncated": True, "is_correct": False},
            {"columns": {"answer": "target"}},
            None,
        ),
        (
            {"mine": {"text": "r"}, "doc": {"gold": "7"}, "finish_reason": ["length"],
             "correct": [False]},
            {"columns": {"answer": "doc.gold"}},
            "mine.text",
        ),
        (
            {"output": "r", "question": "x?", "answer": "so 3+4=7\n#### 7", "truncated": True,
             "correct": False},
            {},
            None,
        ),
    ],
)  # fmt: skip
def test_rows_are_read_as_files_have_them(tmp_path, row, data, response):
    (found,) = read(tmp_path / "f.jsonl", row, response=response, **data)
    assert found == Answered("0", "r", ("7",), True, False)


def test_a_row_may_hold_several_responses_and_accepted_answers(tmp_path):
    row = {"id": "p", "responses": ["a", "b"], "final_answer": ["7", "8"], "correct": [True, False]}
    assert read(tmp_path / "f.jsonl", row) == [
        Answered("p/0", "a", ("7", "8"), False, True),
        Answered("p/1", "b", ("7", "8"), False, False),
    ]


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"answer": "7", "said": "r"}], "f.jsonl:1: no column with a response: it has answer"),
        ([{"response": {"a": 1}, "answer": "7"}], "name the column of the responses with --resp"),
        ([{"response": "r", "answer": "7", "truncated": "no"}], "truncated is 'no': true or false"),
        ([{"response": "r"}], r"f.jsonl:1: field 'answer' is missing.*data.unanswered=drop"),
        ([], "holds no response with an answer"),
    ],
)
def test_what_cannot_be_graded_is_refused_by_line(tmp_path, rows, told):
    with pytest.raises(ConfigError, match=told):
        read(tmp_path / "f.jsonl", *rows)


def test_a_choice_named_correct_is_the_answer_and_no_label(tmp_path):
    row = {"response": "B", "options": ["A) 1", "B) 2"], "correct": "B"}
    assert read(tmp_path / "f.jsonl", row) == [Answered("0", "B", ("B",), False, None)]


def test_what_is_null_is_an_empty_response_and_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        text = shown(tmp_path / "f.jsonl", {"response": None, "answer": "7"})
    assert "100 % without an answer" in text
    assert "responses: column 'response'; answers: column 'answer'" in caplog.text
    assert "1 responses are null" in caplog.text


def test_neither_a_directory_nor_the_responses_are_written_over(tmp_path):
    row = {"response": "r", "answer": "7"}
    for out, told in ((tmp_path, "a directory"), (tmp_path / "f.jsonl", "name another")):
        with pytest.raises(ConfigError, match=told):
            shown(tmp_path / "f.jsonl", row, out=out)


def test_rows_without_an_answer_are_left_out_where_one_says_so(tmp_path):
    rows = [{"response": "r"}, {"response": "s", "answer": "7"}]
    found = read(tmp_path / "f.jsonl", *rows, unanswered=Unanswered.drop)
    assert [each.response for each in found] == ["s"]


def test_verdicts_are_shown_counted_and_written(tmp_path):
    rows = [
        {"id": "a", "response": r"so \boxed{7}", "answer": "7", "correct": True},
        {"id": "b", "response": "hm\x1b[2J so it is 8", "answer": "7", "correct": True},
        {"id": "c", "response": "I do not know", "answer": "7", "correct": False},
        {"id": "d", "response": "so 7 and", "answer": "7", "truncated": True, "correct": False},
    ]
    text = shown(tmp_path / "f.jsonl", *rows, out=tmp_path / "new" / "v.jsonl")
    assert "right, box: a: read 7, the answer is 7 (box: equal after normalisation)" in text
    assert "\x1b" not in text and "hm\ufffd[2J so it is 8" in text, "a terminal obeys nothing"
    assert "wrong but labelled right: b" in text
    assert "4 responses: 25 % right, 25 % wrong, 25 % without an answer, 25 % cut before" in text
    assert "answers read by box 50 %, last number 50 %; right ones by box 100 %" in text
    assert "as the file labels them: 3 of 4; 1 wrong but labelled right" in text
    lines = [json.loads(line) for line in (tmp_path / "new" / "v.jsonl").read_text().splitlines()]
    assert [line["outcome"] for line in lines] == ["right", "wrong", "no answer", "truncated"]
    assert [line["id"] for line in lines] == list("abcd")
    text = shown(tmp_path / "f.jsonl", *rows[:3], shown=0)
    assert "right, box: a" not in text and "3 responses" in text


def test_a_file_that_ends_badly_leaves_earlier_verdicts(tmp_path):
    out = tmp_path / "v.jsonl"
    out.write_text("earlier")
    with pytest.raises(ConfigError):
        shown(tmp_path / "f.jsonl", {"response": "r", "answer": "1"}, {"answer": "1"}, out=out)
    assert out.read_text() == "earlier" and len(list(tmp_path.iterdir())) == 2


def test_the_command_takes_the_settings_of_grading(tmp_path, capsys):
    path = write(tmp_path / "f.jsonl", {"response": "it is 7", "answer": "7"})
    assert cli.main(["grade", path, "--show", "0"]) == 0
    assert "1 responses: 100 % right" in capsys.readouterr().out
    assert cli.main(["grade", path, "--show", "0", "grading.last_number=false"]) == 0
    assert "100 % without an answer" in capsys.readouterr().out
    assert cli.main(["grade", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
