"""The head's gradient goes into Megatron's buffer in place, and is the one autograd would bring."""

import pytest
import torch

from nemo_paced.config import OptimConfig
from nemo_paced.losses.linear_divergence import linear_loss
from nemo_paced.parallel import groups
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.student import model as student_module
from nemo_paced.student import output_layer
from nemo_paced.training.setup import build_models
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import LAYOUTS, LR, STAGES, make_config, make_items
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
# a layout of test_training (four micro-batches of a replica, or two), settings of `model`
SETTINGS = {
    "tp1": ("tp1", {}),
    "tp2 sp": ("tp2 sp", {}),
    "pp2": ("pp2", {}),
    "dp2 overlapped": ("dp2", {"overlap_grad_reduce": True}),
    "interleaved": ("pp2", {}),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, family in (("tied", "qwen3_tied"), ("untied", "qwen3")):
        make_hf_model(family, folder / name / "student", vocab_size=VOCAB + 3, num_hidden_layers=4)
        make_hf_model("qwen3", folder / name / "teacher", seed=1, vocab_size=VOCAB + 11)
        write_tokenizer(folder / name / "student")
        write_tokenizer(folder / name / "teacher")
    return folder


def by_autograd(*args, gradient_scale, **kwargs):
    """The loss as it is where nobody knows the factor that backward brings."""
    return linear_loss(*args, **kwargs)


def gradients(rank, world_size, folder, setting, into_buffer):
    """Reduced gradients of this rank by parameter, and what became of the head's buffer."""
    layout, optim = SETTINGS[setting]
    # the distributed optimizer would leave a rank the reduced gradients of its own share alone
    model = {"optim": OptimConfig(lr=LR, use_distributed_optimizer=False, **optim)}
    if setting == "interleaved":
        model["virtual_pipeline_model_parallel_size"] = 2
    config = make_config(folder, LAYOUTS[layout], model=model)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    student = models.student
    student.optimizer.step_with_ready_grads = lambda: None
    student_module.clip_grad_by_total_norm_fp32 = lambda *args, **kwargs: None
    if not into_buffer:
        output_layer.linear_loss = by_autograd
    heads = []
    if parallel.is_last_stage:
        gpt = student.chunks[-1]
        tied = gpt.share_embeddings_and_output_weights
        heads = [gpt.shared_embedding_or_output_weight() if tied else gpt.output_layer.weight]
    places = [head.main_grad.data_ptr() for head in heads]
    for step in range(2):  # the buffer of the second is the first one's, zeroed
        models.step(make_items(step), STAGES["forward_kl"], LR)
        assert all(head.grad_added_to_main_grad == into_buffer for head in heads)
    assert places == [head.main_grad.data_ptr() for head in heads]
    return {
        f"{number} {name}": parameter.main_grad.clone()
        for number, gpt in enumerate(student.chunks)
        for name, parameter in gpt.named_parameters()
    }


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("student", ["tied", "untied"])
def test_the_buffer_holds_the_gradient_that_autograd_would_bring(models, student, setting):
    options = LAYOUTS[SETTINGS[setting][0]][2], gradients, str(models / student), setting
    in_place, expected = (run_ranks(*options, into_buffer) for into_buffer in (True, False))
    for found, wanted in zip(in_place, expected, strict=True):
        assert found.keys() == wanted.keys()
        for name, value in wanted.items():
            assert value.abs().max() > 0, name
            bound = 2e-6 * float(value.abs().max())
            torch.testing.assert_close(found[name], value, rtol=0, atol=bound, msg=name)
