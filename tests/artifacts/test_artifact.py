import hashlib
import json
import string
import subprocess
import sys
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from propulsion_export.adapters.names import is_fit_name
from propulsion_export.artifacts.artifact import Artifact, digest_of
from propulsion_export.artifacts.file_names import BASE_FEEDS, ENCODER_DECODER_FILES
from propulsion_export.artifacts.manifest import (
    AdapterEntry,
    BaseEntry,
    EngineEntry,
    GraphEntry,
    Manifest,
    Slot,
    TensorSpec,
)
from propulsion_export.artifacts.tensor_names import PACKED_INPUTS, SCALES_INPUT
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import ArtifactError, UnknownAdapterError

MANIFEST = "propulsion.json"
TOPIC = "adapters/topic.safetensors"
ENGINE = EngineEntry(
    runtime="tensorrt",
    version="10.16",
    targets=("sm_86",),
    profiles=({"input_ids": {"min": [1, 8], "opt": [2, 8], "max": [4, 8]}},),
    options={"refit": None, "level": 3},
    onnx_digest="sha256:00",
)
FOLDED = Manifest(
    kind="onnx",
    mode="folded",
    task="text-classification",
    dtype="float32",
    base=BaseEntry("some/base", Fingerprint("float32", {"weight": (0.5,) * 8})),
    adapters={"topic": AdapterEntry("sha256:00", "adapters/topic", 3, labels=("no", "yes"))},
    inputs=(TensorSpec("input_ids", "int64", ("batch", "sequence")),),
    outputs=(TensorSpec("logits", "float32", ("batch", 2)),),
    tools={"torch": "2.13.0"},
)
SWITCHABLE = replace(
    FOLDED,
    mode="switchable",
    dtype="bfloat16",
    adapters={"topic": AdapterEntry("sha256:00", "adapters/topic", 3, TOPIC, ("no", "yes"))},
    layout={SCALES_INPUT: (Slot("a", 0, 2, (2,)), Slot("b", 2, 1, (1,), "input"))},
)
# What an artifact of each kind cannot be without, the model first.
MODEL_FILES = {
    "onnx": ("model.onnx",),
    "engine": ("model.engine",),
    "merged": ("model.safetensors", "config.json"),
}
SEVERAL = replace(
    FOLDED,
    task="text2text-generation",
    inputs=(),
    outputs=(),
    graphs={
        name: GraphEntry(FOLDED.inputs, FOLDED.outputs if "decoder_" in name else ())
        for name in ENCODER_DECODER_FILES
    },
)
OTHER = {"digest": "", "source": "", "size": 0, "file": TOPIC}


def write_folded(directory):
    directory.mkdir()
    (directory / "model.onnx").write_bytes(b"graph")
    (directory / "model.onnx.data").write_bytes(b"weights")
    return Artifact.write(directory, FOLDED)


def write_switchable(directory):
    (directory / "adapters").mkdir(parents=True)
    (directory / "model.onnx").write_bytes(b"graph")
    for name, values in (("base", [1, 1, 1]), ("topic", [1.5, -2, 0.5])):
        feeds = {SCALES_INPUT: np.array(values, ml_dtypes.bfloat16)}
        save_file(feeds, directory / "adapters" / f"{name}.safetensors")
    return Artifact.write(directory, SWITCHABLE)


def write_several(directory):
    directory.mkdir()
    for name in (*ENCODER_DECODER_FILES, "model.onnx.data", "config.json"):
        (directory / name).write_bytes(b"1")
    return Artifact.write(directory, SEVERAL)


@pytest.fixture
def several(tmp_path):
    """An artifact of three graphs."""
    return write_several(tmp_path / "onnx").directory


@pytest.fixture
def folded(tmp_path):
    return write_folded(tmp_path / "onnx").directory


@pytest.fixture
def switchable(tmp_path):
    return write_switchable(tmp_path / "onnx").directory


