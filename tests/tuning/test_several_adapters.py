"""Adapters of one model are added, switched, disabled and deleted."""

import pytest
from peft import PeftModel, get_peft_model

from propulsion_export.errors import UsageError
from propulsion_export.tuning import PropulsionConfig

from . import FROM_PEFT, IDS, layers, logits, tiny_bert, tiny_llama, tuned

pytestmark = pytest.mark.filterwarnings(FROM_PEFT)


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
