"""Wrong references kept, dropped or sampled again, through the real store, grader and driver; only
the teacher behind the client is scripted, since its verdicts have to be known."""

import dataclasses
import json
import logging
from collections import Counter

import numpy as np
import pandas
import pytest

from nemo_paced.compose import with_config
from nemo_paced.config import (
    Reduction,
    ReferencesConfig,
    ReferenceSource,
    WeightScheme,
    WeightsConfig,
    WrongReferences,
)
from nemo_paced.data.problems import load_problems
from nemo_paced.data.references import read_references, solutions
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.run.progress import RunLog, progress_bar
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.training import prepare
from nemo_paced.training import references as references_module
from nemo_paced.training.driver import Driver
from nemo_paced.training.references import load_references
from nemo_paced.weights.schemes import weights_with_references
from tests.scripted_client import ScriptedClient

# the teacher's: never right, rarely, half the time, always
TRUE_RATES = {f"p{i:02d}": (0.0, 0.2, 0.5, 1.0)[i % 4] for i in range(24)}
NEVER = {i for i, rate in TRUE_RATES.items() if rate == 0}
KEEP, DROP, RESAMPLE = WrongReferences.keep, WrongReferences.drop, WrongReferences.resample


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    path = tmp_path / "problems.jsonl"
    rows = [
        {"id": i, "problem": f"solve s{n % 8} s{n // 8} f8 =", "answer": "s8", "solution": "s8"}
        for n, i in enumerate(TRUE_RATES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(wrong=KEEP, max_attempts=None, **others):
        composed = []
        overrides = [
            f"data.problems={path}",
            "model.global_batch_size=8",
            "schedule=forward_kl",
            "data.validation_problems=null",
            "rollout.endpoints=[http://127.0.0.1:9]",
        ]
        with_config(["--config-name", "quickstart", *overrides], composed.append)
        references = ReferencesConfig(
            wrong=wrong, max_attempts=max_attempts, endpoints=["http://127.0.0.1:9"]
        )
        weights = WeightsConfig(scheme=WeightScheme.unweighted)
        return dataclasses.replace(
            composed[0], **{"references": references, "weights": weights, **others}
        )

    return make


class Teacher(ScriptedClient):
    """Every wrong response is another one."""

    def __init__(self, prompts, break_after):
        super().__init__(TRUE_RATES, prompts.response("s8"), (), break_after)
        self.prompts = prompts

    def sample(self, requests, on_result):
        for request in requests:
            self.wrong_ids = tuple(self.prompts.response(f"s{request.seed % 8}"))
            super().sample([request], on_result)


@pytest.fixture
def teacher(monkeypatch):
    """What the teachers' clients answer, in the order of the samplers made; each is in the list."""
    clients = []

    class TeacherSampler(Sampler):
        """Its requests go to a scripted client, as those of a running server would."""

        break_after = None

        def __enter__(self):
            super().__enter__()
            self.client = Teacher(self.prompts, TeacherSampler.break_after)
            clients.append(self.client)
            return self

    monkeypatch.setattr(references_module, "Sampler", TeacherSampler)
    return TeacherSampler, clients


def load(config, run_dir):
    """Responses as ``train`` gets them, and the rows of the file."""
    run_dir.mkdir(exist_ok=True)
    problems = load_problems(config.data.problems)
    with progress_bar(enabled=False) as bar:
        found = load_references(config, problems, prepare.make_prompts(config), run_dir, bar)
    lines = (run_dir / "references.jsonl").read_text().splitlines()
    return found, {row["id"]: row for row in map(json.loads, lines)}


def test_wrong_references_are_kept_unless_told_otherwise(make_config, tmp_path, teacher, caplog):
    caplog.set_level(logging.INFO, "nemo_paced")
    found, rows = load(make_config(), tmp_path / "run")
    assert set(found) == set(rows) == set(TRUE_RATES)
    right = sum(row["correct"] for row in rows.values())
    assert 6 <= right < 18
    assert teacher[1][0].samples_asked == 24
    assert (
        f"{right} of 24 teacher responses are right, 0 of them at a later attempt; {24 - right} "
        "others are kept; 0 truncated; 24 sampled" in caplog.text
    )


def test_resampling_stops_at_the_first_right_one_and_keeps_what_stays_wrong(
    make_config, tmp_path, teacher, caplog
):
    caplog.set_level(logging.INFO, "nemo_paced")
    kept, first = load(make_config(), tmp_path / "kept")
    found, rows = load(make_config(RESAMPLE, 6), tmp_path / "run")
    assert set(found) == set(TRUE_RATES)
    wrong = {i for i, row in rows.items() if not row["correct"]}
    assert wrong >= NEVER and len(wrong) < sum(not row["correct"] for row in first.values())
    assert {rows[i]["attempts"] for i in wrong} == {6}
    assert all(found[i] == kept[i] for i in wrong), "what keep would have taken"
    assert all(rows[i]["attempts"] == 1 for i in TRUE_RATES if first[i]["correct"])
    attempts = [row["attempts"] for row in rows.values()]
    assert teacher[1][1].samples_asked == sum(attempts) and len(set(attempts)) > 2
    later = sum(row["correct"] and row["attempts"] > 1 for row in rows.values())
    assert f"{later} of them at a later attempt; {len(wrong)} others are kept" in caplog.text


@pytest.mark.parametrize("wrong", WrongReferences)
def test_a_reference_without_a_verdict_is_neither_dropped_nor_sampled_again(wrong):
    late, bad = Outcome.timed_out, Outcome.wrong
    outcomes = {"late": [late], "wrong": [bad] * 8}
    asked = Counter()

    def sample(problems, wanted):
        asked.update(problem.id for problem in problems)
        return [
            Rollout(f"{p.id}/{k}", p.id, (1,), sample=k, outcome=outcomes[p.id][k])
            for p in problems
            for k in range(wanted[p.id])
        ]

    problems = [Problem("late", "x", "1"), Problem("wrong", "x", "1")]
    found = references_module._choose(problems, sample, ReferencesConfig(wrong=wrong))
    dropped = {each.rollout.problem_id: each.dropped for each in found}
    assert dropped == {"late": False, "wrong": wrong is DROP}
    assert asked == {"late": 1, "wrong": 8 if wrong is RESAMPLE else 1}


@pytest.mark.parametrize("break_after", [0, 10, 24, 30, 45])
def test_an_interrupted_search_asks_for_nothing_twice(make_config, tmp_path, teacher, break_after):
    sampler, clients = teacher
    config = make_config(RESAMPLE)
    _, whole = load(config, tmp_path / "whole")
    sampler.break_after = break_after
    with pytest.raises(RolloutError):
        load(config, tmp_path / "broken")
    assert not (tmp_path / "broken" / "references.jsonl").exists()
    sampler.break_after = None
    _, resumed = load(config, tmp_path / "broken")
    assert resumed == whole
    assert clients[1].samples_asked == break_after
    assert break_after + clients[2].samples_asked == clients[0].samples_asked


def test_dropped_problems_are_marked_and_have_no_response(make_config, tmp_path, teacher):
    found, rows = load(make_config(DROP), tmp_path / "run")
    dropped = {i for i, row in rows.items() if row.get("dropped")}
    assert dropped == {i for i, row in rows.items() if not row["correct"]} >= NEVER
    assert set(found) == set(TRUE_RATES) - dropped
    assert all("response_ids" not in rows[i] and rows[i]["response"] for i in dropped)
    searched, _ = load(make_config(DROP, 8), tmp_path / "searched")
    assert set(found) < set(searched) <= set(TRUE_RATES) - NEVER


def test_other_settings_remake_the_file_from_the_samples_there_are(make_config, tmp_path, teacher):
    run_dir = tmp_path / "run"
    _, kept = load(make_config(), run_dir)
    _, dropped = load(make_config(DROP), run_dir)
    assert any(row.get("dropped") for row in dropped.values())
    _, searched = load(make_config(RESAMPLE, 3), run_dir)
    _, again = load(make_config(), run_dir)
    assert again == kept
    asked = [client.samples_asked for client in teacher[1]]
    assert asked == [24, 0, sum(row["attempts"] for row in searched.values()) - 24, 0]
    load(make_config(), run_dir)
    assert len(teacher[1]) == 4, "a file that fits is read, and no server is started"


def start(config, run_dir):
    run_dir.mkdir(exist_ok=True)
    driver = Driver(config, run_dir)
    driver.find_references(RunLog(config, run_dir, 0, enabled=False))
    driver.start_servers(resumed=False)
    rates = dict.fromkeys(TRUE_RATES, 0.5)
    if driver.sampling_s is not None:
        driver.sampler.client = ScriptedClient(
            rates, driver.prompts.response("s8"), driver.prompts.response("s9")
        )
    driver.first_pass_rates(None)
    return driver


@pytest.mark.parametrize("reduction", [Reduction.token_sum, Reduction.token_mean])
def test_a_dropped_problem_counts_in_the_batch_and_is_not_run(
    make_config, tmp_path, teacher, reduction
):
    config = make_config(DROP)
    config.loss.reduction = reduction
    with start(config, tmp_path / "run") as driver:
        batches = [driver.batch(step, 8 * step, config.stages[0]) for step in range(3)]
        trained = [item.problem_id for batch in batches for item in batch.items]
        assert sorted(trained) == sorted(driver.references), "one epoch: each once"
        assert len(trained) < 24
        if reduction is Reduction.token_sum:
            total = sum(item.token_weight * 8 for batch in batches for item in batch.items)
            assert total == pytest.approx(24), "mean 1 over the whole training set, N counts all"
        assert np.mean(list(driver.table.weights().values())) == pytest.approx(1)
        assert all(weight > 0 for weight in driver.table.weights().values())
        certified = driver.certificate_batch(0, 0)
        assert {item.problem_id for item in certified.items} <= set(driver.references)


def test_on_policy_stages_weigh_a_dropped_problem_as_any_other(make_config, tmp_path, teacher):
    config = make_config(DROP)
    on_policy = []
    overrides = ["schedule=two_stage", "data.validation_problems=null"]
    with_config(["--config-name", "quickstart", *overrides], on_policy.append)
    config = dataclasses.replace(config, stages=on_policy[0].stages)
    with start(config, tmp_path / "run") as driver:
        batch = driver.batch(0, 0, config.stages[1])
        assert len(batch.items) == 8
        assert all(item.token_weight == pytest.approx(1 / 8) for item in batch.items)


def test_a_file_may_lack_only_what_it_marks_as_dropped(make_config, tmp_path):
    config = make_config()
    problems = load_problems(config.data.problems)
    prompts = prepare.make_prompts(config)
    path = tmp_path / "given.jsonl"

    def write(rows):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    rows = [{"id": i, "response": "s8"} for i in TRUE_RATES]
    write([*rows[1:], {"id": "p00", "dropped": True}])
    assert set(read_references(path, problems, prompts)) == set(TRUE_RATES) - {"p00"}
    write(rows[1:])
    with pytest.raises(ConfigError, match=r"lacks 1 of the 24 problems \(p00\)"):
        read_references(path, problems, prompts)
    write([*rows[1:], {"id": "p00", "dropped": False}])
    with pytest.raises(ConfigError, match=r"given.jsonl:24: .*'response'"):
        read_references(path, problems, prompts)
    write([{"id": i, "dropped": True} for i in TRUE_RATES])
    with pytest.raises(ConfigError, match="all 24 problems are dropped"):
        read_references(path, problems, prompts)
    path.write_text("[1]\n")
    with pytest.raises(ConfigError, match=r"given.jsonl:1: a JSON object is needed"):
        read_references(path, problems, prompts)
    for bad in (
        {"response_ids": "s8"},
        {"response_ids": [2**31]},
        {"response": ""},
        {"response": 8},
    ):
        write([{"id": "p00", **bad}])
        with pytest.raises(ConfigError, match=r"given.jsonl:1: a JSON object with id"):
            read_references(path, problems, prompts)


def test_solutions_are_tokenised_where_they_are_asked_for(make_config, monkeypatch):
    prompts = prepare.make_prompts(make_config())
    problems = [Problem(f"p{n}", f"solve s{n} =", "s8", f"s{n} s8") for n in (1, 2, 3)]
    found = solutions(problems, prompts)
    made = []
    whole = prompts.response
    monkeypatch.setattr(prompts, "response", lambda text: made.append(text) or whole(text))
    assert list(found) == ["p1", "p2", "p3"] and "p2" in found and "x" not in found and not made
    assert found["p2"].response_ids == whole("s2 s8") and made == ["s2 s8"]
    assert found.get("x") is None and not found["p2"].truncated
    monkeypatch.setattr(prompts.data, "max_response_length", 2)
    assert found["p2"].response_ids == whole("s2 s8") and found["p2"].truncated
    without = [*problems, Problem("p4", "solve s4 =", "s8")]
    with pytest.raises(ConfigError, match=r"solution and 1 of 4 problems have none \(p4\)"):
        solutions(without, prompts)


def test_references_are_read_from_parquet_and_with_numbers_as_ids(make_config, tmp_path):
    config = make_config()
    prompts = prepare.make_prompts(config)
    problems = [Problem(str(n), f"solve s{n} =", "s8") for n in (1, 2, 3)]
    rows = [
        {"id": 1, "response": "s8"},
        {"id": 2, "response_ids": [11, 12, 1]},
        {"id": 3, "dropped": True},
    ]
    pandas.DataFrame(rows).to_parquet(tmp_path / "given.parquet")
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_references(tmp_path / "given.parquet", problems, prompts)
    assert found == read_references(tmp_path / "given.jsonl", problems, prompts)
    assert found["1"].response_ids == prompts.response("s8") and set(found) == {"1", "2"}
    assert found["2"].response_ids == (11, 12, 1) and not found["2"].truncated


def test_weights_of_what_is_left_keep_their_ratios_and_the_mean():
    weights = {"a": 0.5, "b": 1.5, "c": 1.0, "d": 1.0}
    assert weights_with_references(weights, dict.fromkeys("abcdx")) == weights
    left = weights_with_references(weights, dict.fromkeys("abd"))
    assert left == pytest.approx({"a": 2 / 3, "b": 2, "c": 0, "d": 4 / 3})
    with pytest.raises(ConfigError, match="the references of 1 of 2 problems are dropped"):
        weights_with_references({"a": 2.0, "b": 0.0}, {"b": None})


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"max_attempts": 3}, r"references.max_attempts is 3 and references.wrong is keep"),
        ({"wrong": RESAMPLE, "max_attempts": 1}, r"max_attempts is 1 and references.wrong is res"),
        ({"wrong": DROP, "max_attempts": 0}, r"references.max_attempts is 0"),
        ({"wrong": RESAMPLE, "temperature": 0.0}, r"references.temperature is 0"),
        ({"wrong": DROP, "source": ReferenceSource.solution}, r"nothing is sampled or graded"),
    ],
)
def test_settings_that_could_not_do_what_they_say_are_refused(settings, said):
    with pytest.raises(ConfigError, match=said):
        ReferencesConfig(**settings)
