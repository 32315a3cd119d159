"""One scaled layer: what it computes, what it keeps in fp32, and what merging does to it."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding
from transformers.pytorch_utils import Conv1D

from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.tuning import PropulsionConfig, PropulsionLayer

WIDTH = 5
IDS = torch.tensor([[0, 6, 3]])
VECTORS = torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(1))
MASK = torch.ones(1, 3, dtype=torch.long)
DTYPES = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)

KINDS = {
    "linear": (lambda: nn.Linear(WIDTH, WIDTH), (VECTORS,)),
    "linear-no-bias": (lambda: nn.Linear(WIDTH, WIDTH, bias=False), (VECTORS,)),
    "conv1d": (lambda: Conv1D(WIDTH, WIDTH), (VECTORS,)),
    "embedding": (lambda: nn.Embedding(7, WIDTH, padding_idx=0), (IDS,)),
    "embedding-scaled": (lambda: Gemma3TextScaledWordEmbedding(7, WIDTH, 0, 3.0), (IDS,)),
    "positions-of-bart": (lambda: BartLearnedPositionalEmbedding(7, WIDTH), (IDS, 2)),
    "positions-of-opt": (lambda: OPTLearnedPositionalEmbedding(7, WIDTH), (MASK, 1)),
    "layernorm": (lambda: nn.LayerNorm(WIDTH), (VECTORS,)),
    "rmsnorm": (lambda: nn.RMSNorm(WIDTH), (VECTORS,)),
    "rmsnorm-of-llama": (lambda: LlamaRMSNorm(WIDTH), (VECTORS,)),
    "rmsnorm-of-gemma": (lambda: GemmaRMSNorm(WIDTH), (VECTORS,)),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind, dtype=torch.float32):
    build, inputs = KINDS[kind]
    torch.manual_seed(0)
    base = build().to(dtype)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.normal_(0.3)
    return base, tuple(
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in inputs
    )


def wrapped(base, degree=15, *, name="default", train_bias=False):
    return PropulsionLayer(base, name, PropulsionConfig(degree=degree, train_bias=train_bias))


def set_z(layer, values, name="default"):
    with torch.no_grad():
        layer.propulsion_z[name].copy_(torch.as_tensor(values))


Z = torch.tensor([0.98, 1.02, -1.01, 1.0, 0.9])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@kinds
@DTYPES
def test_first_forward_is_the_base_layers_bit_for_bit(kind, dtype):
    base, inputs = made(kind, dtype)
    # A trained bias is fp32, so it cannot start at one of more digits.
    layer = wrapped(base, train_bias=dtype != torch.float64)

    output = layer(*inputs)

    assert output.equal(base(*inputs))
    assert output.dtype == base(*inputs).dtype


@kinds
@pytest.mark.parametrize("degree", [1, 15, 20])
def test_output_is_multiplied_by_the_power_of_the_vector(kind, degree):
    base, inputs = made(kind)
    layer = wrapped(base, degree)
    set_z(layer, Z)
    expected = base(*inputs).double() * Z.double() ** degree

    torch.testing.assert_close(layer(*inputs).double(), expected, **CLOSE)
    assert not torch.allclose(layer(*inputs), base(*inputs), **CLOSE)


@settings(deadline=None, max_examples=25, derandomize=True)
@given(
    values=st.lists(st.floats(0.5, 1.5), min_size=WIDTH, max_size=WIDTH),
    degree=st.floats(0.5, 20),
    train_bias=st.booleans(),
)
def test_merged_layer_computes_what_the_scaled_one_did(values, degree, train_bias):
    base, inputs = made("linear", torch.float64)
    layer = wrapped(base, degree, train_bias=train_bias)
    set_z(layer, values)
    if train_bias:
        nn.init.normal_(layer.propulsion_bias["default"])
    scaled = layer(*inputs)

    layer.merge()

    torch.testing.assert_close(layer(*inputs), scaled, rtol=1e-12, atol=1e-12)


@kinds
def test_merge_error_is_below_1e_5_in_fp32(kind):
    base, inputs = made(kind)
    layer = wrapped(base, train_bias=True)
    set_z(layer, Z)
    scaled = layer(*inputs)
    before = base(*inputs)

    layer.merge()

    assert (layer(*inputs) - scaled).abs().max() < 1e-5
    assert (layer(*inputs) - before).abs().max() > 1e-3


@kinds
def test_unmerge_restores_every_bit_even_where_the_scale_is_zero(kind):
    base, inputs = made(kind, torch.bfloat16)
    before = copy.deepcopy(base.state_dict())
    layer = wrapped(base, train_bias=True)
    set_z(layer, [0.0, 1.02, -1.01, 1.3, 0.9])
    scaled = layer(*inputs)

    layer.merge()
    assert not base.state_dict()["weight"].equal(before["weight"])
    layer.unmerge()

    assert all(base.state_dict()[name].equal(before[name]) for name in before)
    assert layer(*inputs).equal(scaled)


@kinds
@DTYPES
def test_disabled_while_merged_gives_the_base_output_and_stays_merged(kind, dtype):
    base, inputs = made(kind, dtype)
    expected = base(*inputs)
    layer = wrapped(base, train_bias=True)
    set_z(layer, Z)
    layer.merge()
    merged, parameters = layer(*inputs), dict(base.named_parameters())
    assert not merged.equal(expected)

    layer.enable_adapters(False)
    disabled = layer(*inputs)

    assert disabled.equal(expected)
    assert layer.merged_adapters == ["default"]
    assert all(base.get_parameter(name) is values for name, values in parameters.items())
    layer.enable_adapters(True)
    assert layer(*inputs).equal(merged)


def test_disabled_while_merged_obeys_a_forward_that_was_replaced():
    """Hooks such as accelerate's replace `forward` by a function bound to the wrapped layer."""
    base, inputs = made("linear")
    expected, original = base(*inputs) + 1, base.forward
    base.forward = lambda x: original(x) + 1
    layer = wrapped(base)
    set_z(layer, Z)
    layer.merge()
    merged = layer(*inputs)

    layer.enable_adapters(False)

    assert layer(*inputs).equal(expected)
    layer.enable_adapters(True)
    assert layer(*inputs).equal(merged)


