"""The fixture `assert_parity`, in test runs of its own: fails, skips and passes as the verdict."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
from planted_modules import one_channel, with_scale

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact

pytest_plugins = ["pytester"]


@pytest.fixture
def run(pytester):
    """`run(body, *options)`: the outcome of a test with `body` and the fixture."""

    def run(body, *options):
        pytester.makepyfile(test_it=f"def test_it(assert_parity):\n    {body}\n")
        options = ("-p", "no:cacheprovider", "-W", "error", *options)
        return pytester.runpytest_inprocess("-p", "no:xdist", *options)

    return run


@pytest.fixture
def permuted(switchable, tmp_path):
    """An export whose classes are named in another order."""
    directory = shutil.copytree(switchable, tmp_path / "permuted")
    artifact = Artifact.read(directory)
    entry = artifact.manifest.adapters["three"]
    renamed = replace(entry, labels=(*entry.labels[1:], entry.labels[0]))
    adapters = artifact.manifest.adapters | {"three": renamed}
    artifact.with_manifest(replace(artifact.manifest, adapters=adapters))
    return directory


def test_a_right_artifact_passes_and_returns_its_report(run, folded):
    done = run(f"assert assert_parity({str(folded)!r}, seed=3).seed == 3")

    done.assert_outcomes(passed=1)


def test_a_wrong_artifact_fails_with_the_verdict_and_its_checks(run, permuted):
    done = run(f"assert_parity({str(permuted)!r})")

    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(
        [f"{permuted}: parity: FAILED, 1 of * checks; labels of three: *", "  labels of three: *"]
    )
    done.stdout.no_fnmatch_line("*pytest_plugin.py*")


def test_what_cannot_run_is_skipped_with_the_reason_and_never_passes(run, folded):
    done = run(f"assert_parity({str(folded)!r}, runner='onnxruntime-cuda')", "-rs")

    done.assert_outcomes(skipped=1)
    done.stdout.fnmatch_lines(["SKIPPED*parity: not run (onnxruntime-cuda on *"])


def test_on_request_what_cannot_run_fails(run, folded):
    body = f"assert_parity({str(folded)!r}, runner='onnxruntime-cuda')"

    run(body, "--parity-must-run").assert_outcomes(failed=1)


def test_other_artifacts_are_compared_with(run, folded, switchable):
    body = (
        f"cases = [c.case for c in assert_parity({str(folded)!r}, against=[{str(switchable)!r}])"
        ".checks]; assert 'against' in cases and 'inputs' in cases"
    )

    run(body).assert_outcomes(passed=1)


def test_the_effort_is_chosen(run, folded):
    body = (
        f"cases = [c.case for c in assert_parity({str(folded)!r}, effort='quick').checks]; "
        "assert 'parity' in cases and 'inputs' not in cases"
    )

    run(body).assert_outcomes(passed=1)


def test_the_first_wrong_module_is_named(run, world, plant):
    right = Adapter.read(world.three)
    path = next(path for path in right.scales if path.endswith("0.attention.self.value"))
    planted = plant(with_scale(right, path, one_channel))

    done = run(f"assert_parity({str(planted)!r}, bisect=True)")

    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines([f"*bisect: three: first wrong in {path} *"])


def test_reports_are_written_and_replaced_on_request(run, folded, tmp_path):
    body = f"assert_parity({str(folded)!r}); assert_parity({str(folded)!r}, seed=1)"
    for _ in range(2):
        run(body, f"--parity-report={tmp_path / 'reports'}").assert_outcomes(passed=1)

    seeds = {
        path.name: json.loads((path / "parity.json").read_text())["seed"]
        for path in (tmp_path / "reports").iterdir()
    }
    assert seeds == {"test_it.py-test_it": 0, "test_it.py-test_it-2": 1}
    assert (tmp_path / "reports" / "test_it.py-test_it" / "parity.html").is_file()


def test_a_damaged_artifact_is_an_error_and_no_skip(run, tmp_path):
    done = run(f"assert_parity({str(tmp_path / 'nothing')!r})")

    done.assert_outcomes(failed=1)
    done.stdout.fnmatch_lines(["*ArtifactError*"])


def test_loading_the_plugin_loads_no_framework():
    program = (
        "import sys, propulsion_export.pytest_plugin\n"
        "print({'torch', 'transformers', 'numpy', 'onnx'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == "set()"
