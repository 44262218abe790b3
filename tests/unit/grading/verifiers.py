"""Verifiers of a user's own, good and bad, for tests."""

import os
import time


def judge(text, answer):
    if text == "hang":
        time.sleep(600)
    if text == "die":
        os._exit(3)
    if text == "forget":
        raise MemoryError
    if text == "raise":
        raise ZeroDivisionError("in my verifier")
    if text == "slow":
        time.sleep(0.5)
    return text == answer


def number(text, answer):
    return 1


NOT_CALLABLE = 3
