"""Make a mode of scaled graphs: folded, switchable or a bank; then optimise.

Each function works on a copy, so that one trace serves every mode. Copies share their weights.
"""

from collections.abc import Mapping

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.tensor_names import ROWS_INPUT, SCALES_INPUT
from propulsion_export.environment.stages import stage
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.gather_rows import GatherRows
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.graph.passes.removing import RemoveScales
from propulsion_export.graph.passes.scale_rows import ScalesToRows
from propulsion_export.graph.quantisation import FoldScales
from propulsion_export.graph.scaled import ScaledGraphs
from propulsion_export.scaling.attach import initializer_name


def to_folded(
    scaled: ScaledGraphs, parameters: Mapping[str, torch.Tensor] | None = None
) -> dict[str, ir.Model]:
    """The graphs without their scales, by file name.

    Args:
        scaled: the graphs; their weights are named by parameter.
        parameters: the values of all parameters, by name, with an adapter folded in; None leaves
            the weights as they are.
    """
    programs = _copies(scaled)
    for program in programs.values():
        with stage("finish folded"):
            RemoveScales(tuple(scaled.parts.get(SCALES_INPUT, ())))(program)
            if parameters is not None:
                _set_weights_(program, parameters)
        optimise(program)
    return programs


def to_quantised_folded(scaled: ScaledGraphs, adapter: Adapter) -> dict[str, ir.Model]:
    """The quantised graphs with an adapter folded into their scales, by file name.

    Args:
        scaled: the graphs, their weights quantised.
        adapter: with a tensor for every slot; heads have the size of their slots.
    """
    scales = {
        initializer_name(path, scale.side, scale.values.ndim): scale.values
        for path, scale in adapter.scales.items()
    }
    biases = {f"{path}.bias": bias for path, bias in adapter.biases.items()}
    programs = _copies(scaled)
    for program in programs.values():
        with stage("finish folded"):
            FoldScales(scales, {**biases, **adapter.modules})(program)
        optimise(program)
    return programs


def parameters_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """All parameters of a model by name; one that is tied has each of its names."""
    return dict(model.named_parameters(remove_duplicate=False))


def can_fold(base: torch.nn.Module, folded: torch.nn.Module) -> bool:
    """Whether the weights of `folded` fit graphs traced from `base`, the model without its adapter.

    Not if a shape differs, as that of a head with other labels, nor if weights differ that are tied
    in `base`: the graphs have one initializer for both.
    """
    before, after = parameters_of(base), parameters_of(folded)
    if any(name not in after or after[name].shape != w.shape for name, w in before.items()):
        return False
    kept: dict[int, torch.Tensor] = {}
    for name, weight in before.items():
        first = kept.setdefault(id(weight), after[name])
        if first is not after[name] and not torch.equal(first, after[name]):
            return False
    return set(before) == set(after)


def to_switchable(scaled: ScaledGraphs) -> dict[str, ir.Model]:
    """The graphs with everything that adapters bring as optional packed inputs, by file name."""
    programs = _copies(scaled)
    for program in programs.values():
        with stage("finish switchable"):
            for packed, parts in scaled.parts.items():
                # A tensor may be in another graph; what no graph computes with has an idle slot.
                PackInitializers(packed, parts, partial=True)(program)
        optimise(program)
        inputs = {value.name for value in program.graph.inputs}
        SetDefaults({name: v for name, v in scaled.defaults.items() if name in inputs})(program)
    return programs


def to_bank(scaled: ScaledGraphs) -> dict[str, ir.Model]:
    """The graphs with a bank whose rows each row of a batch chooses from, by file name.

    Raises:
        PreconditionError: `can_become_bank` is false.
    """
    programs = _copies(scaled)
    for name, program in programs.items():
        with stage("finish bank"):
            _rows_of(scaled)(program)
        programs[name] = gathered(program)
    return programs


def can_become_bank(scaled: ScaledGraphs) -> bool:
    """Whether every slot is a scale of values that keep the rows of a batch apart.

    Else the rows have to be attached to the model before it is traced: for trained biases and
    heads, what `scaling.attach_rows.scaled_elsewhere` knows, and tokens in one axis with the rows.
    """
    if set(scaled.parts) != {SCALES_INPUT}:
        return False
    try:
        for program in scaled.programs.values():
            _rows_of(scaled).requires(program)
    except ir.passes.PreconditionError:
        return False
    return True


def gathered(program: ir.Model) -> ir.Model:
    """A graph that reads `propulsion_rows`, in place, with a bank as its input, optimised."""
    GatherRows(ROWS_INPUT)(program)
    return optimise(program)


def _rows_of(scaled: ScaledGraphs) -> ScalesToRows:
    parts = scaled.parts.get(SCALES_INPUT, {})
    dtype = ir.DataType.from_numpy(scaled.defaults[SCALES_INPUT].dtype)
    return ScalesToRows(ROWS_INPUT, parts, dtype)


def _copies(scaled: ScaledGraphs) -> dict[str, ir.Model]:
    return {name: program.clone() for name, program in scaled.programs.items()}


def _set_weights_(program: ir.Model, parameters: Mapping[str, torch.Tensor]) -> None:
    """Replace the graph's parameters by those of another model of the same shape, in place."""
    for name, value in program.graph.initializers.items():
        if name in parameters:
            tensor = TorchTensor(parameters[name].detach().contiguous(), name=name)
            value.const_value, value.shape = tensor, ir.Shape(tensor.shape)
            value.dtype = tensor.dtype
