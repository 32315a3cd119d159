"""Rows changed each other where a model's rotary frequencies depend on the longest row of a batch.

Phi-3's `longrope` has other frequencies above a length: a short row beside a long one got other
outputs than alone, and text that came to that length parted from transformers'.
"""

import json
from dataclasses import replace

import numpy as np
import pytest

from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.tensor_names import IDS_INPUT
from propulsion_export.base_model.rope_switch import dynamic_limit, rope_switches, side_of
from propulsion_export.errors import ToolError, UsageError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.runners.decoding import CausalModel, greedy
from propulsion_export.runners.switching import SwitchingGenerator
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session

SWITCH = 16
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 2.0, 3.0]}
KINDS = {
    "phi3": {
        "original_max_position_embeddings": SWITCH,
        "rope_parameters": LONG | {"rope_theta": 10000.0},
    },
    "llama": {
        "rope_parameters": LONG
        | {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": SWITCH},
    },
}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
# Of 5, 14 and 20 tokens: one that stays below the switch, one that comes to it, one above it.
WORDS = ["ba", "di", "ke", "fol", "gan", "hi", "le", "mo", "na", "pe"]
TEXTS = tuple(
    " ".join((WORDS * 3)[start : start + size]) for start, size in ((0, 4), (2, 13), (5, 19))
)
NEW = 8


@pytest.fixture(scope="module")
def made(tiny_model, positive_adapter, write_adapter, tmp_path_factory):
    """`made(kind, **settings)`: a base model and its adapter, `(base, one)`."""
    from tiny_models import save_tokenizer

    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

    def make(kind, **settings):
        root = tmp_path_factory.mktemp(kind)
        model = tiny_model(kind, **{"max_position_embeddings": 64} | settings)
        model.save_pretrained(root / "base")
        save_tokenizer(root / "base", generative=True)
        adapter = positive_adapter(model, 1, "one", task="text-generation")
        adapter = replace(adapter, base=str(root / "base"), fingerprint=fingerprint_of_model(model))
        return write_adapter(adapter, root / "one")

    return make


@pytest.fixture(scope="module")
def merged(made, tmp_path_factory):
    """By kind, a merged checkpoint whose frequencies change above 16 tokens."""

    def make(kind):
        directory = tmp_path_factory.mktemp("merged") / kind
        merge(made(kind, **KINDS[kind]), directory)
        return directory

    return {kind: make(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def graph(made, tmp_path_factory):
    """Phi-3's graph, with the adapter folded in."""
    directory = tmp_path_factory.mktemp("onnx") / "phi3"
    export_onnx([made("phi3", **KINDS["phi3"])], directory)
    return directory


def _tokens(session, texts):
    replies = session(list(texts), settings=Settings(new_tokens=NEW))
    return [reply.prediction["tokens"] for reply in replies]


def _of_transformers(directory, text):
    """Greedy tokens, each chosen by the logits of the whole row, computed at once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    tokens = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    read = len(tokens)
    with torch.inference_mode():
        for _ in range(NEW):
            best = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
            if best == 3:
                break
            tokens = [*tokens, best]
    return tokens[read:]


def _generated(directory, text):
    """What generate() gives: of a Phi-3 it computes the row again at the switch."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    inputs = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt")
    found = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[0]
    return found[inputs["input_ids"].shape[1] :].tolist()


def _lengths(directory):
    from propulsion_export.base_model.tokenizer.reading import read_serving_tokenizer

    return [len(read_serving_tokenizer(directory)(text)["input_ids"]) for text in TEXTS]


# Generated text


@pytest.mark.parametrize("kind", KINDS)
def test_each_text_of_a_batch_goes_on_as_it_does_alone(merged, kind):
    session = Session(merged[kind])
    assert [side_of(n, (SWITCH,)) for n in _lengths(merged[kind])] == [0, 0, 1]
    assert _lengths(merged[kind])[1] + NEW > SWITCH + 1

    together = _tokens(session, TEXTS)

    assert together == [_tokens(session, [text])[0] for text in TEXTS]
    assert together == [_of_transformers(merged[kind], text) for text in TEXTS]


def test_a_text_that_comes_to_the_switch_is_the_one_of_generate(merged):
    found = _tokens(Session(merged["phi3"]), TEXTS[1:2])[0]

    expected = _generated(merged["phi3"], TEXTS[1])
    assert found == expected[: len(found)]
    assert len(found) > SWITCH + 1 - _lengths(merged["phi3"])[1]


def test_a_graph_goes_on_as_the_checkpoint_does(graph, merged):
    assert _tokens(Session(graph), TEXTS) == _tokens(Session(merged["phi3"]), TEXTS)


def test_rows_that_are_computed_apart_keep_their_adapters():
    # Each row's next token is its adapter's number, whichever rows are computed with it.
    def run(feeds):
        ids, tokens = feeds[IDS_INPUT], feeds["input_ids"]
        logits = np.zeros((*tokens.shape, 50), np.float32)
        logits[np.arange(len(ids)), :, ids] = 1
        return {"logits": logits}

    prompts = [[1] * 3, [1] * 14, [1] * 20, [1] * 15, [1] * 4]
    numbers = np.array([11, 12, 13, 14, 15])
    switching = SwitchingGenerator(CausalModel(run), prompts, 0, {IDS_INPUT: numbers}, (SWITCH,))
    seen = []

    def stopped():
        return np.array([len(seen) >= 9, False, False, len(seen) >= 2, False])

    for tokens in switching.go_on(greedy, stopped):
        seen.append(tokens)
        if len(seen) == 14:
            break

    assert (np.stack(seen) == numbers).all()


def test_the_switch_makes_a_difference(merged, graph):
    # The twin: in one batch the longest row decides, and the short row has other logits.
    from propulsion_export.runners.decoding import pad_left, recomputing
    from propulsion_export.runners.opening import open_candidate

    for directory, name in ((merged["phi3"], "torch"), (graph, "onnxruntime")):
        run = recomputing(open_candidate(Artifact.read(directory), name))
        short, long = np.arange(5, 10), np.arange(5, 25)
        alone = run(pad_left([short], 0))["logits"][0, -1]
        beside = run(pad_left([short, long], 0))["logits"][0, -1]
        assert np.abs(alone - beside).max() > 0.01


# Tensors


@pytest.mark.parametrize("place", ["merged", "graph"])
def test_tensors_of_both_sides_are_computed_apart(merged, graph, place):
    session = Session(merged["phi3"] if place == "merged" else graph)
    rows = [np.arange(5, 10), np.arange(5, 25), np.arange(8, 24)]
    ids, mask = np.zeros((3, 20), np.int64), np.zeros((3, 20), np.int64)
    for index, row in enumerate(rows):
        ids[index, 20 - len(row) :], mask[index, 20 - len(row) :] = row, 1

    replies = session({"input_ids": ids, "attention_mask": mask})

    for reply, row in zip(replies, rows, strict=True):
        [alone] = session({"input_ids": row[None], "attention_mask": np.ones_like(row[None])})
        found = reply.outputs["logits"][-len(row) :]
        np.testing.assert_allclose(found, alone.outputs["logits"], atol=1e-4)


# Models that do not generate


@pytest.fixture(scope="module")
def embedder(tiny_model, positive_adapter, write_adapter, tmp_path_factory):
    """A merged Phi-3 for feature-extraction, which counts positions with the padding."""
    from tiny_models import save_tokenizer

    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

    root = tmp_path_factory.mktemp("embedder")
    model = tiny_model("phi3", max_position_embeddings=64, **KINDS["phi3"]).model
    model.save_pretrained(root / "base")
    save_tokenizer(root / "base", generative=True)
    adapter = positive_adapter(model, 1, "one", task="feature-extraction")
    fingerprint = fingerprint_of_model(model)
    adapter = replace(adapter, base=str(root / "base"), fingerprint=fingerprint)
    merge(write_adapter(adapter, root / "one"), root / "merged", task="feature-extraction")
    return root / "merged"


def test_texts_of_both_sides_are_answered_apart(embedder):
    session = Session(embedder)

    together = session(list(TEXTS))

    for text, reply in zip(TEXTS, together, strict=True):
        [alone] = session([text])
        np.testing.assert_allclose(
            reply.prediction["embedding"], alone.prediction["embedding"], atol=1e-4
        )


def test_tensors_padded_to_the_other_side_are_refused_by_row(embedder):
    ids = np.full((2, 20), 7)
    mask = np.ones_like(ids)
    mask[1, 9:] = 0

    with pytest.raises(UsageError, match=r"row 2: its 9 tokens are padded to 20, .* of 16 tokens"):
        Session(embedder)({"input_ids": ids, "attention_mask": mask})
    assert len(Session(embedder)({"input_ids": ids[:, :9], "attention_mask": mask[:, :9]})) == 2


# Dynamic ropes change with every token beyond the model's positions


def test_a_dynamic_rope_is_exported_up_to_the_model_s_positions(made, tmp_path):
    one = made("llama", max_position_embeddings=SWITCH, **DYNAMIC)
    merge(one, tmp_path / "merged")
    export_onnx([one], tmp_path / "onnx")
    checkpoint, exported = Session(tmp_path / "merged"), Session(tmp_path / "onnx")
    ids = np.arange(5, 5 + SWITCH)[None]

    for session in (checkpoint, exported):
        with pytest.raises(UsageError, match=r"row 1: has 17 tokens, expected at most .* 16 pos"):
            session({"input_ids": np.full((1, 17), 7), "attention_mask": np.ones((1, 17), int)})
    inside = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    [theirs], [ours] = checkpoint(inside), exported(inside)
    np.testing.assert_allclose(ours.outputs["logits"], theirs.outputs["logits"], atol=1e-4)
    assert _tokens(exported, TEXTS[:2]) == _tokens(checkpoint, TEXTS[:2])


def test_code_that_branches_at_the_switch_is_refused_by_name():
    import torch
    from transformers import PhimoeConfig, PhimoeForCausalLM

    from propulsion_export.graph.sample_inputs import trace_prompt
    from propulsion_export.graph.trace import trace_decoder

    config = PhimoeConfig(
        vocab_size=100, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
        max_position_embeddings=64, pad_token_id=0, bos_token_id=2, eos_token_id=3,
        rope_parameters=LONG
        | {"original_max_position_embeddings": SWITCH, "rope_theta": 10000.0, "factor": 4.0,
           "short_mscale": 1.0, "long_mscale": 1.2},
    )  # fmt: skip
    torch.manual_seed(0)
    model = PhimoeForCausalLM(config).eval()

    with pytest.raises(ToolError, match=r"PhimoeForCausalLM: its code branches .* at 16 tokens"):
        trace_decoder(model, trace_prompt(config))


# Parity, training, packages


def test_parity_judges_rows_up_to_the_switch(graph):
    from propulsion_export.pipeline.parity import check_parity

    assert check_parity(graph).passed


def test_training_across_the_switch_is_refused(made, tmp_path):
    from propulsion_export.pipeline import merge as _  # noqa: F401 - torch is loaded
    from propulsion_export.training.model import TrainableBase, longest_text
    from propulsion_export.training.options import TrainOptions

    base = made("phi3", **KINDS["phi3"]).parent / "base"
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = TrainableBase(
        str(base),
        AutoModelForCausalLM.from_pretrained(base),
        AutoTokenizer.from_pretrained(base),
        (),
        (),
    )

    with pytest.raises(UsageError, match="--max-length: 40, expected at most 16: the rotary"):
        longest_text(loaded, TrainOptions(task="text-generation", max_length=40, batch_size=4))
    for options in ({"max_length": 16, "batch_size": 4}, {"max_length": 40, "batch_size": 1}):
        assert (
            longest_text(loaded, TrainOptions(task="text-generation", **options))
            == (options["max_length"])
        )


def test_a_package_for_genai_ends_at_the_switch(graph, tmp_path):
    from propulsion_export.pipeline.package import package

    package(graph, tmp_path / "served", layout="genai")

    content = json.loads((tmp_path / "served" / "genai_config.json").read_text())
    assert content["search"]["max_length"] == content["model"]["context_length"] == SWITCH


# Settings


@pytest.mark.parametrize(
    ("settings", "switches", "limit"),
    [
        ({"model_type": "phi3", "rope_scaling": {"type": "su"}}, (4096,), None),
        ({"model_type": "phi3", "rope_scaling": {"type": "yarn"}}, (4096,), None),
        ({"model_type": "llama", "rope_scaling": {"type": "yarn"}}, (), None),
        (
            {"rope_parameters": {"a": LONG | {"original_max_position_embeddings": 8}, "b": LONG},
             "max_position_embeddings": 32},
            (8, 32),
            None,
        ),
        ({"text_config": {"rope_parameters": LONG, "max_position_embeddings": 9}}, (9,), None),
        ({"rope_scaling": {"type": "dynamic"}, "max_position_embeddings": 7}, (), 7),
        ({"rope_parameters": None}, (), None),
        ({}, (), None),
    ],
)  # fmt: skip
def test_where_a_model_switches_is_read_from_its_settings(settings, switches, limit):
    assert (rope_switches(settings), dynamic_limit(settings)) == (switches, limit)
