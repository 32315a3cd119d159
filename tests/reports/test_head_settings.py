"""A regressor, a multi-label classifier or a reranker is answered by softmax, as if it were none.

Whoever exports one gets `LABEL_0 (100 %)` for every text; here the oracle is transformers' own
text-classification pipeline on the merged checkpoint.
"""

import importlib
import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import transformers
from click.testing import CliRunner
from peft import IA3Config, get_peft_model

from propulsion_export import Session
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.cli.app import app
from propulsion_export.cli.run import shown as shown_on_a_line
from propulsion_export.errors import AdapterError, UsageError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.predictions import classify

TEXTS = ["ba be bi", "ce", "do fol gor ha"]
PAIRS = ["ke", "la le", "pa"]
NAMES = ("sport", "politics", "weather")
SAMPLES = Path(__file__).parents[2] / "samples"
# What config.json says, the names of the classes, and a text that `run` prints in other words.
HEADS = {
    "regression": ("regression", ("stars",)),
    "regression-of-three": ("regression", NAMES),
    "multi-label": ("multi_label_classification", NAMES),
    "multi-label-of-one": ("multi_label_classification", ("sport",)),
    "one-label": (None, ("relevant",)),
    "classes": (None, NAMES),
    "single-label": ("single_label_classification", NAMES),
}


@pytest.fixture(scope="session")
def make_head_base(shared, tiny_model, tiny_tokenizer, tiny_checkpoint):
    """`make_head_base(head)`: a checkpoint of a classifier of HEADS."""

    def make(head):
        problem_type, names = HEADS[head]

        def fill(directory):
            settings = {"id2label": dict(enumerate(names)), "problem_type": problem_type}
            settings["label2id"] = {name: number for number, name in enumerate(names)}
            model = tiny_model("bert", seed=4, num_hidden_layers=1, **settings)
            model.save_pretrained(directory)
            tiny_tokenizer.save_pretrained(directory)

        return shared(f"head-{head}", fill)

    return make


@pytest.fixture(scope="session")
def make_adapter(shared, make_head_base, random_adapter, write_adapter):
    """`make_adapter(head, **changes)`: scales for such a base model, no head of its own."""

    def make(head, name="tuned", *, seed=1, trained_head=False, **changes):
        def fill(directory):
            base = make_head_base(head)
            model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
            made = random_adapter(model, seed, name, head=trained_head, task="text-classification")
            positive = {path: Scale(np.abs(scale.values)) for path, scale in made.scales.items()}
            made = replace(made, scales=positive, base=str(base), **changes)
            write_adapter(made, directory / name)

        return shared(f"head-adapter-{head}-{name}", fill) / name

    return make


@pytest.fixture
def ia3(tmp_path):
    """`ia3(base)`: an adapter of PEFT's own with a head as wide as the checkpoint's."""

    def make(base, name="ia3"):
        import torch

        torch.manual_seed(3)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
        config = IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
        tuned = get_peft_model(model, config)
        with torch.no_grad():
            for parameter in tuned.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape))
        tuned.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def pipeline_of(directory):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    return transformers.pipeline("text-classification", model=model, tokenizer=tokenizer)


def assert_like(prediction, best, every):
    """`best` and `every` are what the pipeline says with top_k of 1 and None."""
    assert prediction["label"] == best["label"]
    assert prediction["score"] == pytest.approx(best["score"], abs=2e-5)
    for one in prediction.get("scores", ()):
        (same,) = (other for other in every if other["label"] == one["label"])
        assert one["score"] == pytest.approx(same["score"], abs=2e-5)


@pytest.mark.parametrize("head", HEADS)
def test_a_merged_checkpoint_answers_as_the_pipeline_of_transformers(head, make_adapter, tmp_path):
    merge(make_adapter(head), tmp_path / "out")
    oracle = pipeline_of(tmp_path / "out")

    for text, prediction in zip(TEXTS, predict(tmp_path / "out", text=TEXTS), strict=True):
        assert_like(prediction, *oracle(text), oracle(text, top_k=None))
        if HEADS[head][0] == "multi_label_classification":
            over = [one["label"] for one in oracle(text, top_k=None) if one["score"] >= 0.5]
            assert prediction["labels"] == over
        else:
            assert "labels" not in prediction


