"""The command: what it prints, and that its settings are settings."""

import io

import pytest
from omegaconf import OmegaConf
from rich.console import Console

from nemo_paced.cli import main
from nemo_paced.compose import to_config
from nemo_paced.sizing import report
from nemo_paced.sizing.search import search
from nemo_paced.sizing.shapes import student_layout, teacher_plan
from tests.unit.sizing.test_memory_and_time import EVERYWHERE, WORK, problem

QUICKSTART = ["plan", "--config-name", "quickstart"]


def test_a_plan_says_what_fits_and_on_what_assumptions(capsys):
    assert main([*QUICKSTART, "--nodes", "1", "--gpus-per-node", "4", "--gpu", "a100"]) == 0
    printed = capsys.readouterr().out
    for told in ("GiB a GPU: TP2", "activations in flight", "fits with", "FLOPs a step",
                 "response tokens/s", "cheapest (4 GPUs)", "A100 SXM 80GB: 312 bf16",
                 "MFU 40%", "no figure here was measured on a GPU"):  # fmt: skip
        assert told in printed, told
    assert main([*QUICKSTART, "--response-tokens", "12", "--mfu", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "cheapest (1 GPUs)" in printed and "MFU 50%" in printed and "8 + 12" in printed


def test_the_servers_of_a_plan_are_the_replicas_or_the_endpoints(capsys):
    devices = [*QUICKSTART, "trainer.devices=4", "--nodes", "1", "--gpus-per-node", "4"]
    colocated = [*devices, "rollout.placement=colocated"]
    assert main([*colocated, "rollout.num_replicas=2"]) == 0
    printed = capsys.readouterr().out
    assert "rollout server (the first 2 GPUs)" in printed
    assert "rollout servers: 2 of 1 GPU, on the trainer's first 2; KV cache" in printed
    assert main([*colocated, "rollout.num_replicas=8"]) == 0
    printed = capsys.readouterr().out
    assert "the rollout servers need 4 GPUs more than the first node has" in printed
    assert "no layout of 4 GPUs fits" in printed
    assert main([*devices, "rollout.num_replicas=8"]) == 0
    assert "8 of 1 GPU, 8 GPUs beside those counted" in capsys.readouterr().out
    endpoints = "rollout.endpoints=[http://a:1,http://b:1,http://c:1]"
    assert main([*devices, endpoints, "rollout.tensor_parallel_size=2"]) == 0
    printed = capsys.readouterr().out
    assert "rollout server (" not in printed
    assert "3 of 2 GPUs, 6 GPUs beside those counted" in printed


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["plan"], "student.hf_path is empty"),
        ([*QUICKSTART, "--gpu", "v100"], "invalid choice: 'v100'"),
        ([*QUICKSTART, "--mfu", "0"], "--mfu must be above 0"),
        ([*QUICKSTART, "--nodes", "0"], "--nodes must be above 0"),
        ([*QUICKSTART, "--prompt-tokens", "0"], "--prompt-tokens must be above 0"),
        ([*QUICKSTART, "model.tensor_model_parallel_siez=2"], "Did you mean"),
    ],
)
def test_a_mistake_is_named(arguments, told, capsys):
    assert main(arguments) == 2
    assert told in capsys.readouterr().err


def test_a_layout_that_does_not_divide_is_left_out_and_others_are_found(capsys):
    assert main([*QUICKSTART, "model.tensor_model_parallel_size=4", "trainer.devices=4"]) == 0
    printed = capsys.readouterr().out
    assert "GiB a GPU: TP" not in printed and "cheapest (1 GPUs)" in printed


def test_the_settings_of_a_layout_are_keys_of_the_configuration():
    found = search(problem(), WORK, gpus=8, fp8=False, placements=EVERYWHERE)
    found += search(problem(), WORK, gpus=24, fp8=False, placements=EVERYWHERE)
    assert {c.teacher.placement for c in found} == set(EVERYWHERE)
    # some of each placement: composing a configuration takes a while
    some = [
        candidate
        for where in EVERYWHERE
        for candidate in [c for c in found if c.teacher.placement is where][::97][:8]
    ]
    for candidate in some:
        config = _configured(report.overrides(candidate, 8))
        assert student_layout(config) == candidate.layout
        assert teacher_plan(config).placement == candidate.teacher.placement
        planned, configured = candidate.teacher.layout, teacher_plan(config).layout
        for size in ("tensor", "pipeline", "expert", "data"):
            assert getattr(configured, size) == getattr(planned, size), candidate


def _configured(overrides):
    """What the settings make of the defaults, in a run without on-policy stages."""
    stages = {"stages": [{"name": "forward_kl"}]}
    return to_config(OmegaConf.merge(stages, OmegaConf.from_dotlist(overrides)))


def test_tables_hold_every_part():
    (candidate, *_) = search(problem(), WORK, gpus=8, fp8=True, placements=EVERYWHERE[:1])
    console = Console(file=io.StringIO(), width=120)
    console.print(report.memory_table(candidate, problem()))
    printed = console.file.getvalue()
    assert "teacher LM head" in printed and "rollout server" in printed and "fp8" in printed
