"""Problem files as published, in rows of our own words."""

import json

import pandas
import pytest

from nemo_paced.config import DataConfig, Duplicates, Unanswered
from nemo_paced.data.problems import load_problems, read_problems
from nemo_paced.errors import ConfigError

TEXT = "Ann has 3 pens and buys 4. How many has she?"
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    f'{TEXT}\n\nRemember to put your answer on its own line after "Answer:".'
)
USER = {"role": "user", "content": TEXT}


def verl(prompt=(USER,), truth="7", **columns):
    reward = {"ground_truth": truth, "style": "rule"}
    return {"data_source": "sums", "prompt": list(prompt), "reward_model": reward, **columns}


def human(text, truth):
    return [
        {"from": "human", "value": text},
        {"from": "assistant", "ground_truth": {"value": truth}},
    ]


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(tmp_path, *rows, **data):
    return read_problems(write(tmp_path / "p.jsonl", *rows), data=DataConfig(**data))


def only(tmp_path, row, **data):
    (problem,) = read(tmp_path, row, **data).problems
    return problem


# name: (row, id, answer, solution)
ROWS = {
    "gsm8k": (
        {"question": TEXT, "answer": "She has 3+4=<<3+4=7>>7 pens.\nSo 7.\n#### 7"},
        ("0", "7", "She has 3+4=7 pens.\nSo 7."),
    ),
    "gsm8k with ids": (
        {"id": 9, "question": TEXT, "answer": "Many.\n#### 1,200\n"},
        ("9", "1200", "Many."),
    ),
    "gsm8k without a solution": ({"question": TEXT, "answer": "#### $7"}, ("0", "$7", None)),
    "dapo": (verl([{**USER, "content": DAPO}], extra_info={"index": "x-1"}), ("x-1", "7", None)),
    "dapo, processed": (
        {
            **verl(extra_info={"index": "x-1"}),
            "prompt": TEXT,
            "solution": "7",
            "source_prompt": [{**USER, "content": DAPO}],
        },
        ("x-1", "7", None),
    ),
    "verl with a system turn": (
        verl([{"role": "system", "content": "Be brief."}, USER], extra_info={"index": 4}),
        ("4", "7", None),
    ),
    "verl, gsm8k": (
        verl(
            [
                {
                    **USER,
                    "content": f"{TEXT} Let's think step by step and output the final answer after "
                    '"####".',
                }
            ],
            extra_info={"index": 4, "answer": "#### 7"},
        ),
        ("4", "7", None),
    ),
    "open-reasoner-zero": (
        {"0": human(TEXT, "7")[0], "1": human(TEXT, "7")[1]},
        ("0", "7", None),
    ),
    "numinamath": (
        {
            "problem": TEXT,
            "solution": "3 + 4.",
            "answer": "7",
            "problem_type": "Algebra",
            "question_type": "math-word-problem",
        },
        ("0", "7", "3 + 4."),
    ),
    "openr1": (
        {
            "problem": TEXT,
            "solution": "3 + 4.",
            "answer": "7",
            "uuid": "ab-1",
            "generations": ["<think>", "7"],
            "messages": [USER, {"role": "assistant", "content": "<think>"}],
        },
        ("ab-1", "7", "3 + 4."),
    ),
    "deepscaler": ({"problem": TEXT, "answer": "7", "solution": ""}, ("0", "7", None)),
    "math, boxed": (
        {"problem": TEXT, "level": "Level 1", "type": "Algebra", "solution": r"It is $\boxed 7$."},
        ("0", "7", r"It is $\boxed 7$."),
    ),
    "math, fboxed": (
        {"problem": TEXT, "solution": r"It is \fbox{7}."},
        ("0", "7", r"It is \fbox{7}."),
    ),
    "a solution marked as gsm8k's": (
        {"problem": TEXT, "solution": "3+4\n#### 7"},
        ("0", "7", "3+4\n#### 7"),
    ),
    "an answer with its solution": (
        {"problem": TEXT, "answer": r"3 and 4 are $\boxed{7}$."},
        ("0", "7", r"3 and 4 are $\boxed{7}$."),
    ),
    "an answer in a box": ({"problem": TEXT, "answer": r"$\boxed{7}$"}, ("0", "7", None)),
    "amc": ({"id": 3, "problem": TEXT, "question": TEXT, "answer": 7.0}, ("3", "7", None)),
    "a float of pandas": ({"id": 3.0, "problem": TEXT, "answer": 7.25}, ("3", "7.25", None)),
    "olympiadbench": (
        {"id": 16, "context": None, "question": TEXT, "solution": ["3 + 4.", "4 + 3."],
         "final_answer": ["$7$"], "is_multiple_answer": False, "error": None},
        ("16", "$7$", "3 + 4."),
    ),
    "olympiadbench, all asked for": (
        {"id": 16, "question": TEXT, "final_answer": ["$3$", "$4$"], "is_multiple_answer": True},
        ("16", "$3$, $4$", None),
    ),
    "svamp": (
        {"ID": "c-1", "Body": "Ann has 3 pens and buys 4", "Question": "How many has she?",
         "Answer": 7.0, "Type": "Addition"},
        ("c-1", "7", None),
    ),
    "asdiv": (
        {"body": "Ann has 3 pens and buys 4.", "question": "How many has she?",
         "answer": "7 (pens)"},
        ("0", "7", None),
    ),
    "a chat with an answer": (
        {"messages": [USER], "answer": "7", "question_id": 5},
        ("5", "7", None),
    ),
    "headings are no answer": (
        {"problem": TEXT, "solution": "#### Step 1\n3+4\n#### Step 2: add\nIt is \\boxed{7}."},
        ("0", "7", "#### Step 1\n3+4\n#### Step 2: add\nIt is \\boxed{7}."),
    ),
    "metamath": (
        {"query": TEXT, "answer": "3+4.\n#### 7\nThe answer is: 7"},
        ("0", "7", "3+4."),
    ),
    "a list after the mark": ({"question": TEXT, "answer": "#### 3,4"}, ("0", "3,4", None)),
    "a verdict is no answer": (
        {"problem": TEXT, "solution": "\\boxed{7}", "correct": 1},
        ("0", "7", "\\boxed{7}"),
    ),
    "dapo with a newline behind": (
        verl([{**USER, "content": DAPO + "\n"}], extra_info={"index": 1}),
        ("1", "7", None),
    ),
    "own columns, renamed": (
        {"query": TEXT, "n": 5, "meta": {"gold": 7}, "answer": "a note"},
        ("5", "7", None),
    ),
}  # fmt: skip
COLUMNS = {"problem": "query", "answer": "meta.gold", "id": "n"}


