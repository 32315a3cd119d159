"""Compute in float64 throughout, also where a model casts to float32 inside.

Norms, rotary embeddings and softmax of most models are written to run in float32 whatever the
model's dtype: `x.to(torch.float32)`, `x.float()`, `softmax(x, dtype=torch.float32)`, tables made
with `torch.arange(..., dtype=torch.float32)`. Inside `float64_throughout` these give float64.

What a model stores is data, not computation: parameters and buffers, such as `inv_freq` of rotary
embeddings, keep the values they have at the model's own precision, as they do in an exported graph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_WIDER = {
    torch.float32: torch.float64,
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.complex64: torch.complex128,
}
_CASTS = {torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16}
_AS_NAMES = {"torch.FloatTensor", "torch.HalfTensor", "torch.BFloat16Tensor"}
# They read bits anew, so that another width means other numbers.
_REINTERPRETING = {torch.Tensor.view, torch.frombuffer}


class _Float64(TorchFunctionMode):
    """Widen every narrower floating-point dtype that a torch function is called with."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        del types
        if func in _REINTERPRETING:
            return func(*args, **kwargs or {})
        if func in _CASTS:
            return args[0].double()
        return func(*map(_widened, args), **{n: _widened(v) for n, v in (kwargs or {}).items()})


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let torch compute in float64 inside the block, with models whose weights are float64.

    Tensors that are made without a dtype are float64 too; this is one setting for all threads.
    Code that torch has compiled beforehand (TorchScript) is not reached.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    return "torch.DoubleTensor" if isinstance(value, str) and value in _AS_NAMES else value
