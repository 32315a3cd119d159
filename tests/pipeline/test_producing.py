"""Which exporter makes the graph of an artifact, and what the artifact says about it."""

import json

import numpy as np
import pytest
import torch
from genai_models import base_of, make
from tiny_models import save_tokenizer

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.manifest import QuantizationEntry
from propulsion_export.cli import main
from propulsion_export.errors import AdapterError, ToolError, UsageError
from propulsion_export.graph.quantisation.quantise import Quantisation
from propulsion_export.graph.signature import check_signature
from propulsion_export.packaging.onnx_adapter import write_adapter_files
from propulsion_export.pipeline import producing
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.scaling.attach import attached

PROMPT = [2, 11, 42, 7, 65, 23]
STEPS = 24


@pytest.fixture
def checkpoint(tmp_path):
    """Write a checkpoint of a model with the tokenizer of 100 entries."""

    def write(model, name="base", *, generative=True):
        directory = tmp_path / name
        model.save_pretrained(directory)
        save_tokenizer(directory, generative=generative)
        return str(directory)

    return write


@pytest.fixture
def llama():
    return make("llama", vocab_size=100, bos_token_id=2, eos_token_id=3)


def export(checkpoint, output, adapters=(), **options):
    """The artifact, and the exporter with the reason for it."""
    chosen = []
    artifact = export_onnx(
        adapters, output, model=checkpoint, chosen=lambda *each: chosen.append(each), **options
    )
    return artifact, *chosen


