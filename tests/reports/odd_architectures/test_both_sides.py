"""One module on two sides; modules that a task does not use."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from odd_models import NAMES, base_of, make, tensors, tokens

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.errors import AdapterError, ToolError
from propulsion_export.graph.build import build_bank, build_switchable
from propulsion_export.graph.files import write_graphs
from propulsion_export.graph.scaled import check_unused
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.scaling.attach import attached

READ, DEAD, HEAD = (
    "transformer.embeddings.word_embeddings",
    "transformer.pooler.dense",  # SqueezeBERT computes it, and returns it for no tokens
    "classifier",
)


@pytest.fixture(scope="module")
def squeeze():
    """A token classifier, a Propulsion adapter and an (IA)^3 adapter that share two modules."""
    model = make("SqueezeBert", "ForTokenClassification", **NAMES)
    chooser = np.random.default_rng(0)

    def scales(paths, side):
        return {path: Scale(chooser.uniform(0.3, 1.7, 16), side) for path in paths}

    outputs = scales((READ, DEAD), "output")
    outputs[HEAD] = Scale(chooser.uniform(0.3, 1.7, 3), "output")
    propulsion = Adapter("propulsion", outputs)
    return model, propulsion, Adapter("ia3", scales((DEAD, HEAD), "input"))


def expected_of(model, adapter, inputs):
    with attached(model, adapter), torch.inference_mode():
        return model(**tensors(inputs)).logits.numpy()


BATCH = tokens([2, 7, 8, 9, 3], [2, 10, 3])


def with_types(batch):
    return batch | {"token_type_ids": np.zeros_like(batch["input_ids"])}


def test_adapters_on_both_sides_of_a_module_share_a_switchable_graph(squeeze, tmp_path):
    model, propulsion, ia3 = squeeze
    adapters, inputs = [propulsion, ia3], with_types(BATCH)

    built = build_switchable(base_of(model), adapters, adapters, torch.float32, opset=20)

    write_graphs(built.programs, tmp_path)
    run = onnxruntime_runner(tmp_path / "model.onnx")
    for adapter in adapters:
        found = run(inputs | built.feeds[adapter.name])["logits"]
        np.testing.assert_allclose(found, expected_of(model, adapter, inputs), atol=1e-5)
    base = expected_of(model, Adapter("base", {}), inputs)
    np.testing.assert_allclose(run(inputs)["logits"], base, atol=1e-5)
    sides = {(s.path, s.side) for s in built.layout["propulsion_scales"]}
    assert {(HEAD, "input"), (HEAD, "output"), (DEAD, "input"), (DEAD, "output")} <= sides


@pytest.mark.slow
def test_adapters_on_both_sides_of_a_module_share_a_bank(squeeze, tmp_path):
    model, propulsion, ia3 = squeeze
    adapters, inputs = [propulsion, ia3], with_types(BATCH)

    built = build_bank(base_of(model), adapters, adapters, torch.float32, opset=20)

    write_graphs(built.programs, tmp_path)
    rows = [np.concatenate(list(built.feeds[a.name].values())) for a in adapters]
    feeds = {"propulsion_bank": np.stack(rows), "adapter_ids": np.array([1, 0])}
    found = onnxruntime_runner(tmp_path / "model.onnx")(inputs | feeds)["logits"]
    for row, adapter in enumerate((ia3, propulsion)):
        expected = expected_of(model, adapter, inputs)[row]
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_a_bank_adapter_whose_scales_all_do_nothing_is_refused_by_name(squeeze):
    model, propulsion, _ = squeeze
    idle = replace(propulsion, scales={DEAD: propulsion.scales[DEAD]})

    with pytest.raises(AdapterError, match=r"pooler\.dense: does not act on the output"):
        build_bank(base_of(model), [idle], [idle], torch.float32, opset=20)


def test_a_lost_tensor_that_acts_is_still_an_error(squeeze):
    model, propulsion, _ = squeeze
    lengths = [scale.values.size for scale in propulsion.scales.values()]
    slots = tuple(
        Slot(path, sum(lengths[:index]), lengths[index], (lengths[index],), "output")
        for index, path in enumerate(propulsion.scales)
    )
    layout = {"propulsion_scales": slots}
    read, dead, _ = slots

    check_unused(base_of(model), layout, {"propulsion_scales": [dead]})
    with pytest.raises(AdapterError, match=r"pooler\.dense: does not act on the output"):
        check_unused(base_of(model), {"propulsion_scales": (dead,)}, {"propulsion_scales": [dead]})
    with pytest.raises(ToolError, match=r"word_embeddings.propulsion_scale: is in no traced graph"):
        check_unused(base_of(model), layout, {"propulsion_scales": [read, dead]})
