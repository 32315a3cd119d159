"""Presets, lists and patterns choose the modules they say, and refuse where a scale cannot act."""

import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    DebertaV2Config,
    DebertaV2Model,
    MambaConfig,
    MambaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from propulsion_export.errors import UsageError
from propulsion_export.tuning import PropulsionConfig
from propulsion_export.tuning.placement import ATTENTION_NAMES, resolve_targets

from . import tiny_bert, tiny_gpt2, tiny_llama

# transformers has no such model types (any more): their code comes with the checkpoint.
REMOTE_CODE = {"RefinedWeb", "RefinedWebModel", "btlm", "chatglm", "rwkv7"}
KNOWN = sorted(TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING)
# What in each architecture is query, key and value: fused, or three projections a block.
FUSED = {
    "bloom": "query_key_value",
    "codegen": "qkv_proj",
    "deberta": "in_proj",
    "falcon": "query_key_value",
    "gpt2": "c_attn",
    "gpt_bigcode": "c_attn",
    "gpt_neox": "query_key_value",
    "mpt": "Wqkv",
}


def resolved(model, targets, **options):
    return resolve_targets(model, PropulsionConfig(target_modules=targets, **options))


@pytest.mark.parametrize("model_type", KNOWN)
def test_attention_preset_knows_every_architecture_that_peft_knows(model_type):
    assert model_type in ATTENTION_NAMES


@pytest.mark.parametrize("model_type", sorted(set(KNOWN) - REMOTE_CODE))
def test_attention_preset_finds_query_key_and_value_and_nothing_else(model_type):
    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.for_model(model_type))

    names = [path.rpartition(".")[2] for path in resolved(model, "attention")]

    fused = [name for name in names if name in (FUSED.get(model_type), "qkv")]
    single = [name for name in names if name not in fused]
    kinds = {name: single.count(name) for name in single}
    assert names
    assert len(kinds) % 3 == 0  # the same number of queries, keys and values
    assert len({kinds[name] for name in kinds if name.startswith(("q", "k", "v"))}) <= 2
    if model_type in FUSED:
        assert fused
        assert not single


def test_attention_preset_of_an_unknown_architecture_asks_for_a_pattern():
    model = nn.Sequential(nn.Linear(2, 2))

    with pytest.raises(UsageError, match="regular expression"):
        resolved(model, "attention")


def test_all_means_every_linear_and_embedding_of_the_base():
    model = tiny_bert()
    expected = {
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and path.startswith("bert.")
    }

    assert resolved(model, "all") == expected


def test_all_reaches_the_transposed_layers_of_gpt2():
    names = {path.partition("h.0.")[2] for path in resolved(tiny_gpt2(), "all")} - {""}

    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_lm_head_is_left_out_unless_asked_for(build):
    assert "lm_head" not in resolved(build(), "all")
    assert "lm_head" in resolved(build(), r".*\.c_attn|lm_head|.*q_proj")


def test_task_head_is_left_out_unless_asked_for():
    assert "classifier" not in resolved(tiny_bert(), "all")
    assert resolved(tiny_bert(), ["classifier"]) == {"classifier"}


def test_modules_to_save_are_not_scaled():
    assert not any(
        "pooler" in path for path in resolved(tiny_bert(), "all", modules_to_save=["pooler"])
    )


def test_list_matches_endings_and_pattern_the_whole_path():
    model = tiny_bert()

    assert len(resolved(model, ["query"])) == 2
    assert len(resolved(model, r".*layer\.0.*\.(query|LayerNorm)")) == 3
    with pytest.raises(UsageError, match="matches no layer"):
        resolved(model, "query")


def test_excluded_modules_are_left_out():
    model = tiny_bert()

    assert resolved(model, "all") - resolved(model, "all", exclude_modules=["query"]) == {
        f"bert.encoder.layer.{layer}.attention.self.query" for layer in (0, 1)
    }


def test_norms_are_scaled_only_when_named():
    assert not any("norm" in path.lower() for path in resolved(tiny_llama(), "all"))
    assert len(resolved(tiny_llama(), ["input_layernorm"])) == 2


@pytest.mark.parametrize("targets", ["nothing_like_it", ["nothing_like_it"]])
def test_targets_that_match_nothing_are_refused(targets):
    with pytest.raises(UsageError, match="nothing_like_it"):
        resolved(tiny_bert(), targets)


def test_linear_as_the_whole_model_is_refused():
    with pytest.raises(UsageError, match="matches no layer of Linear"):
        resolved(nn.Linear(2, 2), "all")


def test_layer_of_a_kind_that_cannot_be_scaled_is_refused_when_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Conv2d(1, 1, 1))

    assert resolved(model, "all") == {"0"}
    with pytest.raises(UsageError, match=r"1: is a Conv2d"):
        resolved(model, ".*")


def test_dead_embeddings_are_left_out_and_refused_when_named():
    config = DebertaV2Config(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        relative_attention=True,
    )
    model = DebertaV2Model(config)

    assert not any("rel_embeddings" in path for path in resolved(model, "all"))
    with pytest.raises(UsageError, match=r"rel_embeddings: .*reads its weight without calling it"):
        resolved(model, [".rel_embeddings", "rel_embeddings"])


def test_place_where_t5_keeps_its_tied_embedding_is_left_out():
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    model = T5ForConditionalGeneration(config)

    paths = resolved(model, "all")

    assert "shared" not in paths
    assert {"encoder.embed_tokens", "decoder.embed_tokens"} <= paths


def test_projections_that_a_mamba_kernel_reads_are_left_out():
    config = MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1, state_size=4)

    paths = resolved(MambaModel(config), "all")

    assert paths == {"embeddings", "layers.0.mixer.in_proj"}


@pytest.mark.parametrize(
    ("model", "path"),
    [
        pytest.param(nn.Sequential(nn.MultiheadAttention(4, 1)), "0.out_proj", id="attention"),
        pytest.param(nn.Sequential(nn.MultiheadAttention(4, 1)), "0", id="attention-itself"),
        pytest.param(
            nn.Sequential(nn.TransformerEncoderLayer(4, 1, 8)), "0.linear1", id="encoder-layer"
        ),
    ],
)
def test_layers_whose_weights_torch_reads_directly_are_refused(model, path):
    with pytest.raises(UsageError, match=path):
        resolved(model, [path])
    with pytest.raises(UsageError, match="matches no layer"):
        resolved(model, "all")


def test_module_used_under_two_names_is_refused():
    linear = nn.Linear(2, 2)
    model = nn.ModuleDict({"one": linear, "two": linear, "three": nn.Linear(2, 2)})

    with pytest.raises(UsageError, match="one: is the same module as two"):
        resolved(model, "all")
    assert resolved(model, "all", exclude_modules=["one", "two"]) == {"three"}
