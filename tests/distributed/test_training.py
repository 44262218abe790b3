"""One training step, whatever the layout: against each other and against plain PyTorch."""

import ast
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core import optimizer as optimizer_package
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as mixed_precision
from megatron.core.transformer.moe import moe_utils

from nemo_paced.config import (
    DataConfig,
    DivergenceKind,
    LossConfig,
    ModelConfig,
    OptimBackend,
    OptimConfig,
    PacedConfig,
    Recompute,
    StageConfig,
    StudentConfig,
    TeacherConfig,
    TrainerConfig,
)
from nemo_paced.data.packing import TrainItem
from nemo_paced.errors import CheckpointError, ConfigError
from nemo_paced.hf.attention import CoreAttention
from nemo_paced.hf.export_weights import iter_hf_tensors
from nemo_paced.hf.model import RMSNorm
from nemo_paced.parallel import groups
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.run import checkpoint, checkpoint_files
from nemo_paced.student import model as student_module
from nemo_paced.student import step as step_module
from nemo_paced.student.model import build_student
from nemo_paced.student.optimizer import chained, use_backend
from nemo_paced.training import setup
from nemo_paced.training.setup import build_models
from tests.dense import dense_divergence
from tests.distributed.harness import assert_same_steps, run_ranks
from tests.fused_adam import FusedAdam
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
GOLDEN = Path(__file__).parents[1] / "golden" / "step_losses.json"
GPU_PACKAGES = ("transformer_engine", "apex", "megatron.core.extensions.transformer_engine")
LR, STEPS, BETAS = 3e-3, 3, [0.9, 0.95]
STAGES = {
    "forward_kl": StageConfig(name="forward_kl"),
    "reverse_kl": StageConfig(name="reverse_kl", divergence=DivergenceKind.reverse_kl),
    "adaptive_kl": StageConfig(name="adaptive_kl", divergence=DivergenceKind.adaptive_kl),
}
# tensor, pipeline, ranks, micro-batch, sequence parallel
LAYOUTS = {
    "tp1": (1, 1, 1, 2, False),
    "mbs3": (1, 1, 1, 3, False),
    "tp2": (2, 1, 2, 2, False),
    "tp2 sp": (2, 1, 2, 2, True),
    "pp2": (1, 2, 2, 2, False),
    "dp2": (1, 1, 2, 2, False),
    "tp2 pp2": (2, 2, 4, 1, False),
    "tp2 dp2": (2, 1, 4, 4, False),
    "pp2 dp2": (1, 2, 4, 2, False),
}
# a layout, and settings of the `model` block beyond it
SETTINGS = {
    "cp2": ((1, 1, 2, 2, False), {"context_parallel_size": 2}),
    "cp2 pp2": ((1, 2, 4, 2, False), {"context_parallel_size": 2}),
    "cp2 tp2 sp": ((2, 1, 4, 3, True), {"context_parallel_size": 2}),
    "cp2 dp2": ((1, 1, 4, 1, False), {"context_parallel_size": 2}),
    "recompute": ((1, 2, 2, 2, False), {"recompute_granularity": Recompute.full}),
    "recompute attention": ((2, 1, 2, 2, True), {"recompute_granularity": Recompute.selective}),
    "recompute packed cp2": (
        (1, 1, 2, 1, False),
        {
            "recompute_granularity": Recompute.full,
            "recompute_num_layers": 2,
            "packed_sequence_size": 40,
            "context_parallel_size": 2,
        },
    ),
    "plain optimizer": (
        (1, 1, 2, 2, False),
        {"optim": OptimConfig(lr=LR, use_distributed_optimizer=False)},
    ),
    "overlaps": (
        (1, 1, 2, 2, False),
        {"optim": OptimConfig(lr=LR, overlap_grad_reduce=True, overlap_param_gather=True)},
    ),
    "packed": ((1, 1, 1, 1, False), {"packed_sequence_size": 40}),
    "packed in one row": ((1, 1, 1, 1, False), {"packed_sequence_size": 400}),
    "packed tp2 sp": ((2, 1, 2, 1, True), {"packed_sequence_size": 48}),
    "packed pp2 dp2": ((1, 2, 4, 1, False), {"packed_sequence_size": 32}),
    "packed cp2": ((1, 1, 2, 1, False), {"packed_sequence_size": 40, "context_parallel_size": 2}),
    "packed cp2 tp2 sp": (
        (2, 1, 4, 1, True),
        {"packed_sequence_size": 48, "context_parallel_size": 2},
    ),
}


