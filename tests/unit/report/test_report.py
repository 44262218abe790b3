import json
import re
import shutil
from xml.etree import ElementTree

import pytest
import yaml

from nemo_paced.commands import report as command
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import ResultsFile
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.report.run_page import write_report
from nemo_paced.report.sections.accuracy import forgetting_section, verdict
from nemo_paced.report.sections.pass_rates import DRIFT
from nemo_paced.report.sections.section import rows_by_stage
from nemo_paced.report.sections.timing import PARTS, RATES, split, split_table
from nemo_paced.run.metric_names import METRICS
from tests.runs import (
    metric_lines,
    results,
    start,
    write_certificate,
    write_run,
    write_starts,
)

SETTINGS = {"temperature": 0.6, "top_p": 0.95}
TITLES = (
    "Accuracy", "Difference from base", "Forgetting", "Accuracy by kind of problem", "Pass rates",
    "Weights from step 30 on", "Drift of pass rates", "Loss", "Divergence of a token",
    "Gradient norm", "Validation", "Trainer against rollout server", "Training rollouts",
    "Where the time went", "Throughput", "Waiting", "Gradient signal-to-noise ratio",
    "Environment", "Configuration",
)  # fmt: skip


def section(page, title):
    """The part of the page under a heading, up to the next one."""
    return page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def test_a_whole_run_shows_every_part_and_misses_none(tmp_path):
    run = write_run(tmp_path / "run")
    ResultsFile(results(paced=0.1), SETTINGS).write(run / "results.json")
    page = write_report(run).read_text()
    for title in TITLES:
        assert f"<h2>{title}</h2>" in page
    assert 'class="missing"' not in page
    assert "60 of 60 optimizer steps: 30 of forward_kl, 30 of reverse_kl." in page
    assert "weights beta_kernel with exponents 1, 1, estimator plug_in." in page
    assert "temperature 0.6" in section(page, "Accuracy")
    assert "1 skipped" in section(page, "Gradient norm")
    assert "max_steps: 60" in section(page, "Configuration")


