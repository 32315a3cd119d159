"""Tiny models and never-identity adapters for the tuner's tests."""

import torch
from peft import get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from propulsion_export.tuning import PropulsionConfig, PropulsionLayer

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
# transformers deprecates what PEFT 0.21 reads on every attach; remove with PEFT's next release.
FROM_PEFT = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"


def tiny_bert(seed=0, **changes):
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        **changes,
    )
    return with_biases(BertForSequenceClassification(config).eval())


def tiny_llama(seed=0, *, tied=True):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def tiny_gpt2(seed=0):
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=20)
    config.bos_token_id = config.eos_token_id = None
    return with_biases(GPT2LMHeadModel(config).eval())


def with_biases(model):
    """Random biases: transformers starts them at zero, where a wrong bias does not show."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.1)
    return model


def tuned(model, seed=1, spread=0.05, **options):
    """The model with a trained-looking adapter: no vector of ones, biases away from the frozen."""
    peft_model = get_peft_model(model, PropulsionConfig(**options)).eval()
    randomize(peft_model, seed, spread)
    return peft_model


def randomize(model, seed=1, spread=0.05, adapter="default"):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers(model).values():
            z = layer.propulsion_z[adapter] if adapter in layer.propulsion_z else torch.empty(0)
            z.copy_(1 + spread * torch.randn(z.shape, generator=generator))
            if adapter in layer.propulsion_bias:
                bias = layer.propulsion_bias[adapter]
                bias.add_(0.1 * torch.randn(bias.shape, generator=generator))


def layers(model):
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, PropulsionLayer)
    }


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(input_ids=ids).logits
