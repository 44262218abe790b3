"""Which problems are measured, and what a measurement is said to show."""

from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from nemo_paced.commands.snr import default_out, show
from nemo_paced.config import (
    DivergenceKind,
    PacedConfig,
    ResponseSource,
    SnrConfig,
    StageConfig,
    StudentConfig,
    TeacherConfig,
)
from nemo_paced.records import PassRate
from nemo_paced.snr.plan import find_pass_rates, plan_bins, step_of, what_is_measured
from nemo_paced.snr.profile import EndVerdict
from nemo_paced.snr.record import BinRecord, SnrRecord
from nemo_paced.snr.summary import summarise
from nemo_paced.snr.text import lead, sentences, table_rows
from tests.block_sums import block_sums, snr_record


def row(name, correct, rollouts=10):
    return PassRate(name, correct, rollouts, correct, rollouts, correct / rollouts, 1.0, 0)


ROWS = [row(f"p{i}", i % 11) for i in range(440)]  # 40 of each of 0/10 .. 10/10


def test_bins_of_equal_width_hold_their_problems_and_1_belongs_to_the_last():
    bins = plan_bins(ROWS, SnrConfig(max_problems_per_bin=30, blocks=7))
    assert [b.available for b in bins] == [40] * 9 + [80]
    assert [b.problems for b in bins] == [30] * 10
    assert bins[3].pass_rate == pytest.approx(0.3)  # 3/10 is not in the bin before
    for b in bins:
        sizes = [len(block) for block in b.blocks]
        assert len(sizes) == 7 and max(sizes) - min(sizes) <= 1
        names = [name for block in b.blocks for name in block]
        assert len(set(names)) == 30
    assert plan_bins(ROWS, SnrConfig(max_problems_per_bin=30, blocks=7)) == bins
    other = plan_bins(ROWS, SnrConfig(max_problems_per_bin=30, blocks=7, seed=1))
    assert other[0].blocks != bins[0].blocks


def test_expected_pass_rates_are_those_of_the_problems_that_gave_the_counts():
    """True rates are uniform: the bin of 0 of 10 has a mean of 1/12 and not of 0."""
    rng = np.random.default_rng(0)
    truth = rng.uniform(size=20_000)
    rows = [row(f"p{i}", int(c)) for i, c in enumerate(rng.binomial(10, truth))]
    bins = plan_bins(rows, SnrConfig(max_problems_per_bin=10**6))
    by_id = dict(zip((r.id for r in rows), truth, strict=True))
    for b in bins:
        true_mean = np.mean([by_id[name] for block in b.blocks for name in block])
        assert b.expected_pass_rate == pytest.approx(true_mean, abs=0.01)


def test_a_bin_with_too_few_problems_is_not_measured():
    bins = plan_bins([row(f"p{i}", 5) for i in range(9)] + [row("q", 1)] * 3, SnrConfig())
    assert [b.problems for b in bins] == [0] * 5 + [9] + [0] * 4
    assert len(bins[5].blocks) == 9 and bins[1].available == 3


def settings(**snr):
    stages = [
        StageConfig(name="a", fraction=0.5),
        StageConfig(
            name="b",
            divergence=DivergenceKind.jsd,
            responses=ResponseSource.rollouts,
            fraction=0.5,
        ),
    ]
    return PacedConfig(
        stages=stages,
        student=StudentConfig(hf_path="s"),
        teacher=TeacherConfig(hf_path="t"),
        snr=SnrConfig(**snr),
    )


@pytest.mark.parametrize(
    ("snr", "expected"),
    [
        ({}, ("forward_kl", "references")),
        ({"divergence": DivergenceKind.jsd}, ("jsd", "rollouts")),
        ({"divergence": DivergenceKind.reverse_kl}, ("reverse_kl", "rollouts")),
        ({"divergence": DivergenceKind.adaptive_kl}, ("adaptive_kl", "references")),
        ({"responses": ResponseSource.rollouts}, ("forward_kl", "rollouts")),
    ],
)
def test_divergence_and_responses_follow_the_stages(snr, expected):
    kind, responses = what_is_measured(settings(**snr))
    assert (kind.value, responses.value) == expected


def test_each_thing_that_is_measured_has_a_file_of_its_own(tmp_path):
    model = tmp_path / "checkpoints" / "step_00000000"
    names = [
        default_out(settings(**snr), model, tmp_path).name
        for snr in (
            {},
            {"last_layers": 1},
            {"last_layers": 2},
            {"divergence": DivergenceKind.reverse_kl},
            {"responses": ResponseSource.rollouts},
            {"responses": ResponseSource.rollouts, "last_layers": 1},
        )
    ]
    assert names == [
        "step_00000000_forward_kl.json",
        "step_00000000_forward_kl_last_layers_1.json",
        "step_00000000_forward_kl_last_layers_2.json",
        "step_00000000_reverse_kl.json",
        "step_00000000_forward_kl_rollouts.json",
        "step_00000000_forward_kl_rollouts_last_layers_1.json",
    ]
    usual = default_out(settings(responses=ResponseSource.references), model, tmp_path)
    assert usual.name == names[0], "the same measurement, whether it was asked for or not"


