import json
from pathlib import Path

import pandas
import pytest

from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError

SAMPLES = Path(__file__).parent / "samples"
ROW = {"id": "a", "problem": "1 + 1", "answer": "2"}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_jsonl_and_parquet_give_the_same_problems(tmp_path):
    more = {"id": 7, "problem": "3 - 1", "answer": 2, "solution": "two", "group": "g"}
    rows = [ROW, {**ROW, **more}]
    jsonl = load_problems(write(tmp_path / "p.jsonl", *rows))
    frame = pandas.DataFrame([{**row, "id": str(row["id"])} for row in rows]).astype(
        {"answer": str}
    )
    frame.to_parquet(tmp_path / "p.parquet")
    assert load_problems(tmp_path / "p.parquet") == jsonl
    assert [p.id for p in jsonl] == ["a", "7"]
    assert jsonl[0].solution is None and jsonl[1].solution == "two"


def test_the_dapo_schema_is_read_without_its_instruction(tmp_path):
    text = (
        "Solve the following math problem step by step. The last line of your response should be "
        "of the form Answer: $Answer (without quotes).\n\nHow many?\n\nRemember to put your answer "
        'on its own line after "Answer:".'
    )
    row = {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": text}],
        "reward_model": {"ground_truth": "34", "style": "rule"},
        "extra_info": {"index": "x-1"},
    }
    (problem,) = load_problems(write(tmp_path / "p.jsonl", row))
    assert (problem.id, problem.problem, problem.answer) == ("x-1", "How many?", "34")


def test_math_500_is_read_as_published():
    first, second = load_problems(SAMPLES / "math500.jsonl")
    assert (first.id, first.answer) == (
        "test/precalculus/807.json",
        "\\left( 3, \\frac{\\pi}{2} \\right)",
    )
    assert first.group == "Precalculus" and first.solution.startswith("We have that")
    assert second.group == "Number Theory" and second.answer == "9"


@pytest.mark.parametrize(
    "name", ["aime_problem", "aime_question", "aime_capitals", "aime_boxed", "aime_matharena"]
)
def test_the_copies_of_aime_are_read_as_published(name):
    (problem,) = load_problems(SAMPLES / f"{name}.jsonl")
    assert problem.problem.startswith("Every morning") and problem.answer == "204"
    assert problem.id in ("60", "2024-I-1", "1")


@pytest.mark.parametrize(
    ("solution", "answer"),
    [
        ("so \\boxed{1} no, \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{{a}{b}} }", "{a}{b}"),
    ],
)
def test_the_last_box_of_a_solution_is_its_answer(tmp_path, solution, answer):
    row = {"id": 1, "problem": "x", "solution": solution}
    (problem,) = load_problems(write(tmp_path / "p.jsonl", row))
    assert (problem.answer, problem.solution) == (answer, solution)


@pytest.mark.parametrize("solution", ["none", "\\boxed{1", "boxed{1}"])
def test_a_solution_without_a_whole_box_has_no_answer(tmp_path, solution):
    row = {"id": 1, "problem": "x", "solution": solution}
    with pytest.raises(ConfigError, match="field 'answer' is missing or empty"):
        load_problems(write(tmp_path / "p.jsonl", row))


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([], "holds no problem"),
        (["{"], r"p.jsonl:1: not JSON"),
        (["[1]"], r"p.jsonl:1: a JSON object is needed"),
        ([ROW, {"id": "b", "problem": "x"}], r"p.jsonl:2: field 'answer' is missing or empty"),
        ([{**ROW, "answer": " "}], "field 'answer' is missing or empty"),
        ([{**ROW, "problem": None}], "field 'problem'"),
        ([ROW, "", {**ROW}], r"p.jsonl:3: id 'a' occurs before, at .*p.jsonl:1"),
        ([{"prompt": [], "reward_model": {}}], "as in DAPO-Math-17k"),
    ],
)
def test_bad_files_are_named_with_their_line(tmp_path, rows, told):
    with pytest.raises(ConfigError, match=told):
        load_problems(write(tmp_path / "p.jsonl", *rows))


def test_a_missing_or_broken_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"data.problems is .*no such file"):
        load_problems(tmp_path / "none.jsonl")
    (tmp_path / "p.parquet").write_text("no parquet")
    with pytest.raises(ConfigError, match="not a Parquet file"):
        load_problems(tmp_path / "p.parquet")
