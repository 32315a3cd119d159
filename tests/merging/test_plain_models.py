"""What is known of a model by its names alone is what the model says of itself."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from folding import parts_of
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.merging.changes import Given
from propulsion_export.merging.plain_models import FAMILIES, plain_fingerprint, plain_jobs
from propulsion_export.merging.plan import plan_changes
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint, jobs_of

TASK = "text-generation"
SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}
SETTINGS = {
    "defaults": {},
    "tied": {"tie_word_embeddings": True},
    "apart": {"tie_word_embeddings": False},
    "biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False},
    "wide-heads": {"head_dim": 10, "tie_word_embeddings": False},
    "one-key": {"num_key_value_heads": 1},
}
every_family = pytest.mark.parametrize("kind", FAMILIES)


@pytest.fixture
def make_base(tmp_path):
    """`make_base(kind, **settings)`: a random model of a type, saved; its directory and module."""

    def make(kind, dtype=torch.bfloat16, **settings):
        torch.manual_seed(0)
        known = {name: value for name, value in settings.items() if _knows(kind, name)}
        config = CONFIG_MAPPING[kind](**SIZES | known)
        model = AutoModelForCausalLM.from_config(config).to(dtype)
        for parameter in model.parameters():
            parameter.data.uniform_(-1, 1)  # biases and Gemma's norms would be zero
        model.save_pretrained(tmp_path / kind)
        return tmp_path / kind, model

    return make


def _knows(kind, name):
    if name in ("attention_bias", "mlp_bias"):
        return name in FAMILIES[kind].settings
    return name != "head_dim" or kind != "phi3"  # which reads it, and cannot compute with it


def adapter_for(model, *, tied, biases=False, only="", side="output"):
    """Scales of all modules that have weights, as far as `only` names them."""
    random = np.random.default_rng(3)
    scales, trained = {}, {}
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or only not in path or (tied and path.endswith(("tokens", "lm_head"))):
            continue
        linear = isinstance(module, torch.nn.Linear)
        last = side == "input" or isinstance(module, torch.nn.Embedding)
        if side == "output" or linear:
            width = weight.shape[-1] if last else weight.shape[0]
            scales[path] = Scale(random.uniform(-2, 2, width), side)
        if biases and linear and module.bias is not None and path in scales:
            trained[path] = random.uniform(-1, 1, module.bias.numel())
    return Adapter("one", scales, trained, task=TASK)


def settings_of(directory):
    return json.loads((directory / "config.json").read_text())


def assert_same_plan(ours, theirs):
    assert list(ours.changes) == list(theirs.changes)
    assert (ours.keys, ours.changed, ours.dtype) == (theirs.keys, theirs.changed, theirs.dtype)
    for name, change in ours.changes.items():
        other = theirs.changes[name]
        assert type(change) is type(other), name
        for part, value in vars(change).items():
            np.testing.assert_array_equal(value, getattr(other, part), strict=True)


@every_family
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("only", ["", "self_attn"], ids=["all", "attention"])
def test_names_give_the_plan_that_the_model_gives(kind, settings, only, make_base):
    base, model = make_base(kind, **settings)
    tied = model.config.tie_word_embeddings
    for options in ({}, {"biases": True}, {"side": "input"}):
        adapter = adapter_for(model, tied=tied, only=only, **options)
        checkpoint = Checkpoint.find(str(base))

        ours = plain_jobs(settings_of(base), checkpoint, adapter)

        parts = parts_of(base, TASK, adapter)
        assert ours == jobs_of(parts, adapter)
        assert_same_plan(
            plan_changes(checkpoint, ours, adapter),
            plan_changes(parts.checkpoint, jobs_of(parts, adapter), adapter),
        )
        assert plain_fingerprint(checkpoint) == fingerprint_of_checkpoint(parts)


@every_family
def test_a_norm_taken_for_the_other_kind_is_noticed(kind, make_base, monkeypatch):
    base, model = make_base(kind, tie_word_embeddings=False)
    adapter, checkpoint = adapter_for(model, tied=False), Checkpoint.find(str(base))
    right = plan_changes(checkpoint, plain_jobs(settings_of(base), checkpoint, adapter), adapter)
    other = "norm" if FAMILIES[kind].norm == "norm plus one" else "norm plus one"
    monkeypatch.setitem(FAMILIES, kind, replace(FAMILIES[kind], norm=other))

    wrong = plan_changes(checkpoint, plain_jobs(settings_of(base), checkpoint, adapter), adapter)

    with pytest.raises(AssertionError):
        assert_same_plan(wrong, right)
    assert isinstance(wrong.changes["model.norm.weight"], Given)


def without_a_tensor(base, adapter):
    rewrite(base, lambda tensors: tensors.pop("model.norm.weight"))
    return adapter


def with_another(base, adapter):
    rewrite(base, lambda tensors: tensors.update({"model.extra.weight": torch.ones(2, 2)}))
    return adapter


def of_another_width(base, adapter):
    settings = settings_of(base) | {"intermediate_size": 41}
    (base / "config.json").write_text(json.dumps(settings))
    return adapter


def of_another_class(base, adapter):
    settings = settings_of(base) | {"architectures": ["LlamaForSequenceClassification"]}
    (base / "config.json").write_text(json.dumps(settings))
    return adapter


def without_a_setting(base, adapter):
    settings = settings_of(base)
    del settings["num_hidden_layers"]
    (base / "config.json").write_text(json.dumps(settings))
    return adapter


def for_no_module(_, adapter):
    return replace(adapter, scales={**adapter.scales, "model.layers.9.mlp": Scale(np.ones(24))})


def too_wide(_, adapter):
    return replace(adapter, scales={"model.norm": Scale(np.full(25, 2.0))})


def with_a_bias_for_none(_, adapter):
    return replace(adapter, biases={"model.layers.0.mlp.up_proj": np.ones(40)})


def with_a_head(_, adapter):
    return replace(adapter, modules={"lm_head.weight": np.ones((64, 24))})


def rewrite(base, change):
    file = base / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "doubt",
    [
        without_a_tensor,
        with_another,
        of_another_width,
        of_another_class,
        without_a_setting,
        for_no_module,
        too_wide,
        with_a_bias_for_none,
        with_a_head,
    ],
)
def test_what_is_not_certain_is_left_to_the_model(doubt, make_base):
    base, model = make_base("llama", tie_word_embeddings=False)
    adapter = adapter_for(model, tied=False)
    assert plain_jobs(settings_of(base), Checkpoint.find(str(base)), adapter)

    adapter = doubt(base, adapter)

    assert plain_jobs(settings_of(base), Checkpoint.find(str(base)), adapter) is None


def test_a_scaled_weight_that_is_shared_is_left_to_the_model(make_base):
    base, model = make_base("gemma", tie_word_embeddings=True)

    adapter = adapter_for(model, tied=False, only="embed_tokens")

    assert adapter.scales
    assert plain_jobs(settings_of(base), Checkpoint.find(str(base)), adapter) is None
