"""Several runs on one page: which they are, how they differ, and who is better."""

import re

import pytest
import yaml

from nemo_paced.commands import report as command
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import ResultsFile, Source
from nemo_paced.report.comparison import compare_runs, labelled, write_comparison
from nemo_paced.report.drawing import COLOURS
from nemo_paced.report.evaluated_runs import EvaluatedRuns
from nemo_paced.report.run_files import RunFiles
from nemo_paced.report.sections.accuracy import paired_section
from nemo_paced.report.sections.comparison import side_by_side
from tests.runs import PROBLEMS, accuracy, results, start, write_run, write_starts

SETTINGS = {"temperature": 0.6, "top_p": 0.95}


def section(page, title):
    """The part of the page under a heading, up to the next one."""
    return page.split(f"<h2>{title}</h2>")[1].split("<h2>")[0]


def configure(run, **changes):
    """Change keys of a written run's configuration, given as block__key."""
    path = run / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    for key, value in changes.items():
        block, name = key.split("__")
        settings[block][name] = value
    path.write_text(yaml.safe_dump(settings))


def sections_of(**directories):
    found = side_by_side({label: RunFiles.read(path) for label, path in directories.items()})
    return {each.title: each for each in found}


def test_arms_are_compared_on_one_page(tmp_path):
    runs = {name: write_run(tmp_path / name) for name in ("unweighted", "paced")}
    measured = results(unweighted=0.0, paced=0.15)
    out = tmp_path / "report.html"
    said = write_comparison(out, "Arms", runs, measured, subject="paced", settings=SETTINGS)
    page = out.read_text()
    assert all(sentence in page for sentence in said)
    assert "All runs took 60 optimizer steps." in page
    assert page.count('<details class="part"') == 2
    assert re.findall(r"<td>(unweighted|paced)</td>\s*<td>60</td>", section(page, "Runs"))
    for target in re.findall(r'<a href="#([^"]+)">', page):
        assert page.count(f'id="{target}"') == 1


def test_runs_of_other_lengths_are_compared_by_the_command(tmp_path, capsys):
    for name, gain, steps in (("a", 0.0, 20), ("b", 0.2, 40)):
        run = write_run(tmp_path / name, steps=steps)
        own = results(trained=gain)
        own["base"] = results()["base"]
        ResultsFile(own, SETTINGS).write(run / "results.json")
    write_run(tmp_path / "unevaluated", steps=20)
    names = ("a", "b", "unevaluated")
    command.main(["--compare", *(str(tmp_path / name) for name in names)])
    path = tmp_path / "comparison.html"
    assert capsys.readouterr().out.strip() == str(path)
    page = path.read_text()
    assert "different numbers of optimizer steps: a 20, b 40, unevaluated 20" in page
    assert "Not evaluated: unevaluated." in page
    assert "On heldout problems b is better than base" in page
    assert "b minus a" in section(page, "Runs against each other")
    assert "<th>s before them</th>" in page and "<td>448</td>" in section(page, "Runs")
    assert "trainer.max_steps" in section(page, "Settings that differ").replace("<wbr>", "")
    for title in ("Loss", "Gradient norm", "Validation", "Mean pass rate", "Where the time went"):
        assert "unevaluated" in section(page, title)


def evaluated(run, measured, **fingerprints):
    """A written run with a baseline and a model; fingerprints by label."""
    sources = {label: Source(f"/models/{f}", f) for label, f in fingerprints.items()}
    ResultsFile(measured, SETTINGS, sources=sources).write(
        write_run(run, steps=20) / "results.json"
    )
    return run


def measured_from(base, model):
    """Forgetting suite at these means, of a baseline and the model trained from it."""
    return {
        "baseline": {"forgetting": accuracy(base, seed=1)},
        "model": {"forgetting": accuracy(model, seed=2)},
    }


