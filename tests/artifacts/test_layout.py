import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.layout import (
    check_range,
    labels_in,
    pack,
    plan_layout,
)
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.tensor_names import BIASES_INPUT, MODULES_INPUT, SCALES_INPUT
from propulsion_export.errors import AdapterError, UsageError

ORDER = ["b.up", "a.down", "c", "head.weight", "head.bias", "temperature"]
LABELS = ("head.weight", "head.bias")
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
# The largest relative error of rounding to nearest, for numbers in the normal range.
ROUNDOFF = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def scales(**values):
    return {
        path.replace("_", "."): Scale(np.array(numbers, np.float64))
        for path, numbers in values.items()
    }


def head(labels, hidden=2, start=1.0):
    weight = np.arange(start, start + labels * hidden, dtype=np.float32).reshape(labels, hidden)
    return {"head.weight": weight, "head.bias": np.full(labels, 7.0, np.float32)}


def defaults_of(layout, dtype=np.float32):
    return {
        packed: np.arange(100, 100 + sum(slot.length for slot in slots)).astype(dtype)
        for packed, slots in layout.items()
    }


def unpacked(layout, feeds):
    return {
        (packed, slot.path, slot.side): feeds[packed][
            slot.offset : slot.offset + slot.length
        ].reshape(slot.shape)
        for packed, slots in layout.items()
        for slot in slots
    }


# Planning


def test_slots_follow_the_models_order_without_gaps():
    adapter = Adapter(
        "a",
        scales(c=[1.0], a_down=[1, 2, 3], b_up=[4, 5]),
        biases={"c": np.ones(1), "b.up": np.ones(2)},
        modules=head(3),
    )

    layout = plan_layout([adapter], ORDER, LABELS)

    assert layout == {
        SCALES_INPUT: (
            Slot("b.up", 0, 2, (2,)),
            Slot("a.down", 2, 3, (3,)),
            Slot("c", 5, 1, (1,)),
        ),
        BIASES_INPUT: (Slot("b.up", 0, 2, (2,)), Slot("c", 2, 1, (1,))),
        MODULES_INPUT: (Slot("head.weight", 0, 6, (3, 2)), Slot("head.bias", 6, 3, (3,))),
    }


def test_the_layout_is_the_union_of_all_adapters_in_any_order():
    one = Adapter("one", scales(c=[1.0, 2.0]), biases={"c": np.ones(2)})
    two = Adapter("two", scales(b_up=[3.0], c=[4.0, 5.0]), modules=head(2))

    layout = plan_layout([one, two], ORDER, LABELS)

    assert layout == plan_layout([two, one], ORDER, LABELS)
    assert {packed: [slot.path for slot in slots] for packed, slots in layout.items()} == {
        SCALES_INPUT: ["b.up", "c"],
        BIASES_INPUT: ["c"],
        MODULES_INPUT: ["head.weight", "head.bias"],
    }


def test_inputs_that_no_adapter_needs_are_left_out():
    assert set(plan_layout([Adapter("a", scales(c=[2.0]))], ORDER)) == {SCALES_INPUT}


def test_the_two_sides_of_one_module_have_a_slot_each():
    one = Adapter("one", {"c": Scale(np.array([1.0, 2.0, 3.0]), "input")})
    two = Adapter("two", scales(c=[4.0, 5.0]))

    layout = plan_layout([two, one], ORDER)

    assert layout[SCALES_INPUT] == (
        Slot("c", 0, 3, (3,), "input"),
        Slot("c", 3, 2, (2,), "output"),
    )
    feeds = pack(two, layout, {SCALES_INPUT: np.ones(5, np.float32)})
    assert feeds[SCALES_INPUT].tolist() == [1, 1, 1, 4, 5]


@pytest.mark.parametrize("turned", [False, True])
def test_label_parameters_get_the_room_of_the_most_labels(turned):
    adapters = [
        Adapter("few", scales(c=[2.0]), modules=head(4)),
        Adapter("many", scales(c=[3.0]), modules=head(12)),
    ]

    layout = plan_layout(adapters[::-1] if turned else adapters, ORDER, LABELS)

    assert [slot.shape for slot in layout[MODULES_INPUT]] == [(12, 2), (12,)]