@pytest.mark.parametrize("name", ROWS)
def test_published_rows_are_read(tmp_path, name):
    row, (identity, answer, solution) = ROWS[name]
    columns = COLUMNS if name == "own columns, renamed" else {}
    problem = only(tmp_path, row, columns=columns)
    assert problem.problem == TEXT
    assert (problem.id, problem.answer, problem.solution) == (identity, answer, solution)
    assert problem.accepted == ()


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"question": "Which?", "subject": "s", "choices": ["red", "blue"], "answer": 1}, "B"),
        ({"question": "Which?", "choices": ["red", "blue"], "answer": "b"}, "B"),
        ({"question": "Which?", "options": ["A)red", "B)blue"], "correct": "B"}, "B"),
        ({"question": "Which?", "options": ["(A) red", "(B) blue"], "answer": "(A)"}, "A"),
        ({"question": "Which?", "options": "A) red B) blue", "Answer": "A"}, "A"),
        ({"question": "Which?", "options": "A. red B. blue", "Answer": "A"}, "A"),
        ({"question": "Which?", "options": ["red", "blue"], "answer": "blue"}, "B"),
        ({"question": "Which?", "options": {"A": "red", "B": "blue"}, "answer": "B"}, "B"),
        ({"Question": "Which?", "A": "red", "B": "blue", "Answer": "B", "Subject": "s"}, "B"),
        (
            {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["A", "B"]},
             "answerKey": "B"},
            "B",
        ),
        (
            {"question": "Which?", "choices": {"text": ["red", "blue"], "label": ["1", "2"]},
             "answerKey": "2"},
            "B",
        ),
    ],
)  # fmt: skip
def test_choices_stand_behind_the_question_by_letter(tmp_path, row, answer):
    problem = only(tmp_path, row)
    assert problem.problem == "Which?\n\nA) red\nB) blue"
    assert problem.answer == answer


