from dataclasses import replace

import numpy as np
import pytest
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised.folding import quantised_changes
from propulsion_export.merging.quantised.layouts import find_layout
from quantised_checkpoints import gptq_dequantised, gptq_module, merged, named, of_module, stored

QUANTISED = "model.layers.0.mlp.up_proj"


@pytest.fixture
def tensors():
    rng = np.random.default_rng(0)
    module, _ = gptq_module(rng, 32, 64)
    other, _ = gptq_module(rng, 32, 64)
    plain = {
        "model.embed_tokens.weight": (100, 32),
        "model.norm.weight": (32,),
        "model.layers.0.self_attn.o_proj.weight": (32, 32),
        "model.layers.0.mlp.gate.weight": (8, 32),
        f"{QUANTISED}.bias": (32,),
    }
    return {
        **named(QUANTISED, module),
        **named("model.layers.0.mlp.gate_proj", other),
        **{name: torch.from_numpy(rng.normal(size=shape)).half() for name, shape in plain.items()},
    }


@pytest.fixture
def fold(tensors, tmp_path):
    def run(adapter, rule_of=None, **more):
        found = stored(tmp_path, {**tensors, **more})
        layout = find_layout({"quant_method": "gptq", "bits": 4, "group_size": 8}, found)
        return merged(found, quantised_changes(adapter, layout, found, rule_of))

    return run


def scaling(width, *paths, side="output"):
    values = np.random.default_rng(7).uniform(-2, 2, width)
    return Adapter("tuned", {path: Scale(values, side) for path in paths})


def test_the_quantised_weight_and_the_bias_beside_it_are_multiplied(fold, tensors):
    adapter = scaling(32, QUANTISED)
    scale = adapter.scales[QUANTISED].values

    after = fold(adapter)

    changed = {name for name, value in after.items() if not torch.equal(value, tensors[name])}
    assert changed == {f"{QUANTISED}.scales", f"{QUANTISED}.bias"}
    weights = [gptq_dequantised(of_module(QUANTISED, each), 4) for each in (tensors, after)]
    np.testing.assert_allclose(weights[1], weights[0] * scale[:, None], rtol=2**-11)
    bias = tensors[f"{QUANTISED}.bias"].double() * torch.from_numpy(scale)
    assert torch.equal(after[f"{QUANTISED}.bias"], bias.half())


def test_a_trained_bias_takes_the_place_of_the_stored_one_inside_the_product(fold):
    adapter = replace(scaling(32, QUANTISED), biases={QUANTISED: np.linspace(-1, 1, 32)})

    after = fold(adapter)

    expected = np.linspace(-1, 1, 32) * adapter.scales[QUANTISED].values
    assert torch.equal(after[f"{QUANTISED}.bias"], torch.from_numpy(expected).half())


def test_a_trained_bias_that_the_layer_lacks_is_refused(fold):
    path = "model.layers.0.mlp.gate_proj"
    adapter = replace(scaling(32, path), biases={path: np.ones(32)})

    with pytest.raises(AdapterError, match="gate_proj: the adapter has a trained bias, the layer"):
        fold(adapter)


def test_linear_layers_and_embeddings_are_told_apart_by_their_shape(fold, tensors):
    embedding, linear = "model.embed_tokens", "model.layers.0.mlp.gate"

    after = {**fold(scaling(32, embedding)), f"{linear}.weight": None}
    rows = fold(scaling(8, linear))[f"{linear}.weight"]

    columns = scaling(32, embedding).scales[embedding].values
    expected = tensors[f"{embedding}.weight"].double() * torch.from_numpy(columns)
    assert torch.equal(after[f"{embedding}.weight"], expected.half())
    factors = torch.from_numpy(scaling(8, linear).scales[linear].values)
    assert torch.equal(rows, (tensors[f"{linear}.weight"].double() * factors[:, None]).half())


