"""Accuracy of a model on problem files and on tasks of lm-eval."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from rich.progress import Progress

from nemo_paced.config import PacedConfig, to_dict
from nemo_paced.data.prompts import PromptKind, Prompts, chat_settings
from nemo_paced.evaluation.limits import Limits
from nemo_paced.evaluation.lm_eval_tasks import Suite, run_suite
from nemo_paced.evaluation.results import IN_WORDS
from nemo_paced.files import digest
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.grading.grader import rules
from nemo_paced.records import Problem
from nemo_paced.rollout.sampler import Sampler
from nemo_paced.rollout.served import served_dtype
from nemo_paced.run.progress import bar_task, server_notes
from nemo_paced.training import prepare

logger = logging.getLogger(__name__)

DIGITS = 12  # hex digits of a digest


@dataclass(frozen=True, slots=True)
class Job:
    """The suites that every model of an evaluation is asked, and how.

    Attributes:
        problems: of each suite that is sampled.
        tasks: suites of lm-eval by name.
    """

    config: PacedConfig
    problems: Mapping[str, Sequence[Problem]]
    tasks: Mapping[str, Suite]
    limits: Limits

    @property
    def settings(self) -> dict[str, Any]:
        """How the suites are asked: the ``settings`` of ``results.json``."""
        running = self.config.rollout.endpoints
        settings: dict[str, Any] = {"dtype": "" if running else served_dtype(self.config)}
        if self.problems:
            settings |= sampling_settings(self.config, self.limits.response)
            settings["max_tokens_from"] = self.limits.response_from
        if self.tasks:
            own = to_dict(self.config.evaluation.lm_eval)
            settings["lm_eval"] = {
                **{name: own[name] for name in ("num_fewshot", "limit", "apply_chat_template")},
                "max_length": self.limits.lm_eval,
            }
        return settings

    @property
    def asked(self) -> dict[str, str]:
        """A digest of each suite's questions: the same for models that can be compared."""
        data = self.config.data
        chat = chat_settings(PromptKind.evaluation, data, self.config.evaluation)
        framed = [data.use_chat_template, chat.system, chat.variables, data.chat_template_date]
        sampled = {
            suite: [data.prompt_template, *framed, *(problem.content() for problem in problems)]
            for suite, problems in self.problems.items()
        }
        chats = self.config.evaluation.lm_eval.apply_chat_template
        chosen = {
            name: [suite.questions, suite.metrics, suite.contents, *(framed if chats else [])]
            for name, suite in self.tasks.items()
        }
        return {name: digest([content], DIGITS) for name, content in (sampled | chosen).items()}

    def ask(
        self, hf_dir: Path, work_dir: Path, *, label: str, bar: Progress
    ) -> dict[str, Accuracy]:
        """Serve a model (or ask the servers that run) and measure every suite.

        Args:
            work_dir: folder of this model, which keeps finished answers: none is asked for again.
            label: the model's, for the progress bar and the log.
        """
        config = replace(self.config, student=replace(self.config.student, hf_path=str(hf_dir)))
        prompts = _prompts(hf_dir, config)
        sampler = Sampler(
            hf_dir,
            config.rollout,
            config.grading,
            seed=config.model.seed,
            dtype=served_dtype(config),
            max_model_len=self.limits.context,
            prompts=prompts,
            store_dir=work_dir / "rollouts",
            log_path=work_dir / "logs" / "server.log",
            notify=server_notes(bar),
        )
        with sampler:
            found = {
                suite: evaluate(
                    config,
                    sampler,
                    problems,
                    label=f"{label} {suite}",
                    bar=bar,
                    purpose=self._purpose(suite, prompts),
                    max_tokens=self.limits.response,
                )
                for suite, problems in self.problems.items()
            }
            return found | self._ask_lm_eval(sampler, prompts, work_dir, label, bar)

    def _purpose(self, suite: str, prompts: Prompts) -> str:
        """The name of a suite's samples in the store, by what they depend on besides the model.

        A store that was filled with other settings or prompts holds none of them. The number of
        samples may grow, and other answers or another verifier grade them again.
        """
        asked = [(p.id, prompts.of(p, PromptKind.evaluation)) for p in self.problems[suite]]
        others = (*IN_WORDS, *grading_settings(self.config), "lm_eval")
        settings = {k: v for k, v in self.settings.items() if k not in others}
        content = [settings, prompts.stop_token_ids, asked]
        return f"evaluation {suite} {digest(content, DIGITS)}"

    def _ask_lm_eval(
        self, sampler: Sampler, prompts: Prompts, work_dir: Path, label: str, bar: Progress
    ) -> dict[str, Accuracy]:
        if not self.tasks:
            return {}
        from nemo_paced.evaluation.lm_eval_endpoint import ServedModel

        settings, rollout = self.config.evaluation.lm_eval, self.config.rollout
        model = ServedModel(
            sampler.client.endpoints,
            sampler.api_key,
            hf_dir=sampler.model_dir,
            max_length=self.limits.lm_eval,
            num_concurrent=rollout.max_in_flight * len(sampler.client.endpoints),
            timeout_s=rollout.request_timeout_s,
            stop_token_ids=prompts.stop_token_ids,
            chat=prompts.chat(PromptKind.evaluation) if settings.apply_chat_template else None,
        )
        # lm-eval itself keys answers by prompt alone
        asked = digest([self.settings["dtype"], self.limits.lm_eval], DIGITS)
        cache = work_dir / f"lm_eval_{asked}.db"
        bar.stop()  # lm-eval draws its own
        found = {}
        for name, suite in self.tasks.items():
            logger.info("evaluate %s %s: lm-eval asks the server", label, name)
            found[name] = run_suite(suite, model, settings, cache)
        bar.start()
        return found


