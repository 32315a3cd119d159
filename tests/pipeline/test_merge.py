import json
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts import artifact
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model import checkpoint
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import AdapterError, BaseModelError, UsageError
from propulsion_export.pipeline.merge import merge, parse_size
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.scaling.attach import attached


def test_merged_checkpoint_passes_parity_and_names_its_labels(world, tmp_path):
    merge(world.three, tmp_path / "out")

    report = check_parity(tmp_path / "out")

    assert report.passed, [check.detail for check in report.checks]
    config = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config
    assert config.id2label == {0: "three-0", 1: "three-1", 2: "three-2"}


def test_plain_transformers_loads_it_without_this_package(world, tmp_path):
    merge(world.three, tmp_path / "out")
    program = (
        "import sys, transformers\n"
        "m = transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])\n"
        "transformers.AutoTokenizer.from_pretrained(sys.argv[1])\n"
        "assert 'propulsion_export' not in sys.modules\n"
        "print(m.config.num_labels)\n"
    )

    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert done.stdout.strip() == "3"
    assert "MISSING" not in done.stderr
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("ba be").input_ids


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_merging_into_half_precision_passes_at_that_precision(dtype, world, tmp_path):
    artifact = merge(world.three, tmp_path / "out", dtype=dtype, max_shard_size="10KB")

    assert artifact.manifest.dtype == dtype
    assert (tmp_path / "out" / "model.safetensors.index.json").is_file()
    assert check_parity(tmp_path / "out").passed


def test_another_base_model_is_refused_and_nothing_is_left(world, tmp_path, tiny_model):
    tiny_model("bert", "feature-extraction", seed=9).save_pretrained(tmp_path / "stranger")

    with pytest.raises(BaseModelError, match="is not the base model of adapter three"):
        merge(world.three, tmp_path / "out", model=str(tmp_path / "stranger"))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["stranger"]


def test_tensors_that_the_model_has_no_place_for_are_named(
    tmp_path, tiny_model, positive_adapter, write_adapter
):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "base")
    file, said = tmp_path / "base" / "model.safetensors", []
    more = {"model.layers.2.eh_proj.weight": torch.ones(4, 4), "step": torch.ones(1)}
    save_file(load_file(file) | more, file, metadata={"format": "pt"})
    adapter = write_adapter(positive_adapter(model), tmp_path / "adapter")

    merge(
        adapter,
        tmp_path / "out",
        model=str(tmp_path / "base"),
        task="text-generation",
        progress=lambda share, words: said.append(words),
    )

    (words,) = (each for each in said if "left out" in each)
    assert "model for text-generation: 2 tensors (model.layers.2.eh_proj.weight, …)" in words
    assert not more.keys() & load_file(tmp_path / "out" / "model.safetensors").keys()


def test_a_merge_that_changes_nothing_is_refused(world, tmp_path, write_adapter):
    adapter = Adapter.read(world.three)
    ones = {path: Scale(np.ones_like(scale.values)) for path, scale in adapter.scales.items()}
    nothing = replace(adapter, scales=ones, biases={}, modules={})
    write_adapter(nothing, tmp_path / "nothing")

    with pytest.raises(AdapterError, match="changes nothing"):
        merge(tmp_path / "nothing", tmp_path / "out")

    assert not (tmp_path / "out").exists()


def test_a_merge_that_rounding_swallows_is_refused(
    tmp_path, tiny_model, tiny_checkpoint, write_adapter, positive_adapter
):
    """Scales this near to one round back to the same bfloat16 weights."""
    base = tiny_checkpoint("bert", "feature-extraction")
    model = tiny_model("bert", "feature-extraction")
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    adapter = positive_adapter(model, name="near")
    near = {path: Scale(np.full_like(s.values, 1 + 1e-4)) for path, s in adapter.scales.items()}
    write_adapter(replace(adapter, scales=near, base=str(base)), tmp_path / "near")

    with pytest.raises(AdapterError, match="changes no weight"):
        merge(tmp_path / "near", tmp_path / "out", model=str(tmp_path / "half"))

    assert not (tmp_path / "out").exists()