def make_items(step, count=7):
    """Responses with unequal student and teacher prompts, lengths and weights."""
    generator = torch.Generator().manual_seed(step)

    def ids(low, high):
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(2, VOCAB, (length,), generator=generator).tolist())

    return [
        TrainItem(
            response_id=f"r{i}",
            problem_id=f"p{i}",
            student_prompt_ids=ids(2, 8),
            teacher_prompt_ids=ids(5, 16),
            response_ids=ids(1, 10),
            token_weight=(0.3 + 0.2 * i) / 9,  # N = 9: two problems of weight 0 are not run
        )
        for i in range(count)
    ]


def make_config(folder, layout, teacher="teacher", model=None, devices=None, **teacher_options):
    tensor, pipeline, ranks, micro_batch_size, sequence_parallel = layout
    return PacedConfig(
        trainer=TrainerConfig(
            devices=devices or ranks, accelerator="cpu", precision="fp32", gradient_clip_val=1.0
        ),
        model=ModelConfig(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            sequence_parallel=sequence_parallel,
            micro_batch_size=micro_batch_size,
            make_vocab_size_divisible_by=8,
            **{"optim": OptimConfig(lr=LR), **(model or {})},
        ),
        data=DataConfig(max_prompt_length=8, max_teacher_prompt_length=16, max_response_length=10),
        student=StudentConfig(hf_path=f"{folder}/student"),
        teacher=TeacherConfig(hf_path=f"{folder}/{teacher}", **teacher_options),
        loss=LossConfig(),
        stages=[StageConfig()],  # steps are given theirs by hand
    )


def train_steps(
    rank,
    world_size,
    folder,
    layout,
    kind,
    resume_from=None,
    save_to=None,
    steps=STEPS,
    teacher="teacher",
    model=None,
    fully_reshardable=False,
):
    config = make_config(folder, layout, teacher, model)
    config.exp_manager.checkpoint_callback_params.fully_reshardable = fully_reshardable
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    first = 0
    if resume_from:
        first = checkpoint.load(Path(resume_from), models.student, parallel).step
    results = [models.step(make_items(step), STAGES[kind], LR) for step in range(first, steps)]
    if save_to:
        models.save(Path(save_to), step=steps, consumed_problems=0, skipped=0)
    models.student.sync_parameters()
    weights = {
        n: t.clone() for n, t in iter_hf_tensors(models.student.chunks, parallel) if t is not None
    }
    return [(r.loss, r.grad_norm) for r in results], weights


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    # one tied and one not; embeddings larger than the tokenizer, by different amounts
    make_hf_model("qwen3_tied", folder / "student", vocab_size=VOCAB + 3, num_hidden_layers=2)
    make_hf_model("qwen3", folder / "teacher", seed=1, vocab_size=VOCAB + 11, hidden_size=64)
    write_tokenizer(folder / "student")
    write_tokenizer(folder / "teacher")
    return folder


@pytest.fixture(scope="module")
def single(models):
    return {
        kind: run_ranks(1, train_steps, str(models), LAYOUTS["tp1"], kind)[0] for kind in STAGES
    }


def reference_steps(folder, kind, dtype=torch.float32, eps=1e-8):
    """The same steps with transformers and torch's AdamW, one sequence at a time."""
    import transformers

    student, teacher = (
        transformers.AutoModelForCausalLM.from_pretrained(folder / name, dtype=dtype)
        for name in ("student", "teacher")
    )
    norms = [p for p in student.parameters() if p.ndim == 1]
    matrices = [p for p in student.parameters() if p.ndim > 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": norms, "weight_decay": 0.0}],
        lr=LR,
        weight_decay=0.01,
        eps=eps,
    )
    results = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for item in make_items(step):

            def logits(model, prompt, item=item):
                ids = torch.tensor([[*prompt, *item.response_ids]])
                return model(ids).logits[0, len(prompt) - 1 : -1, :VOCAB]

            with torch.no_grad():
                teacher_logits = logits(teacher, item.teacher_prompt_ids)
            student_logits = logits(student, item.student_prompt_ids)
            loss = dense_divergence(student_logits, teacher_logits, kind).sum() * item.token_weight
            loss.backward()
            total += float(loss)
        norm = float(torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0))
        optimizer.step()
        results.append((total, norm))
    return results, student.state_dict()


