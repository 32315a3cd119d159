"""Tiny models of architectures that were exported wrongly, or failed after all the work."""

import numpy as np
import torch
import transformers
from tiny_models import LABELS

from propulsion_export.base_model.loading import BaseModel

NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
TOKENS = {"vocab_size": 100, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
ENCODER_DECODER = TOKENS | {
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 20,
    "decoder_ffn_dim": 20,
    "max_position_embeddings": 40,
    "init_std": 0.3,
    "decoder_start_token_id": 3,
}
T5 = TOKENS | {"d_model": 16, "d_kv": 8, "d_ff": 20, "num_layers": 1, "num_heads": 2}


T5 |= {"decoder_start_token_id": 0}


LLAMA = TOKENS | {
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 160,
}
SETTINGS = {
    "Bart": ENCODER_DECODER,
    "MBart": ENCODER_DECODER,
    "T5": T5,
    "UMT5": T5,
    "Falcon": TOKENS
    | {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "ffn_hidden_size": 20,
        "alibi": True,
        "multi_query": False,
        "parallel_attn": False,
        "new_decoder_architecture": False,
    },
    "Funnel": {
        "vocab_size": 100,
        "block_sizes": [1, 1],
        "d_model": 16,
        "n_head": 2,
        "d_head": 8,
        "d_inner": 20,
        "num_decoder_layers": 1,
    },
    "Lfm2": LLAMA
    | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3, "block_multiple_of": 4},
    "MiniMax": LLAMA
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
    },
    "Llama": LLAMA,
    "SqueezeBert": {
        "vocab_size": 100,
        "hidden_size": 16,
        "embedding_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "max_position_embeddings": 40,
        "q_groups": 1,
        "k_groups": 1,
        "v_groups": 1,
        "initializer_range": 0.3,
    },
    "XGLM": TOKENS
    | {
        "d_model": 16,
        "ffn_dim": 20,
        "num_layers": 1,
        "attention_heads": 2,
        "max_position_embeddings": 160,
    },
}


def make(kind, head, **settings):
    """A seeded random model with biases and norms that are random too."""
    config = getattr(transformers, f"{kind}Config")(**SETTINGS[kind] | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}{head}")(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model


def tokens(*rows):
    """Rows padded on the right with 0, and their mask."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    return {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}


def tensors(batch):
    return {name: torch.from_numpy(values) for name, values in batch.items()}


def base_of(model, task="token-classification"):
    return BaseModel(model, "tiny", task, frozenset(), frozenset(), LABELS)
