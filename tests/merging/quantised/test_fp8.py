from types import SimpleNamespace

import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.fp8block_dequantizer import (
    FP8BlockDequantizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised import fp8
from propulsion_export.merging.quantised.layouts import find_layout
from quantised_checkpoints import ROUNDING, fp8_module, merged, named, of_module, stored

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
SCALES = st.sampled_from([0.0, 1.0, -1.0, -0.3, 0.7, 1.9, 3.0])
BLOCK = (4, 8)


def dequantised(tensors, block):
    """Values times scales in float64, both spread by compressed-tensors' reader of this layout."""
    reader = FP8BlockDequantizer(weight_block_size=block, dtype=torch.float64)
    ones = torch.ones_like(tensors["weight_scale_inv"].float())
    values = reader._create_dequantized_weight(tensors["weight"], ones)
    everywhere = torch.ones_like(tensors["weight"].float()).to(torch.float8_e4m3fn)
    scales = reader._create_dequantized_weight(everywhere, tensors["weight_scale_inv"])
    return (values * scales).numpy()


def module_of(directory, seed, outputs, inputs, **options):
    tensors, weight = fp8_module(np.random.default_rng(seed), outputs, inputs, **options)
    found = stored(directory, named("layer", tensors))
    config = {"quant_method": "fp8", "weight_block_size": list(BLOCK)}
    return find_layout(config, found), found, weight


@PROPERTY
@given(
    st.integers(0, 2**32),
    st.integers(1, 13),
    st.integers(1, 30),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.data(),
)
def test_every_row_gets_scales_of_its_own_and_the_values_stay(
    tmp_path_factory, seed, outputs, inputs, scale_dtype, data
):
    layout, found, _ = module_of(
        tmp_path_factory.mktemp("fp8"), seed, outputs, inputs, scale_dtype=scale_dtype
    )
    scale = np.array(data.draw(st.lists(SCALES, min_size=outputs, max_size=outputs)))

    after = of_module("layer", merged(found, layout.scaled("layer", scale)))

    before = of_module("layer", merged(found, {}))
    expected = scale[:, None] * dequantised(before, BLOCK)
    error = np.abs(dequantised(after, (1, BLOCK[1])) - expected)
    assert (error <= ROUNDING[torch.float32] * np.abs(expected)).all()
    assert torch.equal(after["weight"].view(torch.uint8), before["weight"].view(torch.uint8))
    assert after["weight_scale_inv"].dtype == torch.float32


def test_transformers_reads_the_finer_blocks_as_the_coarse_ones(tmp_path):
    layout, found, _ = module_of(tmp_path, 3, 12, 16)
    scale = np.array([-2.0, 0.5, 0.0] * 4)
    loader = Fp8Dequantize(SimpleNamespace())

    both = [merged(found, changes) for changes in ({}, layout.scaled("layer", scale))]
    before, after = (
        loader._dequantize_one(each["layer.weight"], each["layer.weight_scale_inv"])
        for each in both
    )

    expected = before * torch.tensor(scale)[:, None].float()
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=0)


def test_permuted_factors_are_noticed(tmp_path):
    layout, found, _ = module_of(tmp_path, 0, 12, 16)
    scale = np.random.default_rng(1).uniform(0.5, 2, 12)
    before = dequantised(of_module("layer", merged(found, {})), BLOCK)

    after = of_module("layer", merged(found, layout.scaled("layer", scale[::-1])))

    error = np.abs(dequantised(after, (1, 8)) - scale[:, None] * before)
    assert error.max() > 0.01 * np.abs(before).max()


def test_a_module_that_is_not_scaled_gets_the_finer_blocks_too(tmp_path):
    layout, found, _ = module_of(tmp_path, 0, 10, 16)

    after = of_module("layer", merged(found, layout.unscaled("layer")))

    before = of_module("layer", merged(found, {}))
    assert after["weight_scale_inv"].shape == (10, 2)
    assert (dequantised(after, (1, 8)) == dequantised(before, BLOCK)).all()
    assert layout.settings()["weight_block_size"] == [1, 8]
    assert layout.settings()["dequantize"] is True


def test_exponents_as_scales_become_float32(tmp_path):
    layout, found, _ = module_of(tmp_path, 0, 8, 16, scale_dtype=torch.float8_e8m0fnu)

    after = of_module("layer", merged(found, layout.scaled("layer", np.full(8, -0.3))))

    assert after["weight_scale_inv"].dtype == torch.float32
    assert (after["weight_scale_inv"] < 0).all()
    assert layout.settings()["scale_fmt"] == "float"


def test_entries_are_the_dequantised_weights(tmp_path):
    layout, found, weight = module_of(tmp_path, 5, 11, 21)
    expected = dequantised(of_module("layer", merged(found, {})), BLOCK)

    for place in [(0, 0), (1, 9), (6, 17), (10, 20)]:
        entry, step = layout.entry("layer", place)
        assert entry == pytest.approx(expected[place], rel=1e-12)
        assert abs(entry - weight[place]) <= step


def test_one_scale_for_a_matrix_is_refused():
    with pytest.raises(BaseModelError, match="one scale for each matrix"):
        fp8.find({"quant_method": "fp8", "weight_block_size": None}, {})


def test_scales_of_another_shape_are_refused(tmp_path):
    tensors, _ = fp8_module(np.random.default_rng(0), 8, 16, block=(8, 8))
    found = stored(tmp_path, named("layer", tensors))
    layout = find_layout({"quant_method": "fp8", "weight_block_size": [4, 8]}, found)

    with pytest.raises(BaseModelError, match=r"shape \[1, 2\], expected \[2, 2\]"):
        layout.scaled("layer", np.ones(8))


def test_a_scale_beyond_float32_is_refused(tmp_path):
    layout, _, _ = module_of(tmp_path, 0, 8, 16)

    with pytest.raises(AdapterError, match=r"channel 0, group 0 becomes .* range of float32"):
        layout.scaled("layer", np.full(8, 1e-40))