@pytest.mark.parametrize("path", ["model.layers.0.self_attn.o_proj", "model.norm"])
def test_what_a_shape_does_not_say_is_refused_unless_somebody_knows(path, fold, tensors):
    with pytest.raises(BaseModelError, match=f"{path}: is not quantised, and its weight"):
        fold(scaling(32, path))
    rule = "columns" if path.endswith("o_proj") else "norm plus one"

    after = fold(scaling(32, path), lambda asked: rule if asked == path else None)

    before = tensors[f"{path}.weight"].double()
    factors = torch.from_numpy(scaling(32, path).scales[path].values)
    expected = before * factors if rule == "columns" else (1 + before) * factors - 1
    assert torch.equal(after[f"{path}.weight"], expected.half())


@pytest.mark.parametrize("own", ["layers.0.mlp.up_proj", QUANTISED, f"lm.{QUANTISED}"])
def test_a_prefix_of_a_head_model_more_or_less_does_not_matter(own, fold, tensors):
    after = fold(scaling(32, own))

    assert not torch.equal(after[f"{QUANTISED}.scales"], tensors[f"{QUANTISED}.scales"])


def test_everything_that_does_not_fit_is_named_at_once(fold):
    adapter = Adapter(
        "tuned",
        {"model.absent": Scale(np.full(3, 2.0)), QUANTISED: Scale(np.full(64, 2.0))},
        modules={"score.weight": np.ones((3, 32))},
    )

    with pytest.raises(AdapterError) as refused:
        fold(adapter)

    assert refused.value.findings == (
        "adapter tuned: model.absent: the checkpoint has no such module",
        f"adapter tuned: {QUANTISED}: the adapter has 64 scales, the base model a quantised "
        "weight [32, 64]",
        "adapter tuned: score.weight: was trained whole with shape [3, 32], the quantised "
        "checkpoint has no such tensor",
    )


def test_a_plain_module_that_was_trained_whole_is_replaced(fold):
    values = np.random.default_rng(1).normal(size=(8, 32))
    adapter = Adapter("tuned", {}, modules={"model.layers.0.mlp.gate.weight": values})

    after = fold(adapter)

    assert torch.equal(after["model.layers.0.mlp.gate.weight"], torch.from_numpy(values).half())


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [
        (scaling(64, QUANTISED, side="input"), "scales an input"),
        (
            Adapter("tuned", {"model.layers.0.mlp.experts.w": Scale(np.full((2, 3), 2.0))}),
            "scales weights of experts",
        ),
        (Adapter("tuned", {QUANTISED: Scale(np.ones(32))}), "changes no weight"),
    ],
    ids=["input", "experts", "ones"],
)
def test_what_cannot_be_folded_is_refused(adapter, expected, fold):
    with pytest.raises(AdapterError, match=expected):
        fold(adapter)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.mlp.down_proj.input_scale",
        "model.layers.0.self_attn.k_scale",
        f"{QUANTISED}.output_scale",
    ],
)
def test_a_fixed_quantiser_of_activations_behind_a_scaled_layer_is_refused(name, fold):
    with pytest.raises(BaseModelError, match=f"{name}: is fixed by calibration"):
        fold(scaling(32, QUANTISED), **{name: torch.ones(1)})


def test_the_quantiser_of_the_only_scaled_layers_own_input_sees_what_it_saw(fold, tensors):
    after = fold(scaling(32, QUANTISED), **{f"{QUANTISED}.input_scale": torch.ones(1)})

    assert not torch.equal(after[f"{QUANTISED}.scales"], tensors[f"{QUANTISED}.scales"])


def test_a_bias_beyond_its_dtype_is_refused(fold):
    adapter = replace(scaling(32, QUANTISED), biases={QUANTISED: np.full(32, 1e9)})

    with pytest.raises(AdapterError, match="bias: would hold values too large for F16"):
        fold(adapter)


def test_a_quantised_embedding_is_refused(fold):
    """Its rows are tokens: each scale of the grid belongs to one, and none to an output."""
    rows, _ = gptq_module(np.random.default_rng(3), 96, 32)
    name = "model.embed_positions"

    with pytest.raises(AdapterError, match=r"embed_positions: .* a quantised weight \[96, 32\]"):
        fold(scaling(32, name), **named(name, rows))
