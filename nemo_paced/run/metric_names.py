"""Every value that a run logs: its name, the same in all loggers, its unit and its meaning.

``docs/metrics.md`` is made from here: ``make docs``.
"""

from __future__ import annotations

from dataclasses import dataclass

EVERY_STEP = "every step"
TRAINED = "steps with a problem of weight above 0"
ON_POLICY = "steps on rollouts"
THINKING = "steps on rollouts of a tokenizer with `</think>` or its like"
VALIDATION = "steps with a validation"


@dataclass(frozen=True, slots=True)
class Metric:
    """What a logged name stands for.

    Attributes:
        unit: of its value; ``share`` is between 0 and 1, ``0 or 1`` a yes or no.
        meaning: Markdown, as docs/metrics.md has it.
        when: at which steps it is logged.
    """

    unit: str
    meaning: str
    when: str = EVERY_STEP


METRICS = {
    "step": Metric("steps", "optimizer steps taken when the line was written"),
    "stage": Metric("name", "of the stage; in `metrics.jsonl` alone, loggers take numbers"),
    "loss": Metric("nats", "what was minimised: sum of weight x divergence over the normaliser"),
    "token_divergence": Metric(
        "nats", "mean divergence of a trained response token, unweighted", TRAINED
    ),
    "grad_norm": Metric("", "global gradient norm before clipping; null when the step was skipped"),
    "clipped": Metric(
        "0 or 1", "whether the gradient was scaled down to `trainer.gradient_clip_val`"
    ),
    "skipped": Metric("0 or 1", "whether the update was left out because of NaN or Inf"),
    "problems": Metric(
        "ids", "of the batch; in `metrics.jsonl` alone", "steps that were skipped or a loss spike"
    ),
    "learning_rate": Metric("", "of this step"),
    "tokens": Metric("tokens", "response tokens trained on"),
    "weights/active_problems": Metric("problems", "of the batch with weight above 0"),
    "weights/mean_pass_rate": Metric(
        "share", "of the training set, as the table has it after this step's rollouts"
    ),
    "weights/share_below_0.2": Metric("share", "of the training problems: pass rate below 0.2"),
    "weights/share_between": Metric("share", "of the training problems: pass rate of 0.2 to 0.8"),
    "weights/share_above_0.8": Metric("share", "of the training problems: pass rate above 0.8"),
    "weights/effective_sample_size": Metric(
        "problems", "(sum w)^2 / sum w^2 over the training set"
    ),
    "teacher/cached": Metric(
        "responses", "whose teacher signal came from `teacher.cache_dir`", "steps with a cache"
    ),
    "rollout/accuracy": Metric(
        "share",
        "of this step's sampled responses that were right, among those with a verdict",
        ON_POLICY,
    ),
    "rollout/wrong": Metric(
        "share", "of this step's sampled responses that gave a wrong answer", ON_POLICY
    ),
    "rollout/no_answer": Metric(
        "share", "of this step's sampled responses that ended without an answer", ON_POLICY
    ),
    "rollout/cut_before_answer": Metric(
        "share", "of this step's sampled responses cut before they gave an answer", ON_POLICY
    ),
    "rollout/timed_out": Metric(
        "share", "of this step's sampled responses that the verifier took too long for", ON_POLICY
    ),
    "rollout/truncated": Metric(
        "share", "of this step's sampled responses cut at the token limit", ON_POLICY
    ),
    "rollout/mean_length": Metric("tokens", "of a sampled response", ON_POLICY),
    "rollout/mean_thinking_length": Metric(
        "tokens", "of a sampled response up to the end of its thought", THINKING
    ),
    "rollout/unfinished_thoughts": Metric(
        "share", "of this step's sampled responses that never ended their thought", THINKING
    ),
    "rollout/logprob_gap": Metric(
        "nats", "mean |trainer - server| log-probability of the sampled tokens", ON_POLICY
    ),
    "rollout/staleness": Metric(
        "steps", "optimizer steps between the sampling weights and the current ones", ON_POLICY
    ),
    "rollout/sampling_s": Metric(
        "s", "how long the server took for this step's rollouts, whoever waited", ON_POLICY
    ),
    "rollout/trainer_wait": Metric(
        "share", "of the step's wall time for which the ranks waited for rollouts", ON_POLICY
    ),
    "rollout/server_wait": Metric(
        "share", "of the step's wall time for which the servers sampled nothing", ON_POLICY
    ),
    "validation/accuracy": Metric("share", "mean@k on the held-out problems", VALIDATION),
    "validation/standard_error": Metric(
        "share", "of `validation/accuracy`, over problems", VALIDATION
    ),
    "time/step_s": Metric("s", "wall time of the whole step; the parts below do not overlap"),
    "time/teacher_s": Metric("s", "teacher forward", TRAINED),
    "time/student_s": Metric("s", "student forward, backward and update", TRAINED),
    "time/rollout_s": Metric("s", "waiting for the batch: sampling and grading where on-policy"),
    "time/refit_s": Metric("s", "weights from the trainer to the server", "steps with a refit"),
    "time/pass_rates_s": Metric(
        "s", "estimating all pass rates again", "steps with a new estimate"
    ),
    "time/validation_s": Metric("s", "sampling and grading the held-out problems", VALIDATION),
    "time/checkpoint_s": Metric(
        "s", "writing a checkpoint, as long as training waited", "steps with a checkpoint"
    ),
    "throughput/tokens_per_second": Metric(
        "tokens / s", "response tokens over the teacher's and the student's time", TRAINED
    ),
    "throughput/student_tflops_per_rank": Metric(
        "TFLOP / s", "model FLOPs of forward and backward, without padding", TRAINED
    ),
    "throughput/teacher_tflops_per_rank": Metric(
        "TFLOP / s",
        "model FLOPs of its forward; not where it is cached or has ranks of its own",
        TRAINED,
    ),
    "throughput/padding_share": Metric(
        "share", "of the student's positions in a step, those that hold no token", TRAINED
    ),
    "throughput/mfu": Metric(
        "share",
        "the student's model FLOPs over the GPU's peak",
        "bf16 on a GPU whose peak is known",
    ),
}
