"""The oracle computes in float64 throughout, also where a model casts to float32 inside."""

import math
import warnings

import numpy as np
import pytest
import torch
from tiny_models import KINDS
from torch.utils._python_dispatch import TorchDispatchMode

from kinds import EXPERTS, GENERATIVE
from propulsion_export.parity.float64 import float64_throughout

NARROW = (torch.float32, torch.float16, torch.bfloat16, torch.complex64)
TOKENS = np.random.default_rng(0).integers(4, 90, (3, 21))


ARRAY = np.ones(3, np.float32)


def scripted(function):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch advises against TorchScript
        return torch.jit.script(function)


@scripted
def compiled(x: torch.Tensor):
    return torch.softmax(x.float(), dim=-1)


@scripted
def calling_compiled(x: torch.Tensor):
    return compiled(x) + torch.arange(3, dtype=torch.float32)


class Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.float()


def with_default(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return torch.zeros(3)
    finally:
        torch.set_default_dtype(before)


def in_autocast(x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return x @ x[:, None]


class NarrowOperations(TorchDispatchMode):
    """The operations that return numbers narrower than float64."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **kwargs or {})
        for value in outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(value, torch.Tensor) and value.dtype in NARROW:
                self.found.add(str(func))
        return outputs


def run(model, tokens=TOKENS):
    ids = torch.from_numpy(tokens)
    feeds = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if model.config.is_encoder_decoder:
        feeds["decoder_input_ids"] = ids[:, :7]
    with torch.inference_mode():
        return next(iter(model(**feeds).values()))


def in_float64(model):
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model.double()


@pytest.mark.parametrize("kind", [*KINDS, *GENERATIVE])
def test_nothing_is_narrower_than_float64(kind, tiny_model):
    model = in_float64(tiny_model(kind))

    with float64_throughout(), NarrowOperations() as narrow:
        output = run(model)

    assert not narrow.found
    assert output.dtype == torch.float64


@pytest.mark.parametrize("kind", [kind for kind in GENERATIVE if kind in ("llama", *EXPERTS)])
def test_without_it_the_same_models_cast_inside(kind, tiny_model):
    model = in_float64(tiny_model(kind))

    with NarrowOperations() as narrow:
        output = run(model)

    assert narrow.found
    with float64_throughout():
        error = (output - run(model)).abs().max() / output.abs().max()
    assert 1e-9 < error < 1e-5


def llama(weights, config, frequencies, tokens):
    """Logits [length, vocabulary] of one row: Llama's formulas in numpy."""

    def norm(x, weight):
        return weight * x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps)

    def rotated(x):
        angles = np.arange(len(tokens))[:, None] * np.concatenate([frequencies, frequencies])
        half = x.shape[-1] // 2
        turned = np.concatenate([-x[..., half:], x[..., :half]], -1)
        return x * np.cos(angles)[:, None] + turned * np.sin(angles)[:, None]

    width, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    causal = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
    x = weights["model.embed_tokens.weight"][tokens]
    for place in range(config.num_hidden_layers):
        own = {
            name.removeprefix(f"model.layers.{place}."): value for name, value in weights.items()
        }
        normed = norm(x, own["input_layernorm.weight"])
        query, key, value = (
            (normed @ own[f"self_attn.{name}_proj.weight"].T).reshape(len(tokens), -1, width)
            for name in "qkv"
        )
        key, value = (np.repeat(each, groups, axis=1) for each in (rotated(key), value))
        scores = np.einsum("ihd,jhd->hij", rotated(query), key) / np.sqrt(width) + causal
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", shares, value).reshape(len(tokens), -1)
        x = x + mixed @ own["self_attn.o_proj.weight"].T
        normed = norm(x, own["post_attention_layernorm.weight"])
        gate = normed @ own["mlp.gate_proj.weight"].T
        up = normed @ own["mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ own["mlp.down_proj.weight"].T
    return norm(x, weights["model.norm.weight"]) @ weights["lm_head.weight"].T


def test_llama_is_that_of_its_formulas(tiny_model):
    model = in_float64(tiny_model("llama"))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    frequencies = model.model.rotary_emb.inv_freq.numpy()
    expected = np.stack([llama(weights, model.config, frequencies, row) for row in TOKENS])

    with float64_throughout():
        found = run(model).numpy()
    without = run(model).numpy()

    assert np.abs(found - expected).max() < 1e-13 * np.abs(expected).max()
    assert np.abs(without - expected).max() > 1e-9 * np.abs(expected).max()


def bert(weights, config, tokens):
    """Last hidden state [length, width] of one row: BERT's formulas in numpy."""
    error = np.vectorize(math.erf)

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.layer_norm_eps)
        return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    heads = config.num_attention_heads
    x = (
        weights["embeddings.word_embeddings.weight"][tokens]
        + weights["embeddings.position_embeddings.weight"][: len(tokens)]
        + weights["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "embeddings.LayerNorm")
    for place in range(config.num_hidden_layers):
        layer = f"encoder.layer.{place}"
        query, key, value = (
            linear(x, f"{layer}.attention.self.{name}").reshape(len(tokens), heads, -1)
            for name in ("query", "key", "value")
        )
        scores = np.einsum("ihd,jhd->hij", query, key) / np.sqrt(query.shape[-1])
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        shares /= shares.sum(-1, keepdims=True)
        mixed = np.einsum("hij,jhd->ihd", shares, value).reshape(len(tokens), -1)
        dense = linear(mixed, f"{layer}.attention.output.dense")
        x = norm(x + dense, f"{layer}.attention.output.LayerNorm")
        inner = linear(x, f"{layer}.intermediate.dense")
        inner = inner * 0.5 * (1 + error(inner / np.sqrt(2)))
        x = norm(x + linear(inner, f"{layer}.output.dense"), f"{layer}.output.LayerNorm")
    return x


def test_bert_is_that_of_its_formulas(tiny_model):
    model = in_float64(tiny_model("bert", "feature-extraction"))
    weights = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = np.stack([bert(weights, model.config, row) for row in TOKENS])

    with float64_throughout():
        found = run(model).numpy()

    assert np.abs(found - expected).max() < 1e-13 * np.abs(expected).max()


@pytest.mark.parametrize(("buckets", "furthest"), [(32, 128), (8, 20), (64, 256), (256, 512)])
def test_distances_fall_into_the_buckets_that_float32_puts_them_in(buckets, furthest):
    """A model was trained with these; another bucket would be another bias."""
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
    from transformers.models.t5.modeling_t5 import T5Attention

    def all_buckets():
        distances = torch.arange(-2 * furthest, 2 * furthest)
        return torch.stack(
            [
                make_log_bucket_position(distances, buckets, furthest).long(),
                MPNetEncoder.relative_position_bucket(distances, buckets, furthest),
                T5Attention._relative_position_bucket(distances, True, buckets, furthest),
                T5Attention._relative_position_bucket(distances, False, buckets, furthest),
            ]
        )

    with float64_throughout():
        found = all_buckets()

    assert torch.equal(found, all_buckets())


@pytest.mark.parametrize(
    "made",
    [
        pytest.param(lambda x: x.float(), id="float"),
        pytest.param(lambda x: x.half(), id="half"),
        pytest.param(lambda x: x.bfloat16(), id="bfloat16"),
        pytest.param(lambda x: x.to(torch.float32), id="to"),
        pytest.param(lambda x: x.to(device="cpu", dtype=torch.float16), id="to-keyword"),
        pytest.param(lambda x: x.type(torch.float32), id="type"),
        pytest.param(lambda x: x.type("torch.FloatTensor"), id="type-name"),
        pytest.param(lambda x: torch.softmax(x, -1, dtype=torch.float32), id="softmax"),
        pytest.param(
            lambda x: torch.nn.functional.softmax(x, -1, dtype=torch.float32), id="functional"
        ),
        pytest.param(lambda x: torch.arange(3, dtype=torch.float32), id="arange"),
        pytest.param(lambda x: torch.zeros(3), id="default"),
        pytest.param(lambda x: torch.tensor(0.5), id="tensor"),
        pytest.param(lambda x: torch.ones(3, dtype=torch.long).float(), id="of-integers"),
        pytest.param(lambda x: x.type(torch.FloatTensor), id="type-class"),
        pytest.param(lambda x: torch.FloatTensor([0.5]), id="class"),
        pytest.param(lambda x: torch.from_numpy(ARRAY), id="of-array"),
        pytest.param(lambda x: torch.as_tensor(ARRAY), id="as-tensor"),
        pytest.param(lambda x: torch.tensor(ARRAY), id="copy-of-array"),
        pytest.param(lambda x: torch.tensor(ARRAY[0]), id="of-number"),
        pytest.param(lambda x: compiled(x), id="script"),
        pytest.param(lambda x: calling_compiled(x), id="script-in-script"),
        pytest.param(lambda x: Cast.apply(x), id="autograd-function"),
        pytest.param(lambda x: with_default(torch.float16), id="set-default-dtype"),
        pytest.param(lambda x: in_autocast(x), id="autocast"),
        pytest.param(lambda x: torch.vmap(lambda y: y.float())(x), id="vmap"),
    ],
)
def test_each_way_to_make_narrow_numbers_makes_float64(made):
    value = torch.linspace(0, 1, 3, dtype=torch.float64)

    with float64_throughout():
        assert made(value).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_compiled_functions_and_classes_are_as_they_were_afterwards():
    value = torch.ones(3, dtype=torch.float64)

    with float64_throughout():
        wide = compiled(value)

    assert wide.dtype == torch.float64
    assert compiled(value).dtype == torch.float32
    assert value.type(torch.FloatTensor).dtype == torch.float32


def test_what_is_changed_in_place_stays_the_same_tensor():
    with float64_throughout():
        value = torch.ones(3, dtype=torch.float64)
        narrow = value.numpy().astype(np.float32)
        kept = torch.zeros(3)
        assert kept.add_(torch.from_numpy(narrow)) is kept
        assert (kept == 1).all()


def test_complex_numbers_are_as_wide():
    pair = torch.ones(3, 2, dtype=torch.float64)

    with float64_throughout():
        assert torch.view_as_complex(pair.float()).dtype == torch.complex128
        assert pair.to(torch.complex64).dtype == torch.complex128


def test_bits_are_still_read_as_what_they_are():
    with float64_throughout():
        assert torch.tensor([1], dtype=torch.int32).view(torch.float32).dtype == torch.float32


def test_integers_stay_integers():
    with float64_throughout():
        assert torch.ones(3, dtype=torch.float64).to(torch.long).dtype == torch.long


def test_an_error_inside_leaves_the_default_dtype_as_it_was():
    with pytest.raises(KeyError), float64_throughout():
        raise KeyError

    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1, dtype=torch.float64).float().dtype == torch.float32
