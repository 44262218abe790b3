import io

import pytest
from rich.console import Console

from nemo_paced.evaluation.tables import show
from nemo_paced.grading.accuracy import Accuracy
from tests.runs import accuracy


def mmlu(right):
    values = {f"mmlu_a/{i}": float(i < right) for i in range(2000)}
    return Accuracy.of_answers(
        values, dict.fromkeys(values, "mmlu_a"), metric="acc", truncated=0.001
    )


RESULTS = {
    "baseline": {"math500": accuracy(0.7), "aime2024": accuracy(0.2), "mmlu": mmlu(1200)},
    "model": {"math500": accuracy(0.8), "aime2024": accuracy(0.2), "mmlu": mmlu(1140)},
}


def shown(width, results=RESULTS):
    console = Console(file=io.StringIO(), width=width)
    show(console, results, {"max_tokens": 3796, "max_tokens_from": "the context of the model"})
    return console.file.getvalue()


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_the_terminal_without_a_cell_cut_or_wrapped(width):
    text = shown(width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width and "…" not in text
    rows = [line.split() for line in lines]
    (forgotten,) = [r for r in rows if r[:1] == ["mmlu"] and "forgotten" in r]
    assert forgotten == ["mmlu", "0.600", "0.570", "+0.030", "+0.022", "+0.038", "60", "0",
                         "forgotten"]  # fmt: skip
    assert ["mmlu", "model", "acc", "0.570", "±", "0.011", "2000", "0.1%"] in rows
    assert ("pass@2" in text) == (width == 120), "every k where there is room"
    assert "pass@8" in text and "maj@8" in text
    assert "at most 3796 tokens (the context of the model)" in text


def test_a_long_name_gives_way_and_numbers_stay_whole():
    name = "leaderboard_mmlu_pro_of_every_subject"
    text = shown(80, {label: {name: mmlu(right)} for label, right in
                      (("baseline", 1200), ("model", 1140))})  # fmt: skip
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert "+0.030" in text and "+0.022 +0.038" in text and "0.600 ± 0.011" in text


@pytest.mark.parametrize(("before", "after"), [(4, 8), (8, 4)])
@pytest.mark.parametrize("width", [80, 120])
def test_a_baseline_of_other_samples_is_shown_beside_its_k(before, after, width):
    measured = {
        "baseline": {"math500": accuracy(0.7, samples=before)},
        "model": {"math500": accuracy(0.8, samples=after)},
    }
    text = shown(width, measured)
    assert max(map(len, text.splitlines())) <= width and "…" not in text
    assert "math500: 120 problems, 4 or 8 samples each" in text
    assert "mean@k" in text and "maj@k" in text and "pass@8" not in text
    rows = [line.split() for line in text.splitlines()]
    heads, *_ = (row for row in rows if row[:2] == ["model", "k"])
    for label, samples in (("baseline", before), ("model", after)):
        (row,) = (row for row in rows if row[:2] == [label, str(samples)])
        a = measured[label]["math500"]
        cells = dict(zip(heads[2:], [row[2], *row[5:]], strict=True))  # without ± and error
        assert cells["mean@k"] == f"{a.mean:.3f}" and cells["pass@4"] == f"{a.pass_at(4).mean:.3f}"


def test_one_model_alone_has_no_forgetting_table():
    assert "Forgetting" not in shown(80, {"model": RESULTS["model"]})
