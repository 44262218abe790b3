"""The FP8 certificate: how far quantisation moves this teacher, on the responses of this run.

It is a file of the run directory, written before the first step: ``training/certify.py`` measures
it, ``drift.py`` has the arithmetic. This module imports nothing heavy, as a report reads it too.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from nemo_paced.errors import ConfigError, PacedError
from nemo_paced.files import write_json

CERTIFICATE_FILE = "fp8_certificate.json"


@dataclass(frozen=True, slots=True)
class Certificate:
    """Drift of an FP8 teacher over response tokens, at the distillation temperature.

    Attributes:
        identity: what the figures depend on: with another teacher, setting or device they are
            measured anew.
        backend, recipe: those that ran, ``auto`` decided.
        versions: of the libraries that computed, by name.
        responses: ``references`` or ``rollouts``, the source of the tokens. A teacher drifts most
            where it is unsure, as on a student's mistakes: figures of references say less of a
            later stage on rollouts.
        problems, tokens: number of problems asked, and of response tokens in all.
        kl_mean, kl_median, kl_p99, kl_max: KL(BF16 || FP8) of a token, nats.
        top1_agreement: share of tokens whose likeliest next token is the same.
        divergence: the kind whose gradient was compared.
        gradient_difference: |g_FP8 - g_BF16| / |g_BF16| over all tokens, g being the loss's
            gradient with respect to the student's final hidden states.
        gradient_cosine: cosine of the angle between g_FP8 and g_BF16.
    """

    identity: dict[str, Any]
    backend: str
    recipe: str
    versions: dict[str, str]
    responses: str
    problems: int
    tokens: int
    kl_mean: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    divergence: str
    gradient_difference: float
    gradient_cosine: float

    @classmethod
    def read(cls, run_dir: Path) -> Certificate | None:
        """The run's certificate; ``None`` where there is none.

        Raises:
            ConfigError: the file is damaged.
        """
        path = run_dir / CERTIFICATE_FILE
        if not path.exists():
            return None
        try:
            content = json.loads(path.read_text())
            return cls(**{field.name: content[field.name] for field in fields(cls)})
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} is no FP8 certificate ({error!r}): remove it to have it measured again"
            ) from error

    def write(self, run_dir: Path) -> None:
        """Write the certificate into the run directory, whole or not at all."""
        write_json(run_dir / CERTIFICATE_FILE, asdict(self))

    def require(self, max_kl: float) -> None:
        """Stop a run whose teacher FP8 moves too far.

        Raises:
            PacedError: the mean KL is above ``max_kl`` (nats a token), or not a number.
        """
        if self.kl_mean <= max_kl:
            return
        raise PacedError(
            f"the FP8 teacher has drifted: mean KL(BF16 || FP8) is {self.kl_mean:.4g} nats a token "
            f"over {self.tokens} response tokens, above teacher.fp8.max_kl {max_kl:g} (top-1 "
            f"agreement {self.top1_agreement:.1%}; backend {self.backend}, recipe {self.recipe}). "
            "Keep more layers in BF16 (teacher.fp8.num_layers_at_start_in_bf16, "
            "num_layers_at_end_in_bf16), choose another teacher.fp8.recipe, raise "
            f"teacher.fp8.max_kl, or set teacher.fp8.enabled=false; figures: {CERTIFICATE_FILE}"
        )
