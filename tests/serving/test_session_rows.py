"""A session answers each row as its adapter alone would, whatever rows are beside it.

The oracle is PyTorch in float64 with the adapter attached; what PyTorch itself is off in float32
says how far an answer may be off, as in the verdict.
"""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
from session_inputs import KINDS, ROWS, TEXTS, own, random_inputs

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.parity.comparison import FACTOR


@pytest.fixture(scope="session")
def oracle(world, shared):
    """`oracle(name, inputs)`: logits by PyTorch, in float64 and in float32; computed once."""
    adapters = {name: Adapter.read(getattr(world, name)) for name in ("three", "five")}
    # What the checkpoint lacks, the head, is the first adapter's in the base model's row.
    adapters["base"] = replace(adapters["three"], scales={}, biases={})

    def compute(name, inputs):
        digest = hashlib.sha256(inputs["input_ids"].tobytes()).hexdigest()[:12]
        file = shared(f"oracle-{name}-{digest}", lambda to: fill(name, inputs, to)) / "logits.npz"
        with np.load(file) as found:
            return [found["float64"], found["float32"]]

    def fill(name, inputs, directory):
        import torch
        from transformers import AutoModelForSequenceClassification

        from propulsion_export.runners.pytorch import torch_runner
        from propulsion_export.scaling.attach import attached

        model = AutoModelForSequenceClassification.from_pretrained(
            world.base, num_labels=len(adapters[name].labels)
        ).eval()
        found = {}
        for dtype in ("float64", "float32"):
            with attached(model.to(getattr(torch, dtype)), adapters[name]):
                found[dtype] = torch_runner(model)(inputs)["logits"]
        np.savez(directory / "logits.npz", **found)

    return compute


@pytest.mark.parametrize("kind", [*KINDS, "folded", "merged"])
def test_each_row_is_what_pytorch_computes_with_its_adapter(kind, opened, oracle):
    inputs = random_inputs()
    single = kind in ("folded", "merged")
    names = ["three"] * ROWS if single else ["three", "base", "five", "three"] * 4
    wanted = {name: oracle(name, inputs) for name in ("three", "five", "base")}
    allowed = FACTOR * max(np.abs(exact - rough).max() for exact, rough in wanted.values())

    replies = opened(kind)(inputs, adapter=names)

    for row, (name, reply) in enumerate(zip(names, replies, strict=True)):
        exact = {other: logits[row] for other, (logits, _) in wanted.items()}
        assert reply.adapter == name
        assert reply.outputs["logits"].shape == exact[name].shape
        assert np.abs(reply.outputs["logits"] - exact[name]).max() <= allowed
        # The twin: the answers of another adapter, or of the base model, would not do.
        count = min(len(logits) for logits in exact.values())
        others = [exact[other] for other in exact if other != name]
        assert all(
            np.abs(reply.outputs["logits"][:count] - o[:count]).max() > 1e3 * allowed
            for o in others
        )


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_is_alone(kind, opened, oracle):
    session, inputs = opened(kind), random_inputs(1)
    names = ["three", "base", "five", "base"] * 4
    own_error = max(np.abs(np.subtract(*oracle(name, inputs))).max() for name in set(names))

    together = session(inputs, names)

    for row, (name, reply) in enumerate(zip(names, together, strict=True)):
        [alone] = session(own(inputs, row), adapter=name)
        difference = np.abs(alone.outputs["logits"] - reply.outputs["logits"]).max()
        assert difference <= FACTOR * own_error
        assert (alone.labels, alone.version) == (reply.labels, reply.version)


def test_in_a_bank_each_row_is_bit_for_bit_what_it_is_in_a_batch_of_its_adapter(opened):
    session, inputs = opened("banked"), random_inputs(2)
    names = ["three", "base", "five", "base"] * 4

    together = session(inputs, names)

    of_one = {name: session(inputs, name) for name in set(names)}
    for row, (name, reply) in enumerate(zip(names, together, strict=True)):
        np.testing.assert_array_equal(reply.outputs["logits"], of_one[name][row].outputs["logits"])
    assert not np.array_equal(
        of_one["three"][0].outputs["logits"], of_one["base"][0].outputs["logits"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_what_they_are_alone_and_what_the_two_artifacts_agree_on(kind, opened):
    session = opened(kind)
    names = ["three", "base", "five", "three"] * 2

    together = session(TEXTS, adapter=names)

    other = opened("banked" if kind == "switchable" else "switchable")(TEXTS, adapter=names)
    for text, name, reply, twin in zip(TEXTS, names, together, other, strict=True):
        [alone] = session(text, name)
        for same in (alone, twin):
            assert reply.prediction["label"] == same.prediction["label"]
            assert reply.prediction["score"] == pytest.approx(same.prediction["score"], abs=1e-5)
            np.testing.assert_allclose(
                reply.outputs["logits"], same.outputs["logits"], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_adapters_own_and_the_logits_are_cut_to_them(kind, opened):
    replies = opened(kind)(TEXTS[:3], adapter=["three", "five", "base"])

    for reply, name, count in zip(replies, ("three", "five", "three"), (3, 5, 3), strict=True):
        assert reply.labels == tuple(f"{name}-{index}" for index in range(count))
        assert reply.outputs["logits"].shape == (count,)
        assert reply.prediction["label"] == reply.labels[reply.outputs["logits"].argmax()]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("folded", "three"), ("merged", "three"), ("switchable", "base"), ("banked", "base")],
)
def test_without_a_name_it_is_the_only_adapter_or_the_base_model(kind, name, opened):
    assert [reply.adapter for reply in opened(kind)(TEXTS[:2])] == [name, name]


def test_what_transformers_tokenizes_is_taken_as_it_is(world, opened):
    transformers = pytest.importorskip("transformers", reason="is the oracle")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.base)
    encoded = tokenizer(TEXTS, padding=True, return_token_type_ids=True, return_tensors="pt")

    of_tensors = opened("banked")(encoded, "five")

    for reply, of_text in zip(of_tensors, opened("banked")(TEXTS, "five"), strict=True):
        np.testing.assert_array_equal(reply.outputs["logits"], of_text.outputs["logits"])
    assert of_tensors[0].prediction is None