def test_the_page_needs_nothing_but_itself(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    addresses = re.findall(r'(?:src|href|url)\s*[=(]\s*["\']?([^"\')\s>]+)', page)
    assert addresses and all(address.startswith("#") for address in addresses)
    assert "<script" not in page and "@import" not in page and "<link" not in page


def test_figures_are_well_formed_and_share_no_ids(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    figures = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(figures) >= 10
    definitions = {}
    for figure in figures:
        root = ElementTree.fromstring(figure)
        assert root.get("role") == "img" and root.get("aria-label")
        for element in root.iter():
            if name := element.get("id"):
                text = ElementTree.tostring(element)
                assert definitions.setdefault(name, text) == text, "one id, two meanings"
        assert "currentColor" in figure and "#010203" not in figure


def test_the_same_run_gives_the_same_page(tmp_path):
    run = write_run(tmp_path / "run")
    assert write_report(run).read_text() == write_report(run).read_text()


@pytest.mark.parametrize(
    ("removed", "said"),
    [
        ("metrics.jsonl", "No optimizer step was taken yet."),
        ("pass_rates", "Pass rates were estimated once"),
        ("results.json", "Not evaluated yet: nemo-paced evaluate"),
        ("config.yaml", "There is no config.yaml."),
        ("environment.json", "There is no environment.json: training writes it"),
    ],
)
def test_a_missing_part_is_said_to_be_missing(tmp_path, removed, said):
    run = write_run(tmp_path / "run")
    ResultsFile(results(paced=0.1), {}).write(run / "results.json")
    path = run / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    page = write_report(run).read_text()
    assert said in page and page.count('class="missing"') == 1


def test_what_became_of_the_responses_is_told_with_what_right_ones_rest_on(tmp_path):
    run = write_run(tmp_path / "run")
    shown = section(write_report(run).read_text(), "Verdicts behind the pass rates")
    heads = ("right", "wrong", "truncated", "timed out", "right by box", "right by last number")
    assert [f">{head}<" in shown for head in heads] == [True] * len(heads)
    assert "no answer" not in shown.partition("</table>")[0], "there was none"
    for cell in ("960", "52 %", "38 %", "10 %", "0.1 %", "42 %"):
        assert f">{cell}<" in shown
    for path in (run / "pass_rates").glob("*.json"):
        path.unlink()
    assert "Verdicts behind" not in write_report(run).read_text()


def test_the_certificate_of_an_fp8_teacher_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    assert "Teacher in FP8" not in write_report(run).read_text()
    write_certificate(run)
    shown = section(write_report(run).read_text(), "Teacher in FP8")
    for figure in ("0.00123", "0.0004", "0.02", "0.31", "98.77%", "4.56%", "0.99891"):
        assert f">{figure}<" in shown
    assert "812 tokens of 16 rollouts" in shown and "recipe rowwise; torch 2.13.0" in shown
    assert "<td>0.02</td>" in shown, "the bound of the run's configuration"


def test_a_certificate_that_is_still_to_be_measured_is_missed(tmp_path):
    run = write_run(tmp_path / "run")
    text = (run / "config.yaml").read_text()
    settings = yaml.safe_load(text)
    settings["teacher"]["fp8"]["enabled"] = True
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    assert "there is no fp8_certificate.json yet" in write_report(run).read_text()


def test_the_time_of_a_step_is_split_and_nothing_is_lost(tmp_path):
    """A stage is 30 steps of .9 s and a validation of 2 s; teacher .1 s a step, once none."""
    rows = metric_lines(60)
    parts = {stage: split(own) for stage, own in rows_by_stage(rows).items()}
    assert parts["forward_kl"]["teacher"] == pytest.approx(2.9)
    assert parts["reverse_kl"]["wait for rollouts"] == pytest.approx(9.0)
    assert parts["reverse_kl"]["weights to server"] == pytest.approx(4.5)
    for stage in parts.values():
        assert sum(stage.values()) == pytest.approx(29.0)
    cells = {row[0]: row[1:] for row in split_table(parts)}
    assert cells["student"] == ["9.00 s (31%)", "9.00 s (31%)"]
    assert cells["wait for rollouts"] == ["0.03 s (0%)", "9.00 s (31%)"]
    assert cells["validation"] == ["2.00 s (7%)", "2.00 s (7%)"] and "checkpoint" not in cells
    assert cells["weights to server"][0] == "-" and cells["all"] == ["29.0 s", "29.0 s"]
    # a part that is too small for a row of its own is in `other`
    for own in parts.values():
        own |= {"checkpoint": 0.02, "other": own["other"] - 0.02}
    again = {row[0]: row[1:] for row in split_table(parts)}
    assert "checkpoint" not in again and again["other"] == cells["other"]


def test_each_timed_part_is_a_documented_metric():
    times = {name for name in METRICS if name.startswith("time/")}
    assert set(PARTS.values()) == times - {"time/step_s"}
    assert set(RATES.values()) <= set(METRICS)


def test_what_came_before_the_first_step_is_told(tmp_path):
    run = write_run(tmp_path / "run")
    write_starts(
        run, start(), start(20, preparation_s={"servers": 40.0}), start(30, preparation_s={})
    )
    shown = section(write_report(run).read_text(), "Where the time went")
    told = "Before the first step of 3 starts, not in the figure: "
    assert f"{told}references 310 s, servers 82.5 s, pass rates 95.0 s. What" in shown
    write_starts(run, start(preparation_s={}))  # an earlier release's, or it never got so far
    assert "Before the first" not in section(write_report(run).read_text(), "Where the time went")


def test_waits_and_throughput_are_told(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    waiting = section(page, "Waiting")
    assert "waited for rollouts 30% of the time, the servers sampled nothing 60%" in waiting
    assert "All were sampled with the current weights" in waiting
    throughput = section(page, "Throughput")
    assert re.search(r"<td>MFU</td>\s*<td>0.31</td>\s*<td>0.31</td>", throughput)


def test_the_environment_of_the_last_start_is_shown_and_how_earlier_ones_differed(tmp_path):
    run = write_run(tmp_path / "run")
    shown = section(write_report(run).read_text(), "Environment")
    for cell in (
        "16 x NVIDIA H100 80GB HBM3 (79 GiB), on 2 nodes",
        "0123456789ab",
        "12.8",
        "2.8.0",
    ):
        assert f"<td>{cell}</td>" in shown
    write_starts(
        run, start(), start(20, versions={"torch": "2.9.0"}), start(40, versions={"torch": "2.9.0"})
    )
    shown = section(write_report(run).read_text(), "Environment")
    assert "<td>2.9.0</td>" in shown and "from step 40" in shown
    assert "from step 0, with torch 2.8.0, megatron-core 0.16.1." in shown
    assert "from step 20, alike." in shown
    (run / "environment.json").write_text("{")
    with pytest.raises(ConfigError, match=r"environment\.json is no record of a run's starts"):
        write_report(run)


def test_pass_rates_that_move_at_every_step_drift_step_by_step(tmp_path):
    run = write_run(tmp_path / "run")
    shown = section(write_report(run).read_text(), "Drift of pass rates")
    assert "at step 0" in shown and "at step 30" in shown, "two estimates"
    rows = metric_lines(60)
    for row in rows:
        share = row["step"] / 100
        row |= dict(
            zip(DRIFT, (0.3 - share / 4, 0.5 - share / 4, 0.2 + share / 2, share), strict=True)
        )
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = section(write_report(run).read_text(), "Drift of pass rates")
    assert "Mean pass rate 0.010 at step 1, 0.600 at step 60" in shown
    assert "held 50% of the problems, then 35%" in shown


def test_every_link_of_the_page_has_a_target(tmp_path):
    page = write_report(write_run(tmp_path / "run")).read_text()
    links = re.findall(r'<a href="#([^"]+)">([^<]+)</a>', page)
    assert [text for _, text in links][-2:] == ["Environment", "Configuration"]
    for target, text in links:
        assert f'id="{target}"' in page, text


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"is no run directory: it has no config\.yaml"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_killed_while_writing_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text[:-40])
    assert "59 of 60 optimizer steps" in write_report(run).read_text()
    (run / "metrics.jsonl").write_text("{broken\n" + text)
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:1: not a line of JSON"):
        write_report(run)


def test_a_run_without_a_finite_gradient_is_shown(tmp_path):
    run = write_run(tmp_path / "run")
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(re.sub(r'"grad_norm": [^,]+', '"grad_norm": null', text))
    page = write_report(run).read_text()
    assert "No step logged a value." in section(page, "Gradient norm")


def test_names_and_settings_are_text_not_markup(tmp_path):
    run = write_run(tmp_path / "<b>run", hf_path="<script>alert(1)</script>")
    ResultsFile({"<i>m": results()["base"]}, {}).write(run / "results.json")
    page = write_report(run).read_text()
    assert "<script" not in page and "<b>" not in page and "<i>" not in page
    assert "&lt;script&gt;" in page


def test_one_evaluated_model_is_compared_with_nothing(tmp_path):
    run = write_run(tmp_path / "run")
    ResultsFile({"model": results()["base"]}, {}).write(run / "results.json")
    page = write_report(run).read_text()
    assert "minus model" not in page and "Difference from" not in page
    assert "Not measured" in section(page, "Forgetting")


def test_forgetting_is_the_base_minus_the_trained_model():
    table = forgetting_section(results(kept=0.0, lost=-0.3)).table
    by_model = {row[1]: row[2:] for row in table[1:]}
    assert by_model["lost"][1].startswith("+0.2") or by_model["lost"][1].startswith("+0.3")
    low, _, high = by_model["lost"][2].partition(" to ")
    assert 0 < float(low) < float(by_model["lost"][1].split()[0]) < float(high)
    assert int(by_model["lost"][3]) > int(by_model["lost"][4]), "problems lost, then gained"
    assert by_model["lost"][-1] == "forgotten"
    assert by_model["kept"][-1] == "within noise"


def test_tasks_of_lm_eval_are_in_the_forgetting_table_and_told_apart(tmp_path):
    def mmlu(share):
        right = {f"mmlu_a/{i}": float(i < share * 400) for i in range(400)}
        groups = dict.fromkeys(right, "mmlu_a")
        return Accuracy.of_answers(right, groups, metric="acc", truncated=0.0)

    measured = results(trained=0.0)
    measured["base"]["mmlu"], measured["trained"]["mmlu"] = mmlu(0.6), mmlu(0.5)
    table = forgetting_section(measured).table
    assert [row[0] for row in table[1:]] == ["forgetting"] * 2 + ["mmlu"] * 2
    assert table[-1][2:] == [
        "0.500 ± 0.025", "+0.100 ± 0.015", "+0.070 to +0.130", "40", "0", "forgotten",
    ]  # fmt: skip
    run, settings = tmp_path, {"lm_eval": {"num_fewshot": 5, "limit": 2000}}
    ResultsFile(measured, settings).write(run / "results.json")
    write_report(run)
    page = section((run / "report.html").read_text(), "Accuracy")
    assert "mmlu (400)" in page and "0.600 ± 0.025 (acc)" in page and "nan" not in page
    assert "lm_eval (num_fewshot 5, limit 2000)" in page


def test_the_verdict_says_won_lost_or_within_noise():
    measured = results(unweighted=0.0, hard_filter=0.3, paced=0.15)
    heldout, forgetting, reservation = verdict(measured, "paced")
    assert re.search(r"better than base \(\+0\.\d+ ± 0\.\d+\), unweighted", heldout)
    assert "worse than hard_filter (-0." in heldout and heldout.startswith("On heldout problems")
    assert "forgetting" in forgetting and "one seed" in reservation
    same = {"base": measured["base"], "paced": measured["base"]}
    assert "within noise of base (+0.000" in verdict(same, "paced")[0]
    assert verdict(measured, "other") == ["other was not among the models evaluated."]


@pytest.mark.parametrize("arguments", [[], ["run", "--compare", "a"]])
def test_the_command_takes_one_run_or_several(arguments):
    with pytest.raises(ConfigError, match="give one run directory, or --compare"):
        command.main(arguments)
