"""The teacher's own layout and placement change where it runs, never what it says."""

import pytest
import torch
from megatron.core.parallel_state import RankGenerator

from nemo_paced.config import ModelConfig, TeacherPlacement
from nemo_paced.data.packing import rank_items
from nemo_paced.errors import ConfigError
from nemo_paced.parallel import groups
from nemo_paced.parallel.groups import RankGrid
from nemo_paced.quickstart.models import VOCABULARY, write_tokenizer
from nemo_paced.teacher.build import serve_teacher
from nemo_paced.teacher.reshard import OneWorld, exchange, routes
from nemo_paced.training.setup import build_models
from tests.distributed.harness import assert_same_steps, run_ranks
from tests.distributed.test_training import LR, STAGES, STEPS, make_config, make_items
from tests.tiny import make_hf_model

VOCAB = len(VOCABULARY)
TOP_K = {"first": 1e-4, "later": 1e-4}  # probabilities through log and exp, though all are kept
# tensor, pipeline, ranks, micro-batch, sequence parallel of the student; tensor, pipeline of the
# teacher
LAYOUTS = {
    "student tp2, teacher pp2": ((2, 1, 2, 2, False), (1, 2)),
    "student pp2, teacher tp2": ((1, 2, 2, 2, False), (2, 1)),
    "student tp2 sp, teacher dp2": ((2, 1, 2, 2, True), (1, 1)),
    "student dp2, teacher tp2": ((1, 1, 2, 3, False), (2, 1)),
    "student tp2 pp2, teacher tp2 dp2": ((2, 2, 4, 1, False), (2, 1)),
    "student dp4, teacher tp2 pp2": ((1, 1, 4, 1, False), (2, 2)),
    "student tp2 dp2, teacher pp2 dp2": ((2, 1, 4, 2, False), (1, 2)),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_hf_model("qwen3_tied", folder / "student", vocab_size=VOCAB + 3, num_hidden_layers=2)
    make_hf_model("qwen3", folder / "teacher", seed=1, vocab_size=VOCAB + 11, hidden_size=64)
    make_hf_model("llama_tied", folder / "tied_teacher", seed=2, vocab_size=VOCAB)
    write_tokenizer(folder / "student")
    return folder


def train(rank, world_size, folder, student, teacher, kind="forward_kl", name="teacher", **options):
    tensor, pipeline = teacher
    config = make_config(
        folder,
        student,
        name,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        **options,
    )
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    source = models.step.teacher
    if config.teacher.placement is TeacherPlacement.cached:
        for step in range(STEPS):
            source.fill(make_items(step))
        source.held.release()
    results = [models.step(make_items(step), STAGES[kind], LR) for step in range(STEPS)]
    held = source.held._teacher
    left = sum(p.untyped_storage().nbytes() for p in held.gpt.parameters()) if held else 0
    return [(r.loss, r.grad_norm) for r in results], [r.cached for r in results], left


def _alone(models, *options):
    one = (1, 1, 1, 2, False)
    return torch.tensor(run_ranks(1, train, str(models), one, (0, 0), *options)[0][0])


@pytest.fixture(scope="module")
def single(models):
    return {kind: _alone(models, kind) for kind in ("forward_kl", "adaptive_kl")}


@pytest.mark.parametrize("kind", ["forward_kl", "adaptive_kl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_in_a_layout_of_its_own_gives_the_same_steps(models, single, layout, kind):
    student, teacher = LAYOUTS[layout]
    for losses, _, _ in run_ranks(student[2], train, str(models), student, teacher, kind):
        assert_same_steps(losses, single[kind])


def test_a_tied_teacher_across_stages_needs_no_head_there(models):
    options = ("reverse_kl", "tied_teacher")
    expected = _alone(models, *options)
    layout = ((2, 1, 2, 2, False), (1, 2))
    for losses, _, _ in run_ranks(2, train, str(models), *layout, *options):
        assert_same_steps(losses, expected)


def _train_placed(rank, world_size, folder, student, teacher, placement, options):
    placed = TeacherPlacement(placement)
    return train(rank, world_size, folder, student, teacher, placement=placed, **options)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("placement", ["offloaded", "cached", "cached top-k"])
def test_every_placement_gives_the_same_steps(models, single, tmp_path, placement, ranks):
    """With the teacher in another layout than the student; a top-k of the whole vocabulary."""
    student, teacher = {
        2: ((2, 1, 2, 2, False), (1, 2)),
        4: ((1, 2, 4, 2, False), (2, 1)),
    }[ranks]
    name, _, kind = placement.partition(" ")
    options = {"cache_dir": str(tmp_path)} if name == "cached" else {}
    if kind:
        options["top_k"] = VOCAB
    arguments = (str(models), student, teacher, name, options)
    for losses, cached, left in run_ranks(ranks, _train_placed, *arguments):
        assert_same_steps(losses, single["forward_kl"], **(TOP_K if kind else {}))
        assert left == 0, "no weight of the teacher stays on the device"
        assert cached == ([7] * STEPS if name == "cached" else [0] * STEPS)


def _loads(rank, world_size, folder, cache_dir, damage):
    config = make_config(
        folder, (1, 1, 1, 2, False), placement=TeacherPlacement.cached, cache_dir=cache_dir
    )
    parallel = groups.initialize(config.model, accelerator="cpu", timeout_s=60)
    models = build_models(config, parallel)
    source = models.step.teacher
    if damage is None:
        source.fill(make_items(0))
        source.held.release()
    result = models.step(make_items(0), STAGES["forward_kl"], LR)
    return result.loss, result.cached, source.held._teacher is None


def test_a_cached_teacher_is_loaded_again_only_for_a_damaged_entry(models, tmp_path):
    first = run_ranks(1, _loads, str(models), str(tmp_path), None)[0]
    assert first[1:] == (7, True)
    entry = sorted(tmp_path.glob("*/*.signal"))[2]
    entry.write_bytes(entry.read_bytes()[:-1])
    loss, cached, released = run_ranks(1, _loads, str(models), str(tmp_path), "damage")[0]
    assert (cached, released) == (6, True)
    assert loss == pytest.approx(first[0], rel=1e-6)


def _train_separate(rank, world_size, folder, student, teacher, ranks, kind, top_k):
    """As in training/loop.py: the student's ranks train, the teacher's answer."""
    tensor, pipeline = teacher
    config = make_config(
        folder,
        student,
        placement=TeacherPlacement.separate,
        separate_ranks=ranks,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        top_k=top_k,
        devices=world_size,
    )
    parallel = groups.initialize(
        config.model,
        accelerator="cpu",
        timeout_s=60,
        teacher=config.teacher_model,
        separate_ranks=ranks,
    )
    if parallel.link.is_teacher:
        serve_teacher(config, parallel)
        return None
    models = build_models(config, parallel)
    remote = models.step.teacher.remote
    if rank == 0:  # one batch ahead; the others are told when they are asked for
        remote.announce(make_items(0))
        remote.announce(make_items(1))
    results = [models.step(make_items(step), STAGES[kind], LR) for step in range(STEPS)]
    if rank == 0:
        remote.announce(make_items(STEPS))  # and then the run is asked to stop
    remote.close()
    return [(r.loss, r.grad_norm) for r in results]


SEPARATE = {
    "1 + 1": ((1, 1, 1, 2, False), (1, 1), 1),
    "tp2 + 1": ((2, 1, 2, 2, False), (1, 1), 1),
    "1 + tp2": ((1, 1, 1, 2, False), (2, 1), 2),
    "pp2 + dp2": ((1, 2, 2, 1, False), (1, 1), 2),
    "tp2 sp + pp2": ((2, 1, 2, 2, True), (1, 2), 2),
}


@pytest.mark.parametrize("top_k", [0, VOCAB])
@pytest.mark.parametrize("layout", SEPARATE)
def test_a_teacher_on_ranks_of_its_own_gives_the_same_steps(models, single, layout, top_k):
    student, teacher, ranks = SEPARATE[layout]
    world = student[2] + ranks
    options = (str(models), student, teacher, ranks, "forward_kl", top_k)
    results = run_ranks(world, _train_separate, *options)
    assert results[student[2] :] == [None] * ranks, "the teacher's ranks ended by themselves"
    for losses in results[: student[2]]:
        assert_same_steps(losses, single["forward_kl"], **(TOP_K if top_k else {}))


@pytest.mark.parametrize("sizes", [(2, 1, 3, 2), (2, 2, 2, 3), (1, 1, 4, 1), (3, 2, 1, 2)])
def test_the_grid_is_megatrons(sizes):
    tensor, context, data, pipeline = sizes
    ranks = RankGenerator(tensor, 1, data, pipeline, context, "tp-cp-ep-dp-pp")
    replicas = [group[-tensor * context :] for group in ranks.get_ranks("tp-cp-pp")]
    grid = RankGrid(*sizes)
    assert [grid.last_stage(dp_rank) for dp_rank in range(data)] == replicas


def test_each_rank_that_needs_a_response_gets_it_once_and_keeps_its_own():
    items = make_items(0)
    teacher, student = RankGrid(2, 1, 2, 2), RankGrid(4, 1, 2, 1)
    made = routes(items[2:], items, teacher=teacher, student=student)
    wanted = {
        (item.response_id, rank)
        for dp_rank in range(2)
        for item in rank_items(items, dp_rank=dp_rank, dp_size=2)
        if item in items[2:]
        for rank in student.last_stage(dp_rank)
    }
    assert sorted((r.response_id, r.target) for r in made) == sorted(wanted)
    holders = {rank for dp_rank in range(2) for rank in teacher.last_stage(dp_rank)}
    assert {r.source for r in made} <= holders
    same = routes(items, items, teacher=student, student=student)
    assert all(route.source == route.target for route in same)


def _refused(rank, world_size, folder):
    model = ModelConfig()
    parallel = groups.initialize(model, accelerator="cpu", timeout_s=60)
    with pytest.raises(ConfigError) as caught:
        groups.beside(parallel, ModelConfig(tensor_model_parallel_size=3))
    return str(caught.value)


def test_a_layout_that_the_ranks_do_not_fit_is_refused_by_name(models):
    for message in run_ranks(2, _refused, str(models)):
        assert "teacher.tensor_model_parallel_size" in message and "2 ranks" in message


def _exchange_in_a_ring(rank, world_size):
    from nemo_paced.teacher.reshard import ReshardRoute

    parallel = groups.initialize(ModelConfig(), accelerator="cpu", timeout_s=60)
    ways = [ReshardRoute(f"r{i}", i, i, (i + 1) % 3) for i in range(3)] + [
        ReshardRoute("both", 2, 1, 0)
    ]
    held = {f"r{rank}": torch.full((rank, 4), rank)}
    if rank == 1:
        held["both"] = torch.full((2, 4), 7)
    ends = OneWorld(parallel.rank)
    return exchange(held, ways, ends, parallel.device, width=4, dtype=torch.int64)


def test_an_exchange_of_unequal_and_empty_parts():
    first, second, third = run_ranks(3, _exchange_in_a_ring)
    assert {name: len(part) for name, part in first.items()} == {"both": 2, "r2": 2}
    assert (first["both"] == 7).all() and (first["r2"] == 2).all()
    assert second.keys() == {"r0"} and second["r0"].shape == (0, 4)
    assert third.keys() == {"r1"} and (third["r1"] == 1).all()
