"""A client whose "model" is right with a known probability, for what no real server can promise:
that a rollout is right or wrong as the test says, and that the connection breaks at a given one."""

import random

from nemo_paced.errors import RolloutError
from nemo_paced.serving.completions import Completion


class ScriptedClient:
    """Answers a request by its problem and seed alone, as a deterministic server would.

    Args:
        pass_rates: by problem id.
        ids: token ids of a right and of a wrong response.
        break_after: requests answered before the connection breaks; ``None``: it holds.
        wrong_finish: how wrong responses end; ``length``: cut at their limit.
    """

    def __init__(self, pass_rates, right_ids, wrong_ids, break_after=None, wrong_finish="stop"):
        self.pass_rates = pass_rates
        self.right_ids, self.wrong_ids = tuple(right_ids), tuple(wrong_ids)
        self.break_after = break_after
        self.wrong_finish = wrong_finish
        self.samples_asked = 0
        self.requests = 0

    def sample(self, requests, on_result):
        for request in requests:
            if self.break_after is not None and self.requests >= self.break_after:
                raise RolloutError("the connection broke")
            self.requests += 1
            self.samples_asked += request.n
            draw = random.Random(f"{request.key}/{request.seed}")
            completions = []
            for _ in range(request.n):
                right = draw.random() < self.pass_rates[request.key]
                ids = self.right_ids if right else self.wrong_ids
                finish = "stop" if right else self.wrong_finish
                completions.append(Completion(ids, (-0.5,) * len(ids), finish))
            on_result(request, completions)
