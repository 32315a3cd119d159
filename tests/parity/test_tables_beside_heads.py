"""A tensor with some rows of an embedding is the embedding only if it is no other weight."""

from dataclasses import replace

import pytest
import torch
from safetensors.numpy import load_file, save_file

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.parity import check_parity


@pytest.fixture
def merged(tiny_model, positive_adapter, write_adapter, tmp_path):
    """A merged Llama whose head has the rows of its embedding but for the last tokens."""
    model = tiny_model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.get_input_embeddings().weight)
        model.lm_head.weight[90:] += 0.1
    model.save_pretrained(tmp_path / "base")
    adapter = positive_adapter(model, name="one", only="self_attn", task="text-generation")
    made = replace(adapter, base=str(tmp_path / "base"), fingerprint=fingerprint_of_model(model))
    return merge(write_adapter(made, tmp_path / "one"), tmp_path / "merged")


def wrong_tables(report):
    return [check.detail for check in report.checks if check.case == "tables" and not check.passed]


def test_a_head_with_most_rows_of_the_embedding_is_no_wrong_embedding(merged):
    assert check_parity(merged.directory).passed


def test_an_embedding_beside_such_a_head_is_compared(merged):
    file = merged.directory / "model.safetensors"
    values = {name: tensor.copy() for name, tensor in load_file(file).items()}
    values["model.embed_tokens.weight"][3] = 0
    save_file(values, file, {"format": "pt"})
    Artifact.write(merged.directory, merged.manifest)

    (detail,) = wrong_tables(check_parity(merged.directory))
    assert detail == "model.embed_tokens: 1 of 100 rows are others (row 3)"