def change(directory, *path, to=None, drop=False):
    """Change one value in the manifest by its path, and drop its digest."""
    value = json.loads((directory / MANIFEST).read_text())
    value.pop("digest", None)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if drop:
        del inner[path[-1]]
    else:
        inner[path[-1]] = to
    (directory / MANIFEST).write_text(json.dumps(value))


def refused(directory, match):
    with pytest.raises(ArtifactError, match=match) as caught:
        Artifact.read(directory)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


# Round trips


@pytest.mark.parametrize("write", [write_folded, write_switchable, write_several])
def test_what_is_written_is_what_is_read(tmp_path, write):
    written = write(tmp_path / "onnx")

    read = Artifact.read(str(tmp_path / "onnx"))

    assert read == written
    assert Artifact.read(tmp_path / "onnx").manifest.files == {
        file.relative_to(written.directory).as_posix(): digest_of(file)
        for file in written.directory.rglob("*")
        if file.is_file() and file.name != MANIFEST
    }


def test_the_manifest_on_disk_is_exactly_this(switchable):
    value = json.loads((switchable / MANIFEST).read_text())

    assert list(value) == [
        "schema_version",
        "kind",
        "mode",
        "task",
        "dtype",
        "base",
        "adapters",
        "inputs",
        "outputs",
        "graphs",
        "layout",
        "engine",
        "tools",
        "files",
        "exporter",
        "execution_provider",
        "quantization",
        "digest",
    ]
    digest = value.pop("digest")
    assert value.pop("files").keys() == {"model.onnx", BASE_FEEDS, TOPIC}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    assert digest == f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    assert value == {
        "schema_version": 1,
        "kind": "onnx",
        "mode": "switchable",
        "task": "text-classification",
        "dtype": "bfloat16",
        "base": {
            "source": "some/base",
            "fingerprint": {"dtype": "float32", "entries": {"weight": [0.5] * 8}},
            "labels": None,
            "own_head": True,
            "problem_type": None,
        },
        "adapters": {
            "topic": {
                "digest": "sha256:00",
                "source": "adapters/topic",
                "size": 3,
                "file": TOPIC,
                "labels": ["no", "yes"],
                "problem_type": None,
                "chat_template": None,
            }
        },
        "inputs": [
            {
                "name": "input_ids",
                "dtype": "int64",
                "shape": ["batch", "sequence"],
                "optional": False,
            }
        ],
        "outputs": [
            {"name": "logits", "dtype": "float32", "shape": ["batch", 2], "optional": False}
        ],
        "graphs": {},
        "layout": {
            SCALES_INPUT: [
                {"path": "a", "offset": 0, "length": 2, "shape": [2], "side": "output"},
                {"path": "b", "offset": 2, "length": 1, "shape": [1], "side": "input"},
            ]
        },
        "engine": None,
        "exporter": "transformers",
        "execution_provider": "cpu",
        "quantization": None,
        "tools": {"torch": "2.13.0"},
    }


def test_a_digest_that_is_known_is_recorded_and_the_others_are_taken(tmp_path):
    written = write_folded(tmp_path / "onnx")
    (written.directory / "vocab.txt").write_text("a")
    first, *others = sorted(written.manifest.files)
    others = [*others, "vocab.txt"]

    again = Artifact.write(written.directory, written.manifest, digests={first: "sha256:known"})

    assert again.manifest.files[first] == "sha256:known"
    assert {name: again.manifest.files[name] for name in others} == {
        name: digest_of(written.directory / name) for name in others
    }


