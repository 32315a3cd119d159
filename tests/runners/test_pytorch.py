"""Torch modules run on arrays, and return arrays; steps with a cache are one pass without."""

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast

from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.errors import BaseModelError, ToolError
from propulsion_export.runners.decoding import (
    CausalModel,
    Decoder,
    EncoderDecoder,
    pad_left,
    recomputing,
    replaying,
    row_by_row,
)
from propulsion_export.runners.pytorch import (
    torch_cross_decoder_runner,
    torch_decoder_runner,
    torch_encoder_runner,
    torch_runner,
)

X = np.array([[1.0, 2.0], [3.0, -4.0]], np.float32)
CAUSAL = ["gpt2", "gptj", "bloom", "opt", "llama", "mistral", "qwen3", "gemma3", "phi3", "mixtral"]
CHOOSER = np.random.default_rng(5)
TOKENS = CHOOSER.integers(5, 100, (3, 40))
ROWS = [CHOOSER.integers(5, 100, length) for length in (13, 6, 9)]


class Doubler(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 2.0], dtype=dtype))

    def forward(self, x):
        return BaseModelOutputWithPast(
            last_hidden_state=x.to(self.weight.dtype) * self.weight, past_key_values=[1, 2]
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_torch_outputs_become_arrays_without_what_is_no_tensor(dtype):
    outputs = torch_runner(Doubler(dtype))({"x": X})

    expected = {torch.float64: np.float64, torch.float16: np.float16}.get(dtype, np.float32)
    assert list(outputs) == ["last_hidden_state"]
    assert outputs["last_hidden_state"].dtype == expected
    np.testing.assert_array_equal(outputs["last_hidden_state"], 2 * X)


def test_torch_runner_keeps_no_gradients():
    model = Doubler(torch.float32)

    torch_runner(model)({"x": X})

    assert model.weight.requires_grad
    assert model.weight.grad is None


# A causal language model and its cache


def double(model):
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")  # the others have no float64
    return model.double()


def unmasked(tokens):
    return {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}


def stepwise(run, pieces, inputs=()):
    """Logits of tokens read piece by piece."""
    decoder = Decoder(run, inputs)
    state, parts = decoder.start(len(pieces[0])), []
    for piece in pieces:
        logits, state = decoder.step(state, piece)
        parts.append(logits)
    return np.concatenate(parts, axis=1), state


@pytest.mark.parametrize("kind", CAUSAL)
def test_steps_with_a_cache_are_the_model_in_one_go(kind, tiny_model):
    """40 tokens: more than twice the window of those that slide."""
    model = double(tiny_model(kind))
    expected = torch_runner(model)(unmasked(TOKENS))["logits"]

    pieces = np.split(TOKENS, [17, 19, 20, 30], axis=1)
    found, state = stepwise(torch_decoder_runner(model), pieces)

    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert found.dtype == np.float64
    assert {values.shape[2] for values in state.cache.values()} == {40}


@pytest.mark.parametrize("kind", ["bloom", "opt", "llama", "mistral", "mixtral"])
def test_padded_rows_are_the_rows_alone(kind, tiny_model):
    # BLOOM's softmax is in float32, where the masking number of float64 is infinite: padding in
    # float64 gives NaN.
    single = kind == "bloom"
    model = CausalModel(
        torch_decoder_runner(tiny_model(kind) if single else double(tiny_model(kind)))
    )
    batch = pad_left(ROWS, 0)

    found = replaying(model)(batch)[LOGITS]

    visible = batch["attention_mask"] == 1
    expected = row_by_row(recomputing(model))(batch)[LOGITS]
    tolerance = 1e-4 if single else 1e-9
    np.testing.assert_allclose(found[visible], expected[visible], rtol=0, atol=tolerance)


def test_sliding_window_is_kept_with_a_cache_and_is_short_enough_to_show(tiny_model):
    """The cache keeps what slid out of the window, and the mask hides it."""
    changed = TOKENS.copy()
    changed[:, 0] = 5 + (TOKENS[:, 0] + 1) % 90
    last = {}
    for kind in ("mistral", "llama"):
        run = torch_decoder_runner(double(tiny_model(kind)))
        pair = [
            stepwise(run, np.split(tokens, range(20, 40), axis=1))[0][:, -1]
            for tokens in (TOKENS, changed)
        ]
        last[kind] = np.abs(pair[0] - pair[1]).max()

    # Two layers of 16 tokens reach back 30 tokens.
    assert last["mistral"] == 0
    assert last["llama"] > 1e-6


def test_empty_cache_is_none(tiny_model):
    model = tiny_model("llama")
    run = torch_decoder_runner(model)
    feeds = unmasked(TOKENS) | {"position_ids": np.tile(np.arange(40), (3, 1))}
    empty = {
        f"past_key_values.{layer}.{kind}": np.zeros((3, 2, 0, 8), np.float32)
        for layer in (0, 1)
        for kind in ("key", "value")
    }

    with_it, without = run({**feeds, **empty}), run(feeds)

    assert with_it.keys() == without.keys()
    assert all(np.array_equal(with_it[name], without[name]) for name in without)


def test_outputs_are_logits_and_the_cache_by_layer_in_the_graphs_layout(tiny_model):
    feeds = unmasked(TOKENS) | {"position_ids": np.tile(np.arange(40), (3, 1))}

    outputs = torch_decoder_runner(tiny_model("llama"))(feeds)

    assert list(outputs) == [
        "logits", "present.0.key", "present.0.value", "present.1.key", "present.1.value"
    ]  # fmt: skip
    assert outputs["present.1.value"].shape == (3, 2, 40, 8)


def test_layers_from_ten_on_get_their_own_cache(tiny_model):
    model = double(tiny_model("llama", num_hidden_layers=12))
    expected = torch_runner(model)(unmasked(TOKENS))["logits"]

    found, state = stepwise(torch_decoder_runner(model), np.split(TOKENS, [39], axis=1))

    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)
    assert len(state.cache) == 24


