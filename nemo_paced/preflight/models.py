"""Preflight checks of both models: layout, vocabulary, sequence limits, batch, GPU memory."""

from __future__ import annotations

from collections.abc import Iterator

from nemo_paced.config import PacedConfig, Precision, Recompute, RolloutPlacement
from nemo_paced.cpu import computes_bf16
from nemo_paced.errors import ConfigError
from nemo_paced.hf.architectures import Architecture, padded_vocab_size
from nemo_paced.preflight.findings import Finding, error, note, warning
from nemo_paced.preflight.inputs import Inputs
from nemo_paced.sizing.flops import Server
from nemo_paced.sizing.memory import stages_memory
from nemo_paced.sizing.search import divides
from nemo_paced.sizing.shapes import Accelerator, student_layout, teacher_plan, work_of


def layouts(inputs: Inputs) -> Iterator[Finding]:
    """Check that heads, key-value heads, MLP columns, layers and experts divide over ranks."""
    config = inputs.config
    models = [("student", inputs.student, config.model, "model")]
    if not inputs.is_self_teacher:
        prefix = "model" if config.teacher_model == config.model else "teacher"
        models.append(("teacher", inputs.teacher, config.teacher_model, prefix))
    fits = True
    for who, architecture, layout, prefix in models:
        if architecture is None:
            fits = False
            continue
        tensor, expert = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
        pipeline = layout.pipeline_model_parallel_size
        virtual = layout.virtual_pipeline_model_parallel_size
        # one dimension at a time, so that every misfit is found
        for sizes in (
            (tensor, 1, 1, 1),
            (1, pipeline, virtual, 1),
            (1, 1, 1, expert),
        ):
            try:
                architecture.check_layout(
                    *sizes[:2],
                    virtual=sizes[2],
                    expert=sizes[3],
                    sequence_parallel=layout.sequence_parallel,
                    prefix=prefix,
                )
            except ConfigError as refusal:
                fits = False
                yield error(f"layout of the {who}", str(refusal))
    if fits:  # what concerns both models together
        try:
            check_layouts(config)
        except ConfigError as refusal:
            yield error("layout", str(refusal))


def check_layouts(config: PacedConfig) -> None:
    """Refuse a layout that either model cannot be cut by, from their ``config.json`` alone.

    Raises:
        ConfigError: a size that does not divide a model, or a key for experts where there are none.
    """
    student = Architecture.read(config.student.hf_path, "student.hf_path")
    teacher = Architecture.read(config.teacher_hf_path, "teacher.hf_path")
    model, teacher_prefix = config.model, "teacher"
    if config.teacher_model == model:
        teacher_prefix = "model"
    for architecture, layout, prefix in (
        (student, model, "model"),
        (teacher, config.teacher_model, teacher_prefix),
    ):
        architecture.check_layout(
            layout.tensor_model_parallel_size,
            layout.pipeline_model_parallel_size,
            virtual=layout.virtual_pipeline_model_parallel_size,
            expert=layout.expert_model_parallel_size,
            sequence_parallel=layout.sequence_parallel,
            prefix=prefix,
        )
    for architecture, size, key in (
        (student, model.expert_model_parallel_size, "model"),
        (teacher, config.teacher.expert_model_parallel_size, "teacher"),
    ):
        if size > 1 and not architecture.experts:
            raise ConfigError(
                f"{key}.expert_model_parallel_size is {size}, and this {architecture.name} has no "
                "experts: set it to 1 (student and teacher have a key each)"
            )
    if model.moe_aux_loss_coeff and not student.experts:
        raise ConfigError(
            f"model.moe_aux_loss_coeff is {model.moe_aux_loss_coeff}, and the student "
            f"({student.name}) has no experts: set it to 0"
        )


def vocabularies(inputs: Inputs) -> Iterator[Finding]:
    """Check the rows of both embeddings, and the top-k, against the tokenizer's highest id."""
    models = [("student", inputs.student), ("teacher", inputs.teacher)]
    rows = {who: a.vocab_size for who, a in models if a is not None}
    if len(rows) < 2:
        return
    model = inputs.config.model
    padded = padded_vocab_size(max(rows.values()), model)
    text = " and ".join(f"{count} rows of the {who}" for who, count in rows.items())
    multiple = model.make_vocab_size_divisible_by * model.tensor_model_parallel_size
    yield note(
        "vocabulary",
        f"{text} are both padded to {padded}, the next multiple of {multiple} "
        "(model.make_vocab_size_divisible_by x model.tensor_model_parallel_size); rows above the "
        f"tokenizer's {inputs.tokenizer_rows} tokens carry no mass in the loss",
    )
    for who, count in rows.items():
        if inputs.tokenizer_rows is not None and inputs.tokenizer_rows > count:
            yield error(
                f"{who}.hf_path",
                f"the tokenizer has ids up to {inputs.tokenizer_rows - 1} and the embedding of the "
                f"{who} only {count} rows",
                "resize its embedding to the tokenizer, or take the tokenizer that it was "
                "trained with",
            )
    if inputs.tokenizer_rows is not None and inputs.config.teacher.top_k > inputs.tokenizer_rows:
        yield error(
            "teacher.top_k",
            f"is {inputs.config.teacher.top_k} and the vocabulary has {inputs.tokenizer_rows} "
            "tokens",
            "set it to 64, or to 0 for the exact loss",
        )


