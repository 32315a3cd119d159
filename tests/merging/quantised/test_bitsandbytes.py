"""Scales folded into weights of bitsandbytes, which is the judge."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from propulsion_export.base_model.tensor_files import stored_tensors
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised.bitsandbytes import find
from quantised_checkpoints import merged as merged_tensors

torch = pytest.importorskip("torch", reason="bitsandbytes computes with it")
bitsandbytes = pytest.importorskip("bitsandbytes", reason="the judge of its own layout")
from safetensors.torch import save_file  # noqa: E402

FACTORS = st.floats(-1e4, 1e4).filter(lambda value: value == 0 or abs(value) > 1e-4)
HALF_UNIT = 2.0**-24  # of float32, relative
SETTINGS = {"quant_method": "bitsandbytes"}


def four_bits(weight, kind, nested, block=64, storage=torch.uint8):
    """The stored tensors of a Linear4bit's weight."""
    packed, state = bitsandbytes.functional.quantize_4bit(
        weight, quant_type=kind, compress_statistics=nested, blocksize=block, quant_storage=storage
    )
    parts = state.as_dict(packed=True)
    return {"layer.weight": packed} | {f"layer.weight.{key}": parts[key] for key in parts}


def eight_bits(weight):
    integers, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
    order = torch.tensor(0, dtype=torch.uint8)
    return {"layer.weight": integers, "layer.SCB": scales, "layer.weight_format": order}


def dequantised(tensors):
    """What bitsandbytes makes of stored tensors, float64."""
    if "layer.SCB" in tensors:
        both = tensors["layer.weight"], tensors["layer.SCB"]
        return bitsandbytes.functional.int8_vectorwise_dequant(*both).double().numpy()
    prefix = "layer.weight."
    parts = {name: value for name, value in tensors.items() if name.startswith(prefix)}
    weight = bitsandbytes.nn.Params4bit.from_prequantized(
        tensors["layer.weight"],
        {name.removeprefix(prefix): value for name, value in parts.items()},
        device="cpu",
    )
    # As one row: the AVX-512 kernel of bitsandbytes 0.50.2 takes another block's absmax where a
    # block crosses rows (kernel and `backends/default` differ on 3 x 96 weights, blocks of 64).
    shape, weight.quant_state.shape = (
        weight.quant_state.shape,
        (1, weight.quant_state.shape.numel()),
    )
    flat = bitsandbytes.functional.dequantize_4bit(weight, weight.quant_state)
    return flat.double().numpy().reshape(shape)


def layout_of(tensors, directory, **more):
    save_file(tensors, directory / "model.safetensors")
    return find(SETTINGS | more, stored_tensors(directory / "model.safetensors"))


def folded(tensors, directory, scale):
    """The stored tensors with a scale folded in."""
    layout = layout_of(tensors, directory)
    return merged_tensors(layout.tensors, layout.scaled("layer", scale))


def assert_scaled(tensors, merged, scale):
    """Equal to one rounding of the scale, and those of either side's products with it in float32.

    A weight of 4 bits is one product, one of 8 bits two: with SCB, then with 1 / 127.
    """
    roundings = 5 if "layer.SCB" in tensors else 3
    expected = dequantised(tensors) * scale[:, None]
    error = np.abs(dequantised(merged) - expected)
    assert np.all(error <= 1.01 * roundings * HALF_UNIT * np.abs(expected))
    assert merged["layer.weight"].dtype == tensors["layer.weight"].dtype
    assert merged["layer.weight"].numpy().tobytes() == tensors["layer.weight"].numpy().tobytes()


@st.composite
def weights_and_factors(draw, inputs):
    outputs = draw(st.integers(1, 9))
    seed = draw(st.integers(0, 2**32 - 1))
    weight = np.random.default_rng(seed).normal(0, 0.1, (outputs, draw(inputs)))
    factors = draw(arrays(np.float64, outputs, elements=FACTORS))
    return torch.from_numpy(weight.astype(np.float32)), factors