@pytest.mark.parametrize("named", [True, False])
def test_each_run_is_compared_with_the_model_that_it_started_from(tmp_path, named):
    """The second student was better before training than the first, and forgot."""
    students = ("one", "two", "one") if named else (None,) * 3
    for name, student, (base, model) in zip(
        "abc", students, ((0.3, 0.35), (0.8, 0.6), (0.3, 0.32)), strict=True
    ):
        fingerprints = {"baseline": student, "model": name} if named else {}
        evaluated(tmp_path / name, measured_from(base, model), **fingerprints)
    page = compare_runs([str(tmp_path / name) for name in "abc"]).read_text()
    forgetting = section(page, "Forgetting").split("<tr>")
    (row,) = [row for row in forgetting if "<td>b</td>" in row]
    assert "forgotten" in row and "its own base minus model" in forgetting[1]
    order = [re.findall(r"<td>([^<]+)</td>", row)[1] for row in forgetting[2:]]
    assert order == ["base", "a", "c", "base of b", "b"]
    assert "Difference from its own base" in page
    (row,) = [row for row in section(page, "Accuracy").split("<tr>") if "<td>b</td>" in row]
    assert "worse" in row
    lead = page.split("<h2>")[0]
    assert "base of b" not in lead and "base (" in lead, "c, the subject, started from base"


def test_a_run_evaluated_without_a_baseline_has_that_of_the_others_where_it_is_one(tmp_path):
    one = evaluated(tmp_path / "one", measured_from(0.6, 0.5), baseline="x")
    two = evaluated(tmp_path / "two", measured_from(0.8, 0.7), baseline="y")
    alone = {"model": measured_from(0.6, 0.6)["model"]}
    runs = EvaluatedRuns()
    for path in (evaluated(tmp_path / "alone", alone), one):
        runs.add(path.name, RunFiles.read(path))
    assert list(runs.results) == ["base", "alone", "one"]
    assert runs.baselines == {"alone": "base", "one": "base"}
    runs.add("two", RunFiles.read(two))
    assert runs.baselines == {"one": "base", "two": "base of two"}
    with pytest.raises(ConfigError, match=r"is labelled base, .*: give another, LABEL=RUN"):
        runs.add("base", RunFiles.read(two))


def test_runs_that_cannot_be_compared_are_refused(tmp_path):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    ResultsFile(results(trained=0.1), SETTINGS).write(first / "results.json")
    others = {"heldout": accuracy(0.5, problems=PROBLEMS[:50])}
    ResultsFile({"trained": others}, SETTINGS).write(second / "results.json")
    named = [str(first), str(second)]
    with pytest.raises(ConfigError, match="accuracies on different problems cannot be compared"):
        compare_runs(named)
    ResultsFile(results(trained=0.1), {"temperature": 1.0}).write(second / "results.json")
    told = r"/b/results.json was asked otherwise \(temperature 1.0, a 0.6\): what is compared"
    with pytest.raises(ConfigError, match=told):
        compare_runs(named)
    with pytest.raises(ConfigError, match=r"/a is there twice"):
        compare_runs([str(first), f"again={first}"])
    with pytest.raises(ConfigError, match="two runs are labelled same"):
        compare_runs([f"same={first}", f"same={second}"])


def test_runs_that_were_asked_other_questions_are_refused_though_their_ids_agree(tmp_path):
    asked = {"a": {"heldout": "1f", "forgetting": "2f"}, "b": {"heldout": "1f"}}
    for name, digests in asked.items():
        path = write_run(tmp_path / name, steps=20) / "results.json"
        ResultsFile(results(trained=0.1), SETTINGS, digests).write(path)
    named = [str(tmp_path / name) for name in asked]
    compare_runs(named)  # what one file does not tell is no difference
    ResultsFile(results(trained=0.1), SETTINGS, {"forgetting": "3f"}).write(path)
    told = "/b/results.json: its 'forgetting' holds other problems, or .* prompt, than a; evaluate"
    with pytest.raises(ConfigError, match=told):
        compare_runs(named)


def test_runs_of_two_seeds_are_compared_and_both_seeds_are_told(tmp_path):
    lm_eval = {"lm_eval": {"num_fewshot": 5, "limit": 2000}}
    paths = [write_run(tmp_path / name, steps=20) / "results.json" for name in "abc"]
    for path, seed in zip(paths, (1, 2, 1), strict=True):
        ResultsFile(results(trained=0.1), SETTINGS | {"seed": seed} | lm_eval).write(path)
    named = [str(path.parent) for path in paths]
    assert "seed 1 or 2, lm_eval (num_fewshot 5, limit 2000)." in compare_runs(named).read_text()
    other = {"seed": 1, "lm_eval": {"num_fewshot": 5, "limit": 100}}
    ResultsFile(results(trained=0.1), SETTINGS | other).write(paths[2])
    with pytest.raises(ConfigError, match=r"asked otherwise \(lm_eval.limit 100, a 2000\): what"):
        compare_runs(named)


