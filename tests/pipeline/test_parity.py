import json
import shutil
from dataclasses import replace
from xml.etree import ElementTree

import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.cli import main
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    BaseModelError,
    DataError,
    UsageError,
)
from propulsion_export.graph.signature import check_signature
from propulsion_export.pipeline.parity import check_parity


def run(*arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code


def test_a_switchable_export_is_judged_with_every_adapter_and_none(switchable):
    report = check_parity(switchable)

    assert report.passed, [check.detail for check in report.checks]
    assert {(check.case, check.adapter) for check in report.checks} == {
        ("labels", "three"), ("labels", "five"),
        ("parity", "three"), ("parity", "five"), ("parity", "base"),
        ("effect", "three"), ("effect", "five"),
        ("padding", "three"), ("padding", "five"), ("padding", "base"),
        ("switching", "three"), ("switching", "five"), ("identity", "base"),
        ("added", "three"), ("added", "five"), ("tables", "all"), ("texts", "all"),
        ("inputs", "three"), ("inputs", "five"), ("inputs", "base"),
    }  # fmt: skip
    assert report.inputs == 16


def test_errors_are_within_four_times_those_of_pytorch(folded):
    [parity] = [check for check in check_parity(folded).checks if check.case == "parity"]

    for output in parity.outputs:
        floor = output.scale * 2**-24
        assert output.error <= 4 * max(output.reference_error, floor)


def test_another_seed_is_another_comparison_of_the_same_verdict(folded):
    first, second = check_parity(folded, seed=1), check_parity(folded, seed=2)

    assert first.passed
    assert second.passed
    assert first.checks != second.checks


def test_report_and_junit_are_written(folded, tmp_path, capsys):
    code = run(
        *("parity", folded, "--report", tmp_path / "report"),
        *("--junit", tmp_path / "junit.xml", "--json"),
    )

    told = json.loads(capsys.readouterr().out)
    assert code == 0
    assert told["verdict"] == "passed"
    assert json.loads((tmp_path / "report" / "parity.json").read_text()) == told
    assert "PASSED" in (tmp_path / "report" / "parity.html").read_text()
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert not list(suite.iter("failure"))


def test_github_actions_get_a_summary_and_annotations(folded, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    (tmp_path / "summary.md").write_text("earlier\n")

    code = run("parity", folded, "--runner", "onnxruntime-cuda", "--json")

    told = capsys.readouterr()
    summary = (tmp_path / "summary.md").read_text()
    assert code == 3
    assert json.loads(told.out)["verdict"] == "not run"
    assert "::warning title=parity not run%3A " in told.err
    assert summary.startswith("earlier\n### \u26a0\ufe0f Parity not run")
    assert "passed" not in summary


def test_outside_of_github_actions_a_summary_is_written_on_request(
    folded, tmp_path, capsys, monkeypatch
):
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "not-ours.md"))
    arguments = ("parity", folded, "--runner", "onnxruntime-cuda")

    assert run(*arguments, "--summary", tmp_path / "summary.md") == 3
    assert "Parity not run" in (tmp_path / "summary.md").read_text()
    assert not (tmp_path / "not-ours.md").exists()
    assert "::warning" not in capsys.readouterr().err
    assert run(*arguments, "--summary", tmp_path) == 2


def test_texts_of_ones_own_can_be_compared_on(folded, tmp_path):
    (tmp_path / "texts.txt").write_text("ba be bi\nko do\n" * 9)

    report = check_parity(folded, inputs=tmp_path / "texts.txt")
    alone = check_parity(folded, inputs=tmp_path / "texts.txt", effort="quick")

    assert report.passed
    assert report.inputs == 18
    assert report.seed == 0  # of the probes
    assert alone.passed
    assert alone.seed is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", "\n", "is empty"),
        ("bad.jsonl", '{"text": "ba"}\n{"words": 1}\n', "line 2"),
        ("few.txt", "ba\n" * 15, "has 15 texts, expected at least 16"),
        ("number.jsonl", '{"text": 5}\n', "line 1: text is 5, expected a string"),
    ],
)
def test_unreadable_inputs_are_told(name, content, message, folded, tmp_path):
    (tmp_path / name).write_text(content)

    with pytest.raises(DataError, match=message):
        check_parity(folded, inputs=tmp_path / name)


