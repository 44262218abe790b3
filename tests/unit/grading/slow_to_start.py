"""A verifier whose first use would take longer than a call may."""

import time

ready = []


def prepare_worker():
    time.sleep(1.0)
    ready.append(True)


def judge(text, answer):
    return bool(ready)