ROWS = st.sampled_from([64, 128, 192, 320])  # multiples of the block
CUT_ROWS = st.sampled_from([32, 96, 160, 224])  # of half a block
CROSSED = st.sampled_from([33, 48, 72, 100, 130])


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("layer")


@pytest.mark.parametrize("nested", [False, True], ids=["plain", "nested"])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@settings(max_examples=40, deadline=None)
@given(case=weights_and_factors(st.one_of(ROWS, CUT_ROWS)))
def test_4_bits_dequantise_to_the_scaled_weights(directory, kind, nested, case):
    weight, factors = case
    tensors = four_bits(weight, kind, nested)

    merged = folded(tensors, directory, factors)

    assert_scaled(tensors, merged, factors)


@settings(max_examples=60, deadline=None)
@given(case=weights_and_factors(st.integers(1, 200)))
def test_8_bits_dequantise_to_the_scaled_weights(directory, case):
    weight, factors = case
    tensors = eight_bits(weight)

    merged = folded(tensors, directory, factors)

    assert_scaled(tensors, merged, factors)
    assert torch.equal(merged["layer.weight_format"], tensors["layer.weight_format"])


@settings(max_examples=20, deadline=None)
@given(case=weights_and_factors(CROSSED), nested=st.booleans())
def test_blocks_that_cross_rows_are_refused_where_no_smaller_one_fits(directory, case, nested):
    weight, factors = case
    layout = layout_of(four_bits(weight, "nf4", nested), directory)

    with pytest.raises(BaseModelError, match="the least that bitsandbytes takes is 32"):
        layout.scaled("layer", factors)


def test_a_factor_of_one_changes_no_weight(directory):
    tensors = four_bits(torch.randn(7, 96), "nf4", nested=True)

    merged = folded(tensors, directory, np.ones(7))

    assert np.array_equal(dequantised(merged), dequantised(tensors))
    state = json.loads(bytes(merged["layer.weight.quant_state.bitsandbytes__nf4"].tolist()))
    assert state == {"quant_type": "nf4", "blocksize": 32, "dtype": "float32", "shape": [7, 96]}
    assert not any("nested" in name for name in merged)


def test_a_block_of_another_size_stays_as_it_is(directory):
    tensors = four_bits(torch.randn(5, 512), "nf4", nested=False, block=256)
    scale = np.array([1.5, -0.5, 0, 2, 1e3])

    merged = folded(tensors, directory, scale)

    assert merged["layer.weight.absmax"].shape == (10,)
    assert_scaled(tensors, merged, scale)


def test_weights_stored_as_bfloat16_keep_their_bytes(directory):
    torch.manual_seed(0)
    tensors = four_bits(torch.randn(4, 128), "nf4", nested=True, storage=torch.bfloat16)
    scale = np.array([1.5, -0.5, 0, 2])

    merged = folded(tensors, directory, scale)

    packed = merged["layer.weight"], tensors["layer.weight"]
    assert torch.equal(*(one.view(torch.uint8) for one in packed))
    expected = dequantised(tensors) * scale[:, None]
    np.testing.assert_allclose(dequantised(merged), expected, rtol=3 * HALF_UNIT)
    assert layout_of(tensors, directory).entry("layer", (1, 5))[0] == pytest.approx(
        dequantised(tensors)[1, 5], rel=HALF_UNIT
    )


@pytest.mark.parametrize(
    "kind", ["8", "nf4", "nf4-nested", "fp4", "fp4-nested"], ids=lambda kind: kind
)
def test_an_entry_is_what_bitsandbytes_dequantises(directory, kind):
    torch.manual_seed(1)
    weight = torch.randn(9, 74) * torch.rand(9, 1)
    nested = kind.endswith("nested")
    tensors = eight_bits(weight) if kind == "8" else four_bits(weight, kind[:3], nested)
    layout, judged = layout_of(tensors, directory), dequantised(tensors)

    for place in np.ndindex(9, 74):
        value, step = layout.entry("layer", place)

        assert value == pytest.approx(judged[place], rel=2.0**-22)
        assert abs(value - weight[place].item()) <= step


