"""Memory and time against what is known: identities, published figures within wide bounds."""

from dataclasses import replace

import pytest

from nemo_paced.config import Recompute, TeacherPlacement
from nemo_paced.sizing import activations
from nemo_paced.sizing.flops import (
    Server,
    forward_flops,
    kv_bytes,
    kv_cache_tokens,
    rollout_seconds,
    step_flops,
    step_time,
)
from nemo_paced.sizing.hardware import GIB, GPUS, Assumptions, Cluster
from nemo_paced.sizing.memory import stage_memory, stages_memory
from nemo_paced.sizing.parameters import model_parameters
from nemo_paced.sizing.search import PlanRequest, cuts, evaluate, fewest_gpus, search
from nemo_paced.sizing.shapes import Accelerator, Layout, TeacherPlan, Work
from tests.unit.sizing.shapes import LLAMA3_8B, QWEN3_1_7B, QWEN3_8B, QWEN3_30B_A3B, QWEN3_32B

WORK = Work(
    micro_batch_size=1,
    global_batch_size=64,
    teacher_micro_batch_size=1,
    prompt=1024,
    teacher_prompt=1024,
    response=7168,
    mean_prompt=512,
    mean_response=2048,
)
H100 = Cluster(GPUS["h100"], 1)
SERVER = Server(1, 0.3 * 80 * GIB, 128)


def memory(layout=None, placement=TeacherPlacement.colocated, work=WORK, stage=0, **teacher):
    layout = layout or Layout()
    plan = TeacherPlan(Layout(**teacher), placement)
    return stage_memory(QWEN3_1_7B, QWEN3_8B, layout, plan, work, stage)


def test_weights_gradients_and_optimizer_are_18_bytes_a_parameter():
    """Megatron's count for 16-bit weights; 6 + 12 / d with its distributed optimizer."""
    parameters = model_parameters(QWEN3_1_7B)
    of = memory()
    assert (of.weights + of.gradients + of.optimizer) / parameters == pytest.approx(18, rel=1e-3)
    of = memory(Layout(data=8, distributed_optimizer=True))
    assert (of.weights + of.gradients + of.optimizer) / parameters == pytest.approx(7.5, rel=1e-3)


def test_experts_are_divided_over_fewer_replicas():
    layout = Layout(expert=8, data=8, distributed_optimizer=True)
    plan = TeacherPlan(layout)
    of = stage_memory(QWEN3_30B_A3B, QWEN3_30B_A3B, layout, plan, WORK, 0)
    held = of.gradients / 4
    experts = 128 / 8 * 48 * 3 * 768 * 2048
    assert of.optimizer == pytest.approx(12 * (experts + (held - experts) / 8))
    assert layout.expert_data == 1


def test_no_score_matrix_is_kept():
    """Korthikanti et al. count 5 a s^2 b bytes of them: what flash attention leaves out."""
    for accelerator in Accelerator:
        work = replace(WORK, accelerator=accelerator)
        short, long = (
            stage_memory(
                LLAMA3_8B,
                LLAMA3_8B,
                Layout(),
                TeacherPlan(Layout()),
                replace(work, response=n),
                0,
            ).activations
            for n in (7168, 15360)
        )
        assert long == pytest.approx(2 * short)


def test_what_recomputation_keeps():
    kept = {
        r: activations.layer_bytes(QWEN3_8B, Layout(tensor=2, recompute=r), WORK) for r in Recompute
    }
    assert kept[Recompute.full] == 2 * 4096, "a layer's input"
    assert kept[Recompute.none] - kept[Recompute.selective] == 4 * 16, "16 heads' log-sum-exp"


def test_sequence_parallelism_divides_all_of_a_layer():
    one = activations.layer_bytes(QWEN3_8B, Layout(), WORK)
    cut = Layout(tensor=4, sequence_parallel=True)
    assert activations.layer_bytes(QWEN3_8B, cut, WORK) == pytest.approx(one / 4)
    without = activations.layer_bytes(QWEN3_8B, Layout(tensor=4), WORK)
    assert one / 4 < without < one


def test_stages_hold_the_micro_batches_that_1f1b_has_in_flight():
    layout = Layout(pipeline=4)
    held = [memory(layout, stage=stage, pipeline=4).activations for stage in range(4)]
    assert held[0] == pytest.approx(4 / 3 * held[1]) == pytest.approx(2 * held[2])
    one = replace(WORK, global_batch_size=1)
    assert memory(layout, work=one, pipeline=4).activations == pytest.approx(held[0] / 4)


def test_interleaving_holds_more_on_the_first_stage():
    """Narayanan et al. 2021: 1 + (p - 1) / (p v) times what 1F1B holds there."""
    plain, interleaved = (
        memory(Layout(pipeline=4, virtual=v), pipeline=4).activations for v in (1, 7)
    )
    assert interleaved / plain == pytest.approx(1 + 3 / (4 * 7), rel=0.03)
    assert Layout(pipeline=2, virtual=2).layers(8, 1) == [2, 3, 6, 7]


def test_context_parallelism_divides_activations_and_signal():
    whole, half = memory(), memory(Layout(context=2))
    assert half.activations == pytest.approx(whole.activations / 2)
    assert half.signal == whole.signal / 2


