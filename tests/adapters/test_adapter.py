import hashlib
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from peft import IA3Config, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file
from torch import nn

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.errors import AdapterError

PREFIX = "base_model.model."
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
QUERY, DENSE = "encoder.0.query", "encoder.0.dense"
Z = {
    QUERY: np.array([1.5, -0.5, 2.0], np.float32),
    DENSE: np.array([0.25, 3.0], np.float32),
}
CONFIGURATION = {
    "peft_type": "PROPULSION",
    "degree": 3,
    "base_model_name_or_path": "some/base",
    "task_type": "SEQ_CLS",
    "labels": ["no", "yes"],
    "base_fingerprint": {"dtype": "float32", "entries": {"weight": [0.5] * 8}},
}


def tensors_of(vectors=Z, suffix="propulsion_z"):
    return {f"{PREFIX}{path}.{suffix}": values for path, values in vectors.items()}


def write(directory, config=(), tensors=None):
    """A PEFT directory by hand."""
    directory.mkdir(exist_ok=True)
    (directory / CONFIG).write_text(json.dumps(CONFIGURATION | dict(config)))
    save_file(tensors_of() if tensors is None else tensors, directory / WEIGHTS)
    return directory


def refused(directory, match):
    """Reading gives one line with exit code 4, whose text matches."""
    with pytest.raises(AdapterError, match=match) as caught:
        Adapter.read(directory)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(directory) in str(caught.value) or "vector below zero" in str(caught.value)


# Propulsion


def test_a_propulsion_directory_is_read_as_effective_scales(tmp_path):
    tensors = tensors_of() | {
        f"{PREFIX}{QUERY}.propulsion_bias": np.array([0.1, 0.2, -0.3], np.float32),
        f"{PREFIX}classifier.weight": np.array([[1.0, 2.0], [3.0, 4.0]], np.float16),
        f"{PREFIX}embeddings.base_layer.weight": np.ones((2, 2), np.float32),
    }

    adapter = Adapter.read(write(tmp_path / "topic", tensors=tensors))

    assert adapter.name == "topic"
    assert set(adapter.scales) == {QUERY, DENSE}
    np.testing.assert_array_equal(adapter.scales[QUERY].values, [3.375, -0.125, 8.0])
    np.testing.assert_array_equal(adapter.scales[DENSE].values, [1 / 64, 27.0])
    assert {scale.values.dtype for scale in adapter.scales.values()} == {np.dtype(np.float64)}
    assert {scale.side for scale in adapter.scales.values()} == {"output"}
    np.testing.assert_array_equal(adapter.biases[QUERY], np.array([0.1, 0.2, -0.3], np.float32))
    assert set(adapter.biases) == {QUERY}
    assert set(adapter.modules) == {"classifier.weight"}
    np.testing.assert_array_equal(adapter.modules["classifier.weight"], [[1, 2], [3, 4]])
    assert adapter.base == "some/base"
    assert adapter.task == "text-classification"
    assert adapter.labels == ("no", "yes")
    assert adapter.fingerprint == Fingerprint("float32", {"weight": (0.5,) * 8})
    assert adapter.size == 5


def test_the_power_is_taken_in_float64(tmp_path):
    z = np.array([1.1, 0.9, -1.07], np.float32)

    adapter = Adapter.read(write(tmp_path, {"degree": 15}, tensors_of({QUERY: z})))

    expected = [math.pow(float(value), 15) for value in z]
    np.testing.assert_allclose(adapter.scales[QUERY].values, expected, rtol=1e-15)
    assert (adapter.scales[QUERY].values != (z**15).astype(np.float64)).any()


def test_a_fractional_degree_of_positive_vectors_is_read(tmp_path):
    vectors = {QUERY: np.array([0.0, 4.0, 2.25], np.float32)}

    adapter = Adapter.read(write(tmp_path, {"degree": 0.5}, tensors_of(vectors)))

    np.testing.assert_array_equal(adapter.scales[QUERY].values, [0.0, 2.0, 1.5])


def test_what_the_directory_does_not_say_is_none(tmp_path):
    (tmp_path / CONFIG).write_text('{"peft_type": "PROPULSION", "degree": 2}')
    save_file(tensors_of(), tmp_path / WEIGHTS)

    adapter = Adapter.read(tmp_path, "mine")

    assert adapter.name == "mine"
    assert (adapter.base, adapter.task, adapter.labels, adapter.fingerprint) == (None,) * 4


