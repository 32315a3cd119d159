"""Switches that a base's `config.json` was left with add outputs to graphs, or break the export."""

import json
import shutil

import pytest
import torch
import transformers

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.loading import load_base
from propulsion_export.errors import BaseModelError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.runners.pytorch import open_checkpoint
from propulsion_export.training import TrainOptions
from propulsion_export.training.model import load_trainable

OUTPUTS = {
    "output_hidden_states": True,
    "output_attentions": True,
    "return_dict": False,
    "chunk_size_feed_forward": 2,
}
ATTENTION = {"_attn_implementation": "flash_attention_2"}


@pytest.fixture
def switched(tmp_path):
    """`switched(base, **switches)`: a copy of a base whose config.json has these switches."""

    def make(base, **switches):
        directory = tmp_path / "switched"
        shutil.copytree(base, directory)
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | switches))
        return directory

    return make


def test_a_graph_is_the_same_whatever_the_switches(switched, world, tmp_path):
    base = switched(world.base, **OUTPUTS)

    made = export_onnx([world.three], tmp_path / "made", model=str(base))

    right = export_onnx([world.three], tmp_path / "right", model=str(world.base))
    assert [output.name for output in made.manifest.outputs] == ["logits"]
    for file in ("model.onnx", "config.json"):
        assert made.manifest.files[file] == right.manifest.files[file]


@pytest.mark.parametrize(
    "switches",
    [
        *({name: value} for name, value in OUTPUTS.items()),
        {"attn_implementation": "flash_attention_2"},
        ATTENTION,
        {"torchscript": True},
    ],
    ids=lambda switches: "-".join(switches),
)
def test_a_base_model_computes_as_without_the_switch(switches, switched, world):
    tokens = torch.tensor([[2, 7, 9, 11, 3]])
    right = load_base(str(world.base), task="feature-extraction").model(tokens)

    found = load_base(str(switched(world.base, **switches)), task="feature-extraction").model(
        tokens
    )

    assert list(found) == list(right) == ["last_hidden_state", "pooler_output"]
    assert torch.equal(found.last_hidden_state, right.last_hidden_state)


def test_switches_that_transformers_finds_contradictory_are_one_line(switched, world):
    base = switched(world.base, output_attentions=True, _attn_implementation="sdpa")

    with pytest.raises(
        BaseModelError, match=r"is refused by transformers .The `output_attentions`"
    ):
        load_base(str(base), task="feature-extraction")


def test_the_routers_of_a_mixture_are_no_output(switched, tiny_checkpoint):
    base = switched(tiny_checkpoint("mixtral"), output_router_logits=True)

    model = load_base(str(base), task="text-generation").model

    assert "router_logits" not in model(torch.tensor([[2, 7, 9, 3]]))


def test_the_parts_of_a_configuration_are_reset_too(tmp_path):
    parts = {"text_config": {"output_hidden_states": True}, "vision_config": {"return_dict": False}}
    content = {"model_type": "clip", "output_attentions": True, **parts}
    content["_attn_implementation"] = "eager"
    (tmp_path / "config.json").write_text(json.dumps(content))

    config = read_config(str(tmp_path))

    assert not config.output_attentions
    assert not config.text_config.output_hidden_states
    assert config.vision_config.return_dict
    assert {c._attn_implementation for c in (config, config.text_config)} == {None}


def test_training_computes_as_without_the_switches(switched, world):
    options = TrainOptions(epochs=1)

    base = load_trainable(switched(world.base, **OUTPUTS), ("a", "b"), options)

    assert list(base.model(torch.tensor([[2, 7, 3]]))) == ["logits"]


def test_a_merged_checkpoint_keeps_the_outputs_and_runs_without_them(switched, world, tmp_path):
    kept = {name: OUTPUTS[name] for name in ("output_hidden_states", "chunk_size_feed_forward")}

    merge(world.three, tmp_path / "out", model=str(switched(world.base, **kept, **ATTENTION)))

    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert kept.items() <= written.items()
    assert not written.keys() & ATTENTION.keys()
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokens = torch.tensor([[2, 7, 9, 3]])
    assert list(plain(tokens)) == ["logits", "hidden_states"]
    run = open_checkpoint(Artifact.read(tmp_path / "out"))
    assert list(run({"input_ids": tokens.numpy()})) == ["logits"]


def test_a_kind_of_cache_that_generation_settings_name_is_not_traced(tiny_checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint("llama"), base)
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"cache_implementation": "static"}))

    made = export_onnx([], tmp_path / "out", model=str(base))

    assert [output.name for output in made.manifest.outputs][:2] == ["logits", "present.0.key"]
