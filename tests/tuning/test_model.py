"""A model with an adapter attached trains its scales, and merges and unmerges them."""

import copy

import pytest
import torch
import transformers
from peft import get_peft_model
from transformers import LlamaForCausalLM

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.tuning import PropulsionConfig

from . import FROM_PEFT, IDS, layers, logits, randomize, tiny_bert, tiny_gpt2, tiny_llama, tuned
from .models import CLOSE, UNTIED, outputs, tiny_bart, tiny_opt, tiny_t5

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)


builds = pytest.mark.parametrize(
    "build", [tiny_bert, tiny_llama, tiny_gpt2, tiny_t5, tiny_opt, tiny_bart]
)


@builds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_new_adapter_changes_no_bit_of_the_output(build, dtype):
    model = build().to(dtype)
    before = outputs(model)

    peft_model = get_peft_model(model, PropulsionConfig(train_bias=True)).eval()

    assert outputs(peft_model).equal(before)
    assert {p.dtype for p in peft_model.parameters() if p.requires_grad} == {torch.float32}


@builds
@UNTIED
def test_merged_model_computes_what_the_tuned_one_did(build):
    model = build()
    before = outputs(model)
    peft_model = tuned(model, train_bias=True)
    expected = outputs(peft_model)

    merged = peft_model.merge_and_unload()

    assert not layers(merged)
    torch.testing.assert_close(outputs(merged), expected, **CLOSE)
    assert (expected - before).abs().max() > 1e-3


@builds
def test_every_scale_gets_a_gradient(build):
    peft_model = tuned(build())
    extra = {"decoder_input_ids": IDS} if peft_model.config.is_encoder_decoder else {}
    result = peft_model(input_ids=IDS, **extra).logits

    (
        result * torch.randn(result.shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()

    dead = [
        path
        for path, layer in layers(peft_model).items()
        if layer.propulsion_z["default"].grad is None
    ]
    assert dead == []


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@UNTIED
def test_scale_on_a_tied_embedding_never_reaches_the_head(build):
    model = build()
    tied = model.lm_head.weight.detach().clone()
    peft_model = tuned(model)
    expected = outputs(peft_model)

    merged = peft_model.merge_and_unload()

    assert merged.lm_head.weight.equal(tied)
    assert not merged.get_input_embeddings().weight.equal(tied)
    assert merged.config.tie_word_embeddings is False
    torch.testing.assert_close(outputs(merged), expected, **CLOSE)


@builds
@UNTIED
def test_merged_model_survives_a_save_and_a_load(build, tmp_path):
    merged = tuned(build(), train_bias=True).merge_and_unload()
    expected = outputs(merged)
    merged.save_pretrained(tmp_path)

    loaded = type(merged).from_pretrained(tmp_path).eval()

    assert outputs(loaded).equal(expected)


def test_merging_other_layers_leaves_the_embeddings_tied():
    merged = tuned(tiny_llama(), target_modules="attention").merge_and_unload()

    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert merged.config.tie_word_embeddings is True


def test_unmerging_gives_every_bit_back():
    peft_model = tuned(tiny_llama(), train_bias=True)
    weights = {name: w.clone() for name, w in peft_model.state_dict().items()}
    expected = outputs(peft_model)

    peft_model.merge_adapter()
    torch.testing.assert_close(outputs(peft_model), expected, **CLOSE)
    assert not all(w.equal(weights[name]) for name, w in peft_model.state_dict().items())
    peft_model.unmerge_adapter()

    assert all(w.equal(weights[name]) for name, w in peft_model.state_dict().items())
    assert outputs(peft_model).equal(expected)
    base = peft_model.get_base_model()
    assert base.lm_head.weight is base.model.embed_tokens.base_layer.weight


def test_only_vectors_biases_and_saved_modules_train():
    peft_model = tuned(tiny_bert(), train_bias=True, task_type="SEQ_CLS")

    trainable = {name for name, p in peft_model.named_parameters() if p.requires_grad}

    kinds = ("propulsion_z.default", "propulsion_bias.default", "modules_to_save.default")
    assert all(any(kind in name for kind in kinds) for name in trainable)
    assert all(any(kind in name for name in trainable) for kind in kinds)


# Layers, models and heads of another kind


def test_model_can_be_copied_after_a_training_step():
    peft_model = tuned(tiny_bert()).train()
    peft_model(input_ids=IDS).logits.sum().backward()

    copied = copy.deepcopy(peft_model).eval()

    assert logits(copied).equal(logits(peft_model.eval()))


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama])
def test_gradient_checkpointing_changes_no_gradient(build):
    def gradients(*, checkpointing):
        peft_model = tuned(build())
        if checkpointing:
            peft_model.enable_input_require_grads()
            peft_model.activation_checkpointing_enable({"use_reentrant": False})
        peft_model.train()
        torch.manual_seed(0)
        peft_model(input_ids=IDS).logits.square().sum().backward()
        return [p.grad for p in peft_model.parameters() if p.requires_grad]

    for with_it, without in zip(
        gradients(checkpointing=True), gradients(checkpointing=False), strict=True
    ):
        assert with_it.equal(without)


