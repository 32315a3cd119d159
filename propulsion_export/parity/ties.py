"""Ties between experts: where rounding decides which experts of a mixture compute.

A router gives a token the `top_k` experts of the largest logits. Where the last of them is ahead of
the next by less than the router's logits are rounded, PyTorch and a runtime may choose others, both
rightly, and everything behind differs by far more than rounding.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from propulsion_export.parity.comparison import FACTOR

# What every module returned first in float64 and at a precision, by path, for one row.
Outputs = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Ties:
    """The first router that has ties.

    Attributes:
        path: of its module.
        tied: how many tokens have one.
        tokens: of how many.
    """

    path: str
    tied: int
    tokens: int


def routers_of(model: nn.Module) -> dict[str, int]:
    """Paths of routers that choose by their logits alone, with how many experts a token gets."""
    return {
        path: module.top_k
        for path, module in model.named_modules()
        if isinstance(getattr(module, "top_k", None), int) and _chooses_by_logits(module)
    }


def _chooses_by_logits(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, torch.Tensor) and not hasattr(module, "e_score_correction_bias")


def first_ties(routers: Mapping[str, int], rows: Iterable[tuple[Outputs, Outputs]]) -> Ties | None:
    """The first router with ties; behind it, logits differ by more than rounding.

    Args:
        routers: see `routers_of`.
        rows: of every row, what modules return in float64 and at the precision.
    """
    found = list(rows)
    for path, chosen in routers.items():
        pairs = [(exact[path], own[path]) for exact, own in found if path in exact]
        tied = sum(_tied(exact, own, chosen) for exact, own in pairs)
        if tied:
            return Ties(path, tied, sum(len(exact) for exact, _ in pairs))
    return None


def _tied(exact: torch.Tensor, own: torch.Tensor, chosen: int) -> int:
    """How many tokens have a tie, of router logits [tokens, experts]."""
    if exact.shape != own.shape or chosen >= exact.shape[-1]:
        return 0
    best = exact.topk(chosen + 1).values
    margins = best[:, -2] - best[:, -1]
    # Either of the two may be rounded by as much as a candidate may err.
    return int((margins <= 2 * FACTOR * (own - exact).abs().max()).sum())