def test_a_head_in_bfloat16_is_read(tmp_path):
    write(tmp_path)
    tensors = {key: torch.from_numpy(values) for key, values in tensors_of().items()}
    head = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    save_torch_file(tensors | {f"{PREFIX}classifier.weight": head}, tmp_path / WEIGHTS)

    values = Adapter.read(tmp_path).modules["classifier.weight"]

    np.testing.assert_array_equal(values.astype(np.float32), [[1.5, -2.0]])


# (IA)^3


class Tiny(nn.Module):
    """One module of each side, and a layer kind PEFT shapes its vectors for differently."""

    def __init__(self):
        super().__init__()
        self.attention = nn.Linear(4, 6)
        self.mlp = nn.Linear(6, 8)
        self.out = nn.Linear(8, 3)
        self.config = {"model_type": "custom"}

    def forward(self, inputs, scales=None):
        def module(name, values):
            scale = (scales or {}).get(name)
            ours = torch.from_numpy(scale.values).float() if scale else None
            if scale and scale.side == "input":
                values = values * ours
            values = getattr(self, name)(values)
            return values * ours if scale and scale.side == "output" else values

        return module("out", torch.tanh(module("mlp", torch.tanh(module("attention", inputs)))))


@pytest.mark.parametrize("feedforward", [["mlp", "out"], ["mlp"], "ml.", None], ids=str)
def test_an_ia3_adapter_of_peft_gives_pefts_outputs(tmp_path, feedforward):
    torch.manual_seed(0)
    base, inputs = Tiny(), torch.randn(5, 4)
    plain = base(inputs).detach()
    wanted = base.state_dict()
    config = IA3Config(
        target_modules=["attention", "mlp", "out"],
        feedforward_modules=feedforward or [],
        init_ia3_weights=False,
    )
    peft_model = get_peft_model(base, config)
    for name, parameter in peft_model.named_parameters():
        if "ia3_l" in name:
            nn.init.uniform_(parameter, 0.3, 2.0)
    expected = peft_model(inputs).detach()
    peft_model.save_pretrained(tmp_path)

    adapter = Adapter.read(tmp_path)

    other = Tiny()
    other.load_state_dict(wanted)
    torch.testing.assert_close(other(inputs, adapter.scales).detach(), expected)
    assert not torch.allclose(plain, expected, rtol=1e-2)
    inputs_of = {path for path, scale in adapter.scales.items() if scale.side == "input"}
    assert inputs_of == set(["mlp"] if feedforward == "ml." else feedforward or [])
    assert {path: scale.values.size for path, scale in adapter.scales.items()} == {
        "attention": 6,
        "mlp": 6 if "mlp" in inputs_of else 8,
        "out": 8 if "out" in inputs_of else 3,
    }


@pytest.mark.parametrize("shape", [(3,), (3, 1), (1, 3), (1, 3, 1, 1)], ids=str)
def test_ia3_vectors_of_every_layer_kind_are_flattened(tmp_path, shape):
    vectors = {QUERY: np.array([1.5, -2.0, 3.0], np.float32).reshape(shape)}
    write(tmp_path, {"peft_type": "IA3"}, tensors_of(vectors, "ia3_l"))

    scale = Adapter.read(tmp_path).scales[QUERY]

    np.testing.assert_array_equal(scale.values, [1.5, -2.0, 3.0])


# The file format


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


# Hostile and damaged directories


