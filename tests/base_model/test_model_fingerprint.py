"""A base model is recognised whatever head, prefix or dtype it comes with, and no other is."""

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
    T5Model,
)

from propulsion_export.base_model.model_fingerprint import (
    fingerprint_of_model,
    has_readable_weights,
)
from propulsion_export.errors import BaseModelError

BERT = BertConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=20,
)
LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    tie_word_embeddings=False,
)
T5 = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)


def seeded(cls, config, seed=0):
    torch.manual_seed(seed)
    return cls(config)


def same(one, other):
    return fingerprint_of_model(one).difference(fingerprint_of_model(other)) is None


@pytest.mark.parametrize(
    ("bare", "headed", "config"),
    [
        pytest.param(BertModel, BertForSequenceClassification, BERT, id="bert-classification"),
        pytest.param(BertModel, BertForMaskedLM, BERT, id="bert-masked"),
        pytest.param(LlamaModel, LlamaForCausalLM, LLAMA, id="llama-untied"),
        pytest.param(T5Model, T5ForConditionalGeneration, T5, id="t5"),
    ],
)
def test_head_and_prefix_do_not_matter(bare, headed, config):
    base = seeded(bare, config)
    model = seeded(headed, config, seed=1)
    inner = model.base_model if model.base_model is not model else model
    inner.load_state_dict(base.state_dict(), strict=False)

    assert same(base, model)
    assert fingerprint_of_model(base).entries.keys() == fingerprint_of_model(model).entries.keys()


def test_new_random_head_and_pooler_do_not_matter():
    one = seeded(BertForSequenceClassification, BERT)
    other = seeded(BertForSequenceClassification, BERT)
    torch.nn.init.normal_(other.classifier.weight)
    torch.nn.init.normal_(other.bert.pooler.dense.weight)

    assert same(one, other)


@pytest.mark.parametrize(
    "dtypes",
    [
        pytest.param((torch.bfloat16,), id="bf16"),
        pytest.param((torch.float16,), id="fp16"),
        pytest.param((torch.float16, torch.bfloat16), id="fp16-then-bf16"),
        pytest.param((torch.float64,), id="fp64"),
    ],
)
def test_same_base_in_another_dtype_is_recognised(dtypes):
    base, loaded = seeded(BertModel, BERT), seeded(BertModel, BERT)
    for dtype in dtypes:
        loaded.to(dtype)

    assert same(base, loaded)


def test_base_of_the_same_shape_is_told_apart():
    assert not same(seeded(BertModel, BERT), seeded(BertModel, BERT, seed=1))


def test_base_trained_a_bit_further_is_told_apart():
    base, further = seeded(BertModel, BERT), seeded(BertModel, BERT)
    optimizer = torch.optim.AdamW(further.parameters(), lr=1e-4)
    further(torch.tensor([[1, 2, 3]])).last_hidden_state.square().mean().backward()
    optimizer.step()

    assert not same(base, further)


def test_base_on_the_meta_device_is_refused():
    with torch.device("meta"):
        model = BertModel(BERT)

    with pytest.raises(BaseModelError, match="meta"):
        fingerprint_of_model(model)


def test_quantised_base_is_not_readable():
    model = seeded(BertModel, BERT)
    linear = model.encoder.layer[0].output.dense
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)

    assert not has_readable_weights(model)
