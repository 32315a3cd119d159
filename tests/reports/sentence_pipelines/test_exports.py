"""Every kind of export embeds as sentence-transformers does."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from sentence_pipelines import PIPELINES, SAMPLES, TEXTS, embeddings, sentence_transformer
from transformers import AutoModel, AutoTokenizer
from tritonclient.grpc.model_config_pb2 import ModelConfig

from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.package import package
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.session import Session


@pytest.mark.parametrize("name", PIPELINES)
def test_a_merged_checkpoint_embeds_as_sentence_transformers_does(name, base, plain, tmp_path):
    merge(plain.one, tmp_path / "merged", model=str(base(name)))

    found = predict(tmp_path / "merged", text=TEXTS)

    expected = sentence_transformer(tmp_path / "merged").encode(TEXTS)
    _, _, label, width = PIPELINES[name]
    assert expected.shape == (3, width)
    own = np.array([item["embedding"] for item in found])
    np.testing.assert_allclose(own, expected, atol=2e-6)
    assert {item["pooling"] for item in found} == {label}
    assert not any("note" in item for item in found)
    # The twin that the adapter is in it: the base's embeddings are others.
    other = sentence_transformer(tmp_path / "base").encode(TEXTS)
    assert np.abs(other - expected).max() > 0.01


def test_all_minilm_keeps_its_norm_of_one(tmp_path, positive_adapter, write_adapter, monkeypatch):
    monkeypatch.syspath_prepend(SAMPLES)
    from minilm import model_directory

    source = model_directory()
    adapter = positive_adapter(
        AutoModel.from_pretrained(source), embeddings=False, only="attention"
    )
    directory = write_adapter(replace(adapter, task="feature-extraction"), tmp_path / "adapter")
    merge(directory, tmp_path / "merged", model=str(source))
    texts = ["A cat sat on the mat.", "Where is the nearest station?", "cats " * 400]

    expected = sentence_transformer(tmp_path / "merged").encode(texts)

    np.testing.assert_allclose(np.linalg.norm(expected, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embeddings(tmp_path / "merged", texts), expected, atol=2e-6)


def by_hand(directory, text, pool):
    tokens = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    with torch.inference_mode():
        return pool(AutoModel.from_pretrained(directory)(**tokens).last_hidden_state[0]).numpy()


@pytest.mark.parametrize(
    ("name", "mode", "pool"),
    [
        ("cls", "switchable", lambda hidden: hidden[0]),
        ("mean, normalised", "folded", lambda hidden: hidden.mean(0) / hidden.mean(0).norm()),
        (None, None, lambda hidden: hidden.mean(0)),  # as before, and it says so
    ],
)
def test_every_kind_of_export_pools_alike(name, mode, pool, base, plain, tmp_path):
    source = str(plain.base if name is None else base(name))
    merge(plain.one, tmp_path / "merged", model=source)
    expected = [by_hand(tmp_path / "merged", text, pool) for text in ("ba be", "do")]

    sessions = [Session(tmp_path / "merged")]
    if mode is not None:
        export_onnx([plain.one], tmp_path / mode, model=source, mode=mode)
        sessions.append(Session(tmp_path / mode))
    if mode == "switchable":
        package(tmp_path / mode, tmp_path / "served", layout="onnx-adapter")
        sessions.append(Session(tmp_path / "served"))

    replies = [reply for session in sessions for reply in session(["ba be", "do"], "one")]
    for reply, row in zip(replies, expected * len(sessions), strict=True):
        np.testing.assert_allclose(reply.prediction["embedding"], row, atol=2e-5)
        assert reply.prediction["pooling"] == ("mean" if name is None else PIPELINES[name][2])
        assert ("no sentence pipeline" in reply.prediction.get("note", "")) == (name is None)


def test_the_triton_package_says_what_a_client_has_to_do_and_the_sample_does_it(
    bank, tmp_path, monkeypatch
):
    import onnxruntime

    package(bank.directory, tmp_path / "models", layout="triton")
    model = tmp_path / "models" / "models"
    config = text_format.Parse((model / "config.pbtxt").read_text(), ModelConfig())
    assert config.parameters["pooling"].string_value == "cls,weightedmean"

    monkeypatch.syspath_prepend(SAMPLES)
    import triton_client

    monkeypatch.delitem(sys.modules, "triton_client")
    session = onnxruntime.InferenceSession(model / "1" / "model.onnx")
    names = {value.name for value in session.get_inputs()}

    def infer(client, name, tensors):
        ids = tensors["adapter_ids"][:, 0]
        feeds = {key: tensors[key].astype(np.int64) for key in names - {"adapter_ids"}}
        return {"last_hidden_state": session.run(None, {**feeds, "adapter_ids": ids})[0]}

    monkeypatch.setattr(triton_client, "infer", infer)
    answers = triton_client.predict(None, model, TEXTS, ["two", "one", "base"])

    expected = embeddings(bank.directory, adapter=["two", "one", "base"])
    np.testing.assert_allclose(answers, expected, atol=2e-5)
