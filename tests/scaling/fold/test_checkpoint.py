"""A checkpoint folded on disk is one that plain transformers loads and that computes as trained."""

import json
import shutil
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from folding import fold
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.base_model import loading as base
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import read_config
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.scaling.attach import attached
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint
from propulsion_export.scaling.fold.stored import StoredParts

KINDS = ["bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet"]
IDS = torch.tensor([[7, 12, 44, 99, 3], [20, 21, 22, 8, 9]])


def outputs(model):
    with torch.no_grad():
        return {name: v for name, v in model.eval()(input_ids=IDS).items() if v is not None}


def expected_outputs(source, task, adapter, dtype=torch.float32):
    loaded = base.load_base(str(source), task=task)
    if loaded.label_parameters:
        loaded.make_room_(3)
    loaded.model.to(dtype)
    with attached(loaded.model, adapter):
        return outputs(loaded.model)


def load(task, directory):
    """As any user would, and with no weight left to chance."""
    model, info = base.model_class_of(task).from_pretrained(
        directory, output_loading_info=True, dtype="auto"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    return model


def copied(source, tmp_path):
    return shutil.copytree(source, tmp_path / "source")


def rewrite(directory, change):
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
def test_folded_checkpoint_is_the_attached_model(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    task = "text-classification"
    source = tiny_checkpoint(kind, task)
    adapter = random_adapter(tiny_model(kind, task), biases=True, head=True)

    fold(source, task, adapter, tmp_path / "out")

    found = outputs(load(task, tmp_path / "out"))
    assert_close(found, expected_outputs(source, task, adapter), rtol=1e-4, atol=1e-4)
    base_logits = outputs(load(task, source))["logits"]
    assert not torch.allclose(found["logits"], base_logits, rtol=0.1)


@pytest.mark.parametrize(
    "task", ["token-classification", "question-answering", "feature-extraction"]
)
def test_folded_checkpoint_is_the_attached_model_for_every_task(
    task, tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    adapter = random_adapter(tiny_bert(task), biases=True, head=True)

    fold(tiny_checkpoint("bert", task), task, adapter, tmp_path / "out")

    expected = expected_outputs(tiny_checkpoint("bert", task), task, adapter)
    assert_close(outputs(load(task, tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "albert"])
def test_tied_decoder_stays_tied_when_nobody_scales_it(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    source, task = tiny_checkpoint(kind, "fill-mask"), "fill-mask"
    adapter = random_adapter(tiny_model(kind, task), embeddings=False)

    fold(source, task, adapter, tmp_path / "out")

    model = load(task, tmp_path / "out")
    assert_close(outputs(model), expected_outputs(source, task, adapter), rtol=1e-4, atol=1e-4)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "electra", "albert"])
def test_untied_decoder_keeps_the_weight_that_the_embedding_had(
    kind, tiny_checkpoint, tiny_model, random_adapter, tmp_path
):
    source, task = tiny_checkpoint(kind, "fill-mask"), "fill-mask"
    adapter = random_adapter(tiny_model(kind, task), tied=True)

    fold(source, task, adapter, tmp_path / "out", untie=True)

    found = outputs(load(task, tmp_path / "out"))
    assert_close(found, expected_outputs(source, task, adapter), rtol=1e-4, atol=1e-4)


def test_result_loads_where_this_package_is_not_imported(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    task = "text-classification"
    adapter = random_adapter(tiny_bert(), head=True)
    fold(tiny_checkpoint(), task, adapter, tmp_path / "out")
    program = f"""
        import sys, torch
        from transformers import AutoModelForSequenceClassification
        model = AutoModelForSequenceClassification.from_pretrained({str(tmp_path / "out")!r})
        print(model.eval()(input_ids=torch.tensor({IDS.tolist()})).logits.tolist())
        assert not any(name.startswith("propulsion_export") for name in sys.modules)
    """

    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
    )

    expected = expected_outputs(tiny_checkpoint(), task, adapter)["logits"]
    assert_close(torch.tensor(json.loads(done.stdout)), expected, rtol=1e-4, atol=1e-4)


def test_sharded_result_has_an_index_and_loads(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    adapter = random_adapter(tiny_bert(), head=True)
    out = tmp_path / "out"

    fold(tiny_checkpoint(), "text-classification", adapter, out, max_shard_size=20_000)

    shards = sorted(out.glob("*.safetensors"))
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert not (out / "model.safetensors").exists()
    for file in shards:
        assert all(index["weight_map"][name] == file.name for name in load_file(file))
    expected = expected_outputs(tiny_checkpoint(), "text-classification", adapter)
    found = outputs(load("text-classification", out))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_sharded_checkpoint_is_read(tiny_bert, random_adapter, tmp_path):
    model = tiny_bert()
    model.save_pretrained(tmp_path / "source", max_shard_size="20KB")
    assert (tmp_path / "source" / "model.safetensors.index.json").is_file()
    adapter = random_adapter(model, head=True)

    fold(tmp_path / "source", "text-classification", adapter, tmp_path / "out")

    expected = expected_outputs(tmp_path / "source", "text-classification", adapter)
    found = outputs(load("text-classification", tmp_path / "out"))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_single_file_goes_before_an_index_as_in_transformers(tiny_checkpoint, tmp_path):
    source = copied(tiny_checkpoint(), tmp_path)
    (source / "model.safetensors.index.json").write_text('{"weight_map": {"x": "gone"}}')

    tensors = Checkpoint.find(str(source)).tensors

    assert {tensor.file.name for tensor in tensors.values()} == {"model.safetensors"}


def test_base_stored_without_the_head_models_prefix_is_found(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    source = tiny_checkpoint("bert", "feature-extraction")
    assert "embeddings.word_embeddings.weight" in Checkpoint.find(str(source)).tensors
    adapter = random_adapter(tiny_bert(), head=True, labels=("no", "yes", "maybe"))

    fold(source, "text-classification", adapter, tmp_path / "out")

    model = load("text-classification", tmp_path / "out")
    expected = expected_outputs(source, "text-classification", adapter)
    assert_close(outputs(model), expected, rtol=1e-4, atol=1e-4)
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}


def test_base_under_a_head_models_prefix_is_found_for_the_bare_model(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    source, task = tiny_checkpoint(), "feature-extraction"
    adapter = random_adapter(tiny_bert(task))

    fold(source, task, adapter, tmp_path / "out")

    expected = expected_outputs(source, task, adapter)
    assert_close(outputs(load(task, tmp_path / "out")), expected, rtol=1e-4, atol=1e-4)


def test_legacy_names_of_layer_norms_are_found(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    source = copied(tiny_checkpoint(), tmp_path)
    rewrite(
        source,
        lambda tensors: {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for name, value in tensors.items()
        },
    )
    adapter = random_adapter(tiny_bert(), head=True)

    fold(source, "text-classification", adapter, tmp_path / "out")

    expected = expected_outputs(tiny_checkpoint(), "text-classification", adapter)
    found = outputs(load("text-classification", tmp_path / "out"))
    assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_checkpoint_stays_so_with_a_head_trained_in_float32(
    tiny_bert, random_adapter, tmp_path
):
    model = tiny_bert()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "source")
    adapter = random_adapter(model, head=True)

    dtype = fold(tmp_path / "source", "text-classification", adapter, tmp_path / "out")

    written = load_file(tmp_path / "out" / "model.safetensors")
    assert dtype == "bfloat16"
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    assert load("text-classification", tmp_path / "out").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
    ids=str,
)
def test_conversion_rounds_the_float64_product_once(
    name, dtype, tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    adapter = random_adapter(tiny_bert(), head=True)
    path = "bert.encoder.layer.1.output.dense"

    written = fold(tiny_checkpoint(), "text-classification", adapter, tmp_path / "out", dtype=name)

    stored = load_file(tiny_checkpoint() / "model.safetensors")[f"{path}.weight"]
    product = stored.double() * torch.from_numpy(adapter.scales[path].values)[:, None]
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert written == str(dtype).removeprefix("torch.")
    assert_close(found[f"{path}.weight"], product.to(dtype), rtol=0, atol=0)
    assert {tensor.dtype for tensor in found.values()} == {dtype}


def test_missing_head_is_refused_by_name(tiny_checkpoint, tiny_bert, random_adapter, tmp_path):
    source = tiny_checkpoint("bert", "feature-extraction")

    with pytest.raises(BaseModelError, match="neither in the checkpoint nor in the adapter") as e:
        fold(source, "text-classification", random_adapter(tiny_bert()), tmp_path / "out")

    assert [finding.split(": ")[1].split()[0] for finding in e.value.findings] == [
        "classifier.weight",
        "classifier.bias",
    ]


def test_bare_model_without_a_stored_pooler_is_folded_without_it(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    source, task = tiny_checkpoint("bert", "fill-mask"), "feature-extraction"
    adapter = random_adapter(tiny_bert(task), only="encoder")

    fold(source, task, adapter, tmp_path / "out")

    found = outputs(base.load_base(str(tmp_path / "out"), task=task).model)
    assert_close(found, expected_outputs(source, task, adapter), rtol=1e-4, atol=1e-4)


def test_scaled_pooler_that_is_not_stored_is_refused(
    tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    source, task = tiny_checkpoint("bert", "fill-mask"), "feature-extraction"

    with pytest.raises(BaseModelError, match=r"pooler\.dense\.weight is neither"):
        fold(source, task, random_adapter(tiny_bert(task)), tmp_path / "out")


def test_adapter_without_effect_is_refused(tiny_checkpoint, tiny_bert, random_adapter, tmp_path):
    scales = random_adapter(tiny_bert()).scales
    ones = Adapter("ones", {path: Scale(np.ones(s.values.size)) for path, s in scales.items()})

    with pytest.raises(AdapterError, match="changes no weight"):
        fold(tiny_checkpoint(), "text-classification", ones, tmp_path / "out")


def truncate(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def other_width(directory):
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))


def float8(directory):
    def change(tensors):
        name = "bert.pooler.dense.weight"
        return tensors | {name: tensors[name].to(torch.float8_e4m3fn)}

    rewrite(directory, change)


def pickle_only(directory):
    (directory / "model.safetensors").unlink()
    (directory / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'true'\ntR.")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated or damaged"),
        (other_width, r"has shape \[37\], expected \[64\]|has shape \[37, 32\], expected"),
        (float8, "of the type F8_E4M3"),
        (pickle_only, r"has no model\.safetensors"),
    ],
)
def test_checkpoint_that_is_not_whole_is_refused(
    damage, message, tiny_checkpoint, tiny_bert, random_adapter, tmp_path
):
    source = copied(tiny_checkpoint(), tmp_path)
    damage(source)

    with pytest.raises(BaseModelError, match=message):
        fold(source, "text-classification", random_adapter(tiny_bert()), tmp_path / "out")


def test_missing_shard_is_refused_by_name(tiny_bert, tmp_path):
    tiny_bert().save_pretrained(tmp_path, max_shard_size="20KB")
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()

    with pytest.raises(BaseModelError, match=f"has no {second.name}"):
        Checkpoint.find(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ['{"weight_map": ', "[]", "{}", '{"weight_map": {"x": "../elsewhere.safetensors"}}'],
    ids=["no-json", "a-list", "no-map", "a-path-outside"],
)
def test_damaged_index_is_refused(text, tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(text)

    with pytest.raises(BaseModelError, match=r"model\.safetensors\.index\.json: "):
        Checkpoint.find(str(tmp_path))


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_on_disk_is_that_of_the_loaded_model(kind, tiny_checkpoint, random_adapter):
    source, task = tiny_checkpoint(kind), "text-classification"
    loaded = base.load_base(str(source), task=task).model
    empty = base.load_empty(
        read_config(str(source)),
        task,
        head=random_adapter(loaded).modules,
        labels=random_adapter(loaded).labels,
    )

    found = fingerprint_of_checkpoint(StoredParts(Checkpoint.find(str(source)), empty))

    assert found == fingerprint_of_model(loaded)


def test_fingerprint_of_another_checkpoint_differs(tiny_bert, tiny_checkpoint, random_adapter):
    other = tiny_bert(seed=9)
    source, task = tiny_checkpoint(), "text-classification"
    empty = base.load_empty(
        read_config(str(source)),
        task,
        head=random_adapter(other).modules,
        labels=random_adapter(other).labels,
    )

    found = fingerprint_of_checkpoint(StoredParts(Checkpoint.find(str(source)), empty))

    assert found.difference(fingerprint_of_model(other))


def test_plain_auto_classes_are_what_a_task_loads():
    assert base.model_class_of("text-classification") is AutoModelForSequenceClassification
    assert base.model_class_of("fill-mask") is AutoModelForMaskedLM
