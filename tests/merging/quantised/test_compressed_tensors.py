import numpy as np
import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from hypothesis import given, settings
from hypothesis import strategies as st

from compressed_modules import FORMS, FP4, config_of, quantised
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised.layouts import find_layout
from quantised_checkpoints import ROUNDING, merged, named, of_module, stored

PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)
SCALES = st.sampled_from([0.0, 1.0, -1.0, -0.3, 0.7, 1.9, 3.0])


def module_of(directory, form, seed, outputs, inputs, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    tensors, scheme = quantised(form, weight, dtype)
    found = stored(directory, named("layer", tensors))
    return find_layout(config_of(scheme), found), found, weight


def dequantised(tensors, config):
    """The library's dequantised weights, its scales in float64 so that it does not round again."""
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    state = dict(tensors)
    if state["weight_scale"].dtype != torch.uint8:
        state["weight_scale"] = state["weight_scale"].double()
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    return compressor.decompress(state, scheme)["weight"].double().numpy()


@PROPERTY
@given(
    st.sampled_from(sorted(FORMS)),
    st.integers(0, 2**32),
    st.integers(1, 14),
    st.integers(1, 5).map(lambda groups: 8 * groups),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    st.data(),
)
def test_a_fold_multiplies_each_output_and_changes_no_value(
    tmp_path_factory, form, seed, outputs, inputs, dtype, data
):
    directory = tmp_path_factory.mktemp("compressed")
    layout, found, _ = module_of(directory, form, seed, outputs, inputs, dtype)
    scale = np.array(data.draw(st.lists(SCALES, min_size=outputs, max_size=outputs)))

    after = of_module("layer", merged(found, layout.scaled("layer", scale)))

    before = of_module("layer", merged(found, {}))
    assert {name: value.dtype for name, value in after.items()} == {
        name: value.dtype for name, value in before.items()
    }
    for name in ("weight", "weight_packed", "weight_shape", "weight_g_idx"):
        if name in before:
            assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
    expected = scale[:, None] * dequantised(before, layout.config)
    error = np.abs(dequantised(after, layout.settings()) - expected)
    assert (error <= ROUNDING[dtype] * np.abs(expected)).all()


@pytest.mark.parametrize("form", sorted(FORMS))
def test_permuted_factors_and_the_wrong_axis_are_noticed(form, tmp_path):
    layout, found, _ = module_of(tmp_path, form, 0, 16, 16)
    scale = np.random.default_rng(1).uniform(0.5, 2, 16)
    before = dequantised(of_module("layer", merged(found, {})), layout.config)

    right, permuted = (
        dequantised(
            of_module("layer", merged(found, layout.scaled("layer", each))), layout.settings()
        )
        for each in (scale, scale[::-1])
    )

    largest = np.abs(before).max()
    assert np.abs(permuted - scale[:, None] * before).max() > 0.01 * largest
    assert np.abs(right - scale[None, :] * before).max() > 0.01 * largest


@pytest.mark.parametrize("form", sorted(FORMS | FP4))
def test_entries_are_the_dequantised_weights(form, tmp_path):
    layout, found, weight = module_of(tmp_path, form, 5, 13, 64)
    expected = dequantised(of_module("layer", merged(found, {})), layout.config)

    for place in [(0, 0), (1, 9), (6, 17), (12, 63), (10, 10), (3, 41)]:
        entry, step = layout.entry("layer", place)
        # The library computes nvfp4 in bfloat16.
        assert entry == pytest.approx(expected[place], rel=2**-7 if form == "nvfp4" else 1e-6)
        assert abs(entry - weight[place]) <= step


@pytest.mark.parametrize("form", ["int8-tensor", "fp8-tensor", "int4-tensor", "fp8-block"])
def test_rows_that_shared_a_scale_have_their_own_in_every_module(form, tmp_path):
    layout, found, _ = module_of(tmp_path, form, 0, 12, 16)

    after = of_module("layer", merged(found, layout.unscaled("layer")))

    before = of_module("layer", merged(found, {}))
    assert after["weight_scale"].shape == (12, 2 if form == "fp8-block" else 1)
    same = dequantised(after, layout.settings()) == dequantised(before, layout.config)
    assert same.all()


@pytest.mark.parametrize("form", ["int8-channel", "int4-group"])
def test_a_module_with_scales_of_its_own_is_left_alone(form, tmp_path):
    layout, _, _ = module_of(tmp_path, form, 0, 12, 16)

    assert layout.unscaled("layer") == {}
    assert layout.scaled("layer", np.ones(12)) == {}
    assert layout.settings() == layout.config


@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_scales_of_few_values_take_what_they_hold_exactly(form, tmp_path):
    layout, found, _ = module_of(tmp_path, form, 0, 4, 64)
    factors = np.array([0.5, 0.5, 1, 0.25])

    after = of_module("layer", merged(found, layout.scaled("layer", factors)))

    before = of_module("layer", merged(found, {}))
    expected = dequantised(before, layout.config) * factors[:, None]
    assert (dequantised(after, layout.settings()) == expected).all()
    assert after["weight_scale"].dtype == before["weight_scale"].dtype


@pytest.mark.parametrize(("form", "factor"), [("nvfp4", 1.1), ("nvfp4", -1), ("mxfp4", 0.7)])
def test_scales_of_few_values_refuse_the_rest(form, factor, tmp_path):
    layout, _, _ = module_of(tmp_path, form, 0, 4, 64)

    with pytest.raises(BaseModelError, match=r"layer: .*cannot hold exactly"):
        layout.scaled("layer", np.full(4, factor))


@pytest.mark.parametrize("factor", [1e9, 1e-7])
def test_a_scale_beyond_its_dtype_is_refused_by_channel_and_group(factor, tmp_path):
    layout, _, _ = module_of(tmp_path, "int4-group", 0, 8, 32, torch.float16)
    scale = np.ones(8)
    scale[3] = factor

    with pytest.raises(AdapterError, match=r"layer: .*channel 3, group 0 .*range of float16"):
        layout.scaled("layer", scale)


def test_one_packed_zero_point_for_a_matrix_is_refused(tmp_path):
    layout, found, _ = module_of(tmp_path, "int4-tensor", 0, 8, 32)
    layout.config["config_groups"]["group_0"]["weights"]["symmetric"] = False

    with pytest.raises(BaseModelError, match="one packed zero point"):
        find_layout(layout.config, found).scaled("layer", np.ones(8))


@pytest.mark.parametrize(
    "changed",
    [{"quantization_status": "frozen"}, {"sparsity_config": {"format": "sparse-bitmask"}}],
)
def test_weights_that_are_not_dense_and_compressed_are_refused(changed):
    config = {"quant_method": "compressed-tensors", **changed}

    with pytest.raises(BaseModelError, match="expected dense and compressed"):
        find_layout(config, {})
