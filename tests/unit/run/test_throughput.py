import pytest
import torch

from nemo_paced.config import PacedConfig, StudentConfig, TeacherConfig, TrainerConfig
from nemo_paced.data.packing import TrainItem
from nemo_paced.run.throughput import Throughput, named_peak
from nemo_paced.sizing.hardware import GPUS
from nemo_paced.student.step import StepResult
from tests.tiny import make_hf_model


class Rank:
    device = torch.device("cpu")


def test_model_flops_are_those_that_torch_counts(tmp_path):
    """Matrix products of transformers' model, forward and backward; attention counts half there."""
    import transformers
    from torch.utils.flop_counter import FlopCounterMode

    folder = make_hf_model("qwen3", tmp_path / "m", num_hidden_layers=3, hidden_size=64)
    config = PacedConfig(
        student=StudentConfig(hf_path=str(folder)), teacher=TeacherConfig(hf_path=str(folder))
    )
    item = TrainItem("r", "p", (1,) * 4, (1,) * 20, (1,) * 60, 1.0)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.model.embed_tokens.weight.requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(torch.ones(1, 64, dtype=torch.int64)).last_hidden_state
        model.lm_head(hidden[:, 3:-1]).sum().backward()
    width = 4 * 32
    half_of_attention = 3 * (2 * width * 64 * 64) * 3
    expected = counter.get_total_flops() - half_of_attention
    # norms count as if they were matrices: 0.4 % of so small a model
    assert Throughput(config, Rank()).student_flops([item]) == pytest.approx(expected, rel=5e-3)


def test_what_is_told_of_a_step(tmp_path):
    folder = str(make_hf_model("qwen3", tmp_path / "m"))
    config = PacedConfig(
        trainer=TrainerConfig(devices=4),
        student=StudentConfig(hf_path=folder),
        teacher=TeacherConfig(hf_path=folder),
    )
    items = [TrainItem("r", "p", (1,) * 4, (1,) * 20, (1,) * 60, 1.0)]
    throughput = Throughput(config, Rank())
    told = throughput.metrics(items, StepResult(1.0, 1.0, 0.1, 0.0, 60, 0, 2.0, 4.0, 0.25))
    assert told["throughput/tokens_per_second"] == 10
    flops = throughput.student_flops(items)
    assert told["throughput/padding_share"] == 0.25
    assert told["throughput/student_tflops_per_rank"] == pytest.approx(flops / 4 / 4.0 / 1e12)
    assert "throughput/mfu" not in told, "no peak is known of a CPU"
    throughput.peak = flops  # FLOP/s of a GPU that would do the step in a second
    told = throughput.metrics(items, StepResult(1.0, 1.0, 0.1, 0.0, 60, 0, 2.0, 4.0, 0.25))
    assert told["throughput/mfu"] == pytest.approx(1 / 4 / 4.0)
    cached = throughput.metrics(items, StepResult(1.0, 1.0, 0.1, 0.0, 60, 1, 2.0, 4.0, 0.25))
    assert "throughput/teacher_tflops_per_rank" not in cached


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GB200", None),
        ("NVIDIA L4", None),
    ],
)
def test_no_utilisation_is_told_of_a_gpu_whose_peak_is_not_known(name, known):
    assert named_peak(name) == (GPUS[known].bf16 if known else None)
