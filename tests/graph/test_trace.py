"""A traced model computes what torch computes, at every size, and shows every scale by its name."""

import copy

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from torch import nn
from traced_graphs import batches, names_of, scales_in

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.errors import ToolError, UnavailableError
from propulsion_export.graph.files import write_graph
from propulsion_export.graph.optimise import optimise
from propulsion_export.graph.passes.defaults import SetDefaults
from propulsion_export.graph.passes.dimensions import NameDimensions
from propulsion_export.graph.passes.packing import PackInitializers
from propulsion_export.graph.sample_inputs import trace_inputs
from propulsion_export.graph.signature import signature
from propulsion_export.graph.trace import trace
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.pytorch import torch_runner
from propulsion_export.runners.reference import reference_runner
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.fold.model import fold_

SLOW = pytest.mark.slow  # each trace takes about four seconds
KINDS = ["bert", "roberta", "deberta-v2", "albert"]
MORE_KINDS = ["distilbert", "electra", "mpnet"]
CASES = [
    *(pytest.param(kind, "text-classification", id=kind) for kind in KINDS),
    *(pytest.param(kind, "text-classification", id=kind, marks=SLOW) for kind in MORE_KINDS),
    pytest.param("bert", "fill-mask", id="bert-fill-mask"),
    pytest.param("bert", "token-classification", id="bert-tokens", marks=SLOW),
    pytest.param("bert", "question-answering", id="bert-answers", marks=SLOW),
    pytest.param("bert", "feature-extraction", id="bert-features", marks=SLOW),
    pytest.param("roberta", "fill-mask", id="roberta-fill-mask", marks=SLOW),
    pytest.param("distilbert", "question-answering", id="distilbert-answers", marks=SLOW),
    pytest.param("deberta-v2", "token-classification", id="deberta-tokens", marks=SLOW),
    pytest.param("albert", "feature-extraction", id="albert-features", marks=SLOW),
]


def traced(model, **options):
    program = trace(model, trace_inputs(names_of(model), model.config), **options)
    NameDimensions()(program)
    return program


def assert_same(found, expected, mask, tolerance):
    """Positions that the mask hides hold nothing anybody reads."""
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        visible = mask == 1 if values.shape[:2] == mask.shape else slice(None)
        one, other = found[name].astype(np.float64)[visible], values[visible]
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_switchable_graph_computes_what_torch_computes(
    kind, task, tiny_model, random_adapter, tmp_path
):
    """Every scale becomes an input; other sizes than the traced ones; no adapter is the base."""
    model = tiny_model(kind, task)
    placed = random_adapter(model, seed=1)
    asked = random_adapter(model, seed=2)
    with attached(model, placed):
        program = traced(model)
    assert scales_in(program) == {f"{path}.propulsion_scale" for path in placed.scales}
    slots, offset = {}, 0
    for path, scale in placed.scales.items():
        size = scale.values.size
        slots[f"{path}.propulsion_scale"] = Slot(path, offset, size, (size,))
        offset += size
    PackInitializers("scales", slots)(program)
    program = optimise(program)
    SetDefaults({"scales": np.ones(offset, np.float32)})(program)
    path = write_graph(program, tmp_path)

    run = onnxruntime_runner(path)
    feeds = np.concatenate([scale.values for scale in asked.scales.values()]).astype(np.float32)
    inputs = batches(model)
    found = [run(batch | {"scales": feeds}) for batch in inputs]
    found_base = [run(batch) for batch in inputs]

    expected_base = [torch_runner(model)(batch) for batch in inputs]
    with attached(model, asked):
        expected = [torch_runner(model)(batch) for batch in inputs]
    for batch, *pair, one, other in zip(
        inputs, found, expected, found_base, expected_base, strict=True
    ):
        assert_same(*pair, batch["attention_mask"], 1e-4)
        assert_same(one, other, batch["attention_mask"], 1e-4)
        assert not np.allclose(next(iter(pair[1].values())), next(iter(other.values())), rtol=0.1)
    inputs, outputs = signature(program)
    assert [spec.name for spec in inputs] == [*names_of(model), "scales"]
    assert {spec.shape for spec in inputs[:-1]} == {("batch", "sequence")}
    for spec in outputs:
        assert spec.shape[0] == "batch"
        assert {d for d in spec.shape if isinstance(d, str)} <= {"batch", "sequence"}


def test_equal_scales_are_not_merged_into_one_initializer(tiny_bert, random_adapter):
    model = tiny_bert(num_hidden_layers=1)
    paths = random_adapter(model).scales
    halves = {path: Scale(np.full(s.values.size, 0.5)) for path, s in paths.items()}

    with attached(model, Adapter("halves", halves)):
        found = scales_in(traced(model))

    assert found == {f"{path}.propulsion_scale" for path in halves}