@pytest.mark.parametrize(
    ("head", "mode"),
    [("regression", "folded"), ("multi-label", "switchable"), ("one-label", "bank")],
)
def test_a_graph_answers_as_the_merged_checkpoint(
    head, mode, make_adapter, make_head_base, tmp_path
):
    merge(make_adapter(head), tmp_path / "merged")
    export_onnx([make_adapter(head)], tmp_path / "out", mode=mode)
    oracle, base = pipeline_of(tmp_path / "merged"), pipeline_of(make_head_base(head))

    session = Session(tmp_path / "out")
    for text, reply in zip(TEXTS, session(TEXTS, adapter="tuned"), strict=True):
        assert_like(reply.prediction, *oracle(text), oracle(text, top_k=None))
    if mode != "folded":
        for text, reply in zip(TEXTS, session(TEXTS, adapter="base"), strict=True):
            assert_like(reply.prediction, *base(text), base(text, top_k=None))


def test_an_adapter_of_single_labels_on_a_regressor_is_answered_by_softmax(
    make_head_base, make_adapter, tmp_path
):
    changes = {"labels": NAMES, "trained_head": True}
    kinds = {"model_settings": {"problem_type": "single_label_classification"}}
    told = make_adapter("regression-of-three", "told", seed=2, **changes, **kinds)
    earlier = make_adapter("regression-of-three", "earlier", seed=3, **changes)
    raw = make_adapter("regression-of-three", "raw", seed=5)
    export_onnx([told, raw], tmp_path / "bank", mode="bank")
    add_adapter(tmp_path / "bank", earlier)
    session = Session(tmp_path / "bank")

    names = ["told", "earlier", "raw", "base"]
    replies = dict(zip(names, session(["ba be"] * 4, adapter=names), strict=True))

    for name in names:
        logits = replies[name].outputs["logits"].astype(np.float64)
        softmax = np.exp(logits) / np.exp(logits).sum()
        expected = softmax if name in ("told", "earlier") else logits
        assert replies[name].prediction["score"] == pytest.approx(expected.max(), abs=2e-6)
    # The same, folded; and what the checkpoint written says.
    merge(told, tmp_path / "merged")
    assert read(tmp_path / "merged")["problem_type"] == "single_label_classification"
    merge(raw, tmp_path / "still")
    assert read(tmp_path / "still")["problem_type"] == "regression"


def read(directory):
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("types", [(), ("token_type_ids",)], ids=["without-types", "with-types"])
def test_a_reranker_reads_pairs(types, make_adapter, make_head_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_head_base("one-label"), base)
    file = base / "tokenizer_config.json"
    names = {"model_input_names": ["input_ids", *types, "attention_mask"]}
    file.write_text(json.dumps(json.loads(file.read_text()) | names))
    merge(make_adapter("one-label"), tmp_path / "out", model=str(base))
    oracle = pipeline_of(tmp_path / "out")

    answers = predict(tmp_path / "out", text=TEXTS, context=PAIRS)

    for text, pair, answer in zip(TEXTS, PAIRS, answers, strict=True):
        expected = oracle({"text": text, "text_pair": pair})
        assert_like(answer, expected, [expected])
    single = predict(tmp_path / "out", text=TEXTS)
    assert [one["score"] for one in single] != [one["score"] for one in answers]
    with pytest.raises(UsageError, match="2 contexts for 3 rows"):
        predict(tmp_path / "out", text=TEXTS, context=PAIRS[:2])


@pytest.mark.parametrize(
    ("head", "shown"),
    [
        ("regression", lambda p: f"{p['score']:g}"),
        ("regression-of-three", lambda p: f"sport={p['scores'][0]['score']:g} politics="),
        ("multi-label", lambda p: f"{p['labels'][0]} ({p['score']:.1%})"),
        ("classes", lambda p: f"{p['label']} ({p['score']:.1%})"),
    ],
)
def test_run_prints_what_the_numbers_mean(head, shown, make_adapter, tmp_path):
    merge(make_adapter(head), tmp_path / "out")
    prediction = next(p for p in predict(tmp_path / "out", text=TEXTS) if p.get("labels", True))

    done = CliRunner().invoke(app, ["run", str(tmp_path / "out"), "--text", prediction["text"]])

    assert shown(prediction) in done.output
    assert ("%" in done.output) == ("regression" not in head)