def test_a_thread_that_disables_a_merged_adapter_leaves_another_whole_outputs():
    base, inputs = made("linear")
    frozen = base(*inputs)
    layer = wrapped(base, train_bias=True)
    set_z(layer, Z)
    layer.propulsion_bias["default"].data += 1
    layer.merge()
    merged = layer(*inputs)
    together, outputs = threading.Barrier(2), []

    def compute(disable):
        together.wait()
        for _ in range(300):
            if disable:
                layer.enable_adapters(False)
            outputs.append(layer(*inputs))
            if disable:
                layer.enable_adapters(True)

    threads = [threading.Thread(target=compute, args=(disable,)) for disable in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(outputs) == 600
    assert all(output.equal(frozen) or output.equal(merged) for output in outputs)
    assert layer.merged
    assert layer(*inputs).equal(merged)


def test_merging_one_adapter_after_another_folds_both():
    base, inputs = made("linear")
    layer = wrapped(base, name="a")
    layer.update_layer("b", PropulsionConfig(degree=2))
    set_z(layer, Z, "a")
    set_z(layer, Z.flip(0), "b")
    expected = base(*inputs) * Z**15 * Z.flip(0) ** 2

    layer.merge(adapter_names=["a"])
    with pytest.warns(UserWarning, match="additionally merging b"):
        layer.merge(adapter_names=["b"])

    torch.testing.assert_close(layer(*inputs), expected, **CLOSE)


def test_merge_never_writes_into_a_tensor_that_is_used_elsewhere():
    embedding, head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 7, bias=False)
    head.weight = embedding.weight
    before = head.weight.detach().clone()
    layer = wrapped(embedding)
    set_z(layer, Z)

    layer.merge()
    assert head.weight.equal(before)
    assert not embedding.weight.equal(before)
    layer.unmerge()

    assert embedding.weight is head.weight


