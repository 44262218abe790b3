"""One self-contained HTML page about a run, or about several arms side by side."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from rich.table import Table

from nemo_paced.analysis import figures
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.results import read_results
from nemo_paced.rollout.accuracy import Accuracy, Difference

Rows = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what is under it; ``missing`` says why there is nothing to show."""

    title: str
    svg: str = ""
    note: str = ""
    missing: str = ""
    text: str = ""
    table: list[list[str]] | None = None


def main(arguments: list[str]) -> None:
    """The command ``report``."""
    if len(arguments) != 1:
        raise ConfigError("usage: nemo-paced report RUN_DIR")
    print(write_report(Path(arguments[0])))


def write_report(run_dir: Path) -> Path:
    """Write ``report.html`` from what the run directory holds; what is missing is said.

    Raises:
        ConfigError: it is no run directory.
    """
    if not (run_dir / "config.yaml").exists():
        raise ConfigError(f"{run_dir} is no run directory: it has no config.yaml")
    sections = run_sections(run_dir)
    results = run_dir / "results.json"
    if results.exists():
        sections = accuracy_sections(read_results(results)) + sections
    rows = read_metrics(run_dir)
    lead = [f"{rows[-1]['step']} optimizer steps." if rows else "No step was taken yet."]
    return _write(run_dir / "report.html", f"PACED run {run_dir.name}", lead, sections)


def write_comparison(
    out: Path, runs: dict[str, Path], results: dict[str, dict[str, Accuracy]]
) -> tuple[Path, str, Table]:
    """Report on several arms at equal steps.

    Returns:
        Path of the page, what the numbers allow to be said, and the table for a terminal.
    """
    verdict = honest_verdict(results)
    sections = accuracy_sections(results)
    for label, run_dir in runs.items():
        sections += [
            Section(
                f"{label}: {section.title}",
                section.svg,
                section.note,
                section.missing,
                section.text,
                section.table,
            )
            for section in run_sections(run_dir)
        ]
    path = _write(out / "report.html", "PACED quickstart: arms at equal steps", [verdict], sections)
    for run_dir in runs.values():
        write_report(run_dir)
    return path, verdict, _terminal_table(results)


def honest_verdict(results: dict[str, dict[str, Accuracy]]) -> str:
    """What one seed shows of PACED against each other arm, and no more."""
    if "paced" not in results:
        return "PACED was not among the arms."
    sentences = []
    for other in results:
        if other != "paced":
            d = Difference.between(results["paced"]["heldout"], results[other]["heldout"])
            sentences.append(
                f"against {other} {d.mean:+.3f} +- {d.standard_error:.3f} ({d.verdict()})"
            )
    return (
        "Held-out accuracy of PACED, paired over problems: " + "; ".join(sentences) + ". One seed: "
        "the errors are those of the problem set alone, training noise is not in them."
    )


def read_metrics(run_dir: Path) -> Rows:
    path = run_dir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def run_sections(run_dir: Path) -> list[Section]:
    """What one run shows of itself."""
    rows, tables = read_metrics(run_dir), _tables(run_dir)
    sections = _pass_rate_sections(tables) + _metric_sections(rows)
    config = run_dir / "config.yaml"
    if config.exists():
        sections.append(Section("Configuration", text=config.read_text()))
    return sections


def accuracy_sections(results: dict[str, dict[str, Accuracy]]) -> list[Section]:
    """Accuracy table with differences from the first model, and bars."""
    labels = list(results)
    suites = list(next(iter(results.values())))
    table = [["model", *(f"{s} mean@k" for s in suites), *(f"{s} - {labels[0]}" for s in suites)]]
    for label in labels:
        means = [
            f"{results[label][s].mean:.3f} ± {results[label][s].standard_error:.3f}" for s in suites
        ]
        differences = ["" for _ in suites]
        if label != labels[0]:
            paired = [Difference.between(results[label][s], results[labels[0]][s]) for s in suites]
            differences = [f"{d.mean:+.3f} ± {d.standard_error:.3f}" for d in paired]
        table.append([label, *means, *differences])
    k = results[labels[0]][suites[0]].samples
    bars = {s: [(results[m][s].mean, results[m][s].standard_error) for m in labels] for s in suites}
    return [
        Section(
            "Accuracy",
            svg=figures.accuracy_bars(labels, bars),
            table=table,
            note=f"Mean over problems of the share of right samples among k = {k}, with its "
            "standard error over problems; differences are paired by problem. On the forgetting "
            "suite a negative difference is what was forgotten.",
        ),
        _groups_section(results, labels),
    ]


