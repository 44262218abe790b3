"""Training jobs whose rollout servers are looked into: do they hold the student's weights?

On GPUs (tests/gpu) and without (tests/slow) the same: a job trains on-policy, so that its servers
get new weights before every step. In its midst the trainer's processes are stopped (SIGSTOP) for a
moment and vLLM is asked for checksums of all parameters. They must be, bit for bit, those of a
server that loads the run's own checkpoint of that step from a Hugging Face directory.
"""

import hashlib
import os
import signal
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace

import httpx
import psutil
import torch
from safetensors.torch import load_file

from nemo_paced.compose import ASSETS, with_config
from nemo_paced.config import PacedConfig, RefitBackend, RolloutPlacement
from nemo_paced.errors import RolloutError
from nemo_paced.rollout.served import served_dtype
from nemo_paced.serving.api_key import API_KEY_VARIABLE
from nemo_paced.serving.client import RolloutClient
from nemo_paced.serving.replicas import Replicas
from tests.jobs import command, metrics, run, train_arguments

MAX_STEPS = 16
ANSWER_S = 20.0
NAME = "job"
# Of no bytes. The CPU build packs the linear layers' weights anew and leaves none to add up: there
# only embeddings and norms are compared, and rollout/logprob_gap has to answer for the others.
EMPTY = hashlib.sha256(b"").hexdigest()
# nats, mean over a step's tokens. fp32: other kernels, same numbers. bf16: 8 bits of mantissa, and
# trainer and server round after different operations.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.03}
ON_GPU = ("trainer.accelerator=gpu", "trainer.precision=bf16", "rollout.max_logprob_gap=0.1")
ONE, TENSOR = (
    (f"trainer.devices={n}", f"model.tensor_model_parallel_size={n}") for n in (1, 2)
)  # fmt: skip
COLOCATED = ("rollout.placement=colocated", "rollout.gpu_memory_utilization=0.3")


@dataclass(frozen=True)
class Job:
    """What a job is started with beside ``train_arguments``.

    Attributes:
        gpus: that it needs.
        sleeps: its servers work on the trainer's GPUs.
    """

    gpus: int
    overrides: tuple[str, ...]
    sleeps: bool = False


# the trainer has the first GPUs, separate servers the next ones
GPU_JOBS = {
    "nccl": Job(2, (*ON_GPU, *ONE, "rollout.refit=nccl")),
    "nccl, two servers": Job(3, (*ON_GPU, *ONE, "rollout.refit=nccl", "rollout.num_replicas=2")),
    "nccl, tp2 to tp1": Job(3, (*ON_GPU, *TENSOR, "rollout.refit=nccl")),
    "nccl_m2n": Job(2, (*ON_GPU, *ONE, "rollout.refit=nccl_m2n")),
    "nccl_m2n, tp2 to tp1": Job(3, (*ON_GPU, *TENSOR, "rollout.refit=nccl_m2n")),
    "ipc": Job(1, (*ON_GPU, *ONE, *COLOCATED, "rollout.refit=ipc"), sleeps=True),
    "ipc, tp2": Job(
        2,
        (*ON_GPU, *TENSOR, *COLOCATED, "rollout.refit=ipc", "rollout.tensor_parallel_size=2"),
        sleeps=True,
    ),
    "file": Job(1, (*ON_GPU, *ONE, *COLOCATED, "rollout.refit=file"), sleeps=True),
    "gloo": Job(2, (*ON_GPU, *ONE, "rollout.refit=gloo")),
}
CPU_JOBS = {
    "gloo, tp2, two servers": Job(0, (*TENSOR, "rollout.refit=gloo", "rollout.num_replicas=2")),
    "file, bf16": Job(
        0, (*ONE, "rollout.refit=file", "trainer.precision=bf16", "rollout.max_logprob_gap=0.1")
    ),
}


def arguments(folder, job):
    """Of the command line; on-policy from the first step, a checkpoint after every one."""
    return train_arguments(
        folder,
        NAME,
        "schedule=reverse_kl",
        f"trainer.max_steps={MAX_STEPS}",
        "model.optim.lr=3e-4",  # weights of another step give clearly other log-probabilities
        "exp_manager.checkpoint_callback_params.every_n_train_steps=1",
        "exp_manager.checkpoint_callback_params.save_top_k=-1",
        *job.overrides,
    )


def composed(folder, job) -> PacedConfig:
    """The configuration that a job runs with."""
    found: list[PacedConfig] = []
    with_config(list(arguments(folder, job)[1:]), found.append)
    return found[0]


@dataclass(frozen=True)
class Look:
    """What the servers of a stopped trainer were found to hold.

    Attributes:
        freed: bytes of the first GPU that a sleeping server leaves to the trainer.
    """

    version: int
    checksums: list[dict[str, str]]
    freed: int


def check_job(folder, job):
    """Run a job to its end and look into its servers on the way."""
    config = composed(folder, job)
    process = command(*arguments(folder, job))
    try:
        look = _look(process, folder, job)
        out, _ = process.communicate(timeout=600)
    except BaseException:
        process.terminate()
        raise
    assert process.returncode == 0, out[-4000:]
    _check_lines(metrics(folder, NAME), TOLERANCE[config.trainer.compute_precision.value])
    assert len(look.checksums) == config.rollout.num_replicas
    checkpoint = folder / NAME / "checkpoints" / f"step_{look.version:08d}"
    run("export-hf", checkpoint, folder / "hf")
    expected = checksums_of(folder / "hf", config, folder)
    for found in look.checksums:
        assert found == expected, f"a server does not hold the weights of step {look.version}"
    if job.gpus:
        assert EMPTY not in expected.values()
    assert _trained(folder / "hf"), "weights that never change would tell nothing"
    return look


