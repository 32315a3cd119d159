"""What cannot be computed here is refused before anything is written."""

import json
import shutil

import pytest
from sentence_pipelines import BERT, OLD, PIPELINES, SETTINGS, changed

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.sentences.files import read_sentence_pipeline
from propulsion_export.base_model.sentences.modules import copy_sentence_pipeline
from propulsion_export.errors import BaseModelError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.run import predict


def retyped(directory, kind, path=None):
    listed = json.loads((directory / "modules.json").read_text())
    listed[1] |= {"type": kind} | ({} if path is None else {"path": path})
    (directory / "modules.json").write_text(json.dumps(listed))


def pickled(directory):
    file = directory / "2_Dense" / "model.safetensors"
    file.rename(file.with_name("pytorch_model.bin"))


WRONG = {
    "layers": (lambda d: retyped(d, f"{OLD}WeightedLayerPooling"), "names WeightedLayerPooling"),
    "cnn": (lambda d: retyped(d, "sentence_transformers.models.CNN"), "modules.json names CNN"),
    "own code": (lambda d: retyped(d, "custom_st.Pooling"), "names custom_st.Pooling"),
    "outside": (lambda d: retyped(d, f"{OLD}Pooling", "../other"), "leads out of the directory"),
    "in the root": (lambda d: retyped(d, f"{OLD}Pooling", ""), "expected a folder of its own"),
    "pickle": (pickled, "pytorch_model.bin only, which may run code"),
    "activation": (
        lambda d: changed(d, "2_Dense/config.json", activation_function="torch.nn.Softmax2d"),
        "has the activation torch.nn.Softmax2d",
    ),
    "mode": (lambda d: changed(d, "1_Pooling/config.json", pooling_mode="median"), "by median"),
    "width": (
        lambda d: changed(d, "1_Pooling/config.json", pooling_mode=["cls", "mean"]),
        "dense takes 32 numbers, expected 64",
    ),
    "sparse": (
        lambda d: changed(d, SETTINGS, model_type="SparseEncoder"),
        "says SparseEncoder",
    ),
    "prompt": (
        lambda d: changed(d, SETTINGS, default_prompt_name="query"),
        "names the prompt 'query', which it does not have",
    ),
    "tokenizer": (
        lambda d: changed(d, BERT, tokenizer_args={"padding_side": "left"}),
        "tokenizer_args.padding_side is set",
    ),
    "chat": (
        lambda d: changed(d, BERT, modality_config={"message": {}}),
        "an output other than the last hidden state",
    ),
    "old layout": (
        lambda d: (d / "modules.json").write_text(
            json.dumps([{"path": "0_BERT", "type": f"{OLD}Transformer"}])
        ),
        "has its Transformer in 0_BERT/",
    ),
    "no settings": (
        lambda d: (d / "1_Pooling" / "config.json").unlink(),
        "Pooling in 1_Pooling/: has no config.json",
    ),
    "no list": (lambda d: (d / "modules.json").write_text("{}"), "is no list of modules"),
}  # fmt: skip


def onnx(adapter, *arguments, **options):
    return export_onnx([adapter], *arguments, **options)


@pytest.mark.parametrize(
    ("command", "kind"), [*((merge, kind) for kind in WRONG), (onnx, "pickle"), (onnx, "sparse")]
)
def test_a_pipeline_that_is_not_computed_here_is_refused_by_name(
    command, kind, base, plain, tmp_path
):
    source, (damage, message) = base("dense"), WRONG[kind]
    damage(source)

    with pytest.raises(BaseModelError) as refused:
        command(plain.one, tmp_path / "out", model=str(source))

    assert message in str(refused.value)
    assert refused.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_loading_options_of_speed_only_are_no_reason_to_refuse(base, plain, tmp_path):
    source = base("cls")
    changed(source, BERT, model_args={"torch_dtype": "float32"}, max_seq_length=None)

    merge(plain.one, tmp_path / "merged", model=str(source))

    assert predict(tmp_path / "merged", text=["ba"])[0]["pooling"] == "cls"


def test_a_base_on_a_hub_brings_its_folders(base, tmp_path, monkeypatch):
    revision = "0" * 40
    place = tmp_path / "hub" / "models--org--tiny"
    source = shutil.copytree(base("dense"), place / "snapshots" / revision)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    assert read_sentence_pipeline("org/tiny").label == PIPELINES["dense"][2]
    copy_sentence_pipeline("org/tiny", tmp_path / "copy")

    for name in ("modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"):
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "copy" / "config.json").exists()


def test_another_task_needs_no_pipeline(base, world, tmp_path):
    source = base("dense")
    pickled(source)

    merge(world.three, tmp_path / "merged", model=str(source))

    assert not (tmp_path / "merged" / "modules.json").exists()
    assert "label" in predict(tmp_path / "merged", text=["ba"])[0]


def test_a_modules_file_that_the_manifest_does_not_know_is_refused(base, plain, tmp_path):
    merge(plain.one, tmp_path / "merged", model=str(plain.base))
    shutil.copy(base("cls") / "modules.json", tmp_path / "merged")

    with pytest.raises(Exception, match=r"modules.json: has no digest in the manifest"):
        Artifact.read(tmp_path / "merged")
