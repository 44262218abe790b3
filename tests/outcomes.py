"""Outcomes of made-up rollouts."""

from nemo_paced.records import Outcome


def right_or_wrong(is_right):
    return Outcome.right if is_right else Outcome.wrong
