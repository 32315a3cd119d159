"""Every mistake that such an export can make has to cost the verdict."""

import shutil
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from transformers import AutoModel
from worlds import query_and_value_swapped

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.cli import main
from propulsion_export.pipeline import parity
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity

VALUE = "bert.encoder.layer.1.attention.self.value"
QUERY = "bert.encoder.layer.0.attention.self.query"


def failed_cases(report):
    return {check.case for check in report.checks if not check.passed and check.adapter == "three"}


def change_scale(adapter, path, change):
    scale = adapter.scales[path]
    return replace(
        adapter, scales={**adapter.scales, path: Scale(change(scale.values), scale.side)}
    )


def other_adapter(right, world):
    other = Adapter.read(world.five)
    return replace(right, scales=other.scales)


def degree_off_by_one(right, world):
    raised = {p: Scale(s.values ** (16 / 15), s.side) for p, s in right.scales.items()}
    return replace(right, scales=raised)


def one_layer_at_one(right, world):
    return change_scale(right, QUERY, np.ones_like)


def bias_outside_the_product(right, world):
    # (x W^T + b / s) * s = (x W^T) * s + b
    return replace(right, biases={p: b / right.scales[p].values for p, b in right.biases.items()})


def trained_bias_left_out(right, world):
    return replace(right, biases={})


def one_channel_off_by_a_percent(right, world):
    def off(values):
        values = values.copy()
        values[5] *= 1.01
        return values

    return change_scale(right, VALUE, off)


def labels_permuted(right, world):
    rolled = {name: np.roll(values, 1, axis=0) for name, values in right.modules.items()}
    return replace(right, modules=rolled)


