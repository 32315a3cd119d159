"""What artifacts and results depend on."""

import pytest

from mutation import stamps
from mutation.stamps import check_unchanged, exports_stamp, sources_of


def names(module):
    return {file.relative_to(stamps._ROOT).as_posix() for file in sources_of(module)}


@pytest.mark.parametrize(
    "file",
    [
        "propulsion_export/graph/trace.py",
        "propulsion_export/graph/build.py",
        "propulsion_export/graph/genai/builder.py",
        "propulsion_export/scaling/attach.py",
        "propulsion_export/artifacts/artifact.py",
        "propulsion_export/pipeline/onnx.py",
        "propulsion_export/pipeline/merge.py",
        "propulsion_export/environment/registration.py",
        "propulsion_export/__init__.py",
        "tests/mutation/toys.py",
        "tests/mutation/planted.py",
        "tests/tiny_models.py",
        "tests/genai_toys.py",
        "tests/genai_models.py",
    ],
)
def test_an_edit_of_what_makes_artifacts_makes_them_anew(file):
    assert file in names("mutation.baselines")


@pytest.mark.parametrize(
    "file",
    [
        "propulsion_export/parity/pooling.py",
        "propulsion_export/parity/oracle.py",
        "propulsion_export/pipeline/parity.py",
        "propulsion_export/parity/built_graph.py",
        "propulsion_export/runners/onnxruntime.py",
        "propulsion_export/serving/session.py",
        "tests/mutation/running.py",
        "tests/mutation/weights.py",
    ],
)
def test_an_edit_of_parity_or_of_a_kind_keeps_artifacts(file):
    assert file not in names("mutation.baselines")


def test_results_depend_on_the_kinds_and_on_the_way_of_judging():
    found = names("mutation.running")

    assert {
        f"tests/mutation/{n}.py" for n in ("weights", "judging", "visible", "sampling")
    } <= found
    assert "tests/mutation/report.py" not in found


def test_an_edit_during_a_run_stops_it(monkeypatch):
    exports_stamp()
    check_unchanged()
    monkeypatch.setattr(stamps, "tool_versions", lambda: {"torch": "0"})

    with pytest.raises(RuntimeError, match="edited during the run"):
        check_unchanged()