def greedy_in_genai(directory, adapter=None):
    """The tokens that onnxruntime-genai generates from the directory as it is."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(directory))
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(PROMPT) + STEPS, do_sample=False)
    generator = genai.Generator(model, settings)
    if adapter is not None:
        adapters = genai.Adapters(model)
        adapters.load(str(directory / "adapters" / f"{adapter}.onnx_adapter"), adapter)
        generator.set_active_adapter(adapters, adapter)
    generator.append_tokens(PROMPT)
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)]


def greedy_in_torch(model, adapter):
    """The tokens up to the end of the text; onnxruntime-genai leaves that token out."""
    with attached(model, adapter):
        made = model.generate(
            torch.tensor([PROMPT]), max_new_tokens=STEPS, do_sample=False, pad_token_id=0
        )
    tokens = made[0].tolist()
    return tokens[:-1] if tokens[-1] == model.config.eos_token_id else tokens


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
def test_auto_takes_the_builder_for_an_architecture_that_it_gets_right(
    mode, llama, checkpoint, tmp_path
):
    artifact, (exporter, reason) = export(checkpoint(llama), tmp_path / "out", mode=mode)

    assert (exporter, reason) == ("genai", "its graph is the model's, for ONNX Runtime")
    assert artifact.manifest.exporter == "genai"
    assert artifact.manifest.execution_provider == "cpu"
    check_signature(Artifact.read(tmp_path / "out"))
    shapes = {spec.name: spec.shape for spec in artifact.manifest.inputs}
    assert shapes["input_ids"] == ("batch", "sequence")
    assert shapes["attention_mask"] == ("batch", "total_sequence")
    assert shapes["past_key_values.1.value"] == ("batch", 2, "past_sequence", 16)


def test_the_directory_loads_in_onnxruntime_genai_as_it_is_with_its_adapter(
    llama, checkpoint, positive_adapter, write_adapter, tmp_path
):
    adapter = positive_adapter(llama, 3)
    directory = write_adapter(adapter, tmp_path / "adapter")
    artifact, _ = export(
        checkpoint(llama), tmp_path / "out", [f"tuned={directory}"], mode="switchable"
    )
    write_adapter_files(artifact, artifact.directory)

    expected = [greedy_in_torch(llama, each) for each in (adapter, Adapter("none", scales={}))]
    assert greedy_in_genai(artifact.directory, "tuned") == expected[0]
    assert greedy_in_genai(artifact.directory) == expected[1]
    assert expected[0] != expected[1]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        pytest.param("gpt2", "does not know this architecture", id="unknown"),
        pytest.param("gemma3", "reads rope settings", id="known-to-fail"),
        pytest.param("llama", "heads of 8", id="small-heads"),
    ],
)
def test_auto_takes_transformers_where_the_builder_cannot_and_says_why(
    kind, reason, tiny_model, monkeypatch
):
    monkeypatch.setattr(producing, "build_switchable", lambda *_, **__: "traced")
    wanted = producing.Wanted(base_of(tiny_model(kind)), [], [], "switchable", torch.float32)

    produced = producing.produce(wanted, producing.GraphOptions())

    assert (produced.exporter, produced.graphs) == ("transformers", "traced")
    assert reason in produced.reason
    with pytest.raises(ToolError, match=reason):
        producing.produce(wanted, producing.GraphOptions("genai"))


def test_auto_takes_transformers_for_a_graph_that_is_not_the_model(monkeypatch):
    monkeypatch.setattr(producing, "build_folded", lambda *_, **__: "traced")
    model = make("olmo", clip_qkv=0.5)
    wanted = producing.Wanted(base_of(model), [], [], "folded", torch.float32)
    produced = producing.produce(wanted, producing.GraphOptions())
    assert produced.exporter == "transformers"
    assert "is not the model" in produced.reason


def test_auto_takes_transformers_for_what_the_builder_has_no_node_for(monkeypatch):
    monkeypatch.setattr(producing, "build_switchable", lambda *_, **__: "traced")
    model = make("llama")
    head = model.lm_head.weight.double().numpy() * 2
    adapter = Adapter("head", scales={}, modules={"lm_head.weight": head})
    wanted = producing.Wanted(base_of(model), [adapter], [adapter], "switchable", torch.float32)
    assert "is saved whole" in producing.produce(wanted, producing.GraphOptions()).reason
    with pytest.raises(AdapterError, match="is saved whole"):
        producing.produce(wanted, producing.GraphOptions("genai"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"opset": 18, "exporter": "genai"}, "--opset: 18", id="opset"),
        pytest.param(
            {"exporter": "transformers", "execution_provider": "cuda"},
            "--execution-provider: cuda",
            id="provider",
        ),
        pytest.param({"exporter": "genai", "dtype": "bfloat16"}, "--dtype: the graph", id="dtype"),
        pytest.param(
            {"execution_provider": "cuda"},
            r"cuda in float32.*expected float16[\s\S]*--dtype float16",
            id="cuda",
        ),
        pytest.param(
            {
                **{"exporter": "transformers", "opset": 18},
                **{"quantize": "int4", "quantization_form": "qdq"},
            },
            "--opset: found 18, expected 21",
            id="opset-quantised",
        ),
        pytest.param({"execution_provider": "dml"}, "has float16 for .* dml", id="dml"),
    ],
)
def test_options_that_do_nothing_are_refused_and_leave_nothing(
    options, message, llama, checkpoint, tmp_path
):
    with pytest.raises(UsageError, match=message):
        export(checkpoint(llama), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_graph_for_another_provider_is_written_and_says_so(llama, checkpoint, tmp_path):
    artifact, (exporter, _) = export(
        checkpoint(llama), tmp_path / "out", mode="bank", dtype="float16", execution_provider="cuda"
    )
    assert exporter == "genai"
    assert artifact.manifest.execution_provider == "cuda"
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert "cuda" in config["model"]["decoder"]["session_options"]["provider_options"][0]


@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
def test_quantised_weights_are_recorded_and_generate(mode, llama, checkpoint, tmp_path):
    artifact, (exporter, _) = export(
        checkpoint(llama), tmp_path / "out", mode=mode, quantize="int4", accuracy_level=1
    )
    assert exporter == "genai"
    entry = artifact.manifest.quantization
    assert (entry.bits, entry.form, entry.block_size, entry.accuracy_level) == (
        4, "matmulnbits", 32, 1
    )  # fmt: skip
    check_signature(Artifact.read(tmp_path / "out"))
    if mode != "bank":
        assert greedy_in_genai(tmp_path / "out")[: len(PROMPT)] == PROMPT


def test_a_form_that_the_builder_lacks_is_left_to_transformers(monkeypatch):
    monkeypatch.setattr(producing, "build_folded", lambda *_, **__: "traced")
    scheme = QuantizationEntry(4, "qdq", 32)
    wanted = producing.Wanted(base_of(make("llama")), [], [], "folded", torch.float32)
    options = producing.GraphOptions(quantisation=Quantisation(scheme))
    produced = producing.produce(wanted, options)
    assert produced.exporter == "transformers"
    assert "--quantization-form: qdq" in produced.reason


def test_the_command_says_which_exporter_it_took(llama, checkpoint, tmp_path, capsys):
    arguments = ["onnx", "-m", checkpoint(llama), "-o", str(tmp_path / "out"), "--no-parity"]
    with pytest.raises(SystemExit) as exited:
        main([*arguments, "--mode", "switchable", "--placement", "attention", "--json"])
    assert not exited.value.code
    printed = capsys.readouterr()
    value = json.loads(printed.out)
    assert (value["exporter"], value["execution_provider"]) == ("genai", "cpu")
    assert "the model's" in value["exporter_reason"]


def test_a_model_without_an_end_of_text_generates_up_to_the_limit(checkpoint, tmp_path):
    model = make("llama", vocab_size=100, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    directory = checkpoint(model, generative=False)
    export(directory, tmp_path / "out", exporter="genai")
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["eos_token_id"] == []
    assert len(greedy_in_genai(tmp_path / "out")) == len(PROMPT) + STEPS


def test_scales_of_ones_are_the_default(llama, checkpoint, tmp_path):
    artifact, _ = export(checkpoint(llama), tmp_path / "out", mode="switchable")
    assert np.all(artifact.feeds("base")["propulsion_scales"] == 1)
    scales = {spec.name: spec.optional for spec in artifact.manifest.inputs}
    assert scales["propulsion_scales"]
