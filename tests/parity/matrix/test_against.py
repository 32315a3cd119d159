"""Two artifacts of one adapter agree within what both may err, or the verdict fails."""

import json
import shutil
from dataclasses import replace

import onnx
import pytest
from onnx import numpy_helper

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.cli import main
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.parity.matrix.against import read_other
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from quantised import fold_quantised, quantise_artifact


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def against(report):
    return {check.adapter: check for check in report.checks if check.case == "against"}


@pytest.fixture(scope="module")
def merged(world, tmp_path_factory):
    """Merged checkpoints of `three` and `five`, by name."""
    root = tmp_path_factory.mktemp("merged")
    for name in ("three", "five"):
        merge(world.root / name, root / name)
    return root


def test_switchable_agrees_with_the_folded_graph_the_bank_and_the_merged_checkpoint(
    switchable, folded, banked, merged
):
    report = check_parity(switchable, against=[folded, banked, merged / "five"])

    checks = [check for check in report.checks if check.case == "against"]
    assert report.passed, [check.detail for check in report.checks if not check.passed]
    assert [check.adapter for check in checks] == ["three", "three", "five", "five"]
    assert "(onnx, folded, float32)" in checks[0].detail
    assert "(merged, folded, float32)" in checks[-1].detail


def test_the_difference_is_at_most_what_both_may_err(switchable, folded):
    report = check_parity(switchable, against=[folded])

    (parity,) = [c for c in report.checks if (c.case, c.adapter) == ("parity", "three")]
    (logits,) = parity.outputs
    assert f"allowed {2 * logits.allowed:.3g}" in against(report)["three"].detail


def test_another_precision_may_err_as_pytorch_does_there(switchable, export_world):
    half = export_world("folded", "float16")

    report = check_parity(switchable, against=[half])

    other = check_parity(half, against=[switchable])
    assert report.passed
    assert other.passed
    here, there = bounds(against(report)["three"])
    assert there > 100 * here
    # From the other side it is the same sum; the width of the head changes PyTorch's sums a little.
    assert bounds(against(other)["three"]) == pytest.approx((there, here), rel=0.5)


def bounds(check):
    """What the artifact and the other one may err."""
    here, there = check.detail.split("(")[-1].removesuffix(" there)").split(" here and ")
    return float(here), float(there)


def pretended(directory, other, adapter):
    """A copy of an artifact that says that it was made from another adapter."""
    shutil.copytree(directory, other)
    artifact = Artifact.read(other)
    ((name, entry),) = artifact.manifest.adapters.items()
    entry = replace(entry, digest=adapter.digest)
    artifact.with_manifest(replace(artifact.manifest, adapters={name: entry}))
    return other


def test_a_merged_checkpoint_of_another_adapter_fails(world, switchable, tmp_path, write_adapter):
    """It has as many labels and the right head: only its scales are another's."""
    right, other = Adapter.read(world.three), Adapter.read(world.five)
    wrong = write_adapter(replace(right, scales=other.scales), tmp_path / "wrong" / "three")
    merge(wrong, tmp_path / "merged")
    directory = pretended(tmp_path / "merged", tmp_path / "pretended", right)

    report = check_parity(switchable, against=[directory])

    assert {(c.case, c.adapter) for c in report.checks if not c.passed} == {("against", "three")}


def test_a_scale_that_is_off_by_a_percent_in_the_other_one_fails(
    world, folded, tmp_path, write_adapter
):
    right = Adapter.read(world.three)
    path = "bert.encoder.layer.1.attention.self.value"
    scale = right.scales[path]
    values = scale.values.copy()
    values[5] *= 1.01
    changed = replace(right, scales={**right.scales, path: scale._replace(values=values)})
    export_onnx([write_adapter(changed, tmp_path / "wrong" / "three")], tmp_path / "out")
    directory = pretended(tmp_path / "out", tmp_path / "pretended", right)

    assert not against(check_parity(folded, against=[directory]))["three"].passed


