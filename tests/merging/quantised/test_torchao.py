"""Scales folded into weights of torchao, which is the judge."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.tensor_files import stored_tensors
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised.activations import refuse_static_quantisers
from propulsion_export.merging.quantised.torchao import find

torch = pytest.importorskip("torch", reason="torchao computes with it")
quantization = pytest.importorskip("torchao.quantization", reason="the judge of its own layout")
parts = pytest.importorskip(
    "torchao.prototype.safetensors.safetensors_support", reason="it writes tensors as parts"
)
from safetensors.torch import save_file  # noqa: E402

from quantised_checkpoints import ROUNDING, merged, stored  # noqa: E402

SETTINGS = {"quant_method": "torchao"}
GROUPS = quantization.PerGroup(32)
FACTORS = st.floats(-1e4, 1e4).filter(lambda value: value == 0 or abs(value) > 1e-4)


def config(name, **options):
    return lambda: getattr(quantization, name)(**options)


INT4 = {"weight_dtype": torch.int4, "granularity": GROUPS}
KINDS = {
    "int8": config("Int8WeightOnlyConfig"),
    "int8-groups": config("Int8WeightOnlyConfig", granularity=GROUPS),
    "int8-dynamic": config("Int8DynamicActivationInt8WeightConfig"),
    "int4": config("IntxWeightOnlyConfig", **INT4),
    "int4-zero-points": config(
        "IntxWeightOnlyConfig", mapping_type=quantization.MappingType.ASYMMETRIC, **INT4
    ),
    "float8": config("Float8WeightOnlyConfig"),
    "float8-e5m2": config("Float8WeightOnlyConfig", weight_dtype=torch.float8_e5m2),
}
SHARED = {
    "int8-tensor": config("Int8WeightOnlyConfig", granularity=quantization.PerTensor()),
    "float8-tensor": config("Float8WeightOnlyConfig", granularity=quantization.PerTensor()),
}


def quantised(weight, kind):
    """A Linear layer that torchao quantised."""
    layer = torch.nn.Linear(*weight.shape[::-1], bias=False, dtype=weight.dtype)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(layer)
    quantization.quantize_(model, (KINDS | SHARED)[kind]())
    return model[0]


def flattened(layer):
    return parts.flatten_tensor_state_dict({"layer.weight": layer.weight.data})


def layout_of(flat, directory):
    tensors, metadata = flat
    save_file(tensors, directory / "model.safetensors", metadata)
    return find(SETTINGS, stored_tensors(directory / "model.safetensors"))


def folded(layer, directory, scale):
    """The layer with a scale folded in, and its tensors."""
    tensors, metadata = flattened(layer)
    layout = layout_of((tensors, metadata), directory)
    written = merged(layout.tensors, layout.scaled("layer", scale))
    weights, left = parts.unflatten_tensor_state_dict(written, metadata)
    assert not left
    result = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
    result.weight = torch.nn.Parameter(weights["layer.weight"], requires_grad=False)
    return result, written


def dequantised(layer):
    return layer.weight.dequantize().double().numpy()


def assert_scaled(layer, result, scale, dtype):
    """Equal to one rounding of the scale and the one of each product with it."""
    expected = dequantised(layer) * scale[:, None]
    error = np.abs(dequantised(result) - expected)
    assert np.all(error <= 3.01 * ROUNDING[dtype] * np.abs(expected))


@st.composite
def weights_and_factors(draw):
    outputs, groups = draw(st.integers(1, 9)), draw(st.integers(1, 4))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    seed = draw(st.integers(0, 2**32 - 1))
    weight = np.random.default_rng(seed).normal(0, 0.1, (outputs, 32 * groups))
    factors = draw(arrays(np.float64, outputs, elements=FACTORS))
    return torch.from_numpy(weight).to(dtype), factors


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("layer")


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(case=weights_and_factors())
def test_weights_dequantise_to_the_scaled_ones(directory, kind, case):
    weight, factors = case
    layer = quantised(weight, kind)

    result, written = folded(layer, directory, factors)

    assert_scaled(layer, result, factors, weight.dtype)
    for name, tensor in flattened(layer)[0].items():
        if not name.endswith("_scale"):
            assert torch.equal(written[name].view(torch.uint8), tensor.view(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_computes_the_scaled_outputs(directory, kind):
    torch.manual_seed(0)
    layer = quantised(torch.randn(8, 64), kind)
    scale = np.array([1.5, -0.5, 0.0, 2.0, 1e3, 1e-3, -1.0, 1.0])

    result, _ = folded(layer, directory, scale)

    inputs = torch.randn(5, 64)
    expected = layer(inputs).double() * torch.from_numpy(scale)
    torch.testing.assert_close(result(inputs).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", [lambda s: s[::-1], np.abs, lambda s: s * 1.000001])
def test_another_scale_is_seen(directory, kind, change):
    torch.manual_seed(2)
    layer = quantised(torch.randn(4, 64), kind)
    scale = np.array([1.5, -0.5, 0.25, 2.0])

    result, _ = folded(layer, directory, change(scale))

    with pytest.raises(AssertionError):
        assert_scaled(layer, result, scale, torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_an_entry_is_what_torchao_dequantises(directory, kind):
    torch.manual_seed(1)
    weight = torch.randn(7, 64) * torch.rand(7, 1)
    layer = quantised(weight, kind)
    layout, judged = layout_of(flattened(layer), directory), dequantised(layer)

    assert layout.shape("layer") == (7, 64)
    for place in np.ndindex(7, 64):
        value, step = layout.entry("layer", place)

        assert value == pytest.approx(judged[place], rel=2.0**-22)
        assert abs(value - weight[place].item()) <= step * 1.0001


@pytest.mark.parametrize("kind", SHARED)
def test_scales_that_rows_share_are_refused(directory, kind):
    layout = layout_of(flattened(quantised(torch.randn(4, 64), kind)), directory)

    with pytest.raises(BaseModelError, match="layer: blocks of 4 x 64 weights share a scale"):
        layout.scaled("layer", np.ones(4))


def test_a_product_beyond_the_scales_dtype_is_refused(directory):
    layout = layout_of(flattened(quantised(torch.randn(4, 64), "int4")), directory)

    with pytest.raises(AdapterError, match=r"channel 2, group 0 becomes .* range of float32"):
        layout.scaled("layer", np.array([1.0, 1.0, 1e40, 1.0]))


def rows_of_int4(weight, group):
    """What FBGEMM's `int4_row_quantize_zp` makes: integers, steps and middles of groups."""
    grouped = weight.reshape(len(weight), -1, group)
    least = grouped.min(-1, keepdims=True)
    steps = (grouped.max(-1, keepdims=True) - least) / 15
    integers = np.clip(np.round((grouped - least) / steps), 0, 15) - 8
    return integers, steps, least + 8 * steps