def test_a_digest_is_that_of_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")

    assert digest_of(tmp_path / "a") == (
        "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


names = st.text(string.ascii_letters + '._-äß\u2028"\\', min_size=1, max_size=6)
adapter_names = st.text(string.ascii_letters + "._-äß\"' ", min_size=1, max_size=6).filter(
    is_fit_name
)
texts = st.text(max_size=6)
fingerprints = st.builds(
    Fingerprint,
    st.sampled_from(["float32", "bfloat16"]),
    st.dictionaries(names, st.tuples(*[st.floats(allow_nan=False)] * 8), max_size=2),
)
specs = st.builds(
    TensorSpec,
    names,
    st.sampled_from(["float32", "int64"]),
    st.lists(st.integers(-1, 2**40) | names, max_size=3).map(tuple),
    st.booleans(),
)
engines = st.builds(
    EngineEntry,
    runtime=st.sampled_from(["tensorrt", "tensorrt-rtx"]),
    version=texts,
    targets=st.lists(texts, max_size=2).map(tuple),
    profiles=st.lists(
        st.dictionaries(
            names, st.dictionaries(st.sampled_from(["min", "max"]), st.lists(st.integers()))
        ),
        max_size=2,
    ).map(tuple),
    options=st.dictionaries(names, st.none() | st.booleans() | st.integers() | texts, max_size=2),
    onnx_digest=texts,
)
entries = st.builds(
    AdapterEntry,
    digest=texts,
    source=texts,
    size=st.integers(0),
    file=st.just(TOPIC),
    labels=st.none() | st.lists(texts).map(tuple),
)


@st.composite
def layouts(draw):
    layout = {}
    for packed in draw(st.sets(st.sampled_from(PACKED_INPUTS))):
        slots, offset = [], 0
        for shape in draw(st.lists(st.lists(st.integers(1, 4), max_size=3), max_size=3)):
            length = int(np.prod(shape))
            side = draw(st.sampled_from(["output", "input"]))
            slots.append(Slot(draw(names), offset, length, tuple(shape), side))
            offset += length
        layout[packed] = tuple(slots)
    return layout


@st.composite
def manifests(draw):
    kind = draw(st.sampled_from(["merged", "onnx", "engine"]))
    mode = "folded" if kind == "merged" else draw(st.sampled_from(["folded", "switchable"]))
    task = draw(st.sampled_from(tuple(TASKS)))
    tensors = st.lists(specs, max_size=2).map(tuple)
    several = kind == "onnx" and task == "text2text-generation"
    graphs = st.fixed_dictionaries(
        {name: st.builds(GraphEntry, tensors, tensors) for name in ENCODER_DECODER_FILES}
    )
    return Manifest(
        kind=kind,
        mode=mode,
        task=task,
        dtype=draw(st.sampled_from(["float32", "float16", "bfloat16"])),
        base=BaseEntry(draw(texts), draw(fingerprints)),
        adapters=draw(
            st.dictionaries(
                adapter_names, entries, min_size=1, max_size=1 if mode == "folded" else 3
            )
        ),
        inputs=() if several else draw(tensors),
        outputs=() if several else draw(tensors),
        graphs=draw(graphs) if several else {},
        layout=draw(layouts()),
        engine=draw(engines) if kind == "engine" else None,
        tools=draw(st.dictionaries(names, texts, max_size=2)),
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(manifests())
def test_every_manifest_comes_back_as_it_was(tmp_path_factory, manifest):
    directory = tmp_path_factory.mktemp("artifact")
    (directory / "adapters").mkdir()
    graphs = (*manifest.graphs, "config.json") if manifest.graphs else None
    files = {*(graphs or MODEL_FILES[manifest.kind]), BASE_FEEDS, TOPIC}
    for name in files:
        (directory / name).write_bytes(b"1")

    Artifact.write(directory, manifest)

    read = Artifact.read(directory).manifest
    assert replace(read, files={}) == manifest
    assert read.files.keys() == files


# Refusals


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

    refused(tmp_path / "onnx", f"has no {MANIFEST}")


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
    "name",
    [
        "../secret",
        "adapters/../../secret",
        "ABSOLUTE",
        "link",
        "links/secret",
        "loop",
        "a\0b",
        "x" * 300,
    ],
    ids=lambda value: value[:20].replace("\0", "0"),
)
@pytest.mark.parametrize("where", ["files", "adapter"])
def test_a_path_that_leads_out_is_refused(switchable, tmp_path, name, where):
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    (switchable / "link").symlink_to("../secret")
    (switchable / "links").symlink_to("..")
    (switchable / "loop").symlink_to("loop")
    name = str(secret) if name == "ABSOLUTE" else name

    if where == "files":
        change(switchable, "files", name, to=digest_of(secret))
    else:
        change(switchable, "adapters", "topic", "file", to=name)

    refused(switchable, "leads out of the directory")


def test_a_link_that_stays_inside_is_followed(folded):
    (folded / "model.onnx").rename(folded / "real")
    (folded / "model.onnx").symlink_to("real")

    assert Artifact.read(folded).path.read_bytes() == b"graph"


def test_an_artifact_behind_a_link_can_be_read(folded, tmp_path):
    (tmp_path / "link").symlink_to(folded)

    assert Artifact.read(tmp_path / "link").manifest == Artifact.read(folded).manifest


def test_an_adapters_file_without_a_digest_is_refused(switchable):
    (switchable / "adapters" / "other.safetensors").write_bytes(b"1")
    change(switchable, "adapters", "topic", "file", to="adapters/other.safetensors")

    refused(switchable, "other.safetensors: has no digest in the manifest")


@pytest.mark.parametrize("name", ["model.onnx", BASE_FEEDS, TOPIC])
def test_a_missing_file_is_refused(switchable, name):
    (switchable / name).unlink()

    refused(switchable, f"{name}: is missing. Copy the whole directory again")


@pytest.mark.parametrize("name", ["", ".", "adapters", "nothing"])
def test_what_is_no_file_is_missing(switchable, name):
    change(switchable, "files", name, to="sha256:00")

    refused(switchable, "is missing")


@pytest.mark.parametrize("name", ["model.onnx", BASE_FEEDS, TOPIC])
@pytest.mark.parametrize("position", [0, -1])
def test_one_changed_byte_in_any_file_is_refused(switchable, name, position):
    content = bytearray((switchable / name).read_bytes())
    content[position] ^= 1
    (switchable / name).write_bytes(bytes(content))

    refused(switchable, f"{name}: its content is not what the manifest recorded")


def test_all_damaged_files_are_named_at_once(switchable):
    for name in ("model.onnx", TOPIC):
        (switchable / name).write_bytes(b"")

    with pytest.raises(ArtifactError) as caught:
        Artifact.read(switchable)
    assert len(caught.value.findings) == 2


@pytest.mark.parametrize(
    "name", ["notes.txt", "README.md", "adapters/left.safetensors", ".model.onnx.partial-1"]
)
def test_files_that_nobody_loads_are_nobodys_business(switchable, name):
    (switchable / name).write_text("mine")

    Artifact.read(switchable)


@pytest.mark.parametrize("kind", MODEL_FILES)
def test_digests_cannot_be_switched_off(tmp_path, kind):
    """Without them whoever changes a weight would go unnoticed."""
    for name in (*MODEL_FILES[kind], "tokenizer.json"):
        (tmp_path / name).write_bytes(b"1")
    engine = ENGINE if kind == "engine" else None
    written = Artifact.write(tmp_path, replace(FOLDED, kind=kind, engine=engine))
    Artifact.read(tmp_path)

    for name in (*MODEL_FILES[kind], "tokenizer.json"):
        written.with_manifest(written.manifest)
        change(tmp_path, "files", name, drop=True)
        refused(tmp_path, f"{name}: has no digest in the manifest")
    change(tmp_path, "files", to={})
    refused(tmp_path, "has no digest in the manifest")


@pytest.mark.parametrize("kind", MODEL_FILES)
def test_an_artifact_without_its_model_is_refused(tmp_path, kind):
    engine = ENGINE if kind == "engine" else None
    Artifact.write(tmp_path, replace(FOLDED, kind=kind, engine=engine))

    refused(tmp_path, f"{MODEL_FILES[kind][0]}: is missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.onnx.data",
        "model.onnx.data_1",
        "config.json",
        "more.safetensors",
        "model.safetensors.index.json",
        "model.engine",
        "vocab.txt",
        "tokenizer_config.json",
    ],
)
def test_a_file_put_beside_the_model_is_refused(switchable, name):
    (switchable / name).write_text("planted")

    refused(switchable, f"{name}: has no digest in the manifest")


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


