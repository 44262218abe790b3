"""``nemo-paced snr``: gradient signal-to-noise ratio against pass rate."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from nemo_paced.compose import Parser, recipe_arguments, run_directory, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.logs import launcher_rank
from nemo_paced.run.config_file import run_of, save_config


def main(arguments: list[str]) -> None:
    """The command ``snr``: measure gradient SNR against pass rate and print it."""
    parser = Parser("snr")
    parser.add_argument("--step", type=int)
    parser.add_argument("--pass-rates", type=Path)
    parser.add_argument("--out", type=Path)
    for flag in ("--config-name", "--config-path", "--cfg"):
        parser.add_argument(flag)
    known, rest = parser.parse_known_args(arguments)
    models = [Path(a) for a in rest if "=" not in a and not a.startswith("-")]
    if len(models) > 1:
        raise ConfigError(f"snr takes one run, checkpoint or model; {len(models)} were given")
    model = models[0].absolute() if models else None
    if model is not None and not model.is_dir():
        raise ConfigError(
            f"{str(model)!r} is no directory: give a run directory, a checkpoint or a Hugging Face "
            "directory"
        )
    overrides = [a for a in rest if Path(a) not in models]
    if known.pass_rates is not None:
        overrides.append(f"snr.pass_rates={known.pass_rates}")
    run_dir = None if model is None else run_of(model)
    # a run may be older than a key of this block: ++ sets it either way, and the schema checks it
    overrides = [f"++{a}" if a.startswith("snr.") else a for a in overrides]
    given = recipe_arguments(known, run_dir, without=("rollout.endpoints", "references.endpoints"))
    with_config([*given, *overrides], lambda config: _snr(config, known, model, run_dir))


def _snr(
    config: PacedConfig, known: argparse.Namespace, model: Path | None, run_dir: Path | None
) -> None:
    from nemo_paced.commands.launch import join_launcher, launch
    from nemo_paced.preflight import models as model_checks
    from nemo_paced.preflight.checks import check_inputs
    from nemo_paced.preflight.findings import refuse
    from nemo_paced.snr.plan import check_bins, check_settings, find_pass_rates, plan_bins, step_of
    from nemo_paced.weights.pass_rates import PassRateTable

    run_dir = run_dir or run_directory(config)
    model = _resolve(config, model, run_dir, known.step)
    out = (known.out or default_out(config, model, run_dir)).absolute()
    join_launcher()
    if launcher_rank() == 0:
        check_settings(config)
        table = find_pass_rates(config, run_dir, model, step_of(config, model))
        check_bins(plan_bins(PassRateTable.read(table).rows, config.snr), table)
        checks = (model_checks.layouts, model_checks.vocabularies, model_checks.sequence_limits)
        refuse(check_inputs(config, run_dir, checks))
    with tempfile.TemporaryDirectory(prefix="nemo-paced-") as folder:
        config_file = save_config(_absolute(config), Path(folder))
        launch("snr", config, config_file, run_dir, model, out)
    if launcher_rank() == 0:
        show(out, Console())


def show(path: Path, console: Console) -> None:
    """Print an SNR measurement and draw its figure beside its file."""
    from nemo_paced.report.snr_figure import write_png
    from nemo_paced.snr.record import SnrRecord
    from nemo_paced.snr.summary import summarise
    from nemo_paced.snr.text import lead, sentences, table_rows

    record = SnrRecord.read(path)
    summary = summarise(record)
    headings, *rows = table_rows(summary)
    console.print(lead(record), highlight=False, soft_wrap=True)
    table = Table()
    for heading in headings:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for line in sentences(record, summary):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    figure = path.with_suffix(".png")
    write_png(record, summary, figure)
    console.print(f"written: {path}\n         {figure}", highlight=False, soft_wrap=True)


def _resolve(config: PacedConfig, model: Path | None, run_dir: Path, step: int | None) -> Path:
    """The checkpoint or Hugging Face directory that is measured."""
    from nemo_paced.run.checkpoint_files import checkpoint_dir, checkpoints, newest_whole

    if model is not None and model != run_dir:
        if step is not None:
            raise ConfigError(f"--step is of a run, and {model} is one model: leave it out")
        if not any((model / name).exists() for name in ("config.json", "metadata.json")):
            raise ConfigError(
                f"{model} is neither a run directory, nor a checkpoint (metadata.json), nor a "
                "Hugging Face directory (config.json)"
            )
        return model
    start = Path(config.student.hf_path).absolute()
    if step == 0:
        return start
    if step is None:
        return newest_whole(run_dir) or start
    found = checkpoint_dir(run_dir, step)
    if found not in checkpoints(run_dir):
        there = ", ".join(str(int(p.name.removeprefix("step_"))) for p in checkpoints(run_dir))
        raise ConfigError(
            f"--step is {step}, and {run_dir} has checkpoints of the steps {there or '(none)'}; 0 "
            "is the model that training began with"
        )
    return found


def default_out(config: PacedConfig, model: Path, run_dir: Path) -> Path:
    """The file of a measurement: ``RUN/snr/MODEL_DIVERGENCE.json``.

    Layers below the head, and responses that are not the divergence's usual ones, add to the name,
    so that no measurement takes the place of another.
    """
    from nemo_paced.snr.plan import step_of, what_is_measured
    from nemo_paced.snr.record import FOLDER

    start = Path(config.student.hf_path).absolute()
    is_of_run = model == start or model.parent == run_dir / "checkpoints"
    step = step_of(config, model) if is_of_run else None
    name = model.name if step is None else f"step_{step:08d}"
    kind, responses = what_is_measured(config)
    usual = what_is_measured(replace(config, snr=replace(config.snr, responses=None)))
    name += f"_{kind.value}"
    if (kind, responses) != usual:
        name += f"_{responses.value}"
    if config.snr.last_layers:
        name += f"_last_layers_{config.snr.last_layers}"
    return run_dir / FOLDER / f"{name}.json"


def _absolute(config: PacedConfig) -> PacedConfig:
    """The configuration with the pass-rate table's path as the ranks find it."""
    if config.snr.pass_rates is None:
        return config
    path = str(Path(config.snr.pass_rates).absolute())
    return replace(config, snr=replace(config.snr, pass_rates=path))
