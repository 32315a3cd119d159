"""Adapters of every generative architecture through PEFT: placements, files, experts, merging."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from kinds import ENCODER_DECODERS, GENERATIVE
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import UsageError
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.expert_rules import is_experts
from propulsion_export.scaling.layer_rules import layer_kind
from propulsion_export.tuning import PropulsionConfig
from propulsion_export.tuning.experts import ExpertVectors, PropulsionExperts
from propulsion_export.tuning.layer import PropulsionLayer
from propulsion_export.tuning.placement import resolve_targets

from . import FROM_PEFT

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)
MIXTURES = pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
architectures = pytest.mark.parametrize("kind", GENERATIVE)
IDS = torch.tensor([[7, 12, 44, 99, 3, 61], [20, 21, 22, 8, 9, 4]])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Scaled outputs per layer: the qkv projections, or one where they are fused.
ATTENTION = {"gpt2": 96, "bloom": 96, "phi3": 64}


def logits(model):
    inputs = {"input_ids": IDS}
    if model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS.flip(1)
    with torch.no_grad():
        return model(**inputs).logits


def tuned(model, seed=1, **options):
    """A trained-looking adapter: no vector of ones, biases away from the frozen ones."""
    peft_model = get_peft_model(model, PropulsionConfig(degree=3, **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "propulsion_" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return peft_model


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, PropulsionExperts)]


@architectures
def test_all_reaches_every_linear_embedding_and_expert_but_the_head(kind, tiny_model):
    model = tiny_model(kind)
    head = model.get_output_embeddings()

    found = resolve_targets(model, PropulsionConfig())

    assert found == {
        path
        for path, module in model.named_modules()
        if (is_experts(module) or layer_kind(module) in ("linear", "conv1d", "embedding"))
        and module is not head
        # Nobody calls it; the weight tied to it is the encoder's, the decoder's and the head's.
        and not path.endswith("shared")
    }


@architectures
def test_attention_scales_query_key_and_value_of_every_layer(kind, tiny_model):
    model = get_peft_model(tiny_model(kind), PropulsionConfig(target_modules="attention"))

    count = sum(p.numel() for n, p in model.named_parameters() if "propulsion_" in n)

    grouped = kind in ("llama", "mistral", "qwen3", "gemma3", "mixtral", "qwen3-moe")
    attentions = 6 if kind in ENCODER_DECODERS else 2
    assert count == attentions * ATTENTION.get(kind, 64 if grouped else 96)


@pytest.mark.parametrize("train_bias", [False, True], ids=["scales", "scales-and-biases"])
@architectures
def test_saved_adapter_attached_is_the_peft_model_it_came_from(
    kind, train_bias, tiny_model, tmp_path
):
    trained = tuned(tiny_model(kind), train_bias=train_bias)
    expected = logits(trained)
    trained.save_pretrained(tmp_path)

    adapter = Adapter.read(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    base = tiny_model(kind)
    with attached(base, adapter):
        found = logits(base)

    assert_close(found, expected, **CLOSE)
    assert_close(logits(loaded), expected, rtol=0, atol=0)
    assert not torch.allclose(logits(tiny_model(kind)), expected, rtol=0.05)


@architectures
def test_adapter_written_by_this_package_is_read_by_peft(
    kind, tiny_model, random_adapter, tmp_path
):
    adapter = random_adapter(tiny_model(kind))
    adapter.write(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_model(kind), tmp_path).eval()
    base = tiny_model(kind)
    with attached(base, adapter):
        expected = logits(base)

    assert_close(logits(loaded), expected, **CLOSE)
    assert not torch.allclose(logits(base), expected, rtol=0.05)


@architectures
def test_merged_model_is_the_peft_model(kind, tiny_model):
    trained = tuned(tiny_model(kind), exclude_modules=r".*(wte|word_embeddings|embed_tokens)")
    expected = logits(trained)

    merged = trained.merge_and_unload()

    assert not any(isinstance(module, PropulsionLayer) for module in merged.modules())
    assert type(merged) is type(tiny_model(kind))
    assert_close(logits(merged), expected, **CLOSE)


@architectures
def test_new_adapter_is_the_base_model_bit_for_bit(kind, tiny_model):
    model = tiny_model(kind)
    expected = logits(model)

    assert torch.equal(logits(get_peft_model(model, PropulsionConfig()).eval()), expected)


# Experts


@MIXTURES
def test_vectors_of_experts_are_saved_under_the_path_of_the_weight(kind, tiny_model, tmp_path):
    model = tiny_model(kind)
    width = model.model.layers[0].mlp.experts.down_proj.shape[2]

    tuned(model).save_pretrained(tmp_path)

    stored = load_file(tmp_path / "adapter_model.safetensors")
    path = "base_model.model.model.layers.1.mlp.experts"
    assert stored[f"{path}.gate_up_proj.propulsion_z"].shape == (4, 2 * width)
    assert stored[f"{path}.down_proj.propulsion_z"].shape == (4, 32)
    assert Adapter.read(tmp_path).scales[f"{path[17:]}.down_proj"].values.shape == (4, 32)


@MIXTURES
def test_one_scale_of_one_expert_is_one_output_of_that_expert(kind, tiny_model):
    layer = experts_of(get_peft_model(tiny_model(kind), PropulsionConfig(degree=2)))[0]
    tokens, weights = torch.randn(5, 32), torch.ones(5, 1)
    chosen = torch.tensor([[0], [1], [2], [3], [1]])
    with torch.no_grad():
        before = layer(tokens, chosen, weights)
        layer.down_proj.propulsion_z["default"][1, 7] = 0.5
        after = layer(tokens, chosen, weights)

    expected = before.clone()
    expected[[1, 4], 7] *= 0.25
    assert_close(after, expected)


@MIXTURES
@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_gradient_reaches_every_expert_that_was_chosen_and_nothing_frozen(
    kind, implementation, tiny_model
):
    model = tiny_model(kind)
    model.set_experts_implementation(implementation)
    model = get_peft_model(model, PropulsionConfig())

    model(input_ids=IDS, labels=IDS).loss.backward()

    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, _ in model.named_parameters() if ".propulsion_z." in n
    }
    for layer in experts_of(model):
        for weight in ("gate_up_proj", "down_proj"):
            assert layer._vectors(weight)["default"].grad.abs().sum() > 0


@MIXTURES
def test_vectors_of_experts_stay_fp32_in_a_half_precision_model(kind, tiny_model):
    model = tuned(tiny_model(kind)).to(torch.bfloat16)
    model.set_experts_implementation("eager")

    output = logits(model)

    assert output.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in model.named_parameters() if "propulsion" in n)


@MIXTURES
def test_experts_are_merged_and_restored_bit_for_bit(kind, tiny_model):
    model = tuned(tiny_model(kind))
    before, expected = copy.deepcopy(model.state_dict()), logits(model)

    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()

    assert_close(merged, expected, **CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@MIXTURES
def test_experts_disabled_while_merged_give_the_base_output_and_stay_merged(kind, tiny_model):
    base = tiny_model(kind)
    frozen = logits(base)
    model = tuned(base)
    model.merge_adapter()
    merged = logits(model)
    assert not torch.equal(merged, frozen)

    with model.disable_adapter():
        assert torch.equal(logits(model), frozen)

    assert all(experts.merged for experts in experts_of(model))
    assert torch.equal(logits(model), merged)


@MIXTURES
def test_adapters_on_experts_are_added_switched_and_deleted(kind, tiny_model):
    model = tuned(tiny_model(kind))
    first, frozen = logits(model), logits(tiny_model(kind))
    model.add_adapter("second", PropulsionConfig(degree=3))
    model.set_adapter("second")
    assert torch.equal(logits(model), frozen)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {n for n, _ in model.named_parameters() if n.endswith(".second")}

    with model.disable_adapter():
        assert torch.equal(logits(model), frozen)
    model.set_adapter("default")
    model.delete_adapter("second")

    assert torch.equal(logits(model), first)
    assert all(
        set(vectors.keys()) == {"default"}
        for vectors in model.modules()
        if isinstance(vectors, ExpertVectors)
    )


@MIXTURES
def test_a_router_is_refused_by_name(kind, tiny_model):
    with pytest.raises(UsageError, match=r"mlp\.gate: is a \w+TopKRouter, which cannot be scaled"):
        resolve_targets(tiny_model(kind), PropulsionConfig(target_modules=["gate"]))


def test_experts_with_biases_are_refused_unless_left_out():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
    )
    with torch.device("meta"):
        model = GptOssForCausalLM(config)

    with pytest.raises(UsageError, match=r"experts: a GptOssExperts has more than weights .*bias"):
        resolve_targets(model, PropulsionConfig())

    left = resolve_targets(model, PropulsionConfig(exclude_modules=r".*\.experts"))
    assert "model.layers.0.self_attn.q_proj" in left
    assert not any("experts" in path for path in left)


def test_experts_that_do_not_name_their_axes_are_refused():
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    config = Llama4TextConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=8,
        intermediate_size_mlp=8,
        num_local_experts=2,
        moe_layers=[0],
    )
    with torch.device("meta"):
        model = Llama4ForCausalLM(config)

    with pytest.raises(UsageError, match="Llama4TextExperts has no is_transposed"):
        resolve_targets(model, PropulsionConfig())
