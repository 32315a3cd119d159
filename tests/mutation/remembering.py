"""What PyTorch computes, once for all copies of an artifact.

A verdict on a copy computes the same in PyTorch as that on the artifact: the base model, the
adapters and the inputs are not in the copy. Inside `remembered`, the oracle and the rows with the
largest outputs are looked up by all that they are computed from; what an adapter feeds is read from
each copy. Everything else is `check_parity` as it is.
"""

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.parity.extremes import extreme_probe
from propulsion_export.parity.forwards import Compute
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.parity.states import State, effect_of, feeds_of
from propulsion_export.parity.subject import Subject


class Memory:
    """What PyTorch computes, by all that it is computed from.

    Attributes:
        computed: how many oracles were.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[Any, ...], Any] = {}
        self.computed = 0

    def subjects(
        self,
        artifact: Artifact,
        base: BaseModel,
        adapters: Sequence[Adapter],
        batches: Sequence[Tensors],
        /,
        *rest: Any,
        **options: Any,
    ) -> list[Subject]:
        """The subjects, with what the artifact feeds.

        A draft of the candidate is left out: the oracle generates by itself, and the candidate is
        run where it is judged.
        """
        drawn: Mapping[str, Tensors] | None = options.get("feeds")
        options = {name: value for name, value in options.items() if name != "draft"}

        def compute() -> list[Subject]:
            self.computed += 1
            return compute_oracle(artifact, base, adapters, batches, *rest, **options)

        key = ("oracle", _key(artifact, base, adapters, batches, options))
        return [
            replace(each, feeds=feeds_of(artifact, each.name, drawn or {}))
            for each in self._once(key, compute)
        ]

    def extremes(
        self, base: BaseModel, states: Sequence[State], compute: Compute, *rest: Any
    ) -> Any:
        digest = hashlib.sha256()
        _add_model_(digest, base)
        effects = [f"{state.name} {effect_of(state.attach)}" for state in states]
        key = ("extremes", digest.hexdigest(), *effects, *rest)
        return self._once(key, lambda: extreme_probe(base, states, compute, *rest))

    def _once(self, key: tuple[Any, ...], compute: Callable[[], Any]) -> Any:
        if key not in self._kept:
            self._kept[key] = compute()
        return self._kept[key]


@contextmanager
def remembered(memory: Memory) -> Iterator[None]:
    """Let every verdict inside the block look up what it computes in PyTorch."""
    replacements = {compute_oracle: memory.subjects, extreme_probe: memory.extremes}
    with ExitStack() as stack:
        for original, replacement in replacements.items():
            for name, module in list(sys.modules.items()):
                found = vars(module).get(original.__name__)
                if name.startswith("propulsion_export.") and found is original:
                    changed = mock.patch.object(module, original.__name__, replacement)
                    stack.enter_context(changed)
        yield


def _key(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    batches: Sequence[Tensors],
    options: Mapping[str, Any],
) -> str:
    manifest = artifact.manifest
    digest = hashlib.sha256()
    for part in (
        *(manifest.kind, manifest.mode, manifest.task, manifest.dtype, manifest.quantization),
        *(f"{each.name} {effect_of(each)}" for each in adapters),
        *sorted(
            f"{n}={v}" for n, v in options.items() if n not in ("compute", "feeds", "progress")
        ),
        *sorted(options.get("feeds") or ()),
    ):
        digest.update(f"{part}\n".encode())
    if not manifest.base.own_head and manifest.mode != "folded":
        _add_(digest, artifact.feeds("base"))
    for batch in batches:
        _add_(digest, batch)
    _add_model_(digest, base)
    return digest.hexdigest()


def _add_model_(digest: Any, base: BaseModel) -> None:
    digest.update(f"{base.source} {base.task} {base.model.config.to_json_string()}".encode())
    for name, value in base.model.named_parameters():
        digest.update(f"{name} {value.dtype}".encode())
        digest.update(value.detach().double().numpy().tobytes())


def _add_(digest: Any, tensors: Tensors) -> None:
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.shape} {values.dtype}".encode())
        digest.update(np.ascontiguousarray(values).tobytes())
