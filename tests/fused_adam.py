"""Adam with the state layout of Transformer Engine's and Apex's ``FusedAdam``, on any device.

Their kernels need a GPU. What a checkpoint meets is where they keep what: a count of steps in each
parameter group and none with the parameters, moments made by the first step of a parameter that has
no state. tests/unit/teacher/test_transformer_engine_contract.py holds that to its sources.
"""

import torch


class FusedAdam(torch.optim.Optimizer):
    """Decoupled weight decay, like ``FusedAdam(adam_w_mode=True)``."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if len(group["params"]) == 0:
                continue
            group["step"] = group["step"] + 1 if "step" in group else 1
            assert isinstance(group["step"], int), "the kernel takes an integer"
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if len(state) == 0:
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                assert state.keys() == {"exp_avg", "exp_avg_sq"}
                state["exp_avg"].lerp_(parameter.grad, 1 - beta1)
                state["exp_avg_sq"].mul_(beta2).addcmul_(
                    parameter.grad, parameter.grad, value=1 - beta2
                )
                mean = state["exp_avg"] / (1 - beta1 ** group["step"])
                scale = (state["exp_avg_sq"] / (1 - beta2 ** group["step"])).sqrt() + group["eps"]
                update = mean / scale + group["weight_decay"] * parameter
                parameter.sub_(group["lr"] * update)