def token_type_lost(model):
    (types,) = [t for t in model.graph.initializer if "token_type_embeddings" in t.name]
    values = numpy_helper.to_array(types).copy()
    values[1] = 0
    types.CopyFrom(numpy_helper.from_array(values, types.name))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_mistake_that_only_inputs_for_a_purpose_show_fails(
    dtype, switchable, export_world, tmp_path
):
    other = shutil.copytree(export_world("folded", dtype), tmp_path / "other")
    manifest = Artifact.read(other).manifest
    model = onnx.load(other / "model.onnx")
    token_type_lost(model)
    onnx.save(model, other / "model.onnx", save_as_external_data=True, location="model.onnx.data")
    Artifact.write(other, manifest)

    check = against(check_parity(switchable, against=[other]))["three"]

    assert not check.passed
    assert check.detail.endswith("on inputs for a purpose")


def test_an_adapter_of_another_name_is_recognised(world, folded, switchable, tmp_path):
    other = shutil.copytree(switchable, tmp_path / "out")
    for name, adapter in (("mine", world.three), ("yours", world.five)):
        remove_adapter(other, adapter.name)
        add_adapter(other, f"{name}={adapter}")

    check = against(check_parity(folded, against=[other]))["three"]

    assert check.passed
    assert check.detail.endswith("called mine there")


def test_an_artifact_without_a_common_adapter_is_refused(folded, merged, capsys):
    with pytest.raises(ArtifactError, match="has no adapter of the same digest, expected one"):
        check_parity(folded, against=[merged / "five"])

    assert run("parity", folded, "--against", merged / "five") == 4
    assert "no adapter of the same digest" in capsys.readouterr().err


def test_an_artifact_of_another_base_model_or_task_is_refused(folded, exported):
    with pytest.raises(ArtifactError, match="was made from another base model"):
        read_other(Artifact.read(folded), exported("bert", "folded", task="text-classification"))
    with pytest.raises(ArtifactError, match="is for token-classification, expected text-class"):
        read_other(Artifact.read(folded), exported("bert", "folded", task="token-classification"))


def test_the_artifact_itself_is_refused(folded):
    with pytest.raises(UsageError, match="is the artifact itself"):
        check_parity(folded, against=[folded])


def test_what_cannot_run_here_is_not_run(switchable, tmp_path, capsys):
    code = run(
        *("trt", switchable, "-o", tmp_path / "engine"),
        *("--runtime", "tensorrt-rtx", "--target", "sm_89"),
    )
    assert code == 0

    report = check_parity(switchable, against=[tmp_path / "engine"])

    assert report.passed
    assert against(report) == {}
    (not_run,) = report.not_run
    assert not_run.what.startswith("against ")
    assert "GPU" in not_run.reason


def test_the_command_line_compares_with_several(switchable, folded, banked, capsys):
    assert run("parity", switchable, "--against", folded, "--against", banked, "--json") == 0

    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [c["adapter"] for c in checks if c["case"] == "against"] == ["three", "three", "five"]


SCHEME = QuantizationEntry(4, "matmulnbits", 32, accuracy_level=4)


def test_a_quantised_fold_agrees_with_the_quantised_switchable_graph(exported, tmp_path):
    source = exported("llama", "switchable")
    switchable = quantise_artifact(source, tmp_path / "switchable")
    folded = fold_quantised(source, tmp_path / "folded", "one", SCHEME)

    report = check_parity(folded, against=[switchable])

    assert report.passed, [check.detail for check in report.checks if not check.passed]
    assert list(against(report)) == ["one"]


def test_a_quantised_artifact_is_not_compared_with_one_of_other_weights(exported, tmp_path):
    """How far they are apart is the price of quantisation."""
    source = exported("llama", "switchable")
    quantised = quantise_artifact(source, tmp_path / "switchable")

    with pytest.raises(ArtifactError, match=r"has int4 \(.*\) weights, expected unquantised ones"):
        check_parity(source, against=[quantised])
