"""AdamW (Loshchilov and Hutter 2019), also for weights in 16 bits that are trained in float32 (Micikevicius et al. 2017)."""

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.adamw import adamw

from server.domain.specs import TrainingParameters

BETAS, EPSILON = (0.9, 0.999), 1e-8
# What is added to float32's bits before their upper half is taken: half of bfloat16's last place.
ROUNDING = 0x8000
assert sys.byteorder == "little"  # a number's lower half lies first


def split_master(master: torch.Tensor, weight: torch.Tensor, rest: torch.Tensor) -> None:
    """Round a float32 master into its bfloat16 weight and keep the rest, int16: `join_master` gives the master back bit for bit.

    To nearest, halves away from zero: to even, as torch rounds, two masters would share a weight and a rest. Uses up the master.
    """
    halves = master.view(torch.int32).add_(ROUNDING).view(-1).view(torch.int16).view(*master.shape, 2)
    weight.view(torch.int16).copy_(halves[..., 1])
    rest.copy_(halves[..., 0])


def join_master(weight: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    """Give the float32 master of a bfloat16 weight and its rest."""
    halves = torch.stack((rest, weight.view(torch.int16)), -1)
    return halves.view(torch.int32)[..., 0].sub_(ROUNDING).view(torch.float32)


def read_master(optimiser: torch.optim.Optimizer, parameter: nn.Parameter) -> torch.Tensor:
    """Give a weight in float32, as it is trained: itself where it is so, else a new tensor."""
    if parameter.dtype == torch.float32:
        return parameter.detach()
    rest = optimiser.state[parameter].get("rest")
    return parameter.detach().float() if rest is None else join_master(parameter.detach(), rest)


def write_master(optimiser: torch.optim.Optimizer, parameter: nn.Parameter, master: torch.Tensor) -> None:
    """Set a weight from float32. Uses up the master."""
    if parameter.dtype == torch.float32:
        parameter.detach().copy_(master)
        return
    state = optimiser.state[parameter]
    if "rest" not in state:
        state["rest"] = torch.empty_like(parameter, dtype=torch.int16, requires_grad=False)
    split_master(master, parameter.detach(), state["rest"])


class MasterAdamW(torch.optim.Optimizer):
    """AdamW on the float32 masters of bfloat16 weights, whose gradients are float32. A weight in float32 is its own master.

    No master lies beside its weight: the state's `rest` keeps the 2 bytes that rounding takes away. One master at a time is whole.
    The first moment of such a weight is kept in bfloat16: a tenth of it is new at each step, so that its rounding of 0.2 % does not add
    up. The second one, of which a thousandth is new, would stand still in so few digits and is float32.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], *, lr: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody asks for the loss again
        """Move every weight that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: nn.Parameter, gradient: torch.Tensor, group: dict[str, Any]) -> None:
        master, state = read_master(self, parameter), self.state[parameter]
        if "step" not in state:
            state["step"] = torch.zeros((), device=master.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter, requires_grad=False), torch.zeros_like(master)
        first = state["exp_avg"].float()
        adamw(
            [master], [gradient], [first], [state["exp_avg_sq"]], [], [state["step"]], fused=True, amsgrad=False, maximize=False,
            beta1=BETAS[0], beta2=BETAS[1], lr=group["lr"], weight_decay=group["weight_decay"], eps=EPSILON,
        )  # fmt: skip
        state["exp_avg"].copy_(first)
        write_master(self, parameter, master)


def make_optimiser(parameters: Iterable[nn.Parameter], settings: TrainingParameters) -> torch.optim.Optimizer:
    """Make AdamW: torch's own, which moves all weights at once, where all are float32."""
    weights = list(parameters)
    rate, decay = settings.learning_rate, settings.weight_decay
    if any(weight.dtype != torch.float32 for weight in weights):
        return MasterAdamW(weights, lr=rate, weight_decay=decay)
    return torch.optim.AdamW(weights, lr=rate, weight_decay=decay, betas=BETAS, eps=EPSILON, fused=True)
