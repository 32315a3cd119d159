"""A manifest is read, or refused with the field that is wrong."""

import json
from dataclasses import replace

import pytest
from written_artifacts import ENGINE, FOLDED, MANIFEST, OTHER, change, refused

from propulsion_export.adapters.names import is_fit_name
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.tensor_names import SCALES_INPUT
from propulsion_export.errors import ArtifactError


@pytest.mark.parametrize(
    "prepare",
    [
        lambda directory: None,
        lambda directory: directory.mkdir(),
        lambda directory: directory.write_text("{}"),
        lambda directory: (directory / MANIFEST).mkdir(parents=True),
    ],
    ids=["missing", "empty", "file", "folder"],
)
def test_a_directory_without_a_manifest_is_refused(tmp_path, prepare):
    prepare(tmp_path / "onnx")

    there = (tmp_path / "onnx").exists()
    refused(tmp_path / "onnx", f"has no {MANIFEST}" if there else "does not exist")


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-3],
        lambda content: content[: len(content) // 2],
        lambda content: content + b"x",
        lambda content: b"\xff" + content,
        lambda content: b"[" * 100_000,
    ],
    ids=["empty", "end", "half", "more", "bytes", "deep"],
)
def test_a_damaged_manifest_is_refused(folded, damage):
    content = (folded / MANIFEST).read_bytes()
    (folded / MANIFEST).write_bytes(damage(content))

    refused(folded, "is not valid JSON")


@pytest.mark.parametrize("text", ["[]", "null", "1", '"a"', "{}"])
def test_json_without_a_schema_version_is_refused(folded, text):
    (folded / MANIFEST).write_text(text)

    refused(folded, "schema_version is None, expected 1. Export it again")


@pytest.mark.parametrize("version", [0, -1, True, 1.0, "1", None, [1], {}])
def test_another_schema_version_is_refused(folded, version):
    change(folded, "schema_version", to=version)

    refused(folded, "schema_version is .*, expected 1. Export it again")


@pytest.mark.parametrize("version", [2, 10**30])
def test_a_newer_schema_asks_for_an_upgrade(folded, version):
    change(folded, "schema_version", to=version)

    refused(folded, "schema_version is .*, expected 1. Upgrade propulsion-export")


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (("novelty",), "manifest has the unknown field 'novelty'"),
        (("base", "novelty"), "manifest.base has the unknown field 'novelty'"),
        (("adapters", "topic", "novelty"), "manifest.adapters.topic has the unknown field"),
        (("inputs", 0, "novelty"), r"manifest.inputs\[0\] has the unknown field"),
        (("layout", SCALES_INPUT, 1, "novelty"), r"propulsion_scales\[1\] has the unknown field"),
    ],
)
def test_an_unknown_field_is_refused(switchable, path, match):
    change(switchable, *path, to=1)

    refused(switchable, match)