@pytest.mark.parametrize(
    ("one", "two", "match"),
    [
        (
            {"scales": scales(c=[1, 2])},
            {"scales": scales(c=[1, 2, 3])},
            r"two: c has shape \[3\], another adapter's \[2\]",
        ),
        (
            {"scales": scales(c=[1]), "biases": {"c": np.ones(1)}},
            {"scales": scales(b_up=[1]), "biases": {"c": np.ones(2)}},
            r"two: c has shape \[2\], another adapter's \[1\]",
        ),
        (
            {"scales": scales(c=[1]), "modules": head(3)},
            {"scales": scales(c=[1]), "modules": head(3, hidden=5)},
            r"two: head.weight has shape \[3, 5\], another adapter's \[3, 2\]",
        ),
        (
            {"scales": scales(c=[1]), "modules": {"head.bias": np.ones(3)}},
            {"scales": scales(c=[1]), "modules": {"head.bias": np.ones((3, 1))}},
            r"two: head.bias has shape \[3, 1\], another adapter's \[3\]",
        ),
        (
            {"scales": scales(c=[1]), "modules": {"temperature": np.ones(())}},
            {"scales": scales(c=[1]), "modules": {"temperature": np.ones(2)}},
            r"two: temperature has shape \[2\], another adapter's \[\]",
        ),
    ],
    ids=["scale", "bias", "head", "rank", "scalar"],
)
def test_adapters_of_different_shapes_are_refused(one, two, match):
    with pytest.raises(AdapterError, match=match):
        plan_layout([Adapter("one", **one), Adapter("two", **two)], ORDER, ["head.bias"])


def test_only_label_parameters_may_grow():
    adapters = [Adapter(str(n), scales(c=[2.0]), modules=head(n)) for n in (2, 3)]

    with pytest.raises(AdapterError, match=r"3: head.weight has shape \[3, 2\]"):
        plan_layout(adapters, ORDER)


def test_a_tensor_that_the_model_does_not_have_is_refused_by_name():
    adapter = Adapter("a", scales(c=[1], x=[1]), modules={"y.weight": np.ones(2)})

    with pytest.raises(AdapterError) as caught:
        plan_layout([adapter], ORDER)
    assert caught.value.findings == (
        "a: x is not in the base model",
        "a: y.weight is not in the base model",
    )


# Packing


def test_defaults_remain_where_an_adapter_says_nothing():
    wide = Adapter("wide", scales(a_down=[1, 2], b_up=[3], c=[4]), biases={"c": np.ones(1)})
    narrow = Adapter("narrow", scales(a_down=[0.5, -2.0]))
    layout = plan_layout([wide, narrow], ORDER)
    defaults = defaults_of(layout)

    feeds = pack(narrow, layout, defaults)

    assert feeds[SCALES_INPUT].tolist() == [100, 0.5, -2.0, 103]
    assert feeds[BIASES_INPUT].tolist() == [100]
    # The defaults themselves are still what they were.
    assert defaults[SCALES_INPUT].tolist() == [100, 101, 102, 103]


def test_four_labels_in_a_slot_for_twelve_leave_zeros():
    few = Adapter("few", scales(c=[2.0]), modules=head(4))
    many = Adapter("many", scales(c=[3.0]), modules=head(12))
    layout = plan_layout([few, many], ORDER, LABELS)

    feeds = unpacked(layout, pack(few, layout, defaults_of(layout)))

    weight = feeds[MODULES_INPUT, "head.weight", "output"]
    bias = feeds[MODULES_INPUT, "head.bias", "output"]
    np.testing.assert_array_equal(weight[:4], few.modules["head.weight"])
    np.testing.assert_array_equal(weight[4:], np.zeros((8, 2)))
    np.testing.assert_array_equal(bias, [7] * 4 + [0] * 8)


def test_a_saved_scalar_travels_too():
    adapter = Adapter("a", scales(c=[2.0]), modules={"temperature": np.array(0.25)})
    layout = plan_layout([adapter, replace(adapter, name="b")], ORDER)

    feeds = pack(adapter, layout, defaults_of(layout))

    assert layout[MODULES_INPUT] == (Slot("temperature", 0, 1, ()),)
    assert feeds[MODULES_INPUT].tolist() == [0.25]


def test_feeds_have_the_dtype_of_the_defaults():
    adapter = Adapter("a", scales(c=[1 / 3]))
    layout = plan_layout([adapter], ORDER)

    for name, dtype in DTYPES.items():
        feeds = pack(adapter, layout, defaults_of(layout, dtype))
        assert str(feeds[SCALES_INPUT].dtype) == name
        assert feeds[SCALES_INPUT][0] == np.asarray(1 / 3).astype(dtype)


