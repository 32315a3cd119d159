"""One trace serves all modes: each computes what its own trace would; the trace stays as it was."""

import copy
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.layout import to_row
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.modes import (
    can_become_bank,
    can_fold,
    to_bank,
    to_folded,
    to_switchable,
)
from propulsion_export.graph.sample_outputs import task_inputs
from propulsion_export.graph.scaled import ScaledGraphs, trace_scaled
from propulsion_export.graph.slot_plan import feeds_of, plan_slots
from propulsion_export.graph.task_graphs import trace_task
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.fold.model import fold_

TASK = "feature-extraction"


@dataclass(frozen=True)
class Traced:
    base: BaseModel
    adapters: tuple[Adapter, Adapter]
    scaled: ScaledGraphs

    def folded(self):
        model = copy.deepcopy(self.base.model)
        fold_(model, self.adapters[0])
        return to_folded(self.scaled, dict(model.named_parameters(remove_duplicate=False)))

    def expected(self, adapter):
        tensors = {n: torch.from_numpy(v) for n, v in self.inputs().items()}
        with attached(self.base.model, adapter), torch.no_grad():
            return self.base.model(**tensors).last_hidden_state.numpy()

    def inputs(self):
        return task_inputs(self.base.model, TASK)


@pytest.fixture(scope="module")
def bert(tiny_model, random_adapter):
    """A BERT, whose position embeddings are a table that all rows of a batch share."""
    model = tiny_model("bert", TASK)
    adapters = tuple(random_adapter(model, seed=seed, name=str(seed)) for seed in (1, 2))
    base = BaseModel(model, "tiny", TASK, frozenset(), frozenset(), ())
    plan = plan_slots(base, adapters, torch.float32)
    return Traced(base, adapters, trace_scaled(base, *plan, opset=20))


def run(programs, directory, feeds):
    write_graphs(programs, directory)
    return onnxruntime_runner(directory / "model.onnx")(feeds)["last_hidden_state"]


def operators(programs):
    return sorted(node.op_type for node in programs["model.onnx"].graph)


def test_folded_has_the_nodes_of_the_base_export_and_computes_the_adapter(bert, tmp_path):
    base = to_folded(ScaledGraphs(trace_task(bert.base, opset=20), {}, {}, {}))
    folded = bert.folded()

    assert operators(folded) == operators(base)
    found = run(folded, tmp_path, bert.inputs())
    np.testing.assert_allclose(found, bert.expected(bert.adapters[0]), atol=1e-5)
    assert np.abs(found - bert.expected(bert.adapters[1])).max() > 0.1


def test_switchable_has_a_multiply_for_each_slot_and_computes_each_adapter(bert, tmp_path):
    programs = to_switchable(bert.scaled)
    feeds = feeds_of(bert.adapters, bert.scaled.layout, bert.scaled.defaults)

    added = len(operators(programs)) - len(operators(bert.folded()))
    assert added == len(bert.scaled.parts["propulsion_scales"]) + 1  # and one Split
    for adapter in bert.adapters:
        found = run(programs, tmp_path, bert.inputs() | feeds[adapter.name])
        np.testing.assert_allclose(found, bert.expected(adapter), atol=1e-5)


def test_every_row_of_a_bank_computes_its_own_adapter(bert, tmp_path):
    layout = bert.scaled.layout
    feeds = feeds_of(bert.adapters, layout, bert.scaled.defaults)
    bank = np.stack([to_row(feeds[name], layout) for name in ("base", "1", "2")])
    chosen = {"propulsion_bank": bank, "adapter_ids": np.array([2, 0, 1])}

    assert can_become_bank(bert.scaled)
    found = run(to_bank(bert.scaled), tmp_path, bert.inputs() | chosen)

    one, two = bert.adapters
    for row, adapter in enumerate((two, Adapter("base", {}), one)):
        np.testing.assert_allclose(found[row], bert.expected(adapter)[row], atol=1e-5)


def test_modes_leave_the_trace_as_it_was(bert):
    def shown():
        program = bert.scaled.programs["model.onnx"]
        nodes = [(node.op_type, [v and v.name for v in node.inputs]) for node in program.graph]
        return nodes, sorted(program.graph.initializers), [v.name for v in program.graph.inputs]

    before = shown()

    bert.folded(), to_switchable(bert.scaled), to_bank(bert.scaled)

    assert shown() == before


def test_parts_that_no_pass_turns_into_rows_are_known(bert):
    heads = {**bert.scaled.parts, "propulsion_modules": {}}
    other = ScaledGraphs(bert.scaled.programs, bert.scaled.layout, bert.scaled.defaults, heads)

    assert not can_become_bank(other)


def test_one_initializer_may_hold_several_slots(tmp_path):
    """As the scales of packed query, key and value."""
    from propulsion_export.artifacts.manifest import Slot

    text = """
    <ir_version: 10, opset_import: ["" : 20]>
    graph (float[batch, n, 3] x) => (float[batch, n, 3] y) <float[3] qkv = {1.0, 1.0, 1.0}> {
        y = Mul (x, qkv)
    }
    """
    slots = (Slot("q", 0, 2, (2,)), Slot("k", 2, 1, (1,)))
    defaults = {"propulsion_scales": np.ones(3, np.float32)}
    parts = {"propulsion_scales": {"qkv": Slot("qkv", 0, 3, (3,))}}
    scaled = ScaledGraphs(
        {"model.onnx": ir.from_onnx_text(text)}, {"propulsion_scales": slots}, defaults, parts
    )
    x = np.arange(12, dtype=np.float32).reshape(2, 2, 3)
    scales = np.float32([2, 3, 5])

    write_graphs(to_switchable(scaled), tmp_path)
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": x, "propulsion_scales": scales})
    np.testing.assert_array_equal(found["y"], x * scales)
    write_graphs(to_bank(scaled), tmp_path)
    feeds = {"propulsion_bank": np.stack([scales, -scales]), "adapter_ids": np.array([1, 0])}
    found = onnxruntime_runner(tmp_path / "model.onnx")({"x": x, **feeds})
    np.testing.assert_array_equal(found["y"], x * np.stack([-scales, scales])[:, None])


class Tied(torch.nn.Module):
    """Two modules that share a weight, and a head."""

    def __init__(self, labels):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = torch.nn.Linear(3, 4, bias=False), torch.nn.Linear(3, 4, bias=False)
        self.last.weight = self.first.weight
        self.head = torch.nn.Linear(4, labels)


def test_a_trace_serves_a_folded_model_only_if_its_weights_fit():
    def other(name, values):
        model = Tied(2)
        model.get_submodule(name).weight = torch.nn.Parameter(values)
        return model

    base = Tied(2)
    same = base.first.weight.detach().clone()

    assert can_fold(base, Tied(2))
    assert can_fold(base, other("head", torch.zeros(2, 4)))
    assert can_fold(base, other("last", same))
    assert not can_fold(base, other("last", 2 * same))
    assert not can_fold(base, Tied(3))
