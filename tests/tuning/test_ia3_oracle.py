"""Degree 1 on query, key and value is (IA)^3; PEFT's own is the independent oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import IA3Config, get_peft_model

from propulsion_export.tuning import PropulsionConfig

from . import FROM_PEFT, IDS, layers, randomize, tiny_bert, tiny_gpt2, tiny_llama

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)

ARCHITECTURES = [
    pytest.param(tiny_bert, ["query", "key", "value"], id="bert"),
    pytest.param(tiny_llama, ["q_proj", "k_proj", "v_proj"], id="llama"),
    pytest.param(tiny_gpt2, ["c_attn"], id="gpt2"),
]


def gradients(model, name):
    """Output and, by path, the gradients of the parameters called `name`."""
    model.zero_grad()
    output = model(input_ids=IDS).logits
    (output * torch.arange(output.shape[-1])).sum().backward()
    return output.detach(), {
        path.partition(f".{name}")[0]: parameter.grad.flatten()
        for path, parameter in model.named_parameters()
        if name in path and parameter.requires_grad
    }


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
@pytest.mark.parametrize(("build", "projections"), ARCHITECTURES)
def test_degree_one_equals_ia3_in_output_and_gradient(build, projections):
    propulsion = get_peft_model(build(), PropulsionConfig(target_modules="attention", degree=1))
    randomize(propulsion)
    ia3 = get_peft_model(build(), IA3Config(target_modules=projections, feedforward_modules=[]))
    for path, layer in layers(propulsion).items():
        z = layer.propulsion_z["default"]
        ia3.get_submodule(path).ia3_l["default"].data = z.detach()[:, None].clone()

    output, ours = gradients(propulsion.eval(), "propulsion_z")
    expected, theirs = gradients(ia3.eval(), "ia3_l")

    assert output.equal(expected)
    assert ours.keys() == theirs.keys()
    assert all(ours[path].equal(theirs[path]) for path in ours)


def test_degree_two_is_not_ia3():
    models = []
    for degree in (1, 2):
        config = PropulsionConfig(target_modules="attention", degree=degree)
        models.append(get_peft_model(tiny_bert(), config).eval())
        randomize(models[-1])

    one, two = (gradients(model, "propulsion_z")[0] for model in models)
    assert not torch.allclose(one, two)


@settings(deadline=None, max_examples=8, derandomize=True)
@given(degree=st.floats(0.5, 60))
def test_gradient_at_ones_is_degree_times_that_of_degree_one(degree):
    first = get_peft_model(tiny_bert(), PropulsionConfig(degree=1)).eval()
    model = get_peft_model(tiny_bert(), PropulsionConfig(degree=degree)).eval()

    _, base = gradients(first, "propulsion_z")
    _, scaled = gradients(model, "propulsion_z")

    assert any(gradient.any() for gradient in base.values())
    for path in base:
        torch.testing.assert_close(scaled[path], degree * base[path], rtol=1e-5, atol=1e-8)
