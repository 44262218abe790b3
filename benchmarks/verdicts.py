"""Agreement of math verifiers with labelled cases, by kind: ours, math-verify alone, and peers'.

The cases are those of ``tests/unit/grading/generated_cases.py``. Of the notations each verifier
gets the answer in the frame that its own prompts ask for; where the answer stands in a response is
only asked of those that read any format. A false accept counts double: a problem that the student
never solves gets nearly the largest weight by it. Each verifier runs in the environment that has it
(benchmarks/README.md says how); the file of results keeps the others'.

    python benchmarks/verdicts.py nemo_paced math-verify --out benchmarks/results/verdicts.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tests.unit.grading.generated_cases import Case, blind_cases, frame_cases, notation_cases

Judge = Callable[[Case], bool]
BOXED = r"The answer is $\boxed{A}$."
LINE = "Answer: A"
MINERVA = "Final Answer: The final answer is $A$. I hope it is correct."


def ours() -> Judge:
    from nemo_paced.config import GradingConfig
    from nemo_paced.grading.grader import Grader

    grader = Grader(GradingConfig(num_workers=1))
    return lambda case: (
        grader.grade(case.response, case.reference, truncated=case.truncated).correct
    )


def math_verify() -> Judge:
    from math_verify import parse, verify

    return lambda case: verify(parse(f"${case.reference}$"), parse(case.response))


def minerva() -> Judge:
    utils = _file_of("lm_eval", "tasks/minerva_math/utils.py")

    def judge(case: Case) -> bool:
        found = utils.normalize_final_answer(utils.get_unnormalized_answer(case.response))
        return bool(utils.is_equiv(found, utils.normalize_final_answer(case.reference)))

    return judge


def mathruler() -> Judge:
    from mathruler.grader import extract_boxed_content, grade_answer

    return lambda case: grade_answer(extract_boxed_content(case.response), case.reference)


def verl() -> Judge:
    score = _file_of("verl", "utils/reward_score/math_dapo.py")
    return lambda case: bool(score.compute_score(case.response, case.reference)["acc"])


# verifier: (its maker, the package whose version is kept, the frame, whether it reads any format)
VERIFIERS: dict[str, tuple[Callable[[], Judge], str, str, bool]] = {
    "nemo_paced": (ours, "nemo-paced", BOXED, True),
    "math-verify": (math_verify, "math-verify", BOXED, True),
    "lm-eval, Minerva": (minerva, "lm-eval", MINERVA, False),
    "mathruler": (mathruler, "mathruler", BOXED, False),
    "verl, math_dapo": (verl, "verl", LINE, False),
}


def measure(name: str) -> dict[str, Any]:
    """Cases, false refusals and false accepts of a verifier by kind."""
    make, package, frame, reads_any = VERIFIERS[name]
    judge = make()
    kinds: dict[str, list[int]] = {}
    errors, began = 0, time.perf_counter()
    anywhere = [*frame_cases(), *blind_cases()] if reads_any else []
    for case in [*notation_cases(frame), *anywhere]:
        try:
            right = bool(judge(case))
        except Exception:
            right, errors = False, errors + 1
        counts = kinds.setdefault(case.kind, [0, 0, 0])
        counts[0] += 1
        if right is not case.right:
            counts[1 if case.right else 2] += 1
    seconds = round(time.perf_counter() - began, 1)
    return {"version": version(package), "kinds": kinds, "errors": errors, "seconds": seconds}


def table(results: dict[str, Any]) -> str:
    """Markdown: a row a kind, a column a verifier; right verdicts, refused and accepted wrongly."""
    names = [name for name in VERIFIERS if name in results]
    kinds = list(dict.fromkeys(kind for name in names for kind in results[name]["kinds"]))
    lines = [f"| kind | cases | {' | '.join(names)} |", f"| --- | ---: |{' ---: |' * len(names)}"]
    for kind in kinds:
        found = [results[name]["kinds"].get(kind) for name in names]
        cases = next(counts[0] for counts in found if counts)
        lines.append(f"| {kind} | {cases} | {' | '.join(map(_cell, found))} |")
    common = [kind for kind in kinds if all(kind in results[name]["kinds"] for name in names)]
    totals = [_sums(results[name]["kinds"][kind] for kind in common) for name in names]
    cases = totals[0][0]
    lines.append(f"| **asked of all** | {cases} | {' | '.join(map(_cell, totals))} |")
    agreement = (f"{1 - (r + 2 * a) / n:.1%}" for n, r, a in totals)
    return "\n".join([*lines, f"| **agreement** | {cases} | {' | '.join(agreement)} |"])


def _sums(rows: Iterable[list[int]]) -> list[int]:
    return [sum(column) for column in zip(*rows, strict=True)]


def _cell(counts: list[int] | None) -> str:
    if counts is None:
        return ""
    number, refused, accepted = counts
    wrong = [f"-{refused}"] if refused else []
    wrong += [f"+{accepted}"] if accepted else []
    return " ".join([str(number - refused - accepted), *wrong])


def _file_of(package: str, path: str) -> Any:
    """A module of a package by its file: the packages themselves import a trainer or an engine."""
    found = importlib.util.find_spec(package)
    assert found is not None and found.origin is not None, f"{package} is not installed"
    spec = importlib.util.spec_from_file_location("peer", Path(found.origin).parent / path)
    assert spec is not None and spec.loader is not None, "a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("verifiers", nargs="*", choices=[[], *VERIFIERS])
    parser.add_argument("--out", type=Path, help="JSON, to which what is measured is added")
    options = parser.parse_args()
    known = options.out is not None and options.out.exists()
    results: dict[str, Any] = json.loads(options.out.read_text()) if known else {}
    results |= {name: measure(name) for name in options.verifiers}
    if options.out is not None:
        lines = (f" {json.dumps(name)}: {json.dumps(found)}" for name, found in results.items())
        options.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(table(results))


if __name__ == "__main__":
    main()
