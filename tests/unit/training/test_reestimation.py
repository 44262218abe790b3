"""Pass rates before and during training, through the real store, grader and driver; only the model
behind the client is scripted, since its verdicts have to be known."""

import dataclasses
import json
import logging
from types import SimpleNamespace

import numpy as np
import pandas
import pytest

from nemo_paced.compose import with_config
from nemo_paced.config import (
    AdaptiveConfig,
    DivergenceKind,
    Estimator,
    GradingConfig,
    Reestimation,
    ReferenceSource,
    ResponseSource,
    StageConfig,
    WeightScheme,
    WeightsConfig,
)
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import ConfigError, RolloutError
from nemo_paced.grading.answers import Comparison
from nemo_paced.grading.evidence import Evidence
from nemo_paced.grading.grader import Grader, Verdict
from nemo_paced.grading.verdicts import Verdicts
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.run.progress import RunLog, progress_bar
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.training import prepare
from nemo_paced.training.driver import Driver
from nemo_paced.training.schedule import reestimation_due, stages
from nemo_paced.weights.beta_kernel import beta_weight
from nemo_paced.weights.pass_rates import PassRateTable
from tests.outcomes import right_or_wrong
from tests.scripted_client import ScriptedClient

TRUE_RATES = {f"p{i:02d}": rate for i, rate in enumerate(np.linspace(0, 1, 20))}
POSTERIOR = WeightsConfig(estimator=Estimator.posterior)
FREE = WeightsConfig(estimator=Estimator.posterior, reestimate=Reestimation.free)
FREE_PLUG_IN = WeightsConfig(reestimate=Reestimation.free, exploration=0.3)
ADAPTIVE = WeightsConfig(
    estimator=Estimator.posterior,
    fit_prior=True,
    num_rollouts=8,
    adaptive=AdaptiveConfig(enabled=True, rollouts_per_round=0.5, max_rollouts=32),
)


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    path = tmp_path / "problems.jsonl"
    rows = [
        {"id": i, "problem": f"solve s{n % 8} s{n // 8} f8 =", "answer": "s8", "solution": "s8"}
        for n, i in enumerate(TRUE_RATES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(weights):
        composed = []
        overrides = [f"data.problems={path}", "model.global_batch_size=8", "schedule=reverse_kl",
                     "data.validation_problems=null", "rollout.endpoints=[http://127.0.0.1:9]",
                     "weights.reestimate=never"]  # fmt: skip
        with_config(["--config-name", "quickstart", *overrides], composed.append)
        return dataclasses.replace(composed[0], weights=weights)

    return make


def client_of(prompts, **options):
    return ScriptedClient(TRUE_RATES, prompts.response("s8"), prompts.response("s9"), **options)


def estimate(config, run_dir, **options):
    """``pass-rates`` with a scripted model; returns its client and the table."""
    problems = load_problems(config.data.problems)
    prompts = prepare.make_prompts(config)
    with (
        progress_bar(enabled=False) as bar,
        prepare.student_sampler(config, run_dir, prompts, lambda note: None) as sampler,
    ):
        sampler.client = client_of(prompts, **options)
        try:
            return sampler.client, prepare.estimate_pass_rates(
                config, problems, sampler, run_dir, step=0, bar=bar
            )
        except RolloutError:
            return sampler.client, None


def start(config, run_dir, resumed_from=None):
    run_dir.mkdir(exist_ok=True)
    driver = Driver(config, run_dir)
    driver.find_references(RunLog(config, run_dir, 0, enabled=False))
    driver.start_servers(resumed=resumed_from is not None)
    if driver.sampling_s is not None:
        driver.sampler.client = client_of(driver.prompts)
    try:
        driver.first_pass_rates(resumed_from)
    except ConfigError:
        driver.__exit__(
            None, None, None
        )  # what a run's own context manager does: the store is held no longer
        raise
    return driver


def train(driver, steps):
    """The batches of these steps; the table moves as the driver lets it."""
    stage = driver.config.stages[0]
    size = driver.config.model.global_batch_size
    return [driver.batch(step, step * size, stage) for step in steps]


def test_adaptive_rollouts_spend_the_budget_unevenly(make_config, tmp_path):
    client, table = estimate(make_config(ADAPTIVE), tmp_path)
    counts = [row.num_rollouts for row in table.rows]
    assert sum(counts) == client.samples_asked == 8 * len(TRUE_RATES)
    assert min(counts) >= 2 and max(counts) > 10
    assert np.mean(list(table.weights().values())) == pytest.approx(1)
    frame = pandas.read_parquet(tmp_path / "pass_rates.parquet")
    assert frame["num_rollouts"].tolist() == counts


@pytest.mark.parametrize("break_after", [0, 7, 20, 26, 41])
def test_an_interrupted_adaptive_estimate_asks_for_nothing_twice(
    make_config, tmp_path, break_after
):
    config = make_config(ADAPTIVE)
    _, whole = estimate(config, tmp_path / "whole")
    first, none = estimate(config, tmp_path / "broken", break_after=break_after)
    assert none is None
    second, resumed = estimate(config, tmp_path / "broken")
    assert resumed == whole
    assert first.samples_asked + second.samples_asked == 8 * len(TRUE_RATES)


def test_a_larger_budget_goes_on_from_a_smaller_one(make_config, tmp_path):
    small = dataclasses.replace(ADAPTIVE, num_rollouts=4)
    estimate(make_config(small), tmp_path / "grown")
    client, grown = estimate(make_config(ADAPTIVE), tmp_path / "grown")
    assert client.samples_asked == 4 * len(TRUE_RATES)
    _, at_once = estimate(make_config(ADAPTIVE), tmp_path / "at_once")
    assert grown == at_once


def test_a_target_error_ends_before_the_budget(make_config, tmp_path):
    adaptive = dataclasses.replace(ADAPTIVE.adaptive, target_error=0.6)
    config = make_config(dataclasses.replace(ADAPTIVE, adaptive=adaptive))
    client, table = estimate(config, tmp_path)
    assert len(TRUE_RATES) * 2 <= client.samples_asked < len(TRUE_RATES) * 8
    assert sum(row.num_rollouts for row in table.rows) == client.samples_asked


def test_an_estimate_says_how_many_responses_were_cut_and_had_no_answer(
    make_config, tmp_path, caplog
):
    with caplog.at_level(logging.INFO):
        _, table = estimate(make_config(POSTERIOR), tmp_path, wrong_finish="length")
    wrong = 1 - np.mean([row.pass_rate for row in table.rows])
    (line,) = [r.message for r in caplog.records if "problems at 0" in r.message]
    shares = f"{100 - 100 * wrong:.0f} % right, {100 * wrong:.0f} % cut before an answer"
    assert f"of 160 responses: {shares}; {100 * wrong:.0f} % were cut at 16 tokens" in line
    (grounds,) = [r.message for r in caplog.records if r.message.startswith("verdicts at step 0")]
    assert "right ones by last word 100 %" in grounds
    verdicts = Verdicts.read(tmp_path / "pass_rates" / "step_00000000.verdicts.json")
    assert len(verdicts) == 160 and verdicts.share(Outcome.truncated) == pytest.approx(wrong)
    assert sum(row.num_truncated for row in table.rows) == verdicts.number(Outcome.truncated)
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


def test_an_estimate_without_any_verdict_is_refused_and_leaves_no_table(
    make_config, tmp_path, monkeypatch, caplog
):
    late = Verdict(Outcome.timed_out, "7", "timed out", Evidence.box, Comparison.symbolic)
    monkeypatch.setattr(Grader, "grade", lambda self, *args, **kwargs: late)
    client, table = estimate(make_config(POSTERIOR), tmp_path)
    assert table is None and client.samples_asked == 160
    assert not (tmp_path / "pass_rates.parquet").exists()
    monkeypatch.undo()
    monkeypatch.setenv(API_KEY_VARIABLE, "key")
    later = dataclasses.replace(make_config(POSTERIOR), grading=GradingConfig("exact", 6.0))
    with caplog.at_level(logging.INFO):
        client, table = estimate(later, tmp_path)
    assert table is not None and client.samples_asked == 0, "they are graded again"
    assert "graded again: 160 of 160 verdicts are others" in caplog.text


def test_outcomes_of_a_step_are_logged_and_what_has_no_verdict_is_left_out_of_the_accuracy():
    outcomes = [Outcome.right, Outcome.wrong, Outcome.timed_out, Outcome.truncated]
    rollouts = [Rollout(str(k), "a", (1,), outcome=each) for k, each in enumerate(outcomes)]
    driver = SimpleNamespace(prompts=SimpleNamespace(thoughts=None))
    metrics = Driver._rollout_metrics(driver, rollouts)
    assert metrics["rollout/accuracy"] == pytest.approx(1 / 3)
    assert [metrics[f"rollout/{name}"] for name in ("wrong", "timed_out", "no_answer")] == [
        0.25,
        0.25,
        0.0,
    ]
    assert metrics["rollout/cut_before_answer"] == 0.25
    late = [rollouts[2]]
    assert "rollout/accuracy" not in Driver._rollout_metrics(driver, late), "there is none"


def test_pass_rates_at_the_ends_are_warned_of_with_what_is_likely_wrong(
    make_config, tmp_path, caplog, monkeypatch
):
    monkeypatch.setattr(
        f"{__name__}.TRUE_RATES", dict.fromkeys(TRUE_RATES, 0.0) | {"p00": 0.5, "p01": 1.0}
    )
    with caplog.at_level(logging.WARNING):
        estimate(make_config(POSTERIOR), tmp_path, wrong_finish="length")
    (record,) = caplog.records
    assert "19 of 20 problems lie at a pass rate of 0 or 1" in record.message
    assert "of the responses were cut. Likely causes" in record.message


def test_an_estimate_with_too_many_cut_responses_ends_the_run_and_is_kept(make_config, tmp_path):
    config = make_config(POSTERIOR)
    config.rollout.max_truncated_share = 0.2
    prompts, problems = prepare.make_prompts(config), load_problems(config.data.problems)
    with (
        progress_bar(enabled=False) as bar,
        prepare.student_sampler(config, tmp_path, prompts, lambda note: None) as sampler,
    ):
        sampler.client = client_of(prompts, wrong_finish="length")
        with pytest.raises(RolloutError, match=r"above rollout.max_truncated_share 0.2. Likely"):
            prepare.estimate_pass_rates(config, problems, sampler, tmp_path, step=0, bar=bar)
    assert len(pandas.read_parquet(tmp_path / "pass_rates.parquet")) == 20


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("weights", [FREE, FREE_PLUG_IN])
def test_a_resumed_run_weighs_as_an_uninterrupted_one(make_config, tmp_path, weights, ahead):
    config = make_config(weights)
    config.rollout.max_staleness = ahead
    with start(config, tmp_path / "whole") as driver:
        batches = train(driver, range(8))
        whole = driver.table
    with start(config, tmp_path / "killed") as driver:
        train(driver, range(3 + ahead))
        driver.save_pass_rates(3)  # as the checkpoint of step 3 does; what follows is lost
        saved = tmp_path / "checkpoint"
        saved.mkdir()
        (saved / "pass_rates.parquet").write_bytes(
            (tmp_path / "killed" / "pass_rates.parquet").read_bytes()
        )
        train(driver, range(3 + ahead, 6))
    with start(config, tmp_path / "killed", resumed_from=saved) as driver:
        again = train(driver, range(3, 8))
        assert driver.table == whole
        assert again == batches[3:]
        assert driver.sampler.client.requests < sum(8 for _ in again), "the store had steps 3 to 5"
    versions = {p.name for p in (tmp_path / "killed" / "pass_rates").glob("*.parquet")}
    assert versions == {"step_00000000.parquet", "step_00000003.parquet"}
    assert (
        pandas.read_parquet(tmp_path / "killed" / "pass_rates.parquet")["student_step"] == 3
    ).all()


UNWEIGHTED = WeightsConfig(scheme=WeightScheme.unweighted)


def test_an_unweighted_run_on_stored_responses_asks_nobody(make_config, tmp_path):
    config = make_config(UNWEIGHTED)
    stored = StageConfig(responses=ResponseSource.references, divergence=DivergenceKind.forward_kl)
    references = dataclasses.replace(config.references, source=ReferenceSource.solution)
    config = dataclasses.replace(config, stages=[stored], references=references)
    for resumed in (False, True):
        assert not config.asks_student(resumed=resumed)
    (tmp_path / "run").mkdir()
    driver = Driver(config, tmp_path / "run")
    driver.find_references(RunLog(config, tmp_path / "run", 0, enabled=False))
    driver.start_servers(resumed=False)
    driver.first_pass_rates(None)
    assert driver.sampling_s is None and driver.table.is_unknown
    (batch,) = train(driver, [0])
    assert len(batch.items) == 8 and not [name for name in batch.metrics if "weights/" in name]
    driver.save_pass_rates(1)
    assert not list((tmp_path / "run").rglob("*.parquet")), "nothing is known, nothing written"
    resumed = Driver(config, tmp_path / "run")
    resumed.find_references(RunLog(config, tmp_path / "run", 0, enabled=False))
    resumed.first_pass_rates(tmp_path / "checkpoint")
    assert resumed.table.weights() == driver.table.weights() == dict.fromkeys(TRUE_RATES, 1.0)


def test_who_is_asked_for_what(make_config, tmp_path):
    stored = StageConfig(responses=ResponseSource.references, divergence=DivergenceKind.forward_kl)
    weighted = dataclasses.replace(make_config(POSTERIOR), stages=[stored])
    assert weighted.asks_student(resumed=False) and not weighted.asks_student(resumed=True)
    given = dataclasses.replace(POSTERIOR, pass_rates="table.parquet")
    assert not dataclasses.replace(weighted, weights=given).asks_student(resumed=False)
    watched = dataclasses.replace(
        UNWEIGHTED, reestimate=Reestimation.every_n_steps, reestimate_every_n_steps=5
    )
    for weights, expected in ((UNWEIGHTED, False), (watched, True)):
        changed = dataclasses.replace(weighted, weights=weights)
        assert changed.asks_student(resumed=False) is expected
        assert changed.asks_student(resumed=True) is expected
    on_policy = make_config(UNWEIGHTED)
    assert on_policy.asks_student(resumed=True) and not UNWEIGHTED.estimates


def test_free_updates_use_the_steps_own_rollouts_and_no_others(make_config, tmp_path):
    with start(make_config(FREE), tmp_path / "run") as driver:
        asked = driver.sampler.client.samples_asked
        before = driver.table
        batch = train(driver, [0])[0]
        assert driver.sampler.client.samples_asked - asked == 8, "one a problem, as ever"
        counts = {row.id: row.num_rollouts for row in driver.table.rows}
        seen = {item.problem_id for item in batch.items}
        assert counts == {i: 8 + (i in seen) for i in TRUE_RATES}
        assert driver.table.weights() != before.weights()
        assert np.mean(list(driver.table.weights().values())) == pytest.approx(1)
        by_id = before.weights()
        for item in batch.items:  # token_sum: the weight over the problems of the batch
            assert item.token_weight == pytest.approx(by_id[item.problem_id] / 8)
    with start(make_config(POSTERIOR), tmp_path / "fixed") as driver:
        before = driver.table
        train(driver, range(4))
        assert driver.table is before


def test_explored_problems_are_graded_but_not_trained_on(make_config, tmp_path):
    """p00 and p19 are always wrong and right: of weight 0 at first, and seen again all the same."""
    always = dataclasses.replace(FREE_PLUG_IN, exploration=1.0)
    with start(make_config(always), tmp_path / "all") as driver:
        zero = {i for i, weight in driver.table.weights().items() if weight == 0}
        assert {"p00", "p19"} <= zero
        first_epoch = train(driver, range(3))
        trained = {item.problem_id for batch in first_epoch[:2] for item in batch.items}
        assert not trained & zero
        assert all(row.num_rollouts > 8 for row in driver.table.rows)
    sometimes = dataclasses.replace(FREE_PLUG_IN, exploration=0.3)
    with start(make_config(sometimes), tmp_path / "some") as driver:
        train(driver, range(50))  # 20 epochs
        rows = {row.id: row for row in driver.table.rows}
        assert 1 <= rows["p00"].num_rollouts - 8 <= 14, "about 6 of 20"
        assert rows["p10"].num_rollouts - 8 == 20


def test_drift_is_logged_with_every_batch(make_config, tmp_path):
    with start(make_config(FREE), tmp_path / "run") as driver:
        metrics = train(driver, [0])[0].metrics
        assert metrics["weights/mean_pass_rate"] == pytest.approx(
            np.mean([row.pass_rate for row in driver.table.rows])
        )
        assert 1 < metrics["weights/effective_sample_size"] <= len(TRUE_RATES)


def drifting_tables(discount, *, epochs=12, seed=0):
    """RMS errors of the weights of step 0 and of freely updated ones, when every pass rate rose
    from p to p + 0.8 (1 - p) meanwhile."""
    rng = np.random.default_rng(seed)
    start_rates = rng.random(500)
    problems = [Problem(str(i), "x", "1") for i in range(500)]

    def rollouts(rates, count):
        right = rng.random((500, count)) < rates[:, None]
        return [Rollout(f"{i}/{k}", str(i), (1,), outcome=right_or_wrong(right[i, k]))
                for i in range(500) for k in range(count)]  # fmt: skip

    weights = dataclasses.replace(FREE, discount=discount)
    fixed = table = PassRateTable.estimate(
        rollouts(start_rates, 8), problems, weights, student_step=0
    )
    for epoch in range(1, epochs + 1):
        rates = start_rates + 0.8 * epoch / epochs * (1 - start_rates)
        table = table.updated(rollouts(rates, 1), weights, student_step=epoch)
    truth = beta_weight(rates) / beta_weight(rates).mean()

    def error(table):
        return np.sqrt(((np.array(list(table.weights().values())) - truth) ** 2).mean())

    return error(fixed), error(table)


def test_free_updates_follow_a_student_that_learns():
    fixed, discounted = np.mean([drifting_tables(0.9, seed=s) for s in range(3)], axis=0)
    _, undiscounted = np.mean([drifting_tables(1.0, seed=s) for s in range(3)], axis=0)
    assert discounted < 0.7 * fixed
    assert discounted < undiscounted - 0.01


def test_each_rollout_discounts_what_was_known_of_its_problem():
    problems = [Problem(name, "x", "1") for name in "ab"]
    old = [
        Rollout(f"{n}/{k}", n, (1,), outcome=right_or_wrong(k < 3)) for n in "ab" for k in range(4)
    ]
    config = dataclasses.replace(FREE, discount=0.5)
    table = PassRateTable.estimate(old, problems, config, student_step=2)
    new = [
        Rollout("a/9", "a", (1,), outcome=right_or_wrong(True)),
        Rollout("a/10", "a", (1,), outcome=right_or_wrong(False)),
    ]
    a, b = table.updated(new, config, student_step=7).rows
    assert (a.effective_correct, a.effective_rollouts) == (0.5 * (0.5 * 3 + 1), 0.5 * (2 + 1) + 1)
    assert (a.num_correct, a.num_rollouts, a.student_step) == (4, 6, 7)
    assert a.pass_rate == a.effective_correct / a.effective_rollouts
    assert (b.effective_correct, b.effective_rollouts, b.student_step) == (3, 4, 7)
    assert a.weight + b.weight == pytest.approx(2)


def test_unequal_numbers_of_rollouts_are_refused_to_the_plug_in(make_config, tmp_path):
    estimate(make_config(ADAPTIVE), tmp_path)
    path = tmp_path / "pass_rates.parquet"
    config = make_config(WeightsConfig(pass_rates=str(path)))
    with pytest.raises(ConfigError, match=r"weights.estimator is plug_in, which is biased then"):
        start(config, tmp_path / "run")
    given = dataclasses.replace(POSTERIOR, pass_rates=str(path))
    with start(make_config(given), tmp_path / "run") as driver:
        assert driver.sampler.client.samples_asked == 0


def test_estimates_are_due_at_switches_and_every_n_steps():
    first, second = stages(
        [StageConfig(name="a", fraction=0.5),
         StageConfig(name="b", fraction=0.5, reestimate_pass_rates=True)], 10,
    )  # fmt: skip
    of = {step: first if step < 5 else second for step in range(10)}
    never = WeightsConfig(scheme=WeightScheme.beta_kernel)
    assert [s for s in of if reestimation_due(never, of[s], s)] == [5]
    every = WeightsConfig(reestimate=Reestimation.every_n_steps, reestimate_every_n_steps=4)
    assert [s for s in of if reestimation_due(every, of[s], s)] == [4, 5, 8]
    never, every = (dataclasses.replace(w, scheme=WeightScheme.unweighted) for w in (never, every))
    assert not [s for s in of if reestimation_due(never, of[s], s)], "no weight would follow"
    assert [s for s in of if reestimation_due(every, of[s], s)] == [4, 8], "asked for by name"
