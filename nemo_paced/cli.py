"""The command line ``nemo-paced COMMAND``, which imports nothing heavy before a command runs."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass

from nemo_paced.errors import Interrupted, PacedError, Stopped
from nemo_paced.logs import PART_VARIABLE, launcher_rank, set_up_logging
from nemo_paced.versions import check_versions

PARENT_POLL_S = 0.5
# Commands that need neither Megatron nor vLLM: they run where only files are.
OFFLINE = ("plan", "weights", "report", "grade")

RUN_HELP = """\
Configuration:
  --config-name NAME   recipe in conf/ (default: `default`); `quickstart` needs nothing else
  --config-path DIR    your own directory of YAML files, which may say `defaults: [default, _self_]`
  --cfg job            print the resolved configuration and start nothing
  key=value            dotted overrides, e.g. trainer.devices=4 model.optim.lr=1e-6

The run directory is exp_manager.exp_dir/exp_manager.name (default nemo_experiments/NAME)."""


@dataclass(frozen=True)
class Command:
    """A command of ``nemo-paced``.

    Attributes:
        entry: ``module:function``; the function takes the command's arguments.
        summary: one line of the overview.
        usage: what ``--help`` shows.
    """

    entry: str
    summary: str
    usage: str


COMMANDS = {
    "quickstart": Command(
        "nemo_paced.quickstart.run:main",
        "the whole job on two tiny embedded models: base, unweighted, hard filter, PACED",
        """\
usage: nemo-paced quickstart [--out DIR] [--steps N] [--arms NAME,NAME...] [key=value ...]

Samples references and pass rates, trains each arm for the same number of steps, exports and
evaluates it, and writes DIR/report.html and DIR/results.json. No network, no GPU.""",
    ),
    "pass-rates": Command(
        "nemo_paced.commands.prepare:pass_rates",
        "K graded rollouts of every problem by the student, and the weights that follow",
        f"""\
usage: nemo-paced pass-rates --config-name NAME [key=value ...]
       nemo-paced pass-rates --simulate [--pass-rates TABLE] [--problems 1000] [--seeds 10]
           [--seed 0] [--csv FILE] [--figure FILE.html] [weights.KEY=value ...]

Writes pass_rates.parquet into the run directory: id, num_correct, num_rollouts,
effective_correct, effective_rollouts, pass_rate, weight, student_step, num_truncated,
num_unanswered, num_timed_out. Interrupted, it goes on with the rollouts that are missing.
weights.estimator=posterior weighs without hard zeros; weights.adaptive.enabled=true then spends
weights.num_rollouts a problem (in the mean) where they help most.

--simulate needs no model: how wrong are weights after so many rollouts, by the plug-in estimate, by
the posterior, and by the posterior with adaptive rollouts? For three known distributions of pass
rates, or for those that TABLE may come from. What
the estimator saves and what adaptivity saves beyond it are told apart.

examples:
  nemo-paced pass-rates --config-name quickstart weights.num_rollouts=4
  nemo-paced pass-rates --config-name quickstart weights.estimator=posterior \\
      weights.adaptive.enabled=true
  nemo-paced pass-rates --simulate weights.fit_prior=true weights.estimator=posterior

{RUN_HELP}""",
    ),
    "weights": Command(
        "nemo_paced.commands.weights:weights",
        "what a table of pass rates says of exponents, prior and weights",
        """\
usage: nemo-paced weights --pass-rates TABLE [--snr FILE] [weights.KEY=value ...]

Prints the exponents that moment matching gives (arXiv 2603.11178), the prior that fits the counts,
the effective sample size of the weights, the variance that the paper's theory expects of the
weighted gradient (under its assumptions, or under the exponents that `nemo-paced snr` measured:
--snr RUN/snr/FILE.json), and the share of all weight by pass rate. Writes nothing.

example: nemo-paced weights --pass-rates RUN/pass_rates.parquet weights.beta=2""",
    ),
    "references": Command(
        "nemo_paced.commands.prepare:references",
        "one response of the teacher to every problem, for forward KL",
        f"""\
usage: nemo-paced references --config-name NAME [key=value ...]