def _groups_section(results: dict[str, dict[str, Accuracy]], labels: list[str]) -> Section:
    groups = [(s, g) for s, a in results[labels[0]].items() for g in a.groups]
    table = [["model", *(f"{suite}: {group or 'all'}" for suite, group in groups)]]
    for label in labels:
        table.append([label, *(f"{results[label][s].groups[g]:.3f}" for s, g in groups)])
    return Section("Accuracy by kind of problem", table=table)


def _pass_rate_sections(tables: dict[int, Any]) -> list[Section]:
    if not tables:
        return [Section("Pass rates", missing="No pass rates were estimated yet.")]
    first, last = min(tables), max(tables)
    shown = {f"step {step}": tables[step]["pass_rate"] for step in sorted({first, last})}
    frame = tables[last]
    sections = [
        Section("Pass rates", svg=figures.pass_rate_histogram(shown)),
        Section(
            f"Weights at step {last}",
            svg=figures.weights_by_pass_rate(frame["pass_rate"], frame["weight"]),
            note=f"{int((frame['weight'] == 0).sum())} of {len(frame)} problems have weight 0.",
        ),
    ]
    if len(tables) > 1:
        drift = {step: frame["pass_rate"] for step, frame in tables.items()}
        sections.append(Section("Drift of pass rates", svg=figures.drift(drift)))
    return sections


def _metric_sections(rows: Rows) -> list[Section]:
    if not rows:
        return [Section("Training", missing="No step was taken yet.")]
    clipped = statistics.fmean(bool(row["clipped"]) for row in rows)
    sections = [
        Section("Loss", svg=figures.curves(rows, "loss", "weighted loss (nats)")),
        Section(
            "Gradient norm",
            svg=figures.curves(rows, "grad_norm", "global norm before clipping", log=True),
            note=f"{clipped:.0%} of the steps were clipped, "
            f"{sum(bool(row['skipped']) for row in rows)} skipped.",
        ),
    ]
    if any(row.get("rollout/logprob_gap") is not None for row in rows):
        sections.append(
            Section(
                "Trainer against server",
                svg=figures.curves(rows, "rollout/logprob_gap", "mean |gap| (nats)", log=True),
                note="Log-probability of the sampled tokens, by the trainer and by the rollout "
                "server.",
            )
        )
        sections.append(
            Section(
                "Accuracy of rollouts", svg=figures.curves(rows, "rollout/accuracy", "share right")
            )
        )
    if any(row.get("validation/accuracy") is not None for row in rows):
        sections.append(
            Section("Validation", svg=figures.curves(rows, "validation/accuracy", "mean@k"))
        )
    sections.append(Section("Where the time went", svg=figures.timing(rows)))
    return sections


def _tables(run_dir: Path) -> dict[int, Any]:
    import pandas

    paths = sorted((run_dir / "pass_rates").glob("step_*.parquet"))
    return {int(path.stem.removeprefix("step_")): pandas.read_parquet(path) for path in paths}


def _terminal_table(results: dict[str, dict[str, Accuracy]]) -> Table:
    table = Table(title="mean@k ± standard error over problems")
    table.add_column("model")
    for suite in next(iter(results.values())):
        table.add_column(suite, justify="right")
    for label, suites in results.items():
        table.add_row(label, *(f"{a.mean:.3f} ± {a.standard_error:.3f}" for a in suites.values()))
    return table


def _write(path: Path, title: str, lead: list[str], sections: list[Section]) -> Path:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True
    )
    page = environment.get_template("report.html.j2")
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(page.render(title=title, lead=lead, sections=sections))
    temporary.replace(path)
    return path
