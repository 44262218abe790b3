import json

import pandas
import pytest

from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError

ROW = {"id": "a", "problem": "1 + 1", "answer": "2"}


def write(path, *rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def test_jsonl_and_parquet_give_the_same_problems(tmp_path):
    rows = [ROW, {**ROW, "id": 7, "answer": 2, "solution": "two", "group": "g"}]
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
        ([{"prompt": [], "reward_model": {}}], "looks like DAPO-Math-17k"),
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
