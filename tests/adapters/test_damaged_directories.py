"""Hostile and damaged directories are refused in one line."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from adapter_files import CONFIG, DENSE, PREFIX, QUERY, WEIGHTS, an_adapter, tensors_of, write
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import AdapterError


def refused(directory, match):
    """Reading gives one line with exit code 4, whose text matches."""
    with pytest.raises(AdapterError, match=match) as caught:
        Adapter.read(directory)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert str(directory) in str(caught.value) or "vector below zero" in str(caught.value)


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


def test_a_lost_vector_is_noticed(tmp_path):
    an_adapter().write(tmp_path)
    weights = load_file(tmp_path / WEIGHTS)
    del weights[f"base_model.model.{DENSE}.propulsion_z"]
    save_file(weights, tmp_path / WEIGHTS)

    with pytest.raises(AdapterError, match="holds vectors for 1 modules, expected 2 by"):
        Adapter.read(tmp_path)
