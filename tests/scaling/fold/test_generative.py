"""Every generative architecture, folded in memory and on disk, computes what its adapter does."""

import copy
import json
from dataclasses import replace

import folding
import numpy as np
import pytest
import torch
from folding import fold_parts
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from kinds import DECODERS, ENCODER_DECODERS
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.rounding import rounded_to_odd
from propulsion_export.base_model import loading as base
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import BaseModelError
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.fold import stored
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint
from propulsion_export.scaling.fold.model import fold_
from propulsion_export.scaling.fold.stored import StoredParts

MIXTURES = ("mixtral", "qwen3-moe")
TIED = {
    "gpt2": "transformer.wte",
    "bloom": "transformer.word_embeddings",
    "opt": "model.decoder.embed_tokens",
    "gemma3": "model.embed_tokens",
    "t5": "decoder.embed_tokens",
    "bart": "model.decoder.embed_tokens",
}
architectures = pytest.mark.parametrize("kind", DECODERS + ENCODER_DECODERS)
tied_architectures = pytest.mark.parametrize("kind", TIED)
IDS = torch.tensor([[7, 12, 44, 99, 3, 61], [20, 21, 22, 8, 9, 4]])
EXACT = {"rtol": 1e-12, "atol": 1e-12}
FLOAT32 = {"rtol": 1e-4, "atol": 1e-4}


def task_of(kind):
    return "text2text-generation" if kind in ENCODER_DECODERS else "text-generation"


