"""A merge of a plain language model imports neither torch nor transformers, and is the same."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
)

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import BaseModelError
from propulsion_export.merging.plain_models import plain_modules
from propulsion_export.pipeline import merge as pipeline
from propulsion_export.pipeline import merge_by_model
from propulsion_export.pipeline.merge import merge

MERGE = """
import sys
from pathlib import Path
from propulsion_export.pipeline.merge import merge
merge(sys.argv[1], Path(sys.argv[2]))
print([name for name in ("torch", "transformers", "scipy") if name in sys.modules])
"""


@pytest.fixture
def llama(tmp_path, tiny_checkpoint, tiny_model, write_adapter, positive_adapter):
    """A Llama with its tokenizer, and an adapter for it: their directories."""
    base, model = shutil.copytree(tiny_checkpoint("llama"), tmp_path / "base"), tiny_model("llama")
    adapter = positive_adapter(model, name="one")
    adapter = replace(
        adapter,
        base=str(base),
        fingerprint=fingerprint_of_model(model),
        task="text-generation",
    )
    return base, write_adapter(adapter, tmp_path / "one")


def padded_with(token, adapter):
    """The adapter as if it was trained with a padding token that the base model does not name."""
    file = adapter / "adapter_config.json"
    content = json.loads(file.read_text()) | {"tokenizer_settings": {"pad_token": token}}
    file.write_text(json.dumps(content))


def weights(directory):
    return {file.name: file.read_bytes() for file in directory.glob("*.safetensors")}


def test_neither_torch_nor_transformers_is_imported(llama, tmp_path):
    _, adapter = llama

    done = subprocess.run(
        [sys.executable, "-c", MERGE, adapter, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "[]"
    assert Artifact.read(tmp_path / "out").manifest.adapters


@pytest.mark.parametrize("token", [None, "[UNK]"])
def test_both_ways_write_what_loads_as_the_same_model(token, llama, tmp_path, monkeypatch):
    base, adapter = llama
    assert (base / "tokenizer.json").is_file()
    if token is not None:
        padded_with(token, adapter)
    with monkeypatch.context() as only_names:
        only_names.setattr(merge_by_model, "prepare_by_model", None)
        fast = merge(adapter, tmp_path / "fast")
    monkeypatch.setattr(pipeline, "prepare_by_names", lambda request: None)

    slow = merge(adapter, tmp_path / "slow")

    ours, theirs = fast.directory, slow.directory
    assert weights(ours) == weights(theirs) != weights(base)
    assert replace(fast.manifest, files={}) == replace(slow.manifest, files={})
    assert {file.name for file in ours.iterdir()} == {file.name for file in theirs.iterdir()}
    for reader in (AutoConfig, GenerationConfig):
        found = [reader.from_pretrained(place).to_dict() for place in (ours, theirs)]
        paths = [content.pop("_name_or_path", None) for content in found]
        assert found[0] == found[1], paths
    both = [AutoTokenizer.from_pretrained(place) for place in (ours, theirs)]
    assert both[0].get_vocab() == both[1].get_vocab()
    assert (
        both[0].pad_token
        == both[1].pad_token
        == (token or AutoTokenizer.from_pretrained(base).pad_token)
    )


def test_generation_settings_may_be_in_config_json(llama, tmp_path, monkeypatch):
    base, adapter = llama
    (base / "generation_config.json").unlink()
    settings(base, temperature=0.5, eos_token_id=7)
    with monkeypatch.context() as only_names:
        only_names.setattr(merge_by_model, "prepare_by_model", None)
        fast = merge(adapter, tmp_path / "fast")
    monkeypatch.setattr(pipeline, "prepare_by_names", lambda request: None)
    slow = merge(adapter, tmp_path / "slow")

    found = [
        AutoModelForCausalLM.from_pretrained(one.directory).generation_config.to_dict()
        for one in (fast, slow)
    ]

    assert [one["eos_token_id"] for one in found] == [7, 7]
    assert [one["temperature"] for one in found] == [0.5, 0.5]


def test_another_base_model_is_refused_in_the_same_words(llama, tmp_path, tiny_model, monkeypatch):
    base, adapter = llama
    tiny_model("llama", seed=7).save_pretrained(base)

    def message():
        with pytest.raises(BaseModelError) as caught:
            merge(adapter, tmp_path / "out")
        return str(caught.value)

    ours = message()
    monkeypatch.setattr(pipeline, "prepare_by_names", lambda request: None)

    assert ours == message()
    assert "is not the base model of adapter one" in ours


def settings(base, **changed):
    file = base / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


def token_beyond_the_embedding(base):
    file = base / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"]["far"] = 10**6
    file.write_text(json.dumps(content))


def unnamed_padding(base):
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<none-has-it>"}))


@pytest.mark.parametrize(
    "change",
    [
        lambda base: settings(base, auto_map={"AutoConfig": "own.Config"}),
        lambda base: settings(base, architectures=["LlamaModel"]),
        lambda base: settings(base, model_type="bert"),
        token_beyond_the_embedding,
        unnamed_padding,
    ],
    ids=["code", "bare", "type", "token", "padding"],
)
def test_what_names_do_not_tell_is_prepared_by_the_model(change, llama, tmp_path, monkeypatch):
    base, adapter = llama
    change(base)

    class Reached(Exception):
        pass

    def reached(request):
        raise Reached

    monkeypatch.setattr(merge_by_model, "prepare_by_model", reached)

    with pytest.raises(Reached):
        merge(adapter, tmp_path / "out")


MEMORY = (
    MERGE
    + """
import re
status = Path("/proc/self/status").read_text()  # getrusage starts with the peak of the parent
print(1024 * int(re.search(r"VmHWM:\\s+(\\d+)", status)[1]))
"""
)


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells a process's peak memory so"
)
def test_memory_does_not_grow_with_the_model(tmp_path, write_adapter):
    """Of the models, the larger one has tensors of 200 MB."""
    peaks = []
    for rows in (1000, 400_000):
        settings = {"vocab_size": rows, "hidden_size": 256, "intermediate_size": 512}
        config = LlamaConfig(**settings, num_hidden_layers=1, tie_word_embeddings=False)
        base = tmp_path / f"base-{rows}"
        config.architectures = ["LlamaForCausalLM"]
        config.save_pretrained(base)
        GenerationConfig().save_pretrained(base)
        modules = plain_modules(json.loads((base / "config.json").read_text()))
        shapes = {n: s for module in modules for n, s in module.parameters().items()}
        zeros = {name: np.ones(shape, ml_dtypes.bfloat16) for name, shape in shapes.items()}
        save_file(zeros, base / "model.safetensors", metadata={"format": "pt"})
        scales = {"lm_head": Scale(np.linspace(0.5, 2, rows))}
        adapter = Adapter("one", scales, base=str(base), task="text-generation")
        path = write_adapter(adapter, tmp_path / f"one-{rows}")
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, path, tmp_path / f"out-{rows}"],
            capture_output=True,
            text=True,
            check=True,
        )
        imported, peak = done.stdout.splitlines()
        assert imported == "[]"
        peaks.append(int(peak))

    assert (tmp_path / "base-400000" / "model.safetensors").stat().st_size > 400e6
    assert peaks[1] < peaks[0] + 50e6
    assert peaks[1] < 600e6
