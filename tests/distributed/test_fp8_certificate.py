"""The FP8 certificate and training on an FP8 teacher, against transformers in float64."""

import gc
import weakref
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from nemo_paced.config import Fp8Config, ResponseSource, TeacherPlacement
from nemo_paced.errors import ConfigError, PacedError
from nemo_paced.losses.kinds import Divergence
from nemo_paced.parallel import groups
from nemo_paced.quickstart.models import write_tokenizer
from nemo_paced.teacher.fp8 import linear as fp8_linear
from nemo_paced.teacher.fp8.certificate import CERTIFICATE_FILE, Certificate
from nemo_paced.training.certify import certificate_due, certify
from nemo_paced.training.setup import build_models
from tests.dense import dense_divergence
from tests.distributed.harness import run_ranks
from tests.distributed.test_training import LAYOUTS, LR, STAGES, VOCAB, make_config, make_items
from tests.fp8_reference import fake_quantize_megatron, fake_quantize_transformers
from tests.tiny import make_hf_model

SOURCE = ResponseSource.references
LOOSE = 10.0  # nats: a limit that random models keep


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    make_hf_model("qwen3_tied", folder / "student", vocab_size=VOCAB + 3)
    make_hf_model("qwen3", folder / "teacher", seed=1, vocab_size=VOCAB + 11, hidden_size=64)
    write_tokenizer(folder / "student")
    write_tokenizer(folder / "teacher")
    return folder


def _join(folder, layout, max_kl=LOOSE, model=None, **teacher):
    fp8 = Fp8Config(enabled=True, max_kl=max_kl)
    config = make_config(folder, LAYOUTS[layout], model=model, fp8=fp8, **teacher)
    return config, groups.initialize(config.model, accelerator="cpu", timeout_s=60)


def _certificate(rank, world_size, folder, layout, kind, run_dir, model=None, teacher=None):
    config, parallel = _join(folder, layout, model=model or {}, **(teacher or {}))
    models = build_models(config, parallel, certify_fp8=True)
    certify(models, make_items(0), SOURCE, Divergence(kind), Path(run_dir))


@torch.no_grad()
def _hf_hidden(model, items, teacher):
    """Final hidden states of the response tokens, item by item."""
    for item in items:
        prompt = item.teacher_prompt_ids if teacher else item.student_prompt_ids
        ids = torch.tensor([[*prompt, *item.response_ids]])
        yield model.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]


def _dense_figures(folder, kind, tp_size):
    import transformers

    def load(name):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder / name)
        return model.double().eval()

    items = make_items(0)
    student, exact, quantized = load("student"), load("teacher"), load("teacher")
    fake_quantize_transformers(quantized, tp_size=tp_size)
    kls, same, gradients = [], [], [[], []]
    for item, student_NH, *teachers_NH in zip(
        items,
        _hf_hidden(student, items, False),
        _hf_hidden(exact, items, True),
        _hf_hidden(quantized, items, True),
        strict=True,
    ):
        logits = [t_NH @ exact.lm_head.weight[:VOCAB].detach().t() for t_NH in teachers_NH]
        kls.append(dense_divergence(logits[1], logits[0], "forward_kl"))
        same.append(logits[0].argmax(-1) == logits[1].argmax(-1))
        for logits_NV, of in zip(logits, gradients, strict=True):
            leaf_NH = student_NH.clone().requires_grad_()
            student_NV = leaf_NH @ student.lm_head.weight[:VOCAB].detach().t()
            loss = dense_divergence(student_NV, logits_NV, kind).sum() * item.token_weight
            of.append(torch.autograd.grad(loss, leaf_NH)[0])
    kl, (g, h) = torch.cat(kls), (torch.cat(of).flatten() for of in gradients)
    return {
        "tokens": len(kl),
        "kl_mean": kl.mean(),
        "kl_median": kl.median() if len(kl) % 2 else kl.quantile(0.5),
        "kl_p99": kl.quantile(0.99),
        "kl_max": kl.max(),
        "top1_agreement": torch.cat(same).double().mean(),
        "gradient_difference": (h - g).norm() / g.norm(),
        "gradient_cosine": torch.cosine_similarity(g, h, dim=0),
    }


@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl"])
@pytest.mark.parametrize("layout", ["tp1", "tp2 sp", "pp2", "dp2"])
def test_its_figures_are_those_of_the_dense_models(folder, tmp_path, layout, kind):
    tensor, _, ranks, *_ = LAYOUTS[layout]
    run_ranks(ranks, _certificate, str(folder), layout, kind, str(tmp_path))
    certificate = Certificate.read(tmp_path)
    expected = _dense_figures(folder, kind, tp_size=tensor)
    assert expected["kl_mean"] > 0.001, "random models drift: there is something to measure"
    for name, value in expected.items():
        # a value that lies between two FP8 numbers may fall to the other side
        assert getattr(certificate, name) == pytest.approx(float(value), rel=0.01), name
    assert (certificate.backend, certificate.recipe) == ("torch", "rowwise")
    assert certificate.problems == 7 and certificate.versions["torch"] == version("torch")


@pytest.mark.parametrize(
    ("model", "teacher", "tp_size"),
    [
        ({"context_parallel_size": 2}, {}, 1),
        ({}, {"tensor_model_parallel_size": 2}, 2),
        ({}, {"placement": TeacherPlacement.offloaded}, 1),
        ({}, {"pipeline_model_parallel_size": 2}, 1),
    ],
)
def test_its_figures_hold_for_layouts_and_placements(folder, tmp_path, model, teacher, tp_size):
    options = (str(folder), "dp2", "forward_kl", str(tmp_path), model, teacher)
    run_ranks(2, _certificate, *options)
    expected = _dense_figures(folder, "forward_kl", tp_size=tp_size)
    for name, value in expected.items():
        assert getattr(Certificate.read(tmp_path), name) == pytest.approx(float(value), rel=0.01)