@pytest.mark.parametrize(
    ("config", "match"),
    [
        ({"peft_type": "LORA"}, "peft_type is 'LORA', expected 'PROPULSION' or 'IA3'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"peft_type": ["PROPULSION"]}, "peft_type is"),
        ({"peft_type": 10**4000}, "peft_type is a huge number"),
        ({"degree": 0}, "degree is 0, expected a positive number"),
        ({"degree": -2}, "degree is -2"),
        ({"degree": math.nan}, "degree is nan"),
        ({"degree": math.inf}, "degree is inf"),
        ({"degree": "15"}, "degree is '15'"),
        ({"degree": True}, "degree is True"),
        ({"degree": None}, "degree is None"),
        ({"degree": [3]}, r"degree is \[3\]"),
        ({"degree": 10**400}, "degree is a huge number"),
        ({"degree": 1e308}, "degree is 1e\\+308"),
        ({"degree": 5000}, f"{QUERY} holds a vector whose power 5000 overflows float64"),
        ({"degree": 2.5}, f"{QUERY}: a vector below zero has no real power 2.5"),
        ({"degree": 3.0000000001}, "a vector below zero has no real power"),
        ({"labels": "yes"}, "labels is not a list of names"),
        ({"labels": ["yes", 1]}, "labels is not a list of names"),
        ({"labels": {"0": "yes"}}, "labels is not a list of names"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path is 5, expected a name"),
        ({"base_model_name_or_path": ["a"]}, "base_model_name_or_path is"),
        ({"base_fingerprint": {}}, "base_fingerprint is damaged"),
        ({"base_fingerprint": []}, "base_fingerprint is damaged"),
        ({"base_fingerprint": "x"}, "base_fingerprint is damaged"),
        (
            {"base_fingerprint": {"dtype": "float32", "entries": {"w": [1.0]}}},
            "base_fingerprint is damaged",
        ),
        (
            {"base_fingerprint": {"dtype": "float32", "entries": {"w": [10**400] * 8}}},
            "base_fingerprint is damaged",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_an_invalid_configuration_is_refused(tmp_path, config, match):
    if "peft_type" in config and isinstance(config["peft_type"], int):
        write(tmp_path)
        (tmp_path / CONFIG).write_text('{"peft_type": 1' + "0" * 4000 + "}")
    else:
        write(tmp_path, config)

    refused(tmp_path, match)


@pytest.mark.parametrize("text", ["1" + "0" * 400, "1" + "0" * 5000, "1e999", "-1e999"])
def test_a_degree_that_no_float_holds_is_refused(tmp_path, text):
    write(tmp_path)
    (tmp_path / CONFIG).write_text('{"peft_type": "PROPULSION", "degree": ' + text + "}")

    refused(tmp_path, "degree is|is not valid JSON")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "is not valid JSON"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b'{"a": "\n"}', "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "holds a list, expected an object"),
        (b"null", "holds a NoneType, expected an object"),
        (b'"PROPULSION"', "holds a str"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_configuration_that_is_no_json_object_is_refused(tmp_path, content, match):
    write(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)

    refused(tmp_path, match)


@pytest.mark.parametrize(
    "prepare",
    [
        lambda directory: None,
        lambda directory: directory.mkdir(),
        lambda directory: directory.write_text("{}"),
        lambda directory: (directory / CONFIG).mkdir(parents=True),
    ],
    ids=["missing", "empty", "file", "folder"],
)
def test_a_directory_without_a_configuration_is_refused(tmp_path, prepare):
    prepare(tmp_path / "adapter")

    refused(tmp_path / "adapter", f"has no {CONFIG}")


def test_a_configuration_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    def read_text(self, **options):
        raise PermissionError(13, "Permission denied")

    write(tmp_path)
    monkeypatch.setattr(Path, "read_text", read_text)

    refused(tmp_path, r"cannot be read \(Permission denied\)")


def test_missing_weights_are_refused(tmp_path):
    (write(tmp_path) / WEIGHTS).unlink()

    refused(tmp_path, f"has no {WEIGHTS}\\.")


def test_a_pickle_is_not_opened(tmp_path):
    (write(tmp_path) / WEIGHTS).rename(tmp_path / "adapter_model.bin")

    refused(tmp_path, "only a pickle, which could run code and is not read")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:5],
        lambda content: content[:40],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"\xff" * 8 + content[8:],
        lambda content: bytes(len(content)),
        lambda content: b"\x80\x04K\x01." + content,
        lambda content: content.replace(b"F32", b"F99"),
    ],
    ids=["empty", "header", "json", "short", "long", "huge-header", "zeros", "pickle", "dtype"],
)
def test_damaged_weights_are_refused(tmp_path, damage):
    file = write(tmp_path) / WEIGHTS
    file.write_bytes(damage(file.read_bytes()))

    refused(tmp_path, "is truncated or damaged")


def test_a_dtype_that_numpy_does_not_have_is_refused(tmp_path):
    write(tmp_path)
    key = f"{PREFIX}{QUERY}.propulsion_z"
    save_torch_file({key: torch.ones(3).to(torch.float8_e4m3fn)}, tmp_path / WEIGHTS)

    refused(tmp_path, "holds a dtype that numpy does not have.*Save the adapter in float32")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({f"{PREFIX}{QUERY}.propulsion_z": [1, math.nan, 3]}, f"{QUERY} holds 1 entries that are"),
        ({f"{PREFIX}{QUERY}.propulsion_z": [math.inf, -math.inf]}, "holds 2 entries"),
        ({f"{PREFIX}{QUERY}.propulsion_z": [[[1, 2]]]}, r"shape \[1, 1, 2\], expected one dim"),
        ({f"{PREFIX}{QUERY}.propulsion_z": []}, r"has shape \[0\], expected one dimension"),
        ({f"{PREFIX}{QUERY}.propulsion_z": 3}, r"has shape \[\], expected one dimension"),
        ({f"{PREFIX}{QUERY}.propulsion_bias": [1, 2]}, r"bias of shape \[2\], expected \[3\]"),
        ({f"{PREFIX}{QUERY}.propulsion_bias": [[1, 2, 3]]}, r"bias of shape \[1, 3\]"),
        ({f"{PREFIX}other.propulsion_bias": [1]}, "other has a trained bias but no scale"),
        ({f"{PREFIX}{QUERY}.propulsion_bias": [1, 2, math.nan]}, "propulsion_bias holds 1 entries"),
        ({f"{PREFIX}classifier.weight": [[math.inf]]}, "classifier.weight holds 1 entries"),
        ({f"{QUERY}.propulsion_z": [1, 2, 3]}, f"has the key '{QUERY}.propulsion_z', expected"),
        ({"module.base_model.model.a.propulsion_z": [1]}, "expected one that starts with"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_impossible_tensors_are_refused(tmp_path, change, match):
    changed = {key: np.array(values, np.float32) for key, values in change.items()}

    refused(write(tmp_path, tensors=tensors_of() | changed), match)


def test_all_offenders_are_named_at_once(tmp_path):
    vectors = {QUERY: np.full(3, np.nan, np.float32), DENSE: np.full(2, np.inf, np.float32)}

    refused(write(tmp_path, tensors=tensors_of(vectors)), f"{DENSE} holds 2.*{QUERY} holds 3")


@pytest.mark.parametrize("tensors", [{}, {f"{PREFIX}classifier.weight": np.ones((2, 2))}])
def test_a_file_without_scales_is_refused(tmp_path, tensors):
    refused(write(tmp_path, tensors=tensors), "holds no scale, expected")


@pytest.mark.parametrize(
    ("feedforward", "match"),
    [
        (5, "feedforward_modules is not a list of names"),
        ([5], "feedforward_modules is not a list of names"),
        ({"a": 1}, "feedforward_modules is not a list of names"),
        ("(", "feedforward_modules is not a regular expression"),
    ],
)
def test_damaged_ia3_configurations_are_refused(tmp_path, feedforward, match):
    config = {"peft_type": "IA3", "feedforward_modules": feedforward}

    refused(write(tmp_path, config, tensors_of(suffix="ia3_l")), match)


@pytest.mark.parametrize("values", [[[1, 2], [3, 4]], [], [[1, math.nan]]], ids=str)
def test_damaged_ia3_vectors_are_refused(tmp_path, values):
    tensors = {f"{PREFIX}{QUERY}.ia3_l": np.array(values, np.float32)}

    refused(
        write(tmp_path, {"peft_type": "IA3"}, tensors), "expected one dimension|holds 1 entries"
    )


def test_messages_name_the_file_and_no_more_than_four_offenders(tmp_path):
    vectors = {f"layer.{index}": np.full(2, np.nan, np.float32) for index in range(9)}
    write(tmp_path, tensors=tensors_of(vectors))

    with pytest.raises(AdapterError) as caught:
        Adapter.read(tmp_path)
    assert len(caught.value.findings) == 9
    assert "and 5 more. The training diverged" in str(caught.value)
    assert str(caught.value).count(str(tmp_path / WEIGHTS)) == 4


# Digest and identity


def an_adapter(**changes):
    parts = {
        "name": "a",
        "scales": {QUERY: Scale(np.array([1.5, 2.0])), DENSE: Scale(np.array([0.5]))},
        "biases": {QUERY: np.array([1.0, 2.0], np.float32)},
        "modules": {"head.weight": np.array([[1.0, 2.0]], np.float32)},
    }
    return Adapter(**(parts | changes))


def test_the_digest_ignores_names_order_and_where_the_adapter_came_from():
    adapter = an_adapter()
    turned = dict(reversed(adapter.scales.items()))

    others = [
        replace(adapter, name="b"),
        an_adapter(scales=turned),
        an_adapter(base="x", task="text-classification", labels=("a",)),
        an_adapter(modules={"head.weight": np.array([[1.0, 2.0]], np.float64)}),
        an_adapter(modules={"head.weight": np.asfortranarray([[1.0, 2.0]])}),
    ]

    assert {other.digest for other in others} == {adapter.digest}
    assert re.fullmatch(r"sha256:[0-9a-f]{64}", adapter.digest)
    assert replace(adapter, name="b").name == "b"


@pytest.mark.parametrize(
    "changes",
    [
        {"scales": {QUERY: Scale(np.array([1.5, 2.0]))}},
        {"scales": {QUERY: Scale(np.array([1.5, 2.0])), DENSE: Scale(np.nextafter([0.5], 1))}},
        {"scales": {QUERY: Scale(np.array([1.5, 2.0])), DENSE: Scale(np.array([0.5]), "input")}},
        {"scales": {QUERY: Scale(np.array([2.0, 1.5])), DENSE: Scale(np.array([0.5]))}},
        {"scales": {QUERY: Scale(np.array([1.5, 2.0])), "other": Scale(np.array([0.5]))}},
        {"biases": {}},
        {"biases": {QUERY: np.array([1.0, 2.5])}},
        {"biases": {DENSE: np.array([1.0, 2.0])}},
        {"modules": {}},
        {"modules": {"head.weight": np.array([[1.0], [2.0]])}},
        {"modules": {"head.weight": np.array([[1.0, 2.5]])}},
        {"modules": {"head.bias": np.array([[1.0, 2.0]])}},
    ],
    ids=lambda value: str(value)[:70],
)
def test_the_digest_changes_with_whatever_changes_the_outputs(changes):
    assert an_adapter(**changes).digest != an_adapter().digest


def test_the_digest_is_computed_once(monkeypatch):
    adapter = an_adapter()
    first = adapter.digest
    monkeypatch.setattr(hashlib, "sha256", None)

    assert adapter.digest == first


def test_the_digest_is_the_one_recorded_before():
    """Artifacts in the field hold digests: how they are made must not change."""
    content = (
        b"scale encoder.0.dense output (1,)\n"
        + np.array([0.5]).tobytes()
        + b"scale encoder.0.query output (2,)\n"
        + np.array([1.5, 2.0]).tobytes()
        + b"bias encoder.0.query  (2,)\n"
        + np.array([1.0, 2.0]).tobytes()
        + b"module head.weight  (1, 2)\n"
        + np.array([1.0, 2.0]).tobytes()
    )

    assert an_adapter().digest == f"sha256:{hashlib.sha256(content).hexdigest()}"


def test_only_an_adapter_that_changes_nothing_is_the_identity():
    ones = {QUERY: Scale(np.ones(2)), DENSE: Scale(np.ones(1), "input")}

    assert an_adapter(scales=ones, biases={}, modules={}).is_identity()
    assert not an_adapter(scales=ones, modules={}).is_identity()
    # A head alone is none of the method's doing.
    assert an_adapter(scales=ones, biases={}).is_identity()
    nearly = ones | {DENSE: Scale(np.nextafter([1.0], 2))}
    assert not an_adapter(scales=nearly, biases={}, modules={}).is_identity()


def test_reading_changes_nothing_on_disk(tmp_path):
    before = {path.name: path.read_bytes() for path in write(tmp_path).iterdir()}

    Adapter.read(tmp_path)

    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert set(load_file(tmp_path / WEIGHTS)) == set(tensors_of())


def test_a_lost_vector_is_noticed(tmp_path):
    an_adapter().write(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights[f"base_model.model.{DENSE}.propulsion_z"]
    save_file(weights, tmp_path / WEIGHTS)

    with pytest.raises(AdapterError, match="holds vectors for 1 modules, expected 2 by"):
        Adapter.read(tmp_path)