# Several graphs


@pytest.mark.parametrize("name", [*ENCODER_DECODER_FILES, "config.json"])
def test_an_artifact_of_several_graphs_needs_each_and_the_configuration(several, name):
    """Which token a decoder starts with is in the configuration."""
    (several / name).unlink()
    Artifact.write(several, SEVERAL)

    refused(several, f"{name}: is missing")


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_graph_of_several_without_a_digest_is_refused(several, name):
    change(several, "files", name, drop=True)

    refused(several, f"{name}: has no digest in the manifest")


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_graph_of_several_that_changed_is_refused(several, name):
    (several / name).write_bytes(b"2")

    refused(several, f"{name}: its content is not what the manifest recorded")


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx_data"])
def test_a_single_graph_put_beside_several_is_refused(several, name):
    (several / name).write_bytes(b"planted")

    refused(several, f"{name}: has no digest in the manifest")


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_graph_put_beside_a_single_one_is_refused(folded, name):
    (folded / name).write_bytes(b"planted")

    refused(folded, f"{name}: has no digest in the manifest")


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        (("graphs", "decoder_model.onnx"), None, "decoder_model.onnx is None, expected dict"),
        (("graphs", "encoder_model.onnx", "outputs"), {}, "outputs is {}, expected list"),
        (("graphs", "encoder_model.onnx", "more"), 1, "has the unknown field 'more'"),
        (("graphs",), [], r"graphs is \[\], expected dict"),
        (("graphs",), {}, "graphs are none, expected encoder_model.onnx, decoder_model.onnx, "),
        (("graphs", "model.onnx"), {"inputs": [], "outputs": []}, "model.onnx, expected encoder_"),
        (("task",), "text-generation", "graphs are encoder_model.onnx, .*, expected none"),
        (("kind",), "merged", "graphs are encoder_model.onnx, .*, expected none"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_graphs_that_are_not_those_of_the_task_are_refused(several, path, value, match):
    change(several, *path, to=value)

    refused(several, match)


@pytest.mark.parametrize("name", ENCODER_DECODER_FILES)
def test_a_manifest_without_one_of_the_graphs_is_refused(several, name):
    change(several, "graphs", name, drop=True)

    refused(several, "graphs are .*, expected encoder_model.onnx, decoder_model.onnx, decoder_with")


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_several_graphs_have_no_inputs_and_outputs_of_their_own_besides(several, field):
    """Nothing would hold them against a graph."""
    spec = {"name": "x", "dtype": "int64", "shape": [1], "optional": False}
    change(several, field, to=[spec])

    refused(several, "inputs and outputs are given beside several graphs, expected none")


def test_a_manifest_from_before_there_were_several_graphs_can_be_read(folded):
    change(folded, "graphs", drop=True)

    assert Artifact.read(folded).manifest.graphs == {}


def test_several_graphs_are_where_their_directory_is(several):
    assert Artifact.read(several).path == several


# Model files, feeds and the manifest alone


@pytest.mark.parametrize(
    ("kind", "name"), [("onnx", "model.onnx"), ("engine", "model.engine"), ("merged", "")]
)
def test_the_model_is_where_its_kind_says(tmp_path, kind, name):
    assert Artifact(tmp_path, replace(FOLDED, kind=kind)).path == tmp_path / name


@pytest.mark.parametrize(
    ("adapter", "expected"),
    [("topic", [1.5, -2, 0.5]), ("base", [1, 1, 1]), (None, [1, 1, 1])],
)
def test_feeds_in_bfloat16_are_loaded_by_name(switchable, adapter, expected):
    feeds = Artifact.read(switchable).feeds(adapter)

    assert set(feeds) == {SCALES_INPUT}
    assert feeds[SCALES_INPUT].dtype == ml_dtypes.bfloat16
    assert feeds[SCALES_INPUT].astype(float).tolist() == expected


def test_a_fresh_interpreter_loads_bfloat16_feeds(switchable):
    """Nobody else has told numpy of bfloat16 there."""
    script = (
        "import sys; from propulsion_export.artifacts.artifact import Artifact; "
        "print(Artifact.read(sys.argv[1]).feeds('topic')['propulsion_scales'].dtype)"
    )

    done = subprocess.run(
        [sys.executable, "-c", script, switchable], capture_output=True, text=True
    )

    assert (done.stdout, done.stderr) == ("bfloat16\n", "")


@pytest.mark.parametrize("name", ["tpoic", "", "../topic", "BASE"])
def test_an_unknown_adapter_is_refused_with_those_known(switchable, name):
    with pytest.raises(
        UnknownAdapterError, match=f"has no adapter '{name}', expected one of base, topic"
    ):
        Artifact.read(switchable).feeds(name)


def test_a_folded_artifact_needs_no_feeds_and_has_no_other_adapter(folded):
    artifact = Artifact.read(folded)

    assert artifact.feeds(None) == {}
    assert artifact.feeds("topic") == {}
    for other in ("base", "pos", ""):
        with pytest.raises(UnknownAdapterError, match="has the adapter 'topic' folded in"):
            artifact.feeds(other)


def test_an_adapter_without_a_file_to_feed_is_refused(switchable):
    change(switchable, "adapters", "topic", "file", to=None)

    refused(switchable, "the adapter 'topic' has no file, expected one with its packed inputs")


def test_feeds_of_the_base_model_that_are_not_recorded_are_refused(switchable):
    change(switchable, "files", BASE_FEEDS, drop=True)
    refused(switchable, "base.safetensors: has no digest in the manifest")

    artifact = Artifact(switchable, replace(SWITCHABLE, files={}))
    with pytest.raises(ArtifactError, match="expected the packed inputs of 'base'"):
        artifact.feeds(None)


def test_feeds_that_are_no_tensors_are_refused(switchable):
    (switchable / TOPIC).write_bytes(b"not safetensors")
    artifact = Artifact.write(switchable, SWITCHABLE)

    with pytest.raises(ArtifactError, match="the packed inputs cannot be read"):
        artifact.feeds("topic")


def test_the_manifest_alone_can_be_replaced(switchable):
    artifact = Artifact.read(switchable)
    changed = replace(artifact.manifest, task="feature-extraction")

    returned = artifact.with_manifest(changed)

    assert returned == Artifact.read(switchable)
    assert returned.manifest.task == "feature-extraction"
    assert artifact.manifest.task == "text-classification"


def test_writing_again_keeps_no_digest_of_a_file_that_went(folded):
    (folded / "model.onnx.data").unlink()

    assert set(Artifact.write(folded, Artifact(folded, FOLDED).manifest).manifest.files) == {
        "model.onnx"
    }
    Artifact.read(folded)


def test_a_package_for_triton_is_told_from_a_damaged_manifest(switchable):
    value = json.loads((switchable / MANIFEST).read_text()) | {"kind": "triton"}
    (switchable / MANIFEST).write_text(json.dumps(value))

    with pytest.raises(ArtifactError, match="is a package for Triton, expected an artifact"):
        Artifact.read(switchable)


@pytest.mark.parametrize("name", ["base", "topic"])
def test_a_file_that_is_replaced_after_reading_is_not_loaded(switchable, name):
    artifact = Artifact.read(switchable)
    feeds = {SCALES_INPUT: np.array([2, 2, 2], ml_dtypes.bfloat16)}
    save_file(feeds, switchable / "adapters" / f"{name}.safetensors")

    with pytest.raises(ArtifactError, match=rf"{name}\.safetensors: its content is not what the"):
        artifact.feeds(name)


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