def test_merge_refuses_to_write_infinity():
    base, _ = made("linear", torch.float16)
    layer = wrapped(base)
    set_z(layer, [2.5, 1, 1, 1, 1])  # 2.5**15 is beyond fp16

    with pytest.raises(AdapterError, match=r"not finite in torch\.float16"):
        layer.merge()
    assert not layer.merged


def test_frozen_values_follow_a_cast_while_merged():
    base, inputs = made("linear")
    expected = copy.deepcopy(base).half()(inputs[0].half())
    layer = wrapped(base)
    set_z(layer, Z)

    layer.merge()
    layer.half()
    layer.unmerge()

    assert base(inputs[0].half()).equal(expected)


class PackedLinear(nn.Linear):
    """Weights of one byte, unpacked on use, as quantisation libraries do."""

    def __init__(self):
        super().__init__(WIDTH, WIDTH)
        packed = self.weight.detach().mul(100).to(torch.int8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 100, self.bias)


def test_quantised_linear_is_scaled_but_not_merged():
    base = PackedLinear()
    layer = wrapped(base)
    set_z(layer, Z)

    torch.testing.assert_close(layer(VECTORS), base(VECTORS) * Z**15)
    with pytest.raises(BaseModelError, match="quantised"):
        layer.merge()


@pytest.mark.parametrize("degree", [1, 15])
def test_trained_bias_is_inside_the_product(degree):
    base, inputs = made("linear", torch.float64)
    layer = wrapped(base, degree, train_bias=True)
    set_z(layer, Z)
    bias = torch.linspace(-1, 1, WIDTH)
    layer.propulsion_bias["default"].data = bias

    expected = (inputs[0] @ base.weight.T + bias) * Z.double() ** degree
    torch.testing.assert_close(layer(*inputs), expected)
    assert not torch.allclose(layer(*inputs), inputs[0] @ base.weight.T * Z**degree + bias)


def test_trained_bias_exists_only_where_the_layer_has_one_and_asks():
    assert "default" in wrapped(nn.Linear(2, 3), train_bias=True).propulsion_bias
    assert "default" not in wrapped(nn.Linear(2, 3)).propulsion_bias
    assert "default" not in wrapped(nn.Linear(2, 3, bias=False), train_bias=True).propulsion_bias
    assert "default" not in wrapped(nn.Embedding(2, 3), train_bias=True).propulsion_bias


def test_disabled_adapter_gives_the_frozen_bias_back():
    base, inputs = made("linear")
    layer = wrapped(base, train_bias=True)
    set_z(layer, Z)
    layer.propulsion_bias["default"].data += 1
    assert not layer(*inputs).equal(base(*inputs))

    layer.enable_adapters(False)

    assert layer(*inputs).equal(base(*inputs))


def test_scales_of_several_active_adapters_multiply():
    base, inputs = made("linear")
    base.double()
    inputs = tuple(x.double() for x in inputs)
    layer = wrapped(base, 15, name="a", train_bias=True)
    layer.update_layer("b", PropulsionConfig(degree=2))
    set_z(layer, Z, "a")
    set_z(layer, Z.flip(0), "b")
    bias = torch.linspace(-1, 1, WIDTH)
    layer.propulsion_bias["a"].data = bias

    layer.set_adapter(["a", "b"])

    expected = (base(*inputs) - base.bias + bias) * Z.double() ** 15 * Z.flip(0).double() ** 2
    torch.testing.assert_close(layer(*inputs), expected)


def test_two_trained_biases_at_once_are_refused():
    layer = wrapped(nn.Linear(2, 3), name="a", train_bias=True)
    layer.update_layer("b", PropulsionConfig(train_bias=True))
    layer.set_adapter(["a", "b"])

    with pytest.raises(UsageError, match="a, b"):
        layer(torch.ones(1, 2))