def test_where_the_teacher_is_decides_which_phase_holds_it():
    colocated, offloaded, cached = (memory(placement=p) for p in list(TeacherPlacement)[:3])
    assert colocated.teacher > 0 == offloaded.teacher == cached.teacher
    assert offloaded.teacher_phase == colocated.teacher_phase
    assert offloaded.student_phase == colocated.student_phase - colocated.teacher
    assert cached.teacher_phase == offloaded.teacher_phase, "while the cache is filled"
    assert colocated.teacher_head == offloaded.teacher_head == 2 * 151936 * 4096
    assert memory(tensor=4).teacher == pytest.approx(colocated.teacher / 4, rel=0.01)


def test_eight_bits_halve_the_linear_layers_of_the_teacher():
    of = [
        stage_memory(QWEN3_1_7B, QWEN3_8B, Layout(), TeacherPlan(Layout(), fp8=fp8), WORK, 0)
        for fp8 in (False, True)
    ]
    embedding = 2 * 151936 * 4096
    assert of[1].teacher - embedding == pytest.approx((of[0].teacher - embedding) / 2)


def test_the_loss_holds_chunks_not_logits():
    short, long = (memory(work=replace(WORK, response=n)).loss for n in (2048, 65536))
    logits = 65536 * 151936 * 2
    # the student's of all 2,048 tokens, the teacher's of half of them
    assert long < logits / 4 and short > 2 * (2048 + 1024) * 151936
    top_k = memory(work=replace(WORK, top_k=64))
    assert top_k.loss < memory().loss
    assert top_k.signal == 64 * 7168 * (8 * 64 + 4)


def test_flops_are_six_a_parameter_and_token():
    flops = forward_flops(LLAMA3_8B, 1000, 1)
    layers = model_parameters(LLAMA3_8B) - 2 * 128256 * 4096
    assert flops == pytest.approx(2 * layers * 1000, rel=0.01)
    of = step_flops(QWEN3_1_7B, QWEN3_8B, Layout(), TeacherPlan(Layout()), WORK)
    again = step_flops(
        QWEN3_1_7B, QWEN3_8B, Layout(recompute=Recompute.full), TeacherPlan(Layout()), WORK
    )
    assert of.recompute == 0 and again.recompute == pytest.approx(of.student / 3)


def test_packing_leaves_padding_out():
    packed = replace(WORK, packed=8192, teacher_prompt=4096)
    layout = Layout()
    assert packed.attended(layout) == 512 + 2048
    assert packed.attended(layout, teacher=True) == 4 * 512 + 2048
    assert packed.micro_batches(layout) == 64 * 2560 // 8192
    assert packed.sequence(layout, teacher=True) == 4096 + 7168
    padded = step_flops(QWEN3_1_7B, QWEN3_8B, layout, TeacherPlan(layout), WORK)
    assert step_flops(QWEN3_1_7B, QWEN3_8B, layout, TeacherPlan(layout), packed).student < (
        padded.student / 3
    )


def test_keys_and_values_of_llama_3_are_128_kib_a_token():
    assert kv_bytes(LLAMA3_8B, WORK) == 128 * 1024
    server = Server(1, 40 * GIB, 256)
    held = kv_cache_tokens(LLAMA3_8B, WORK, server, Assumptions())
    assert held == pytest.approx((37 * GIB - 16.06e9) / 131072, rel=0.01)


def test_decoding_is_bound_by_bandwidth_until_many_sequences():
    def rate(sequences):
        work = replace(WORK, mean_response=256)
        server = Server(1, 70 * GIB, sequences)
        seconds = rollout_seconds(LLAMA3_8B, 512, work, H100, server, Assumptions())
        return 512 * 256 / seconds

    assert rate(16) > 8 * rate(1)
    # one sequence reads all weights for each token: 16 GB at 70 % of 3.35 TB/s, and 4 ms
    assert rate(1) == pytest.approx(1 / (16.06e9 / (0.7 * 3.35e12) + 0.004), rel=0.1)


def test_replicas_share_the_requests():
    server = Server(1, 70 * GIB, 64)
    one, four = (
        rollout_seconds(
            LLAMA3_8B, 512, WORK, H100, replace(server, replicas=count), Assumptions()
        )
        for count in (1, 4)
    )  # fmt: skip
    assert four == pytest.approx(one / 4)
    last = replace(server, replicas=4)
    uneven = rollout_seconds(LLAMA3_8B, 5, WORK, H100, last, Assumptions())
    assert uneven == rollout_seconds(LLAMA3_8B, 2, WORK, H100, server, Assumptions())


@pytest.mark.parametrize(
    ("layout", "servers", "stages"),
    [
        (Layout(pipeline=4), 1, 1),
        (Layout(pipeline=4), 3, 3),
        (Layout(tensor=2, pipeline=2), 2, 1),  # both GPUs of the first stage
        (Layout(tensor=2, pipeline=2), 3, 2),
        (Layout(data=4), 4, 1),
        (Layout(), 8, 1),
    ],
)
def test_servers_lie_on_the_first_gpus_whatever_stage_is_there(layout, servers, stages):
    assert Server(1, GIB, 8, servers).stages(layout) == stages
    assert Server(servers, GIB, 8).stages(layout) == stages


