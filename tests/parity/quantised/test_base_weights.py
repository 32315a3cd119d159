"""A node's rows are found among the base model's layers, by their integers alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.graph.quantisation import QuantisedWeight, dequantise
from propulsion_export.graph.quantisation.node_weights import NodeWeight
from propulsion_export.parity.quantised.base_weights import (
    check_weights,
    every_linear_layer,
    match,
    use_quantised_weights_,
)
from propulsion_export.parity.quantised.quantiser import quantise


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(32, 16), nn.Linear(32, 8)
        self.gate_up, self.conv = nn.Linear(32, 24), Conv1D(16, 32)
        self.embedding, self.head = nn.Embedding(40, 32), nn.Linear(32, 40, bias=False)
        self.head.weight = self.embedding.weight


@pytest.fixture
def base():
    return SimpleNamespace(model=Layers())


def weight_of(base, path, positive=False):
    values = base.model.get_submodule(path).weight.detach().numpy()
    return quantise(values.T if path == "conv" else values, 4, 32, positive=positive)


def node(weight, rows=slice(None), use="linear", name="n"):
    part = QuantisedWeight(weight.integers[rows], weight.scales[rows], weight.block_size)
    return NodeWeight(name, use, 4, part)


def joined(*weights):
    parts = [np.concatenate([getattr(w, k) for w in weights]) for k in ("integers", "scales")]
    return node(QuantisedWeight(*parts, 32))


@pytest.mark.parametrize("positive", [False, True])
def test_packed_halved_transposed_and_shared_weights_are_found(positive, base):
    def of(path):
        return weight_of(base, path, positive)

    nodes = [
        joined(of("q"), of("k")),
        node(of("gate_up"), slice(0, 12)),
        node(of("gate_up"), slice(12, 24)),
        node(of("conv")),
        node(of("embedding"), use="embedding"),
    ]

    found = match(base, nodes, "float32")

    assert not found.unknown
    paths = {piece.weight.path for piece in found.pieces}
    assert paths == {"q", "k", "gate_up", "conv", "embedding"}
    assert check_weights(found, None).passed


def test_the_base_model_gets_the_dequantised_weights(base):
    before = base.model.head.weight.detach().clone()
    weight = weight_of(base, "embedding")
    nodes = [node(weight, use="embedding"), node(weight_of(base, "conv"))]

    use_quantised_weights_(base, match(base, nodes, "float32").weights)

    found = base.model.embedding.weight
    np.testing.assert_array_equal(found.numpy(), dequantise(weight))
    np.testing.assert_array_equal(
        base.model.conv.weight.numpy(), dequantise(weight_of(Layer(), "conv")).T
    )
    # The head shares the embedding's weight, and is not quantised in this graph.
    assert torch.equal(base.model.head.weight, before)


class Layer:
    """The base model as it was before."""

    def __init__(self):
        self.model = Layers()


def scales(base, change):
    weight = weight_of(base, "q")
    changed = weight.scales.copy()
    change(changed)
    return [node(weight._replace(scales=changed), name="q_proj")]


def adapter(values):
    return Adapter("one", scales={"q": Scale(values)})


SCALE = np.where(np.arange(16) % 3 == 0, -1, 1) * np.linspace(0.3, 3, 16)


def folded_by(values):
    def change(scales):
        scales[:] = (scales.astype(np.float64) * values[:, None]).astype(np.float32)

    return change


@pytest.mark.parametrize("values", [SCALE, np.abs(SCALE), np.ones(16)], ids=["all", "size", "none"])
def test_scales_times_the_adapters_hold(values, base):
    found = match(base, scales(base, folded_by(values)), "float32")

    assert check_weights(found, adapter(SCALE)).passed


def test_scales_that_were_rounded_twice_do_not_hold(base):
    def twice(scales):
        third = (scales.astype(np.float64) * SCALE[:, None] * 3).astype(np.float32)
        scales[:] = third / np.float32(3)

    assert not check_weights(match(base, scales(base, twice), "float32"), adapter(SCALE)).passed


@pytest.mark.parametrize("folded", [None, adapter(SCALE)], ids=["base", "folded"])
def test_another_adapters_scales_do_not_hold_and_are_named(folded, base):
    found = match(base, scales(base, folded_by(SCALE[::-1])), "float32")

    check = check_weights(found, folded)

    assert not check.passed
    assert check.detail.startswith("q: the scale of row 0, block 0 is ")


def test_an_integer_that_is_not_the_base_models_does_not_hold(base):
    weight = weight_of(base, "q")
    weight.integers[5, 7] += 1

    check = check_weights(match(base, [node(weight, name="q_proj")], "float32"), None)

    assert not check.passed
    assert check.detail == "q_proj: integers of no layer of the base model"


def test_a_graph_without_quantised_weights_does_not_hold(base):
    assert not check_weights(match(base, [], "float32"), None).passed


def test_an_engine_is_taken_to_have_every_linear_layer_but_what_adapters_bring(base):
    entry = QuantizationEntry(8, "qdq", 0)

    weights = every_linear_layer(base, entry, {"head.weight"}, "float32")

    assert {weight.path for weight in weights} == {"q", "k", "gate_up", "conv"}