def test_t5_in_half_precision_reads_the_dtype_of_a_wrapped_weight():
    peft_model = tuned(tiny_t5().half(), target_modules=r".*\.(wo|wi)")

    assert outputs(peft_model).isfinite().all()


def test_base_on_the_meta_device_gets_an_adapter_without_a_fingerprint():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)

    peft_model = get_peft_model(model, PropulsionConfig())

    assert peft_model.peft_config["default"].base_fingerprint is None
    assert peft_model.get_nb_trainable_parameters()[0] > 0


def moved(model, names, factor):
    """Move part of the scale from the keys to the queries, head channel by head channel."""
    query, key = names
    with torch.no_grad():
        for path, layer in layers(model).items():
            if path.endswith(query):
                layer.propulsion_z["default"].mul_(factor)
            elif path.endswith(key):
                layer.propulsion_z["default"].div_(factor)


def test_scale_on_keys_is_a_scale_on_queries_without_rotary_positions():
    peft_model = tuned(tiny_bert(), target_modules="attention", degree=1)
    before = logits(peft_model)

    moved(peft_model, ("query", "key"), torch.linspace(0.5, 2, 16))

    torch.testing.assert_close(logits(peft_model), before, **CLOSE)


@pytest.mark.parametrize("equal_in_pairs", [True, False])
def test_under_rotary_positions_only_where_equal_inside_each_pair(equal_in_pairs):
    peft_model = tuned(tiny_llama(), target_modules="attention", degree=1)
    for layer in layers(peft_model).values():
        layer.base_layer.weight.mul_(20)  # attention far from uniform, so that it shows
    randomize(peft_model, spread=0.0)
    before = logits(peft_model)
    half = torch.linspace(0.5, 2, 4)  # heads of 8 channels, paired 4 apart
    head = torch.cat([half, half if equal_in_pairs else half.flip(0)])

    moved(peft_model, ("q_proj", "k_proj"), head.repeat(2))

    assert torch.allclose(logits(peft_model), before, rtol=0, atol=1e-5) is equal_in_pairs


@pytest.mark.parametrize(
    ("model_class", "task_type", "head"),
    [
        pytest.param("BertForTokenClassification", "TOKEN_CLS", "classifier", id="tokens"),
        pytest.param("BertForQuestionAnswering", "QUESTION_ANS", "qa_outputs", id="answers"),
        pytest.param("BertForSequenceClassification", "SEQ_CLS", "classifier", id="texts"),
    ],
)
def test_peft_finds_the_head_of_a_task_by_itself(model_class, task_type, head, tmp_path):
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = get_peft_model(
        getattr(transformers, model_class)(config), PropulsionConfig(task_type=task_type)
    )

    model.save_pretrained(tmp_path)

    assert f"{head}.weight" in Adapter.read(tmp_path).modules