Serves the teacher, samples a response to each problem with its privileged context in the prompt,
and writes references.jsonl into the run directory. `train` does this itself when it is missing.
Does nothing where no stage trains on responses of the teacher.

Responses are graded. references.wrong says what becomes of wrong ones: keep (default, the paper's),
resample (up to references.max_attempts samples, 8 by default; what is wrong then is kept) or drop
(after references.max_attempts, 1 by default): such a problem has weight 0 in stages with
responses=references. An interrupted command goes on where it stopped.

example: nemo-paced references --config-name RECIPE references.wrong=drop references.max_attempts=4

{RUN_HELP}""",
    ),
    "train": Command(
        "nemo_paced.commands.train:train",
        "pass-rate-weighted distillation; goes on where an earlier start stopped",
        f"""\
usage: nemo-paced train --config-name NAME [--dry-run [--full]] [key=value ...]

Starts trainer.devices ranks on this node; under torchrun or srun it is one rank. The run directory
holds config.yaml, metrics.jsonl, pass_rates.parquet, rollouts/ and checkpoints/.

SIGUSR1 (SLURM's warning before the time limit; under srun or torchrun SIGTERM as well) ends the
run after its current step with a checkpoint and exit status 75; the same command goes on from it.

--dry-run takes a recipe of any number of ranks and no GPU: this one process builds every process
group and, with two layers a pipeline stage and random weights, runs one step as a rank of the
first, a middle and the last stage. It writes nothing. (`preflight` asks whether the ranks reach
each other, `plan` what they need.)

--dry-run --full runs the recipe's own size: all layers, the longest sequences, as on its GPUs, on
tensors that have a shape and no memory. It needs each model's config.json and a minute or a few a
rank, and prints the most GiB that each phase of the step holds beside what `plan` says. An error
is a shape that does not fit; a ratio beyond 0.9 to 1.1 is a plan not to be trusted.

examples:
  nemo-paced train --config-name quickstart
  nemo-paced train --config-name quickstart model.tensor_model_parallel_size=1 \\
      model.pipeline_model_parallel_size=2
  nemo-paced train --config-name quickstart weights.scheme=unweighted exp_manager.name=unweighted
  nemo-paced train --config-name RECIPE --dry-run
  nemo-paced train --config-name RECIPE --dry-run --full

{RUN_HELP}""",
    ),
    "rollout-server": Command(
        "nemo_paced.commands.serve:main",
        "vLLM servers of the student or the teacher, for a trainer that runs elsewhere",
        f"""\
usage: nemo-paced rollout-server --config-name NAME [--model student|teacher] [key=value ...]

Starts rollout.num_replicas servers, waits until they are healthy, prints their endpoints and keeps
them running until SIGTERM or Ctrl-C; one that dies is started again. The run directory gets
servers/MODEL/endpoints.json, api_key (readable by you alone) and a log of each server. The key is
that of the variable NEMO_PACED_API_KEY, or a new one: give servers on several nodes the same.
They listen on rollout.host, which must be an address or interface that the trainer reaches.

examples:
  nemo-paced rollout-server --config-name quickstart rollout.num_replicas=2
  nemo-paced rollout-server --config-name RECIPE --model teacher rollout.host=ib0 rollout.port=8000
  export NEMO_PACED_API_KEY=$(cat RUN/servers/student/api_key)
  nemo-paced train --config-name RECIPE 'rollout.endpoints=[http://NODE:8000,http://NODE:8001]'
  nemo-paced references --config-name RECIPE 'references.endpoints=[http://NODE:8002]'

{RUN_HELP}""",
    ),
    "data": Command(
        "nemo_paced.commands.preflight:data",
        "what a problem file holds, and what student and teacher will see of it",
        f"""\
usage: nemo-paced data [FILE] [--evaluated] [--show 2] [--config-name NAME] [key=value ...]

The first thing to run with a new file or a new model. Prints which columns were read and what was
done to rows, kinds of answers, lengths in tokens against the limits, and some problems as the
models see them, special tokens set off. Without FILE: the files that the configuration names.
Without a student (student.hf_path) nothing is tokenised. --evaluated: the file is for evaluation,
where only the model's context limits a prompt. Exit status 2 where a run would refuse the file.

examples:
  nemo-paced data train.jsonl
  nemo-paced data gsm8k.jsonl student.hf_path=Qwen3-1.7B \\
      data.chat_template_kwargs.enable_thinking=false
  nemo-paced data rows.parquet 'data.columns={{problem: query, answer: meta.gold}}'
  nemo-paced data --config-name RECIPE

{RUN_HELP}""",
    ),
    "preflight": Command(
        "nemo_paced.commands.preflight:preflight",
        "what would stop a run, all of it at once and before a weight is read",
        f"""\
usage: nemo-paced preflight --config-name NAME [key=value ...]

Takes seconds; reads configurations, tokenizers and problem files, no weights; writes nothing.
  models       layout against heads, MLP columns and layers; vocabulary padding; sequence limits
  tokenizers   the same ids, special tokens, end of text and chat template for both models
  files        problems, every prompt within its limit, references, pass rates, room on the disk
  run          stages, an earlier run in the same directory
  servers      vLLM and GPUs for our own; running ones answer, take the key, serve long enough
  ranks        each answers, one set of library versions, clocks, a GPU each, one small all-reduce
Exit status 2 with an error; warnings do not stop a run. `train` makes the same checks first. Under
torchrun or srun every rank joins; else trainer.devices ranks are started on this node. A rank that
has not answered after training.rank_timeout_s seconds is named.

examples:
  nemo-paced preflight --config-name quickstart
  srun --nodes=2 --ntasks-per-node=8 nemo-paced preflight --config-name RECIPE

{RUN_HELP}""",
    ),
    "plan": Command(
        "nemo_paced.commands.plan:main",
        "memory, time and the cheapest layout that fits, from two config.json files",
        f"""\
usage: nemo-paced plan --config-name NAME [--gpu h100|h200|a100|b200] [--nodes N]
           [--gpus-per-node 8] [--prompt-tokens N] [--response-tokens N] [--mfu 0.4]
           [key=value ...]

Needs no GPU and no weights. Prints, for the layout of the configuration, the memory of a GPU by
pipeline stage and what it is for, FLOPs and projected seconds of a step and hours of the run; then
the layouts that fit, cheapest first, and the settings of the best one. The servers of
rollout.num_replicas count on the first GPUs; those of rollout.endpoints are beside the GPUs that
are counted. With --nodes over so many GPUs, without over the fewest that do. --prompt-tokens and
--response-tokens are means of a problem (default: half of data.max_*). Every rate is a data sheet's
times an assumed share, printed below; replace them by what you measure.

examples:
  nemo-paced plan --config-name RECIPE --gpu h100 --nodes 2
  nemo-paced plan student.hf_path=Qwen3-1.7B teacher.hf_path=Qwen3-32B --response-tokens 2000

{RUN_HELP}""",
    ),
    "import-hf": Command(
        "nemo_paced.commands.convert:import_hf",
        "a Hugging Face directory as a Megatron checkpoint",
        """\
usage: nemo-paced import-hf HF_DIR CHECKPOINT_DIR [key=value ...]

Supported: Qwen3, Qwen3-MoE, Qwen2 / 2.5 and Llama architectures. The checkpoint can be read at any
layout. A model that does not fit one process is converted by several ranks, each of which reads
its own part: name the layout and as many ranks, or start the command with torchrun.

examples:
  nemo-paced import-hf Qwen3-1.7B-Base qwen3-1.7b trainer.precision=bf16
  nemo-paced import-hf Llama-3.3-70B llama-70b trainer.devices=8 \\
      model.tensor_model_parallel_size=4 model.pipeline_model_parallel_size=2
  nemo-paced import-hf Qwen3-30B-A3B qwen3-30b trainer.devices=8 \\
      model.expert_model_parallel_size=8""",
    ),
    "export-hf": Command(
        "nemo_paced.commands.convert:export_hf",
        "a checkpoint, from whatever layout, as a Hugging Face directory",
        """\
usage: nemo-paced export-hf CHECKPOINT_DIR HF_DIR [key=value ...]

CHECKPOINT_DIR is one of a run (RUN/checkpoints/step_00000080), the run directory itself (its
newest checkpoint), or what import-hf wrote. Tokenizer, chat template and generation config are
carried along. The layout may be another than the run's: one process by default, several ranks for
a model that does not fit one, as for import-hf.

example: nemo-paced export-hf RUN HF_DIR trainer.devices=2 model.pipeline_model_parallel_size=2""",
    ),
    "grade": Command(
        "nemo_paced.commands.evaluate:grade",
        "verdicts on the responses of a file, and what they rest on; no model",
        f"""\
usage: nemo-paced grade FILE [--response COLUMN] [--show 2] [--out FILE] [grading.KEY=value ...]

FILE is JSONL, JSON or Parquet, or a pattern. A row has a response (`response`, `completion`,
`output`, `generated_text`, ... or --response COLUMN), or a list of them, and the answer, by the
columns of problem files or those that data.columns names. `truncated`, or `finish_reason: length`,
says that a response was cut at its limit.

Prints some verdicts of each outcome and kind of evidence (--show 0: none), then how many there are:
right, wrong, no answer, truncated (cut before an answer) and timed out, by what the answer was read
by. Where rows have verdicts of their own (`correct`: true or false, or a list) it prints how many
are the same, and some that are not. --out writes a line for each response.

examples:
  nemo-paced grade responses.jsonl grading.last_number=false --out verdicts.jsonl
  nemo-paced grade samples_gsm8k.jsonl --response resps 'data.columns={{answer: target}}'
  nemo-paced grade mine.jsonl grading.verifier=multiple_choice

{RUN_HELP}""",
    ),
    "evaluate": Command(
        "nemo_paced.commands.evaluate:main",
        "accuracy of a model on problem files and lm-eval's tasks, and what it forgot",
        """\
usage: nemo-paced evaluate CHECKPOINT_OR_HF_DIR [--problems [NAME=]FILE ...] [--samples 8]
           [--lm-eval TASK,...] [--lm-eval-tasks DIR] [--lm-eval-args KEY=VALUE,...]
           [--baseline CHECKPOINT_OR_HF_DIR_OR_RESULTS_JSON] [--out results.json]
           [--config-name NAME] [key=value ...]

Serves the model, samples and grades; prints mean@k, pass@k, the majority's accuracy, the share of
responses that were cut and their lengths, each mean with its standard error over problems. The
defaults are the paper's (8 samples, T .6, top-p .95, 30,000 tokens, or what the model's context
leaves: you are told). The configuration gives prompts, verifier and sampling (evaluation.*);
without --config-name it is that of the run which the model lies in. rollout.endpoints asks running
servers. On a GPU of its own, add rollout.gpu_memory_utilization=0.9.

--problems: JSONL or Parquet; published files are read as they are (see `data`). A suite is named
after its file unless NAME= says otherwise. Without it and --lm-eval, the suites are
data.validation_problems (`heldout`) and data.forgetting_problems (`forgetting`).

--lm-eval: tasks of lm-eval (extra [eval]) on the same server, e.g. mmlu: five-shot, on a fixed draw
of 2,000 questions in proportion to the subtasks. --lm-eval-args sets evaluation.lm_eval.*:
num_fewshot, limit, apply_chat_template, max_length; null is the task's own. --lm-eval-tasks: task
files of your own, which may name local data; without them lm-eval fetches its data sets.

--baseline: what was forgotten, baseline minus model, paired by problem, for every suite. The
results.json of an evaluation that asked alike stands for its model.

Results go to --out (else under exp_manager.exp_dir/evaluation), with settings, fingerprints and
versions; finished answers are kept beside them in evaluation/, and the same command, interrupted,
goes on from there. `nemo-paced report` shows RUN/results.json.

examples:
  nemo-paced evaluate RUN --baseline STUDENT_HF_DIR --problems heldout=heldout.jsonl \\
      --problems forgetting=old_skills.jsonl --out RUN/results.json
  nemo-paced evaluate RUN --baseline STUDENT_HF_DIR --problems math500=test.jsonl \\
      --problems aime2024=aime_2024.jsonl --problems aime2025=aime_2025.jsonl --lm-eval mmlu""",
    ),
    "snr": Command(
        "nemo_paced.commands.snr:main",
        "gradient signal-to-noise ratio against pass rate, and what it says of the kernel",
        f"""\
usage: nemo-paced snr [RUN | CHECKPOINT | HF_DIR] [--step N] [--pass-rates TABLE] [--out FILE.json]
           [--config-name NAME] [key=value ...]

Takes the gradient of every problem's loss with respect to the LM head (snr.last_layers=N: and the
last N layers), one problem at a time, and prints by bin of the pass rate: the paper's plain SNR
and the unbiased one with a jackknife interval, and gradient norms; then the exponents that fit
SNR^2, the deviation delta of the run's kernel and the efficiency that follows. Writes
RUN/snr/step_XXXXXXXX_DIVERGENCE.json (with snr.last_layers=N: ..._last_layers_N.json) and a figure
beside it. Interrupted, it goes on with the bins that are missing; finished, the same command shows
them again.

