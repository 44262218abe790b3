"""The names of what a run logs, in one place; the same in ``metrics.jsonl``, TensorBoard and W&B.

Losses and divergences are in nats, times in seconds.
"""

METRICS = {
    "step": "optimizer steps taken when the line was written",
    "stage": "name of the stage",
    "loss": "what was minimised: sum of weight x divergence over the normaliser",
    "token_divergence": "mean divergence of a trained response token, unweighted",
    "grad_norm": "global gradient norm before clipping; null when the step was skipped",
    "clipped": "whether the gradient was scaled down to trainer.gradient_clip_val",
    "skipped": "whether the update was left out because of NaN or Inf",
    "learning_rate": "of this step",
    "tokens": "response tokens trained on",
    "weights/active_problems": "problems of the batch with weight above 0",
    "weights/mean_pass_rate": "of the training set, as the table has it after this step's rollouts",
    "weights/share_below_0.2": "share of the training problems with a pass rate below 0.2",
    "weights/share_between": "of 0.2 to 0.8",
    "weights/share_above_0.8": "above 0.8",
    "weights/effective_sample_size": "(sum w)^2 / sum w^2 over the training set, in problems",
    "teacher/cached": "responses whose teacher signal came from teacher.cache_dir",
    "rollout/accuracy": "share of this step's sampled responses that were right",
    "rollout/truncated": "share of this step's sampled responses cut at the token limit",
    "rollout/mean_length": "tokens of a response",
    "rollout/logprob_gap": "mean |trainer - server| log-probability of the sampled tokens",
    "rollout/staleness": "optimizer steps between the sampling weights and the current ones",
    "validation/accuracy": "mean@k on the held-out problems",
    "validation/standard_error": "of validation/accuracy, over problems",
    "time/step_s": "wall time of the whole step",
    "time/teacher_s": "teacher forward",
    "time/student_s": "student forward, backward and update",
    "time/rollout_s": "waiting for the batch: sampling and grading in the reverse-KL stage",
    "time/refit_s": "weights from the trainer to the server",
    "time/checkpoint_s": "writing a checkpoint",
}