def test_input_side_scales_trained_biases_and_heads_are_initializers_by_name(
    tiny_bert, random_adapter
):
    model = tiny_bert(num_hidden_layers=1)
    drawn = random_adapter(model, embeddings=False, biases=True, head=True)
    wide = "bert.encoder.layer.0.output.dense"
    inside = np.random.default_rng(0).uniform(0.5, 1.5, 37)
    adapter = Adapter(
        "a", {**drawn.scales, wide: Scale(inside, "input")}, drawn.biases, drawn.modules
    )

    with attached(model, adapter):
        initializers = traced(model).graph.initializers

    np.testing.assert_array_equal(
        initializers[f"{wide}.propulsion_input_scale"].const_value.numpy(),
        inside.astype(np.float32),
    )
    for path, bias in adapter.biases.items():
        np.testing.assert_array_equal(initializers[f"{path}.bias"].const_value.numpy(), bias)
    for name, values in adapter.modules.items():
        np.testing.assert_array_equal(initializers[name].const_value.numpy(), values)


def test_folded_graph_has_the_nodes_of_the_base_export(tiny_bert, random_adapter):
    model = tiny_bert(num_hidden_layers=1)
    base = optimise(traced(model))
    adapter = random_adapter(model, biases=True)
    fold_(model, adapter)

    folded = optimise(traced(model))

    def operators(program):
        return sorted(node.op_type for node in program.graph)

    assert operators(folded) == operators(base)
    assert [v.name for v in folded.graph.inputs] == [v.name for v in base.graph.inputs]


@pytest.mark.parametrize("opset", [18, pytest.param(23, marks=SLOW)])
def test_opset_asked_for_is_that_of_the_graph(opset, tiny_bert, tmp_path):
    model = tiny_bert(num_hidden_layers=1)

    program = optimise(traced(model, opset=opset))

    assert program.opset_imports[""] == opset
    batch = batches(model)[0]
    found = onnxruntime_runner(write_graph(program, tmp_path))(batch)
    assert_same(found, torch_runner(model)(batch), batch["attention_mask"], 1e-4)


def rounded_outputs(model, adapter, dtype, batch):
    model = copy.deepcopy(model).to(dtype)
    with attached(model, adapter):
        return torch_runner(model)(batch)


def graph_in(dtype, model, adapter, directory):
    with attached(model.to(dtype), adapter):
        return write_graph(optimise(traced(model)), directory)


def test_float16_graph_runs_in_onnxruntime(tiny_bert, random_adapter, tmp_path):
    model = tiny_bert(num_hidden_layers=1)
    adapter, batch = random_adapter(model), batches(model)[0]
    exact = rounded_outputs(model, adapter, torch.float64, batch)["logits"]

    path = graph_in(torch.float16, model, adapter, tmp_path)

    found = onnxruntime_runner(path)(batch)["logits"]
    assert found.dtype == np.float16
    np.testing.assert_allclose(found, exact, rtol=0, atol=2e-2 * np.abs(exact).max())


def test_bfloat16_graph_is_unavailable_in_onnxruntime_and_right_in_the_reference(
    tiny_bert, random_adapter, tmp_path
):
    model = tiny_bert(num_hidden_layers=1)
    adapter, batch = random_adapter(model), batches(model)[0]
    exact = rounded_outputs(model, adapter, torch.float64, batch)["logits"]

    path = graph_in(torch.bfloat16, model, adapter, tmp_path)

    with pytest.raises(UnavailableError, match="no bfloat16 kernels"):
        onnxruntime_runner(path)
    found = reference_runner(path)(batch)["logits"]
    assert str(found.dtype) == "bfloat16"
    found = found.astype(np.float64)
    np.testing.assert_allclose(found, exact, rtol=0, atol=0.1 * np.abs(exact).max())


class Unexportable(nn.Module):
    config = transformers.PretrainedConfig()

    def forward(self, input_ids):
        if input_ids.sum() > 3:  # depends on the data
            return {"y": input_ids}
        return {"y": -input_ids}


def test_a_model_that_branches_on_the_values_of_a_batch_is_named():
    with pytest.raises(ToolError, match="Unexportable: its code branches on the values of a batch"):
        trace(Unexportable(), {"input_ids": np.ones((3, 11), np.int64)})


def test_trace_leaves_the_model_as_it_was(tiny_bert):
    model = tiny_bert(num_hidden_layers=1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = batches(model)[0]
    expected = torch_runner(model)(batch)["logits"]

    program = traced(model)

    assert isinstance(program, ir.Model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    np.testing.assert_array_equal(torch_runner(model)(batch)["logits"], expected)
