"""Every generative architecture through merge, folded, switchable and the verdict.

Beside the verdict, which asks PyTorch step by step, plain transformers generates: its own
`generate` on the merged checkpoint, a prompt at a time, against the artifact with all prompts in
one padded batch.
"""

import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file

from kinds import ENCODER_DECODERS, GENERATIVE
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import read_manifest
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import ArtifactError, BaseModelError, ToolError
from propulsion_export.graph.sample_inputs import trace_prompt
from propulsion_export.graph.trace import trace_decoder
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.decoding import generate, greedy
from propulsion_export.runners.opening import choose_runner, open_candidate

STEPS = 64
# Each trace takes ten seconds on a slow core, and banks are traced and judged besides. A bank
# scales no experts, so Mixtral's are judged in the switchable graph.
QUICK = {"folded": ("gpt2", "llama", "t5"), "switchable": ("gpt2", "llama", "mixtral", "t5")}
TRACED = {
    mode: [kind if kind in quick else pytest.param(kind, marks=pytest.mark.slow)
           for kind in GENERATIVE]
    for mode, quick in QUICK.items()
}  # fmt: skip
PROMPTS = [[11, 42, 7, 65, 23], [50, 9, 31], [8, 90, 77, 16, 29, 33, 60, 71]]


def tokens_of_transformers(kind, directory):
    """What `generate` appends to each prompt alone, int [prompts, STEPS]."""
    family = "AutoModelForSeq2SeqLM" if kind in ENCODER_DECODERS else "AutoModelForCausalLM"
    model = getattr(transformers, family).from_pretrained(directory, dtype=torch.float32).eval()
    rows = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        # An end-of-text token that never comes, so that all steps are taken.
        made = model.generate(
            ids, max_new_tokens=STEPS, do_sample=False, eos_token_id=99_999, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        rows.append(made[0, -STEPS:].numpy())
    return np.stack(rows)


def tokens_of_artifact(directory, adapter=None, prompts=PROMPTS):
    """What the artifact appends to all prompts in one padded batch."""
    artifact = Artifact.read(directory)
    model = open_candidate(artifact, choose_runner(artifact, "auto"))
    feeds = {**model.pad([np.array(p) for p in prompts], 0), **artifact.feeds(adapter)}
    return np.stack(list(itertools.islice(generate(model, feeds, greedy), STEPS)), axis=1)


def assert_passed(report):
    assert report.passed, "\n".join(c.detail for c in report.checks if not c.passed)


@pytest.mark.parametrize("kind", GENERATIVE)
def test_merged_checkpoint_passes_in_plain_transformers(kind, make_world, tmp_path):
    world = make_world(kind)

    artifact = merge(world.one, tmp_path / "merged")

    assert artifact.manifest.task == world.task
    assert_passed(check_parity(tmp_path / "merged"))
    np.testing.assert_array_equal(
        tokens_of_artifact(tmp_path / "merged"), tokens_of_transformers(kind, tmp_path / "merged")
    )


@pytest.mark.parametrize("kind", TRACED["folded"])
def test_folded_graph_passes_and_generates_what_the_merged_checkpoint_does(
    kind, make_world, exported, tmp_path
):
    folded = exported(kind, "folded")
    merge(make_world(kind).one, tmp_path / "merged")

    assert_passed(check_parity(folded))
    expected = tokens_of_transformers(kind, tmp_path / "merged")
    np.testing.assert_array_equal(tokens_of_artifact(folded), expected)
    alone = [tokens_of_artifact(folded, prompts=[prompt]) for prompt in PROMPTS]
    np.testing.assert_array_equal(np.concatenate(alone), expected)


@pytest.mark.parametrize("kind", TRACED["switchable"])
def test_switchable_graph_passes_and_generates_with_every_adapter_and_none(
    kind, make_world, exported, tmp_path
):
    world, both = make_world(kind), exported(kind, "switchable")
    merge(world.one, tmp_path / "one")
    merge(world.two, tmp_path / "two")

    report = check_parity(both)
    assert_passed(report)
    assert {check.adapter for check in report.checks if check.case == "greedy"} == {
        "one", "two", "base"
    }  # fmt: skip
    for name, directory in (
        ("one", tmp_path / "one"),
        ("two", tmp_path / "two"),
        (None, world.base),
    ):
        expected = tokens_of_transformers(kind, directory)
        np.testing.assert_array_equal(tokens_of_artifact(both, name), expected)
    assert (tokens_of_artifact(both, "one") != expected).any()


def test_adapters_exchanged_in_a_decoder_fail(exported, tmp_path):
    exchanged = exchange(exported("llama", "switchable"), tmp_path / "exchanged")

    failed = {check.case for check in check_parity(exchanged).checks if not check.passed}
    assert failed >= {
        "parity",
        "padding",
        "recomputing",
        "right padding",
        "padding inside",
        "greedy",
    }


def test_one_channel_changed_in_a_decoder_fails(exported, tmp_path):
    shutil.copytree(exported("gpt2", "switchable"), tmp_path / "graph")
    file = tmp_path / "graph" / "adapters" / "one.safetensors"
    feeds = load_file(file)
    feeds["propulsion_scales"][40] *= 1.01
    save_file(feeds, file)
    Artifact.write(tmp_path / "graph", read_manifest(tmp_path / "graph" / "propulsion.json"))

    assert not check_parity(tmp_path / "graph").passed


def exchange(source, destination):
    """A copy whose two adapters have each other's scales, its manifest written anew."""
    shutil.copytree(source, destination)
    one, two = (destination / "adapters" / f"{name}.safetensors" for name in ("one", "two"))
    feeds = load_file(one)
    save_file(load_file(two), one)
    save_file(feeds, two)
    Artifact.write(destination, read_manifest(destination / "propulsion.json"))
    return destination


def test_graphs_of_an_encoder_decoder_have_optimums_names_and_share_weights(exported):
    manifest = json.loads((exported("t5", "folded") / "propulsion.json").read_text())
    names = {
        name: [spec["name"] for spec in graph["inputs"]]
        for name, graph in manifest["graphs"].items()
    }
    assert names["encoder_model.onnx"] == ["input_ids", "attention_mask"]
    assert names["decoder_model.onnx"] == [
        "input_ids", "encoder_attention_mask", "encoder_hidden_states"
    ]  # fmt: skip
    assert names["decoder_with_past_model.onnx"][:3] == [
        "input_ids", "encoder_attention_mask", "past_key_values.0.decoder.key"
    ]  # fmt: skip
    assert manifest["inputs"] == []


def test_graph_of_a_decoder_has_the_names_that_its_clients_read(exported):
    artifact = Artifact.read(exported("llama", "folded"))

    inputs = {spec.name: spec for spec in artifact.manifest.inputs}
    assert list(inputs)[:5] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key",
        "past_key_values.0.value",
    ]  # fmt: skip
    assert inputs["attention_mask"].shape == ("batch", "total_sequence")
    assert inputs["past_key_values.1.key"].shape == ("batch", 2, "past_sequence", 8)
    outputs = {spec.name: spec.shape for spec in artifact.manifest.outputs}
    assert outputs["logits"] == ("batch", "sequence", 100)
    assert outputs["present.1.value"] == ("batch", 2, "total_sequence", 8)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_decoder_of_16_bits_passes(dtype, exported):
    report = check_parity(exported("llama", "switchable", dtype))

    assert_passed(report)
    assert report.runner == ("reference" if dtype == "bfloat16" else "onnxruntime")