def test_what_does_not_fit_is_refused_with_all_offenders():
    known = Adapter("known", scales(a_down=[1, 2], c=[3, 4]), modules=head(3))
    layout = plan_layout([known], ORDER, LABELS)
    adapter = Adapter(
        "new",
        scales(a_down=[1, 2, 3], b_up=[1], c=[9]),
        biases={"c": np.ones(1)},
        modules=head(4) | {"head.bias": np.ones((1, 1))},
    )

    with pytest.raises(AdapterError) as caught:
        pack(adapter, layout, defaults_of(layout))

    assert set(caught.value.findings) == {
        "new: a.down has shape [3], the artifact room for shape [2]",
        "new: b.up has shape [1], the artifact no slot for it",
        # Fewer scales than channels would leave the rest at zero.
        "new: c has shape [1], the artifact room for shape [2]",
        "new: c has shape [1], the artifact no slot for it",
        "new: head.weight has shape [4, 2], the artifact room for shape [3, 2]",
        "new: head.bias has shape [1, 1], the artifact room for shape [3]",
    }
    assert caught.value.remedy == "Export again with this adapter among those given by -a."


def test_a_bias_narrower_than_its_slot_is_refused():
    wide = Adapter("wide", scales(c=[1, 2]), biases={"c": np.ones(2)})
    layout = plan_layout([wide], ORDER)
    adapter = Adapter("narrow", scales(c=[1, 2]), biases={"c": np.ones(1)})

    with pytest.raises(AdapterError, match=r"narrow: c has shape \[1\].*room for shape \[2\]"):
        pack(adapter, layout, defaults_of(layout))


def test_the_other_side_of_a_module_has_no_slot():
    layout = plan_layout([Adapter("a", scales(c=[1, 2]))], ORDER)
    other = Adapter("b", {"c": Scale(np.array([1.0, 2.0]), "input")})

    with pytest.raises(AdapterError, match=r"b: c has shape \[2\], the artifact no slot for it"):
        pack(other, layout, defaults_of(layout))


@settings(deadline=None, max_examples=60, derandomize=True)
@given(data=st.data(), dtype=st.sampled_from(sorted(DTYPES)))
def test_unpacking_by_slots_gives_the_scales_within_rounding(data, dtype):
    numbers = st.floats(2.0**-10, 1000) | st.floats(-1000, -(2.0**-10)) | st.just(0.0)
    widths = data.draw(st.fixed_dictionaries({path: st.integers(1, 4) for path in ORDER[:3]}))
    adapters = []
    for name in ("one", "two", "three"):
        paths = data.draw(st.sets(st.sampled_from(ORDER[:3]), min_size=1))
        vectors = {
            path: Scale(
                np.array(data.draw(st.lists(numbers, min_size=widths[path], max_size=widths[path])))
            )
            for path in sorted(paths)
        }
        adapters.append(Adapter(name, vectors))
    layout = plan_layout(adapters, ORDER)
    slots = layout[SCALES_INPUT]
    total = sum(slot.length for slot in slots)
    covered = [index for slot in slots for index in range(slot.offset, slot.offset + slot.length)]
    defaults = {SCALES_INPUT: np.ones(total).astype(DTYPES[dtype])}

    assert covered == list(range(total))
    for adapter in adapters:
        found = unpacked(layout, pack(adapter, layout, defaults))
        for slot in slots:
            values = found[SCALES_INPUT, slot.path, "output"].astype(np.float64)
            if slot.path in adapter.scales:
                np.testing.assert_allclose(
                    values, adapter.scales[slot.path].values, rtol=ROUNDOFF[dtype], atol=0
                )
            else:
                np.testing.assert_array_equal(values, np.ones(slot.length))


# The range of a dtype


@pytest.mark.parametrize(
    ("dtype", "value", "becomes"),
    [
        ("float16", 65536.0, "6.554e+04 of channel 1 becomes inf"),
        ("float16", -1e6, "-1e+06 of channel 1 becomes -inf"),
        ("float16", 1e-9, "1e-09 of channel 1 becomes 0"),
        ("float16", 1e-7, "1e-07 of channel 1 becomes 1.192e-07"),
        ("float16", 2.0**-24 * 1.4, "8.345e-08 of channel 1 becomes 5.96e-08"),
        ("bfloat16", 1e39, "1e+39 of channel 1 becomes inf"),
        ("bfloat16", 1e-45, "1e-45 of channel 1 becomes 0"),
        ("bfloat16", 1.4e-40, "1.4e-40 of channel 1 becomes 1.837e-40"),
        ("float32", 1e39, "1e+39 of channel 1 becomes inf"),
        ("float32", 1e-50, "1e-50 of channel 1 becomes 0"),
        ("float32", 2e-45, "2e-45 of channel 1 becomes 1.401e-45"),
        ("float32", 5e-324, "4.941e-324 of channel 1 becomes 0"),
    ],
)
def test_a_scale_that_the_dtype_does_not_hold_is_refused(dtype, value, becomes):
    adapter = Adapter("a", scales(a_down=[1.5, value, 2.0], c=[3.0]))

    with pytest.raises(UsageError) as caught:
        check_range(adapter, dtype)

    assert caught.value.exit_code == 2
    assert caught.value.findings == (f"a.down: scale {becomes} in {dtype} (1 such channels)",)
    assert "--allow-range" in str(caught.value)


