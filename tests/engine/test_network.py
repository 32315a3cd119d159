import pytest

from propulsion_export.engine.network import Log, collect_errors, parse
from propulsion_export.errors import ToolError
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.passes.required_inputs import require_inputs_

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed (extra rtx)")
SEVERITY = trt.ILogger.Severity


@pytest.mark.parametrize(
    ("severity", "message", "kept"),
    [
        pytest.param(SEVERITY.INTERNAL_ERROR, "broken", ["broken"], id="internal"),
        pytest.param(SEVERITY.ERROR, "refused\n  here", ["refused here"], id="error"),
        pytest.param(SEVERITY.WARNING, "slow", [], id="warning"),
        pytest.param(SEVERITY.ERROR, "Cuda Runtime (cudaError 35: old)", [], id="follow-up"),
        pytest.param(
            SEVERITY.WARNING,
            "Profile kMAX values are not self-consistent.",
            ["Profile kMAX values are not self-consistent."],
            id="contradiction",
        ),
    ],
)
def test_errors_are_kept_and_what_says_nothing_is_not(severity, message, kept):
    log = collect_errors(trt)

    log.logger.log(severity, message)

    assert log.errors == kept


def test_a_logged_error_is_raised_with_the_place():
    with pytest.raises(ToolError, match=r"model\.onnx: refused"):
        Log(None, ["refused"]).check("model.onnx")


def test_nothing_logged_is_no_error():
    Log(None, []).check("model.onnx")


def test_a_network_is_the_graph_with_its_weights_read_from_beside_it(switchable):
    source = switchable()
    model = read_graph(source.directory)
    require_inputs_(model)

    network = parse(trt, model, source.directory)

    assert [tensor.name for tensor in network.inputs] == [
        "input_ids",
        "attention_mask",
        "propulsion_scales",
    ]
    assert [tensor.name for tensor in network.outputs] == ["logits"]


def test_missing_weights_are_an_error_that_names_the_tensor(folded):
    source = folded()
    model = read_graph(source.directory)
    (source.directory / "model.onnx.data").unlink()

    with pytest.raises(ToolError, match="Failed to import initializer: embedding"):
        parse(trt, model, source.directory)


def test_parsing_leaves_the_artifact_as_it_was(switchable):
    source = switchable()
    before = {file: file.read_bytes() for file in source.directory.rglob("*") if file.is_file()}
    model = read_graph(source.directory)
    require_inputs_(model)

    parse(trt, model, source.directory)

    after = {file: file.read_bytes() for file in source.directory.rglob("*") if file.is_file()}
    assert after == before