def test_a_shared_weight_is_untied_only_when_asked(
    tmp_path, tiny_model, tiny_checkpoint, write_adapter, positive_adapter
):
    base = tiny_checkpoint("bert", "fill-mask")
    model = tiny_model("bert", "fill-mask")
    adapter = replace(
        positive_adapter(model, name="one", only="word_embeddings", tied=True),
        base=str(base),
        fingerprint=fingerprint_of_model(model),
    )
    write_adapter(adapter, tmp_path / "one")
    tokens = torch.tensor([[2, 9, 30, 3]])
    reference = AutoModelForMaskedLM.from_pretrained(base).eval()
    with attached(reference, adapter), torch.no_grad():
        expected = reference(tokens).logits

    with pytest.raises(BaseModelError, match=r"shares its weight .* untying them adds 0\.0 MiB"):
        merge(tmp_path / "one", tmp_path / "out", task="fill-mask")
    merge(tmp_path / "one", tmp_path / "out", task="fill-mask", untie=True)

    merged = AutoModelForMaskedLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, expected)
    assert check_parity(tmp_path / "out").passed


@pytest.fixture
def sharded_base(world, tmp_path):
    """The base model of `world` in several weight files."""
    directory = shutil.copytree(world.base, tmp_path / "sharded")
    (directory / "model.safetensors").unlink()
    AutoModel.from_pretrained(world.base).save_pretrained(directory, max_shard_size="20KB")
    assert len(list(directory.glob("*.safetensors"))) > 2
    return directory


def test_a_merge_reads_no_weights_again_to_hash_them_and_each_header_once(
    world, sharded_base, tmp_path, monkeypatch
):
    calls = Counter()

    def count(module, name):
        original = getattr(module, name)

        def counted(file, *args, **options):
            calls[name, Path(file).name] += 1
            return original(file, *args, **options)

        monkeypatch.setattr(module, name, counted)

    count(artifact, "digest_of")
    count(checkpoint, "stored_tensors")

    merge(world.three, tmp_path / "out", model=str(sharded_base))

    written = {file.name for file in (tmp_path / "out").iterdir()} - {"propulsion.json"}
    small = {name for name in written if "safetensors" not in name}
    shards = {file.name for file in sharded_base.glob("*.safetensors")}
    assert calls == {
        **{("digest_of", name): 1 for name in small},
        **{("stored_tensors", name): 1 for name in shards},
    }


def test_a_merge_returns_the_artifact_that_it_wrote(world, tmp_path):
    merged = merge(world.three, tmp_path / "out")

    assert merged == Artifact.read(tmp_path / "out")