def test_the_fullest_gpu_counts_the_servers_of_its_stage():
    layout = Layout(pipeline=4, recompute=Recompute.full)
    plan = TeacherPlan(layout, TeacherPlacement.colocated)

    def needed(server):
        return evaluate(replace(problem(), server=server), layout, plan, WORK)

    peaks = [stage.peak for stage in needed(None).stages]
    assert max(peaks) == peaks[-1] > peaks[0], "the LM heads and the loss are on the last stage"
    reserve = Assumptions().reserve
    assert needed(None).needed == max(peaks) + reserve
    assert needed(SERVER).needed == max(peaks[0] + SERVER.memory, *peaks[1:]) + reserve
    everywhere = replace(SERVER, replicas=4)
    assert needed(everywhere).needed == max(peaks) + SERVER.memory + reserve
    small = replace(everywhere, memory=GIB)
    assert needed(small).fits and not needed(replace(small, replicas=5)).fits, "of four GPUs"


def test_a_separate_teachers_gpu_counts_the_server_on_it():
    plan = TeacherPlan(Layout(), TeacherPlacement.separate)
    work = replace(WORK, response=64, prompt=64)  # the teacher's GPU is the fullest
    one, two = (
        evaluate(
            replace(problem(), server=replace(SERVER, memory=GIB, replicas=count)),
            Layout(), plan, work,
        ).needed
        for count in (1, 2)
    )  # fmt: skip
    assert two == one + GIB


def test_nemo_rls_nightly_distillation_fits_and_takes_its_order_of_time():
    """Qwen 32B -> 1.7B on 8 H100, TP2 PP2 CP2, packed: < 75 GB and < 50 s a step; its batch is not
    published with it: 64 prompts of 8,192 tokens taken here."""
    layout = Layout(tensor=2, pipeline=2, context=2, sequence_parallel=True)
    teacher = TeacherPlan(Layout(tensor=2, pipeline=2, data=2, sequence_parallel=True))
    stages = stages_memory(QWEN3_1_7B, QWEN3_32B, layout, teacher, WORK)
    assert 15 * GIB < max(stage.peak for stage in stages) < 75e9
    time = step_time(
        QWEN3_1_7B, QWEN3_32B, layout, teacher, WORK, H100, SERVER, Assumptions()
    ).total
    assert 2 < time < 100


def test_modelopts_distillation_costs_its_order_of_gpu_hours():
    """9B -> 7B, TP8: 600 H100-hours for 6.3 billion tokens."""
    nine, seven = (replace(LLAMA3_8B, num_layers=n) for n in (36, 27))
    work = replace(WORK, prompt=4096, teacher_prompt=4096, response=4096, mean_response=4096)
    layout = Layout(tensor=8, sequence_parallel=True)
    time = step_time(
        seven, nine, layout, TeacherPlan(layout), work, H100, SERVER, Assumptions()
    ).total
    tokens = work.global_batch_size * work.sequence(layout)
    hours = 8 * time / 3600 * 6.3e9 / tokens
    assert 600 / 4 < hours < 600 * 2


def problem(cluster=H100, student=QWEN3_1_7B, teacher=QWEN3_32B):
    return PlanRequest(student, teacher, cluster, SERVER, SERVER, Assumptions())


EVERYWHERE = tuple(TeacherPlacement)


def test_what_is_found_divides_fits_and_is_sorted():
    found = search(problem(), WORK, gpus=8, fp8=False, placements=EVERYWHERE)
    assert found == sorted(found, key=lambda c: round(c.time.total, 3))
    assert {c.teacher.placement for c in found} == set(EVERYWHERE)
    for candidate in found:
        layout = candidate.layout
        assert candidate.needed <= H100.gpu.memory and candidate.gpus == 8
        assert not any(n % layout.tensor for n in (16, 8, 6144)) and 28 % layout.pipeline == 0
        assert evaluate(problem(), layout, candidate.teacher, candidate.work) == candidate


def test_a_32b_teacher_beside_its_student_takes_more_than_one_h100():
    only = {"fp8": False, "placements": (TeacherPlacement.colocated,)}
    found = fewest_gpus(problem(), WORK, limit=64, **only)
    assert found and found[0].gpus in (2, 4)
    small = problem(Cluster(GPUS["b200"], 1))
    assert fewest_gpus(small, WORK, limit=64, **only)[0].gpus <= found[0].gpus
    assert fewest_gpus(problem(), WORK, limit=1, **only) == []


def test_tensor_parallelism_stays_within_a_node_and_experts_divide():
    layouts = list(cuts(QWEN3_30B_A3B, Cluster(GPUS["h100"], 2, 4), 8, trained=True))
    assert {layout.tensor for layout in layouts} == {1, 2, 4}
    assert {layout.expert for layout in layouts} == {1, 2, 4, 8}
    assert all(layout.world_size == 8 for layout in layouts)
    assert all(8 % (layout.expert * layout.pipeline) == 0 for layout in layouts)
