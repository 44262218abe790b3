from nemo_paced.report.sections.accuracy import accuracy_sections
from tests.runs import accuracy


def test_of_models_with_other_samples_pass_at_k_is_of_the_smallest_k():
    measured = {label: {"heldout": accuracy(0.5, samples=k)} for label, k in (("a", 8), ("b", 4))}
    heads, first, second = accuracy_sections(measured, {})[0].table
    cells = dict(zip(heads, first, strict=True))
    assert cells["pass@k"] == f"{measured['a']['heldout'].pass_at(4).mean:.3f}"
    assert cells["mean@k"].endswith("(k = 8)") and second[2].endswith("(k = 4)")
