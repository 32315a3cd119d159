"""An adapter merged onto its own merge is folded in again, so its scales are squared.

The merged checkpoint's manifest knows the adapter; without the manifest the fingerprint has to.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.loading import load_base, load_empty
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.errors import BaseModelError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.scaling.fold.listing import fingerprint_of_checkpoint
from propulsion_export.scaling.fold.stored import StoredParts
from propulsion_export.tuning import PropulsionConfig

KINDS = {
    "ia3": lambda: peft.IA3Config(target_modules=["query"], feedforward_modules=[]),
    "norms": lambda: PropulsionConfig(target_modules=["LayerNorm"], degree=2),
}


@pytest.fixture
def trained(tmp_path):
    """`trained(kind, base)`: an adapter as PEFT writes it; (IA)^3 has no fingerprint."""

    def make(kind, base, seed=3):
        torch.manual_seed(seed)
        model = peft.get_peft_model(transformers.AutoModel.from_pretrained(base), KINDS[kind]())
        with torch.no_grad():
            for value in filter(lambda p: p.requires_grad, model.parameters()):
                value.uniform_(0.6, 1.4)
        directory = tmp_path / f"{kind}-{seed}"
        model.save_pretrained(directory)
        return directory

    return make


@pytest.mark.parametrize("command", ["merge", "onnx", "parity"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_not_applied_to_its_own_merge(kind, command, trained, world, tmp_path):
    adapter, merged = trained(kind, world.base), tmp_path / "merged"
    merge(f"first={adapter}", merged)

    with pytest.raises(BaseModelError) as caught:
        _apply(command, adapter, merged, tmp_path / "out")

    assert str(caught.value).startswith(f"{merged}: holds the adapter first already")
    assert str(caught.value).endswith(f"Give the base model itself with -m: {world.base}.")
    assert caught.value.exit_code == 4
    assert not (tmp_path / "out").exists()


def test_adding_it_to_an_artifact_of_its_own_merge_is_refused(world, switchable, tmp_path):
    merge(world.three, tmp_path / "merged")
    shutil.copytree(switchable, tmp_path / "artifact")
    file = tmp_path / "artifact" / "propulsion.json"
    manifest = json.loads(file.read_text())
    manifest["base"]["source"] = str(tmp_path / "merged")
    del manifest["digest"]
    file.write_text(json.dumps(manifest))

    with pytest.raises(BaseModelError, match="holds the adapter three already"):
        add_adapter(tmp_path / "artifact", f"again={world.three}")


def test_without_its_manifest_a_merge_is_recognised_by_its_norms(trained, world, tmp_path):
    adapter, merged = trained("norms", world.base), tmp_path / "merged"
    merge(adapter, merged)
    (merged / "propulsion.json").unlink()

    with pytest.raises(BaseModelError, match=r"LayerNorm\.\w+ holds .* was recorded"):
        merge(adapter, tmp_path / "out", model=str(merged))


def test_another_adapter_is_merged_onto_the_merge_it_was_trained_on(trained, world, tmp_path):
    first, merged = trained("ia3", world.base), tmp_path / "merged"
    merge(first, merged)
    second = trained("norms", merged, seed=4)

    merge(second, tmp_path / "both", model=str(merged))

    norm = "encoder.layer.0.output.LayerNorm"
    scale = Adapter.read(second).scales[norm].values
    before, after = (
        transformers.AutoModel.from_pretrained(directory).get_parameter(f"{norm}.weight")
        for directory in (merged, tmp_path / "both")
    )
    np.testing.assert_allclose(after.detach().numpy(), before.detach().numpy() * scale, rtol=1e-6)
    with pytest.raises(BaseModelError, match="holds the adapter ia3-3 already"):
        merge(first, tmp_path / "out", model=str(tmp_path / "both"))


def test_a_merge_that_was_damaged_is_no_base_of_another(trained, world, tmp_path):
    merged = tmp_path / "merged"
    merge(trained("ia3", world.base), merged)
    second, file = trained("norms", merged, seed=4), merged / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1  # of no entry that a fingerprint has
    file.write_bytes(content)
    (merged / "config.json").write_text((merged / "config.json").read_text() + " ")

    with pytest.raises(BaseModelError) as caught:
        merge(second, tmp_path / "out", model=str(merged))

    assert str(caught.value).startswith(f"{file}: its content is not what propulsion.json recorded")
    assert not (tmp_path / "out").exists()
    content[-1] ^= 1
    file.write_bytes(content)
    merge(second, tmp_path / "out", model=str(merged))


def test_without_a_fingerprint_the_recorded_base_model_decides(trained, world, tmp_path):
    merged = tmp_path / "merged"
    merge(trained("norms", world.base), merged)
    onto_base, onto_merged = trained("ia3", world.base, 5), trained("ia3", merged, 6)

    with pytest.raises(BaseModelError, match="holds the adapter norms-3, expected the base"):
        merge(onto_base, tmp_path / "out", model=str(merged))

    assert merge(onto_merged, tmp_path / "out", model=str(merged)).manifest.base.source == str(
        merged
    )


@pytest.mark.parametrize("kind", ["bert", "distilbert", "deberta-v2", "gpt2", "gemma3", "t5"])
def test_one_base_model_in_three_precisions_has_one_fingerprint(kind, tiny_checkpoint):
    task = {"gpt2": "text-generation", "gemma3": "text-generation", "t5": "text2text-generation"}
    base, task = str(tiny_checkpoint(kind)), task.get(kind, "text-classification")
    stored = _stored_fingerprint(base, task)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        model = load_base(base, task=task, dtype=dtype).model

        found = fingerprint_of_model(model)

        assert found.vectors.keys() == stored.vectors.keys() != set()
        assert stored.difference(found) is None
        assert found.difference(stored) is None


def test_a_base_model_without_a_pooler_has_its_own_fingerprint_in_each_task(tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 8}
    config = transformers.BertConfig(**sizes, num_attention_heads=2)
    transformers.BertForTokenClassification(config).save_pretrained(tmp_path)

    tasks = ("feature-extraction", "text-classification", "token-classification")
    found = [fingerprint_of_model(load_base(str(tmp_path), task=task).model) for task in tasks]

    # Its norms are all ones and its biases zeros.
    assert {value for row in found[0].vectors.values() for value in row} == {0.0, 1.0}
    assert [one.difference(other) for one in found for other in found] == [None] * 9


@pytest.mark.parametrize("name", ["LayerNorm.weight", "query.bias"])
def test_another_norm_or_bias_is_another_base_model(name, tiny_checkpoint):
    model = load_base(str(tiny_checkpoint("bert")), task="text-classification").model
    before = fingerprint_of_model(model)
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith(name):
                parameter.mul_(1.05)

    assert name in before.difference(fingerprint_of_model(model))


def test_a_fingerprint_of_matrices_only_is_still_compared(world):
    recorded = Adapter.read(world.three).fingerprint
    old = recorded.to_json()
    del old["vectors"]

    earlier = Fingerprint.from_json(old)

    assert earlier.difference(recorded) is None
    assert recorded.difference(earlier) is None
    name = next(iter(recorded.entries))
    other = replace(recorded, entries={**recorded.entries, name: (9.0,) * 8})
    assert name in earlier.difference(other)


def _apply(command, adapter, merged, out):
    if command == "merge":
        merge(f"second={adapter}", out, model=str(merged))
    elif command == "onnx":
        export_onnx([f"second={adapter}"], out, model=str(merged))
    else:
        check_parity(merged, model=str(merged), adapter=[f"first={adapter}"])


def _stored_fingerprint(base, task):
    config = transformers.AutoConfig.from_pretrained(base)
    empty = load_empty(config, task, head={}, labels=None)
    return fingerprint_of_checkpoint(StoredParts(Checkpoint.find(base), empty))
