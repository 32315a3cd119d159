"""Tiny language models and their exports by onnxruntime-genai's builder, for what runs them.

| fixture | gives |
|---|---|
| `genai_world` | `genai_world(kind)`: a base model and two adapters, `one` and `two`, on disk |
| `genai_artifact` | `genai_artifact(kind, mode)`: an artifact of both; copy it before changing it |

KINDS are llama, gemma2, qwen3 and mistral (layers with a window of 8), lfm2 (a convolution) and
hunyuan (positions are an input). 64 channels, 2 layers, 100 tokens, 160 positions.
"""

from dataclasses import replace
from functools import cache, partial

import pytest
from genai_models import SIZES
from tiny_models import save_tokenizer
from worlds import World

# As many tokens as the tiny tokenizer has, and its special ones.
_SIZES = SIZES | {"vocab_size": 100, "bos_token_id": 2, "eos_token_id": 3}
_SETTINGS = {
    "llama": ("Llama", {}),
    "gemma2": (
        "Gemma2",
        # A tied head would repeat the last token for ever.
        {"sliding_window": 8, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    ),
    "qwen3": ("Qwen3", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "mistral": ("Mistral", {"sliding_window": 8}),
    "lfm2": (
        "Lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "hunyuan": ("HunYuanDenseV1", {}),
}
KINDS = tuple(_SETTINGS)


@pytest.fixture(scope="session")
def genai_world(shared, positive_adapter, write_adapter):
    @cache
    def make(kind):
        def fill(root):
            from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

            model = make_model(kind)
            model.save_pretrained(root / "base")
            save_tokenizer(root / "base", generative=True)
            for seed, name in ((1, "one"), (2, "two")):
                made = positive_adapter(model, seed, name, task="text-generation", embeddings=False)
                base, fingerprint = str(root / "base"), fingerprint_of_model(model)
                write_adapter(replace(made, base=base, fingerprint=fingerprint), root / name)

        root = shared(f"genai-world-{kind}", fill)
        return World(
            root=root,
            base=root / "base",
            one=root / "one",
            two=root / "two",
            make_model=partial(make_model, kind),
        )

    return make


@pytest.fixture(scope="session")
def genai_artifact(genai_world, shared):
    """`genai_artifact(kind, mode)`: an export with the adapters `one` and `two`, or with `one`."""

    @cache
    def make(kind, mode="switchable"):
        world = genai_world(kind)

        def fill(root):
            from propulsion_export import export_onnx

            names = ("one",) if mode == "folded" else ("one", "two")
            adapters = [f"{name}={getattr(world, name)}" for name in names]
            export_onnx(adapters, root / mode, mode=mode, exporter="genai")

        return shared(f"genai-{kind}-{mode}", fill) / mode

    return make


def make_model(kind, seed=0):
    """A seeded random model; norms are random too, where a mistake with them would not show."""
    import torch
    import transformers

    name, settings = _SETTINGS[kind]
    config = getattr(transformers, f"{name}Config")(**_SIZES | settings)
    torch.manual_seed(seed)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return model.eval().requires_grad_(False)