def int4_tensors(weight, group=32):
    """An Int4Tensor's parts; only its GPU kernels make them in torchao 0.18."""
    integers, steps, middles = rows_of_int4(weight, group)
    halves = integers.reshape(*weight.shape).astype(np.int8)
    tensors = {
        "layer._weight_qdata": halves[:, ::2] & 15 | halves[:, 1::2] << 4,
        "layer._weight_scale": steps[..., 0].T.astype(np.float32),
        "layer._weight_zero_point": middles[..., 0].T.astype(np.float32),
    }
    description = {"_type": "Int4Tensor", "_data": {"block_size": [1, group]}}
    metadata = {"layer.weight": json.dumps(description), "tensor_names": '["layer.weight"]'}
    return {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}, metadata


def test_an_int4_tensor_has_scaled_steps_and_middles(directory):
    weight = np.random.default_rng(4).normal(0, 0.1, (6, 96))
    scale = np.array([1.5, -0.5, 0.0, 2.0, 1e3, 1e-3])
    layout = layout_of(int4_tensors(weight), directory)

    written = merged(layout.tensors, layout.scaled("layer", scale))

    integers, steps, _ = rows_of_int4(weight, 32)
    scales, middles = (
        written[f"layer._weight_{part}"].double().numpy().T[..., None]
        for part in ("scale", "zero_point")
    )
    found = (integers * scales + middles).reshape(weight.shape)
    allowed = (0.51 * steps * np.abs(scale)[:, None, None]).repeat(32, -1).reshape(weight.shape)
    assert np.all(np.abs(found - weight * scale[:, None]) <= allowed)
    before = int4_tensors(weight)[0]["layer._weight_qdata"]
    assert torch.equal(written["layer._weight_qdata"], before)


def test_an_entry_of_an_int4_tensor_is_near_its_weight(directory):
    weight = np.random.default_rng(5).normal(0, 0.1, (6, 96))
    layout = layout_of(int4_tensors(weight), directory)

    assert layout.shape("layer") == (6, 96)
    for place in np.ndindex(6, 96):
        value, step = layout.entry("layer", place)
        assert abs(value - weight[place]) <= 0.51 * step


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("Int4TilePackedTo4dTensor", "tiles of a GPU's tensor cores"),
        ("Int4PlainInt32Tensor", "Intel's and Huawei's"),
        ("MXTensor", "powers of two"),
        ("NVFP4Tensor", "3 bits"),
        ("Surprise", "expected one of Int8Tensor"),
    ],
)
def test_other_subclasses_are_refused_by_name(directory, kind, reason):
    tensors, metadata = flattened(quantised(torch.randn(4, 64), "int8"))
    text = metadata["layer.weight"].replace("Int8Tensor", kind, 1)
    layout = layout_of((tensors, metadata | {"layer.weight": text}), directory)

    with pytest.raises(BaseModelError, match=f"layer: is {kind}, .*{reason}"):
        layout.scaled("layer", np.ones(4))


def test_tensors_without_a_description_are_refused(directory):
    tensors, _ = flattened(quantised(torch.randn(4, 64), "int8"))

    layout = find(SETTINGS, stored(directory, tensors))

    with pytest.raises(BaseModelError, match="a tensor that no header describes"):
        layout.scaled("layer", np.ones(4))


def test_a_fixed_quantiser_of_inputs_is_refused_behind_scaled_layers(directory):
    tensors, _ = flattened(quantised(torch.randn(4, 64), "int8"))
    tensors["layer._weight_act_quant_scale"] = torch.ones(1, 1)
    found = stored(directory, tensors)

    refuse_static_quantisers(found, {"layer": Scale(np.array([1.5, 1, 1, 1]))})
    with pytest.raises(BaseModelError, match="_weight_act_quant_scale: is fixed by calibration"):
        refuse_static_quantisers(found, {"another": Scale(np.array([1.5, 1, 1, 1]))})


def test_only_its_own_method_is_recognised():
    assert find({"quant_method": "torchao"}, {}) is not None
    assert find({"quant_method": "gptq"}, {}) is None