def test_force_replaces_an_earlier_merge_and_nothing_else(world, tmp_path):
    merge(world.three, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("ten years")

    merge(world.five, tmp_path / "out", force=True)
    with pytest.raises(UsageError, match=r"holds no propulsion\.json, .*--force does not"):
        merge(world.five, tmp_path / "mine", force=True)

    assert list(Artifact.read(tmp_path / "out").manifest.adapters) == ["five"]
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "ten years"


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9),
        ("500MiB", 500 * 2**20),
        ("7", 7),
        ("2 kb", 2000),
        ("0.5GB", 5 * 10**8),
        ("1.1GB", 1_100_000_000),
        ("1.5GiB", 3 * 2**29),
    ],
)
def test_sizes_are_read_as_people_write_them(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "0", "big", "-1GB", "0.1", ".", "1.GB", "1e9"])
def test_other_sizes_are_refused(text):
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_a_merge_never_replaces_what_it_is_made_from(world, tmp_path):
    adapter = shutil.copytree(world.three, tmp_path / "three")
    base = shutil.copytree(world.base, tmp_path / "base")
    before = sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))

    for output in (adapter, base, tmp_path / "three" / ".." / "base"):
        with pytest.raises(UsageError, match="an input of this command") as caught:
            merge(f"a={adapter}", output, model=str(base), force=True)
        assert caught.value.exit_code == 2

    assert sorted((path, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")) == before


def test_force_does_not_replace_an_adapter_by_a_merge(world, tmp_path):
    other = shutil.copytree(world.five, tmp_path / "five")

    with pytest.raises(UsageError, match=r"holds adapter_config\.json"):
        merge(world.three, other, force=True)

    assert Adapter.read(other).digest == Adapter.read(world.five).digest


# Generative models


def on_disk(adapter, base, write_adapter, directory):
    return write_adapter(
        replace(adapter, base=str(base), fingerprint=fingerprint_of_model(_plain(base))), directory
    )


def _plain(directory):
    """The checkpoint in plain transformers."""
    config = AutoConfig.from_pretrained(directory)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_pretrained(directory).eval()


def greedy(model):
    """16 tokens, and the logits they were chosen by."""
    made = model.generate(
        torch.tensor([[2, 9, 30, 3]]),
        do_sample=False,
        max_new_tokens=16,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return made.sequences.tolist(), torch.cat(made.logits)


@pytest.mark.parametrize("kind", ["gpt2", "gemma3", "mixtral", "t5", "bart"])
def test_a_merged_generative_model_generates_what_the_adapter_does(
    kind, tmp_path, tiny_model, tiny_checkpoint, write_adapter, positive_adapter
):
    base, model = tiny_checkpoint(kind), tiny_model(kind)
    adapter = positive_adapter(model, name="one", tied=True)
    path = on_disk(adapter, base, write_adapter, tmp_path / "one")
    reference = _plain(base)
    with attached(reference, adapter):
        tokens, logits = greedy(reference)

    artifact = merge(path, tmp_path / "out", untie=True)

    found, found_logits = greedy(_plain(tmp_path / "out"))
    assert found == tokens
    torch.testing.assert_close(found_logits, logits, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(greedy(_plain(base))[1][0], logits[0], rtol=0.05)
    is_pair = kind in ("t5", "bart")
    assert artifact.manifest.task == ("text2text-generation" if is_pair else "text-generation")


def test_a_merge_keeps_how_the_base_model_generates(
    tmp_path, tiny_model, tiny_checkpoint, write_adapter, positive_adapter
):
    """Whether generation_config.json says so or, as in older checkpoints, config.json."""
    new = shutil.copytree(tiny_checkpoint("bart"), tmp_path / "new")
    settings = json.loads((new / "generation_config.json").read_text())
    (new / "generation_config.json").write_text(json.dumps(settings | {"min_length": 9}))
    old = shutil.copytree(tiny_checkpoint("bart"), tmp_path / "old")
    (old / "generation_config.json").unlink()
    config = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(config | {"min_length": 7}))
    adapter = positive_adapter(tiny_model("bart"), name="one")

    found = {}
    for base in (new, old):
        path = on_disk(adapter, base, write_adapter, tmp_path / f"for-{base.name}")
        merge(path, tmp_path / f"out-{base.name}")
        found[base.name] = _plain(tmp_path / f"out-{base.name}").generation_config.min_length

    assert found == {"new": 9, "old": 7}


def test_a_tied_embedding_is_refused_with_both_ways_out(
    tmp_path, tiny_model, tiny_checkpoint, write_adapter, positive_adapter
):
    adapter = positive_adapter(tiny_model("gpt2"), name="one", tied=True)
    path = on_disk(adapter, tiny_checkpoint("gpt2"), write_adapter, tmp_path / "one")

    with pytest.raises(BaseModelError, match=r"adds .* MiB.*--untie, or .*--mode switchable"):
        merge(path, tmp_path / "out")

    assert not (tmp_path / "out").exists()
