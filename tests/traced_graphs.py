"""What tests of traced graphs ask of a model and of its graph."""

from propulsion_export.graph.sample_inputs import input_names
from propulsion_export.parity.inputs import parity_inputs
from propulsion_export.scaling.attach import BUFFERS


def names_of(model):
    return input_names(type(model), model.config)


def batches(model):
    return parity_inputs(names_of(model), model.config, seed=5)


def scales_in(program):
    endings = tuple(f".{name}" for name in BUFFERS.values())
    return {name for name in program.graph.initializers if name.endswith(endings)}
