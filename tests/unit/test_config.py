import pytest

from nemo_paced.config import (
    DataConfig,
    ExpManagerSettings,
    ModelConfig,
    PacedConfig,
    PrivilegedContext,
    ReferencesConfig,
    RolloutConfig,
    StageConfig,
    TeacherConfig,
    TeacherPlacement,
    TrainerConfig,
    WeightsConfig,
    to_dict,
)
from nemo_paced.errors import ConfigError


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: TrainerConfig(devices=0), "trainer.devices is 0"),
        (lambda: TrainerConfig(accelerator="tpu"), "choose auto, gpu or cpu"),
        (lambda: TrainerConfig(precision="fp16"), "choose of bf16, bf16-mixed"),
        (lambda: WeightsConfig(low=0.9), "weights.low, weights.high are 0.9"),
        (lambda: WeightsConfig(alpha=-1), "weights.alpha is -1"),
        (lambda: StageConfig(fraction=0), "fraction is 0"),
        (lambda: ModelConfig(sequence_parallel=True), "tensor_model_parallel_size 1"),
        (lambda: TeacherConfig(top_k=-1), "teacher.top_k is -1"),
        (
            lambda: PacedConfig(teacher=TeacherConfig(placement=TeacherPlacement.cached)),
            "set teacher.placement=offloaded",
        ),
        (
            lambda: TeacherConfig(placement=TeacherPlacement.separate),
            "placement=separate needs ranks",
        ),
        (
            lambda: PacedConfig(
                teacher=TeacherConfig(placement=TeacherPlacement.separate, separate_ranks=1)
            ),
            "none is left for the student",
        ),
        (
            lambda: PacedConfig(teacher=TeacherConfig(tensor_model_parallel_size=2)),
            "does not fit teacher.tensor_model_parallel_size 2",
        ),
        (lambda: DataConfig(prompt_template="x"), "every prompt would be the same"),
        (lambda: RolloutConfig(top_p=2), "rollout.top_p is 2"),
        (lambda: ReferencesConfig(path="x"), "source=file needs a path"),
        (
            lambda: PacedConfig(
                trainer=TrainerConfig(devices=3), model=ModelConfig(tensor_model_parallel_size=2)
            ),
            "set trainer.devices=2",
        ),
        (lambda: PacedConfig(stages=[StageConfig(fraction=0.5)]), "sum to 0.5"),
        (lambda: PacedConfig(stages=[]), "stages is empty"),
        (lambda: PacedConfig(rollout=RolloutConfig(top_p=0.9)), "rollout.top_p is 0.9"),
        (lambda: PacedConfig(trainer=TrainerConfig(val_check_interval=5)), "validation_problems"),
        (
            lambda: PacedConfig(teacher=TeacherConfig(privileged_context=PrivilegedContext.none)),
            "self-distillation",
        ),
    ],
)
def test_what_cannot_work_is_named_with_key_and_remedy(make, told):
    with pytest.raises(ConfigError, match=told):
        make()


def test_composed_default_equals_the_dataclasses():
    from nemo_paced.compose import with_config

    composed = []
    with_config([], composed.append)
    assert to_dict(composed[0]) == to_dict(PacedConfig())


def test_quickstart_changes_only_what_its_file_says():
    from nemo_paced.compose import with_config

    composed = []
    with_config(["--config-name", "quickstart", "model.optim.lr=0.5"], composed.append)
    assert composed[0].model.optim.lr == 0.5
    assert composed[0].model.optim.weight_decay == PacedConfig().model.optim.weight_decay
    assert composed[0].student.hf_path.endswith("student")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("weights.alhpa=1", "Did you mean 'weights.alpha'"),
        ("exp_manager.create_preemption_callback=true", "drive Lightning callbacks"),
        ("trainer.devices=x", "trainer.devices"),
        ("weights.scheme=none", "scheme"),
        ("trainer.devices=-1", "trainer.devices is -1"),
    ],
)
def test_an_override_that_cannot_be_is_named(override, told):
    from nemo_paced.compose import with_config

    with pytest.raises(ConfigError, match=told):
        with_config([override], lambda config: None)


def test_honoured_exp_manager_keys_are_nemos():
    from nemo.utils.exp_manager import ExpManagerConfig

    ours = set(ExpManagerSettings.__dataclass_fields__)
    assert ours <= set(ExpManagerConfig.__dataclass_fields__)