@pytest.mark.parametrize(
    "cast",
    [
        pytest.param(lambda layer: layer.to(torch.bfloat16), id="to-bf16"),
        pytest.param(lambda layer: layer.half(), id="half"),
        pytest.param(lambda layer: layer.double(), id="double"),
    ],
)
def test_vector_and_bias_stay_fp32_whatever_the_model_is_cast_to(cast):
    base, _ = made("linear")
    layer = wrapped(base, train_bias=True)
    set_z(layer, Z)

    cast(layer)

    assert base.weight.dtype != torch.float32
    assert layer.propulsion_z["default"].dtype == torch.float32
    assert layer.propulsion_bias["default"].dtype == torch.float32
    assert layer.propulsion_z["default"].equal(Z)


def test_vector_follows_the_layer_to_another_device():
    layer = wrapped(nn.Linear(2, 3), train_bias=True)

    layer.to("meta", torch.float16)

    assert layer.propulsion_z["default"].device.type == "meta"
    assert layer.propulsion_bias["default"].device.type == "meta"


def test_vector_of_a_half_precision_layer_starts_in_fp32():
    layer = wrapped(nn.Linear(2, 3).half(), train_bias=True)

    assert layer.propulsion_z["default"].dtype == torch.float32
    assert layer.propulsion_bias["default"].dtype == torch.float32


@pytest.mark.parametrize("rate", [1e-4, 1e-3])
def test_a_hundred_small_steps_move_the_vector_of_a_bf16_layer(rate):
    base, inputs = made("linear", torch.bfloat16)
    layer = wrapped(base)
    base.requires_grad_(False)
    optimizer = torch.optim.AdamW([layer.propulsion_z["default"]], lr=rate, weight_decay=0)

    for _ in range(100):
        optimizer.zero_grad()
        layer(*inputs).float().square().sum().backward()
        optimizer.step()

    moved = (layer.propulsion_z["default"] - 1).abs()
    assert (moved > 10 * rate).all()
    assert optimizer.state[layer.propulsion_z["default"]]["exp_avg"].dtype == torch.float32


def test_layer_can_be_copied_after_a_training_forward():
    base, inputs = made("linear")
    layer = wrapped(base).train()
    set_z(layer, Z)
    layer(*inputs).sum().backward()

    copied = copy.deepcopy(layer)

    assert copied(*inputs).equal(layer(*inputs))
    assert copied.propulsion_z["default"] is not layer.propulsion_z["default"]


def test_padding_row_stays_zero_before_and_after_merging():
    base = nn.Embedding(7, WIDTH, padding_idx=2)
    layer = wrapped(base)
    set_z(layer, Z)

    assert not layer(torch.tensor([2])).any()
    layer.merge()
    assert not layer(torch.tensor([2])).any()


def test_zero_is_dead_from_degree_two_on():
    for degree, dead in ((1, False), (2, True), (15, True)):
        layer = wrapped(nn.Linear(2, 3), degree)
        set_z(layer, torch.zeros(3))
        layer(torch.ones(1, 2)).sum().backward()

        assert layer.propulsion_z["default"].grad.eq(0).all().item() is dead


def test_non_integer_degree_of_a_negative_vector_is_nan_and_an_even_one_loses_the_sign():
    layer = wrapped(nn.Linear(2, 3), 2.5)
    set_z(layer, -torch.ones(3))
    assert layer(torch.ones(1, 2)).isnan().all()

    base = nn.Linear(2, 3)
    layer = wrapped(base, 20)
    set_z(layer, -torch.ones(3))
    assert layer(torch.ones(1, 2)).equal(base(torch.ones(1, 2)))


def test_attributes_of_the_wrapped_layer_are_readable():
    layer = wrapped(Gemma3TextScaledWordEmbedding(7, WIDTH, padding_idx=3, embed_scale=2.0))

    assert layer.padding_idx == 3
    assert layer.embedding_dim == WIDTH
    assert layer.weight is layer.base_layer.weight
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = layer.no_such_thing
    assert not hasattr(layer, "_hf_hook")


def test_layer_of_unknown_kind_is_refused_by_name():
    with pytest.raises(BaseModelError, match="Conv2d"):
        wrapped(nn.Conv2d(1, 2, 1))
