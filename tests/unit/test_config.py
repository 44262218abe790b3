import pytest

from nemo_paced.config import (
    AdaptiveConfig,
    DataConfig,
    Estimator,
    ExpManagerSettings,
    LossConfig,
    ModelConfig,
    PacedConfig,
    PrivilegedContext,
    Reduction,
    Reestimation,
    ReferencesConfig,
    RolloutConfig,
    StageConfig,
    TeacherConfig,
    TeacherPlacement,
    TrainerConfig,
    WeightScheme,
    WeightsConfig,
    to_dict,
    two_stages,
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


POSTERIOR = {"estimator": Estimator.posterior}
FREE = {"reestimate": Reestimation.free}
ADAPTIVE = AdaptiveConfig(enabled=True)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"prior": [2.0, 1.0]}, "weights.prior is .* weights.estimator is plug_in"),
        ({"fit_prior": True}, "weights.fit_prior is True and weights.estimator is plug_in"),
        ({**POSTERIOR, "prior": [1.0]}, "two numbers above 0"),
        ({**POSTERIOR, "prior": [0.0, 1.0]}, "two numbers above 0"),
        ({**POSTERIOR, "prior": [2.0, 1.0], "fit_prior": True}, "leave one of them out"),
        ({**POSTERIOR, "scheme": WeightScheme.hard_filter}, "set weights.estimator=plug_in"),
        ({**POSTERIOR, "scheme": WeightScheme.unweighted}, "set weights.estimator=plug_in"),
        ({"adaptive": ADAPTIVE}, "stopping early would bias"),
        ({**POSTERIOR, "adaptive": ADAPTIVE, "num_rollouts": 1}, "initial_rollouts 2"),
        ({**POSTERIOR, "adaptive": ADAPTIVE, "num_rollouts": 65}, "max_rollouts 64"),
        ({"reestimate": Reestimation.every_n_steps}, "every_n_steps needs a number above 0"),
        ({"reestimate_every_n_steps": 5}, "the others take none"),
        ({"reestimate_every_n_steps": -1}, "every_n_steps is -1"),
        ({"discount": 0.5}, "weights.discount is 0.5 and weights.reestimate is never"),
        ({"exploration": 0.5}, "weights.exploration is 0.5 and weights.reestimate is never"),
        ({**FREE, "discount": 0.0}, "weights.discount is 0.0"),
        ({**FREE, "exploration": 1.5}, "weights.exploration is 1.5"),
    ],
)
def test_weights_that_cannot_be_are_named(keys, told):
    with pytest.raises(ConfigError, match=told):
        WeightsConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"target_error": 0.1}, "set weights.adaptive.enabled=true"),
        ({"enabled": True, "initial_rollouts": 0}, "weights.adaptive.initial_rollouts is 0"),
        ({"enabled": True, "rollouts_per_round": 0}, "weights.adaptive.rollouts_per_round is 0"),
        ({"enabled": True, "target_error": -1.0}, "weights.adaptive.target_error is -1.0"),
    ],
)
def test_adaptive_settings_that_cannot_be_are_named(keys, told):
    with pytest.raises(ConfigError, match=told):
        AdaptiveConfig(**keys)


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"weights": WeightsConfig(**FREE)}, "set weights.exploration above 0"),
        (
            {"weights": WeightsConfig(**FREE, **POSTERIOR), "stages": [StageConfig()]},
            "no stage has responses=rollouts",
        ),
        (
            {"weights": WeightsConfig(**FREE, **POSTERIOR, exploration=0.1)},
            "every problem of a batch is sampled anyway",
        ),
        (
            {
                "weights": WeightsConfig(**FREE, exploration=0.1),
                "loss": LossConfig(reduction=Reduction.token_mean),
            },
            "every problem of a batch is sampled anyway",
        ),
    ],
)
def test_free_reestimation_that_cannot_be_is_named(keys, told):
    with pytest.raises(ConfigError, match=told):
        PacedConfig(**{"stages": two_stages(), **keys})


