"""Every file that is loaded lies in the directory and has the digest that was recorded."""

from dataclasses import replace

import pytest
from written_artifacts import ENGINE, FOLDED, MODEL_FILES, TOPIC, change, refused

from propulsion_export.artifacts.artifact import Artifact, digest_of
from propulsion_export.artifacts.file_names import BASE_FEEDS
from propulsion_export.errors import ArtifactError


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
    ("kind", "name"), [("onnx", "model.onnx"), ("engine", "model.engine"), ("merged", "")]
)
def test_the_model_is_where_its_kind_says(tmp_path, kind, name):
    assert Artifact(tmp_path, replace(FOLDED, kind=kind)).path == tmp_path / name


def test_writing_again_keeps_no_digest_of_a_file_that_went(folded):
    (folded / "model.onnx.data").unlink()

    assert set(Artifact.write(folded, Artifact(folded, FOLDED).manifest).manifest.files) == {
        "model.onnx"
    }
    Artifact.read(folded)
