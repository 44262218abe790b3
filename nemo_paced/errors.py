"""Errors a user can act on. Each message names what is wrong, where, and the remedy.

Everything else (a broken invariant of ours) is an ``assert`` or passes through unchanged.
"""


class PacedError(Exception):
    """Base class of the errors that a user can act on.

    The command line prints them without a traceback and exits with status 2.
    """


class ConfigError(PacedError, ValueError):
    """A setting or an input file that cannot work: found before anything expensive starts."""


class CheckpointError(PacedError):
    """A checkpoint that is missing, incomplete, or of another run, model or data set."""


class RolloutError(PacedError):
    """The rollout server did not start, died, or answered with something other than was asked."""


class WeightsLost(RolloutError):
    """No server has the student's weights any more, and only all ranks together can send them."""


class Stopped(PacedError):
    """Not an error: the run stopped on request after a checkpoint, and can go on from there."""

    EXIT_STATUS = 75  # EX_TEMPFAIL: a launcher may queue the job again


class Interrupted(KeyboardInterrupt):
    """Not an error: a signal, of whatever kind, ends the command as Ctrl-C does.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__("interrupted")
        self.number = number

    @property
    def exit_status(self) -> int:
        """Status by which a shell reports a death by this signal."""
        return 128 + self.number


class GradingError(PacedError):
    """A verifier that cannot be loaded or that broke its contract (a wrong answer is no error)."""
