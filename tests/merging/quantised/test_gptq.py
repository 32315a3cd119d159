import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.merging.quantised import gptq
from propulsion_export.merging.quantised.layouts import find_layout
from quantised_checkpoints import (
    ROUNDING,
    gptq_dequantised,
    gptq_module,
    merged,
    named,
    of_module,
    packed,
    stored,
)

PROPERTY = settings(deadline=None, max_examples=40, derandomize=True)
SCALES = st.sampled_from([0.0, 1.0, -1.0, -0.3, 0.7, 1.9, 3.0])
SETTINGS = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": False}


def module_of(directory, seed, outputs, inputs, bits=4, **options):
    tensors, weight = gptq_module(
        np.random.default_rng(seed), outputs, inputs, bits=bits, **options
    )
    found = stored(directory, named("layer", tensors))
    return find_layout({**SETTINGS, "bits": bits}, found), found, weight


@PROPERTY
@given(
    st.integers(0, 2**32),
    st.integers(1, 3).map(lambda words: 32 * words),
    st.integers(1, 4).map(lambda groups: 32 * groups),
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    st.booleans(),
    st.data(),
)
def test_a_fold_multiplies_each_output_and_changes_no_integer(
    tmp_path_factory, seed, outputs, inputs, bits, dtype, act_order, data
):
    layout, found, _ = module_of(
        tmp_path_factory.mktemp("gptq"),
        seed,
        outputs,
        inputs,
        bits=bits,
        dtype=dtype,
        act_order=act_order,
    )
    scale = np.array(data.draw(st.lists(SCALES, min_size=outputs, max_size=outputs)))

    after = of_module("layer", merged(found, layout.scaled("layer", scale)))

    before = of_module("layer", merged(found, {}))
    expected = scale[:, None] * gptq_dequantised(before, bits)
    error = np.abs(gptq_dequantised(after, bits) - expected)
    assert (error <= ROUNDING[dtype] * np.abs(expected)).all()
    assert all(torch.equal(after[name], before[name]) for name in ("qweight", "qzeros", "g_idx"))
    assert after["scales"].dtype == dtype


@pytest.mark.parametrize("mistake", ["permuted", "inputs"])
def test_permuted_factors_and_the_wrong_axis_are_noticed(mistake, tmp_path):
    layout, found, _ = module_of(tmp_path, 0, 32, 32)
    scale = np.random.default_rng(1).uniform(0.5, 2, 32)
    before = gptq_dequantised(of_module("layer", merged(found, {})), 4)
    wrong = scale[::-1] if mistake == "permuted" else scale

    after = of_module("layer", merged(found, layout.scaled("layer", wrong)))

    along = scale[None, :] if mistake == "inputs" else scale[:, None]
    error = np.abs(gptq_dequantised(after, 4) - along * before)
    assert error.max() > 0.01 * np.abs(before).max()


def test_entries_are_the_dequantised_weights(tmp_path):
    for bits in (2, 3, 4, 8):
        layout, found, weight = module_of(tmp_path, 5, 32, 64, bits=bits, act_order=True)
        expected = gptq_dequantised(of_module("layer", merged(found, {})), bits)

        for place in [(0, 0), (3, 11), (31, 63), (10, 10), (21, 42)]:
            entry, step = layout.entry("layer", place)
            assert entry == pytest.approx(expected[place], abs=1e-12)
            assert abs(entry - weight[place]) <= step


def test_the_first_integer_is_in_the_lowest_bits():
    """AutoGPTQ: qweight[0] |= intweight[j] << (4 * j)."""
    (word,) = packed(np.array([[1, 2, 3, 4, 5, 6, 7, 0]]), 4)[0]

    assert hex(word) == "0x7654321"


def test_the_eleventh_of_three_bits_lies_in_two_words():
    values = np.zeros((1, 32), int)
    values[0, 10] = 0b101

    first, second, third = packed(values, 3)[0].view(np.uint32)

    assert (first >> 30, second & 1, third) == (0b01, 1, 0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"checkpoint_format": "marlin"}, "format marlin"),
        ({"bits": 5}, "GPTQ of 5 bits"),
        ({"dynamic": {"re:lm_head": {"bits": 8}}}, "other bits or groups"),
    ],
)
def test_other_forms_are_refused_by_name(changed, expected):
    with pytest.raises(BaseModelError, match=expected):
        gptq.find({**SETTINGS, **changed}, {})


def test_the_second_format_stores_zero_points_as_they_are():
    assert gptq.find({**SETTINGS, "checkpoint_format": "gptq_v2"}, {}).zero_offset == 0


@pytest.mark.parametrize("factor", [1e9, 1e-7])
def test_a_scale_beyond_its_dtype_is_refused_by_channel_and_group(factor, tmp_path):
    layout, _, _ = module_of(tmp_path, 0, 32, 32)
    scale = np.ones(32)
    scale[5] = factor

    with pytest.raises(AdapterError, match=r"layer: .*channel 5, group 0 .*range of float16"):
        layout.scaled("layer", scale)


def test_a_fold_of_ones_changes_nothing(tmp_path):
    layout, _, _ = module_of(tmp_path, 0, 32, 32)

    assert layout.scaled("layer", np.ones(32)) == {}