@pytest.mark.parametrize(
    "mistake", ["exchanged-layers", "exchanged-rows", "key-for-value", "positions"]
)
def test_mistake_with_the_cache_shows(mistake, tiny_model):
    model = double(tiny_model("llama"))
    run = torch_decoder_runner(model)
    _, state = stepwise(run, [TOKENS[:, :39]])
    feeds = {
        "input_ids": TOKENS[:, 39:], "attention_mask": np.ones_like(TOKENS),
        "position_ids": np.full((3, 1), 39), **state.cache,
    }  # fmt: skip
    expected = torch_runner(model)(unmasked(TOKENS))["logits"][:, 39:]
    np.testing.assert_allclose(run(feeds)[LOGITS], expected, rtol=0, atol=1e-9)

    first = {name: values for name, values in feeds.items() if ".0." in name}
    wrong = {
        "exchanged-layers": {name: feeds[name.replace("0", "1")] for name in first},
        "exchanged-rows": {name: values[::-1].copy() for name, values in first.items()},
        "key-for-value": {"past_key_values.0.value": feeds["past_key_values.0.key"]},
        "positions": {"position_ids": np.full((3, 1), 0)},
    }[mistake]

    assert np.abs(run({**feeds, **wrong})[LOGITS] - expected).max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cache_goes_out_and_in_without_losing_a_bit(dtype, tiny_model):
    model = tiny_model("llama").to(dtype)
    tokens = torch.from_numpy(TOKENS)
    cache = DynamicCache()
    with torch.inference_mode():
        model(input_ids=tokens[:, :39], cache=cache, use_cache=True)
        expected = model(input_ids=tokens[:, 39:], cache=cache, use_cache=True).logits

    found, state = stepwise(torch_decoder_runner(model), np.split(TOKENS, [39], axis=1))

    np.testing.assert_array_equal(found[:, 39:], expected.float().numpy())
    for index, layer in enumerate(cache.layers):
        for kind in ("key", "value"):
            fed = state.cache[f"past_key_values.{index}.{kind}"]
            assert torch.equal(torch.from_numpy(fed).to(dtype), getattr(layer, f"{kind}s"))


def test_decoder_runner_leaves_what_it_is_fed(tiny_model):
    _, state = stepwise(torch_decoder_runner(tiny_model("llama")), [TOKENS[:, :5]])
    before = {name: values.copy() for name, values in state.cache.items()}

    Decoder(torch_decoder_runner(tiny_model("llama"))).step(state, TOKENS[:, 5:6])

    assert all(np.array_equal(state.cache[name], before[name]) for name in before)


