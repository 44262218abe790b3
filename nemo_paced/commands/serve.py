"""The command ``rollout-server``: the servers of a model without a trainer beside them."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path

from nemo_paced.compose import Parser, run_directory, with_config
from nemo_paced.config import PacedConfig
from nemo_paced.errors import ConfigError
from nemo_paced.files import write_json
from nemo_paced.rollout.served import served_dtype, training_length
from nemo_paced.run.progress import progress_bar
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.replicas import Replicas
from nemo_paced.training.prepare import server_notes

logger = logging.getLogger(__name__)

ENDPOINTS_FILE, KEY_FILE = "endpoints.json", "api_key"
WATCH_S = 1.0  # between two looks for servers that died


def main(arguments: list[str]) -> None:
    parser = Parser("rollout-server")
    parser.add_argument("--model", choices=("student", "teacher"), default="student")
    known, rest = parser.parse_known_args(arguments)
    with_config(rest, lambda config: serve(config, known.model))


def serve(config: PacedConfig, role: str) -> None:
    """Start a model's servers, print their endpoints, and keep them running until a signal.

    The signal is SIGTERM or SIGINT.

    Args:
        role: ``student`` or ``teacher``.

    Raises:
        ConfigError: no such model, or ``rollout.endpoints`` is set.
        RolloutError: a server did not start, or died more than ``rollout.max_restarts`` times.
    """
    folder = run_directory(config) / "servers" / role
    replicas = _replicas(config, role, folder)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with replicas:
            with progress_bar() as bar:
                replicas.start(server_notes(bar))
            _write_files(folder, replicas)
            print("\n".join(replicas.endpoints), flush=True)
            logger.info("endpoints: %s; key: %s", folder / ENDPOINTS_FILE, folder / KEY_FILE)
            _watch(replicas)
    except KeyboardInterrupt:
        logger.info("rollout-server: stopped")
    finally:
        (folder / ENDPOINTS_FILE).unlink(missing_ok=True)  # nobody answers there any more


def _replicas(config: PacedConfig, role: str, folder: Path) -> Replicas:
    key = "student.hf_path" if role == "student" else "teacher.hf_path"
    model = config.student.hf_path if role == "student" else config.teacher_hf_path
    if not Path(model or "-").is_dir():
        raise ConfigError(f"{key} is {model!r}: no such directory; give a Hugging Face directory")
    if config.rollout.endpoints:
        raise ConfigError("rollout.endpoints is set: rollout-server starts servers, remove it")
    data = config.data
    limit = data.max_prompt_length if role == "student" else data.max_teacher_prompt_length
    return Replicas(
        Path(model),
        config.rollout,
        max_model_len=training_length(config, Path(model), limit),
        dtype=served_dtype(config),
        log_path=folder / "server.log",
        api_key=os.environ.get(API_KEY_VARIABLE),  # servers on several nodes share one
    )


def _write_files(folder: Path, replicas: Replicas) -> None:
    """Write the endpoints for whoever reads them, and the key for this user alone."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / KEY_FILE).unlink(missing_ok=True)
    descriptor = os.open(folder / KEY_FILE, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(replicas.api_key + "\n")
    # that the file is there means that all are healthy
    write_json(folder / ENDPOINTS_FILE, {"endpoints": replicas.endpoints})


def _watch(replicas: Replicas) -> None:
    """Restart servers that die; a trainer sends its weights again when it sees the old ones."""
    while True:
        for endpoint in replicas.ended():
            replicas.restart(endpoint)
            logger.info("%s is healthy again", endpoint)
        time.sleep(WATCH_S)
