import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import remove_adapter
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
from propulsion_export.errors import ArtifactError, UnknownAdapterError, UsageError
from propulsion_export.pipeline.run import predict
from propulsion_export.serving import loaded_model
from propulsion_export.serving import texts as texts_module

TEXTS = ["ba be bi", "ko", "do re mi fa bol"]
LABELS = ("no", "yes", "maybe")


@pytest.fixture(name="merged")
def make_merged(tiny_model, tiny_checkpoint, positive_adapter, write_adapter, tmp_path):
    """`merged(kind, task)`: a tiny model with an adapter multiplied in, and its artifact."""

    def make(kind, task):
        pytest.importorskip("torch", reason="runs a checkpoint")
        from propulsion_export.pipeline.merge import merge

        base = tiny_checkpoint(kind, task)
        labels = LABELS if task == "token-classification" else None
        adapter = positive_adapter(tiny_model(kind, task), 1, "tuned", labels=labels, task=task)
        directory = write_adapter(adapter, tmp_path / "tuned")
        merge(directory, tmp_path / "merged", model=str(base), untie=task == "fill-mask")
        return tmp_path / "merged"

    return make


def outputs_of(model_class, artifact, *texts, **tokenized):
    """What transformers itself computes with a merged artifact, and the tokens."""
    import torch
    import transformers

    tokens = transformers.AutoTokenizer.from_pretrained(artifact)(
        *texts, return_tensors="pt", **tokenized
    )
    with torch.no_grad():
        model = getattr(transformers, model_class)
        return model.from_pretrained(artifact).eval()(**tokens), tokens


def expected(world, directory, texts):
    torch = pytest.importorskip("torch", reason="PyTorch is the oracle")
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from propulsion_export.scaling.attach import attached

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
    pytest.importorskip("torch", reason="runs a checkpoint")
    from propulsion_export.pipeline.merge import merge

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
        ({"text": TEXTS, "adapter": ["three", "five"]}, UsageError, "2 adapters for 3 rows"),
        (
            {"text": ["ba"], "adapter": ["nine"]},
            UnknownAdapterError,
            "expected one of base, five, three",
        ),
        ({"text": ["ba"], "runner": "torch"}, UsageError, "cannot run onnx artifacts"),
        (
            {"text": ["ba"], "context": ["be", "bi"]},
            UsageError,
            "2 contexts for 1 rows, expected one, or one each",
        ),
        (
            {"text": ["ba"], "top_k": 3, "max_new_tokens": 8},
            UsageError,
            "--max-new-tokens, --top-k: for generating text, the artifact is for text-classif",
        ),
    ],
)
def test_a_wrong_call_is_told(options, error, message, switchable):
    with pytest.raises(error, match=message):
        predict(switchable, **options)


def test_of_a_long_text_only_the_beginning_is_tokenised(switchable, monkeypatch):
    seen = []

    def spy(names, tokenizer, given, *, contexts=None, **options):
        seen.extend(map(len, [*given, *(contexts or ())]))
        return encode(names, tokenizer, given, contexts=contexts, **options)

    encode = texts_module.encode_texts
    monkeypatch.setattr(texts_module, "encode_texts", spy)
    text = "ba be bi bol, " * 100_000

    [long] = predict(switchable, text=[text], adapter=["five"])
    [short] = predict(switchable, text=[text[:6000]], adapter=["five"])
    [pair] = predict(switchable, text=[text], context=["ba " + text], adapter=["five"])

    assert (long["label"], long["score"]) == (short["label"], short["score"])
    assert pair["score"] > 0
    assert max(seen) <= 6000


def test_what_is_made_of_nan_is_no_prediction(switchable, tmp_path):
    directory = tmp_path / "lost"
    shutil.copytree(switchable, directory)
    file = directory / "adapters" / "three.safetensors"
    feeds = load_file(file)
    feeds["propulsion_scales"][7] = np.nan
    save_file(feeds, file)
    Artifact.write(directory, Artifact.read(switchable).manifest)

    with pytest.raises(ArtifactError, match="computes NaN or infinity with 'three'") as told:
        predict(directory, text=TEXTS, adapter=["five", "three", "base"])
    assert len(told.value.findings) == 1
    assert predict(directory, text=TEXTS, adapter=["five"])


def test_a_folded_artifact_refuses_another_adapter(folded):
    with pytest.raises(UnknownAdapterError, match="has the adapter 'three' folded in"):
        predict(folded, text=["ba"], adapter=["five"])


