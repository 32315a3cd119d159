"""`parity --bisect` and what is kept of a failure, from the command line to a program that runs."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from planted_modules import one_channel, plant_in_graph, with_scale
from worlds import plant_adapter

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.cli import main
from propulsion_export.errors import UsageError
from propulsion_export.pipeline.parity import check_parity

POSITIONS = "bert.embeddings.position_embeddings"
VALUE = "bert.encoder.layer.1.attention.self.value"


@pytest.fixture(scope="module")
def failed(switchable, world, tmp_path_factory):
    """A planted artifact, and the report of its failure with what is kept."""
    root = tmp_path_factory.mktemp("failed")
    wrong = with_scale(Adapter.read(world.three), VALUE, one_channel)
    planted = plant_adapter(switchable, root / "planted", wrong)
    report = check_parity(planted, report=root / "report", bisect=True)
    return root, planted, report


def run(program, *arguments):
    return subprocess.run(
        [sys.executable, program, *map(str, arguments)], capture_output=True, text=True
    )


def test_the_report_names_the_module_the_channel_and_the_multiply(failed):
    _, _, report = failed

    (one,) = report.located
    assert (one.adapter, one.case, one.path) == ("three", "parity", VALUE)
    assert (one.worst_channel, one.channels_off, one.multiply) == (5, 1, "wrong")
    assert one.error > one.allowed


def test_json_and_page_have_it(failed):
    root, _, _ = failed

    (told,) = json.loads((root / "report" / "parity.json").read_text())["located"]
    page = (root / "report" / "parity.html").read_text()

    assert told["path"] == VALUE
    assert len(told["channel_errors"]) == told["channels"] == 32
    assert "The first wrong module" in page
    assert f"first wrong in {VALUE}" in page
    assert 'id="channels-1-title"' in page
    assert "var(--failed)" in page


def test_without_bisect_nothing_is_located(failed):
    _, planted, _ = failed

    report = check_parity(planted)

    assert not report.passed
    assert report.located == ()


def test_the_kept_program_fails_as_long_as_the_artifact_is_wrong(failed, switchable):
    root, _, _ = failed
    program = root / "report" / "failing" / "reproduce.py"

    wrong, right = run(program), run(program, switchable)

    assert (wrong.returncode, right.returncode) == (1, 0), wrong.stderr + right.stderr
    assert "logits: error" in wrong.stdout
    assert "WRONG" in wrong.stdout
    assert "WRONG" not in right.stdout


def test_the_kept_program_finds_an_artifact_that_moved_with_its_report(failed, tmp_path):
    root, _, _ = failed
    moved = shutil.copytree(root, tmp_path / "moved")

    done = run(moved / "report" / "failing" / "reproduce.py")

    assert done.returncode == 1, done.stderr


def test_what_is_kept_is_the_worst_batch(failed):
    root, _, report = failed
    folder = root / "report" / "failing"
    oracle, found = np.load(folder / "oracle.npz"), np.load(folder / "candidate.npz")

    error = float(np.abs(found["logits"] - oracle["logits"]).max())

    errors = next(c for c in report.checks if c.case == "parity" and not c.passed).outputs
    assert error == pytest.approx(max(each.error for each in errors), rel=1e-6)


def test_nothing_is_kept_of_a_pass(switchable, tmp_path):
    report = check_parity(switchable, report=tmp_path / "report", bisect=True)

    assert report.passed
    assert report.located == ()
    assert not (tmp_path / "report" / "failing").exists()


def last_row_lost(values):
    values = values.copy()
    values[-1] = 0
    return values


@pytest.fixture(scope="module")
def seldom_wrong(folded, tmp_path_factory):
    """A planted artifact that only its longest rows show, and the report of its failure."""
    root = tmp_path_factory.mktemp("seldom")
    planted = plant_in_graph(folded, root / "planted", f"{POSITIONS}.weight", last_row_lost)
    report = check_parity(planted, report=root / "report", bisect=True)
    return root, report


def test_a_module_that_only_inputs_for_a_purpose_show_is_found(seldom_wrong):
    _, report = seldom_wrong

    assert {c.case for c in report.checks if not c.passed} == {"inputs", "tables"}
    (one,) = report.located
    assert (one.case, one.path, one.reads) == ("inputs", POSITIONS, "itself")


def test_such_inputs_are_kept(seldom_wrong, folded):
    root, _ = seldom_wrong
    program = root / "report" / "failing" / "reproduce.py"

    wrong, right = run(program), run(program, folded)

    assert (wrong.returncode, right.returncode) == (1, 0), wrong.stderr + right.stderr
    assert np.load(root / "report" / "failing" / "inputs.npz")["input_ids"].shape == (1, 40)


def test_the_command_line_says_it_in_two_lines(failed, capsys):
    _, planted, _ = failed

    with pytest.raises(SystemExit) as exit:
        main(["parity", str(planted), "--bisect"])

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bisect:")]
    assert exit.value.code == 1
    assert len(lines) == 2
    assert VALUE in lines[0]
    assert "1 of 32 channels" in lines[1]


def test_low_memory_and_bisect_contradict_each_other(switchable):
    with pytest.raises(UsageError, match="--bisect: needs the whole model in memory"):
        check_parity(switchable, bisect=True, low_memory=True)


def test_an_adapter_left_out_of_a_merged_checkpoint_is_found(world, tmp_path, write_adapter):
    from propulsion_export.artifacts.artifact import Artifact
    from propulsion_export.pipeline.merge import merge

    right = Adapter.read(world.three)
    wrong = write_adapter(with_scale(right, VALUE, one_channel), tmp_path / "three")
    merge(wrong, tmp_path / "merged")
    artifact = Artifact.read(tmp_path / "merged")
    (entry,) = artifact.manifest.adapters.values()
    told = {"three": replace(entry, digest=right.digest, source=str(world.three))}
    artifact.with_manifest(replace(artifact.manifest, adapters=told))

    (one,) = check_parity(tmp_path / "merged", bisect=True).located

    assert (one.path, one.graph, one.worst_channel) == (VALUE, "", 5)