def test_runs_are_told_apart_by_label_or_by_as_much_of_their_path_as_it_takes(tmp_path):
    one, two, three = tmp_path / "x" / "paced", tmp_path / "y" / "paced", tmp_path / "plain"
    (tmp_path / "lr=3e-4").mkdir()
    named = [str(one), str(two), f"ours={three}", str(tmp_path / "lr=3e-4")]
    assert list(labelled(named)) == ["x/paced", "y/paced", "ours", "lr=3e-4"]
    assert labelled(named)["ours"] == three
    assert list(labelled([f"a={one}", str(two)])) == ["a", "paced"]


def test_the_settings_that_differ_are_listed_and_no_others(tmp_path):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two")
    assert sections_of(one=one, two=two)["Settings that differ"].note == "None."
    configure(one, student__hf_path="/a/b/models/tiny/student", weights__alpha=2.0)
    configure(two, student__hf_path="/c/models/tiny/student", exp_manager__name="other")
    found = sections_of(one=one, two=two)["Settings that differ"]
    assert found.table == [
        ["what", "one", "two"],
        ["student.hf_path", "/a/b/.../student", "/c/.../student"],
        ["weights.alpha", "2.0", "1.0"],
    ]
    settings = yaml.safe_load((two / "config.yaml").read_text())
    del settings["weights"]["discount"], settings["stages"][1]
    (two / "config.yaml").write_text(yaml.safe_dump(settings))
    found = sections_of(one=one, two=two)["Settings that differ"]
    keys = [row[0] for row in found.table]
    assert "weights.discount" not in keys and "stages[1].name" in keys
    assert "Not shown: 1 setting that only some" in found.note


def test_a_run_keeps_its_colour_where_others_logged_nothing(tmp_path):
    one, two = write_run(tmp_path / "one", steps=20), write_run(tmp_path / "two", steps=20)
    text = (one / "metrics.jsonl").read_text()
    (one / "metrics.jsonl").write_text(text.replace("validation/accuracy", "other"))
    found = sections_of(one=one, two=two)
    assert COLOURS[0] not in found["Validation"].svg and COLOURS[1] in found["Validation"].svg
    assert COLOURS[0] in found["Loss"].svg and COLOURS[1] in found["Loss"].svg


def test_the_environments_that_differ_are_listed(tmp_path):
    runs = {name: write_run(tmp_path / name) for name in "abc"}
    assert "None: all on 16 x NVIDIA" in sections_of(**runs)["Environments that differ"].note
    write_starts(runs["b"], start(), start(8, commit="fedcba987654"))
    (runs["c"] / "environment.json").unlink()
    found = sections_of(**runs)["Environments that differ"]
    assert found.table == [["what", "a", "b"], ["git commit", "0123456789ab", "fedcba987654"]]
    assert "Not recorded: c." in found.note


def test_every_two_runs_are_paired_by_problem():
    measured = results(one=0.0, two=0.3)
    (found,) = paired_section(measured, ["one", "two"], "two")
    rows = {row[0]: row[1:] for row in found.table[1:]}
    difference, mean, interval, gained, lost, outcome = rows["heldout"]
    assert difference == "two minus one" and outcome == "better" and int(gained) > int(lost)
    low, high = map(float, interval.split(" to "))
    assert 0 < low < float(mean.split()[0]) < high
    (reversed_,) = paired_section(measured, ["two", "one"], "two")
    assert {row[-1] for row in reversed_.table[1:]} == {"worse"}
    assert paired_section(measured, ["one"], "one") == []


def test_of_many_runs_the_subject_alone_is_paired():
    names = ["a", "b", "c", "d", "e"]
    (found,) = paired_section(results(**dict.fromkeys(names, 0.0)), names, "c")
    pairs = [row[1] for row in found.table[1:] if row[0] == "heldout"]
    assert pairs == [f"c minus {other}" for other in "abde"]
    assert "of these 8 expect one in twenty" in found.note