def sequence_limits(inputs: Inputs) -> Iterator[Finding]:
    """Check that prompt + response fit the positions that each model was made for.

    ``max_position_embeddings`` is the length after rope scaling; vLLM refuses to serve more.
    """
    data = inputs.config.data
    for who, architecture, key in (
        ("student", inputs.student, "max_prompt_length"),
        ("teacher", inputs.teacher, "max_teacher_prompt_length"),
    ):
        if architecture is not None:
            prompt = getattr(data, key)
            yield from _limit(architecture, who, key, prompt, data.max_response_length)
    evaluated = inputs.config.evaluation.max_response_length or 0
    if inputs.student is not None and inputs.config.trainer.val_check_interval:
        left = inputs.student.max_positions - data.max_prompt_length
        if evaluated > left:
            yield warning(
                "evaluation.max_response_length",
                f"is {evaluated} and the student's {inputs.student.max_positions} positions leave "
                f"{left} tokens beside data.max_prompt_length {data.max_prompt_length}: validation "
                "is limited to these",
                "set it to what the model can hold to say so",
            )


def _limit(
    architecture: Architecture, who: str, key: str, prompt: int, response: int
) -> Iterator[Finding]:
    if prompt + response > architecture.max_positions:
        yield error(
            f"data.{key}",
            f"{prompt} + response {response} = {prompt + response} tokens, above the "
            f"{architecture.max_positions} positions of the {who} ({architecture.name}, rope "
            "scaling included)",
            f"lower data.{key} or data.max_response_length",
        )


def batch(inputs: Inputs) -> Iterator[Finding]:
    """Check how much of a global batch is padding, and for how long pipeline stages are idle.

    Nothing has to divide: uneven shares are padded.
    """
    model, ranks = inputs.config.model, inputs.config.data_parallel_size
    if model.packed_sequence_size:  # rows are filled by length, whatever the number of problems
        return
    share = -(-model.global_batch_size // ranks)
    count = -(-share // model.micro_batch_size)
    rows = ranks * count * model.micro_batch_size
    if (empty := 1 - model.global_batch_size / rows) >= 0.25:
        yield warning(
            "model.global_batch_size",
            f"{model.global_batch_size} problems fill {rows} sequences ({ranks} data-parallel "
            f"ranks x {count} micro-batches of {model.micro_batch_size}) and leave {empty:.0%} of "
            "them empty",
            "make it a multiple of model.micro_batch_size x data-parallel ranks, or lower "
            "model.micro_batch_size",
        )
    stages = model.pipeline_model_parallel_size
    if (idle := (stages - 1) / (count + stages - 1)) >= 0.5:
        yield warning(
            "model.pipeline_model_parallel_size",
            f"{stages} stages with {count} micro-batches a rank are idle {idle:.0%} of the time",
            "lower model.micro_batch_size, raise model.global_batch_size or use fewer stages",
        )


def recompute(inputs: Inputs) -> Iterator[Finding]:
    """Check that what backward computes again frees memory."""
    accelerator = inputs.config.trainer.accelerator
    on_gpu = accelerator == "gpu" or (accelerator == "auto" and _gpu_bytes() is not None)
    if on_gpu and inputs.config.model.recompute_granularity is Recompute.selective:
        yield warning(
            "model.recompute_granularity",
            "selective computes attention twice and frees next to nothing on a GPU, whose fused "
            "kernels keep no scores",
            "set none, or full where memory is short",
        )


def cpu_precision(inputs: Inputs) -> Iterator[Finding]:
    """Check that a run on CPUs does not compute in bf16 where they convert every element."""
    trainer = inputs.config.trainer
    on_cpu = trainer.accelerator == "cpu" or (trainer.accelerator == "auto" and not _gpu_bytes())
    if on_cpu and trainer.compute_precision is Precision.bf16 and not computes_bf16():
        yield warning(
            "trainer.precision",
            "is bf16 on a CPU without AVX-512: PyTorch took 500 times as long there as in fp32",
            "set trainer.precision=fp32 (the servers follow it)",
        )


def gpu_memory(inputs: Inputs) -> Iterator[Finding]:
    """Check the memory that ``nemo-paced plan`` estimates against the GPU of this process."""
    total = _gpu_bytes() if inputs.config.trainer.accelerator != "cpu" else None
    if total is None or inputs.student is None or inputs.teacher is None:
        return
    work = work_of(
        inputs.config, mean_prompt=1, mean_response=1, accelerator=Accelerator.gpu
    )  # mean lengths do not enter the memory
    layout, teacher = student_layout(inputs.config), teacher_plan(inputs.config)
    for shape, cut in ((inputs.student, layout), (inputs.teacher, teacher.layout)):
        if not divides(shape, cut.tensor, cut.pipeline * cut.virtual):
            return
    stages = stages_memory(inputs.student, inputs.teacher, layout, teacher, work)
    rollout = inputs.config.rollout
    elsewhere = bool(rollout.endpoints) or rollout.placement is RolloutPlacement.separate
    none_here = elsewhere or not inputs.config.asks_student(resumed=False)
    served = 0.0 if none_here else rollout.gpu_memory_utilization * total
    server = Server(
        rollout.tensor_parallel_size, served, rollout.max_num_seqs, rollout.num_replicas
    )
    sharing = server.stages(layout)
    needed = max(m.peak + (stage < sharing) * served for stage, m in enumerate(stages))
    if needed > total:
        yield warning(
            "memory",
            f"the fullest GPU is estimated to need {needed / 2**30:.0f} GiB (longest sequences, "
            f"rollout server included) of {total / 2**30:.0f}",
            "see `nemo-paced plan` with the same arguments for what fits",
        )


def _gpu_bytes() -> int | None:
    import torch

    return torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None
