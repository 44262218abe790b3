"""PACED against its baselines on the embedded problems: equal steps, several seeds, paired.

A seed is a student trained from nothing, the order of the problems, and all sampling; every arm of
a seed starts from that student, its pass rates and the same references. One vLLM server runs
throughout. What is done is kept: the same command goes on where it was stopped. More seeds, arms or
learning rates extend a study.

    python benchmarks/study.py --out runs/study                        # core arms, 8 seeds
    python benchmarks/study.py --out runs/study --arms all
    python benchmarks/study.py --out runs/study --summary benchmarks/results/study.json
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import platform
import shutil
import sys
import time
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

# one thread an operator: many small ones, and the server needs the other core
os.environ.setdefault("OMP_NUM_THREADS", "1")

import study_summary
from study_arms import ARMS, Arm, chosen

from nemo_paced.compose import with_config
from nemo_paced.config import PacedConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import PacedError
from nemo_paced.evaluation.run import evaluate
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.logs import set_up_logging
from nemo_paced.quickstart import models
from nemo_paced.refit.file_transfer import send_files
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.served import served_dtype, training_length
from nemo_paced.run.config_file import PASS_RATES_FILE
from nemo_paced.run.environment import installed_versions, processor_name
from nemo_paced.run.progress import progress_bar
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.replicas import Replicas
from nemo_paced.training import prepare
from nemo_paced.training.references import REFERENCES_FILE, sample_references
from nemo_paced.weights.pass_rates import PassRateTable

RECORDS_FILE, SETTINGS_FILE = "records.jsonl", "settings.json"
BASE = "base"
# what a process that trains has to import: loaded once, every arm is forked from there
PRELOAD = ["nemo_paced.training.loop", "nemo_paced.run.convert", "megatron.core.optimizer"]
logger = logging.getLogger("nemo_paced.study")


@dataclass(frozen=True, slots=True)
class Run:
    """What one line of the records is about."""

    seed: int
    arm: str
    learning_rate: float

    @property
    def folder(self) -> str:
        return self.arm if self.arm == BASE else f"{self.arm}_lr{self.learning_rate:g}"


def main() -> None:
    args = parse_arguments()
    set_up_logging(0)
    logging.getLogger("megatron").setLevel(logging.WARNING)
    records = Records(args.out / RECORDS_FILE)
    if not args.summary_only:
        try:
            Study(args, records).run()
        except PacedError as error:
            sys.exit(f"study: error: {error}")
    if not (args.out / SETTINGS_FILE).exists():
        sys.exit(f"study: error: {args.out} holds no study: leave --summary-only out to run one")
    described = json.loads((args.out / SETTINGS_FILE).read_text())
    lines = study_summary.write(records.all(), args.summary, described)
    print("\n".join(lines))


class Records:
    """Finished runs, appended and flushed to the disk one by one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def all(self) -> list[dict[str, Any]]:
        """A line that a crash cut off counts as not there."""
        found = []
        for line in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                found.append(json.loads(line))
            except json.JSONDecodeError:
                logger.warning("%s: a cut line is left out", self.path)
        return found

    def has(self, run: Run) -> bool:
        wanted = (run.seed, run.arm, run.learning_rate)
        return any((r["seed"], r["arm"], r["learning_rate"]) == wanted for r in self.all())

    def append(self, run: Run, fields: dict[str, Any]) -> None:
        line = {
            "seed": run.seed,
            "arm": run.arm,
            "learning_rate": run.learning_rate,
            **fields,
        }
        whole = not self.path.exists() or self.path.read_bytes()[-1:] in (b"", b"\n")
        with self.path.open("a") as file:
            file.write(("" if whole else "\n") + json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Study:
    def __init__(self, args: argparse.Namespace, records: Records) -> None:
        self.args, self.records = args, records
        self.out: Path = args.out.absolute()
        self.seeds = range(args.first_seed, args.first_seed + args.seeds)
        self.runs = [
            Run(seed, arm, rate)
            for rate in args.learning_rates  # a whole comparison before the next one
            for seed in self.seeds
            for arm in args.arms
        ]
        self.began = time.monotonic()
        self.forks = multiprocessing.get_context("forkserver")
        self.forks.set_forkserver_preload(PRELOAD)
        forkserver.ensure_running()  # before the graders do, which have their own list

    def run(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._check_settings()
        left = [run for run in self.runs if not self.records.has(run)]
        if not left:
            return
        shared = compose(self._overrides(self.out / "shared", left[0].seed))
        self.references = self._references(shared)
        first = replace(shared, student=replace(shared.student, hf_path=self._student(left[0])))
        with make_server(first, self.out / "server.log") as server:
            server.start()
            self.server = server
            os.environ[API_KEY_VARIABLE] = server.api_key
            done_before = len(self.runs) - len(left)
            seed = None
            for index, run in enumerate(left):
                if run.seed != seed:
                    seed = run.seed
                    self._prepare_seed(run)
                self._train_and_evaluate(run)
                spent = time.monotonic() - self.began
                remaining = spent / (index + 1) * (len(left) - index - 1)
                logger.info(
                    "[%d/%d] seed %d, %s: %.0f s so far, about %.0f s left",
                    done_before + index + 1, len(self.runs), run.seed, run.folder, spent, remaining,
                )  # fmt: skip

    def _check_settings(self) -> None:
        """A study is one set of settings: other ones belong into another folder."""
        path = self.out / SETTINGS_FILE
        settings = {"steps": self.args.steps, "overrides": self.args.overrides}
        if path.exists() and json.loads(path.read_text())["asked"] != settings:
            raise PacedError(f"{self.out} holds a study with other settings: give another --out")
        described = {"asked": settings, "machine": machine()}
        path.write_text(json.dumps(described, indent=1) + "\n")

    def _overrides(self, folder: Path, seed: int) -> list[str]:
        return [
            "--config-name",
            "quickstart",
            f"exp_manager.exp_dir={folder.parent}",
            f"exp_manager.name={folder.name}",
            "exp_manager.create_tensorboard_logger=false",
            f"exp_manager.checkpoint_callback_params.every_n_train_steps={self.args.steps}",
            "trainer.devices=1",
            "model.tensor_model_parallel_size=1",
            f"trainer.max_steps={self.args.steps}",
            f"model.seed={seed}",
            *self.args.overrides,
        ]

    def _references(self, config: PacedConfig) -> Path:
        """One response of the teacher to every problem, the same for all seeds."""
        path = self.out / "shared" / REFERENCES_FILE
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            prompts = prepare.make_prompts(config)
            with progress_bar() as bar:
                sample_references(
                    config, load_problems(config.data.problems), prompts, path.parent, bar
                )
        return path

    def _student(self, run: Run) -> str:
        folder = self.out / f"seed_{run.seed}" / "student"
        if not (folder / "tokenizer.json").exists():  # written last
            began = time.monotonic()
            model: Any = models.train(models.STUDENT, run.seed, f"student of seed {run.seed}")
            model.save_pretrained(folder)
            models.write_tokenizer(folder)
            logger.info("student of seed %d: %.0f s", run.seed, time.monotonic() - began)
        return str(folder)

    def _config(self, run: Run) -> PacedConfig:
        """Of the arm, on the server that runs."""
        folder = self.out / f"seed_{run.seed}" / run.folder
        arm = ARMS.get(run.arm, Arm(()))
        return compose(
            [
                *self._overrides(folder, run.seed),
                f"student.hf_path={self._student(run)}",
                f"rollout.endpoints=[{','.join(self.server.endpoints)}]",
                "references.source=file",
                f"references.path={self.references}",
                *([f"model.optim.lr={run.learning_rate}"] if run.learning_rate else []),
                f"weights.num_rollouts={arm.num_rollouts}",
                *arm.overrides,
            ]
        )

    def _prepare_seed(self, of: Run) -> None:
        """Pass rates with every K that the arms need, and the untrained student's accuracy."""
        base = Run(of.seed, BASE, 0.0)
        config = self._config(base)
        folder = self.out / f"seed_{of.seed}" / BASE
        problems = load_problems(config.data.problems)
        counts = sorted({ARMS[name].num_rollouts for name in self.args.arms})
        files = sorted(Path(config.student.hf_path).glob("*.safetensors"))
        missing = [k for k in counts if not pass_rates_file(folder, k).exists()]
        if not missing and self.records.has(base):
            return
        with open_sampler(config, folder) as sampler, progress_bar() as bar:
            send_files(sampler.weights.sync, files, f"base of seed {of.seed}")
            for k in missing:
                weights = replace(config.weights, num_rollouts=k)
                prepare.estimate_pass_rates(
                    replace(config, weights=weights), problems, sampler, folder, step=0, bar=bar
                )
                (folder / PASS_RATES_FILE).rename(pass_rates_file(folder, k))
            if not self.records.has(base):
                fields = evaluate_all(config, sampler, "base")
                table = PassRateTable.read(
                    pass_rates_file(folder, config.weights.num_rollouts), problems
                )
                rates = [row.pass_rate for row in table.rows]
                self.records.append(base, fields | {"pass_rates": spread(rates)})

    def _train_and_evaluate(self, run: Run) -> None:
        if self.records.has(run):
            return
        folder = self.out / f"seed_{run.seed}" / run.folder
        config = self._config(run)
        table = pass_rates_file(folder.parent / BASE, ARMS[run.arm].num_rollouts)
        config = replace(config, weights=replace(config.weights, pass_rates=str(table)))
        shutil.rmtree(folder, ignore_errors=True)  # a run takes seconds: nothing to resume
        began = time.monotonic()
        worker = self.forks.Process(
            target=train_and_export, args=(config, folder, self.server.api_key)
        )
        worker.start()
        worker.join()
        if worker.exitcode:
            raise PacedError(f"{folder}: training ended with exit code {worker.exitcode}")
        trained = time.monotonic()
        with open_sampler(config, folder / "evaluation") as sampler:
            files = sorted((folder / "hf").glob("*.safetensors"))
            send_files(sampler.weights.sync, files, f"{run.seed} {run.folder}")
            fields = evaluate_all(config, sampler, run.folder)
        fields |= {
            **training_fields(folder / "metrics.jsonl"),
            "train_s": round(trained - began, 1),
            "evaluate_s": round(time.monotonic() - trained, 1),
        }
        self.records.append(run, fields)
        for made in ("checkpoints", "rollouts", "hf", "evaluation"):
            shutil.rmtree(folder / made, ignore_errors=True)


def train_and_export(config: PacedConfig, folder: Path, api_key: str) -> None:
    """In a process of its own."""
    from nemo_paced.run.config_file import save_config
    from nemo_paced.run.convert import export_hf
    from nemo_paced.training.loop import train

    os.environ[API_KEY_VARIABLE] = api_key
    set_up_logging(0)
    for name in ("nemo_paced", "megatron"):
        logging.getLogger(name).setLevel(logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder)
    train(config, folder)
    export_hf(PacedConfig(), folder, folder / "hf")


def evaluate_all(config: PacedConfig, sampler: Sampler, label: str) -> dict[str, Any]:
    """Held-out problems as the recipe samples them (T .6) and at T 1; old skills as the recipe."""
    heldout = load_problems(config.data.validation_problems or "")
    old = load_problems(config.data.forgetting_problems or "")
    whole = replace(config, evaluation=replace(config.evaluation, temperature=1.0, top_p=1.0))
    asked = {
        "heldout": (config, heldout),
        "heldout_t1": (whole, heldout),
        "old_skills": (config, old),
    }
    fields: dict[str, Any] = {}
    with progress_bar() as bar:
        for suite, (how, problems) in asked.items():
            found = evaluate(how, sampler, problems, label=f"{label} {suite}", bar=bar)
            fields[suite] = accuracy_fields(found)
    return fields


def accuracy_fields(found: Accuracy) -> dict[str, Any]:
    groups = {name: round(value, 5) for name, value in found.groups.items()}
    return {
        "mean": found.mean,
        "groups": groups,
        "truncated": found.truncated,
        "samples": found.samples,
    }


def training_fields(metrics: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    return {
        "tokens": sum(row.get("tokens") or 0 for row in rows),
        "problems": sum(row["weights/active_problems"] for row in rows),
        "clipped": sum(bool(row.get("clipped")) for row in rows) / len(rows),
    }


def spread(rates: list[float]) -> dict[str, float]:
    return {
        "below_0.2": sum(rate < 0.2 for rate in rates) / len(rates),
        "above_0.8": sum(rate > 0.8 for rate in rates) / len(rates),
        "mean": sum(rates) / len(rates),
    }


def pass_rates_file(folder: Path, num_rollouts: int) -> Path:
    return folder / f"pass_rates_k{num_rollouts}.parquet"


def open_sampler(config: PacedConfig, folder: Path) -> Sampler:
    return prepare.student_sampler(config, folder, prepare.make_prompts(config), lambda note: None)


def make_server(config: PacedConfig, log_path: Path) -> Replicas:
    student = Path(config.student.hf_path)
    return Replicas(
        student,
        config.rollout,
        max_model_len=training_length(config, student, config.data.max_prompt_length),
        dtype=served_dtype(config),
        log_path=log_path,
    )


def compose(overrides: list[str]) -> PacedConfig:
    found: list[PacedConfig] = []
    with_config(overrides, found.append)
    return found[0]


def machine() -> dict[str, Any]:
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": installed_versions(),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="runs and records; resumable")
    parser.add_argument("--seeds", type=int, default=8, help="how many (8)")
    parser.add_argument("--first-seed", type=int, default=1, help="and those after it (1)")
    parser.add_argument("--arms", default="core", help="core, all, or names with commas")
    parser.add_argument("--learning-rates", default="1e-4", help="with commas (1e-4)")
    parser.add_argument("--steps", type=int, default=160, help="of each arm (160)")
    parser.add_argument("--summary", type=Path, help="write the figures here as JSON, and a plot")
    parser.add_argument("--summary-only", action="store_true", help="of what is there already")
    parser.add_argument("overrides", nargs="*", help="of conf/quickstart.yaml, for every arm")
    args = parser.parse_args()
    try:
        args.learning_rates = [float(rate) for rate in args.learning_rates.split(",")]
        args.arms = chosen(args.arms)
    except ValueError as error:
        parser.error(f"--arms, --learning-rates: {error}")
    return args


if __name__ == "__main__":
    main()
