"""Tables of rotary positions in graphs of onnxruntime-genai's builder, compared row by row."""

import numpy as np
import onnx_ir as ir
import pytest
import torch
from genai_models import make

from propulsion_export.graph.genai.base import base_graph
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.parity.rotary_tables import rotary_tables


def tables_in(graph):
    """The tensors with two dimensions, in initializers and constants, also of branches."""
    values = [value.const_value for value in graph.initializers.values()]
    values += [
        node.attributes["value"].as_tensor()
        for node in graph.all_nodes()
        if node.op_type == "Constant" and "value" in node.attributes
    ]
    return [tensor.numpy() for tensor in values if len(tensor.shape) == 2]


def found_in(model, arrays):
    """The names of recognised tables, and the positions that are wrong."""
    tables = list(rotary_tables(model))
    found = []
    for array in arrays:
        fitting = [each for each in tables if each.fits(array.shape) and each.recognises(array)]
        for table in fitting[:1]:
            wrong = ~table.is_right(array, np.arange(len(array)))
            found.append((table.name, len(array), np.flatnonzero(wrong).tolist()))
    return found


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("llama", {160}),
        ("llama-llama3", {160}),
        ("phi", {160}),
        ("gpt-oss", {160}),
        ("phi3-longrope", {64, 160}),  # in the two branches of an If
    ],
)
def test_tables_of_right_graphs_are_found_and_right(name, lengths):
    model = make(name)
    arrays = tables_in(base_graph(model, torch.float32, GenaiOptions()).program.graph)

    found = found_in(model, arrays)

    assert {(label.split()[0], length) for label, length, _ in found} == {
        (part, length) for part in ("cosines", "sines") for length in lengths
    }
    assert all(wrong == [] for *_, wrong in found)


def cosines_of(model, length=160):
    (table,) = [table for table in rotary_tables(model) if table.part == 0]
    positions = torch.arange(length)[None]
    return table, model.model.rotary_emb(torch.zeros(1), positions)[0][0, :, :8].numpy().copy()


def zero_from_64(values):
    values[64:] = 0


def shift_from_100(values):
    values[100:] = values[99:-1].copy()


def move_a_row_of_the_slowest_channel(values):
    values[120, -1] += 1e-2


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (zero_from_64, range(64, 160)),
        (shift_from_100, range(100, 160)),
        (move_a_row_of_the_slowest_channel, [120]),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_wrong_rows_are_named(change, wrong, dtype):
    table, values = cosines_of(make("llama"))
    change(values)
    values = values.astype(dtype)

    assert table.recognises(values)
    assert np.flatnonzero(~table.is_right(values, np.arange(160))).tolist() == list(wrong)


def test_the_sines_or_a_weight_are_not_taken_for_cosines():
    table, values = cosines_of(make("llama"))

    assert not table.recognises(np.sqrt(1 - values**2))
    assert not table.recognises(np.random.default_rng(0).normal(size=(160, 8)).astype(np.float32))


def test_far_positions_are_as_exact_as_float32_makes_them():
    """A frequency that is off by a millionth is seen; the rounding of float32 is not."""
    table, values = cosines_of(make("llama"), 131072)
    exact = 1e4 ** -(np.arange(8) / 8)
    positions = np.arange(131072)

    assert table.is_right(np.cos(positions[:, None] * exact).astype(np.float32), positions).all()
    other = np.cos(positions[:, None] * (exact * (1 + 1e-5))).astype(np.float32)
    assert not table.is_right(other, positions[100_000:]).any()


def test_the_models_own_frequencies_stay():
    model = make("phi3-longrope")
    before = model.model.rotary_emb.inv_freq.clone()

    for table in rotary_tables(model):
        table.is_right(np.zeros((160, 8), np.float32), np.arange(160))

    assert torch.equal(model.model.rotary_emb.inv_freq, before)
