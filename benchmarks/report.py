"""The figures as one JSON record, and as tables."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from contenders import OURS, Absent
from measure import Row
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "nvidia-modelopt", "megatron-core", "trl", "liger_kernel", "transformers")


def make_report(
    args: argparse.Namespace,
    load_before: float,
    rows: list[Row],
    absent: list[Absent],
    floors: dict[str, Any],
) -> dict[str, Any]:
    """Everything, as JSON: seconds, bytes; U is one float32 [N, V]."""
    unit = 4 * args.tokens * args.vocab
    ours = {
        (row.contender.form, row.contender.kind): row for row in rows if row.contender.name == OURS
    }
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        # where the file lies says nothing of what is measured
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "hardware": hardware(args.device, load_before),
        "versions": versions(),
        "floors": floors,
        "rows": [describe_row(row, ours, floors, unit) for row in rows],
        "not_measured": [
            {"name": a.name, "form": a.form, "kind": a.kind, "reason": a.reason} for a in absent
        ],
    }


def describe_row(
    row: Row, ours: dict[tuple[str, str], Row], floors: dict[str, Any], unit: int
) -> dict[str, Any]:
    contender, least = row.contender, min(row.total_s)
    mine = ours.get((contender.form, contender.kind))
    floor_names = ("floor_warm", "floor_fresh") if contender.form == "logits" else ("floor_gemms",)
    rss = row.peak_rss_bytes
    return {
        "form": contender.form,
        "kind": contender.kind,
        "name": contender.name,
        "note": contender.note,
        "total_s_min": least,
        "total_s_median": statistics.median(row.total_s),
        "forward_s_min": min(row.forward_s),
        "backward_s_min": min(row.backward_s),
        "peak_bytes": row.peak_bytes,
        "peak_u": row.peak_bytes / unit,
        "peak_rss_u": None if rss is None else rss / unit,
        "errors": row.errors,
        "time_over_ours": least / min(mine.total_s) if mine else None,
        "median_over_ours": (
            statistics.median(row.total_s) / statistics.median(mine.total_s) if mine else None
        ),
        "peak_over_ours": row.peak_bytes / mine.peak_bytes if mine else None,
        **{f"time_over_{name}": least / floors[name] for name in floor_names},
        "forward_s": row.forward_s,
        "backward_s": row.backward_s,
    }


def hardware(device: str, load_before: float) -> dict[str, Any]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "cpu": cpu,
        "cpu_cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load_average_before": load_before,
        "gpu": gpu,
        "python": platform.python_version(),
    }


def versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def print_tables(report: dict[str, Any]) -> None:
    console = Console()
    for form in report["settings"]["forms"]:
        console.print(form_table(report, form))
    seconds = {k: v for k, v in report["floors"].items() if not isinstance(v, list)}
    console.print("floors:", ", ".join(f"{name} {value:.4g}" for name, value in seconds.items()))
    for missing in report["not_measured"]:
        console.print(
            f"not measured: {missing['name']} ({missing['form']}, {missing['kind']}): "
            f"{missing['reason']}",
            soft_wrap=True,
        )


def form_table(report: dict[str, Any], form: str) -> Table:
    """One form's contenders; times in ms."""
    rows = [row for row in report["rows"] if row["form"] == form]
    floors = ("floor_warm", "floor_fresh") if form == "logits" else ("floor_gemms",)
    table = Table(title=f"from {form}, {report['settings']['dtype']}")
    columns = ("kind", "loss", "min", "median", "forward", "backward", "/ ours")
    for name in (*columns, *(f"/ {f.removeprefix('floor_')}" for f in floors), "peak U", "RSS U"):
        table.add_column(name, justify="left" if name in ("kind", "loss") else "right")
    table.add_column("loss error", justify="right")
    table.add_column("gradient error", justify="right")
    for row in rows:
        milliseconds = (
            row[f"{name}"] * 1e3
            for name in ("total_s_min", "total_s_median", "forward_s_min", "backward_s_min")
        )
        ratios = (row["time_over_ours"], *(row[f"time_over_{f}"] for f in floors))
        table.add_row(
            row["kind"],
            row["name"],
            *(f"{value:.1f}" for value in milliseconds),
            *("" if value is None else f"{value:.2f}" for value in ratios),
            f"{row['peak_u']:.2f}",
            "" if row["peak_rss_u"] is None else f"{row['peak_rss_u']:.2f}",
            f"{row['errors']['loss']:.1e}",
            f"{row['errors']['gradient_relative']:.1e}",
            end_section=row is rows[-1] or rows[rows.index(row) + 1]["kind"] != row["kind"],
        )
    return table
