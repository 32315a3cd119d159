"""A scale in the weights of experts gives each expert's scaled output, whichever axis holds it."""

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close
from transformers import AriaTextConfig, MixtralConfig, NemotronHConfig
from transformers.models.aria.modeling_aria import AriaExperts
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts, MixtralTopKRouter
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.expert_rules import (
    expert_weights,
    folded_expert_weight,
    is_experts,
    reason_against_experts,
    scale_shape,
)

EXPERTS, HIDDEN, INNER = 3, 6, 4
TOKENS = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
CHOSEN = torch.tensor([[0], [1], [2], [0], [2]])
WEIGHTS = torch.ones(5, 1, dtype=torch.float64)
KINDS = {
    "mixtral": (
        MixtralExperts,
        MixtralConfig(num_local_experts=EXPERTS, hidden_size=HIDDEN, intermediate_size=INNER),
    ),
    # Stores inputs before outputs.
    "aria": (
        AriaExperts,
        AriaTextConfig(
            moe_num_experts=EXPERTS,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_attention_heads=2,
            num_key_value_heads=2,
        ),
    ),
    # Has no gate.
    "nemotron-h": (
        NemotronHExperts,
        NemotronHConfig(n_routed_experts=EXPERTS, hidden_size=HIDDEN, moe_intermediate_size=INNER),
    ),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def made(kind):
    build, config = KINDS[kind]
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    module = build(config).double().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(0.3)
    return module


def output(module):
    return module(TOKENS, CHOSEN, WEIGHTS)


@kinds
@settings(deadline=None, max_examples=15, derandomize=True)
@given(values=st.lists(st.floats(-8, 8), min_size=EXPERTS * HIDDEN, max_size=EXPERTS * HIDDEN))
def test_folded_down_projection_gives_every_experts_scaled_output(kind, values):
    module = made(kind)
    expected, scale = output(module), torch.tensor(values).double().reshape(EXPERTS, HIDDEN)

    module.down_proj = nn.Parameter(folded_expert_weight(module, "down_proj", scale))

    assert_close(output(module), expected * scale[CHOSEN[:, 0]], rtol=1e-10, atol=1e-10)


@kinds
def test_folded_up_projection_scales_what_the_activation_reads(kind):
    """Seen by a hook-free copy: the up projection of one expert, computed by hand."""
    module = made(kind)
    name = next(name for name in expert_weights(module) if "up" in name)
    scale = torch.rand(scale_shape(module, name), dtype=torch.float64) + 0.5
    folded = folded_expert_weight(module, name, scale)

    def outputs(weight):
        return TOKENS @ (weight[2] if module.is_transposed else weight[2].T)

    assert_close(outputs(folded), outputs(getattr(module, name)) * scale[2])
    assert not torch.allclose(outputs(folded), outputs(getattr(module, name)) * scale[1])


def test_shape_is_experts_by_outputs_whichever_axis_holds_them():
    assert scale_shape(made("mixtral"), "gate_up_proj") == (EXPERTS, 2 * INNER)
    assert scale_shape(made("aria"), "gate_up_proj") == (EXPERTS, 2 * INNER)
    assert scale_shape(made("nemotron-h"), "up_proj") == (EXPERTS, INNER)


def test_fold_leaves_the_module_as_it_was():
    module = made("mixtral")
    before = copy.deepcopy(module.state_dict())

    folded_expert_weight(module, "down_proj", torch.full((EXPERTS, HIDDEN), 2.0))

    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_fold_rounds_once_from_float64():
    module = made("mixtral").to(torch.bfloat16)
    scale = torch.rand(EXPERTS, HIDDEN, dtype=torch.float64) + 0.5

    folded = folded_expert_weight(module, "down_proj", scale, torch.float32)

    assert torch.equal(folded, (module.down_proj.double() * scale[:, :, None]).float())


@pytest.mark.parametrize("shape", [(EXPERTS, INNER), (EXPERTS,), (HIDDEN, EXPERTS)], ids=str)
def test_scale_of_another_shape_is_refused_with_both(shape):
    with pytest.raises(AdapterError, match=r"down_proj: .* the base model \[3, 6\]"):
        folded_expert_weight(made("mixtral"), "down_proj", torch.ones(shape))


def test_quantised_experts_are_refused():
    module = made("mixtral")
    module.down_proj = nn.Parameter(module.down_proj.to(torch.int8), requires_grad=False)

    with pytest.raises(BaseModelError, match="quantised"):
        folded_expert_weight(module, "down_proj", torch.ones(EXPERTS, HIDDEN))


def without_weights(kind, **attributes):
    """An instance with small parameters: the real constructors want a whole configuration."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.gate_up_proj = nn.Parameter(torch.ones(2, 4, 6))
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        pytest.param(
            without_weights(
                GptOssExperts,
                is_transposed=True,
                has_bias=True,
                gate_up_proj_bias=nn.Parameter(torch.ones(2, 6)),
            ),
            r"GptOssExperts has more than weights \(gate_up_proj_bias\)",
            id="biases",
        ),
        pytest.param(
            without_weights(Llama4TextExperts), "Llama4TextExperts has no is_transposed", id="axes"
        ),
    ],
)
def test_experts_that_cannot_be_scaled_say_why(module, reason):
    assert is_experts(module)
    assert expert_weights(module) == {}
    with pytest.raises(BaseModelError, match="no rule to scale"):
        folded_expert_weight(module, "gate_up_proj", torch.ones(2, 6))
    assert re.search(reason, reason_against_experts(module))


def test_a_router_or_a_layer_is_no_experts():
    assert not is_experts(MixtralTopKRouter(KINDS["mixtral"][1]))
    assert not is_experts(nn.Linear(3, 4))