def test_a_rows_system_turn_is_told_to_be_left_out(tmp_path):
    file = read(tmp_path, verl([{"role": "system", "content": "Be brief."}, USER]))
    assert any("the row's system turn is left out: set data.system_prompt" in n for n in file.notes)


def test_a_choice_that_there_is_not_is_no_answer(tmp_path):
    row = {"question": "Which?", "choices": ["red", "blue"], "answer": 2}
    for answer in (2, -1, True, "2", "C", "green", ["A"], None):
        with pytest.raises(ConfigError, match=r"p.jsonl:1: .*answer"):
            only(tmp_path, {**row, "answer": answer})
    for choices in (["red"], "red or blue", list("abcdefghijk")):
        with pytest.raises(ConfigError, match="2 to 10 are needed, as a list or by letter"):
            only(tmp_path, {**row, "choices": choices})


@pytest.mark.parametrize("truth", [["7", "seven"], '["7", "seven"]', ["7", "7", "seven"]])
def test_several_answers_are_accepted_where_the_schema_says_so(tmp_path, truth):
    problem = only(tmp_path, verl(truth=truth, extra_info={"index": 1}))
    assert (problem.answer, problem.accepted) == ("7", ("seven",))
    assert problem.content()["accepted"] == ("seven",)
    assert "accepted" not in only(tmp_path, verl(truth="7")).content()


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (True, "the answer is True, a bool"),
        ({"a": 1}, r"the answer is \{'a': 1\}, a dict"),
        (["7"], r"the answer is a list, \['7'\]: one text is needed"),
        ("proof", "the answer is 'proof': nothing to compare"),
        ("notfound", "the answer is 'notfound'"),
        ("NaN", "the answer is 'NaN'"),
        (float("nan"), "field 'answer' is missing or empty"),
        (float("inf"), "the answer is inf"),
        (" ", "field 'answer' is missing or empty"),
        (None, "field 'answer' is missing or empty"),
    ],
)
def test_what_is_no_answer_is_refused_with_its_row_or_dropped(tmp_path, answer, told):
    good = {"problem": "1 + 1", "answer": "2"}
    rows = [good, {"problem": TEXT, "answer": answer}, {**good, "problem": "1 + 2"}]
    with pytest.raises(ConfigError, match=f"p.jsonl:2: {told}.*data.unanswered=drop leaves such"):
        read(tmp_path, *rows)
    file = read(tmp_path, *rows, unanswered=Unanswered.drop)
    assert [p.id for p in file.problems] == ["0", "2"], "a number is that of the row"
    assert any("1 of 3 rows have no answer" in note and "p.jsonl:2" in note for note in file.notes)


@pytest.mark.parametrize("problem", [["a"], {"a": 1}, True, " "])
def test_a_problem_that_is_no_text_is_refused(tmp_path, problem):
    with pytest.raises(ConfigError, match=r"p.jsonl:1: .*problem"):
        read(tmp_path, {"problem": problem, "answer": "2"}, unanswered=Unanswered.drop)