@pytest.mark.parametrize("kind", STAGES)
def test_steps_equal_plain_pytorch(models, kind):
    # Adam divides a gradient by its own size: where it is all but zero, a small epsilon lets
    # rounding decide, which differs between processors
    model = {"optim": OptimConfig(lr=LR, eps=1e-6)}
    train = partial(train_steps, model=model)
    losses, weights = run_ranks(1, train, str(models), LAYOUTS["tp1"], kind)[0]
    expected, expected_weights = reference_steps(models, kind, eps=1e-6)
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    for name, value in weights.items():
        torch.testing.assert_close(value, expected_weights[name], rtol=0, atol=2e-4, msg=name)
        # a decay of norms would be 9e-5 of them by now
        assert (value - expected_weights[name]).square().mean().sqrt() < 3e-5, name


@pytest.mark.parametrize("layout", ["tp1", "tp2"])
@pytest.mark.parametrize("kind", STAGES)
def test_steps_are_those_of_the_loss_on_whole_logits(models, kind, layout):
    golden = json.loads(GOLDEN.read_text())["steps"][f"{kind} {layout}"]
    losses = run_ranks(LAYOUTS[layout][2], train_steps, str(models), LAYOUTS[layout], kind)[0][0]
    # they were taken with Megatron's own attention, which rounds otherwise
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(golden), rtol=3e-5, atol=3e-5)


def _train_with_overlap(rank, world_size, folder, layout, kind, grad_scale):
    from megatron.core.distributed import DistributedDataParallelConfig

    def build_overlapping(chunks, config, parallel):
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=True,
            overlap_param_gather=True,
            bucket_size=2000,  # several buckets, so that hooks fire one after the other
        )
        student = student_module.build_student(chunks, config, parallel, ddp_config=ddp_config)
        chunks[0].config.grad_scale_func = lambda loss: loss * grad_scale
        return student

    setup.build_student = build_overlapping
    return train_steps(rank, world_size, folder, layout, kind)[0]


