"""Settings ``weights``: how problem weights follow from pass rates, and these from rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_paced.settings.checks import positive, refuse_ignored, require
from nemo_paced.settings.choices import Estimator, Reestimation, WeightScheme


@dataclass
class AdaptiveConfig:
    """Adaptive sampling of pass rates: rollouts go where they lower the weights' error most.

    ``weights.num_rollouts`` is then the mean over the problems; a larger one continues the rollouts
    of a smaller one.
    """

    enabled: bool = False  # the other keys of this block need it
    initial_rollouts: int = 2  # rollouts of every problem in the first round
    # Rollouts of a round, in the mean over the problems; fewer: better spent, more rounds.
    rollouts_per_round: float = 1.0
    max_rollouts: int = 64  # most rollouts of one problem
    # Expected RMS error of the weights (whose mean is 1) at which to stop before
    # weights.num_rollouts are spent; 0: spend them.
    target_error: float = 0.0

    def __post_init__(self) -> None:
        where = "weights.adaptive"
        positive(where, self, "initial_rollouts", "rollouts_per_round", "max_rollouts")
        require(
            self.target_error >= 0,
            f"{where}.target_error is {self.target_error}: above 0, or 0 to spend the budget",
        )
        if not self.enabled:
            refuse_ignored(
                where,
                self,
                ("initial_rollouts", "rollouts_per_round", "max_rollouts", "target_error"),
                "weights.adaptive.enabled is false",
                "set weights.adaptive.enabled=true",
            )


@dataclass
class WeightsConfig:
    """How pass rates are estimated and become problem weights; the defaults are the paper's."""

    scheme: WeightScheme = WeightScheme.beta_kernel
    alpha: float = 1.0  # exponent of the pass rate p
    beta: float = 1.0  # exponent of 1 - p
    low: float = 0.2  # lowest pass rate of weight 1; hard_filter only
    high: float = 0.8  # highest pass rate of weight 1; hard_filter only
    estimator: Estimator = Estimator.plug_in
    # Beta prior (a0, b0) of the pass rates; posterior only.
    prior: list[float] = field(default_factory=lambda: [1.0, 1.0])
    fit_prior: bool = False  # fit a0, b0 to the counts by maximum likelihood; posterior only
    num_rollouts: int = 8  # K, rollouts of every problem
    adaptive: AdaptiveConfig = field(default_factory=AdaptiveConfig)
    pass_rates: str | None = None  # table of an earlier `pass-rates`, instead of sampling at step 0
    reestimate: Reestimation = Reestimation.never
    reestimate_every_n_steps: int = 0  # steps between estimates, with reestimate=every_n_steps
    # Factor of a problem's earlier counts at each new rollout, with reestimate=free; at most
    # 1 / (1 - discount) rollouts are remembered.
    discount: float = 0.9
    # Share of a batch's problems of weight 0 that are sampled and graded (not trained on), with
    # reestimate=free, so that they can come back.
    exploration: float = 0.0

    def __post_init__(self) -> None:
        # a plain string would be compared by identity and be ignored
        self.scheme = WeightScheme(self.scheme)
        self.estimator = Estimator(self.estimator)
        self.reestimate = Reestimation(self.reestimate)
        positive("weights", self, "num_rollouts")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            require(value >= 0, f"weights.{name} is {value}: exponents must be 0 or above")
        require(
            0 <= self.low < self.high <= 1,
            f"weights.low, weights.high are {self.low}, {self.high}: need 0 <= low < high <= 1",
        )
        self._check_estimator()
        self._check_adaptive()
        self._check_reestimation()

    @property
    def estimates(self) -> bool:
        """Whether a run that is given no pass rates has to estimate them before its first step.

        An unweighted one needs none; it watches them where ``reestimate`` says so.
        """
        return self.scheme is not WeightScheme.unweighted or (
            self.reestimate is not Reestimation.never
        )

    @property
    def may_be_zero(self) -> bool:
        """Whether a problem can have weight 0, so that on-policy stages do not sample it."""
        if self.scheme is WeightScheme.beta_kernel:
            return self.estimator is Estimator.plug_in and (self.alpha > 0 or self.beta > 0)
        return self.scheme is WeightScheme.hard_filter

    def _check_estimator(self) -> None:
        require(
            len(self.prior) == 2 and min(self.prior) > 0,
            f"weights.prior is {self.prior}: two numbers above 0 are needed",
        )
        if self.estimator is Estimator.plug_in:
            refuse_ignored(
                "weights",
                self,
                ("prior", "fit_prior"),
                "weights.estimator is plug_in",
                "set weights.estimator=posterior",
            )
            return
        require(
            self.scheme is WeightScheme.beta_kernel,
            f"weights.estimator is posterior and weights.scheme is {self.scheme.value}, which is "
            "no function of a posterior: it would be ignored; set weights.estimator=plug_in",
        )
        require(
            not self.fit_prior or self.prior == [1.0, 1.0],
            f"weights.prior is {self.prior} and weights.fit_prior is true, which replaces it: "
            "leave one of them out",
        )

    def _check_adaptive(self) -> None:
        adaptive = self.adaptive
        if not adaptive.enabled:
            return
        require(
            self.estimator is Estimator.posterior,
            "weights.adaptive.enabled is true and weights.estimator is plug_in, which stopping "
            "early would bias; set weights.estimator=posterior",
        )
        require(
            adaptive.initial_rollouts <= self.num_rollouts <= adaptive.max_rollouts,
            f"weights.num_rollouts is {self.num_rollouts}, the mean over the problems: it must lie "
            f"between weights.adaptive.initial_rollouts {adaptive.initial_rollouts} and "
            f"weights.adaptive.max_rollouts {adaptive.max_rollouts}",
        )

    def _check_reestimation(self) -> None:
        periodic = self.reestimate is Reestimation.every_n_steps
        require(
            periodic == (self.reestimate_every_n_steps > 0) and self.reestimate_every_n_steps >= 0,
            f"weights.reestimate is {self.reestimate.value} and weights.reestimate_every_n_steps "
            f"is {self.reestimate_every_n_steps}: every_n_steps needs a number above 0, the others "
            "take none",
        )
        require(0 < self.discount <= 1, f"weights.discount is {self.discount}: in (0, 1]")
        require(0 <= self.exploration <= 1, f"weights.exploration is {self.exploration}: in [0, 1]")
        if self.reestimate is not Reestimation.free:
            refuse_ignored(
                "weights",
                self,
                ("discount", "exploration"),
                f"weights.reestimate is {self.reestimate.value}",
                "set weights.reestimate=free",
            )
