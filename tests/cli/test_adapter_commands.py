"""Adapters are listed, added and removed, under the name that was given."""

import json

from dense_adapters import write_adapter

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.tensor_names import SCALES_INPUT

# One name for an adapter given by a link


def test_a_link_to_an_adapter_is_exported_and_compared_under_its_own_name(run, world, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(world.three)

    code, out, err = run("onnx", "-a", link, "-o", tmp_path / "onnx", "--json")

    assert code == 0, err
    assert json.loads(out)["adapters"] == ["latest"]
    assert json.loads(out)["parity"] == "passed"


def test_a_link_to_an_adapter_is_added_under_its_own_name(run, artifact, adapter, tmp_path):
    link = tmp_path / "latest"
    link.symlink_to(adapter)

    code, out, err = run("adapter", "add", artifact, link, "--json")

    assert (code, err) == (0, "")
    assert json.loads(out) == {"adapters": ["latest", "pos", "topic"]}


# Listed, added, removed and compacted


def test_the_adapters_of_an_artifact_are_listed_added_and_removed(run, artifact, tmp_path):
    code, out, err = run("adapter", "list", artifact)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["name", "pos", "topic"]

    new = write_adapter(tmp_path / "new")
    code, out, err = run("adapter", "add", artifact, f"third={new}", "--json")
    assert (code, json.loads(out), err) == (0, {"adapters": ["pos", "third", "topic"]}, "")
    assert Artifact.read(artifact).feeds("third")[SCALES_INPUT].tolist() == [2.5, -3.0]

    code, out, err = run("adapter", "remove", artifact, "pos")
    assert (code, out, err) == (0, f"{artifact}: third, topic\n", "")

    code, out, err = run("adapter", "list", artifact, "--json")
    assert (code, err, list(json.loads(out)["adapters"])) == (0, "", ["third", "topic"])


def test_the_adapters_of_a_bank_are_listed_with_their_ids_added_removed_and_compacted(
    run, bank, tmp_path
):
    code, out, err = run("adapter", "list", bank, "--json")
    assert (code, err) == (0, "")
    assert {name: told["id"] for name, told in json.loads(out)["adapters"].items()} == {
        "pos": 2,
        "topic": 1,
    }

    new = write_adapter(tmp_path / "new")
    code, out, err = run("adapter", "add", bank, f"third={new}", "--json")
    assert (code, json.loads(out), err) == (0, {"count": 3}, "")
    assert Artifact.read(bank).open_bank().values()[3].tolist() == [2.5, -3.0]
    code, out, err = run("adapter", "add", bank, f"third={new}")
    assert (code, out) == (2, "")
    assert "has an adapter 'third' already" in err

    code, out, err = run("adapter", "remove", bank, "topic")
    assert (code, out, err) == (0, f"{bank}: 2 adapters\n", "")
    code, out, err = run("adapter", "compact", bank)
    assert (code, out, err) == (0, f"{bank}: 8 bytes freed\n", "")

    code, out, err = run("adapter", "list", bank)
    assert (code, err) == (0, "")
    assert [line.split()[:2] for line in out.splitlines()] == [
        ["name", "id"],
        ["pos", "1"],
        ["third", "2"],
    ]
    code, out, err = run("inspect", bank, "--json")
    assert json.loads(out)["adapters"] == {"count": 2, "width": 2, "file": "bank-1.bin"}


def test_only_a_bank_is_compacted(run, artifact):
    code, out, err = run("adapter", "compact", artifact)

    assert (code, out) == (4, "")
    assert "is switchable, expected a bank" in err
