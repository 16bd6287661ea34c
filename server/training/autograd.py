"""Calls torch's autograd functions, which torch leaves without types."""

from typing import cast

import torch
from torch.autograd import Function


def apply_function(function: type[Function], *arguments: object) -> torch.Tensor:
    """Run a function of one output and note it for the backward pass."""
    return cast(torch.Tensor, function.apply(*arguments))  # type: ignore[no-untyped-call]  # torch leaves it untyped
