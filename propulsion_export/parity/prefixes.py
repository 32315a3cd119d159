"""What layers return that several states have in common, so that they run once."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.parity.stacks import Stack, find_stack, first_change, returning


@dataclass(frozen=True)
class Prefixes:
    """Outputs of layers that no state so far has changed.

    Attributes:
        stack: the model's layers; None if it is no stack, and nothing is shared.
        model: the model.
        wanted: the layers before those that an adapter changes first.
        returned: by pass and layer, what the layer returns without an adapter.
    """

    stack: Stack | None
    model: nn.Module
    wanted: frozenset[int]
    returned: dict[tuple[Any, int], Any] = field(default_factory=dict)

    @classmethod
    def of(cls, model: nn.Module, adapters: Sequence[Adapter]) -> "Prefixes":
        """For passes with these adapters."""
        stack = find_stack(model)
        firsts = [first_change(model, stack, adapter) for adapter in adapters] if stack else []
        return cls(stack, model, frozenset(first - 1 for first in firsts if first))

    def run(self, compute: Callable[[], Tensors], item: Any, adapter: Adapter) -> Tensors:
        """The outputs of a pass with an adapter, from the first layer that it changes if possible.

        Args:
            compute: runs the model.
            item: identifies the inputs.
            adapter: what is attached.
        """
        if self.stack is None or not self.wanted:
            return compute()
        first = first_change(self.model, self.stack, adapter)
        if first and (item, first - 1) in self.returned:
            with returning(self.stack, first, self.returned[item, first - 1]):
                found = compute()
            # What reads a layer that has not run is not a number.
            if not any(np.isnan(values).any() for values in found.values()):
                return found
        with self._recording(self.stack, item, first):
            return compute()

    @contextmanager
    def _recording(self, stack: Stack, item: Any, first: int) -> Iterator[None]:
        """Keep what layers before `first` return, if another state begins behind them."""
        with ExitStack() as hooks:
            for place in sorted(self.wanted):
                if place < first:
                    keep = partial(self._keep, (item, place))
                    handle = stack.layers[place].register_forward_hook(keep)
                    hooks.callback(handle.remove)
            yield

    def _keep(self, key: tuple[Any, int], module: nn.Module, arguments: Any, output: Any) -> None:
        del module, arguments
        self.returned[key] = output
