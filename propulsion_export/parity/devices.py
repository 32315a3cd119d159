"""Where PyTorch computes the oracle."""

import torch

from propulsion_export.base_model.loading import BaseModel
from propulsion_export.environment.machine import cuda_devices, cuda_reason
from propulsion_export.errors import UnavailableError
from propulsion_export.parity.by_layer import compute_by_layer, stack_of
from propulsion_export.parity.forwards import Compute, compute_whole

# The share of a GPU's free memory that the weights may take: activations and logits need the rest.
_WEIGHTS = 0.6
_FLOAT64_BYTES = 8


def check_device(device: str) -> None:
    """Refuse a GPU that this machine, or this build of PyTorch, does not have.

    Raises:
        UnavailableError: `device` is `cuda` and there is none.
    """
    if device != "cuda" or torch.cuda.is_available():
        return
    found = cuda_reason()
    if cuda_devices():
        found = f"this PyTorch ({torch.__version__}) cannot use the GPU"
    raise UnavailableError(
        f"--device cuda: {found or 'no GPU'}", remedy="Leave it out, or give --device cpu."
    )


def choose_compute(base: BaseModel, device: str, *, low_memory: bool) -> Compute:
    """The way to compute the oracle; `auto` is a GPU if it has room for the model in float64."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() and _has_room(base) else "cpu"
    if not low_memory:
        return compute_whole(device)
    stack_of(base.model)  # refuses before anything is computed
    return compute_by_layer(device)


def _has_room(base: BaseModel) -> bool:
    free: int = torch.cuda.mem_get_info()[0]
    count: int = sum(parameter.numel() for parameter in base.model.parameters())
    return _FLOAT64_BYTES * count <= _WEIGHTS * free