# Encoder-decoders


def opened(model):
    return EncoderDecoder(
        torch_encoder_runner(model),
        torch_cross_decoder_runner(model),
        model.config.decoder_start_token_id,
    )


def translated(model):
    """A padded prompt, and tokens for the decoder."""
    start = model.config.decoder_start_token_id
    tokens = np.concatenate([np.full((3, 1), start), TOKENS[:, :11]], axis=1)
    return {**opened(model).pad(ROWS, model.config.pad_token_id), "decoder_input_ids": tokens}


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_encoder_is_that_of_the_model(kind, tiny_model):
    model = tiny_model(kind)
    batch = translated(model)

    outputs = torch_encoder_runner(model)(batch)

    expected = torch_runner(model)(batch)["encoder_last_hidden_state"]
    assert list(outputs) == ["last_hidden_state"]
    np.testing.assert_array_equal(outputs["last_hidden_state"], expected)


@pytest.mark.parametrize("kind", ["t5", "bart"])
@pytest.mark.parametrize("way", [recomputing, replaying])
def test_encoder_and_decoder_are_the_models_forward(way, kind, tiny_model):
    model = double(tiny_model(kind))
    batch = translated(model)

    found = way(opened(model))(batch)[LOGITS]

    expected = torch_runner(model)(batch)["logits"]
    assert found.shape == (3, 12, 100)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padded_prompts_of_an_encoder_are_the_prompts_alone(kind, tiny_model):
    model = double(tiny_model(kind))
    batch = translated(model)

    found = replaying(opened(model))(batch)[LOGITS]

    expected = row_by_row(recomputing(opened(model)))(batch)[LOGITS]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_first_step_makes_something_of_the_encoders_output_and_later_ones_keep_it(kind, tiny_model):
    model = tiny_model(kind)
    opening = opened(model).open(translated(model))

    _, first = opening.decoder.step(opening.decoder.start(3), opening.tokens)
    _, later = opening.decoder.step(first, TOKENS[:, :1])

    assert list(first.cache) == [
        f"past_key_values.{layer}.{part}.{kind}"
        for part in ("decoder", "encoder")
        for layer in (0, 1)
        for kind in ("key", "value")
    ]
    for name, values in later.cache.items():
        if ".encoder." in name:
            np.testing.assert_array_equal(values, first.cache[name])
            assert values.shape[2] == 13
        else:
            assert values.shape[2] == first.cache[name].shape[2] + 1 == 13


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_cache_of_the_encoders_output_is_what_is_read(kind, tiny_model):
    model = tiny_model(kind)
    opening = opened(model).open(translated(model))
    _, state = opening.decoder.step(opening.decoder.start(3), opening.tokens)
    right, _ = opening.decoder.step(state, TOKENS[:, :1])

    turned = {n: v[::-1].copy() if ".encoder." in n else v for n, v in state.cache.items()}
    wrong, _ = opening.decoder.step(type(state)(state.mask, turned), TOKENS[:, :1])

    assert np.abs(right - wrong).max() > 1e-3


def test_encoder_that_returns_no_cache_is_refused_by_name(tiny_model):
    masked = tiny_model("bert", "fill-mask")
    model = transformers.BertLMHeadModel(masked.config).eval()
    tokens = np.array([[5, 6, 7]])
    feeds = {
        "input_ids": tokens, "attention_mask": np.ones_like(tokens), "position_ids": tokens - 5
    }  # fmt: skip

    with pytest.raises(BaseModelError, match="BertLMHeadModel: returns no cache"):
        torch_decoder_runner(model)(feeds)


def test_model_with_another_state_than_a_cache_is_refused_by_name():
    settings = transformers.MambaConfig(
        vocab_size=100, hidden_size=32, num_hidden_layers=1, state_size=8
    )

    with pytest.raises(BaseModelError, match="MambaForCausalLM: keeps a state"):
        torch_decoder_runner(transformers.MambaForCausalLM(settings).eval())


def test_a_number_that_is_no_token_is_told_in_a_line(tiny_model):
    run = torch_runner(tiny_model("bert"))

    with pytest.raises(ToolError, match=r"the model failed on inputs input_ids \[1, 2\] \(index"):
        run({"input_ids": np.array([[5, 9_999]])})
