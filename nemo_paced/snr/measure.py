"""The measurement behind ``snr`` on every rank: problem after problem, block after block.

Rank 0 reads problems, pass rates and responses and says what comes next; the other ranks wait for
it on a key of the store. A bin that is done is written at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_paced.config import PacedConfig, ResponseSource, TeacherPlacement
from nemo_paced.hf.directory import load_hf_config
from nemo_paced.hf.import_weights import load_hf_weights
from nemo_paced.hf.model import PacedGPTModel, build_chunks
from nemo_paced.hf.tokenizer import tokenizer_vocab_size
from nemo_paced.parallel import groups
from nemo_paced.parallel.groups import Parallel
from nemo_paced.run import checkpoint
from nemo_paced.snr.driver import Block, SnrDriver
from nemo_paced.snr.gradients import GradientMeter
from nemo_paced.snr.plan import is_hf, step_of, what_is_measured
from nemo_paced.teacher.build import build_teacher, common_rows
from nemo_paced.training.loop import with_cache_folder
from nemo_paced.training.send_weights import Refit


def measure(config: PacedConfig, run_dir: Path, model: Path, out: Path) -> None:
    """Measure the bins that ``out`` does not hold yet; called on every rank.

    Args:
        run_dir: where references and pass rates are.
        model: the student to measure, a checkpoint or a Hugging Face directory.
        out: the JSON file; ``record.py`` says what it holds.

    Raises:
        ConfigError: no pass rates, no responses, or layers that cannot be measured.
    """
    config = _layout_for_forward(with_cache_folder(config, run_dir))
    parallel = groups.initialize(
        config.model,
        accelerator=config.trainer.accelerator,
        timeout_s=config.training.collective_timeout_s,
    )
    try:
        with ExitStack() as stack:
            driver = None
            if parallel.rank == 0:
                driver = stack.enter_context(
                    SnrDriver(config, run_dir, model, step_of(config, model), out)
                )
            if not _everywhere(parallel, driver, "snr/done", lambda d: d.is_done):
                _measure(config, parallel, model, driver)
            elif driver is not None:
                driver.write()  # the kernel that SNR is compared with may be another now
    finally:
        groups.shutdown()


def _layout_for_forward(config: PacedConfig) -> PacedConfig:
    """The configuration with stages in one chunk, and with a teacher that is kept between blocks.

    Where training would free it once all signals are cached, it is offloaded.
    """
    teacher = config.teacher
    if teacher.placement is TeacherPlacement.cached:
        teacher = replace(teacher, placement=TeacherPlacement.offloaded)
    layout = replace(config.model, virtual_pipeline_model_parallel_size=1)
    return replace(config, model=layout, teacher=teacher)


def _measure(
    config: PacedConfig, parallel: Parallel, model: Path, driver: SnrDriver | None
) -> None:
    kind, responses = what_is_measured(config)
    vocab_size = tokenizer_vocab_size(Path(config.student.hf_path))
    gpt = load_student(config, model, parallel)
    meter = GradientMeter(
        gpt,
        build_teacher(config, parallel, vocab_size),
        parallel,
        divergence=config.loss.divergence(kind),
        chunk_size=config.loss.chunk_size,
        vocab_size=vocab_size,
        last_layers=config.snr.last_layers,
    )
    if driver is not None:
        driver.prepare()
    if responses is ResponseSource.rollouts and not is_hf(model):
        tell = partial(_everywhere, parallel, driver)
        Refit([gpt], parallel, driver, tell)(step_of(config, model) or 0)
    blocks = driver.blocks() if driver is not None else iter(())
    given: list[str] = []
    while True:
        given.append(f"snr/{len(given)}")
        block = _next_block(given[-1], parallel, driver, blocks)
        if block is None:
            return
        if block.number == 0:
            meter.begin_bin(block.count)
        meter.add_block(block.items, stored=responses is ResponseSource.references)
        if block.number == block.count - 1:
            sums = meter.end_bin()
            if driver is not None:
                driver.finish_bin(block.bin, sums)
                for key in given[-block.count :]:  # end_bin is collective: all have read them
                    parallel.messages.forget(key)


def _next_block(
    key: str, parallel: Parallel, driver: SnrDriver | None, blocks: Iterator[Block]
) -> Block | None:
    def make(driver: SnrDriver) -> dict[str, Any] | None:
        block = next(blocks, None)
        return None if block is None else block.to_message()

    message = _everywhere(parallel, driver, key, make)
    return None if message is None else Block.from_message(message)


def _everywhere(
    parallel: Parallel, driver: SnrDriver | None, key: str, make: Callable[[SnrDriver], Any]
) -> Any:
    """Give every rank the value that rank 0 makes; the others wait on a key, in no collective."""
    if driver is None:
        return parallel.messages.wait(key)
    value = make(driver)
    if parallel.world_size > 1:
        parallel.messages.publish(key, value)
    return value


def load_student(config: PacedConfig, model: Path, parallel: Parallel) -> PacedGPTModel:
    """This rank's stage of the student, weights read from Hugging Face files or a checkpoint."""
    hf_dir = model if is_hf(model) else Path(config.student.hf_path)
    chunks = build_chunks(
        load_hf_config(hf_dir),
        config.model,
        parallel,
        precision=config.trainer.compute_precision,
        vocab_size_hint=common_rows(config),
    )
    if is_hf(model):
        load_hf_weights(chunks, model, parallel)
    else:
        checkpoint.load_model(model, chunks)
    return chunks[0]
