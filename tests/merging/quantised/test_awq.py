import numpy as np
import pytest
import torch
from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised import awq
from propulsion_export.merging.quantised.layouts import find_layout
from quantised_checkpoints import ROUNDING, awq_module, merged, named, of_module, stored

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
SCALES = st.sampled_from([0.0, 1.0, -1.0, -0.3, 0.7, 1.9, 3.0])
SETTINGS = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}


def dequantised(tensors, group):
    """The weights [outputs, inputs] in float64, read by compressed-tensors' own converter."""
    weight, scale, zero = AutoAWQConverter(group_size=group)._convert_gemm_module(
        tensors["qweight"], tensors["scales"].double(), tensors["qzeros"]
    )
    spread = [each.double().repeat_interleave(group, 1) for each in (scale, zero)]
    return ((weight.double() - spread[1]) * spread[0]).numpy()


def module_of(directory, seed, outputs, inputs, group=8, **options):
    rng = np.random.default_rng(seed)
    tensors, weight = awq_module(rng, outputs, inputs, group=group, **options)
    found = stored(directory, named("layer", tensors))
    return find_layout({**SETTINGS, "group_size": group}, found), found, weight


@PROPERTY
@given(
    st.integers(0, 2**32),
    st.integers(1, 5).map(lambda words: 8 * words),
    st.sampled_from([8, 16]),
    st.integers(1, 4),
    st.sampled_from([torch.float16, torch.bfloat16]),
    st.data(),
)
def test_a_fold_multiplies_each_output_and_changes_no_integer(
    tmp_path_factory, seed, outputs, group, groups, dtype, data
):
    layout, found, _ = module_of(
        tmp_path_factory.mktemp("awq"), seed, outputs, group * groups, group, dtype=dtype
    )
    scale = np.array(data.draw(st.lists(SCALES, min_size=outputs, max_size=outputs)))

    after = of_module("layer", merged(found, layout.scaled("layer", scale)))

    before = of_module("layer", merged(found, {}))
    expected = scale[:, None] * dequantised(before, group)
    error = np.abs(dequantised(after, group) - expected)
    assert (error <= ROUNDING[dtype] * np.abs(expected)).all()
    assert torch.equal(after["qweight"], before["qweight"])
    assert torch.equal(after["qzeros"], before["qzeros"])


@pytest.mark.parametrize("mistake", ["permuted", "packed order", "inputs"])
def test_permuted_factors_and_the_wrong_axis_are_noticed(mistake, tmp_path):
    layout, found, _ = module_of(tmp_path, 0, 32, 32)
    scale = np.random.default_rng(1).uniform(0.5, 2, 32)
    order = {"permuted": np.arange(32)[::-1], "packed order": np.arange(32).reshape(4, 8)}
    wrong = scale
    if mistake == "permuted":
        wrong = scale[order[mistake]]
    elif mistake == "packed order":
        wrong = scale[order[mistake][:, [0, 2, 4, 6, 1, 3, 5, 7]].reshape(-1)]
    before = dequantised(of_module("layer", merged(found, {})), 8)

    after = of_module("layer", merged(found, layout.scaled("layer", wrong)))

    along = scale[None, :] if mistake == "inputs" else scale[:, None]
    error = np.abs(dequantised(after, 8) - along * before)
    assert error.max() > 0.01 * np.abs(before).max()


def test_entries_are_the_dequantised_weights(tmp_path):
    layout, found, weight = module_of(tmp_path, 5, 24, 32)
    expected = dequantised(of_module("layer", merged(found, {})), 8)

    for place in [(0, 0), (1, 9), (6, 17), (23, 31), (10, 10)]:
        entry, step = layout.entry("layer", place)
        assert entry == pytest.approx(expected[place], abs=1e-12)
        assert abs(entry - weight[place]) <= step


def test_other_versions_are_refused_by_name():
    with pytest.raises(BaseModelError, match="version gemv, expected 4 bits, version gemm"):
        awq.find({**SETTINGS, "version": "GEMV"}, {})


def test_a_scale_beyond_its_dtype_is_refused_by_channel_and_group(tmp_path):
    layout, _, _ = module_of(tmp_path, 0, 32, 32)

    with pytest.raises(AdapterError, match="channel 0, group 0 becomes"):
        layout.scaled("layer", np.full(32, 1e-7))