def test_a_file_without_ids_is_numbered_and_says_so_once(tmp_path):
    file = read(tmp_path, *({"problem": f"{n} + 1", "answer": n + 1} for n in range(3)))
    assert [p.id for p in file.problems] == ["0", "1", "2"]
    assert [note for note in file.notes if "no column with ids" in note]
    with pytest.raises(ConfigError, match=r"p.jsonl:2: field 'id' is missing"):
        read(tmp_path, {"id": 1, "problem": "a", "answer": "2"}, {"problem": "b", "answer": "2"})


def test_a_repeated_problem_is_refused_or_taken_once(tmp_path):
    rows = [verl([{**USER, "content": DAPO}], extra_info={"index": "x"})] * 100
    with pytest.raises(
        ConfigError, match=r"p.jsonl:2: id 'x' occurs before, at .*:1; .*data.duplicates=first"
    ):
        read(tmp_path, *rows)
    file = read(tmp_path, *rows, duplicates=Duplicates.first)
    assert len(file.problems) == 1 and file.rows == 100 and not file.warnings
    assert any("99 of 100 rows repeat a problem" in note for note in file.notes)


def test_the_same_text_under_two_ids_is_a_repetition(tmp_path):
    rows = [{"id": n, "problem": f"1 +{' ' * n} 1", "answer": "2"} for n in (1, 2)]
    with pytest.raises(ConfigError, match=r":2: the same problem occurs before, at .*:1; remove"):
        read(tmp_path, *rows)
    assert len(read(tmp_path, *rows, duplicates=Duplicates.first).problems) == 1


def test_contradictory_answers_are_named(tmp_path):
    rows = [{"id": n, "problem": "1 + 1", "answer": str(n)} for n in (2, 3)]
    with pytest.raises(ConfigError, match=r"with another answer \(.*:2 answers '3' and .*:1 '2'\)"):
        read(tmp_path, *rows)
    file = read(tmp_path, *rows, duplicates=Duplicates.first)
    assert [p.answer for p in file.problems] == ["2"]
    assert "1 repetitions of a problem have another answer; the first is taken" in file.warnings[0]


@pytest.mark.parametrize("duplicates", Duplicates)
def test_two_problems_of_one_id_are_refused_whatever_is_done_with_repetitions(tmp_path, duplicates):
    rows = [{"id": 1, "problem": text, "answer": "2"} for text in ("1 + 1", "4 - 2")]
    with pytest.raises(ConfigError, match=r":2: id '1' occurs before, at .* with another problem"):
        read(tmp_path, *rows, duplicates=duplicates)
    numbered = read(tmp_path, *rows, duplicates=duplicates, columns={"id": None})
    assert [p.id for p in numbered.problems] == ["0", "1"]


def test_rows_of_verl_are_numbered_where_that_is_asked_for(tmp_path):
    rows = [verl([{**USER, "content": text}], extra_info={"index": 0}) for text in ("1?", "2?")]
    with pytest.raises(ConfigError, match=r"id '0' occurs before.*data.columns.id=null"):
        read(tmp_path, *rows)
    assert [p.id for p in read(tmp_path, *rows, columns={"id": None}).problems] == ["0", "1"]


@pytest.mark.parametrize(
    "text",
    [
        "Solve the following math problem step by step. What is 2+2?",
        "Solve the following math problem step by step.\nLet x=3 and y=4.\n\nFind x+y.",
        "Please reason step by step, and put your final answer within \\boxed{}.",
    ],
)
def test_a_problem_that_begins_or_ends_like_an_instruction_stays_whole(tmp_path, text):
    assert only(tmp_path, {"problem": text, "answer": "4"}).problem == text


def test_several_boxes_of_an_answer_stay_several(tmp_path):
    row = {"problem": TEXT, "answer": r"$\boxed{3}$ and $\boxed{5}$"}
    problem = only(tmp_path, row)
    assert problem.answer == row["answer"] and problem.solution is None


