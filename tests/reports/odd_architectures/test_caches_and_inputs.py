"""Caches of another kind, and inputs that are not enough."""

import pytest
import transformers
from odd_models import NAMES, base_of, make

from propulsion_export.base_model.block_attention import check_one_attention
from propulsion_export.base_model.caches import check_cache
from propulsion_export.base_model.eos_pooling import pools_at_eos
from propulsion_export.errors import BaseModelError
from propulsion_export.graph.sample_inputs import trace_inputs
from propulsion_export.graph.sample_outputs import check_computable
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx


@pytest.mark.parametrize("kind", ["Lfm2", "MiniMax"])
def test_a_cache_of_other_states_is_refused_before_any_work(checkpoint, tmp_path, kind):
    _, adapter = checkpoint(kind, "ForCausalLM", "text-generation")

    with pytest.raises(
        BaseModelError, match=rf"{kind}ForCausalLM: keeps a state .*\(LinearAttentionLayer\)"
    ):
        export_onnx([adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_cache_of_keys_and_values_is_accepted():
    check_cache(make("Llama", "ForCausalLM"))
    check_cache(make("Falcon", "ForCausalLM"))


def test_t5_for_features_is_refused_before_any_work(checkpoint, tmp_path):
    base, _ = checkpoint("T5", "ForSequenceClassification", "text-classification", **NAMES)

    with pytest.raises(
        BaseModelError, match="T5Model does not run on input_ids and attention_mask alone"
    ):
        export_onnx([], tmp_path / "out", model=str(base), task="feature-extraction")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "head", "found"),
    [
        ("T5", "EncoderModel", "is a T5EncoderModel, a part of T5Model"),
        ("UMT5", "EncoderModel", "is a UMT5EncoderModel, a part of UMT5Model"),
    ],
)
def test_an_encoder_saved_alone_is_called_that(checkpoint, tmp_path, kind, head, found):
    _, adapter = checkpoint(kind, head, "feature-extraction")

    for command in (merge, lambda a, output: export_onnx([a], output)):
        with pytest.raises(BaseModelError, match=found):
            command(adapter, tmp_path / "out")


@pytest.mark.parametrize("kind", ["BigBird", "BigBirdPegasus"])
def test_attention_that_changes_with_the_length_is_refused_by_name(kind):
    config = getattr(transformers, f"{kind}Config")(max_position_embeddings=2048)
    assert config.attention_type == "block_sparse"

    with pytest.raises(BaseModelError, match=r"base: attends to blocks .* of more than 704 tokens"):
        check_one_attention(config, "base")
    config.attention_type = "original_full"
    check_one_attention(config, "base")
    check_one_attention(getattr(transformers, f"{kind}Config")(max_position_embeddings=512), "base")


def test_a_model_that_reads_characters_is_refused_by_name():
    with pytest.raises(BaseModelError, match="CanineConfig: has no vocab_size"):
        trace_inputs(("input_ids", "attention_mask"), transformers.CanineConfig())


@pytest.mark.parametrize(
    ("kind", "head", "task"),
    [
        ("Bart", "Model", "feature-extraction"),
        ("Bart", "ForSequenceClassification", "text-classification"),
        ("T5", "ForTokenClassification", "token-classification"),
    ],
)
def test_models_that_their_inputs_suffice_for_are_accepted(kind, head, task):
    model = make(kind, head)

    check_computable(base_of(model, task))

    assert pools_at_eos(model.config, task) == (task == "text-classification")
