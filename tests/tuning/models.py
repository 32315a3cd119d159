"""Tiny models and what they compute, for tests of the tuner in PEFT."""

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from . import IDS, with_biases

CLOSE = {"rtol": 0, "atol": 1e-5}


def tiny_t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def tiny_opt(seed=0):
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=20,
        word_embed_proj_dim=16,
    )
    return with_biases(OPTForCausalLM(config).eval())


def tiny_bart(seed=0):
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=20,
        scale_embedding=True,
    )
    return with_biases(BartForConditionalGeneration(config).eval())


def outputs(model):
    """Logits, with a decoder input where the model wants one."""
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **extra).logits


UNTIED = pytest.mark.filterwarnings(
    "ignore:Input and output embeddings are no longer tied after merging:UserWarning"
)
