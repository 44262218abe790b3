"""What is kept of per-problem gradients, at every layout, against plain autograd in float64."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import build_chunks
from nemo_paced.losses.kinds import DivergenceKind
from nemo_paced.parallel import groups
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.snr.gradients import GradientMeter
from nemo_paced.teacher.build import build_teacher, common_rows
from tests.block_sums import block_sums
from tests.dense import dense_divergence
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import make_config, make_items
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
BLOCKS, EACH = 3, 4
# tensor, pipeline, ranks, micro-batch, sequence parallel; context parallel
LAYOUTS = {
    "tp1": ((1, 1, 1, 2, False), 1),
    "tp2": ((2, 1, 2, 2, False), 1),
    "tp2 sp": ((2, 1, 2, 2, True), 1),
    "pp2": ((1, 2, 2, 2, False), 1),
    "dp2": ((1, 1, 2, 2, False), 1),
    "cp2": ((1, 1, 2, 2, False), 2),
    "tp2 pp2": ((2, 2, 4, 1, False), 1),
    "tp2 sp dp2": ((2, 1, 4, 1, True), 1),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_hf_model("qwen3_tied", folder / "student", vocab_size=VOCAB + 3, num_hidden_layers=2)
    make_hf_model("qwen3", folder / "teacher", seed=1, vocab_size=VOCAB + 11, hidden_size=64)
    write_tokenizer(folder / "student")
    return folder


def blocks():
    """The same loss of one problem in each: weight 1."""
    items = [replace(item, token_weight=1.0) for item in make_items(0, BLOCKS * EACH)]
    return [items[begin : begin + EACH] for begin in range(0, len(items), EACH)]


def measure(rank, world_size, folder, layout, context, kind, last_layers):
    config = make_config(folder, layout, model={"context_parallel_size": context})
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    teacher = build_teacher(config, parallel, VOCAB)
    student_dir = config.student.hf_path
    (gpt,) = build_chunks(
        load_hf_config(student_dir),
        config.model,
        parallel,
        precision=config.trainer.compute_precision,
        vocab_size_hint=common_rows(config),
    )
    load_hf_weights([gpt], student_dir, parallel)
    meter = GradientMeter(
        gpt,
        teacher,
        parallel,
        divergence=config.loss.divergence(DivergenceKind(kind)),
        chunk_size=config.loss.chunk_size,
        vocab_size=VOCAB,
        last_layers=last_layers,
    )
    for _ in range(2):  # a bin leaves nothing behind for the next
        meter.begin_bin(BLOCKS)
        for items in blocks():
            meter.add_block(items, stored=True)
        sums = meter.end_bin()
    return {field.name: getattr(sums, field.name) for field in fields(sums)}


def reference(folder, kind, last_layers):
    """One problem at a time with transformers in float64; the head is a copy of the embedding."""
    import transformers

    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=torch.float64)
        for name in ("student", "teacher")
    )
    head = student.lm_head.weight.detach().clone().requires_grad_()
    wanted = [head]
    if last_layers:
        for module in (*student.model.layers[-last_layers:], student.model.norm):
            wanted += module.parameters()
    gradients, numbers = [], []
    for number, items in enumerate(blocks()):
        for item in items:

            def hidden(model, prompt, item=item):
                ids = torch.tensor([[*prompt, *item.response_ids]])
                return model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]

            with torch.no_grad():
                teacher_logits = hidden(teacher, item.teacher_prompt_ids) @ teacher.lm_head.weight.T
            logits = hidden(student, item.student_prompt_ids) @ head.T
            loss = dense_divergence(logits[:, :VOCAB], teacher_logits[:, :VOCAB], kind).sum()
            parts = torch.autograd.grad(loss, wanted)
            gradients.append(torch.cat([part.flatten() for part in parts]))
            numbers.append(number)
    return block_sums(torch.stack(gradients).numpy(), np.array(numbers))


@pytest.mark.parametrize("last_layers", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_and_norms_equal_autograds_at_every_layout(models, layout, last_layers):
    kind = "reverse_kl" if layout == "tp2" else "forward_kl"
    ranks = LAYOUTS[layout][0][2]
    found = run_ranks(ranks, measure, str(models), *LAYOUTS[layout], kind, last_layers)
    expected = reference(models, kind, last_layers)
    for of_rank in found:
        for name, values in of_rank.items():
            np.testing.assert_allclose(values, getattr(expected, name), rtol=3e-6, err_msg=name)
