"""A session generates for each prompt what its adapter alone would."""

import json

import numpy as np
import pytest
from session_inputs import TEXTS, own, random_inputs

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.token_sampling import Sampling


@pytest.fixture
def continuations(make_world, shared):
    """`continuations(kind, texts, adapters)`: 12 tokens for each by transformers; kept on disk."""

    def fill(kind, texts, adapters, directory):
        from transformers import AutoTokenizer

        from propulsion_export.scaling.attach import attached

        world = make_world(kind)
        tokenizer, found = AutoTokenizer.from_pretrained(world.base), []
        for text, name in zip(texts, adapters, strict=True):
            adapter = Adapter("none", {}) if name == "base" else Adapter.read(world.root / name)
            with attached(world.model, adapter):
                found.append(generate(world.model, tokenizer(text)["input_ids"], 12))
        (directory / "tokens.json").write_text(json.dumps(found))

    def make(kind, texts, adapters):
        name = f"continuations-{kind}"
        directory = shared(name, lambda to: fill(kind, texts, adapters, to))
        return json.loads((directory / "tokens.json").read_text())

    return make


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_each_prompt_goes_on_as_alone_with_its_adapter(kind, generative, continuations):
    made = generative(kind)
    names = ["one", "base", "two", "one", "two", "base"]
    texts = TEXTS[:6]
    settings = Settings(new_tokens=12)
    expected = continuations(kind, texts, names)

    together = made.session(texts, names, settings=settings)

    for text, name, reply, tokens in zip(texts, names, together, expected, strict=True):
        [alone] = made.session(text, name, settings=settings)
        assert reply.prediction == alone.prediction
        assert reply.prediction["tokens"] == tokens
        assert (reply.outputs, reply.adapter) == ({}, name)
    # The twin: with another adapter they would have been other texts.
    told = [made.session(texts, name, settings=settings) for name in ("one", "two", "base")]
    assert len({str([reply.prediction for reply in replies]) for replies in told}) == 3


def generate(model, prompt, new):
    """Greedy tokens by transformers, without the one that ends them."""
    import torch

    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new
    )[0]
    found = found[1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
    return found[:-1] if found[-1:] == [model.config.eos_token_id] else found


def test_a_seed_draws_the_same_for_a_row_whatever_adapters_are_beside_it(generative):
    session = generative("llama").session
    settings = Settings(new_tokens=8, sampling=Sampling(temperature=2.0), seed=3)

    mixed = session(TEXTS[:3], ["one", "two", "base"], settings=settings)
    same = session(TEXTS[:3], ["one", "one", "base"], settings=settings)

    assert mixed[0].prediction == same[0].prediction
    assert mixed[2].prediction == same[2].prediction
    assert mixed[1].prediction != same[1].prediction


def test_tensors_of_a_generative_model_give_logits_of_every_position(generative, tiny_model):
    made, model = generative("llama"), tiny_model("llama")
    inputs = {name: values for name, values in random_inputs().items() if "type" not in name}

    replies = made.session(inputs, ["one", "two"] * 8)

    from propulsion_export.runners.pytorch import torch_runner
    from propulsion_export.scaling.attach import attached

    for row, reply in enumerate(replies[:4]):
        with attached(model, Adapter.read(made.world.root / reply.adapter)):
            logits = torch_runner(model)(own(inputs, row))["logits"][0]
        np.testing.assert_allclose(reply.outputs["logits"], logits, atol=1e-3)