def test_encoder_that_is_no_decoder_is_refused_by_name(
    tiny_model, tiny_checkpoint, random_adapter, tmp_path
):
    base = tiny_checkpoint("bert", "fill-mask")
    model = tiny_model("bert", "fill-mask")
    made = random_adapter(model, task="text-generation")
    (tmp_path / "adapter").mkdir()
    made = replace(made, base=str(base), fingerprint=fingerprint_of_model(model))
    made.write(tmp_path / "adapter")

    with pytest.raises(ToolError, match=r"BertLMHeadModel: is no decoder .* Is text-generation"):
        export_onnx([tmp_path / "adapter"], tmp_path / "onnx")

    assert not (tmp_path / "onnx").exists()


def test_model_whose_state_is_no_cache_is_refused_by_name():
    settings = transformers.MambaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=8
    )
    model = transformers.MambaForCausalLM(settings).eval()

    with pytest.raises(BaseModelError, match="MambaForCausalLM: keeps a state that is no cache"):
        trace_decoder(model, trace_prompt(settings))


@pytest.mark.parametrize("task", ["fill-mask", "text-classification", "feature-extraction"])
def test_decoder_whose_manifest_tells_of_another_task_is_refused(task, exported, tmp_path):
    shutil.copytree(exported("gpt2", "folded"), tmp_path / "graph")
    manifest = read_manifest(tmp_path / "graph" / "propulsion.json")
    Artifact.write(tmp_path / "graph", replace(manifest, task=task))

    with pytest.raises(ArtifactError, match=f"task is '{task}' of a graph with a cache"):
        check_parity(tmp_path / "graph")