def test_adapters_that_moved_are_found_where_the_caller_says(world, folded, tmp_path):
    moved = shutil.copytree(world.three, tmp_path / "moved")
    directory = shutil.copytree(folded, tmp_path / "artifact")
    artifact = Artifact.read(directory)
    gone = replace(artifact.manifest.adapters["three"], source=str(tmp_path / "gone"))
    artifact.with_manifest(replace(artifact.manifest, adapters={"three": gone}))

    with pytest.raises(AdapterError, match=r"is no longer at .*gone.*-a three=DIR"):
        check_parity(directory)

    assert check_parity(directory, adapter=[moved]).passed
    assert check_parity(directory, adapter=[f"three={moved}"]).passed


def test_an_adapter_that_is_not_the_recorded_one_is_refused(world, folded):
    with pytest.raises(AdapterError, match="is not the one the artifact was made from"):
        check_parity(folded, adapter=[f"three={world.five}"])


def test_an_adapter_that_the_artifact_does_not_have_is_refused(world, switchable):
    with pytest.raises(UsageError, match="has no adapter 'four', expected one of five, three"):
        check_parity(switchable, adapter=[f"four={world.five}"])


def test_another_base_model_is_refused(folded, tmp_path, tiny_model):
    tiny_model("bert", "feature-extraction", seed=9).save_pretrained(tmp_path / "stranger")

    with pytest.raises(BaseModelError, match="is not the base model the artifact was made from"):
        check_parity(folded, model=str(tmp_path / "stranger"))


def test_a_base_model_in_half_precision_is_recognised(world, folded, tmp_path, tiny_model):
    import torch

    tiny_model("bert", "feature-extraction").to(torch.bfloat16).save_pretrained(tmp_path / "half")

    # Recognised, and then the verdict tells that it is not what the artifact was made from.
    assert check_parity(folded, model=str(tmp_path / "half")).verdict == "failed"


def test_a_runner_of_another_kind_is_refused(folded):
    with pytest.raises(UsageError, match="cannot run onnx artifacts, expected onnxruntime"):
        check_parity(folded, runner="torch")


def test_a_runner_that_is_not_here_is_not_run_and_no_pass(folded, capsys):
    assert run("parity", folded, "--runner", "onnxruntime-cuda") == 3
    assert "parity: not run" in capsys.readouterr().out


def test_an_existing_report_is_not_replaced_unasked(folded, tmp_path, capsys):
    report = tmp_path / "report"
    assert run("parity", folded, "--report", report, "-q") == 0
    before = (report / "parity.json").read_bytes()

    assert run("parity", folded, "--report", report, "-q") == 2
    assert "--force" in capsys.readouterr().err
    assert (report / "parity.json").read_bytes() == before
    assert run("parity", folded, "--report", report, "-q", "--force") == 0


def test_the_recorded_adapters_are_read_from_their_directories(world, switchable):
    entries = Artifact.read(switchable).manifest.adapters

    assert entries["three"].digest == Adapter.read(world.three).digest


def test_a_report_never_replaces_what_is_judged(world, switchable, tmp_path):
    directory = shutil.copytree(switchable, tmp_path / "artifact")
    texts = tmp_path / "texts" / "texts.txt"
    texts.parent.mkdir()
    texts.write_text("ba be bi\n" * 16)

    for report in (directory, world.three, world.base, texts.parent):
        with pytest.raises(
            UsageError, match=r"an input of this command|does not replace"
        ) as caught:
            check_parity(directory, report=report, inputs=texts, force=True)
        assert caught.value.exit_code == 2

    assert Artifact.read(directory).manifest == Artifact.read(switchable).manifest


