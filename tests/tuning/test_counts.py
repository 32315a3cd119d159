"""Trainable parameters of real architectures equal the method's published and computed counts."""

import pytest
import torch
from peft import get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BloomConfig,
    DebertaV2Config,
    GPTJConfig,
    LlamaConfig,
    MistralConfig,
    RobertaConfig,
)

from propulsion_export.tuning import PropulsionConfig

from . import FROM_PEFT

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)

ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1}
LARGE = {
    "hidden_size": 1024,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "intermediate_size": 4096,
}
LLAMA_13B = {
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
}
CLASSIFIER, CAUSAL = AutoModelForSequenceClassification, AutoModelForCausalLM

MODELS = {
    "roberta-base": (CLASSIFIER, RobertaConfig(**ROBERTA, num_labels=2)),
    "roberta-large": (CLASSIFIER, RobertaConfig(**ROBERTA, **LARGE, num_labels=2)),
    "bloom-7b1": (CAUSAL, BloomConfig(vocab_size=250880, hidden_size=4096, n_layer=30, n_head=32)),
    "gpt-j-6b": (CAUSAL, GPTJConfig(tie_word_embeddings=False)),
    "llama-7b": (CAUSAL, LlamaConfig()),
    "llama-13b": (CAUSAL, LlamaConfig(**LLAMA_13B)),
    "mistral-7b": (CAUSAL, MistralConfig(vocab_size=32000)),
}
EMBEDDINGS = r".*(_embeddings|wte|embed_tokens)"
EVERY_LAYER = (
    r".*(query|key|value|dense|_proj|fc_in|fc_out|query_key_value|dense_h_to_4h|dense_4h_to_h"
    r"|_embeddings|wte|embed_tokens|lm_head)"
)
COLUMNS = {
    "q,k,v": {"target_modules": "attention"},
    "q,k,v + biases": {"target_modules": "attention", "train_bias": True},
    "all Linear, head out": {"target_modules": "all", "exclude_modules": EMBEDDINGS},
    "Linear+Emb, head out": {"target_modules": "all"},
    "Linear+Emb, head in": {"target_modules": EVERY_LAYER},
    "+ biases, head in": {"target_modules": EVERY_LAYER, "train_bias": True},
}
COUNTS = {
    "roberta-base": (27_648, 55_296, 82_944, 85_248, 86_018, 169_732),
    "roberta-large": (73_728, 147_456, 221_184, 224_256, 225_282, 447_492),
    "bloom-7b1": (368_640, 737_280, 1_105_920, 1_110_016, 1_360_896, 2_466_816),
    "gpt-j-6b": (344_064, 344_064, 1_032_192, 1_036_288, 1_086_688, 1_710_528),
    # No biases in these: a trained bias adds nothing.
    "llama-7b": (393_216, 393_216, 1_359_872, 1_363_968, 1_395_968, 1_395_968),
    "llama-13b": (614_400, 614_400, 2_129_920, 2_135_040, 2_167_040, 2_167_040),
    "mistral-7b": (196_608, 196_608, 1_376_256, 1_380_352, 1_412_352, 1_412_352),
}
TOTALS = {
    "roberta-base": 124_647_170,
    "roberta-large": 355_361_794,
    "bloom-7b1": 7_069_016_064,
    "gpt-j-6b": 6_050_882_784,
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "mistral-7b": 7_241_732_096,
}


def on_meta(auto_class, config):
    with torch.device("meta"):
        return auto_class.from_config(config)


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("model", MODELS)
def test_trainable_parameters_are_as_many_as_the_method_says(model, column):
    expected = COUNTS[model][list(COLUMNS).index(column)]

    peft_model = get_peft_model(on_meta(*MODELS[model]), PropulsionConfig(**COLUMNS[column]))

    assert peft_model.get_nb_trainable_parameters()[0] == expected


@pytest.mark.parametrize("model", MODELS)
def test_models_are_the_ones_the_counts_were_made_for(model):
    assert on_meta(*MODELS[model]).num_parameters() == TOTALS[model]


def test_roberta_base_with_the_head_is_the_papers_0_086_million():
    pattern = r".*(query|key|value|dense|out_proj|_embeddings)"

    model = get_peft_model(
        on_meta(*MODELS["roberta-base"]), PropulsionConfig(target_modules=pattern)
    )

    assert model.get_nb_trainable_parameters()[0] == 86_018


def test_deberta_leaves_out_only_the_embedding_whose_scale_would_never_train():
    config = DebertaV2Config(
        vocab_size=128100,
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        intermediate_size=3072,
        type_vocab_size=0,
        relative_attention=True,
        position_biased_input=False,
        max_relative_positions=-1,
        pos_att_type="p2c|c2p",
        norm_rel_ebd="layer_norm",
        share_att_key=True,
        position_buckets=256,
    )
    model = get_peft_model(on_meta(AutoModelForQuestionAnswering, config), PropulsionConfig())

    # The authors' 84,480 count rel_embeddings, 768 scales the model never reads.
    assert model.get_nb_trainable_parameters()[0] == 84_480 - 768
