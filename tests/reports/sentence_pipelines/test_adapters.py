"""Adapters that sentence-transformers has written bring a pipeline of their own."""

import json
import shutil

import numpy as np
import pytest
from sentence_pipelines import BERT, TEXTS, changed, embeddings, sentence_transformer

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.errors import AdapterError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity


def test_an_adapters_own_pipeline_goes_with_it(own, plain, tmp_path):
    adapter = own("one", "dense")

    merge(adapter, tmp_path / "merged", model=str(plain.base))

    expected = sentence_transformer(tmp_path / "merged").encode(TEXTS)
    np.testing.assert_allclose(embeddings(tmp_path / "merged"), expected, atol=2e-6)
    assert check_parity(tmp_path / "merged").passed


def test_adapters_of_two_pipelines_do_not_share_an_artifact(own, bank, base, plain, tmp_path):
    source, other = base("cls"), own("two", "dense")

    with pytest.raises(AdapterError, match=r"needs the sentence pipeline lasttoken\+dense"):
        export_onnx([plain.one, other], tmp_path / "bank", model=str(source), mode="bank")

    copied = shutil.copytree(bank.directory, tmp_path / "bank")
    with pytest.raises(AdapterError, match="has the sentence pipeline lasttoken"):
        add_adapter(copied, f"three={other}")
    add_adapter(copied, f"three={plain.two}")  # without one, it takes the artifact's
    expected = embeddings(bank.directory, adapter=["two"])
    np.testing.assert_array_equal(embeddings(copied, adapter=["three"]), expected)


def test_an_adapter_with_its_bases_pipeline_fits(own, base, plain, tmp_path):
    adapter = own("one", "mean, normalised")
    changed(adapter, BERT, max_seq_length=None)  # newer versions leave that to the tokenizer

    merge(adapter, tmp_path / "merged", model=str(base("mean, normalised")))

    assert Adapter.read(adapter).scales
    settings = json.loads((tmp_path / "merged" / BERT).read_text())
    assert settings["max_seq_length"] == 6
