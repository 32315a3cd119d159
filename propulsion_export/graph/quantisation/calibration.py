"""Measure on texts how large the inputs of linear layers become."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Tensors
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.layer_rules import layer_kind


def measure_inputs(
    model: nn.Module, batches: Sequence[Tensors], adapters: Sequence[Adapter]
) -> dict[str, float]:
    """The largest magnitude that each linear layer reads, over the base model and all adapters.

    Args:
        model: computes in PyTorch with weights that are not quantised; is left as it is.
        batches: inputs of the model, int64 [batch, sequence].
        adapters: each is attached in turn.

    Returns:
        By the name of the layer's weight; of a tied weight, by each of its names.
    """
    largest: dict[str, float] = {}
    with _measured(model, largest), torch.no_grad():
        for adapter in (None, *adapters):
            with attached(model, adapter) if adapter is not None else nullcontext():
                for batch in batches:
                    model(**{name: torch.from_numpy(values) for name, values in batch.items()})
    return largest


@contextmanager
def _measured(model: nn.Module, largest: dict[str, float]) -> Iterator[None]:
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    with ExitStack() as stack:
        for module in model.modules():
            if layer_kind(module) in ("linear", "conv1d"):
                own = names[id(module._parameters["weight"])]
                hook = module.register_forward_pre_hook(_keep_largest(own, largest))
                stack.callback(hook.remove)
        yield


def _keep_largest(names: Sequence[str], largest: dict[str, float]) -> Callable[..., None]:
    def keep(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        del module
        found = float(arguments[0].abs().max())
        for name in names:
            largest[name] = max(largest.get(name, 0.0), found)

    return keep
