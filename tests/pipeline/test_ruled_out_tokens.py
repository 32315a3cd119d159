"""A model that rules out tokens itself, by logits of minus infinity, is exported and judged."""

import functools
import json
import shutil

import numpy as np
import onnx
import pytest
import torch
import transformers

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import GRAPH_FILE, MANIFEST_FILE
from propulsion_export.artifacts.manifest import read_manifest
from propulsion_export.artifacts.tensor_names import LOGITS
from propulsion_export.pipeline.onnx import export_modes
from propulsion_export.pipeline.parity import check_parity

INF = float("inf")
MODES = ("folded", "switchable")
RULED_OUT, OTHER, VOCABULARY = [11, 42, 96], 50, 100


@pytest.fixture(scope="module", autouse=True)
def _masking_llama():
    """Let every Llama add minus infinity to the logits of RULED_OUT."""
    plain = transformers.LlamaForCausalLM.forward

    @functools.wraps(plain)
    def forward(self, *arguments, **named):
        outputs = plain(self, *arguments, **named)
        ruled_out = torch.isin(torch.arange(VOCABULARY), torch.tensor(RULED_OUT))
        outputs.logits = outputs.logits.masked_fill(ruled_out, -INF)
        return outputs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.LlamaForCausalLM, "forward", forward)
        yield


@pytest.fixture(scope="module")
def masked(_masking_llama, make_world, shared):
    """The directory of both exports of a Llama that rules out tokens; copy before changing."""
    one = make_world("llama").one

    def fill(directory):
        export_modes([one], directory / "exports", MODES)

    return shared("ruled-out", fill) / "exports"


@pytest.mark.parametrize("mode", MODES)
def test_an_export_of_a_model_that_rules_out_tokens_passes(mode, masked, tmp_path):
    effort = "standard" if mode == "folded" else "quick"
    report = check_parity(masked / mode, effort=effort, report=tmp_path / "report")

    assert report.passed, [check.detail for check in report.checks if not check.passed]
    cases = {check.case for check in report.checks}
    assert cases >= {"parity", "effect", "padding", "recomputing", "right padding", "greedy"}
    assert "padding inside" in cases
    outputs = [output for check in report.checks for output in check.outputs]
    assert all(0 < output.allowed < 1 and output.scale < INF for output in outputs)
    written = (tmp_path / "report" / "parity.json").read_text()
    json.loads(written, parse_constant=pytest.fail)


def vector(value, token, elsewhere):
    values = np.full(VOCABULARY, elsewhere, np.float32)
    values[token] = value
    return values


# An operator and what it does to the logits.
MISTAKES = {
    "one more": ("Min", vector(-INF, OTHER, INF)),
    "one fewer": ("Max", vector(0.0, RULED_OUT[0], -INF)),
    "a value beside them": ("Add", vector(0.01, OTHER, 0.0)),
    "plus infinity": ("Max", vector(INF, OTHER, -INF)),
    "plus for minus infinity": ("Max", vector(INF, RULED_OUT[0], -INF)),
}


def spoil(directory, operator, values):
    """Let the graph do something more to its logits."""
    model = onnx.load(directory / GRAPH_FILE, load_external_data=False)
    graph = model.graph
    for node in graph.node:
        node.output[:] = ["right" if name == LOGITS else name for name in node.output]
    graph.initializer.append(onnx.numpy_helper.from_array(values, "mistake"))
    graph.node.append(onnx.helper.make_node(operator, ["right", "mistake"], [LOGITS]))
    onnx.save(model, directory / GRAPH_FILE)
    Artifact.write(directory, read_manifest(directory / MANIFEST_FILE))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_graph_that_rules_out_otherwise_fails(mistake, masked, tmp_path):
    shutil.copytree(masked / "folded", tmp_path / "spoilt")
    spoil(tmp_path / "spoilt", *MISTAKES[mistake])

    report = check_parity(tmp_path / "spoilt", effort="quick", report=tmp_path / "report")

    failed = {check.case for check in report.checks if not check.passed}
    assert failed >= {"parity", "recomputing", "right padding"}
    for name in ("parity.json", "parity.html"):
        assert (tmp_path / "report" / name).exists()
    json.loads((tmp_path / "report" / "parity.json").read_text(), parse_constant=pytest.fail)
