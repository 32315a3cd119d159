"""Which small files of a base model a merged checkpoint gets beside its weights."""

import json
from dataclasses import replace

import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.pipeline.merge import MergeOptions, merge, merge_adapters

CARRIED = {
    "LICENSE": b"be kind",
    "LICENSE.txt": b"still",
    "licence.md": b"too",
    "NOTICE": b"who made it",
    "Notice.txt": b"and when",
    "USE_POLICY.md": b"no harm",
    "COPYING": b"free",
    "preprocessor_config.json": b'{"image_mean": [0.5]}',
    "processor_config.json": b'{"processor_class": "P"}',
    "video_preprocessor_config.json": b"{}",
}
LEFT = {"README.md": b"another model", "training_args.bin": b"x", "optimizer.pt": b"x"}


@pytest.fixture(params=["llama", "bert"])  # by names alone, and by the model
def base(request, tmp_path, tiny_model, write_adapter, positive_adapter):
    task = "text-generation" if request.param == "llama" else "text-classification"
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "base")
    for name, content in (CARRIED | LEFT).items():
        (tmp_path / "base" / name).write_bytes(content)
    (tmp_path / "base" / "LICENSES").mkdir()
    adapter = replace(
        positive_adapter(model),
        base=str(tmp_path / "base"),
        fingerprint=fingerprint_of_model(model),
        task=task,
    )
    write_adapter(adapter, tmp_path / "adapter")
    return tmp_path / "base"


def test_terms_of_use_and_processors_are_carried_and_no_model_card(base, tmp_path):
    artifact = merge(tmp_path / "adapter", tmp_path / "out")

    found = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert {name: found[name].read_bytes() for name in CARRIED} == CARRIED
    assert not found.keys() & {*LEFT, "LICENSES"}
    assert CARRIED.keys() <= artifact.manifest.files.keys()
    assert Artifact.read(tmp_path / "out") == artifact


def test_what_the_merge_writes_itself_is_not_replaced(base, tmp_path):
    adapters = [f"a={tmp_path / 'adapter'}", f"b={tmp_path / 'adapter'}"]

    merge_adapters(adapters, tmp_path / "out", MergeOptions())

    for name in ("a", "b"):
        settings = json.loads((tmp_path / "out" / name / "config.json").read_bytes())
        assert settings["architectures"]
        assert (tmp_path / "out" / name / "LICENSE").read_bytes() == b"be kind"
