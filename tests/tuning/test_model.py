"""Attached adapters through their life in PEFT: training, files, switching, merging."""

import copy
import json

import pytest
import torch
import transformers
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.errors import BaseModelError, UsageError
from propulsion_export.tuning import PropulsionConfig

from . import (
    FROM_PEFT,
    IDS,
    layers,
    logits,
    randomize,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tuned,
    with_biases,
)

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)
UNTIED = pytest.mark.filterwarnings(
    "ignore:Input and output embeddings are no longer tied after merging:UserWarning"
)
CLOSE = {"rtol": 0, "atol": 1e-5}


def tiny_t5(seed=0):
    torch.manual_seed(seed)
    config = T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def tiny_opt(seed=0):
    torch.manual_seed(seed)
    config = OPTConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=20,
        word_embed_proj_dim=16,
    )
    return with_biases(OPTForCausalLM(config).eval())


def tiny_bart(seed=0):
    torch.manual_seed(seed)
    config = BartConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=20,
        scale_embedding=True,
    )
    return with_biases(BartForConditionalGeneration(config).eval())


def outputs(model):
    """Logits, with a decoder input where the model wants one."""
    extra = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **extra).logits


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


@pytest.mark.parametrize("build", [tiny_bert, tiny_llama, tiny_gpt2])
def test_saved_adapter_comes_back_bit_for_bit(build, tmp_path):
    peft_model = tuned(build(), train_bias=True)
    peft_model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(build(), tmp_path).eval()

    assert outputs(loaded).equal(outputs(peft_model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_saved_adapter_holds_its_own_tensors_only(tmp_path):
    peft_model = tuned(tiny_llama().bfloat16(), task_type="CAUSAL_LM")
    peft_model.save_pretrained(tmp_path)

    tensors = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())

    assert "base_model.model.model.layers.0.self_attn.q_proj.propulsion_z" in tensors
    assert {name.rpartition(".")[2] for name in tensors} == {"propulsion_z"}
    assert {values.dtype for values in tensors.values()} == {torch.float32}
    assert all(values.ndim == 1 for values in tensors.values())
    assert config["peft_type"] == "PROPULSION"
    assert config["target_modules"] == "all"
    assert config["base_fingerprint"]["entries"]


def test_saved_adapter_is_what_the_exporter_reads(tmp_path):
    peft_model = tuned(tiny_bert(), degree=3, train_bias=True, task_type="SEQ_CLS")
    peft_model.save_pretrained(tmp_path)

    adapter = Adapter.read(tmp_path)

    prefix = "base_model.model."
    for path, layer in layers(peft_model).items():
        z = layer.propulsion_z["default"].detach().double()
        scale = torch.from_numpy(adapter.scales[path.removeprefix(prefix)].values)
        torch.testing.assert_close(scale, z**3, rtol=1e-14, atol=0)
        if layer.propulsion_bias:
            bias = torch.from_numpy(adapter.biases[path.removeprefix(prefix)])
            assert bias.equal(layer.propulsion_bias["default"])
    assert set(adapter.modules) == {"classifier.weight", "classifier.bias"}
    assert adapter.fingerprint is not None


def test_adapter_that_the_exporter_writes_is_what_peft_reads(tmp_path):
    peft_model = tuned(tiny_llama())
    peft_model.save_pretrained(tmp_path)
    (tmp_path / "copy").mkdir()
    Adapter.read(tmp_path).write(tmp_path / "copy")

    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "copy").eval()

    torch.testing.assert_close(outputs(loaded), outputs(peft_model), **CLOSE)
    assert not torch.allclose(outputs(loaded), outputs(tiny_llama()), **CLOSE)


def test_tied_embedding_as_a_module_to_save_still_warns():
    with pytest.warns(UserWarning, match="a tied layer is part of the adapter"):
        get_peft_model(tiny_llama(), PropulsionConfig(modules_to_save=["embed_tokens"]))


def test_adapter_can_be_injected_without_peft_model():
    model = tiny_bert()
    before = logits(model)
    injected = inject_adapter_in_model(PropulsionConfig(target_modules="attention"), model)
    randomize(injected)

    assert len(layers(injected)) == 6
    assert not logits(injected).equal(before)


def test_trained_head_comes_back_with_the_adapter(tmp_path):
    peft_model = tuned(tiny_bert(), task_type="SEQ_CLS")
    head = peft_model.get_base_model().classifier.modules_to_save["default"]
    nn.init.normal_(head.weight)
    peft_model.save_pretrained(tmp_path)
    base = tiny_bert()
    nn.init.normal_(base.classifier.weight)  # what a load makes up is replaced

    loaded = PeftModel.from_pretrained(base, tmp_path).eval()

    assert logits(loaded).equal(logits(peft_model))


