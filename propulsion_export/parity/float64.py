"""Compute in float64 throughout, also where a model casts to float32 inside.

Norms, rotary embeddings and softmax of most models are written to run in float32 whatever the
model's dtype: `x.to(torch.float32)`, `x.float()`, `softmax(x, dtype=torch.float32)`, tables made
with `torch.arange(..., dtype=torch.float32)`. Inside `float64_throughout` these give float64, and
so do tensors made of float32 arrays of numpy, and functions compiled with TorchScript, which run as
the Python that they were compiled from.

What a model stores is data, not computation: parameters and buffers, such as `inv_freq` of rotary
embeddings, keep the values they have at the model's own precision, as they do in an exported graph.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
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
# They read bits anew, so that another width means other numbers, or give what is stored.
_AS_STORED = {
    torch.Tensor.view,
    torch.frombuffer,
    torch.Tensor.data.__get__,  # type: ignore[attr-defined]
}
# Classes of tensors, as old code names dtypes: `x.type(torch.FloatTensor)`.
_NARROW_CLASSES = ("FloatTensor", "HalfTensor", "BFloat16Tensor")


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
        if func in _AS_STORED:
            return func(*args, **kwargs or {})
        if func in _CASTS:
            return args[0].double()
        made = func(*map(_widened, args), **{n: _widened(v) for n, v in (kwargs or {}).items()})
        return made if any(made is each for each in args) else _wide(made)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Let torch compute in float64 inside the block, with models whose weights are float64.

    Tensors that are made without a dtype are float64 too; this is one setting for all threads.
    What is compiled without its Python, such as a TorchScript module read from a file, is not
    reached.
    """
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _wide_makers(), _scripts_as_python(), _Float64():
            yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def _wide_makers() -> Iterator[None]:
    """Let what torch makes tensors with unseen by a mode make wide ones."""
    from_numpy = torch.from_numpy
    classes = dict.fromkeys(_NARROW_CLASSES, torch.DoubleTensor)
    with ExitStack() as kept:
        for name, value in classes.items():
            kept.enter_context(_replaced(torch, name, value))
        wide = _replaced(torch, "from_numpy", lambda array: _wide(from_numpy(array)))
        kept.enter_context(wide)
        yield


@contextmanager
def _scripts_as_python() -> Iterator[None]:
    """Let functions compiled with `torch.jit.script` run as the Python that torch keeps of them."""
    kind: Any = torch.jit.ScriptFunction
    compiled = kind.__call__

    def python(script: Any) -> Any:
        return getattr(script, "_torchdynamo_inline", None) or partial(compiled, script)

    with _replaced(kind, "__call__", property(python)):
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _wide(made: Any) -> Any:
    """A tensor made in a narrow dtype, such as of an array, in the wide one."""
    if isinstance(made, torch.Tensor) and made.dtype in _WIDER:
        return made.to(_WIDER[made.dtype])
    return made


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return _WIDER.get(value, value)
    return "torch.DoubleTensor" if isinstance(value, str) and value in _AS_NAMES else value
