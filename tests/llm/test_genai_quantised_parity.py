"""Parity of the quantised graphs of onnxruntime-genai's builder, packed projections and all."""

from dataclasses import replace

import pytest
from safetensors.numpy import save_file
from tiny_models import save_tokenizer

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity

SIZES = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}


@pytest.fixture
def built(tiny_model, positive_adapter, write_adapter, tmp_path):
    """`built(kind, mode, quantize, **config)`: an export with the adapter `one`."""

    def make(kind, mode, quantize, **config):
        model = tiny_model(kind, **SIZES, **config)
        model.save_pretrained(tmp_path / "base")
        save_tokenizer(tmp_path / "base", generative=True)
        one = positive_adapter(model, 1, "one", task="text-generation", only="layers")
        fingerprint = fingerprint_of_model(model)
        write_adapter(
            replace(one, base=str(tmp_path / "base"), fingerprint=fingerprint), tmp_path / "one"
        )
        export_onnx(
            [tmp_path / "one"], tmp_path / mode, mode=mode, exporter="genai", quantize=quantize
        )
        return tmp_path / mode

    return make


@pytest.mark.parametrize(
    ("kind", "mode", "quantize", "config", "layers"),
    [
        # A tied head shares its integers with the embedding in int4, and not in int8.
        ("llama", "switchable", "int4", {"tie_word_embeddings": True}, 16),
        ("llama", "folded", "int8", {"tie_word_embeddings": True}, 15),
        ("phi3", "folded", "int4", {}, 9),
        ("phi3", "bank", "int8", {}, 9),
    ],
    ids=["tied-int4", "tied-int8", "phi3-folded", "phi3-bank"],
)
def test_a_right_export_passes(kind, mode, quantize, config, layers, built):
    report = check_parity(built(kind, mode, quantize, **config))

    (weights,) = [check for check in report.checks if check.case == "weights"]
    assert report.passed, [check for check in report.checks if not check.passed]
    assert f"of {layers} layers are the base model's, byte for byte" in weights.detail
    assert report.price


def test_a_dropped_adapter_fails(built):
    directory = built("llama", "switchable", "int4")
    artifact = Artifact.read(directory)
    save_file(artifact.feeds("base"), directory / "adapters" / "one.safetensors")
    Artifact.write(directory, artifact.manifest)

    failed = {check.case for check in check_parity(directory).checks if not check.passed}

    assert {"parity", "effect", "shipped parity", "shipped effect"} <= failed
