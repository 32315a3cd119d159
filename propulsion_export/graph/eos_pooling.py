"""Trace a classifier so that it reads the last end-of-sequence token of each row by itself.

transformers selects all end-of-sequence tokens of the batch and divides them evenly among its rows.
In a graph, which checks nothing, rows with different numbers of them would read each other's.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def reading_own_eos(model: Any) -> Iterator[None]:
    """Let the head of `model` read each row's last end-of-sequence token inside the block."""
    seen: dict[str, torch.Tensor] = {}

    def keep_tokens(module: Any, arguments: Any, named: dict[str, Any]) -> None:
        del module, arguments
        seen["ids"] = named["input_ids"]

    def keep_states(module: Any, arguments: Any, outputs: Any) -> None:
        del module, arguments
        seen["states"] = outputs[0]

    def read_last(module: Any, arguments: tuple[Any, ...]) -> tuple[torch.Tensor]:
        del module, arguments
        return (_last(seen["states"], seen["ids"] == model.config.eos_token_id),)

    hooks = [
        model.register_forward_pre_hook(keep_tokens, with_kwargs=True),
        model.base_model.register_forward_hook(keep_states),
        model.classification_head.register_forward_pre_hook(read_last),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _last(states: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """The state [batch, channels] at the last chosen position of each row [batch, length]."""
    positions = torch.arange(chosen.shape[1], device=chosen.device) * chosen
    last = positions.amax(dim=1)[:, None, None].expand(-1, 1, states.shape[-1])
    return states.gather(1, last)[:, 0]
