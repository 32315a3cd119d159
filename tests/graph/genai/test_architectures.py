"""The table of what the builder knows agrees with the builder, and every part of it is tested."""

import importlib

import pytest
from genai_models import MODELS, make
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from propulsion_export.graph.genai import architectures
from propulsion_export.graph.genai.options import GenaiOptions
from propulsion_export.tuning.placement import ATTENTION_NAMES


def test_the_builder_has_every_class():
    builders = importlib.import_module("onnxruntime_genai.models.builders")
    classes = {*architectures._CLASSES.values(), "Phi3MiniLongRoPEModel"}
    assert [name for name in classes if not hasattr(builders, name)] == []


def test_every_architecture_with_attention_names_that_the_builder_knows_is_compared():
    classes = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) for kind in ATTENTION_NAMES}
    both = classes & (architectures._CLASSES.keys() | architectures._FAILING.keys())
    compared = {f"{prefix}ForCausalLM" for prefix, _ in MODELS.values()}
    assert both - architectures._FAILING.keys() <= compared
    assert both & architectures._FAILING.keys() == {
        "Gemma3ForCausalLM", "Gemma4ForConditionalGeneration"
    }  # fmt: skip


def test_every_class_of_the_table_is_compared():
    compared = {f"{prefix}ForCausalLM" for prefix, _ in MODELS.values()}
    assert architectures._CLASSES.keys() <= compared


@pytest.mark.parametrize(
    ("original", "expected"), [(160, "Phi3MiniModel"), (32, "Phi3MiniLongRoPEModel")]
)
def test_a_longrope_has_a_class_of_its_own(original, expected):

    config = make("phi3").config
    config.original_max_position_embeddings = original
    found = architectures.builder_class(config, "Phi3ForCausalLM", GenaiOptions())
    assert found == expected