def test_force_replaces_a_report_by_a_report_only(folded, switchable, tmp_path):
    other = shutil.copytree(switchable, tmp_path / "other")

    with pytest.raises(UsageError, match=r"holds propulsion\.json"):
        check_parity(folded, report=other, force=True)

    Artifact.read(other)


def without_a_slot(manifest):
    first, *others = manifest.layout["propulsion_scales"]
    kept = tuple(replace(slot, offset=slot.offset - first.length) for slot in others)
    return replace(manifest, layout=manifest.layout | {"propulsion_scales": kept})


def with_first_input(manifest, **changes):
    return replace(manifest, inputs=(replace(manifest.inputs[0], **changes), *manifest.inputs[1:]))


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda m: replace(m, dtype="float16"), "graph is in float32, the manifest says float16"),
        (lambda m: replace(m, inputs=()), "has the input 'input_ids' .* the manifest no such one"),
        (lambda m: replace(m, inputs=(*m.inputs, m.inputs[0])), "names an input twice"),
        (lambda m: replace(m, outputs=m.outputs[1:]), "the manifest no such one"),
        (
            lambda m: replace(m, outputs=(*m.outputs, replace(m.outputs[0], name="more"))),
            "has the output 'more', the graph no such one",
        ),
        (
            lambda m: replace(m, outputs=(replace(m.outputs[0], dtype="float16"),)),
            "the graph has the output .* the manifest",
        ),
        (lambda m: with_first_input(m, shape=("batch", 7)), r"the manifest .*\['batch', 7\]"),
        (lambda m: with_first_input(m, optional=True), r"the manifest .*\(optional int64"),
        (without_a_slot, "propulsion_scales: the layout has .* elements, the input's shape is"),
        (lambda m: replace(m, layout={}), "propulsion_scales: the layout has 0 elements"),
    ],
    ids=["dtype", "no-inputs", "twice", "no-output", "more", "output-dtype", "shape", "optional",
         "slot", "layout"],
)  # fmt: skip
def test_a_manifest_that_does_not_fit_its_graph_is_refused(edit, words, switchable, tmp_path):
    directory = shutil.copytree(switchable, tmp_path / "edited")
    artifact = Artifact.read(directory)
    artifact.with_manifest(edit(artifact.manifest))

    with pytest.raises(ArtifactError, match=words) as caught:
        check_parity(directory)

    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("mode", ["folded", "switchable"])
def test_what_an_export_says_of_its_graph_is_so(mode, request):
    check_signature(Artifact.read(request.getfixturevalue(mode)))


def test_junit_never_replaces_a_file_of_another_kind(folded, tmp_path, capsys):
    directory = shutil.copytree(folded, tmp_path / "artifact")
    before = (directory / "config.json").read_bytes()

    assert run("parity", directory, "--junit", directory / "config.json") == 2
    assert (directory / "config.json").read_bytes() == before
    assert "is not replaced" in capsys.readouterr().err


def test_a_home_directory_need_not_be_expanded_by_a_shell(folded, tmp_path, monkeypatch, capsys):
    shutil.copytree(folded, tmp_path / "artifact")
    monkeypatch.setenv("HOME", str(tmp_path))

    assert run("inspect", "~/artifact") == 0
    assert run("parity", "~/artifact", "--junit", "~/junit.xml") == 0
    assert (tmp_path / "junit.xml").is_file()


def test_run_and_trt_refuse_a_manifest_that_is_not_the_graph_s(switchable, tmp_path, capsys):
    directory = shutil.copytree(switchable, tmp_path / "artifact")
    artifact = Artifact.read(directory)
    three = {"three": artifact.manifest.adapters["three"]}
    artifact.with_manifest(replace(artifact.manifest, mode="folded", adapters=three))

    assert run("run", directory, "--text", "ba") == 4
    assert run("trt", directory, "-o", tmp_path / "engine") == 4
    assert "mode is 'folded'" in capsys.readouterr().err
