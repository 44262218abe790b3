"""What stored answers and earlier results are recognised by."""

from dataclasses import replace

import pytest

from nemo_paced.compose import ASSETS
from nemo_paced.config import (
    DataConfig,
    EvaluationConfig,
    GradingConfig,
    LmEvalConfig,
    PacedConfig,
)
from nemo_paced.data.prompts import Prompts
from nemo_paced.evaluation.limits import Limits
from nemo_paced.evaluation.lm_eval_tasks import Suite
from nemo_paced.evaluation.run import Job, grading_settings
from nemo_paced.records import Problem

PROBLEMS = {"few": [Problem("a", "solve s1 f2 =", "s3")]}
TASKS = {"mmlu": Suite({}, {"mmlu_a": [1, 5]}, {"mmlu_a": "acc"}, {"mmlu_a": "0f"})}


def job(*, problems=PROBLEMS, tasks=None, response=16, template="{problem}", **changed):
    """Fields of the evaluation block, or ``verifier``, ``dtype`` and ``seed``."""
    config = PacedConfig(
        data=DataConfig(prompt_template=template, use_chat_template=False),
        grading=GradingConfig(verifier=changed.pop("verifier", "exact")),
    )
    config.rollout.dtype = changed.pop("dtype", "auto")
    config.model.seed = changed.pop("seed", 1)
    config.evaluation = EvaluationConfig(**changed)
    return Job(config, problems, tasks or {}, Limits(response, "a setting", 4096, 64))


def purpose(job):
    prompts = Prompts(ASSETS / "student", job.config.data, job.config.teacher.privileged_context)
    return job._purpose("few", prompts)


@pytest.mark.parametrize(
    "changed",
    [
        {"temperature": 1.0},
        {"top_p": 1.0},
        {"response": 15},
        {"template": "hint {problem}"},
        {"problems": {"few": [Problem("a", "solve s1 f3 =", "s3")]}},
        {"dtype": "float32"},
        {"seed": 2},
    ],
)
def test_samples_that_were_asked_otherwise_are_asked_again(changed):
    assert purpose(job(**changed)) != purpose(job())


def test_more_samples_go_on_from_those_that_are_there_whatever_else_is_evaluated():
    other_answer = {"few": [Problem("a", "solve s1 f2 =", "s4")]}
    assert purpose(job(problems=other_answer)) == purpose(job()), "they are graded again"
    assert purpose(job(verifier="multiple_choice")) == purpose(job())
    assert purpose(job(samples=16)) == purpose(job(samples=8, tasks=TASKS))
    limited = replace(job(), limits=Limits(16, "the context of the model, 64", 4096, 64))
    assert purpose(limited) == purpose(job()), "whatever the limit comes from"


def test_results_say_how_responses_were_graded():
    config = PacedConfig()
    for grading in (
        GradingConfig(last_number=False),
        GradingConfig(numeric_tolerance=0.01),
        GradingConfig(verifier="exact"),
    ):
        other = grading_settings(replace(config, grading=grading))
        assert other != grading_settings(config)
        assert other["verifier_rules"] != grading_settings(config)["verifier_rules"]


def test_questions_name_the_chat_that_they_were_asked_in():
    def asked(data=None, **evaluation):
        lm_eval = LmEvalConfig(apply_chat_template=True)
        given = PacedConfig(
            data=data or DataConfig(), evaluation=EvaluationConfig(lm_eval=lm_eval, **evaluation)
        )
        return Job(given, PROBLEMS, TASKS, Limits(16, "a setting", 4096, 64)).asked

    plain, thinking = asked(), asked(chat_template_kwargs={"enable_thinking": True})
    assert all(plain[suite] != thinking[suite] for suite in ("few", "mmlu"))
    same = asked(DataConfig(chat_template_kwargs={"enable_thinking": True}))
    assert same == thinking, "wherever it is said"
    assert asked(system_prompt="Be brief.") != plain == asked(system_prompt="")


def test_questions_name_what_was_asked():
    first = job(tasks=TASKS).asked
    assert first == job(tasks=TASKS, temperature=1.0).asked, "the settings are kept beside it"
    for changed in ({"questions": {"mmlu_a": [1, 6]}}, {"contents": {"mmlu_a": "1f"}}):
        other = replace(TASKS["mmlu"], **changed)
        assert job(tasks={"mmlu": other}).asked["mmlu"] != first["mmlu"]
    assert job(template="hint {problem}").asked["few"] != first["few"]


def test_settings_tell_what_was_sampled_and_what_lm_eval_was_asked():
    sampled, asked = job().settings, job(problems={}, tasks=TASKS).settings
    assert sampled["max_tokens"] == 16 and sampled["max_tokens_from"] == "a setting"
    assert "lm_eval" not in sampled and "temperature" not in asked
    assert asked["lm_eval"] == {
        "num_fewshot": 5,
        "limit": 2000,
        "apply_chat_template": False,
        "max_length": 4096,
    }
