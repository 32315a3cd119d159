"""Classifiers that read the end-of-sequence token."""

import json

import numpy as np
import pytest
import torch
import transformers
from odd_models import NAMES, make, tensors, tokens
from tiny_models import LABELS

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.eos_pooling import _MODEL_TYPES
from propulsion_export.base_model.loading import load_base
from propulsion_export.errors import DataError
from propulsion_export.graph.eos_pooling import _last, reading_own_eos
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.runners.onnxruntime import onnxruntime_runner
from propulsion_export.runners.pytorch import torch_candidate
from propulsion_export.scaling.attach import attached
from propulsion_export.serving.session import Session


def test_every_classifier_of_transformers_that_reads_its_last_eos_is_known():
    import inspect

    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as CLASSES,
    )

    readers = [
        kind
        for kind, name in CLASSES.items()
        if isinstance(name, str)
        and "eos_mask" in inspect.getsource(getattr(transformers, name).forward)
    ]

    assert sorted(readers) == sorted(_MODEL_TYPES)


@pytest.mark.parametrize("kind", ["Bart", "T5", "MBart", "UMT5"])
def test_each_row_is_read_at_its_own_last_eos(kind):
    model = make(kind, "ForSequenceClassification", **NAMES)
    rows = [[7, 8, 9, 10, 3], [11, 3], [12, 3, 13, 3]]
    alone = [model(**tensors(tokens(row))).logits for row in rows]

    with torch.inference_mode(), reading_own_eos(model):
        own = [model(**tensors(tokens(row))).logits for row in rows]
        # transformers itself refuses a batch with the third, which has two of these tokens.
        together = model(**tensors(tokens(*rows[:2]))).logits

    np.testing.assert_allclose(torch.cat(own), torch.cat(alone), atol=1e-6)
    np.testing.assert_allclose(together, torch.cat(alone[:2]), atol=1e-5)
    after = model(**tensors(tokens(rows[0]))).logits
    np.testing.assert_array_equal(after, alone[0])  # nothing is left behind


def test_rows_with_different_numbers_of_eos_do_not_mix():
    states = torch.arange(24.0).reshape(2, 4, 3)
    chosen = torch.tensor([[True, False, True, True], [False, True, False, False]])

    np.testing.assert_array_equal(_last(states, chosen), torch.stack([states[0, 3], states[1, 1]]))


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["folded", "switchable", "bank"])
@pytest.mark.parametrize("kind", ["Bart", "T5"])
def test_a_graph_that_reads_eos_passes_parity_and_answers_texts(checkpoint, tmp_path, kind, mode):
    _, adapter = checkpoint(kind, "ForSequenceClassification", "text-classification", **NAMES)

    export_onnx([adapter], tmp_path / "out", mode=mode, untie=mode == "folded")

    assert check_parity(tmp_path / "out").passed
    rows = tokens([7, 8, 9, 10, 3], [11, 3], [12, 3, 13, 3])
    artifact = Artifact.read(tmp_path / "out")
    run = onnxruntime_runner(tmp_path / "out" / "model.onnx")
    feeds = {} if mode == "folded" else artifact.feeds("one")
    feeds |= {"adapter_ids": np.repeat(feeds["adapter_ids"], 3)} if mode == "bank" else {}
    base = load_base(str(tmp_path / "base"), task="text-classification")
    with attached(base.model, Adapter.read(adapter)):
        expected = torch_candidate(base.model, base.task)(rows)["logits"]
    np.testing.assert_allclose(run(rows | feeds)["logits"], expected, atol=1e-4)


def test_a_text_without_eos_has_no_class(checkpoint, tmp_path):
    base, adapter = checkpoint("T5", "ForSequenceClassification", "text-classification", **NAMES)
    merge(adapter, tmp_path / "merged", untie=True)
    # A tokenizer that was saved without its template puts no token behind a text.
    file = base / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"post_processor": None}))
    merge(adapter, tmp_path / "without", untie=True)

    labels = [
        reply.prediction["label"]
        for reply in Session(tmp_path / "merged")(["ba be", "ba be bi [SEP] bo"])
    ]

    assert set(labels) <= set(LABELS)
    with pytest.raises(DataError, match="'ba be': has no end-of-sequence token"):
        Session(tmp_path / "without")(["ba be"])
