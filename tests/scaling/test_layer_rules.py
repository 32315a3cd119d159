"""Folding a scale into a module's parameters gives the scaled output, for every layer kind."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.bart.modeling_bart import (
    BartLearnedPositionalEmbedding,
    BartScaledWordEmbedding,
)
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3RMSNorm,
    Gemma3TextScaledWordEmbedding,
)
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.nemotron.modeling_nemotron import NemotronLayerNorm1P
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm
from transformers.pytorch_utils import Conv1D

from propulsion_export.artifacts.rounding import rounded_to_odd
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.layer_rules import folded_parameters, input_width, output_width

WIDTH = 5
IDS = torch.tensor([[0, 6, 3]])
VECTORS = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

KINDS = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), VECTORS),
    "linear-no-bias": (lambda: nn.Linear(WIDTH, WIDTH, bias=False), VECTORS),
    "linear-of-attention": (lambda: nn.MultiheadAttention(WIDTH, 1).out_proj, VECTORS),
    "linear-of-falcon": (lambda: FalconLinear(WIDTH, WIDTH), VECTORS),
    "conv1d": (lambda: Conv1D(WIDTH, WIDTH), VECTORS),
    "embedding": (lambda: nn.Embedding(7, WIDTH, padding_idx=0), IDS),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(7, WIDTH, 0, 3.0), IDS),
    "embedding-scaled-of-bart": (
        lambda: BartScaledWordEmbedding(7, WIDTH, 0, embed_scale=3.0),
        IDS,
    ),
    "embedding-positions-of-opt": (
        lambda: OPTLearnedPositionalEmbedding(7, WIDTH),
        torch.ones(1, 3, dtype=torch.long),  # a mask
    ),
    "embedding-positions": (lambda: BartLearnedPositionalEmbedding(7, WIDTH), IDS),
    "layernorm": (lambda: nn.LayerNorm(WIDTH), VECTORS),
    "layernorm-no-bias": (lambda: nn.LayerNorm(WIDTH, bias=False), VECTORS),
    "layernorm-1p": (lambda: NemotronLayerNorm1P(WIDTH), VECTORS),
    "layernorm-of-t5": (lambda: T5LayerNorm(WIDTH), VECTORS),
    "rmsnorm": (lambda: nn.RMSNorm(WIDTH), VECTORS),
    "rmsnorm-of-llama": (lambda: LlamaRMSNorm(WIDTH), VECTORS),
    "rmsnorm-of-qwen3": (lambda: Qwen3RMSNorm(WIDTH), VECTORS),
    "rmsnorm-1p-of-gemma": (lambda: GemmaRMSNorm(WIDTH), VECTORS),
    "rmsnorm-1p-of-gemma3": (lambda: Gemma3RMSNorm(WIDTH), VECTORS),
}
kinds = pytest.mark.parametrize("kind", KINDS)
scales = st.lists(st.floats(-8, 8, allow_subnormal=False), min_size=WIDTH, max_size=WIDTH)


def made(kind):
    """A double-precision module with no parameter at its initial 0 or 1, and an input for it."""
    build, inputs = KINDS[kind]
    torch.manual_seed(0)
    module = build().double().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3)
    return module, inputs


def folded(module, scale, **options):
    changed = copy.deepcopy(module)
    for name, values in folded_parameters(module, scale, **options).items():
        setattr(changed, name, nn.Parameter(values))
    return changed


# Some norms compute in fp32 whatever they are given.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@kinds
@settings(deadline=None, max_examples=15, derandomize=True)
@given(values=scales)
def test_folded_layer_gives_the_scaled_output(kind, values):
    module, inputs = made(kind)
    scale = torch.tensor(values, dtype=torch.float64)
    tolerance = CLOSE if "norm" in kind else {"rtol": 1e-12, "atol": 1e-12}

    output = folded(module, scale)(inputs)

    torch.testing.assert_close(output, module(inputs) * scale, **tolerance)


@kinds
def test_fold_of_a_slightly_other_scale_differs(kind):
    module, inputs = made(kind)
    scale = torch.tensor([0.5, -1.5, 0.0, 2.0, 1.0], dtype=torch.float64)
    other = scale + torch.tensor([0, 1e-2, 0, 0, 0], dtype=torch.float64)

    output = folded(module, other)(inputs)

    assert not torch.allclose(output, module(inputs) * scale, **CLOSE)


@pytest.mark.parametrize("kind", [name for name in KINDS if name in ("linear", "conv1d")])
@settings(deadline=None, max_examples=15, derandomize=True)
@given(values=scales)
def test_folded_input_scale_gives_the_output_for_the_scaled_input(kind, values):
    module, inputs = made(kind)
    scale = torch.tensor(values, dtype=torch.float64)

    output = folded(module, scale, side="input")(inputs)

    torch.testing.assert_close(output, module(inputs * scale), rtol=1e-12, atol=1e-12)


def test_input_scale_of_a_square_layer_is_not_an_output_scale():
    module, inputs = made("linear")
    scale = torch.tensor([0.5, -1.5, 0.1, 2.0, 1.0], dtype=torch.float64)

    assert not torch.allclose(folded(module, scale, side="input")(inputs), module(inputs) * scale)


@pytest.mark.parametrize("kind", ["linear", "conv1d", "layernorm"])
def test_trained_bias_takes_the_place_of_the_frozen_one_inside_the_product(kind):
    module, inputs = made(kind)
    scale = torch.tensor([0.5, -1.5, 0.1, 2.0, 1.0], dtype=torch.float64)
    bias = torch.linspace(-2, 2, WIDTH, dtype=torch.float64)

    output = folded(module, scale, bias=bias)(inputs)

    torch.testing.assert_close(output, (module(inputs) - module.bias + bias) * scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_fold_rounds_once_from_float64(dtype):
    torch.manual_seed(0)
    module = nn.Linear(64, 64).to(dtype)
    scale = torch.linspace(0.9, 1.1, 64, dtype=torch.float64)

    weight = folded_parameters(module, scale)["weight"]

    product = (module.weight.detach().double() * scale[:, None]).numpy()
    # torch itself goes from float64 to 16 bits by way of float32.
    assert weight.equal(torch.from_numpy(rounded_to_odd(product)).to(dtype))
    assert not weight.equal(module.weight * scale.to(dtype)[:, None])


def test_fold_to_another_dtype_skips_the_rounding_to_the_first():
    torch.manual_seed(0)
    module = nn.Linear(64, 64).half()
    scale = torch.linspace(0.9, 1.1, 64, dtype=torch.float64)

    weight = folded_parameters(module, scale, dtype=torch.float32)["weight"]

    assert weight.equal((module.weight.double() * scale[:, None]).float())


@pytest.mark.parametrize(
    "embedding",
    [
        nn.Embedding(7, WIDTH, padding_idx=2),
        BartScaledWordEmbedding(7, WIDTH, 2, embed_scale=3.0),
        Gemma3TextScaledWordEmbedding(7, WIDTH, 2, 3.0),
    ],
    ids=lambda embedding: type(embedding).__name__,
)
def test_padding_row_stays_zero(embedding):
    assert not folded_parameters(embedding, torch.full((WIDTH,), -3.0))["weight"][2].any()


def test_fold_leaves_the_module_as_it_was():
    module, _ = made("layernorm")
    before = copy.deepcopy(module.state_dict())

    folded_parameters(module, torch.full((WIDTH,), 2.0))

    assert all(module.state_dict()[name].equal(before[name]) for name in before)


class Ternary(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign(), self.bias)


class CubicRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x):
        return x * (self.weight**3 + 2)


def quantised():
    linear = nn.Linear(WIDTH, WIDTH)
    linear.weight = nn.Parameter(torch.ones(WIDTH, WIDTH, dtype=torch.int8), requires_grad=False)
    return linear


@pytest.mark.parametrize(
    ("module", "word"),
    [
        pytest.param(nn.Conv2d(1, WIDTH, 1), "Conv2d", id="convolution"),
        pytest.param(Ternary(WIDTH, WIDTH), "Ternary", id="own-forward"),
        pytest.param(Llama4Router, "Llama4Router", id="router"),
        pytest.param(quantised(), "quantised", id="quantised"),
        pytest.param(CubicRMSNorm(), "CubicRMSNorm", id="norm-of-unknown-kind"),
        pytest.param(nn.LayerNorm(WIDTH, elementwise_affine=False), "LayerNorm", id="no-weight"),
        pytest.param(nn.Embedding(7, WIDTH, max_norm=1.0), "max_norm", id="max-norm"),
        pytest.param(
            nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
            "weight of its own",
            id="parametrised",
        ),
    ],
)
def test_what_cannot_be_folded_exactly_is_refused_by_name(module, word):
    if module is Llama4Router:
        module = Llama4Router.__new__(Llama4Router)
        nn.Linear.__init__(module, WIDTH, WIDTH)

    with pytest.raises(BaseModelError, match=word):
        folded_parameters(module, torch.ones(WIDTH))


@pytest.mark.parametrize("kind", ["embedding", "layernorm"])
def test_input_scale_is_refused_where_the_input_has_no_channels(kind):
    module, _ = made(kind)

    with pytest.raises(BaseModelError, match="input"):
        folded_parameters(module, torch.ones(WIDTH), side="input")


def test_scale_of_another_width_is_refused_with_both_widths():
    with pytest.raises(AdapterError, match=r"\[4\].*5 outputs"):
        folded_parameters(nn.Linear(3, WIDTH), torch.ones(4))


def test_trained_bias_for_a_layer_without_one_is_refused():
    with pytest.raises(AdapterError, match="trained bias"):
        folded_parameters(
            nn.Linear(3, WIDTH, bias=False), torch.ones(WIDTH), bias=torch.ones(WIDTH)
        )


@pytest.mark.parametrize(
    ("module", "inputs", "outputs"),
    [
        pytest.param(nn.Linear(3, 4), 3, 4, id="linear"),
        pytest.param(Conv1D(4, 3), 3, 4, id="conv1d"),
    ],
)
def test_widths_are_those_of_the_layer(module, inputs, outputs):
    assert (input_width(module), output_width(module)) == (inputs, outputs)
