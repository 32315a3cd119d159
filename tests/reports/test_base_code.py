"""A base model with code of its own (`auto_map`) leaves that code behind in a merged checkpoint.

A graph needs no code to run, so neither is it copied there nor asked for.
"""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from transformers import dynamic_module_utils

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.remote_code import copy_code, modules_of
from propulsion_export.errors import BaseModelError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.run import predict
from propulsion_export.runners.pytorch import open_checkpoint
from propulsion_export.serving.session import Session

CONFIGURATION = """
from transformers import BertConfig

class OwnConfig(BertConfig):
    model_type = "own"
"""
MODEL = """
from transformers import BertForSequenceClassification
from .configuration_own import OwnConfig
from .layers_own import doubled

class OwnForSequenceClassification(BertForSequenceClassification):
    config_class = OwnConfig

    def forward(self, input_ids=None, attention_mask=None, token_type_ids=None, **named):
        outputs = super().forward(input_ids, attention_mask, token_type_ids, **named)
        outputs["logits"] = doubled(outputs["logits"])
        return outputs
"""
LAYERS = "from .factor_own import FACTOR\n\ndef doubled(values):\n    return values * FACTOR\n"
MODULES = {
    "configuration_own.py": CONFIGURATION,
    "modeling_own.py": MODEL,
    "layers_own.py": LAYERS,
    "factor_own.py": "FACTOR = 2.0\n",
}
AUTO_MAP = {
    "AutoConfig": "configuration_own.OwnConfig",
    "AutoModelForSequenceClassification": "modeling_own.OwnForSequenceClassification",
}


@pytest.fixture(autouse=True)
def modules_in_a_folder_of_the_test(tmp_path, monkeypatch):
    """transformers copies code into the user's cache before it runs it."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])


@pytest.fixture
def own(world, tiny_checkpoint, tmp_path):
    """A BERT whose code doubles the logits, with modules that import each other."""
    directory = tmp_path / "own"
    shutil.copytree(tiny_checkpoint("bert", "text-classification"), directory)
    for name, text in {**MODULES, "unrelated.py": "raise RuntimeError\n"}.items():
        (directory / name).write_text(text)
    file = directory / "config.json"
    settings = {"model_type": "own", "auto_map": AUTO_MAP}
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return directory


@pytest.fixture
def adapter(own, tiny_model, positive_adapter, write_adapter, tmp_path):
    model = tiny_model("bert")
    made = positive_adapter(model, 1, "tuned", task="text-classification")
    return write_adapter(made, tmp_path / "tuned")


def test_plain_transformers_runs_the_code_of_a_merged_checkpoint(own, adapter, tmp_path):
    merge(adapter, tmp_path / "out", model=str(own), trust_remote_code=True)
    shutil.rmtree(own)

    copied = {path.name for path in (tmp_path / "out").glob("*.py")}
    assert copied == set(MODULES)
    tokens = torch.tensor([[2, 7, 9, 3]])
    found = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", trust_remote_code=True
    )
    plain = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(found(tokens).logits, 2 * plain(tokens).logits)
    run = open_checkpoint(Artifact.read(tmp_path / "out"), trust_remote_code=True)
    np.testing.assert_array_equal(
        run({"input_ids": tokens.numpy()})["logits"], found(tokens).logits.detach().numpy()
    )


def test_a_merged_checkpoint_with_code_predicts_when_that_is_trusted(own, adapter, tmp_path):
    merge(adapter, tmp_path / "out", model=str(own), trust_remote_code=True)

    (found,) = predict(tmp_path / "out", text=["ba be"], trust_remote_code=True)

    (reply,) = Session(tmp_path / "out", trust_remote_code=True)(["ba be"])
    assert found["label"] == ("no", "yes", "maybe")[reply.outputs["logits"].argmax()]
    with pytest.raises(BaseModelError, match="allow it with --trust-remote-code"):
        predict(tmp_path / "out", text=["ba be"])


def test_a_changed_module_of_a_merged_checkpoint_is_refused(own, adapter, tmp_path):
    merge(adapter, tmp_path / "out", model=str(own), trust_remote_code=True)
    (tmp_path / "out" / "factor_own.py").write_text("FACTOR = 3.0\n")

    with pytest.raises(Exception, match=r"factor_own\.py: its content is not what"):
        Artifact.read(tmp_path / "out")


def test_a_graph_runs_without_the_code(own, adapter, tmp_path):
    export_onnx([adapter], tmp_path / "out", model=str(own), trust_remote_code=True)

    assert not list((tmp_path / "out").rglob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert check_parity(tmp_path / "out", trust_remote_code=True).passed
    shutil.rmtree(own)
    program = (
        "import sys\nfrom propulsion_export.serving.session import Session\n"
        "print(Session(sys.argv[1])(['ba be']))\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_code_on_a_hub_stays_there(own, adapter, tmp_path):
    file = own / "config.json"
    elsewhere = {**AUTO_MAP, "AutoModel": "some/where--modeling_far.FarModel"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": elsewhere}))

    merge(adapter, tmp_path / "out", model=str(own), trust_remote_code=True)

    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"] == elsewhere
    assert {path.name for path in (tmp_path / "out").glob("*.py")} == set(MODULES)


def test_a_tokenizers_list_of_classes_and_a_folder_are_followed(own, tmp_path):
    (own / "code").mkdir()
    (own / "code" / "words.py").write_text("from .splits import split\n")
    (own / "code" / "splits.py").write_text("split = str.split\n")
    (tmp_path / "out").mkdir()

    copy_code(str(own), tmp_path / "out", {"AutoTokenizer": [None, "code/words.WordsFast"]})

    found = sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.py"))
    assert [path.as_posix() for path in found] == ["code/splits.py", "code/words.py"]


@pytest.mark.parametrize("reference", ["../secret.Model", "/etc/secret.Model"])
def test_a_module_outside_the_model_is_refused(reference, own, tmp_path):
    (tmp_path / "secret.py").write_text("")

    with pytest.raises(BaseModelError, match="expected a module of the model"):
        modules_of(str(own), {"AutoModel": reference})


def test_a_missing_module_is_named(own, adapter, tmp_path):
    (own / "factor_own.py").unlink()

    with pytest.raises(BaseModelError, match=r"own: has no factor_own\.py"):
        modules_of(str(own), AUTO_MAP)


def test_without_trust_the_code_is_not_run(own, adapter, tmp_path):
    with pytest.raises(BaseModelError, match="allow it with --trust-remote-code"):
        merge(adapter, tmp_path / "out", model=str(own))


def test_a_base_model_without_code_leaves_none(world, tmp_path):
    merge(world.three, tmp_path / "out")

    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
