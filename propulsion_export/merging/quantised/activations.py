"""Quantisers of activations whose scales were fixed by calibration."""

from collections.abc import Collection, Mapping

from propulsion_export.base_model.tensor_files import StoredTensor
from propulsion_export.errors import BaseModelError

# Last parts of the names under which compressed-tensors, transformers' fp8 and torchao store them.
_STATIC = (
    "_weight_act_quant_scale",
    "activation_scale",
    "input_scale",
    "input_global_scale",
    "output_scale",
    "q_scale",
    "k_scale",
    "v_scale",
)
_SEES_INPUT = ("_weight_act_quant_scale", "activation_scale", "input_scale", "input_global_scale")


def refuse_static_quantisers(tensors: Mapping[str, StoredTensor], scaled: Collection[str]) -> None:
    """Refuse fixed quantisers of activations that a scaled layer may lie in front of.

    They were calibrated for outputs that are not scaled: larger ones would be cut off. Which layers
    lie behind which, names do not say, so every other module counts as behind. The quantiser of a
    scaled module's own input sees what it saw before, that of its output does not.

    Args:
        tensors: the checkpoint's tensors by name.
        scaled: paths, in the checkpoint, of modules whose outputs are multiplied.

    Raises:
        BaseModelError: there is one; names it.
    """
    found = [name for name in tensors if is_static_quantiser(name) and _may_see(name, scaled)]
    if found:
        raise BaseModelError(
            *(
                f"{name}: is fixed by calibration, the adapter changes what it sees"
                for name in found
            ),
            remedy="Quantise activations dynamically, or merge before quantising.",
        )


def is_static_quantiser(name: str) -> bool:
    """Whether a tensor of this name holds the scale of a fixed quantiser of activations."""
    return name.rpartition(".")[2] in _STATIC


def _may_see(name: str, scaled: Collection[str]) -> bool:
    """Whether outputs of one of the scaled modules may reach the quantiser."""
    path, _, kind = name.rpartition(".")
    others = {other for other in scaled if other != path or kind not in _SEES_INPUT}
    return bool(others)
