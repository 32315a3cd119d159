"""A quantised checkpoint's weights as a fingerprint looks at them: some entries, not in memory."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from propulsion_export.base_model.checkpoint import Entries
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.merging.quantised.activations import is_static_quantiser
from propulsion_export.merging.quantised.awq import Awq
from propulsion_export.merging.quantised.layout import Layout
from propulsion_export.merging.quantised.modules import Modules, is_floating


@dataclass(frozen=True)
class QuantisedWeight:
    """A quantised matrix [outputs, inputs] whose entries are dequantised one by one.

    Attributes:
        layout: how it is stored.
        path: of its module.
    """

    layout: Layout
    path: str

    @property
    def shape(self) -> tuple[int, int]:
        return self.layout.shape(self.path)

    @property
    def dtype(self) -> str:
        return "float32"

    def __getitem__(self, place: tuple[int, int]) -> float:
        return self.layout.entry(self.path, place)[0]

    def step(self, place: tuple[int, int]) -> float:
        """How far apart the values of its grid are at an entry."""
        return self.layout.entry(self.path, place)[1]


def fingerprint_of_quantised(
    layout: Layout, tensors: Mapping[str, StoredTensor], recorded: Fingerprint | None = None
) -> Fingerprint:
    """The fingerprint of a quantised checkpoint's base model; only single entries are read.

    Args:
        layout: how the checkpoint stores its quantised modules.
        tensors: the checkpoint's tensors by name.
        recorded: the fingerprint that it will be compared with, whose names say which prefix of
            the checkpoint's names is that of a head model.
    """
    weights = _weights(layout, tensors)
    known = (*recorded.entries, *recorded.vectors) if recorded else ()
    prefix = _prefix(weights, known)
    return Fingerprint.of(
        {
            name.removeprefix(prefix): weight
            for name, weight in weights.items()
            if name.startswith(prefix)
        }
    )


def _weights(layout: Layout, tensors: Mapping[str, StoredTensor]) -> dict[str, Any]:
    """The parameters by name, as if no module were quantised.

    AWQ moves factors between the norms, values and weights of a layer before it quantises them,
    so that of its layers nothing is comparable (arXiv 2306.00978, as AutoAWQ writes it).
    """
    quantised = Modules(layout, tensors).quantised
    moved = {_block(path) for path in quantised} if isinstance(layout, Awq) else set()
    weights: dict[str, Any] = {
        name: Entries(stored)
        for name, stored in tensors.items()
        if is_floating(stored)
        and not is_static_quantiser(name)
        and (name.endswith(".bias") or not _is_part(layout, name))
    }
    weights |= {f"{path}.weight": QuantisedWeight(layout, path) for path in quantised}
    return {name: weight for name, weight in weights.items() if _block(name) not in moved}


def _block(name: str) -> str:
    """The numbered layer of a model that a name lies in; empty if it lies in none."""
    parts = name.split(".")
    numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""


def _is_part(layout: Layout, name: str) -> bool:
    """Whether a tensor belongs to a quantised module; `weight.absmax` lies two names below its."""
    parts = name.split(".")
    return any(layout.has(".".join(parts[:count])) for count in range(1, len(parts)))


def _prefix(names: Collection[str], known: Collection[str]) -> str:
    """What stands before the base model's own names in a head model, such as `model.`; or empty."""
    first = Counter(f"{name.partition('.')[0]}." for name in names)
    if known:
        found = {p: sum(f"{p}{name}" in names for name in known) for p in ("", *first)}
        return max(found, key=lambda prefix: found[prefix])
    # Without names to compare with: the one part that nearly all tensors share.
    prefix, count = first.most_common(1)[0] if first else ("", 0)
    return prefix if count * 4 > len(names) * 3 else ""