def _trained(model):
    """Whether each matrix is another one than before training."""
    before, after = (load_file(path / "model.safetensors") for path in (ASSETS / "student", model))
    return all(
        not after[name].equal(tensor.to(after[name].dtype))
        for name, tensor in before.items()
        if tensor.ndim == 2
    )


def checksums_of(model, config, folder):
    """vLLM's, of a server that loads a Hugging Face directory."""
    rollout = replace(
        config.rollout,
        num_replicas=1,
        placement=RolloutPlacement.separate,
        refit=RefitBackend.file,
        port=0,
    )
    replicas = Replicas(
        model, rollout, max_model_len=32, dtype=served_dtype(config), log_path=folder / "loaded.log"
    )
    with replicas:
        replicas.start()
        return _checksums(RolloutClient(replicas.endpoints, replicas.api_key))[0]


def asleep(client):
    """Whether every server has given its weights' memory up, by vLLM's own gauge.

    ``/is_sleeping`` says so of a server that merely waits for an update too.
    """
    states = []
    for endpoint in client.endpoints:
        answer = httpx.get(f"{endpoint}/metrics", headers=client._headers, trust_env=False)
        gauge = [
            line.rsplit(" ", 1)[1]
            for line in answer.raise_for_status().text.splitlines()
            if line.startswith("vllm:engine_sleep_state") and 'sleep_state="weights_offl' in line
        ]
        assert gauge, f"{endpoint} does not tell whether it sleeps"
        states.append(all(float(value) == 1 for value in gauge))
    return all(states)


def _check_lines(lines, tolerance):
    assert [line["step"] for line in lines] == list(range(1, MAX_STEPS + 1))
    for line in lines:
        assert line["rollout/staleness"] == 0
        if line["tokens"]:
            assert line["rollout/logprob_gap"] < tolerance, line


def _look(process, folder, job):
    """At servers that have been sent weights twice at least, as soon as they can be asked."""
    path = folder / NAME / "metrics.jsonl"
    while not path.exists() or len(path.read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0][-4000:]
        time.sleep(0.05)
    client = _servers(process)
    ranks = [rank.pid for rank, _ in _running(process, "nemo_paced.commands.worker")]
    assert len(ranks) == composed(folder, job).trainer.devices
    while process.poll() is None:
        # a server that waits for the stopped ranks in its midst answers when they go on
        with _stopped(ranks), suppress(RolloutError):
            if (look := _look_once(client, job)) is not None:
                return look
        time.sleep(0.25)  # for most of the time it trains: looked at all the time it may get stuck
    raise AssertionError(f"it ended before it was looked at: {process.communicate()[0][-4000:]}")


def kill_a_server(process, *, in_an_update):
    """Kill one of a job's servers, in the midst of an update of its weights or between two."""
    client = _servers(process)
    ranks = [rank.pid for rank, _ in _running(process, "nemo_paced.commands.worker")]
    server, _ = _running(process, "vllm.entrypoints.openai.api_server")[-1]
    group = os.getpgid(server.pid)
    while True:
        assert process.poll() is None, process.communicate()[0][-4000:]
        with nullcontext() if in_an_update else _stopped(ranks), suppress(RolloutError):
            paused = any(answer["is_paused"] for answer in client.call("GET", "/is_paused"))
            if paused is in_an_update:
                os.killpg(group, signal.SIGKILL)
                return
        time.sleep(0 if in_an_update else 0.05)


def _look_once(client, job):
    """Of servers whose trainer is stopped; ``None`` where an update is under way, or, of one that
    is to sleep meanwhile, while it is awake."""
    freed = 0
    if job.sleeps:
        if not asleep(client):
            return None
        free = torch.cuda.mem_get_info(0)[0]
        client.control.wake()  # and so it stays: the trainer wakes it again
        freed = free - torch.cuda.mem_get_info(0)[0]
    if any(answer["is_paused"] for answer in client.call("GET", "/is_paused")):
        return None
    versions = set(client.control.weight_versions())
    assert len(versions) == 1, f"servers of one trainer have the weights of steps {versions}"
    return Look(int(versions.pop()), _checksums(client), freed)


def _checksums(client):
    return client.control.checksums()


def _servers(process):
    """A client of a job's servers; the key is in their environment, for this user alone."""
    found = {}
    for server, line in _running(process, "vllm.entrypoints.openai.api_server"):
        host, port = (line[line.index(name) + 1] for name in ("--host", "--port"))
        found[f"http://{host}:{port}"] = server.environ().get(API_KEY_VARIABLE)
    assert found, "no server runs"
    key = next(iter(found.values()))
    return RolloutClient(sorted(found), key, request_timeout_s=ANSWER_S)


def _running(process, module):
    """Processes below this one that run a module, with their command lines; no forks of them."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):  # a zombie too
            line = child.cmdline()
            if module in line and line != child.parent().cmdline():
                found.append((child, line))
    return found


@contextmanager
def _stopped(processes):
    for pid in processes:
        os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
