"""The study's figures: paired over seeds, and no rate chosen on the seed that it is measured on."""

import json
import math
import re

import pytest
import study_arms
import study_summary
from study_summary import Interval

from nemo_paced.compose import with_config
from nemo_paced.config import Reestimation
from tests.documents import ROOT

RESULTS = ROOT / "benchmarks" / "results"
INTERVAL = re.compile(r"[+-]?0?\.\d+ ± 0?\.\d+")


def record(seed, arm, rate, heldout, old=0.8):
    suites = {name: {"mean": value} for name, value in (("heldout", heldout), ("old_skills", old))}
    own = {"tokens": 1, "problems": 1, "clipped": 0.0, "train_s": 1.0, "evaluate_s": 1.0}
    if arm == "base":
        own = {"pass_rates": {"below_0.2": 0.2, "above_0.8": 0.3, "mean": 0.5}}
    suites["heldout_t1"] = {"mean": heldout - 0.1}
    return {"seed": seed, "arm": arm, "learning_rate": rate} | suites | own


def test_an_interval_is_students():
    found = Interval.of([1.0, 2.0, 3.0])
    # t(.975, 2) = 4.30265, standard error 1 / sqrt(3)
    assert found.mean == 2
    assert found.high - found.mean == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert math.isnan(Interval.of([1.0]).low)


def test_differences_are_paired_by_seed():
    """Seeds differ by far more than arms: only paired differences are exact."""
    records = []
    for seed, level in enumerate((0.2, 0.5, 0.7)):
        records.append(record(seed, "base", 0.0, level, old=0.9))
        records.append(record(seed, "unweighted", 1e-4, level + 0.1, old=0.7))
        records.append(record(seed, "paced", 1e-4, level + 0.15, old=0.8))
    records.append(record(3, "unweighted", 1e-4, 0.9))  # paced has not come so far
    records.append(record(3, "base", 0.0, 0.8, old=0.9))
    found = study_summary.summary(records)
    arms = found["rates"]["0.0001"]
    paced = arms["paced"]
    assert paced["heldout_difference"]["seeds"] == 3
    assert paced["heldout_difference"]["mean"] == pytest.approx(0.05)
    assert paced["heldout_difference"]["high"] == pytest.approx(0.05)
    assert paced["forgetting"]["mean"] == pytest.approx(0.1)
    assert paced["forgetting_difference"]["mean"] == pytest.approx(-0.1)
    to_base = found["pairs"]["0.0001"]["paced minus base"]
    assert to_base["heldout"]["mean"] == pytest.approx(0.15)
    assert to_base["heldout_t1"]["high"] == pytest.approx(0.15)
    assert arms["unweighted"]["heldout"]["seeds"] == 4


def test_two_arms_are_compared_on_the_seeds_that_both_have():
    records = [record(seed, "base", 0.0, 0.5) for seed in range(3)]
    for seed in range(3):
        records.append(record(seed, "paced", 1e-4, 0.6 + 0.1 * seed))
        records += [record(seed, "hard_filter", 1e-4, 0.5 + 0.1 * seed)] * (seed < 2)
    pairs = study_summary.summary(records)["pairs"]["0.0001"]
    assert [label for label in pairs if "base" not in label] == ["paced minus hard_filter"]
    found = pairs["paced minus hard_filter"]["heldout"]
    assert found["seeds"] == 2 and found["mean"] == pytest.approx(0.1)


def test_a_seeds_own_figures_do_not_choose_its_rate():
    """Seed 0 alone likes the high rate: it must be measured at the low one, the others' best."""
    records = []
    for seed in range(4):
        records.append(record(seed, "base", 0.0, 0.5))
        for rate, good in ((1e-4, seed != 0), (1e-3, seed == 0)):
            records.append(record(seed, "unweighted", rate, 0.8 if good else 0.6))
    own = study_summary.summary(records)["own_rate"]["unweighted"]
    assert own["chosen"] == {"0.0001": 4}
    assert own["heldout"]["mean"] == pytest.approx((0.6 + 3 * 0.8) / 4)


def test_tables_and_plot_are_written(tmp_path):
    records = [
        record(seed, arm, rate, 0.5 + (0.01 + 0.001 * (seed - 1)) * (arm == "paced"))
        for seed in range(3)
        for arm, rate in (("base", 0.0), ("unweighted", 1e-4), ("paced", 1e-4))
    ]
    path = tmp_path / "study.json"
    lines = study_summary.write(records, path, {"machine": {"cores": 2}})
    written = json.loads(path.read_text())
    assert written["summary"]["rates"]["0.0001"]["paced"] and written["machine"]["cores"] == 2
    assert path.with_suffix(".png").stat().st_size > 1000
    page = path.with_suffix(".md").read_text()
    assert "\n".join(lines) in page and "leaves out 0: 4 of 9 are." in page
    assert page.count("**") == 2 * 4
    (row,) = [line for line in lines if line.startswith("| paced |")]
    assert "+0.010 ± " in row


def test_the_page_of_figures_is_that_of_the_stored_records():
    stored = json.loads((RESULTS / "study.json").read_text())
    found = study_summary.summary(stored["records"])
    assert (RESULTS / "study.md").read_text() == study_summary.page(found)


@pytest.mark.parametrize("page", [ROOT / "README.md", RESULTS.parent / "README.md"])
def test_intervals_that_are_quoted_are_those_of_the_study(page):
    known = {shortened(i) for i in INTERVAL.findall((RESULTS / "study.md").read_text())}
    quoted = {shortened(i) for i in INTERVAL.findall(page.read_text())}
    assert quoted and not quoted - known


def shortened(interval):
    """+0.010 ± 0.008 as +.010 ± .008"""
    return re.sub(r"\b0\.", ".", interval)


@pytest.mark.parametrize("arm", study_arms.ARMS)
def test_every_arm_composes(arm):
    found = []
    with_config(["--config-name", "quickstart", *study_arms.ARMS[arm].overrides], found.append)
    (config,) = found
    assert sum(stage.fraction for stage in config.stages) == 1
    assert ("two_stage" in arm or "reversed" in arm) == (len(config.stages) == 2)
    assert (config.weights.reestimate is Reestimation.free) == arm.startswith("free")


def test_the_reference_is_always_among_the_arms():
    assert study_arms.chosen("paced") == ["unweighted", "paced"]
    assert study_arms.chosen("core") == list(study_arms.CORE)
    with pytest.raises(ValueError, match="no arm 'pased'"):
        study_arms.chosen("paced,pased")