def logits(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        return model.eval()(**inputs).logits


def logits_attached(model, adapter):
    with attached(model, adapter):
        return logits(model)


def in_float64(model):
    if model._can_set_experts_implementation():  # the default has no float64
        model.set_experts_implementation("eager")
    return model.double()


def one_channel_changed(adapter, path=None):
    path = path or sorted(adapter.scales)[0]
    scale = adapter.scales[path]
    values = scale.values.copy()
    values.reshape(-1)[1] *= 1.5
    return replace(adapter, scales={**adapter.scales, path: Scale(values, scale.side)})


def fold(source, adapter, out, kind, **options):
    return folding.fold(source, task_of(kind), adapter, out, **options)


def load(directory, kind):
    """In plain transformers, with no weight left to chance."""
    auto = AutoModelForSeq2SeqLM if kind in ENCODER_DECODERS else AutoModelForCausalLM
    model, info = auto.from_pretrained(directory, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def keys(directory):
    return {key for file in directory.glob("*.safetensors") for key in load_file(file)}


@architectures
def test_folded_model_is_the_attached_model_in_float64(kind, tiny_model, random_adapter):
    model = in_float64(tiny_model(kind))
    adapter = random_adapter(model)
    expected, frozen = logits_attached(model, adapter), logits(model)

    fold_(model, adapter)

    assert_close(logits(model), expected, **EXACT)
    assert not torch.allclose(frozen, expected, rtol=0.05)


@architectures
def test_one_channel_folded_otherwise_is_noticed(kind, tiny_model, random_adapter):
    model = in_float64(tiny_model(kind))
    adapter = random_adapter(model)
    expected = logits_attached(model, adapter)

    fold_(model, one_channel_changed(adapter))

    assert not torch.allclose(logits(model), expected, **FLOAT32)


@architectures
def test_folded_checkpoint_is_the_attached_model(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    source = tiny_checkpoint(kind)
    adapter = random_adapter(tiny_model(kind))

    fold(source, adapter, tmp_path / "out", kind)
    fold(source, one_channel_changed(adapter), tmp_path / "other", kind)

    expected = logits_attached(load(source, kind), adapter)
    assert_close(logits(load(tmp_path / "out", kind)), expected, **FLOAT32)
    assert not torch.allclose(logits(load(tmp_path / "other", kind)), expected, **FLOAT32)


@architectures
def test_folded_checkpoint_names_its_tensors_as_the_source_does(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    fold(tiny_checkpoint(kind), random_adapter(tiny_model(kind)), tmp_path / "out", kind)

    assert keys(tmp_path / "out") == keys(tiny_checkpoint(kind))


@architectures
def test_fingerprint_on_disk_is_that_of_the_loaded_model(kind, tiny_checkpoint, tiny_model):
    source = tiny_checkpoint(kind)
    empty = base.load_empty(read_config(str(source)), task_of(kind), head={}, labels=None)

    found = fingerprint_of_checkpoint(StoredParts(Checkpoint.find(str(source)), empty))

    assert found == fingerprint_of_model(load(source, kind))
    assert found.difference(fingerprint_of_model(tiny_model(kind, seed=3)))


# Mixtures of experts


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_stored_as_one_tensor_are_folded(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    load(tiny_checkpoint(kind), kind).save_pretrained(
        tmp_path / "fused", save_original_format=False
    )
    adapter = random_adapter(tiny_model(kind))

    fold(tmp_path / "fused", adapter, tmp_path / "out", kind)

    expected = logits_attached(load(tmp_path / "fused", kind), adapter)
    assert_close(logits(load(tmp_path / "out", kind)), expected, **FLOAT32)
    assert "model.layers.1.mlp.experts.gate_up_proj" in keys(tmp_path / "out")


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_expert_of_a_checkpoint_has_its_own_scale(
    kind, tiny_checkpoint, tiny_model, tmp_path
):
    path, width = "model.layers.1.mlp.experts.gate_up_proj", inner_width(tiny_model(kind))
    scale = np.ones((4, 2 * width))
    scale[2, width + 3] = -2.0  # the third expert's fourth channel of `up`

    fold(tiny_checkpoint(kind), Adapter("a", {path: Scale(scale)}), tmp_path / "out", kind)

    before = load_file(tiny_checkpoint(kind) / "model.safetensors")
    found = load_file(tmp_path / "out" / "model.safetensors")
    (changed,) = [key for key in before if not torch.equal(before[key], found[key])]
    assert changed.split("layers.1.")[1] in (
        "block_sparse_moe.experts.2.w3.weight",
        "mlp.experts.2.up_proj.weight",
    )
    assert_close(found[changed][3], before[changed][3] * -2)
    assert torch.equal(found[changed][:3], before[changed][:3])


def inner_width(model):
    """How many channels lie between an expert's projections."""
    return model.model.layers[0].mlp.experts.down_proj.shape[2]


@pytest.mark.parametrize("expert", [0, 1, 3])
def test_an_expert_that_is_not_stored_is_refused(
    expert, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    checkpoint = Checkpoint.find(str(tiny_checkpoint("mixtral")))
    lost = f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"
    tensors = {key: tensor for key, tensor in checkpoint.tensors.items() if key != lost}
    model = tiny_model("mixtral")
    adapter, width = random_adapter(model), inner_width(model)
    config = read_config(str(tiny_checkpoint("mixtral")))
    empty = base.load_empty(config, "text-generation", head=adapter.modules, labels=adapter.labels)

    message = rf"has shape \[4, {width}, 32\], expected \[4, {2 * width}, 32\]"
    with pytest.raises(BaseModelError, match=message):
        fold_parts(StoredParts(Checkpoint("base", tensors), empty), adapter, tmp_path)


def test_experts_stored_in_a_way_that_is_not_known_are_refused(
    tiny_checkpoint, tiny_model, random_adapter, tmp_path, monkeypatch
):
    monkeypatch.setattr(stored, "_stacks_experts", lambda converter: False)
    model = tiny_model("mixtral")

    with pytest.raises(BaseModelError, match=r"cannot be folded on disk.*save_original_format"):
        fold(tiny_checkpoint("mixtral"), random_adapter(model), tmp_path / "refused", "mixtral")
    unscaled = random_adapter(model, only="self_attn")
    fold(tiny_checkpoint("mixtral"), unscaled, tmp_path / "out", "mixtral")

    expected = logits_attached(model, unscaled)
    assert_close(logits(load(tmp_path / "out", "mixtral")), expected, **FLOAT32)


# Tied weights


@tied_architectures
def test_a_tied_embedding_is_refused_with_both_ways_out_and_the_cost(
    kind, tiny_model, random_adapter
):
    model = tiny_model(kind)

    with pytest.raises(BaseModelError) as caught:
        fold_(model, random_adapter(model, tied=True))

    copies = 3 if kind in ENCODER_DECODERS else 1
    assert any(f.startswith(f"{TIED[kind]}: shares its weight with") for f in caught.value.findings)
    assert f"untying them adds {copies * 100 * 32 * 4 / 2**20:.1f} MiB" in str(caught.value)
    assert "--untie" in str(caught.value)
    assert "--mode switchable" in str(caught.value)


@tied_architectures
def test_untied_in_memory_the_head_is_the_unscaled_one(kind, tiny_model, random_adapter):
    model = in_float64(tiny_model(kind))
    adapter = random_adapter(model, tied=True)
    head = model.get_output_embeddings().weight.clone()
    expected = logits_attached(model, adapter)

    fold_(model, adapter, untie=True)

    assert_close(logits(model), expected, **EXACT)
    assert torch.equal(model.get_output_embeddings().weight, head)
    assert not torch.allclose(model.get_submodule(TIED[kind]).weight, head)


@tied_architectures
def test_untied_on_disk_plain_transformers_keeps_the_weights_apart(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    source = tiny_checkpoint(kind)
    adapter = random_adapter(tiny_model(kind), tied=True)
    assert TIED[kind] in adapter.scales

    fold(source, adapter, tmp_path / "out", kind, untie=True)

    expected = logits_attached(load(source, kind), adapter)
    model = load(tmp_path / "out", kind)
    assert_close(logits(model), expected, **FLOAT32)
    head = load(source, kind).get_output_embeddings().weight
    assert torch.equal(model.get_output_embeddings().weight, head)
    # T5 scales the decoder's output because its weights count as tied.
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is (kind == "t5")


@tied_architectures
def test_a_scaled_tied_head_leaves_the_embedding_alone(kind, tiny_checkpoint, tmp_path):
    source = tiny_checkpoint(kind)
    adapter = Adapter("head", {"lm_head": Scale(np.linspace(0.5, 2, 100))})

    with pytest.raises(BaseModelError, match="lm_head: shares its weight with"):
        fold(source, adapter, tmp_path / "refused", kind)
    fold(source, adapter, tmp_path / "out", kind, untie=True)

    expected = logits_attached(load(source, kind), adapter)
    model = load(tmp_path / "out", kind)
    assert_close(logits(model), expected, **FLOAT32)
    embedding = load(source, kind).get_submodule(TIED[kind]).weight
    assert torch.equal(model.get_submodule(TIED[kind]).weight, embedding)


@tied_architectures
def test_a_checkpoint_that_was_untied_before_is_folded_as_it_is(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    """The configuration of T5 says that weights are tied; those of this checkpoint are not."""
    adapter = random_adapter(tiny_model(kind), tied=True)
    fold(tiny_checkpoint(kind), adapter, tmp_path / "first", kind, untie=True)

    fold(tmp_path / "first", adapter, tmp_path / "second", kind)

    expected = logits_attached(load(tmp_path / "first", kind), adapter)
    assert_close(logits(load(tmp_path / "second", kind)), expected, **FLOAT32)


def test_weights_that_the_configuration_ties_and_the_checkpoint_does_not_stay_apart(
    tiny_model, random_adapter, tmp_path
):
    """transformers loads both; a model made from the configuration alone has one of them."""
    model = tiny_model("llama", tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    adapter = random_adapter(model)
    assert "model.embed_tokens" in adapter.scales

    fold(tmp_path / "source", adapter, tmp_path / "out", "llama")

    expected = logits_attached(model, adapter)
    assert_close(logits(load(tmp_path / "out", "llama")), expected, **FLOAT32)


def test_t5_without_output_scaling_stays_without(tiny_model, random_adapter, tmp_path):
    """Version 1.1: `tie_word_embeddings: false` in its file is all that says so."""
    model = tiny_model("t5", tie_word_embeddings=False)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(100, 32), requires_grad=False)
    model.save_pretrained(tmp_path / "source")
    adapter = random_adapter(model, tied=True)
    assert not model.config.scale_decoder_outputs

    fold(tmp_path / "source", adapter, tmp_path / "out", "t5", untie=True)

    expected = logits_attached(copy.deepcopy(model), adapter)
    assert_close(logits(load(tmp_path / "out", "t5")), expected, **FLOAT32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversion_rounds_every_experts_float64_product_once(
    dtype, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    model = tiny_model("mixtral")
    adapter, width = random_adapter(model), inner_width(model)
    name = "model.layers.0.block_sparse_moe.experts.2.w3.weight"

    fold(
        tiny_checkpoint("mixtral"),
        adapter,
        tmp_path / "out",
        "mixtral",
        dtype={torch.float16: "F16", torch.bfloat16: "BF16"}[dtype],
        max_shard_size=20_000,
    )

    before = load_file(tiny_checkpoint("mixtral") / "model.safetensors")
    scale = adapter.scales["model.layers.0.mlp.experts.gate_up_proj"].values[2, width:]
    product = (before[name].double() * torch.from_numpy(scale)[:, None]).numpy()
    shards = [load_file(file) for file in sorted((tmp_path / "out").glob("*.safetensors"))]
    (found,) = [shard[name] for shard in shards if name in shard]
    assert len(shards) > 2
    # torch itself goes from float64 to 16 bits by way of float32.
    assert torch.equal(found, torch.from_numpy(rounded_to_odd(product)).to(dtype))
    assert load(tmp_path / "out", "mixtral").dtype == dtype


def test_cost_of_untying_is_that_of_the_dtype_it_is_stored_in(tiny_model, random_adapter, tmp_path):
    model = tiny_model("gpt2", vocab_size=8192).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "source")

    with pytest.raises(BaseModelError, match=r"untying them adds 0\.5 MiB"):
        fold(tmp_path / "source", random_adapter(model, tied=True), tmp_path / "out", "gpt2")


def test_a_buffer_that_the_checkpoint_holds_is_kept(tiny_model, random_adapter, tmp_path):
    model = tiny_model("bart")
    model.final_logits_bias.copy_(torch.randn(1, 100))
    model.save_pretrained(tmp_path / "source")
    adapter = random_adapter(model, tied=True)

    fold(tmp_path / "source", adapter, tmp_path / "out", "bart", untie=True)

    found = load(tmp_path / "out", "bart")
    assert torch.equal(found.final_logits_bias, model.final_logits_bias)
    assert_close(logits(found), logits_attached(model, adapter), **FLOAT32)


def test_names_of_other_versions_and_tensors_of_no_use_are_read_past(
    tiny_model, random_adapter, tmp_path
):
    """GPT-2's first checkpoints have no prefix, and the causal mask as a tensor."""
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path / "source")
    file = tmp_path / "source" / "model.safetensors"
    tensors = {name.removeprefix("transformer."): value for name, value in load_file(file).items()}
    save_file(tensors | {"h.0.attn.bias": torch.ones(1, 1, 4, 4)}, file, metadata={"format": "pt"})
    adapter = random_adapter(model)

    fold(tmp_path / "source", adapter, tmp_path / "out", "gpt2")

    assert_close(logits(load(tmp_path / "out", "gpt2")), logits_attached(model, adapter), **FLOAT32)
    assert keys(tmp_path / "out") == {f"transformer.{name}" for name in tensors}