@pytest.mark.parametrize(
    "path",
    [
        ("kind",),
        ("mode",),
        ("task",),
        ("dtype",),
        ("base",),
        ("adapters",),
        ("base", "source"),
        ("base", "fingerprint"),
        ("adapters", "topic", "digest"),
        ("inputs", 0, "name"),
        ("layout", SCALES_INPUT, 0, "offset"),
    ],
)
def test_a_missing_field_is_refused(switchable, path):
    change(switchable, *path, drop=True)

    refused(switchable, f"manifest.* lacks the field '{path[-1]}'")


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("kind",), "openvino", "manifest.kind is 'openvino', expected one of merged, onnx"),
        (("kind",), None, "manifest.kind is None"),
        (("kind",), ["onnx"], "manifest.kind is"),
        (("mode",), "mixed", "manifest.mode is 'mixed', expected one of folded, switchable, bank"),
        (("dtype",), "float64", "manifest.dtype is 'float64'"),
        (("task",), 1, "manifest.task is 1, expected one of feature-extraction, text-"),
        (("task",), None, "manifest.task is None, expected one of"),
        (("task",), "text-classificatoin", "manifest.task is 'text-classificatoin', expected one"),
        (("base",), "some/base", "manifest.base is 'some/base', expected dict"),
        (("base", "source"), 1, "manifest.base.source is 1, expected str"),
        (("base", "fingerprint"), {"dtype": "float32"}, "entries"),
        (("base", "fingerprint"), [], "list indices"),
        (("base", "fingerprint", "entries", "weight"), [0.5], "expected 8 entries a weight"),
        (("base", "fingerprint", "entries", "weight"), ["0.5"] * 8, "expected a number"),
        (("base", "fingerprint", "entries", "weight"), [10**400] * 8, "beyond every float"),
        (("adapters",), [], r"manifest.adapters is \[\], expected dict"),
        (("adapters", "topic"), None, "manifest.adapters.topic is None, expected dict"),
        (("adapters", "topic", "size"), True, "topic.size is True, expected int"),
        (("adapters", "topic", "size"), "3", "topic.size is '3', expected int"),
        (("adapters", "topic", "size"), 3.0, "topic.size is 3.0, expected int"),
        (("adapters", "topic", "labels"), "ab", "topic.labels is 'ab', expected list"),
        (("adapters", "topic", "labels"), [1], r"topic.labels\[0\] is 1, expected str"),
        (("adapters", "topic", "file"), 1, "topic.file is 1, expected str"),
        (("inputs",), {}, "manifest.inputs is {}, expected list"),
        (("inputs", 0), "input_ids", r"manifest.inputs\[0\] is 'input_ids', expected dict"),
        (("inputs", 0, "optional"), 1, r"inputs\[0\].optional is 1, expected bool"),
        (("inputs", 0, "shape"), "batch", r"inputs\[0\].shape is 'batch', expected list"),
        (("inputs", 0, "shape", 0), True, r"inputs\[0\].shape\[0\] is True"),
        (("inputs", 0, "shape", 0), 1.5, r"inputs\[0\].shape\[0\] is 1.5"),
        (("layout", SCALES_INPUT, 0, "side"), "left", "side is 'left', expected one of output"),
        (("layout", SCALES_INPUT, 0, "offset"), False, "offset is False, expected int"),
        (("tools",), ["torch"], "manifest.tools is"),
        (("tools", "torch"), 2.13, "manifest.tools.torch is 2.13, expected str"),
        (("engine",), {}, "manifest.engine lacks the field 'onnx_digest'"),
        (("engine",), "rtx", "manifest.engine is 'rtx', expected dict"),
        (("files", "model.onnx"), None, "manifest.files.model.onnx is None"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_value_of_the_wrong_kind_is_refused(switchable, path, value, match):
    change(switchable, *path, to=value)

    refused(switchable, match)


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("layout", SCALES_INPUT, 0, "offset"), -1, "a is at -1, expected 0"),
        (("layout", SCALES_INPUT, 1, "offset"), 1, "b is at 1, expected 2"),
        (("layout", SCALES_INPUT, 1, "offset"), 3, "b is at 3, expected 2"),
        (("layout", SCALES_INPUT, 0, "length"), 3, r"a has length 3 and shape \[2\]"),
        (("layout", SCALES_INPUT, 0, "shape"), [-1, -2], r"a has length 2 and shape \[-1, -2\]"),
        (("layout", SCALES_INPUT, 0, "length"), 0, "a has length 0"),
        (("layout", "novelty"), [], "layout has the input 'novelty', expected one of"),
        (("kind",), "engine", "engine is None in an artifact of kind 'engine'"),
        (("kind",), "merged", "mode is 'switchable' in a merged checkpoint"),
        (("mode",), "folded", "2 adapters are folded in, expected one"),
        (
            ("adapters", "base"),
            OTHER,
            "an adapter is called 'base', which means the base model",
        ),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_manifest_that_contradicts_itself_is_refused(switchable, path, value, match):
    change(switchable, "adapters", "other", to=OTHER)
    Artifact.read(switchable)

    change(switchable, *path, to=value)

    refused(switchable, match)


def test_an_engine_entry_belongs_to_an_engine(folded):
    written = Artifact.write(folded, replace(FOLDED, engine=ENGINE))

    refused(written.directory, "in an artifact of kind 'onnx'")
    (folded / "model.engine").write_bytes(b"engine")
    Artifact.write(folded, replace(FOLDED, kind="engine", engine=ENGINE))
    assert Artifact.read(folded).manifest.engine == ENGINE


@pytest.mark.parametrize(
    "name", ["", ".hidden", "a/b", "a\\b", "a=b", "a\nb", "a\u2028b", "x" * 201]
)
def test_an_adapters_name_that_no_file_can_have_is_refused(folded, name):
    change(folded, "adapters", to={name: OTHER | {"file": None}})

    refused(folded, "which no file can be called")


@pytest.mark.parametrize("name", ["topic", "a b", "v1.2", "ä", "x" * 200, "BASE"])
def test_ordinary_names_are_fit(name):
    assert is_fit_name(name)
    assert not is_fit_name("base")


# A manifest on its own


def test_the_manifest_alone_can_be_replaced(switchable):
    artifact = Artifact.read(switchable)
    changed = replace(artifact.manifest, task="feature-extraction")

    returned = artifact.with_manifest(changed)

    assert returned == Artifact.read(switchable)
    assert returned.manifest.task == "feature-extraction"
    assert artifact.manifest.task == "text-classification"


def test_a_package_for_triton_is_told_from_a_damaged_manifest(switchable):
    value = json.loads((switchable / MANIFEST).read_text()) | {"kind": "triton"}
    (switchable / MANIFEST).write_text(json.dumps(value))

    with pytest.raises(ArtifactError, match="is a package for Triton, expected an artifact"):
        Artifact.read(switchable)


def test_a_manifest_that_is_changed_in_place_is_refused_or_means_the_same(switchable):
    file = switchable / MANIFEST
    before, content = Artifact.read(switchable).manifest, file.read_bytes()
    refusals = 0
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            assert Artifact.read(switchable).manifest == before
        except ArtifactError:
            refusals += 1
    assert refusals > len(content) / 14


def test_a_manifest_without_a_digest_is_read(switchable):
    change(switchable, "base", "source", to="elsewhere")

    assert "digest" not in json.loads((switchable / MANIFEST).read_text())
    assert Artifact.read(switchable).manifest.base.source == "elsewhere"
