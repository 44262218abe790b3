import json
import logging

import pytest

from nemo_paced.config import EvaluationConfig, PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.evaluation.limits import Limits
from nemo_paced.hf.directory import model_fingerprint


def models(tmp_path, **contexts):
    """Directories by label; a context of ``None`` is not said."""
    found = {}
    for label, context in contexts.items():
        found[label] = tmp_path / label
        found[label].mkdir()
        said = {} if context is None else {"max_position_embeddings": context}
        (found[label] / "config.json").write_text(json.dumps(said))
    return found


def limits(found, *, prompt=300, lm_eval=False, **settings):
    config = PacedConfig(evaluation=EvaluationConfig(**settings))
    return Limits.of(config, found, longest_prompt=prompt, lm_eval=lm_eval)


@pytest.mark.parametrize("context", [40_960, 30_300, None])
def test_the_default_is_the_papers_30000_tokens_without_a_word(tmp_path, caplog, context):
    found = limits(models(tmp_path, model=context))
    assert (found.response, found.response_from) == (30_000, "evaluation.max_response_length")
    assert found.context == 30_300 and not caplog.records


def test_a_shorter_context_limits_all_models_alike_and_is_told(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        found = limits(models(tmp_path, baseline=40_960, model=4096))
    assert (found.response, found.context) == (3796, 4096)
    assert found.response_from == "the context of the model, 4096"
    assert "limited to 3796 tokens: the context of the model is 4096" in caplog.text
    assert "evaluation.max_response_length asks for 30000" in caplog.text


def test_a_prompt_that_fills_the_context_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is 300 tokens and the longest prompt has 300"):
        limits(models(tmp_path, model=300))


@pytest.mark.parametrize(("context", "length"), [(40_960, 4096), (2048, 2048)])
def test_tasks_of_lm_eval_need_room_for_few_shot_prompts_alone(tmp_path, caplog, context, length):
    found = limits(models(tmp_path, model=context), prompt=0, lm_eval=True)
    assert (found.lm_eval, found.context) == (length, length) and not caplog.records


def test_the_server_has_room_for_the_longer_of_the_two(tmp_path):
    found = limits(models(tmp_path, m=40_960), lm_eval=True, max_response_length=100)
    assert found.context == 4096


def test_a_fingerprint_follows_the_weights_and_not_the_place(tmp_path):
    def directory(name, weights, template="a"):
        folder = models(tmp_path, **{name: 64})[name]
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "chat_template.jinja").write_text(template)
        return model_fingerprint(folder)

    large = bytes(range(256)) * (1 << 19)  # 128 MiB: every second MiB is read
    changed = bytearray(large)
    changed[-1 - (1 << 20)] ^= 1
    first = directory("first", large)
    assert first == directory("copy", large)
    assert first != directory("longer", large + b"x")
    assert first != directory("changed", bytes(changed))
    assert first != directory("template", large, template="b")
    assert directory("small", b"abc") != directory("other", b"abd")
