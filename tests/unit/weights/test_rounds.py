from nemo_paced.config import AdaptiveConfig, Estimator, WeightsConfig
from nemo_paced.records import Outcome, Problem, Rollout
from nemo_paced.weights.rounds import sample_in_rounds

ADAPTIVE = WeightsConfig(
    num_rollouts=8, estimator=Estimator.posterior, adaptive=AdaptiveConfig(enabled=True)
)


def test_what_has_no_verdict_settles_nothing_and_takes_no_budget_without_end():
    problems = [Problem(name, "x", "1") for name in ("late", *(f"p{i}" for i in range(9)))]
    asked = {}

    def sample(wanted):
        asked.update(wanted)
        return [
            Rollout(f"{name}/{k}", name, (1,), sample=k, outcome=outcome(name, k))
            for name, number in wanted.items()
            for k in range(number)
        ]

    def outcome(name, k):
        if name == "late":
            return Outcome.timed_out
        return Outcome.right if k % 5 == 0 else Outcome.wrong

    rollouts = sample_in_rounds(problems, sample, ADAPTIVE)
    assert len(rollouts) == sum(asked.values()) == 80
    others = [number for name, number in asked.items() if name != "late"]
    assert ADAPTIVE.adaptive.initial_rollouts < asked["late"] < max(others)
