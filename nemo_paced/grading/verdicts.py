"""Counts of verdicts: what became of responses, and what the right ones rest on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from nemo_paced.errors import ConfigError
from nemo_paced.files import write_json
from nemo_paced.records import Outcome


class Graded(Protocol):
    """A response with its verdict: a rollout, or a verdict alone."""

    @property
    def outcome(self) -> Outcome | None: ...
    @property
    def evidence(self) -> str: ...
    @property
    def comparison(self) -> str: ...


class Ground(NamedTuple):
    """What a verdict is and rests on; see :class:`~nemo_paced.records.Rollout`."""

    outcome: str
    evidence: str
    comparison: str


class Verdicts:
    """Counts of graded responses, which pass by one after the other: they are many."""

    def __init__(self, counts: Iterable[tuple[Ground, int]] = ()) -> None:
        self.counts = Counter(dict(counts))

    def add(self, graded: Graded) -> None:
        """Count one.

        Args:
            graded: with an outcome.
        """
        assert graded.outcome is not None, "rollouts are graded when they are stored"
        ground = Ground(graded.outcome.value, str(graded.evidence), str(graded.comparison))
        self.counts[ground] += 1

    def __len__(self) -> int:
        return self.counts.total()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Verdicts) and self.counts == other.counts

    def number(self, outcome: Outcome) -> int:
        """How many came to ``outcome``."""
        return sum(count for ground, count in self.counts.items() if ground.outcome == outcome)

    def share(self, outcome: Outcome) -> float:
        """Share of all that came to ``outcome``; 0 of none."""
        return self.number(outcome) / max(1, len(self))

    def by(self, field: str, *outcomes: Outcome) -> dict[str, int]:
        """How many of these outcomes rest on each kind of ``evidence`` or ``comparison``.

        The most frequent kind first.
        """
        found: Counter[str] = Counter()
        for ground, count in self.counts.items():
            if ground.outcome in outcomes:
                found[getattr(ground, field)] += count
        return dict(found.most_common())

    def outcomes_line(self) -> str:
        """Shares of the outcomes that there are: ``43 % right, 30 % wrong, ...``."""
        return in_words({outcome.value: self.share(outcome) for outcome in Outcome})

    def grounds_line(self) -> str:
        """What the answers that were found, and the right ones, were read by and compared as."""
        answered = self.by("evidence", Outcome.right, Outcome.wrong, Outcome.timed_out)
        if not answered:
            return "no answer was found"
        said = [f"answers read by {_listed(answered)}"]
        if self.number(Outcome.right):
            said.append(f"right ones by {_listed(self.by('evidence', Outcome.right))}")
            said.append(f"compared as {_listed(self.by('comparison', Outcome.right))}")
        return "; ".join(said)

    def write(self, path: Path) -> None:
        """Write the counts as JSON, a row for each outcome, evidence and comparison."""
        write_json(path, [{**each._asdict(), "count": n} for each, n in self.counts.items()])

    @staticmethod
    def read(path: Path) -> Verdicts:
        """Read counts back.

        Raises:
            ConfigError: the file holds none.
        """
        try:
            return Verdicts(
                (Ground(row["outcome"], row["evidence"], row["comparison"]), int(row["count"]))
                for row in json.loads(path.read_text())
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no counts of verdicts: {error!r}") from error


def percent(share: float) -> str:
    """A share in percent, with a decimal where it would be 0 or 100 without being so."""
    value = 100 * share
    if not 0 < value < 100 or 0.5 <= value < 99.5:
        return f"{value:.0f} %"
    return f"{min(max(value, 0.1), 99.9):.1f} %"


def shares(counts: Mapping[str, int]) -> dict[str, float]:
    """Counts as shares of their sum."""
    total = sum(counts.values())
    return {kind: count / total for kind, count in counts.items()}


def in_words(outcomes: Mapping[str, float]) -> str:
    """Shares of outcomes as text, those that there are: ``43 % right, 30 % wrong, ...``."""
    return ", ".join(
        f"{percent(outcomes[outcome])} {text}"
        for outcome, text in _WORDS.items()
        if outcomes.get(outcome)
    )


_WORDS = {
    Outcome.right: "right",
    Outcome.wrong: "wrong",
    Outcome.unanswered: "without an answer",
    Outcome.truncated: "cut before an answer",
    Outcome.timed_out: "not graded in time",
}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{kind} {percent(share)}" for kind, share in shares(counts).items())