def test_a_bare_template_leaves_the_files_own_instruction(tmp_path):
    text = f"{TEXT}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    row = {"problem": text, "answer": "7"}
    assert only(tmp_path, row).problem == TEXT
    assert only(tmp_path, row, prompt_template="{problem}").problem == text
    file = read(tmp_path, row)
    assert any("1 of 1 rows: an instruction was taken off" in note for note in file.notes)


def test_columns_are_checked(tmp_path):
    row = {"query": TEXT, "gold": "7"}
    with pytest.raises(ConfigError, match=r"names 'golden', which is no column of it; .*gold, que"):
        only(tmp_path, row, columns={"problem": "query", "answer": "golden"})
    own = {"problem": TEXT, "answer": "7"}
    with pytest.raises(ConfigError, match="names 'query', which is no column of it"):
        only(tmp_path, own, columns={"problem": "query"})
    evaluated = read_problems(
        write(tmp_path / "p.jsonl", own),
        key="data.validation_problems",
        data=DataConfig(columns={"problem": "query"}),
    )
    assert evaluated.problems[0].answer == "7", "another file is read by its own columns"
    assert any("data.columns names none of its columns" in note for note in evaluated.notes)
    rows = [{**own, "final": "7"}, {"problem": "1 + 1", "answer": "an essay"}]
    with pytest.raises(ConfigError, match=r"p.jsonl:2: field 'answer' is missing"):
        read(tmp_path, *rows, columns={"answer": "final"})
    mapped = verl(extra_info={"index": 1, "answer": "VII"})
    assert only(tmp_path, mapped, columns={"answer": "extra_info.answer"}).answer == "VII"
    with pytest.raises(ConfigError, match=r"data.columns holds 'question', which is no field"):
        DataConfig(columns={"question": "problem"})
    with pytest.raises(ConfigError, match=r"data.columns.answer is None"):
        DataConfig(columns={"answer": None})
    with pytest.raises(ConfigError, match=r"name its column with data.columns.problem"):
        only(tmp_path, {"text": TEXT, "answer": "7"})


def test_chats_that_are_no_problem_are_refused(tmp_path):
    assistant = {"role": "assistant", "content": "7"}
    for prompt in ([USER, assistant], [USER, USER], []):
        with pytest.raises(ConfigError, match=r"a chat of one user turn is needed"):
            only(tmp_path, verl(prompt))
    with pytest.raises(ConfigError, match=r"has no ground_truth.value"):
        only(tmp_path, {"0": {"from": "human", "value": TEXT}, "1": {"from": "assistant"}})


def test_json_arrays_and_patterns_of_files_are_read(tmp_path):
    (tmp_path / "orz.json").write_text(
        json.dumps([human(TEXT, "7"), human("1 + 1", "2")], indent=1)
    )
    assert [p.answer for p in load_problems(tmp_path / "orz.json")] == ["7", "2"]
    for part, answers in (("0", "12"), ("1", "3")):
        rows = [{"problem": f"1 * {a}", "answer": a} for a in answers]
        pandas.DataFrame(rows).to_parquet(tmp_path / f"train-{part}.parquet")
    found = load_problems(tmp_path / "train-*.parquet")
    assert [(p.id, p.answer) for p in found] == [("0", "1"), ("1", "2"), ("2", "3")]
    with pytest.raises(ConfigError, match=r"a directory: give a file, or a pattern such as"):
        load_problems(tmp_path)
    with pytest.raises(ConfigError, match="no such file"):
        load_problems(tmp_path / "test-*.parquet")


def test_nested_columns_of_parquet_are_read(tmp_path):
    pandas.DataFrame([verl(extra_info={"index": "a"}), verl(truth=["7", "VII"])]).head(
        1
    ).to_parquet(tmp_path / "p.parquet")
    (problem,) = load_problems(tmp_path / "p.parquet")
    assert (problem.id, problem.problem, problem.answer) == ("a", TEXT, "7")
    rows = [{"question": "Which?", "choices": ["red", "blue"], "answer": 1}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "p.parquet")
    assert load_problems(tmp_path / "p.parquet")[0].answer == "B"
