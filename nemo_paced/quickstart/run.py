"""The command ``quickstart``: the whole job on the embedded models, several arms at equal steps.

The arms are unweighted, hard filter and PACED, beside the untrained base. One rollout server runs
throughout; references and the first pass rates are sampled once and shared by all arms, so that
these differ only in what they are compared on.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from rich.console import Console

from nemo_paced.compose import Parser, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.data.problems import load_problems
from nemo_paced.errors import Interrupted, PacedError
from nemo_paced.evaluation.results import ResultsFile
from nemo_paced.evaluation.run import evaluate, sampling_settings
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.logs import PART_VARIABLE
from nemo_paced.records import Problem
from nemo_paced.refit.file_transfer import send_files
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.run.config_file import PASS_RATES_FILE
from nemo_paced.run.progress import progress_bar, server_notes
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.vllm_engine import gpu_count
from nemo_paced.training import prepare
from nemo_paced.training.references import REFERENCES_FILE, sample_references

# arm -> its overrides
ARMS = {
    "unweighted": ["weights.scheme=unweighted", "schedule=forward_kl"],
    "hard_filter": ["weights.scheme=hard_filter", "schedule=forward_kl"],
    "paced": [],
}
ENDING_S = 6.0  # longest that a command takes to end its ranks

logger = logging.getLogger(__name__)
console = Console(stderr=True)


def main(arguments: list[str]) -> None:
    """The command ``quickstart``."""
    parser = Parser("quickstart")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int)
    parser.add_argument("--arms", default=",".join(ARMS))
    known, overrides = parser.parse_known_args(arguments)
    if known.steps:
        overrides.append(f"trainer.max_steps={known.steps}")
    arms = [name for name in known.arms.split(",") if name]
    if not arms:
        raise PacedError(f"--arms names none; choose of {', '.join(ARMS)}")
    if unknown := [name for name in arms if name not in ARMS]:
        raise PacedError(f"--arms: no arm {unknown[0]!r}; choose of {', '.join(ARMS)}")
    signal.signal(signal.SIGTERM, _interrupt)  # ends its commands too
    out = known.out.absolute()
    # arguments that every arm gets
    common = ["--config-name", "quickstart", f"exp_manager.exp_dir={out}", *overrides]
    with_config(common, lambda config: Quickstart(config, common, out, arms).run())


class Quickstart:
    """The job of ``quickstart``: shared preparation, then training and evaluation of each arm.

    Args:
        common: arguments of the commands of every arm.
        out: directory of everything that is written.
        arms: keys of ``ARMS``.
    """

    def __init__(self, config: PacedConfig, common: list[str], out: Path, arms: list[str]) -> None:
        self.config, self.common, self.out, self.arms = config, common, out, arms
        self.suites: dict[str, list[Problem]] = {
            "heldout": load_problems(config.data.validation_problems or "", data=config.data),
            "forgetting": load_problems(config.data.forgetting_problems or "", data=config.data),
        }
        self.results: dict[str, dict[str, Accuracy]] = {}
        self.done, self.total = 0, 4 + 2 * len(arms)
        self.began = time.monotonic()

    def run(self) -> None:
        """Run all parts, then write ``results.json`` and ``report.html``."""
        self.out.mkdir(parents=True, exist_ok=True)
        problems = load_problems(self.config.data.problems, data=self.config.data)
        prompts = prepare.make_prompts(self.config)
        references = self.out / "shared" / REFERENCES_FILE
        references.parent.mkdir(exist_ok=True)

        def ask_teacher() -> None:
            if references.exists():
                self.done += 1
                return
            with self._part("references: the teacher answers every problem"):
                sample_references(self.config, problems, prompts, references.parent, bar)

        with progress_bar() as bar:
            one_by_one = gpu_count() > 0  # a GPU has no memory for a second server
            if one_by_one:
                ask_teacher()
            with prepare.student_sampler(
                self.config,
                references.parent,
                prompts,
                server_notes(bar),
                max_model_len=self._longest_sequence(),
                meanwhile=None if one_by_one else ask_teacher,
            ) as sampler:
                count = self.config.weights.num_rollouts
                with self._part(f"pass rates: {count} rollouts of the student a problem"):
                    prepare.estimate_pass_rates(
                        self.config, problems, sampler, self.out / "shared", step=0, bar=bar
                    )
                with self._part("evaluate base"):
                    self._evaluate("base", sampler, lambda: None)
                bar.stop()  # an arm draws its own bar
                for arm in self.arms:
                    self._run_arm(arm, sampler, references)
        self._finish()

    def _run_arm(self, arm: str, sampler: Sampler, references: Path) -> None:
        with self._part(f"train {arm}, {self.config.trainer.max_steps} steps"):
            self._train(arm, sampler, references)
        with self._part(f"export and evaluate {arm}"):
            hf_dir = self.out / arm / "hf"
            if not hf_dir.exists():
                _command(["export-hf", str(self.out / arm), str(hf_dir)])
            files = sorted(hf_dir.glob("*.safetensors"))
            self._evaluate(arm, sampler, lambda: send_files(sampler.weights.sync, files, arm))

    def _train(self, arm: str, sampler: Sampler, references: Path) -> None:
        """Train an arm in processes of its own, on the rollout server that runs already."""
        key = sampler.api_key
        _command(
            [
                "train",
                *self.common,
                f"exp_manager.name={arm}",
                f"rollout.endpoints=[{','.join(sampler.client.endpoints)}]",
                "references.source=file",
                f"references.path={references}",
                "references.wrong=keep",  # the file says what was dropped
                "references.max_attempts=null",
                f"weights.pass_rates={self.out / 'shared' / PASS_RATES_FILE}",
                *ARMS[arm],
            ],
            {API_KEY_VARIABLE: key},
        )

    def _longest_sequence(self) -> int:
        """Tokens of the longest sequence: one server samples for training and for evaluation."""
        data, evaluated = self.config.data, prepare.evaluation_settings(self.config).max_tokens
        return data.max_prompt_length + max(data.max_response_length, evaluated)

    def _evaluate(self, label: str, sampler: Sampler, serve: Callable[[], None]) -> None:
        serve()
        with progress_bar() as bar:
            self.results[label] = {
                suite: evaluate(self.config, sampler, problems, label=f"{label} {suite}", bar=bar)
                for suite, problems in self.suites.items()
            }

    @contextmanager
    def _part(self, what: str) -> Iterator[None]:
        """Print what begins, how far the whole job is, and about how long is left."""
        self.done += 1
        spent = time.monotonic() - self.began
        left = ""
        if self.done > 2:
            left = f", about {spent / (self.done - 1) * (self.total - self.done + 1):.0f} s left"
        console.print(
            f"[bold][{self.done}/{self.total}][/bold] {what} ({spent:.0f} s so far{left})"
        )
        yield

    def _finish(self) -> None:
        from nemo_paced.report.comparison import terminal_table, write_comparison
        from nemo_paced.report.run_page import write_report

        runs = {arm: self.out / arm for arm in self.arms}
        report = self.out / "report.html"
        settings = sampling_settings(self.config)
        with self._part("report"):
            ResultsFile(self.results, settings).write(self.out / "results.json")
            for arm, run_dir in runs.items():
                own = {label: self.results[label] for label in ("base", arm)}
                ResultsFile(own, settings).write(run_dir / "results.json")
                write_report(run_dir)
            verdict = write_comparison(
                report,
                "PACED quickstart: arms side by side",
                runs,
                self.results,
                subject="paced" if "paced" in self.arms else self.arms[-1],
                settings=settings,
            )
        console.print(terminal_table(self.results))
        console.print("\n".join(verdict), highlight=False)
        console.print(
            f"\nreport       {report}\nresults      {self.out / 'results.json'}\n"
            f"runs         {', '.join(str(path) for path in runs.values())}\n"
            f"             each with metrics.jsonl, pass_rates.parquet, checkpoints/ and hf/\n"
            f"pass rates   {self.out / 'shared' / PASS_RATES_FILE}\n"
            f"took         {time.monotonic() - self.began:.0f} s"
        )


def _interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


def _command(arguments: list[str], environment: dict[str, str] | None = None) -> None:
    """Run another ``nemo-paced`` command in a process of its own, which ends with this one.

    Raises:
        PacedError: the command failed.
        KeyboardInterrupt: it was interrupted.
    """
    with subprocess.Popen(
        [sys.executable, "-m", "nemo_paced.cli", *arguments],
        env={**os.environ, PART_VARIABLE: str(os.getpid()), **(environment or {})},
    ) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            for end in (None, process.terminate, process.kill):  # it got the Ctrl-C too
                if end is not None:
                    end()
                with suppress(subprocess.TimeoutExpired):
                    process.wait(ENDING_S)
                    break
            raise
    if status in (128 + signal.SIGINT, 128 + signal.SIGTERM):
        raise Interrupted(status - 128)
    if status:
        raise PacedError(f"nemo-paced {arguments[0]} failed with exit code {status}")