RUN means its newest checkpoint (--step N: that one; --step 0: the model that training began with),
with the run's own configuration and the pass rates of that step, or the latest before it. A HF_DIR
says no step: the run's newest are taken, unless --pass-rates gives its own. snr.divergence
(default: the first stage's) decides along whose responses: the run's references, or rollouts, which
are sampled afresh. Ranks are started as for train; the layout may be another than the run's.

examples:
  nemo-paced snr RUN
  nemo-paced snr RUN --step 0 snr.divergence=reverse_kl snr.max_problems_per_bin=100
  nemo-paced snr HF_DIR --config-name RECIPE --pass-rates TABLE trainer.devices=4 \\
      model.tensor_model_parallel_size=4

{RUN_HELP}""",
    ),
    "report": Command(
        "nemo_paced.commands.report:main",
        "one self-contained HTML page about a run",
        """\
usage: nemo-paced report RUN_DIR [--out FILE]
       nemo-paced report --compare [LABEL=]RUN_DIR [LABEL=]RUN_DIR ... [--out FILE]

Writes RUN_DIR/report.html: accuracy and forgetting (from results.json), pass rates, weights and
their drift, losses by stage, gradient SNR, rollouts and waits, where the time went, the FP8
certificate, environment and configuration. Missing parts are said to be missing.
--compare puts several runs side by side, in comparison.html in their common folder: paired
differences, the settings that differ, curves. Runs of other lengths may be compared.""",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run the command that ``arguments`` name and return the exit status.

    0: done; 2: an error that the user can mend; 75: stopped on request; 128 + n: ended by signal n
    (130 after Ctrl-C).

    Args:
        arguments: command and its arguments; ``None``: those of this process.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    name, rest = arguments[0], arguments[1:]
    if name not in COMMANDS:
        print(f"nemo-paced: error: no command {name!r}\n\n{_overview()}", file=sys.stderr)
        return 2
    command = COMMANDS[name]
    if any(argument in ("-h", "--help") for argument in rest):
        print(f"{command.summary}\n\n{command.usage}")
        return 0
    set_up_logging(launcher_rank())
    if PART_VARIABLE in os.environ:
        _end_with(int(os.environ[PART_VARIABLE]))
    module, _, function = command.entry.partition(":")
    try:
        if name not in OFFLINE:
            check_versions()
        getattr(importlib.import_module(module), function)(rest)
    except Stopped as stopped:
        if str(stopped):
            print(f"nemo-paced: {stopped}", file=sys.stderr)
        return Stopped.EXIT_STATUS
    except (KeyboardInterrupt, Interrupted) as interrupted:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C has nothing left to end
        if PART_VARIABLE not in os.environ:
            print("nemo-paced: interrupted", file=sys.stderr)
        return getattr(interrupted, "exit_status", 128 + signal.SIGINT)
    except PacedError as error:
        if str(error):
            print(f"nemo-paced: error: {error}", file=sys.stderr)
        return 2
    return 0


def _end_with(parent: int) -> None:
    """End this command, in order, when the one that runs it has been killed."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent watch").start()


def _overview() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return (
        "PACED: distillation weighted by the student's pass rate, on Megatron-Core and vLLM.\n\n"
        "usage: nemo-paced COMMAND ...      nemo-paced COMMAND --help\n\n" + "\n".join(lines)
    )


if __name__ == "__main__":
    sys.exit(main())