@pytest.mark.parametrize("change", [lambda s: s[::-1], lambda s: np.abs(s), lambda s: s * 1.000001])
@pytest.mark.parametrize("kind", ["8", "nf4"])
def test_another_scale_is_seen(directory, kind, change):
    torch.manual_seed(2)
    weight = torch.randn(4, 64)
    tensors = eight_bits(weight) if kind == "8" else four_bits(weight, kind, nested=True)
    scale = np.array([1.5, -0.5, 0.25, 2.0])

    merged = folded(tensors, directory, change(scale))

    with pytest.raises(AssertionError):
        assert_scaled(tensors, merged, scale)


@pytest.mark.parametrize("factor", [1e39, 1e300, 1e-40, 1e-300])
@pytest.mark.parametrize("kind", ["8", "nf4"])
def test_a_product_beyond_float32_names_channel_and_block(directory, kind, factor):
    weight = torch.ones(3, 128)
    tensors = eight_bits(weight) if kind == "8" else four_bits(weight, kind, nested=False)
    layout = layout_of(tensors, directory)
    place = "channel 1" if kind == "8" else "channel 1, group 0"

    with pytest.raises(AdapterError, match=f"^layer: .* of {place} becomes .* range of float32"):
        layout.scaled("layer", np.array([1.0, factor, 1.0]))


def test_weights_that_float16_cannot_hold_are_refused(directory):
    layout = layout_of(four_bits(torch.ones(3, 64).half(), "nf4", nested=False), directory)

    layout.scaled("layer", np.array([1.0, 65504.0, -65504.0]))
    with pytest.raises(AdapterError, match=r"channel 2, group 0: its weights are up to 6\.6e\+04"):
        layout.scaled("layer", np.array([1.0, 1.0, -66000.0]))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("layer.weight.absmax", torch.ones(7), r"has absmax \[7\], expected \[6\]"),
        ("layer.weight.quant_state.bitsandbytes__nf4", torch.zeros(3).byte(), "is no JSON"),
        ("layer.weight.quant_state.bitsandbytes__fp4", torch.zeros(3).byte(), "has 2 quant_state"),
    ],
)
def test_a_damaged_weight_is_refused(directory, name, value, message):
    tensors = four_bits(torch.ones(3, 128), "nf4", nested=False) | {name: value}

    with pytest.raises(BaseModelError, match=message):
        layout_of(tensors, directory).scaled("layer", np.ones(3))


def test_int8_weights_in_tiles_are_refused(directory):
    tensors = eight_bits(torch.ones(3, 64)) | {"layer.weight_format": torch.tensor(2).byte()}

    with pytest.raises(BaseModelError, match="are in tiles"):
        layout_of(tensors, directory).scaled("layer", np.ones(3))


def test_settings_say_that_nothing_is_nested_any_more(directory):
    given_settings = {"load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    layout = layout_of(eight_bits(torch.ones(3, 64)), directory, **given_settings)

    assert layout.settings() == SETTINGS | given_settings | {"bnb_4bit_use_double_quant": False}


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, True),
        ({"load_in_4bit": True}, True),
        ({"quant_method": "gptq"}, False),
        ({}, False),
    ],
)
def test_the_method_is_recognised_by_its_settings(found, expected):
    assert (find(found, {}) is not None) == expected


def test_only_quantised_modules_are_its_own(directory):
    tensors = eight_bits(torch.ones(3, 64)) | {"head.weight": torch.ones(3, 64)}
    tensors |= {
        name.replace("layer", "other"): value
        for name, value in four_bits(torch.ones(3, 64), "nf4", True).items()
    }
    layout = layout_of(tensors, directory)

    assert [layout.has(path) for path in ("layer", "other", "head", "none")] == [1, 1, 0, 0]
