import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from propulsion_export.adapter import Adapter
from propulsion_export.attach import attached
from propulsion_export.errors import ArtifactError, UsageError
from propulsion_export.pipeline.merging import merge
from propulsion_export.pipeline.predicting import predict

TEXTS = ["ba be bi", "ko", "do re mi fa bol"]


def expected(world, directory, texts):
    adapter = Adapter.read(directory)
    model = AutoModelForSequenceClassification.from_pretrained(
        world.base, num_labels=len(adapter.labels)
    ).eval()
    tokens = AutoTokenizer.from_pretrained(world.base)(texts, padding=True, return_tensors="pt")
    with attached(model, adapter), torch.no_grad():
        shares = model(**tokens).logits.softmax(-1)
    return [(adapter.labels[int(row.argmax())], float(row.max())) for row in shares]


def test_each_text_gets_its_own_adapter(world, switchable):
    told = predict(switchable, text=TEXTS, adapter=["three", "five", "three"])

    three = expected(world, world.three, [TEXTS[0], TEXTS[2]])
    five = expected(world, world.five, [TEXTS[1]])
    for item, (label, score) in zip(told, [three[0], five[0], three[1]], strict=True):
        assert item["label"] == label
        np.testing.assert_allclose(item["score"], score, atol=1e-5)
    assert [item["adapter"] for item in told] == ["three", "five", "three"]


def test_merged_and_folded_artifacts_need_no_adapter_named(world, folded, tmp_path):
    merge(world.three, tmp_path / "merged")

    graph, merged = predict(folded, text=TEXTS), predict(tmp_path / "merged", text=TEXTS)

    assert [item["label"] for item in graph] == [item["label"] for item in merged]
    assert [item["label"] for item in graph] == [
        label for label, _ in expected(world, world.three, TEXTS)
    ]


def test_without_a_name_a_graph_of_several_adapters_is_the_base_model(switchable):
    [item] = predict(switchable, text=["ba"])

    assert item["adapter"] == "base"


def test_texts_come_from_a_file_too(switchable, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "ba"}\n{"text": "be"}\n')

    told = predict(switchable, inputs=tmp_path / "texts.jsonl", adapter=["five"])

    assert [item["text"] for item in told] == ["ba", "be"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, UsageError, "no text is given"),
        ({"text": TEXTS, "adapter": ["three", "five"]}, UsageError, "2 adapters for 3 texts"),
        ({"text": ["ba"], "adapter": ["nine"]}, ArtifactError, "expected one of base, five, three"),
        ({"text": ["ba"], "runner": "torch"}, UsageError, "cannot run a onnx artifact"),
    ],
)
def test_a_wrong_call_is_told(options, error, message, switchable):
    with pytest.raises(error, match=message):
        predict(switchable, **options)


def test_a_folded_artifact_refuses_another_adapter(folded):
    with pytest.raises(ArtifactError, match="has the adapter 'three' folded in"):
        predict(folded, text=["ba"], adapter=["five"])
