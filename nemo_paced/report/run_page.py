"""One self-contained HTML page about a run."""

from __future__ import annotations

from pathlib import Path

from nemo_paced.config import WeightScheme
from nemo_paced.report.page import Part, write_page
from nemo_paced.report.run_files import RunFiles
from nemo_paced.report.sections.accuracy import accuracy_sections, verdict
from nemo_paced.report.sections.run import run_sections
from nemo_paced.report.sections.section import Section, rows_by_stage, values_of
from nemo_paced.report.sections.timing import seconds


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write ``report.html`` from what the run directory holds, and return its path.

    What is missing is said to be missing.

    Raises:
        ConfigError: it is no run directory, or a file of it cannot be read.
    """
    run = RunFiles.read(run_dir)
    if run.results:
        accuracy = accuracy_sections(run.results, run.settings)
    else:
        missing = (
            f"Not evaluated yet: nemo-paced evaluate {run_dir} --problems FILE --baseline HF_DIR "
            f"--out {run_dir / 'results.json'}, then make this report again."
        )
        accuracy = [Section("Accuracy", missing=missing, wide=True)]
    parts = [Part([*accuracy, *run_sections(run)])]
    title = f"PACED run {run_dir.resolve().name}"
    return write_page(out or run_dir / "report.html", title, _lead(run), parts)


def _lead(run: RunFiles) -> list[str]:
    lead = [_models_and_weights(run)] if run.config else []
    if not run.rows:
        return [*lead, "No optimizer step was taken yet."]
    steps, planned = run.rows[-1]["step"], run.setting("trainer.max_steps")
    done = f"{steps} of {planned} optimizer steps" if planned else f"{steps} optimizer steps"
    counts = (f"{len(rows)} of {stage}" for stage, rows in rows_by_stage(run.rows).items())
    tokens = sum(values_of(run.rows, "tokens"))
    took = seconds(sum(values_of(run.rows, "time/step_s")))
    lead.append(f"{done}: {', '.join(counts)}. {tokens:,.0f} response tokens, {took} s in steps.")
    if len(run.results) > 1:
        lead += verdict(run.results, list(run.results)[-1])
    return lead


def _models_and_weights(run: RunFiles) -> str:
    student, teacher = run.setting("student.hf_path"), run.setting("teacher.hf_path")
    scheme = str(run.setting("weights.scheme") or "not named")
    if scheme == WeightScheme.beta_kernel.value:
        exponents = f"{run.setting('weights.alpha'):g}, {run.setting('weights.beta'):g}"
        scheme += f" with exponents {exponents}, estimator {run.setting('weights.estimator')}"
    return f"Student {student}; teacher {teacher or 'the same model'}; weights {scheme}."
