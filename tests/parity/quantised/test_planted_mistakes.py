"""Every mistake that a quantised export can make has to cost the verdict."""

import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from safetensors.numpy import save_file
from worlds import plant_adapter, query_and_value_swapped

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.pipeline.parity import check_parity
from quantised import edit_graph, quantise_artifact

VALUE = "bert.encoder.layer.1.attention.self.value"
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="session")
def quantised_world(shared, switchable):
    """`quantised_world(bits)`: the switchable export of both adapters, quantised, level 4."""

    def make(bits=4):
        def fill(directory):
            quantise_artifact(switchable, directory / "quantised", bits=bits)

        return shared(f"world-int{bits}", fill) / "quantised"

    return make


@pytest.fixture
def planted(quantised_world, tmp_path):
    """`planted(mistaken, bits)`: a copy whose adapter `three` is secretly another one."""

    def copy(mistaken, bits=4):
        return plant_adapter(quantised_world(bits), tmp_path / "planted", mistaken)

    return copy


def failed(report):
    return {(check.case, check.adapter) for check in report.checks if not check.passed}


def change_scale(adapter, path, change):
    scale = adapter.scales[path]
    return replace(
        adapter, scales={**adapter.scales, path: Scale(change(scale.values), scale.side)}
    )


def other_adapter(right, world):
    return replace(right, scales=Adapter.read(world.five).scales)


def dropped(right, world):
    ones = {p: Scale(np.ones_like(s.values), s.side) for p, s in right.scales.items()}
    return replace(right, scales=ones)


def one_layer_at_one(right, world):
    return change_scale(right, QUERY, np.ones_like)


def one_channel_with_the_wrong_sign(right, world):
    return change_scale(right, VALUE, lambda values: values * np.where(np.arange(32) == 5, -1, 1))


def one_channel_off_by_a_percent(right, world):
    return change_scale(right, VALUE, lambda values: values * np.where(np.arange(32) == 5, 1.01, 1))


MISTAKES = [
    other_adapter,
    dropped,
    one_layer_at_one,
    one_channel_with_the_wrong_sign,
    one_channel_off_by_a_percent,
    query_and_value_swapped,
]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_an_adapter_with_a_mistake_fails(mistake, bits, world, planted):
    report = check_parity(planted(mistake(Adapter.read(world.three), world), bits))

    assert ("parity", "three") in failed(report)
    assert {adapter for _, adapter in failed(report)} == {"three"}
    assert report.verdict == "failed"


@pytest.mark.parametrize("bits", [4, 8])
def test_the_same_export_without_a_mistake_passes(bits, world, planted):
    report = check_parity(planted(Adapter.read(world.three), bits))

    assert report.passed
    assert {check.case for check in report.checks} >= {"weights", "shipped parity"}


def test_a_small_mistake_hides_behind_rounded_activations(world, planted):
    """Why the cases run with exact activations: the graph as shipped lets it pass."""
    report = check_parity(planted(one_channel_off_by_a_percent(Adapter.read(world.three), world)))

    shipped = [check for check in report.checks if check.case.startswith("shipped")]
    assert len(shipped) == 5
    assert all(check.passed for check in shipped)
    assert report.verdict == "failed"


def test_a_dropped_adapter_shows_in_the_graph_as_shipped(world, planted):
    report = check_parity(planted(dropped(Adapter.read(world.three), world)))

    assert {("shipped parity", "three"), ("shipped effect", "three")} <= failed(report)


def block_scale_off_by_a_percent(first, second):
    first.scales[3, 0] *= 1.01


def block_scale_with_the_wrong_sign(first, second):
    first.scales[3, 0] *= -1


def one_integer_changed(first, second):
    first.packed[4, 0, 7] ^= 1


def two_layers_exchanged(first, second):
    for name in ("packed", "scales"):
        one, other = getattr(first, name), getattr(second, name)
        one[:], other[:] = other.copy(), one.copy()


class Weight:
    """The quantised weight of a node; `write` puts it back."""

    def __init__(self, model, node):
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self.tensors = [tensors[name] for name in node.input[1:3]]
        self.packed, self.scales = (
            onnx.numpy_helper.to_array(tensor).copy() for tensor in self.tensors
        )
        self.scales = self.scales.reshape(len(self.packed), -1)

    def write(self):
        for tensor, values in zip(self.tensors, (self.packed, self.scales), strict=True):
            shaped = values.reshape(tuple(tensor.dims))
            tensor.CopyFrom(onnx.numpy_helper.from_array(shaped, tensor.name))


@pytest.mark.parametrize(
    ("mistake", "cases"),
    [
        (block_scale_off_by_a_percent, {"weights", "parity"}),
        (block_scale_with_the_wrong_sign, {"weights", "parity"}),
        (one_integer_changed, {"weights", "parity"}),
        (two_layers_exchanged, {"parity"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_wrong_weight_fails(mistake, cases, quantised_world, tmp_path):
    directory = shutil.copytree(quantised_world(), tmp_path / "wrong")
    with edit_graph(directory) as model:
        nodes = [node for node in model.graph.node if node.op_type == "MatMulNBits"]
        same = [Weight(model, node) for node in nodes]
        same = [one for one in same if one.packed.shape == same[0].packed.shape][:2]
        mistake(*same)
        for weight in same:
            weight.write()

    report = check_parity(directory)

    assert cases <= {case for case, adapter in failed(report) if adapter in ("base", "three")}


def test_a_weight_of_another_scheme_is_not_the_base_models(quantised_world, tmp_path):
    """Its integers are those of an asymmetric quantiser."""
    directory = shutil.copytree(quantised_world(), tmp_path / "shifted")
    with edit_graph(directory) as model:
        node = next(node for node in model.graph.node if node.op_type == "MatMulNBits")
        weight = Weight(model, node)
        weight.packed ^= 0x11
        weight.write()

    (check,) = [check for check in check_parity(directory).checks if check.case == "weights"]

    assert not check.passed
    assert "integers of no layer of the base model" in check.detail


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dropped", [False, True])
def test_a_generative_model_is_judged_step_by_step(kind, dropped, exported, tmp_path):
    directory = quantise_artifact(exported(kind, "switchable"), tmp_path / "quantised")
    if dropped:
        artifact = Artifact.read(directory)
        save_file(artifact.feeds("base"), directory / "adapters" / "one.safetensors")
        Artifact.write(directory, artifact.manifest)

    report = check_parity(directory)

    assert {case for case, adapter in failed(report) if adapter == "one"} >= (
        {"parity", "effect", "recomputing", "greedy"} if dropped else set()
    )
    assert report.passed != dropped


@pytest.mark.parametrize("level", [0, 1])
def test_a_graph_that_rounds_no_activations_is_judged_like_one_that_does(
    level, switchable, tmp_path
):
    directory = quantise_artifact(switchable, tmp_path / "quantised", level=level)

    report = check_parity(directory)

    assert report.passed
    assert {"parity", "shipped parity"} <= {check.case for check in report.checks}


def test_a_bank_is_judged_with_mixed_batches(banked, tmp_path):
    directory = quantise_artifact(banked, tmp_path / "quantised")

    report = check_parity(directory)

    assert report.passed
    assert "mixed" in {check.case for check in report.checks}


def test_dequantised_weights_are_judged_too(exported, tmp_path):
    directory = quantise_artifact(exported("llama", "switchable"), tmp_path / "qdq", form="qdq")

    report = check_parity(directory)

    assert report.passed
