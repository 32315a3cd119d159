"""A session predicts for every task what the merged checkpoints predict."""

import numpy as np
import pytest

from propulsion_export.pipeline.run import predict
from propulsion_export.serving.session import Session


@pytest.mark.parametrize(
    "task",
    [
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
        "feature-extraction",
    ],
)
def test_predictions_of_every_task_are_those_of_the_merged_checkpoints(task, make_task):
    pytest.importorskip("torch", reason="runs a checkpoint")
    made = make_task(task)
    texts = ["ba [MASK] bi ko", "bas be, bi", "ko [MASK]"]
    contexts = ["do re mi fa bol", "Ko,  bas bi", "la"] if task == "question-answering" else ()
    names = ["one", "two", "one"]

    replies = Session(made.bank)(texts, names, context=contexts)

    of_run = predict(made.bank, text=texts, adapter=names, context=contexts)
    merged = {
        name: predict(made.merged(name), text=texts, context=contexts) for name in ("one", "two")
    }
    for row, (name, reply, told) in enumerate(zip(names, replies, of_run, strict=True)):
        assert {"text": texts[row], "adapter": name, **reply.prediction} == told
        for key, value in reply.prediction.items():
            assert approximately(value) == merged[name][row][key]
    assert merged["one"] != merged["two"]


def approximately(value):
    """Equal but for the last digits of floats, whatever holds them."""
    if isinstance(value, float):
        return pytest.approx(value, abs=2e-5)
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return value


def test_outputs_of_tokens_are_those_of_the_text_without_padding(make_task):
    session = Session(make_task("token-classification").bank)
    texts = ["bas be, bi ko do", "ko"]

    long, short = session(texts, ["one", "two"])

    assert (long.outputs["logits"].shape, short.outputs["logits"].shape) == ((9, 3), (3, 3))
    [alone] = session("ko", "two")
    np.testing.assert_allclose(alone.outputs["logits"], short.outputs["logits"], atol=1e-5)
