import json
from importlib.util import find_spec

import pytest

from nemo_paced.compose import ASSETS
from nemo_paced.config import LmEvalConfig
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.lm_eval_tasks import draw, load_suites

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None,
    reason="lm_eval is not installed (pip install '.[eval]'; scripts/setup.sh does)",
)
# questions of MMLU's smallest and largest subjects, and some between
SIZES = {"a": 100, "b": 1534, "c": 171, "d": 310, "e": 895, "f": 101}


def test_a_draw_is_exact_proportional_and_the_same_every_time():
    drawn = draw(SIZES, 500)
    assert sum(map(len, drawn.values())) == 500
    for name, numbers in drawn.items():
        assert abs(len(numbers) - 500 * SIZES[name] / sum(SIZES.values())) < 1
        assert len(set(numbers)) == len(numbers) and numbers == sorted(numbers)
        assert set(numbers) <= set(range(SIZES[name]))
    assert drawn == draw(SIZES, 500) and drawn["b"][-1] > 1000, "spread over the whole task"


@pytest.mark.parametrize("limit", [None, 3111, 10_000])
def test_without_a_limit_or_under_one_that_is_not_reached_all_are_asked(limit):
    assert draw(SIZES, limit) == {name: list(range(size)) for name, size in SIZES.items()}


def test_a_task_without_a_question_is_left_out():
    assert list(draw({"large": 1000, "small": 1}, 10)) == ["large"]  # lm-eval takes [] for all


@pytest.mark.parametrize(
    ("settings", "told"),
    [({"num_fewshot": -1}, "num_fewshot is -1"), ({"limit": 0}, "limit is 0: .* or null")],
)
def test_numbers_that_cannot_be_are_refused(settings, told):
    with pytest.raises(ConfigError, match=rf"evaluation\.lm_eval\.{told}"):
        LmEvalConfig(**settings)


def test_nothing_is_loaded_where_no_task_is_named():
    assert load_suites(LmEvalConfig()) == {}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Task files; their data sets are cached under the test's own directory."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"solve s{i}", "answer": "s1"} for i in range(8)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def write_task(folder, name, **changes):
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "answer",
        "doc_to_choice": ["s1", "s2"],
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps({**task, **changes}))


@needs_lm_eval
def test_shots_questions_and_metric_of_a_task_are_set_as_asked(folder):
    write_task(folder, "own")
    write_task(folder, "zero", num_fewshot=0)
    settings = LmEvalConfig(tasks=["own", "zero"], include_path=str(folder), num_fewshot=3, limit=4)
    suites = load_suites(settings)
    shots = {name: suites[name].tasks[name].get_config("num_fewshot") for name in suites}
    assert shots == {"own": 3, "zero": 0}, "a task that says 0 is made for 0"
    assert len(suites["own"].questions["own"]) == 4 and suites["own"].metrics == {"own": "acc"}


@needs_lm_eval
def test_task_files_of_one_name_with_other_questions_are_told_apart(folder):
    def contents(**changes):
        write_task(folder, "own", **changes)
        settings = LmEvalConfig(tasks=["own"], include_path=str(folder), limit=4)
        return load_suites(settings)["own"].contents

    first = contents()
    assert first == contents(), "the same every time"
    assert first != contents(doc_to_text="Q: {{question}}")
    data = folder / "data.jsonl"
    data.write_text(data.read_text().replace("solve", "guess"))
    assert first != contents()


@needs_lm_eval
def test_what_cannot_be_asked_is_named(folder):
    write_task(folder, "spread", metric_list=[
        {"metric": "acc", "aggregation": "median", "higher_is_better": True}])  # fmt: skip
    write_task(folder, "absent", dataset_kwargs={"data_files": {"test": "/none.jsonl"}})

    def load(name, include_path=folder):
        load_suites(LmEvalConfig(tasks=[name], include_path=str(include_path)))

    with pytest.raises(ConfigError, match="'spread' has no metric that is a mean"):
        load("spread")
    with pytest.raises(ConfigError, match="'absent' cannot be loaded"):
        load("absent")
    with pytest.raises(ConfigError, match=r"tasks names 'nothing'"):
        load("nothing")
    with pytest.raises(ConfigError, match=r"include_path is '/none': no such directory"):
        load("spread", "/none")


@needs_lm_eval
def test_requests_carry_token_ids_and_generated_text_is_cut_here():
    from nemo_paced.evaluation.lm_eval_endpoint import ServedModel
    from nemo_paced.evaluation.lm_eval_tasks import _too_long

    model = ServedModel(
        ["http://one", "http://two"], "key", hf_dir=ASSETS / "student", max_length=8,
        num_concurrent=1, timeout_s=5.0, stop_token_ids=[1], chat=None,
    )  # fmt: skip
    assert [model.base_url for _ in range(3)] == [
        f"http://{name}/v1/completions" for name in ("one", "two", "one")
    ]
    assert model.header == {"Authorization": "Bearer key"} and not model.add_bos_token
    scored = model._create_payload([[3, 4]], generate=False)
    assert scored["echo"] and scored["prompt"] == [[3, 4]] and scored["detokenize"] is False
    asked = model._create_payload([[3]], generate=True, gen_kwargs={"until": ["s2"]}, eos="<eos>")
    assert "stop" not in asked and asked["stop_token_ids"] == [1]
    ids = model.tokenizer("s1 s4 s2 s5").input_ids
    answer = {"choices": [{"index": 0, "token_ids": [*ids, 1]}]}
    assert [text.strip() for text in model.parse_generations(answer)] == ["s1 s4"]
    # 7 tokens with one to generate
    assert not _too_long(model, "s1 s1 s1 s1 s1 s1", " s2")
    assert _too_long(model, "s1 s1 s1 s1 s1 s1 s1", " s2")
    assert not _too_long(model, "s1 s1 s1", {"max_gen_toks": 4})
    assert _too_long(model, "s1 s1 s1 s1", {"max_gen_toks": 4})
