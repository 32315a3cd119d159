"""What is written is what is read, and the manifest on disk has one form."""

import hashlib
import json
import string
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from written_artifacts import (
    MANIFEST,
    MODEL_FILES,
    TOPIC,
    write_folded,
    write_several,
    write_switchable,
)

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


# Any manifest


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
