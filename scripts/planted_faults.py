"""Is each of these faults noticed? A list of plausible ones, planted one at a time.

    python scripts/planted_faults.py                 # all, ten minutes on 2 cores
    python scripts/planted_faults.py --list
    python scripts/planted_faults.py --only cp_pieces --only qkv_order

Each changes one line of a copy of the code so that shapes stay right and values finite, and runs
the test that has to fail there. A fault that no test notices ends the program with status 1: a
proof has been lost.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TESTS_FAILED = 1  # pytest's status; above: it could not run them


@dataclass(frozen=True, slots=True)
class Fault:
    """What stands once in the package, what stands in its place, and the test that notices.

    Attributes:
        says: what would be wrong.
    """

    says: str
    old: str
    new: str
    test: str


TRAINING = "tests/distributed/test_training.py"
RESTORED = "test_master_weights_and_moments_of_a_bf16_run_survive_a_resume"
TRITON = "tests/unit/losses/test_triton_kernels.py"
FAULTS = {
    # losses
    "kl_gradient": Fault(
        "reverse KL's gradient lacks - S KL(S || T)",
        "numbers.column(8) + numbers.column(4) - numbers.column(1)",
        "numbers.column(4) - numbers.column(1)",
        "tests/unit/losses/test_divergence.py::test_value_and_gradient_match_dense_float64",
    ),
    "jsd_mixture": Fault(
        "JSD's gradient has the teacher's share in place of the student's",
        "log_s.sub_(m.log_()).sub_(numbers.column(7)).mul_(scale_N1 * (1 - chosen.jsd_beta))",
        "log_s.sub_(m.log_()).sub_(numbers.column(7)).mul_(scale_N1 * chosen.jsd_beta)",
        "tests/unit/losses/test_divergence.py::test_value_and_gradient_match_dense_float64",
    ),
    "shard_maximum": Fault(
        "a rank's share of the mass is not moved from its own maximum to the common one",
        "numbers_9N[2:6:3] = moved_sum_R2N[rank] / sum_2N",
        "numbers_9N[2:6:3] = sum_R2N[rank] / sum_2N",
        "tests/distributed/test_losses.py::test_split_vocabulary_matches_dense_float64",
    ),
    "main_grad_factor": Fault(
        "the head's gradient in Megatron's buffer lacks the factor that backward brings",
        "scale_N = token_weights_N if gradient_scale is None else token_weights_N * gradient_scale",
        "scale_N = token_weights_N",
        "tests/distributed/test_main_grad.py::test_the_buffer_holds_the_gradient_that_autograd_would_bring",
    ),
    "thread_maximum": Fault(
        "in the Triton kernel a thread's sum is not moved from its own maximum to the row's",
        "tl.store(packed_ptr + rows, tl.sum(sum_t * shrink_t, 0))",
        "tl.store(packed_ptr + rows, tl.sum(sum_t, 0))",
        f"{TRITON}::test_value_and_gradient_match_the_pytorch_kernels",
    ),
    "masked_rest": Fault(
        "padding in the last tile of the Triton kernels counts as logits",
        "return tl.where(cols < valid, z, _PADDING) if MASKED else z",
        "return z",
        f"{TRITON}::test_value_and_gradient_match_the_pytorch_kernels",
    ),
    "ties_counted": Fault(
        "in each tile adaptive KL's Triton kernel takes as many ties into the head anew",
        "left -= tl.sum(ties, 0)",
        "left -= 0 * tl.sum(ties, 0)",
        f"{TRITON}::test_value_and_gradient_match_the_pytorch_kernels",
    ),
    "normaliser": Fault(
        "a loss is divided by each micro-batch's own tokens",
        "return loss * total_tokens, count",
        "return loss * num_tokens, count",
        f"{TRAINING}::test_steps_equal_plain_pytorch[forward_kl]",
    ),
    "batch_size": Fault(
        "the global batch is divided by the problems that have a weight",
        "num_problems=len(problems),\n",
        "num_problems=sum(weight > 0 for weight in weights),\n",
        "tests/unit/training/test_references.py::test_a_dropped_problem_counts_in_the_batch_and_is_not_run",
    ),
    # weights
    "kernel_exponents": Fault(
        "the kernel's exponents are exchanged",
        "return pass_rate**alpha * (1 - pass_rate) ** beta",
        "return pass_rate**beta * (1 - pass_rate) ** alpha",
        "tests/unit/weights/test_schemes.py",
    ),
    "unit_mean": Fault(
        "weights have mean 1 over the problems that have one, not over the training set",
        "return (raw * (len(raw) / total)).tolist()",
        "return (raw * (np.count_nonzero(raw) / total)).tolist()",
        "tests/unit/weights/test_schemes.py::test_weights_have_mean_one_over_the_training_set",
    ),
    "discount": Fault(
        "earlier rollouts are discounted among the right ones alone",
        "all_[at] = config.discount * all_[at] + 1",
        "all_[at] = all_[at] + 1",
        "tests/unit/training/test_reestimation.py::test_each_rollout_discounts_what_was_known_of_its_problem",
    ),
    # parallel layouts
    "cp_pieces": Fault(
        "a context-parallel rank takes its second piece for the one behind the first",
        "numbers = (rank, 2 * size - 1 - rank)",
        "numbers = (2 * rank, 2 * rank + 1)",
        f"{TRAINING}::test_settings_of_the_model_block_change_no_step[cp2-forward_kl]",
    ),
    "norm_gradients": Fault(
        "gradients of norms are not summed under sequence parallelism",
        "self.weight.sequence_parallel = config.sequence_parallel",
        "self.weight.sequence_parallel = False",
        f"{TRAINING}::test_every_layout_gives_the_same_steps[tp2 sp-forward_kl]",
    ),
    "label_shift": Fault(
        "a response token is predicted from its own position",
        "column_N += range(begin + len(prompt) - 1, begin + len(sequence) - 1)",
        "column_N += range(begin + len(prompt), begin + len(sequence))",
        "tests/unit/data/test_batches.py::test_token_t_is_predicted_from_the_position_before_it",
    ),
    "teacher_prompt": Fault(
        "the teacher sees the student's prompt",
        "return item.teacher_prompt_ids if teacher else item.student_prompt_ids",
        "return item.student_prompt_ids",
        f"{TRAINING}::test_steps_equal_plain_pytorch[forward_kl]",
    ),
    # weights on their way
    "qkv_order": Fault(
        "keys and values of a group are exchanged where Megatron's parameter is made",
        "return torch.cat([_grouped(part, groups) for part in parts], 1).flatten(0, 1)",
        "return torch.cat([_grouped(parts[i], groups) for i in (0, 2, 1)], 1).flatten(0, 1)",
        "tests/unit/hf/test_shards.py",
    ),
    "expert_owner": Fault(
        "experts are taken for dealt out in turn",
        "return expert // self.experts_per_rank",
        "return expert % self.ep_group.size()",
        "tests/distributed/test_weight_source.py",
    ),
    "lost_weights": Fault(
        "one server that lost its weights stops the run, though another has them",
        "if all(self._served(other) != version for other in self.client.endpoints):",
        "if any(self._served(other) != version for other in self.client.endpoints):",
        "tests/unit/refit/test_transfer.py",
    ),
    "tied_head": Fault(
        "a tied LM head keeps the weights that the server started with",
        "dispatch_cpu_unquantized_gemm(head, remove_weight=False)",
        "pass",
        "tests/slow/test_sidecar.py"
        "::test_served_weights_follow_each_update_and_every_route_asks_for_the_key[qwen3_tied]",
    ),
    # resume
    "adam_steps": Fault(
        "Adam counts its steps anew after a resume",
        '["step"] = torch.tensor(float(steps))',
        '["step"] = torch.tensor(0.0)',
        f"{TRAINING}::test_a_resumed_run_goes_on_as_if_never_stopped",
    ),
    "position": Fault(
        "a resumed run takes problems from another place of their order",
        "self.consumed = state.consumed_problems",
        "self.consumed = state.step",
        "tests/slow/test_stop.py",
    ),
    "master_weights": Fault(
        "a checkpoint holds zeros in place of the master weights",
        "            is_loading=loading,",
        "            is_loading=True,",
        f"{TRAINING}::{RESTORED}[fused dp2]",
    ),
    "steps_beside_a_fused_adam": Fault(
        "torch's Adam beside an installed fused one counts from 0 after a resume",
        'group["step"] = max(steps, default=0)',
        'group["step"] = 0 if torchs else max(steps, default=0)',
        f"{TRAINING}::{RESTORED}[torch beside fused]",
    ),
    "kept_checkpoints": Fault(
        "the oldest checkpoints are kept",
        "kept = set(found[-keep.save_top_k :])",
        "kept = set(found[: keep.save_top_k])",
        "tests/unit/run/test_checkpoint_files.py::test_the_newest_and_the_best_stay",
    ),
    "repeated_lines": Fault(
        "a resumed run keeps the line of a step that it takes again",
        'json.loads(line)["step"] < next_step',
        'json.loads(line)["step"] <= next_step',
        "tests/unit/training/test_schedule.py::test_a_resumed_run_drops_the_lines_of_steps_it_repeats",
    ),
    # problems
    "frame": Fault(
        "a text that the chat template looks into is put where others stand",
        "if self._around is None or self._may_be_read(text):",
        "if self._around is None:",
        "tests/unit/data/test_chat.py::test_a_template_may_do_anything_with_a_text",
    ),
    "other_bytes": Fault(
        "a changed problem file passes for the one that was read",
        "            bytes_,\n",
        "",
        "tests/unit/run/test_problems.py::test_other_bytes_are_read_again",
    ),
    # grading
    "first_mark": Fault(
        "the first mark of an answer decides, not the last",
        "for mark in reversed(_marks(text)):",
        "for mark in _marks(text):",
        "tests/unit/grading/test_grading.py::test_the_final_answer_is_found",
    ),
    "exact_integers": Fault(
        "integers and fractions agree within the tolerance that decimals have",
        '    if whole or not any(re.search(r"\\.\\d", text) for text in written):\n',
        "    if False:\n",
        "tests/unit/grading/test_grading.py",
    ),
    "open_line": Fault(
        "a line that was cut at the limit counts as an answer",
        "    if not line or (truncated and (is_open or not whole)):\n",
        "    if not line:\n",
        "tests/unit/grading/test_grading.py",
    ),
    "equations": Fault(
        "2x = 10 is taken for a 10",
        "    if value is None:\n        return None\n    texts[place] = value\n",
        "    texts[place] = value or sides[place][-1]\n",
        "tests/unit/grading/test_grading.py",
    ),
    "timed_out": Fault(
        "what the verifier took too long for counts as wrong in a pass rate",
        "return self.outcome is not None and self.outcome is not Outcome.timed_out",
        "return self.outcome is not None",
        "tests/unit/weights/test_pass_rates.py",
    ),
    "old_verdicts": Fault(
        "stored verdicts of other answers or rules are used again",
        "elif store.graded(key) != graded.of(problem):",
        "elif False:",
        "tests/unit/rollout/test_sampling.py",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--list", action="store_true", help="name the faults and end")
    parser.add_argument("--only", action="append", choices=FAULTS, metavar="NAME")
    options = parser.parse_args(arguments)
    chosen = {name: FAULTS[name] for name in options.only or FAULTS}
    if options.list:
        for name, fault in chosen.items():
            print(f"{name:<18}{fault.says}\n{'':<18}{fault.test}")
        return 0
    with tempfile.TemporaryDirectory(prefix="planted-faults-") as folder:
        copy = copy_of_the_code(Path(folder))
        unnoticed = [name for name, fault in chosen.items() if not is_noticed(name, fault, copy)]
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults are noticed")
    if unnoticed:
        print(f"NOT noticed: {', '.join(unnoticed)}", file=sys.stderr)
    return bool(unnoticed)


def copy_of_the_code(folder: Path) -> Path:
    """What git knows of the working tree, new files included."""
    listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z")
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if os.path.lexists(ROOT / name):  # not where it is deleted and not committed yet
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def place_of(fault: Fault, root: Path) -> Path:
    """The one file of the package in which the fault's line stands, once."""
    found = [p for p in (root / "nemo_paced").rglob("*.py") if fault.old in p.read_text()]
    assert len(found) == 1, f"{fault.old!r} stands in {len(found)} files"
    assert found[0].read_text().count(fault.old) == 1, f"{fault.old!r} stands there twice"
    return found[0]


def is_noticed(name: str, fault: Fault, copy: Path) -> bool:
    """Whether the test passes, and fails with the fault in the copy, which is then as before."""
    path = place_of(fault, copy)
    sound = path.read_text()
    began = time.monotonic()
    assert sound_status(fault.test, copy) == 0, f"{name}: {fault.test} fails without the fault too"
    path.write_text(sound.replace(fault.old, fault.new))
    try:
        status = run_test(fault.test, copy)
    finally:
        path.write_text(sound)
    assert status <= TESTS_FAILED, f"{name}: pytest could not run {fault.test}"
    verdict = "noticed" if status == TESTS_FAILED else "NOT NOTICED"
    print(f"{name:<18}{verdict:<12}{time.monotonic() - began:4.0f} s  {fault.says}", flush=True)
    return status == TESTS_FAILED


@functools.cache
def sound_status(test: str, copy: Path) -> int:
    """Without a fault."""
    return run_test(test, copy)


def run_test(test: str, copy: Path) -> int:
    """pytest's exit status."""
    done = subprocess.run(
        (sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test),
        cwd=copy,
        env=os.environ | {"PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
