"""The seam of the inference engine: how a served model is started, asked, held and given weights.

What is behind it is vLLM (``vllm_engine.py``), and no other module of the package knows its routes,
its command line or its environment.
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
    """One server that is to be started.

    Attributes:
        model_dir: Hugging Face directory to serve.
        host, port: where it listens.
        max_model_len: longest prompt plus response, tokens.
        dtype: ``float32`` or ``bfloat16``.
        api_key: what every route asks for.
        devices: ``CUDA_VISIBLE_DEVICES`` of the server; ``None`` for those of this process.
        refit: how it gets new weights.
        sleeps: its GPUs are somebody else's too.
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
    """What a running server serves.

    Attributes:
        root: the directory that its weights were read from; ``None``: it does not say.
        max_model_len: longest prompt plus response, tokens; ``None``: it does not say.
    """

    name: str
    root: str | None
    max_model_len: int | None


class Control(Protocol):
    """The control routes of some servers; each is called on all of them at once.

    Every method raises RolloutError where a server cannot be reached or refuses.
    """

    def check_health(self) -> None:
        """Return where every server is well."""

    def models(self) -> list[list[ModelCard]]:
        """What each server serves."""

    def weight_versions(self) -> list[str | None]:
        """What each server was last sent; ``None`` or ``default``: what it started with."""

    def num_workers(self) -> list[int]:
        """Ranks of each server."""

    def checksums(self) -> list[dict[str, Any]]:
        """Of every parameter, by server."""

    def pause(self, *, finish_requests: bool) -> None:
        """Compute nothing until :meth:`resume`; what is under way is finished or held."""

    def resume(self) -> None:
        """Go on, without keys and values of earlier weights."""

    def sleep(self) -> None:
        """Give the GPUs' memory up, weights going to host memory."""

    def wake(self) -> None:
        """Take the memory again; nothing where a server is awake."""

    def join_group(self, init_info: dict[str, Any]) -> None:
        """Join the trainer's group for weights; blocks until the trainer has joined too."""

    def leave_group(self) -> None: ...

    def begin_update(self) -> None: ...

    def load(self, update_info: Any) -> None:
        """Load what is sent; blocks until it is loaded."""

    def end_update(self, version: str) -> None:
        """The weights are whole; ``version`` is what they are called from now on."""


class Engine(Protocol):
    """An inference engine.

    Attributes:
        routes: that sample, the preferred one first; a server that lacks it is asked by the next.
        no_such_route: status codes by which a server says that it lacks a route.
        too_many_samples: what its refusal of more samples than it decodes at once contains.
    """

    routes: tuple[Route, ...]
    no_such_route: tuple[int, ...]
    too_many_samples: bytes

    def command(self, served: Served) -> list[str]:
        """The command line of a server."""

    def environment(self, served: Served) -> dict[str, str]:
        """The environment of a server, made from that of this process."""

    def control(self, call: Call) -> Control: ...
