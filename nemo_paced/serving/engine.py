"""Interface to the inference engine: how a server is started, sampled from, paused and updated.

Behind it is vLLM (``vllm_engine.py``), and no other module of the package knows its routes, its
command line or its environment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from nemo_paced.config import RefitBackend, RolloutConfig
from nemo_paced.serving.completions import Route

SERVED_NAME = "nemo-paced"  # what our servers call their model, student or teacher
# (method, path, further arguments of the request) -> the JSON answer of each server
Call = Callable[..., list[dict[str, Any]]]


@dataclass(frozen=True, slots=True)
class Served:
    """What one server is started with.

    Attributes:
        model_dir: Hugging Face directory to serve.
        host, port: where it listens.
        max_model_len: longest prompt plus response, tokens.
        dtype: ``float32`` or ``bfloat16``.
        api_key: the key that every route requires.
        devices: ``CUDA_VISIBLE_DEVICES`` of the server; ``None`` for those of this process.
        refit: the transport by which it gets new weights.
        sleeps: whether it can give up its GPUs' memory, because the trainer uses them too.
    """

    model_dir: Path
    config: RolloutConfig
    host: str
    port: int
    max_model_len: int
    dtype: str
    api_key: str
    devices: str | None = None
    refit: RefitBackend = RefitBackend.file
    sleeps: bool = False


@dataclass(frozen=True, slots=True)
class ModelCard:
    """One model that a running server says it serves.

    Attributes:
        name: what requests call it.
        root: the directory that its weights were read from; ``None``: it does not say.
        max_model_len: longest prompt plus response, tokens; ``None``: it does not say.
    """

    name: str
    root: str | None
    max_model_len: int | None


class Control(Protocol):
    """Control routes of one or several servers; each method calls all of them at once.

    Every method raises RolloutError where a server cannot be reached or refuses.
    """

    def check_health(self) -> None:
        """Return if every server passes its health check."""

    def models(self) -> list[list[ModelCard]]:
        """The models that each server serves."""

    def weight_versions(self) -> list[str | None]:
        """The version of weights that each server was last sent.

        ``None`` or ``default``: it has those that it started with.
        """

    def num_workers(self) -> list[int]:
        """How many ranks each server has."""

    def checksums(self) -> list[dict[str, Any]]:
        """The checksum of every parameter, by its name, one mapping a server."""

    def pause(self, *, finish_requests: bool) -> None:
        """Compute nothing until :meth:`resume`; requests under way are finished first, or held."""

    def resume(self) -> None:
        """Compute again, without the cached keys and values of earlier weights."""

    def sleep(self) -> None:
        """Give up the GPUs' memory; the weights move to host memory."""

    def wake(self) -> None:
        """Take the GPUs' memory again; does nothing where a server is awake."""

    def join_group(self, init_info: dict[str, Any]) -> None:
        """Join the process group for weights; blocks until the trainer has joined too."""

    def leave_group(self) -> None: ...

    def begin_update(self) -> None: ...

    def load(self, update_info: Any) -> None:
        """Load the weights that ``update_info`` describes; blocks until they are loaded."""

    def end_update(self, version: str) -> None:
        """End an update: the weights are whole, and ``version`` names them from now on."""


class Engine(Protocol):
    """An inference engine, as the rest of the package uses it.

    Attributes:
        routes: its sampling routes, the preferred one first; a server that lacks one is asked by
            the next.
        no_such_route: status codes by which a server says that it lacks a route.
        too_many_samples: a part of the text by which a server refuses a request for more samples
            than it decodes at once.
    """

    routes: tuple[Route, ...]
    no_such_route: tuple[int, ...]
    too_many_samples: bytes

    def command(self, served: Served) -> list[str]:
        """The command line of a server."""

    def environment(self, served: Served) -> dict[str, str]:
        """The environment of a server, made from that of this process."""

    def control(self, call: Call) -> Control: ...