def test_pass_rates_are_those_of_the_step_or_the_latest_before(tmp_path):
    model = tmp_path / "checkpoints" / "step_00000040"
    for name in ("pass_rates.parquet", "pass_rates/step_00000000.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "pass_rates" / "step_00000050.parquet").touch()
    config = settings()
    assert find_pass_rates(config, tmp_path, model, 40).name == "step_00000000.parquet"
    assert find_pass_rates(config, tmp_path, model, 50).name == "step_00000050.parquet"
    assert find_pass_rates(config, tmp_path, model, None).name == "step_00000050.parquet"
    given = replace(config, snr=replace(config.snr, pass_rates="mine.parquet"))
    assert find_pass_rates(given, tmp_path, model, 50).name == "mine.parquet"


def test_an_exported_model_has_no_step_and_a_file_by_its_name(tmp_path):
    start, exported = tmp_path / "start", tmp_path / "hf"
    config = replace(settings(), student=StudentConfig(hf_path=str(start)))
    assert step_of(config, start) == 0 and step_of(config, exported) is None
    assert default_out(config, start, tmp_path).name == "step_00000000_forward_kl.json"
    assert default_out(config, exported, tmp_path).name == "hf_forward_kl.json"


@pytest.mark.parametrize(
    ("step", "pass_rates_step", "told"),
    [
        (200, 200, "step 200, pass rates of step 200"),
        (200, 0, "step 200, pass rates of step 0 (the student has moved since step 0)"),
        (None, 300, "model hf, pass rates of step 300 (hf does not say which step it is of, and "
                    "the table is the run's newest, of step 300)"),
        (None, None, "model hf, pass rates of a table that was given"),
    ],
)  # fmt: skip
def test_the_first_line_says_whose_pass_rates_they_are(step, pass_rates_step, told):
    found = snr_record(lambda p: 0.3, lambda p: 1.0, problems=40)
    found = replace(found, model="RUN/hf", step=step, pass_rates_step=pass_rates_step)
    assert lead(found).endswith(f"gradient of the LM head, {told}")


def test_a_profile_as_the_theory_has_it_is_said_to_fall():
    found = snr_record(lambda p: (p * (1 - p)) ** 0.5, lambda p: 1.0)
    summary = summarise(found)
    assert summary.low_end.verdict is summary.high_end.verdict is EndVerdict.falls
    assert summary.snr_law.a.value == pytest.approx(1, abs=0.25)
    assert summary.signal_law.b.value == pytest.approx(1, abs=0.25)
    assert summary.variance_ratio.value == pytest.approx(1.2, abs=0.05)  # a_s = b_s = 1/2
    assert summary.variance_ratio.low < 1.2 < summary.variance_ratio.high
    # w* is SNR^2 / (1 + SNR^2): at this SNR not quite the kernel any more
    off = np.log((1 + 0.25) / (1 + 0.05 * 0.95)) / 2
    assert summary.deviation.low <= off <= summary.deviation.high
    assert summary.deviation.guaranteed_efficiency > 0.9
    text = "\n".join(sentences(found, summary))
    assert "NOT" not in text and "SNR falls towards pass rate 0" in text


def test_a_profile_that_does_not_fall_is_said_so_and_what_the_kernel_does_then():
    found = snr_record(lambda p: 0.5, lambda p: 10 * (1.05 - p))
    summary = summarise(found)
    assert summary.low_end.verdict is summary.high_end.verdict is EndVerdict.does_not_fall
    assert summary.to_dict()["low_end"]["verdict"] == "does_not_fall"
    text = "\n".join(sentences(found, summary))
    assert "SNR does NOT fall towards pass rate 0 as the kernel does" in text
    assert "holds down the gradients of hopeless problems" in text
    assert "gives up gradients with a signal" in text  # at 1, where they are small
    assert summary.deviation.low > 0.3
    assert table_rows(summary)[1][0] == "0.00-0.10"


def test_an_unbounded_exponent_is_said_so_and_there_is_no_variance_ratio():
    found = snr_record(lambda p: 0.5 * p**9, lambda p: 1.0)
    summary = summarise(found)
    assert summary.variance_ratio is None
    text = "\n".join(sentences(found, summary))
    assert "a' = unbounded (the fit ends at 10)" in text and "variance ratio R: none" in text


def test_a_record_comes_back_as_it_was_written(tmp_path):
    found = snr_record(lambda p: 0.3, lambda p: 1.0, problems=40)
    found.bins[2] = replace(found.bins[2], sums=None, expected_pass_rate=float("nan"))
    found.write(tmp_path / "a.json", summarise(found).to_dict())
    again = SnrRecord.read(tmp_path / "a.json")
    again.write(tmp_path / "b.json", summarise(again).to_dict())
    assert (tmp_path / "a.json").read_text() == (tmp_path / "b.json").read_text()


def planned_record(snr_of, rollouts, problems, seed=0):
    """Gradients of problems whose uniform pass rates are known by ``rollouts`` draws alone."""
    rng = np.random.default_rng(seed)
    truth = rng.uniform(size=problems)
    rows = [row(str(i), int(c), rollouts) for i, c in enumerate(rng.binomial(rollouts, truth))]
    made = snr_record(lambda p: 0.0, lambda p: 1.0, problems=20)
    made.bins = []
    for b in plan_bins(rows, SnrConfig(max_problems_per_bin=10**6)):
        sums = None
        if b.blocks:
            rate = truth[[int(name) for block in b.blocks for name in block]]
            gradients = rng.normal(0, 200**-0.5, size=(len(rate), 200))
            gradients[:, 0] += snr_of(rate)
            sums = block_sums(gradients, np.repeat(range(len(b.blocks)), [*map(len, b.blocks)]))
        made.bins.append(
            BinRecord(b.low, b.high, b.available, b.pass_rate, b.expected_pass_rate, sums)
        )
    return made


def as_kernel(p):
    weight = 0.4 * p * (1 - p)
    return (weight / (1 - weight)) ** 0.5


@pytest.mark.parametrize(
    ("snr_of", "rollouts", "problems", "verdict", "told"),
    [
        # the outermost bin of 4 rollouts holds pass rates of all kinds: the kernel there is .6
        (lambda p: 0.5, 4, 4000, EndVerdict.does_not_fall, "does NOT fall towards pass rate 0"),
        (as_kernel, 4, 4000, EndVerdict.falls, "SNR falls towards pass rate 0"),
        (lambda p: 0.1, 8, 300, EndVerdict.not_shown, "0 cannot be told from so many problems"),
        (as_kernel, 1, 4000, None, None),
    ],
)
def test_an_end_is_read_as_what_its_problems_can_show(snr_of, rollouts, problems, verdict, told):
    found = planned_record(snr_of, rollouts, problems)
    summary = summarise(found)
    if verdict is None:  # two bins have no middle
        assert summary.low_end is None
        return
    assert summary.low_end.verdict is verdict
    assert told in "\n".join(sentences(found, summary))


def test_where_the_kernel_does_not_fall_nothing_can_be_told():
    found = replace(snr_record(lambda p: 0.5, lambda p: 1.0), alpha=0.0)  # the kernel is 1 - p
    summary = summarise(found)
    assert summary.low_end.verdict is EndVerdict.not_shown
    assert summary.high_end.verdict is EndVerdict.does_not_fall
    assert "the kernel itself hardly falls up to" in "\n".join(sentences(found, summary))


@pytest.mark.parametrize(
    ("estimator", "alpha", "told"),
    [
        ("plug_in", 1.0, "that is not for problems that no rollout or every rollout solved"),
        ("plug_in", 0.0, "that is not for problems that every rollout solved"),
        ("posterior", 1.0, None),
        (None, 1.0, None),
    ],
)
def test_an_efficiency_does_not_cover_weights_of_exactly_0(estimator, alpha, told):
    found = snr_record(lambda p: 0.5, lambda p: 1.0)
    found = replace(found, estimator=estimator, alpha=alpha)
    text = "\n".join(sentences(found, summarise(found)))
    assert "for the best scale of the weights" in text
    assert told in text if told else "plug_in" not in text


def silenced(found, names):
    """The record with gradients of 0 in these bins."""
    for index in names:
        sums = block_sums(np.zeros((40, 5)), np.arange(40) % 20)
        found.bins[index] = replace(found.bins[index], sums=sums)
    return found


def test_bins_whose_gradients_are_all_0_have_no_ratio(tmp_path):
    found = silenced(snr_record(lambda p: 0.5, lambda p: 1.0), [9])
    summary = summarise(found)
    assert summary.rows[9].found is None and summary.high_end.pass_rate == 0.85
    assert table_rows(summary)[10][2] == "40/400"
    assert "no SNR in 0.90-1.00: the gradients" in "\n".join(sentences(found, summary))
    found = silenced(found, range(10))
    summary = summarise(found)
    assert summary.low_end is summary.high_end is summary.deviation is summary.snr_law is None
    text = "\n".join(sentences(found, summary))
    assert "nan" not in text and "NOT" not in text
    found.write(tmp_path / "snr.json", summary.to_dict())
    show(tmp_path / "snr.json", Console())