MISTAKES = [
    other_adapter,
    degree_off_by_one,
    one_layer_at_one,
    query_and_value_swapped,
    bias_outside_the_product,
    trained_bias_left_out,
    one_channel_off_by_a_percent,
    labels_permuted,
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_switchable_export_with_a_mistake_fails(mistake, world, plant):
    planted = plant(mistake(Adapter.read(world.three), world))

    report = check_parity(planted)

    assert "parity" in failed_cases(report)
    assert report.verdict == "failed"


def test_the_same_export_without_a_mistake_passes(world, plant):
    assert check_parity(plant(Adapter.read(world.three))).passed


@pytest.mark.parametrize(
    "mistake",
    [degree_off_by_one, bias_outside_the_product, one_channel_off_by_a_percent],
    ids=lambda mistake: mistake.__name__,
)
def test_a_folded_export_with_a_mistake_ends_with_exit_code_1(
    mistake, world, tmp_path, capsys, write_adapter
):
    right = Adapter.read(world.three)
    wrong = write_adapter(mistake(right, world), tmp_path / "three")
    export_onnx([wrong], tmp_path / "out")
    pretend(tmp_path / "out", right, world.three)

    with pytest.raises(SystemExit) as exit:
        main(["parity", str(tmp_path / "out")])

    assert exit.value.code == 1
    assert "parity: FAILED" in capsys.readouterr().out


def test_outputs_of_nan_fail(folded, tmp_path):
    directory = shutil.copytree(folded, tmp_path / "nan")
    model = ir.load(directory / "model.onnx")
    bias = next(v for name, v in model.graph.initializers.items() if name == "classifier.bias")
    bias.const_value = ir.tensor(np.full(3, np.nan, np.float32), name=bias.name)
    shutil.rmtree(directory / "adapters", ignore_errors=True)
    ir.save(model, directory / "model.onnx", external_data="nan.data")
    Artifact.write(directory, Artifact.read(folded).manifest)

    report = check_parity(directory)

    assert failed_cases(report) == {"parity", "effect", "padding", "inputs"}


def test_infinities_of_both_signs_fail_without_a_warning(folded, monkeypatch):
    right = parity.open_candidate

    def opened(*arguments, **options):
        run = right(*arguments, **options)

        def infinite(feeds):
            found = {name: values.copy() for name, values in run(feeds).items()}
            found["logits"][-1] = [np.inf, -np.inf, np.inf]
            return found

        return infinite

    monkeypatch.setattr(parity, "open_candidate", opened)

    assert failed_cases(check_parity(folded)) == {"parity", "effect", "padding", "inputs"}


def test_classes_named_in_another_order_fail(switchable, tmp_path):
    directory = shutil.copytree(switchable, tmp_path / "permuted")
    artifact = Artifact.read(directory)
    entry = artifact.manifest.adapters["three"]
    renamed = replace(entry, labels=(*entry.labels[1:], entry.labels[0]))
    adapters = artifact.manifest.adapters | {"three": renamed}
    artifact.with_manifest(replace(artifact.manifest, adapters=adapters))

    assert failed_cases(check_parity(directory)) == {"labels"}


def test_query_and_key_swapped_fail_where_they_differ(
    tmp_path, tiny_model, tiny_checkpoint, positive_adapter, write_adapter
):
    """DeBERTa's attention tells q from k also by position."""
    base = tiny_checkpoint("deberta-v2", "feature-extraction")
    model = tiny_model("deberta-v2", "feature-extraction")
    right = replace(
        positive_adapter(model, name="three", only="attention.self"),
        base=str(base),
        task="feature-extraction",
        fingerprint=fingerprint_of_model(AutoModel.from_pretrained(base)),
    )
    write_adapter(right, tmp_path / "right" / "three")
    wrong = write_adapter(swap(right, "query_proj", "key_proj"), tmp_path / "wrong" / "three")
    export_onnx([wrong], tmp_path / "out")
    pretend(tmp_path / "out", Adapter.read(tmp_path / "right" / "three"), tmp_path / "right/three")

    assert "parity" in failed_cases(check_parity(tmp_path / "out"))


def test_in_bert_the_scales_of_query_and_key_are_one_product(world, plant):
    """Swapped there they compute the same but for rounding, which only `added` tells apart."""
    planted = plant(swap(Adapter.read(world.three), "query", "key"))

    assert failed_cases(check_parity(planted)) == {"added"}


def test_an_adapter_without_effect_fails(world, tmp_path, write_adapter, plant):
    """Scales of one equal their oracle exactly, and are still no export."""
    right = Adapter.read(world.three)
    ones = {path: Scale(np.ones_like(s.values)) for path, s in right.scales.items()}
    write_adapter(replace(right, scales=ones, biases={}), tmp_path / "three")
    idle = Adapter.read(tmp_path / "three")
    directory = plant(idle)
    artifact = Artifact.read(directory)
    entry = replace(
        artifact.manifest.adapters["three"], digest=idle.digest, source=str(tmp_path / "three")
    )
    adapters = artifact.manifest.adapters | {"three": entry}
    artifact.with_manifest(replace(artifact.manifest, adapters=adapters))

    assert failed_cases(check_parity(directory)) == {"effect"}


def swap(adapter, one, other):
    def partner(path):
        head, _, name = path.rpartition(".")
        return f"{head}.{ {one: other, other: one}.get(name, name) }"

    return replace(adapter, scales={p: adapter.scales[partner(p)] for p in adapter.scales})


def pretend(directory, right, source):
    """Let the manifest say that the artifact was made from `right`."""
    artifact = Artifact.read(directory)
    entry = replace(artifact.manifest.adapters["three"], digest=right.digest, source=str(source))
    artifact.with_manifest(replace(artifact.manifest, adapters={"three": entry}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropped", [False, True])
def test_an_adapter_that_was_trained_a_little_is_told_from_none(
    dtype, dropped, world, tmp_path, write_adapter
):
    """In bfloat16 the effect of these scales is hardly larger than the error."""
    right = Adapter.read(world.three)
    nearly = {
        path: Scale(1 + (scale.values - 1) / 12, scale.side) for path, scale in right.scales.items()
    }
    little = replace(right, scales=nearly, biases={})
    write_adapter(little, tmp_path / "little" / "three")
    folded = tmp_path / "little" / "three"
    if dropped:
        ones = {path: Scale(np.full_like(s.values, 1.001), s.side) for path, s in nearly.items()}
        folded = write_adapter(replace(little, scales=ones), tmp_path / "dropped" / "three")
    export_onnx([folded], tmp_path / "out", dtype=dtype)
    pretend(tmp_path / "out", Adapter.read(tmp_path / "little/three"), tmp_path / "little/three")

    report = check_parity(tmp_path / "out")

    effect = next(check for check in report.checks if check.case == "effect")
    assert effect.passed != dropped, effect.detail
    if not dropped:
        assert report.passed