def test_many_texts_are_run_in_batches_and_predicted_as_alone(switchable, monkeypatch):
    texts = [
        f"{first} {second}"
        for first in ("ba", "be", "bi ko", "ca", "ce", "ci", "da")
        for second in ("ko", "do re", "mi", "fa", "bol", "la")
    ]
    sizes = []
    open_candidate = loaded_model.open_candidate

    def counting(*arguments, **options):
        run = open_candidate(*arguments, **options)
        return lambda tensors: sizes.append(len(tensors["input_ids"])) or run(tensors)

    monkeypatch.setattr(loaded_model, "open_candidate", counting)
    together = predict(switchable, text=texts, adapter=["five"])

    assert sizes == [32, 10]
    alone = [predict(switchable, text=[text], adapter=["five"])[0] for text in texts[::8]]
    for item, other in zip(together[::8], alone, strict=True):
        assert item == other | {"score": pytest.approx(other["score"], abs=1e-5)}
    assert len({item["label"] for item in together}) > 1


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_a_long_text_is_cut_to_the_positions_there_are(kind, merged, tiny_checkpoint, tmp_path):
    artifact = merged(kind, "text-classification")
    base = tiny_checkpoint(kind, "text-classification")
    long = " ".join(["ba"] * 500)
    (tmp_path / "texts.txt").write_text(f"{long}\n" * 16)

    [cut] = predict(artifact, text=[long])
    [short] = predict(artifact, text=[" ".join(["ba"] * 36)])  # and two special tokens: 38
    [shorter] = predict(artifact, text=[" ".join(["ba"] * 35)])
    from propulsion_export.pipeline.parity import check_parity

    report = check_parity(artifact, model=str(base), inputs=tmp_path / "texts.txt")

    assert cut["score"] == short["score"] != shorter["score"]
    assert report.passed


def test_each_word_gets_the_label_of_its_first_sub_word(merged):
    artifact = merged("bert", "token-classification")
    texts = ["bas be, bi", "ko cas"]  # "bas" is "ba" and "##s", "," is a word of its own

    told = predict(artifact, text=texts)

    for text, words, firsts, item in zip(
        texts, [["bas", "be", ",", "bi"], ["ko", "cas"]], [[1, 3, 4, 5], [1, 2]], told, strict=True
    ):
        found, _ = outputs_of("AutoModelForTokenClassification", artifact, text)
        shares = found.logits[0].softmax(-1)
        assert [token["word"] for token in item["tokens"]] == words
        for token, first in zip(item["tokens"], firsts, strict=True):
            assert token["label"] == LABELS[int(shares[first].argmax())]
            assert token["score"] == pytest.approx(float(shares[first].max()), abs=1e-5)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_answer_is_the_likeliest_span_of_the_context(kind, merged):
    artifact = merged(kind, "question-answering")
    contexts = ["do re mi fa bol", "Ko,  bas bi"]

    told = predict(artifact, text=["ba be", "bi"], context=contexts)

    for question, context, item in zip(["ba be", "bi"], contexts, told, strict=True):
        found, tokens = outputs_of(
            "AutoModelForQuestionAnswering",
            artifact,
            question,
            context,
            return_token_type_ids=kind == "bert",
        )
        inside = [index for index, part in enumerate(tokens.sequence_ids(0)) if part == 1]
        starts = found.start_logits[0][inside].softmax(-1)
        ends = found.end_logits[0][inside].softmax(-1)
        pairs = starts.outer(ends).triu()
        first, last = divmod(int(pairs.argmax()), len(inside))
        assert item["start"] == tokens.encodings[0].offsets[inside[first]][0]
        assert item["end"] == tokens.encodings[0].offsets[inside[last]][1]
        assert item["answer"] == context[item["start"] : item["end"]] != ""
        assert item["score"] == pytest.approx(float(pairs.max()), abs=1e-5)


def test_one_context_serves_several_questions_and_a_long_one_is_cut(merged):
    artifact = merged("bert", "question-answering")

    told = predict(artifact, text=["ba", "be"], context=["ko do " * 500])

    assert all(item["end"] <= 40 * 3 for item in told)


def test_questions_without_contexts_for_each_are_refused(merged):
    artifact = merged("bert", "question-answering")

    with pytest.raises(UsageError, match=r"question-answering: no context .* with --context"):
        predict(artifact, text=["ba"])
    with pytest.raises(UsageError, match="2 contexts for 3 rows"):
        predict(artifact, text=TEXTS, context=["a", "b"])


def test_a_mask_is_filled_with_the_likeliest_word(merged):
    artifact = merged("bert", "fill-mask")

    tokenizer = read_tokenizer(artifact)

    told = predict(artifact, text=["ba [MASK] bi ko", "[MASK] [MASK]"])

    for text, count, item in zip(["ba [MASK] bi ko", "[MASK] [MASK]"], (1, 2), told, strict=True):
        found, tokens = outputs_of("AutoModelForMaskedLM", artifact, text)
        places = (tokens.input_ids[0] == 4).nonzero().flatten()
        best = found.logits[0][places].argmax(-1).tolist()
        assert item["filled"] == [tokenizer.decode([token]) for token in best]
        assert len(best) == count


def test_an_embedding_is_the_mean_over_a_texts_own_tokens(merged):
    artifact = merged("bert", "feature-extraction")

    told = predict(artifact, text=["ba", "do re mi fa bol"])

    for text, item in zip(["ba", "do re mi fa bol"], told, strict=True):
        found, _ = outputs_of("AutoModel", artifact, text)
        np.testing.assert_allclose(
            item["embedding"], found.last_hidden_state[0].mean(0).numpy(), atol=1e-5
        )


def test_the_base_model_keeps_its_labels_when_the_adapter_they_came_from_is_removed(
    switchable, tmp_path
):
    directory = shutil.copytree(switchable, tmp_path / "copy")
    [before] = predict(directory, text=["ba be"], adapter=["base"])

    remove_adapter(directory, "three")

    assert predict(directory, text=["ba be"], adapter=["base"]) == [before]
    assert before["label"].startswith("three-")
