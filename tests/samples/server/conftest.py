import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
from reference_server import LABELS, TEXTS

from propulsion_export import Session, export_onnx
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model


@pytest.fixture(scope="session")
def world(tmp_path_factory, tiny_model, tiny_checkpoint, random_adapter):
    """A bank of `one` and `two`, and the directories of three adapters of 3, 2 and 4 labels."""
    root = tmp_path_factory.mktemp("served")
    base = tiny_checkpoint("bert", "text-classification")
    fingerprint = fingerprint_of_model(tiny_model("bert"))
    for seed, (name, labels) in enumerate(LABELS.items(), start=1):
        model = tiny_model("bert", num_labels=len(labels), id2label=None, label2id=None)
        made = random_adapter(
            model, seed, name, head=True, labels=labels, task="text-classification"
        )
        (root / name).mkdir()
        replace(made, base=str(base), fingerprint=fingerprint).write(root / name)
    export_onnx([root / name for name in LABELS], root / "all", mode="bank")
    shutil.copytree(root / "all", root / "bank")
    session = Session(root / "bank")
    session.remove("three")
    # What is right, by the content of the adapter and the text.
    every = Session(root / "all")
    right = {
        (reply.version, text): reply
        for name in ("base", *LABELS)
        for text in TEXTS
        for reply in every(text, name)
    }
    versions = {name: every(TEXTS[0], name)[0].version for name in ("base", *LABELS)}
    return SimpleNamespace(root=root, right=right, versions=versions)


@pytest.fixture
def session(world, tmp_path):
    return Session(shutil.copytree(world.root / "bank", tmp_path / "bank"))