def test_every_combination_of_weights_that_can_be_is_taken():
    for keys in (
        {**FREE, "exploration": 0.1},
        {**FREE, "exploration": 0.1, "scheme": WeightScheme.hard_filter},
        {**FREE, "scheme": WeightScheme.unweighted},
        {**FREE, **POSTERIOR, "adaptive": ADAPTIVE, "fit_prior": True},
        {**POSTERIOR, "prior": [0.5, 0.5]},
        {"reestimate": Reestimation.every_n_steps, "reestimate_every_n_steps": 50},
    ):
        PacedConfig(weights=WeightsConfig(**keys))


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
        ("model.lr=1", "Did you mean 'model.optim.lr'"),
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


@pytest.mark.parametrize(
    ("cpuinfo", "fast"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx avx2 fma\n", False),
        ("flags\t\t: avx2 avx512f avx512bw\n", True),
        ("Features\t: fp asimd bf16 sve\n", True),
        ("model name\t: a CPU that tells nothing of avx512bw\n", False),
    ],
)
def test_the_real_example_computes_in_what_the_cpu_is_fast_in(tmp_path, cpuinfo, fast):
    from nemo_paced.compose import with_config
    from nemo_paced.cpu import computes_bf16

    (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert computes_bf16(tmp_path / "cpuinfo") is fast
    assert not computes_bf16(tmp_path / "none")
    taken = []
    with_config(["--config-name", "smollm2_self"], taken.append)
    assert taken[0].trainer.precision == ("bf16" if computes_bf16() else "fp32")


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_settings_whose_keys_are_the_users_take_new_keys(plus):
    from nemo_paced.compose import with_config

    taken = []
    overrides = [
        f"{plus}data.chat_template_kwargs.enable_thinking=false",
        f"{plus}data.teacher_chat_template_kwargs={{enable_thinking:true,effort:low}}",
    ]
    with_config([*overrides, "teacher.hf_path=elsewhere"], taken.append)
    data = taken[0].data
    assert data.chat_template_kwargs == {"enable_thinking": False}
    assert data.teacher_chat_template_kwargs == {"enable_thinking": True, "effort": "low"}


def test_a_value_that_needs_quotes_says_so():
    from nemo_paced.compose import with_config

    with pytest.raises(ConfigError, match="needs quotes within quotes: 'KEY="):
        with_config(["data.prompt_template={problem} x"], print)
    taken = []
    with_config([r'data.prompt_template="{problem} \boxed{}"'], taken.append)
    assert taken[0].data.prompt_template == r"{problem} \boxed{}"


@pytest.mark.parametrize("plus", ["", "+", "++"])
@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rollout.max_stalenes=3", "Did you mean 'rollout.max_staleness'"),
        ("trainer.max_epochs=3", "max_epochs"),
        ("nonsense=1", "nonsense"),
        ("model.nonsense={a:1}", "nonsense"),
    ],
)
def test_no_key_is_added_to_the_schema(plus, override, told):
    from nemo_paced.compose import with_config

    for flags in ([], ["--cfg", "job"]):
        with pytest.raises(ConfigError, match=told):
            with_config([*flags, f"{plus}{override}"], print)


@pytest.mark.parametrize("plus", ["+", "++"])
def test_a_setting_and_a_group_may_be_given_as_nemo_users_do(plus):
    from nemo_paced.compose import with_config

    taken = []
    with_config([f"{plus}rollout.port=5", "+schedule=forward_kl"], taken.append)
    assert taken[0].rollout.port == 5 and [s.name for s in taken[0].stages] == ["forward_kl"]


