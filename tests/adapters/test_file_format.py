"""What an adapter's files hold, exactly, and what has no such form."""

import json

import numpy as np
import pytest
from adapter_files import CONFIG, DENSE, QUERY, WEIGHTS
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import AdapterError


def test_the_file_format_is_exactly_this(tmp_path):
    adapter = Adapter(
        name="tiny",
        scales={"b": Scale(np.array([1.5, -2.0])), "a": Scale(np.array([0.5]))},
        biases={"b": np.array([0.25, 4.0], np.float32)},
        modules={"head.score.weight": np.array([[3.0, 5.0]], np.float16)},
        base="some/base",
        fingerprint=Fingerprint("float32", {"w": (0.5,) * 8}),
        task="text-classification",
        labels=("only",),
    )

    adapter.write(tmp_path)

    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "peft_type": "PROPULSION",
        "degree": 1,
        "target_modules": ["a", "b"],
        "train_bias": True,
        "modules_to_save": ["head.score"],
        "base_model_name_or_path": "some/base",
        "base_fingerprint": {"dtype": "float32", "entries": {"w": [0.5] * 8}},
        "labels": ["only"],
        "model_settings": None,
        "tokenizer_settings": None,
        "scaled_modules": 2,
        "task_type": "SEQ_CLS",
        "inference_mode": True,
    }
    content = (tmp_path / WEIGHTS).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert header == {
        "__metadata__": {"format": "pt"},
        "base_model.model.a.propulsion_z": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "base_model.model.b.propulsion_bias": {
            "dtype": "F32",
            "shape": [2],
            "data_offsets": [4, 12],
        },
        "base_model.model.b.propulsion_z": {
            "dtype": "F32",
            "shape": [2],
            "data_offsets": [12, 20],
        },
        "base_model.model.head.score.weight": {
            "dtype": "F16",
            "shape": [1, 2],
            "data_offsets": [20, 24],
        },
    }
    assert content[8 + length :].hex() == (
        "0000003f"  # a: 0.5
        "0000803e00008040"  # b's bias: 0.25, 4
        "0000c03f000000c0"  # b: 1.5, -2
        "00420045"  # the head: 3, 5 in float16
    )
    assert {path.name for path in tmp_path.iterdir()} == {CONFIG, WEIGHTS}


@settings(deadline=None, max_examples=40, derandomize=True)
@given(
    scales=st.dictionaries(
        st.from_regex(r"[a-z]{1,4}(\.[a-z0-9]{1,3}){0,2}", fullmatch=True),
        hnp.arrays(
            np.float64,
            st.integers(1, 5) | st.tuples(st.integers(1, 3), st.integers(1, 4)),  # or of experts
            elements=st.floats(-1e30, 1e30, allow_nan=False),
        ),
        min_size=1,
        max_size=4,
    ),
    labels=st.none() | st.lists(st.text(max_size=5), min_size=1, max_size=3),
    task=st.sampled_from([None, "text-classification", "token-classification"]),
)
def test_what_is_written_is_read_within_float32(tmp_path_factory, scales, labels, task):
    directory = tmp_path_factory.mktemp("adapter")
    adapter = Adapter(
        name=directory.name,
        scales={path: Scale(values) for path, values in scales.items()},
        labels=tuple(labels) if labels else None,
        task=task,
    )
    adapter.write(directory)

    again = Adapter.read(directory)

    assert set(again.scales) == set(scales)
    for path, values in scales.items():
        np.testing.assert_array_equal(
            again.scales[path].values, values.astype(np.float32).astype(np.float64)
        )
    assert (again.name, again.labels, again.task) == (adapter.name, adapter.labels, task)
    # The second time nothing is left to round.
    again.write(directory)
    assert Adapter.read(directory).digest == again.digest


def test_scales_of_experts_target_the_module_that_owns_the_weights(tmp_path):
    values = np.arange(1.0, 7.0).reshape(2, 3)
    weights = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    scales = {path: Scale(values) for path in weights} | {"mlp.up": Scale(values[0])}

    Adapter("tiny", scales).write(tmp_path)

    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["target_modules"] == ["mlp.experts", "mlp.up"]
    assert config["scaled_modules"] == 3
    again = Adapter.read(tmp_path)
    assert again.scales["mlp.experts.down_proj"].values.tolist() == values.tolist()
    assert again.size == 15


def test_arrays_are_written_as_they_read_and_not_as_they_lie(tmp_path):
    head = np.arange(6.0, dtype=np.float32).reshape(2, 3).T
    scales = np.array([1.0, 9.0, 2.0, 9.0, 3.0])[::2]
    Adapter("a", {QUERY: Scale(scales)}, modules={"head.weight": head}).write(tmp_path)

    again = Adapter.read(tmp_path)

    np.testing.assert_array_equal(again.scales[QUERY].values, [1, 2, 3])
    np.testing.assert_array_equal(again.modules["head.weight"], [[0, 3], [1, 4], [2, 5]])


def test_scales_of_inputs_have_no_propulsion_form(tmp_path):
    adapter = Adapter("a", {QUERY: Scale(np.ones(2)), DENSE: Scale(np.ones(2), "input")})

    with pytest.raises(AdapterError, match=f"^{DENSE}: scales the input"):
        adapter.write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_scales_beyond_float32_are_not_written(tmp_path):
    adapter = Adapter("a", {QUERY: Scale(np.array([1.0, 1e39]))})

    with pytest.raises(AdapterError, match=f"{QUERY}.*float32"):
        adapter.write(tmp_path)
    assert list(tmp_path.iterdir()) == []