def test_the_worst_channel_of_every_module_is_named():
    adapter = Adapter("a", scales(a_down=[1e-7, 1.0, 1e9], c=[2.0], b_up=[1e-7, 1e-9]))

    with pytest.raises(UsageError) as caught:
        check_range(adapter, "float16")

    assert [
        re.match(r"(\S+): .* channel (\d)", text).groups() for text in caught.value.findings
    ] == [
        ("a.down", "2"),
        ("b.up", "1"),
    ]
    assert all(text.endswith("(2 such channels)") for text in caught.value.findings)


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_zero_and_ordinary_scales_fit_every_dtype(dtype):
    values = [0.0, -0.0, 1.0, 1 / 3, -2.7, 1e-3, 6e4, 2.0**-14]

    check_range(Adapter("a", scales(a_down=values, c=[0.0])), dtype)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(
    st.sampled_from(sorted(DTYPES)),
    st.floats(2.0**-14, 65000) | st.floats(-65000, -(2.0**-14)),
)
def test_plain_rounding_is_never_refused(dtype, value):
    check_range(Adapter("a", scales(c=[value])), dtype)


def test_out_of_range_scales_that_were_accepted_are_packed_as_the_dtype_has_them():
    adapter = Adapter("a", scales(c=[1e9, 1e-12]))
    layout = plan_layout([adapter], ORDER)

    feeds = pack(adapter, layout, {SCALES_INPUT: np.ones(2, np.float16)})

    assert feeds[SCALES_INPUT].tolist() == [np.inf, 0.0]


# Experts


def test_a_scale_of_experts_is_packed_expert_by_expert():
    adapter = Adapter("a", scales(a_down=[[1, 2, 3], [4, 5, 6]], c=[7.0]))
    layout = plan_layout([adapter], ORDER)

    assert layout[SCALES_INPUT] == (Slot("a.down", 0, 6, (2, 3)), Slot("c", 6, 1, (1,)))
    packed = pack(adapter, layout, defaults_of(layout))[SCALES_INPUT]
    assert packed.tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_a_scale_of_other_experts_has_no_room():
    layout = plan_layout([Adapter("a", scales(a_down=[[1, 2, 3], [4, 5, 6]]))], ORDER)
    other = Adapter("b", scales(a_down=[[1, 2], [3, 4], [5, 6]]))

    with pytest.raises(AdapterError, match=r"a\.down has shape \[3, 2\], the artifact room for"):
        pack(other, layout, defaults_of(layout))


def test_a_scale_beyond_the_dtype_is_told_by_expert_and_channel():
    adapter = Adapter("a", scales(a_down=[[1, 1, 1], [1, 70000, 1e6]]))

    with pytest.raises(UsageError, match=r"a\.down: scale 7e\+04 of channel 1 of expert 1.*2 such"):
        check_range(adapter, "float16")


def test_a_head_with_fewer_rows_than_the_room_has_labels_though_nobody_named_them():
    wide, narrow = (
        Adapter(name, {}, modules=head(count)) for name, count in (("wide", 5), ("narrow", 2))
    )
    layout = plan_layout([wide, narrow], ORDER, {"head.weight", "head.bias"})

    assert labels_in(narrow, layout, ("no", "yes")) == ("LABEL_0", "LABEL_1")
    assert labels_in(wide, layout, ("no", "yes")) is None
    assert labels_in(narrow, layout, ("no", "yes"), 5) == ("no", "yes")
    assert labels_in(wide, layout, ("no", "yes"), 5) is None
    assert labels_in(wide, layout, tuple("abcde"), 5) == tuple("abcde")
    assert labels_in(replace(narrow, labels=("a", "b")), layout, None) == ("a", "b")
    assert labels_in(Adapter("headless", {}), layout, ("no", "yes")) == ("no", "yes")