def test_a_group_of_the_users_files_is_added_with_a_plus(tmp_path):
    from nemo_paced.compose import with_config

    (tmp_path / "mine.yaml").write_text("defaults: [default, _self_]\n")
    (tmp_path / "cluster").mkdir()
    for name, text in (("big", "rollout: {port: 5}\n"), ("odd", "nonsense: 1\n")):
        (tmp_path / "cluster" / f"{name}.yaml").write_text(f"# @package _global_\n{text}")
    recipe, taken = ["--config-path", str(tmp_path), "--config-name", "mine"], []
    with_config([*recipe, "+cluster=big"], taken.append)
    assert taken[0].rollout.port == 5
    with pytest.raises(ConfigError, match="nonsense"):
        with_config([*recipe, "+cluster=odd"], print)


def test_keys_of_a_file_that_the_schema_lacks_are_refused_by_name(tmp_path):
    from nemo_paced.compose import load_config, with_config

    (tmp_path / "mine.yaml").write_text(
        "defaults: [default, _self_]\nnonsense: {a: 1}\nrollout: {port: 5}\n"
    )
    with pytest.raises(ConfigError, match="nonsense"):
        with_config(["--config-path", str(tmp_path), "--config-name", "mine"], print)
    (tmp_path / "saved.yaml").write_text("trainer: {devices: 2}\nrolout: {port: 5}\n")
    with pytest.raises(ConfigError, match="rolout"):
        load_config(tmp_path / "saved.yaml")


@pytest.mark.parametrize(
    "flag", ["-m", "--multirun", "--multi", "hydra.mode=MULTIRUN", "+hydra.sweeper.params.a=1"]
)
def test_a_sweep_is_refused_and_leaves_nothing(flag, tmp_path, monkeypatch):
    from nemo_paced.compose import with_config

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="sweeps are not run; start a run for each value"):
        with_config([flag, "model.optim.lr=1e-4,3e-4"], print)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("block", "told"),
    [
        ("hydra: {mode: MULTIRUN}\n", "Ambiguous value for argument"),
        ("hydra: {sweeper: {params: {model.optim.lr: '1e-4,3e-4'}}}\n", "sweeps are not run"),
        ("hydra: {sweeper: {params: {model.optim.lr: 1e-4}}}\n", "sweeps are not run"),
    ],
)
def test_a_file_that_asks_for_a_sweep_is_refused_too(block, told, tmp_path, monkeypatch):
    from nemo_paced.compose import with_config

    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "mine.yaml").write_text(f"defaults: [default, _self_]\n{block}")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    swept = ["model.optim.lr=1e-4,3e-4"] if "MULTIRUN" in block else []
    with pytest.raises(ConfigError, match=told):
        recipe = ["--config-path", str(tmp_path / "conf"), "--config-name", "mine"]
        with_config([*recipe, *swept], print)
    assert not list((tmp_path / "cwd").iterdir())


def test_composition_leaves_nothing_of_hydras_in_the_process():
    from hydra.core.hydra_config import HydraConfig

    from nemo_paced.compose import with_config

    for arguments in ([], ["--cfg", "job"]):
        with_config(arguments, lambda config: None)
        assert not HydraConfig.initialized(), "NeMo's exp_manager compares its folder with ours"


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--experimental-rerun=x", "--exp"])
def test_hydras_unpickling_flag_is_refused_however_it_is_written(flag):
    from nemo_paced.compose import with_config

    with pytest.raises(ConfigError, match="unpickles"):
        with_config([flag, "x"], lambda config: None)


@pytest.mark.parametrize(("written", "value"), [("${multiply:2,3}", 6), ("${sum:2,3}", 5)])
def test_nemos_arithmetic_is_resolved(written, value):
    from nemo_paced.compose import with_config

    composed = []
    size = f"model.micro_batch_size={written}"
    with_config(["--config-name", "quickstart", size], composed.append)
    assert composed[0].model.micro_batch_size == value


def test_honoured_exp_manager_keys_are_nemos():
    from nemo.utils.exp_manager import ExpManagerConfig

    ours = set(ExpManagerSettings.__dataclass_fields__)
    assert ours <= set(ExpManagerConfig.__dataclass_fields__)