@pytest.mark.parametrize("layout", ["dp2", "tp2 dp2", "pp2 dp2"])
def test_overlapped_reductions_and_a_gradient_scale_change_nothing_else(models, single, layout):
    """Both of DDP's overlaps on, tied embeddings, gradients scaled by 4."""
    ranks = LAYOUTS[layout][2]
    results = run_ranks(ranks, _train_with_overlap, str(models), LAYOUTS[layout], "forward_kl", 4.0)
    # clipping takes the scale out of the update
    expected = torch.tensor(single["forward_kl"][0]) * torch.tensor([1.0, 4.0])
    for losses in results:
        torch.testing.assert_close(torch.tensor(losses), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp1"])
def test_every_layout_gives_the_same_steps(models, single, kind, layout):
    ranks = LAYOUTS[layout][2]
    results = run_ranks(ranks, train_steps, str(models), LAYOUTS[layout], kind)
    expected = torch.tensor(single[kind][0])
    for losses, _ in results:
        assert_same_steps(losses, expected)
        # nothing has been updated before the first loss: only the order of sums differs
        assert losses[0][0] == pytest.approx(expected[0, 0].item(), rel=1e-6)


@pytest.mark.parametrize("kind", ["forward_kl", "adaptive_kl"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_model_block_change_no_step(models, single, kind, name):
    layout, model = SETTINGS[name]
    run = partial(run_ranks, layout[2], train_steps)
    expected = torch.tensor(single[kind][0])
    for losses, _ in run(str(models), layout, kind, None, None, STEPS, "teacher", model):
        assert_same_steps(losses, expected)


def test_a_tied_teacher_works_at_every_layout(models):
    """Self-distillation: the frozen copy is as tied as the student."""
    options = ("reverse_kl", None, None, 2, "student")
    expected = run_ranks(1, train_steps, str(models), LAYOUTS["tp1"], *options)[0][0]
    for layout in ("pp2", "tp2"):
        losses = run_ranks(2, train_steps, str(models), LAYOUTS[layout], *options)[0][0]
        assert_same_steps(losses, expected)


def _train_on_top_k(rank, world_size, folder, layout, kind, k, cache_dir=None):
    config = make_config(folder, layout, top_k=k, cache_dir=cache_dir)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    # two epochs over the same responses, the second in another order
    batches = [make_items(0), make_items(1), make_items(1)[::-1], make_items(0)]
    results = [models.step(items, STAGES[kind], LR) for items in batches]
    return [(r.loss, r.grad_norm) for r in results], [r.cached for r in results]


def test_a_top_k_of_the_whole_vocabulary_gives_the_exact_steps(models, single):
    options = (str(models), LAYOUTS["tp2"], "forward_kl", VOCAB)
    losses = run_ranks(2, _train_on_top_k, *options)[0][0]
    expected = single["forward_kl"][0]
    torch.testing.assert_close(
        torch.tensor(losses[:2]), torch.tensor(expected[:2]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("layout", ["tp2", "dp2", "pp2 dp2"])
def test_a_cached_top_k_is_the_computed_one_at_every_layout(models, tmp_path, layout):
    options = (str(models), LAYOUTS["tp1"], "reverse_kl", 7)
    ((expected, none_cached),) = run_ranks(1, _train_on_top_k, *options)
    assert none_cached == [0, 0, 0, 0]
    ranks = LAYOUTS[layout][2]
    options = (str(models), LAYOUTS[layout], "reverse_kl", 7, str(tmp_path))
    for epoch in range(2):
        for losses, cached in run_ranks(ranks, _train_on_top_k, *options):
            torch.testing.assert_close(
                torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4
            )
            assert cached == ([0, 0, 7, 7] if epoch == 0 else [7, 7, 7, 7])
    # a damaged entry is computed again, and mended
    entry = sorted(tmp_path.glob("*/*.signal"))[3]
    whole = entry.read_bytes()
    entry.write_bytes(whole[:50])
    for losses, cached in run_ranks(ranks, _train_on_top_k, *options):
        torch.testing.assert_close(
            torch.tensor(losses), torch.tensor(expected), rtol=1e-4, atol=1e-4
        )
        assert sorted(cached) == [6, 7, 7, 7]
    assert len(entry.read_bytes()) == len(whole)


def _train_with_normalised_micro_batches(rank, world_size, folder, layout):

    cut = step_module.cut_batch

    def normalised(*args, **kwargs):
        return [
            replace(b, token_weights_N=b.token_weights_N / b.token_weights_N.sum().clamp_min(1e-9))
            for b in cut(*args, **kwargs)
        ]

    step_module.cut_batch = normalised
    return train_steps(rank, world_size, folder, layout, "forward_kl")[0]


def test_weights_normalised_in_each_micro_batch_would_be_noticed(models, single):
    options = (str(models), LAYOUTS["mbs3"])
    (losses,) = run_ranks(1, _train_with_normalised_micro_batches, *options)
    assert abs(losses[0][0] - single["forward_kl"][0][0][0]) > 0.1


def _gradient_of_an_auxiliary_loss(rank, world_size, folder, layout):
    """What Megatron makes of 0.3 x mean over positions of sum x w, attached as MoE routers do."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    # the distributed optimizer leaves a rank the reduced gradients of its own share alone
    optim = OptimConfig(lr=LR, use_distributed_optimizer=False)
    config = make_config(folder, layout, model={"optim": optim})
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    student = models.student
    student.chunks[0].config.num_moe_experts = 1  # the schedule sets the auxiliary loss's scale
    norm = student.chunks[0].decoder.layers[0].input_layernorm

    def attach(module, args, output):
        positions = output.shape[0] * output.shape[1]
        aux_loss = 0.3 * module.weight.sum() * positions  # as under calculate_per_token_loss
        return MoEAuxLossAutoScaler.apply(output, aux_loss)

    gradients = []
    for hook in (None, attach):
        handle = norm.register_forward_hook(hook) if hook else None
        student.optimizer.step_with_ready_grads = lambda: None
        student_module.clip_grad_by_total_norm_fp32 = lambda *args, **kwargs: None
        models.step(make_items(0), STAGES["forward_kl"], LR)
        gradients.append(norm.weight.main_grad.clone())
        if handle:
            handle.remove()
    return gradients[1] - gradients[0]


@pytest.mark.parametrize("layout", ["tp1", "mbs3", "dp2"])
def test_auxiliary_losses_come_out_as_means_over_micro_batches(models, layout):
    options = (str(models), LAYOUTS[layout])
    for difference in run_ranks(LAYOUTS[layout][2], _gradient_of_an_auxiliary_loss, *options):
        torch.testing.assert_close(difference, torch.full_like(difference, 0.3), rtol=0, atol=1e-4)


# layouts before and after, and whether the optimizer's state has to be readable at any layout
LAYOUT_CHANGES = [
    ("tp2", "tp2", False), ("dp2", "dp2", False), ("dp2", "dp2", True), ("dp2", "tp1", False),
    ("tp1", "dp2", False), ("pp2", "pp2 dp2", False), ("tp2", "pp2", True),
    ("tp2", "tp2 pp2", True), ("dp2", "pp2 dp2", True), ("tp2", "dp2", True),
]  # fmt: skip


@pytest.mark.parametrize(("before", "after", "fully_reshardable"), LAYOUT_CHANGES)
def test_a_resumed_run_goes_on_as_if_never_stopped(
    models, single, tmp_path, before, after, fully_reshardable
):
    """In its layout to the bit, in another one to rounding; moments divided over replicas too."""
    begin = partial(train_steps, fully_reshardable=fully_reshardable)
    options = (str(models), LAYOUTS[before], "forward_kl", None, str(tmp_path), 1)
    run_ranks(LAYOUTS[before][2], begin, *options)
    saved = str(checkpoint.checkpoint_dir(tmp_path, 1))
    assert checkpoint_files.read_state(Path(saved)).fully_reshardable is fully_reshardable
    layout = LAYOUTS[after]
    results = run_ranks(layout[2], train_steps, str(models), layout, "forward_kl", saved)
    losses = torch.tensor(results[0][0])
    if before == after:
        uninterrupted = run_ranks(2, train_steps, str(models), layout, "forward_kl")
        assert torch.equal(losses, torch.tensor(uninterrupted[0][0][1:]))
    torch.testing.assert_close(
        losses, torch.tensor(single["forward_kl"][0][1:]), rtol=1e-4, atol=1e-4
    )


def _train_with_layers_of_more_state(rank, world_size, folder, resume_from, save_to):
    """Norms and attention hold a state of their own, as Transformer Engine's do."""
    for layer in (RMSNorm, CoreAttention):
        layer.get_extra_state = lambda self: torch.zeros(3)
        layer.set_extra_state = lambda self, state: None
    options = ("forward_kl", resume_from, save_to, 1 if save_to else STEPS)
    return train_steps(rank, world_size, folder, LAYOUTS["tp1"], *options)[0]


def test_layers_of_transformer_engine_and_of_megatron_read_each_others_checkpoints(
    models, single, tmp_path
):
    plain = partial(train_steps, layout=LAYOUTS["tp1"], kind="forward_kl")
    there, here = tmp_path / "there", tmp_path / "here"
    run_ranks(1, _train_with_layers_of_more_state, str(models), None, str(there))
    run_ranks(1, partial(plain, save_to=str(here), steps=1), str(models))
    there, here = (str(checkpoint.checkpoint_dir(folder, 1)) for folder in (there, here))
    (losses, _), *_ = run_ranks(1, partial(plain, resume_from=there), str(models))
    assert losses == single["forward_kl"][0][1:]
    assert run_ranks(1, _train_with_layers_of_more_state, str(models), here, None) == [losses]


def _restore_elsewhere(rank, world_size, folder, layout, saved):
    config = make_config(folder, layout)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load(Path(saved), build_models(config, parallel).student, parallel)
    return str(caught.value)


def test_shards_of_the_optimizer_are_not_read_at_another_layout(models, tmp_path):
    """Its settings are compared before a rank starts; what they do not tell, Megatron does."""
    run_ranks(2, train_steps, str(models), LAYOUTS["dp2"], "forward_kl", None, str(tmp_path), 1)
    saved = checkpoint.checkpoint_dir(tmp_path, 1)
    remedy = "fully_reshardable=true first"
    for name in ("tp2", "pp2"):
        config = make_config(models, LAYOUTS[name])
        key = "tensor" if name == "tp2" else "pipeline"
        message = f"model.{key}_model_parallel_size was 1 and is 2. Start with .*{remedy}"
        with pytest.raises(CheckpointError, match=message):
            checkpoint_files.newest_checkpoint(config, tmp_path)
        for said in run_ranks(2, _restore_elsewhere, str(models), LAYOUTS[name], str(saved)):
            assert str(saved) in said and "Traceback" not in said


def _save_where_a_rank_has_no_shard(rank, world_size, folder, out):
    config = make_config(folder, LAYOUTS["dp2"])
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    # each parameter is a bucket: the norms' 64 numbers are padded to 128, half of them a rank's
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=True,
        overlap_grad_reduce=True,
        bucket_size=1,
    )
    setup.build_student = partial(build_student, ddp_config=ddp)
    models = build_models(config, parallel)
    models.step(make_items(0), STAGES["forward_kl"], LR)
    models.save(Path(out), step=1, consumed_problems=0, skipped=0)
    return checkpoint_files.read_state(checkpoint.checkpoint_dir(Path(out), 1)).fully_reshardable


def test_buckets_too_small_for_all_ranks_are_written_whole(models, tmp_path):
    """Megatron cannot write them in shards."""
    assert run_ranks(2, _save_where_a_rank_has_no_shard, str(models), str(tmp_path)) == [True] * 2


def _use_adam(models, name):
    """Of the models just built; another class, as where Transformer Engine is installed."""
    for one in chained(models.student.optimizer):
        if name == "fused":
            groups_of = [dict(group) for group in one.optimizer.param_groups]
            one.optimizer = FusedAdam(groups_of, lr=LR, betas=BETAS, eps=1e-8, weight_decay=0.01)


def _save_and_load_in_bf16(
    rank, world_size, folder, layout, distributed, adams, out, fully_reshardable
):
    """Master weights and moments before a save, and after loading into a new student.

    Saved are a run that has taken no step, one that has taken some, and one whose optimizer was
    reset. ``adams``: the classes that write and read, and whether the reader could import a fused
    one, which is all that Megatron looks at.
    """
    writes, reads, fused_there = adams
    optim = OptimConfig(lr=1e-5, betas=BETAS, use_distributed_optimizer=distributed)
    config = make_config(folder, layout, model={"optim": optim})
    config.trainer.precision = "bf16"
    config.exp_manager.checkpoint_callback_params.fully_reshardable = fully_reshardable
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)

    def fused_is_there(yes):
        distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = yes

    def state(models):
        (inner,) = (one.optimizer for one in chained(models.student.optimizer))
        found = []
        for group in inner.param_groups:
            for p in group["params"]:
                one = inner.state[p]
                count = float(one.get("step", group["step"]))
                found += [p.clone(), torch.tensor(count), one["exp_avg"], one["exp_avg_sq"]]
        return [tensor.clone() for tensor in found]

    models = build_models(config, parallel)
    _use_adam(models, writes)
    saves = []
    for number, prepare in enumerate(("nothing", "train", "reset")):
        if prepare == "train":
            for step in range(3):
                models.step(make_items(step), STAGES["forward_kl"], 1e-5)
        elif prepare == "reset":
            models.student.reset_optimizer()
        fused_is_there(writes == "fused" or fused_there)
        models.save(Path(out), step=number, consumed_problems=0, skipped=0)
        before = state(models)
        fused_is_there(fused_there)
        again = build_models(config, parallel)
        _use_adam(again, reads)
        checkpoint.load(checkpoint.checkpoint_dir(Path(out), number), again.student, parallel)
        saves.append((before, state(again)))
        if writes == reads:
            losses = []
            for each in (models, again):
                for step in (3, 4):  # the second one sees what the first one's update did
                    result = each.step(make_items(step), STAGES["forward_kl"], 1e-5)
                    losses.append((result.loss, result.grad_norm))
            assert losses[:2] == losses[2:]
            assert all(torch.equal(*pair) for pair in zip(state(models), state(again), strict=True))
    return saves


# layout, whether the optimizer is distributed, class that writes, class that reads, whether a fused
# one can be imported
RESUMES = {
    "torch dp2": ("dp2", True, ("torch", "torch", False)),
    "torch dp2 reshardable": ("dp2", True, ("torch", "torch", False)),
    "torch tp2": ("tp2", True, ("torch", "torch", False)),
    "torch tp2 whole": ("tp2", False, ("torch", "torch", False)),
    "torch beside fused": ("dp2", True, ("torch", "torch", True)),
    "fused dp2": ("dp2", True, ("fused", "fused", True)),
    "fused dp2 reshardable": ("dp2", True, ("fused", "fused", True)),
    "fused whole": ("tp1", False, ("fused", "fused", True)),
    "torch to fused": ("tp1", True, ("torch", "fused", True)),
    "torch to fused reshardable": ("tp1", True, ("torch", "fused", True)),
    "torch to fused whole": ("tp1", False, ("torch", "fused", True)),
    "fused to torch": ("tp1", True, ("fused", "torch", False)),
    "fused to torch reshardable": ("tp1", True, ("fused", "torch", False)),
    "fused to torch whole": ("tp1", False, ("fused", "torch", False)),
}


@pytest.mark.parametrize("resume", RESUMES)
def test_master_weights_and_moments_of_a_bf16_run_survive_a_resume(models, tmp_path, resume):
    """They hold what updates at small rates add up to, far below what bf16 can tell apart."""
    layout, distributed, adams = RESUMES[resume]
    writes, reads, _ = adams
    reshardable = resume.endswith("reshardable")
    options = (str(models), LAYOUTS[layout], distributed, adams, str(tmp_path), reshardable)
    for saves in run_ranks(LAYOUTS[layout][2], _save_and_load_in_bf16, *options):
        # two more after the first save, where the two go on to be compared
        for (before, after), steps in zip(saves, (0, 5 if writes == reads else 3, 0), strict=True):
            assert all(float(count) == steps for count in before[1::4])
            assert len(before) == len(after)
            assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
        (before, _) = saves[1]
        assert any(t.dtype is torch.float32 and not torch.equal(t, t.bfloat16()) for t in before)


def _reset(rank, world_size, folder):
    """The update right after a reset, and the first one of a run with the same weights."""
    config = make_config(folder, LAYOUTS["tp1"])
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    for step in range(2):
        models.step(make_items(step), STAGES["forward_kl"], LR)
    (inner,) = (one.optimizer for one in chained(models.student.optimizer))
    inner.param_groups[0]["step"] = 2  # where a fused one counts
    models.student.reset_optimizer()
    assert not inner.state and all("step" not in group for group in inner.param_groups)
    models.step(make_items(2), STAGES["forward_kl"], LR)
    return [float(state["step"]) for state in inner.state.values()]


def test_a_reset_optimizer_begins_to_count_anew(models):
    assert set(run_ranks(1, _reset, str(models))[0]) == {1.0}


def _train_where_kernels_for_gpus_are_installed(rank, world_size, folder, name):
    """As where Transformer Engine is: every name that Megatron binds to its kernels raises here."""
    bound = 0
    for module in (optimizer_package, clip_grads, distrib_optimizer, mixed_precision, moe_utils):
        for bound_name in _names_of_kernels(module):
            setattr(module, bound_name, _KernelForGpus)
            bound += 1
    assert bound >= 8, "Megatron binds them otherwise: this test looks at nothing"
    optimizer_package.USING_PYTORCH_OPTIMIZER = False
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = True
    optim = OptimConfig(lr=LR, name=name)
    return train_steps(
        rank, world_size, folder, LAYOUTS["dp2"], "forward_kl", model={"optim": optim}
    )[0]


class _KernelForGpus:
    """A function or an optimizer."""

    def __init__(self, *_, **__):
        raise AssertionError("a kernel for GPUs has run on the CPU")


def _names_of_kernels(module):
    """Bound by an import of Transformer Engine or Apex, or to one of these, when it succeeds."""
    tree = ast.parse(Path(module.__file__).read_text())
    imported = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(GPU_PACKAGES)
        for alias in node.names
        if alias.name not in ("is_te_min_version",)
    }
    aliases = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and ast.unparse(node.value) in imported
        for target in node.targets
    }
    return imported | aliases


@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_on_a_cpu_no_kernel_for_gpus_runs_where_some_are_installed(models, name):
    train = partial(train_steps, model={"optim": OptimConfig(lr=LR, name=name)})
    expected = run_ranks(2, train, str(models), LAYOUTS["dp2"], "forward_kl")
    found = run_ranks(2, _train_where_kernels_for_gpus_are_installed, str(models), name)
    assert found == [losses for losses, _ in expected]


def test_fused_optimizers_are_refused_on_a_cpu():
    for backend in (OptimBackend.transformer_engine, OptimBackend.apex):
        with pytest.raises(ConfigError, match=f"backend is {backend.value}, whose kernels need"):
            use_backend(None, OptimConfig(backend=backend), torch.device("cpu"))


def _save_on_a_full_disk(rank, world_size, folder, out):
    import resource

    config = make_config(folder, LAYOUTS["tp1"])
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    models.save(Path(out), step=1, consumed_problems=0, skipped=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # writing fails from here on
    with pytest.raises(CheckpointError) as caught:
        models.save(Path(out), step=2, consumed_problems=0, skipped=0)
    return str(caught.value)


def test_a_checkpoint_that_cannot_be_written_leaves_the_earlier_one_whole(models, tmp_path):
    (message,) = run_ranks(1, _save_on_a_full_disk, str(models), str(tmp_path))
    assert "step_00000002 could not be written" in message and "free space" in message
    (kept,) = checkpoint_files.checkpoints(tmp_path)
    assert kept.name == "step_00000001"
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]
    saved = str(kept)
    (losses, _) = run_ranks(1, train_steps, str(models), LAYOUTS["tp1"], "forward_kl", saved)[0]
    assert len(losses) == STEPS - 1


def _save_in_the_background(rank, world_size, folder, layout, out):
    from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

    config = make_config(folder, layout)
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    background = AsyncCallsQueue()
    models.step(make_items(0), STAGES["forward_kl"], LR)
    models.save(Path(out), step=1, consumed_problems=0, skipped=0, background=background)
    # the weights move on while the ones of step 1 are written
    losses = [models.step(make_items(s), STAGES["forward_kl"], LR).loss for s in range(1, STEPS)]
    checkpoint.finish(background, wait=True)
    return losses


def test_a_checkpoint_written_in_the_background_holds_the_weights_of_its_step(models, tmp_path):
    options = (str(models), LAYOUTS["tp2"])
    losses = run_ranks(2, _save_in_the_background, *options, str(tmp_path))[0]
    (saved,) = checkpoint_files.checkpoints(tmp_path)
    assert checkpoint_files.damage(saved) is None
    resumed = run_ranks(2, train_steps, *options, "forward_kl", str(saved))[0][0]
    assert losses == [loss for loss, _ in resumed]


def test_a_damaged_checkpoint_is_named(models, tmp_path):

    run_ranks(1, train_steps, str(models), LAYOUTS["tp1"], "forward_kl", None, str(tmp_path), 1)
    directory = checkpoint.checkpoint_dir(tmp_path, 1)
    for path in directory.glob("*.distcp"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(AssertionError, match=r"CheckpointError: checkpoint .*step_00000001"):
        run_ranks(1, train_steps, str(models), LAYOUTS["tp1"], "forward_kl", str(directory))
    (directory / checkpoint_files.STATE_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="not a complete checkpoint"):
        checkpoint_files.read_state(directory)
