"""A model that would be taught to copy, or lets passages leak, is found by asking it."""

import pytest
import torch
import transformers

from propulsion_export.training.probe import leaks_in_a_block, looks_ahead


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "bloom", "opt", "llama", "qwen3-moe"])
def test_a_decoder_does_not_look_ahead(kind, dtype, tiny_model):
    assert not looks_ahead(tiny_model(kind).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_looks_ahead(dtype, tiny_bert):
    config = tiny_bert("fill-mask").config
    torch.manual_seed(0)
    assert looks_ahead(transformers.BertLMHeadModel(config).eval().to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "gptj", "llama", "mistral", "gemma3", "qwen3-moe"])
def test_positions_keep_passages_apart(kind, dtype, tiny_model):
    assert not leaks_in_a_block(tiny_model(kind).to(dtype))


def test_a_model_that_attends_whatever_the_positions_leaks(tiny_model):
    assert leaks_in_a_block(tiny_model("opt"))