def test_adapter_loads_without_allocating_it_twice(tmp_path):
    peft_model = tuned(tiny_bert().bfloat16(), train_bias=True)
    peft_model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(
        tiny_bert().bfloat16(), tmp_path, low_cpu_mem_usage=True, autocast_adapter_dtype=False
    ).eval()

    assert logits(loaded).equal(logits(peft_model))
    assert all(
        layer.propulsion_z["default"].dtype == torch.float32 for layer in layers(loaded).values()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_loads_onto_its_base_in_half_precision(dtype, tmp_path):
    tuned(tiny_bert()).save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(tiny_bert().to(dtype), tmp_path).eval()

    assert logits(loaded).dtype == dtype


def further(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    model(input_ids=IDS).logits.square().mean().backward()
    optimizer.step()
    return model


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda: tiny_bert(seed=1), id="same-shape"),
        pytest.param(lambda: further(tiny_bert()), id="trained-a-step-further"),
    ],
)
def test_adapter_of_another_base_is_refused(other, tmp_path):
    tuned(tiny_bert()).save_pretrained(tmp_path)
    model = other()

    with pytest.raises(BaseModelError, match="belongs to another base model"):
        PeftModel.from_pretrained(model, tmp_path)
    assert not layers(model)


def test_second_adapter_of_another_base_is_refused_and_leaves_the_first(tmp_path):
    tuned(tiny_bert(seed=1)).save_pretrained(tmp_path)
    peft_model = tuned(tiny_bert())
    before = logits(peft_model)

    with pytest.raises(BaseModelError, match="belongs to another base model"):
        peft_model.load_adapter(tmp_path, "second")

    assert list(peft_model.peft_config) == ["default"]
    assert logits(peft_model).equal(before)


def test_one_configuration_serves_two_bases():
    config = PropulsionConfig()

    one = get_peft_model(tiny_bert(seed=0), config).peft_config["default"]
    other = get_peft_model(tiny_bert(seed=1), config).peft_config["default"]

    assert config.base_fingerprint is None
    assert one.base_fingerprint != other.base_fingerprint


def test_adapters_are_switched_and_deleted(tmp_path):
    tuned(tiny_bert(), seed=2, degree=3, train_bias=True).save_pretrained(tmp_path)
    expected = logits(PeftModel.from_pretrained(tiny_bert(), tmp_path).eval())
    peft_model = tuned(tiny_bert(), target_modules="attention")
    first = logits(peft_model)

    peft_model.load_adapter(tmp_path, "second")
    assert logits(peft_model).equal(first)
    peft_model.set_adapter("second")
    assert logits(peft_model).equal(expected)
    peft_model.set_adapter("default")
    assert logits(peft_model).equal(first)
    peft_model.delete_adapter("second")

    assert logits(peft_model).equal(first)
    assert not any("second" in name for name, _ in peft_model.named_parameters())


def test_adding_an_adapter_wraps_no_layer_twice():
    peft_model = tuned(tiny_bert())

    peft_model.add_adapter("second", PropulsionConfig(target_modules="attention"))

    assert not any(".base_layer.base_layer" in name for name, _ in peft_model.named_modules())
    assert {
        path for path, layer in layers(peft_model).items() if "second" in layer.propulsion_z
    } == {path for path in layers(peft_model) if path.endswith(("query", "key", "value"))}


def test_disabled_adapter_gives_the_base_model_back():
    model = tiny_bert()
    before = logits(model)
    peft_model = tuned(model, train_bias=True)
    assert not logits(peft_model).equal(before)

    with peft_model.disable_adapter():
        assert logits(peft_model).equal(before)

    assert not logits(peft_model).equal(before)


def test_disabled_while_merged_gives_the_base_model_back_and_the_merge_stays():
    model = tiny_llama()
    before = logits(model)
    peft_model = tuned(model)
    peft_model.merge_adapter()
    merged = logits(peft_model)
    assert not merged.equal(before)

    with peft_model.disable_adapter():
        assert logits(peft_model).equal(before)

    assert all(layer.merged for layer in layers(peft_model).values())
    assert logits(peft_model).equal(merged)


def test_adding_an_adapter_while_one_is_merged_is_refused():
    peft_model = tuned(tiny_bert())
    peft_model.merge_adapter()

    with pytest.raises(UsageError, match="merged"):
        peft_model.add_adapter("second", PropulsionConfig())


def test_adapter_names_in_a_batch_are_refused_not_ignored():
    with pytest.raises(UsageError, match="adapter_names"):
        tuned(tiny_bert())(input_ids=IDS, adapter_names=["default", "__base__"])


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