def longest_prompt(
    config: PacedConfig, models: Mapping[str, Path], problems: Mapping[str, Sequence[Problem]]
) -> int:
    """Tokens of the longest prompt to any of the models; 0 without problems.

    Args:
        models: Hugging Face directory by label.
        problems: by suite.
    """
    kind = PromptKind.evaluation
    prompts = [_prompts(folder, config) for folder in models.values()]
    lengths = (p.lengths(suite, kind) for p in prompts for suite in problems.values())
    return max(chain.from_iterable(lengths), default=0)


def evaluate(
    config: PacedConfig,
    sampler: Sampler,
    problems: Sequence[Problem],
    *,
    label: str,
    bar: Progress,
    purpose: str | None = None,
    max_tokens: int | None = None,
) -> Accuracy:
    """mean@k of the served model, sampled as the ``evaluation`` block says.

    Args:
        purpose: name of the samples in the store; ``None``: the label gives it.
        max_tokens: of a response; ``None``: what the model's context leaves.
    """
    with bar_task(bar, f"evaluate {label}", len(problems)) as advance:
        rollouts = sampler.sample(
            problems,
            purpose=purpose or f"evaluation {label}",
            step=0,
            settings=prepare.evaluation_settings(config, max_tokens),
            progress=advance,
        )
    return Accuracy.of(rollouts, problems)


def _prompts(hf_dir: Path, config: PacedConfig) -> Prompts:
    return Prompts(hf_dir, config.data, config.teacher.privileged_context, config.evaluation)


def sampling_settings(config: PacedConfig, max_tokens: int | None = None) -> dict[str, Any]:
    """The sampling settings that ``results.json`` keeps beside accuracies.

    Args:
        max_tokens: of a response; ``None``: what the student's context leaves.
    """
    settings = asdict(prepare.evaluation_settings(config, max_tokens))
    return {
        **{name: settings[name] for name in ("temperature", "top_p", "max_tokens")},
        **grading_settings(config),
        "seed": config.model.seed,
    }


def grading_settings(config: PacedConfig) -> dict[str, Any]:
    """How responses are graded, for ``results.json``: another way needs no new responses."""
    grading = config.grading
    return {
        "verifier": grading.verifier,
        "last_number": grading.last_number,
        "numeric_tolerance": grading.numeric_tolerance,
        "verifier_rules": digest(rules(grading), DIGITS),
    }
