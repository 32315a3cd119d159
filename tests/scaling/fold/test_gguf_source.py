"""Folding from a GGUF file writes what folding from its safetensors does."""

import pytest
import torch
from folding import fold_parts, parts_of
from gguf_files import tiny_language_model, write_gguf
from safetensors.torch import load_file

from propulsion_export.base_model.loading import load_base
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint

KINDS = ("llama", "mixtral", "qwen3_moe", "gemma2", "falcon", "bloom", "gpt2", "phi3")
TASK = "text-generation"


def folded(source, adapter, directory):
    directory.mkdir()
    parts = parts_of(source, TASK, adapter, untie=True)
    fold_parts(parts, adapter, directory)
    return fingerprint_of_checkpoint(parts), load_file(directory / "model.safetensors")


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_is_folded_as_its_safetensors(kind, random_adapter, tmp_path):
    model = tiny_language_model(kind)
    file = write_gguf(tmp_path / "base.gguf", model, quantisation="Q8_0")
    loaded = load_base(str(file), task=TASK).model
    loaded.save_pretrained(tmp_path / "base", save_original_format=False)
    adapter = random_adapter(loaded)

    ours, found = folded(file, adapter, tmp_path / "ours")
    theirs, expected = folded(tmp_path / "base", adapter, tmp_path / "theirs")

    assert theirs.difference(ours) is None
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
