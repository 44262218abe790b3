import pytest

from nemo_paced.errors import ConfigError
from nemo_paced.grading.verdicts import Verdicts, percent
from nemo_paced.records import Outcome, Rollout


def counted():
    verdicts = Verdicts()
    for outcome, evidence, comparison, number in [
        (Outcome.right, "box", "text", 59),
        (Outcome.right, "last number", "numbers", 1),
        (Outcome.wrong, "last number", "numbers", 20),
        (Outcome.truncated, "cut off", "none", 19),
        (Outcome.timed_out, "box", "math-verify", 1),
    ]:
        for _ in range(number):
            fields = {"outcome": outcome, "evidence": evidence, "comparison": comparison}
            verdicts.add(Rollout("a", "a", (1,), **fields))
    return verdicts


def test_counts_are_told_in_words():
    verdicts = counted()
    assert len(verdicts) == 100 and verdicts.number(Outcome.right) == 60
    assert (
        verdicts.outcomes_line()
        == "60 % right, 20 % wrong, 19 % cut before an answer, 1 % not graded in time"
    )
    assert verdicts.grounds_line() == (
        "answers read by box 74 %, last number 26 %; right ones by box 98 %, last number 2 %; "
        "compared as text 98 %, numbers 2 %"
    )
    assert Verdicts().grounds_line() == "no answer was found" and not Verdicts().outcomes_line()


def test_counts_are_read_back(tmp_path):
    path = tmp_path / "v.json"
    counted().write(path)
    assert Verdicts.read(path) == counted()
    for text in ("[1]", "{", '[{"outcome": "right"}]'):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no counts of verdicts"):
            Verdicts.read(path)


@pytest.mark.parametrize(
    ("share", "text"),
    [(0, "0 %"), (1, "100 %"), (0.001, "0.1 %"), (0.996, "99.6 %"), (0.5, "50 %")],
)
def test_a_few_are_not_none_in_percent(share, text):
    assert percent(share) == text