def test_a_text_without_any_label_says_which_is_likeliest():
    found = classify([-3.0, -1.0], ["no", "yes"], "multi_label_classification")

    assert (found["labels"], found["label"]) == ([], "yes")
    assert shown_on_a_line(found) == "no label (likeliest: yes, 26.9%)"


def test_huge_logits_are_no_warning():
    assert classify([-1e4], None, None) == {"label": "LABEL_0", "score": 0.0}
    assert classify([1e4, -1e4], None, "multi_label_classification")["labels"] == ["LABEL_0"]


@pytest.mark.parametrize(
    ("head", "mode"),
    [
        ("classes", "merged"),
        ("multi-label", "folded"),
        ("multi-label", "added"),
    ],
)
def test_class_names_of_a_head_as_wide_as_the_checkpoints_are_kept(
    head, mode, ia3, make_head_base, tmp_path
):
    adapter, out = ia3(make_head_base(head)), tmp_path / "out"
    assert Adapter.read(adapter).labels is None
    if mode == "merged":
        merge(adapter, out)
    elif mode == "added":
        export_onnx([], out, model=str(make_head_base(head)), mode="bank", max_labels=7)
        add_adapter(out, adapter)
    else:
        export_onnx([adapter], out, mode=mode)

    (entry,) = Artifact.read(out).list_adapters().values()
    assert entry.labels == NAMES
    assert entry.problem_type == HEADS[head][0]
    (reply,) = Session(out)("ba be", adapter="ia3")
    assert reply.prediction["label"] in NAMES
    if mode == "folded":
        assert check_parity(out).passed
    if mode in ("merged", "folded"):
        assert list(read(out)["id2label"].values()) == list(NAMES)


def test_names_are_not_lent_to_a_head_of_another_width(make_head_base, ia3, tmp_path):
    wide = ia3(make_head_base("classes"))
    shutil.copytree(wide, tmp_path / "narrow")
    adapter = Adapter.read(wide)
    head = {name: values[:2] for name, values in adapter.modules.items()}
    from safetensors.numpy import load_file, save_file

    tensors = load_file(wide / "adapter_model.safetensors")
    tensors |= {f"base_model.model.{name}": values.copy() for name, values in head.items()}
    save_file(tensors, tmp_path / "narrow" / "adapter_model.safetensors", {"format": "pt"})
    export_onnx([wide, tmp_path / "narrow"], tmp_path / "out", mode="switchable")
    merge(tmp_path / "narrow", tmp_path / "merged")

    entries = Artifact.read(tmp_path / "out").manifest.adapters
    assert entries["ia3"].labels == NAMES
    assert entries["narrow"].labels == ("LABEL_0", "LABEL_1")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.id2label == {0: "LABEL_0", 1: "LABEL_1"}


@pytest.mark.parametrize("value", ["ranking", 1, ["regression"]])
def test_an_unknown_problem_type_is_refused(value, make_adapter, tmp_path):
    shutil.copytree(make_adapter("regression"), tmp_path / "wrong")
    file = tmp_path / "wrong" / "adapter_config.json"
    config = json.loads(file.read_text()) | {"model_settings": {"problem_type": value}}
    file.write_text(json.dumps(config))

    with pytest.raises(AdapterError, match="model_settings: problem_type is"):
        merge(tmp_path / "wrong", tmp_path / "out")


def test_the_server_answers_pairs_beside_single_texts(make_adapter, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SAMPLES))
    batching = importlib.import_module("batching")
    export_onnx([make_adapter("one-label")], tmp_path / "bank", mode="bank")
    session = Session(tmp_path / "bank")
    rows = [
        batching.Row("ba", "tuned", "ke"),
        batching.Row("ba", "tuned"),
        batching.Row("ce", "base", "la"),
    ]

    scores = [reply.prediction["score"] for reply in batching.answer(session, rows)]

    alone = partial(session, adapter="tuned")
    expected = [alone("ba", context="ke"), alone("ba"), session("ce", context="la")]
    assert scores == pytest.approx([reply.prediction["score"] for (reply,) in expected], abs=2e-6)
    assert len(set(scores)) == 3