def _start(rank, world_size, folder, run_dir, broken, max_kl):
    """What a start does: ``certified``, ``known``, or the error that stops it."""
    config, parallel = _join(folder, "tp2", max_kl=max_kl)
    quantize = fp8_linear.RowScaled.of
    if broken:  # a scale that does not fit its values

        def of(x_NI):
            return replace(quantize(x_NI), scale_N1=quantize(x_NI).scale_N1 * 1.5)

        fp8_linear.RowScaled.of = staticmethod(of)
    try:
        if not certificate_due(config, Path(run_dir), parallel):
            return "known"
        models = build_models(config, parallel, certify_fp8=True)
        certify(models, make_items(0), SOURCE, Divergence("forward_kl"), Path(run_dir))
    except PacedError as error:
        return str(error)
    return "certified"


def test_a_good_teacher_is_certified_once(folder, tmp_path):
    options = (str(folder), str(tmp_path), False, LOOSE)
    assert run_ranks(2, _start, *options) == ["certified", "certified"]
    assert run_ranks(2, _start, *options) == ["known", "known"]


def test_a_broken_quantisation_stops_the_run_on_every_rank(folder, tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir(), bad.mkdir()
    run_ranks(2, _start, str(folder), str(good), False, LOOSE)
    limit = 2 * Certificate.read(good).kl_mean
    options = (str(folder), str(bad), True, limit)
    messages = run_ranks(2, _start, *options)
    for message in messages:
        assert "the FP8 teacher has drifted: mean KL(BF16 || FP8) is" in message
        assert f"above teacher.fp8.max_kl {limit:g}" in message and "more layers in BF16" in message
    assert Certificate.read(bad).kl_mean > 3 * limit
    assert Certificate.read(bad).top1_agreement < Certificate.read(good).top1_agreement
    measured = (bad / CERTIFICATE_FILE).stat().st_mtime_ns
    assert run_ranks(2, _start, *options) == messages, "known to be bad at the next start"
    assert (bad / CERTIFICATE_FILE).stat().st_mtime_ns == measured


def _told_before(rank, world_size, folder, run_dir, changes):
    config, parallel = _join(folder, "tp1", **changes)
    return certificate_due(config, Path(run_dir), parallel)


def test_a_certificate_holds_for_its_teacher_and_settings_alone(folder, tmp_path):
    run_ranks(1, _certificate, str(folder), "tp1", "forward_kl", str(tmp_path))
    options = (str(folder), str(tmp_path))
    assert run_ranks(1, _told_before, *options, {}) == [False]
    assert run_ranks(1, _told_before, *options, {"max_kl": 2 * LOOSE}) == [False]
    assert run_ranks(1, _told_before, *options, {"teacher": "student"}) == [True]
    with pytest.raises(AssertionError, match="PacedError: the FP8 teacher has drifted"):
        run_ranks(1, _told_before, *options, {"max_kl": 1e-6})
    (tmp_path / CERTIFICATE_FILE).write_text('{"kl_mean": 0.0}')
    with pytest.raises(ConfigError, match=r"is no FP8 certificate .*remove it"):
        Certificate.read(tmp_path)


def _steps(rank, world_size, folder, layout, how, run_dir=None, top_k=0):
    """Two training steps: ``fp8``, ``certified`` first, or with a fake-quantised ``reference``."""
    config, parallel = _join(folder, layout, top_k=top_k)
    if how == "reference":
        config.teacher.fp8 = Fp8Config()
    models = build_models(config, parallel, certify_fp8=how == "certified")
    if how == "certified":
        held = models.step.teacher.held
        with held.resident() as teacher:
            gone = weakref.ref(teacher.gpt.decoder.layers[0])
        del teacher
        load, seen = held._load_quantized, []

        def watched():
            gc.collect()
            seen.append(gone())
            return load()

        held._load_quantized = watched
        certify(models, make_items(0), SOURCE, Divergence("forward_kl"), Path(run_dir))
        assert seen == [None], "both teachers were in memory"
    if how == "reference":
        with models.step.teacher.held.resident() as teacher:
            fake_quantize_megatron(teacher.gpt.decoder.layers)
    results = [models.step(make_items(step), STAGES["forward_kl"], LR) for step in range(2)]
    return [(r.loss, r.grad_norm) for r in results]


@pytest.mark.parametrize("layout", ["tp1", "tp2 sp", "pp2"])
def test_a_step_with_an_fp8_teacher_is_that_of_the_dequantised_one(folder, layout):
    ranks = LAYOUTS[layout][2]
    fp8, reference = (
        torch.tensor(run_ranks(ranks, _steps, str(folder), layout, how)[0])
        for how in ("fp8", "reference")
    )
    torch.testing.assert_close(fp8, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top_k", [0, 7])
def test_training_goes_on_as_if_nothing_had_been_measured(folder, tmp_path, top_k):
    measured, plain = (
        run_ranks(2, _steps, str(folder), "tp2", how, str(tmp_path), top_k)[0]
        for how in ("certified", "fp8")
    )
    assert measured == plain


def _cached(rank, world_size, folder, cache_dir, fp8):
    config, parallel = _join(folder, "tp1", top_k=7, cache_dir=cache_dir)
    if not fp8:
        config.teacher.fp8 = Fp8Config()
    models = build_models(config, parallel)
    return [models.step(make_items(0), STAGES["forward_kl"], LR).cached for _ in range(2)]


def test_a_cached_signal_is_of_the_teacher_in_the_same_precision(folder, tmp_path):
    for fp8 in (False, True):
        assert run_ranks(1, _cached, str(folder), str(tmp_path), fp8) == [[0, 7]]
