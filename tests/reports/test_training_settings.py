"""What training sets in memory is lost, so that later stages pad or read texts otherwise.

Whoever trained a classifier on GPT-2 or Llama, which have no padding token, could not export it;
where config.json and tokenizer disagree about that token, a row of a batch got another answer than
alone.
"""

import json
import shutil
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

import propulsion_export
from propulsion_export import Session
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.changing import add_adapter
from propulsion_export.base_model.settings import settings_for_batches
from propulsion_export.base_model.tokenizer.reading import read_serving_tokenizer
from propulsion_export.errors import AdapterError, BaseModelError
from propulsion_export.pipeline.merge import merge
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.parity import check_parity
from propulsion_export.training import TrainOptions, train

TEXTS = ["ba be bi bo bu", "ce", "do fo", "ga he"]
CLASS = "text-classification"
SIZES = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = SIZES | {
    "n_embd": 16,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 32,
    "initializer_range": 0.5,
}
LLAMA = SIZES | {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "initializer_range": 0.5,
}
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
KINDS = {
    "gpt2": (transformers.GPT2Config, GPT2),
    "llama": (transformers.LlamaConfig, LLAMA),
    "mistral": (transformers.MistralConfig, LLAMA),
    "bert": (transformers.BertConfig, BERT),
    "roberta": (transformers.RobertaConfig, BERT | {"type_vocab_size": 1, "pad_token_id": 3}),
}
OPTIONS = TrainOptions(task=CLASS, epochs=1, batch_size=8, placement="all", head_only=False)


@pytest.fixture(scope="session")
def make_base(shared):
    """`make_base(kind, pad=None, tokenizer_pad=None)`: a classifier of two classes."""

    def make(kind, pad=None, tokenizer_pad=None):
        config_class, settings = KINDS[kind]

        def fill(directory):
            torch.manual_seed(0)
            settings_now = settings | ({} if pad is None else {"pad_token_id": pad})
            config = config_class(**settings_now)
            if pad is None and kind in ("gpt2", "llama", "mistral"):
                config.pad_token_id = None
            transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(
                directory
            )
            write_tokenizer(directory, tokenizer_pad)

        return shared(f"base-{kind}-{pad}-{tokenizer_pad}", fill)

    return make


def write_tokenizer(directory, pad):
    """Words of two letters; `</s>` ends nothing by itself, as GPT-2's end token."""
    words = [f"{a}{b}" for a in "bcdfgh" for b in "aeiou"]
    vocabulary = ["<unk>", "<s>", "</s>", "<pad>", "<other>", *words]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="</s>",
        pad_token=pad,
        model_max_length=32,
    ).save_pretrained(directory)


@pytest.fixture(scope="session")
def trained(shared, make_base):
    """`trained(kind, pad, tokenizer_pad)`: an adapter as `train` writes it."""

    def make(kind, pad=None, tokenizer_pad=None):
        def fill(directory):
            rows = [
                {"text": text, "label": label} for text, label in zip(TEXTS, "abab", strict=True)
            ]
            data = directory / "data.jsonl"
            data.write_text("\n".join(json.dumps(row) for row in rows * 4))
            train(make_base(kind, pad, tokenizer_pad), data, directory / "out", options=OPTIONS)

        return shared(f"trained-{kind}-{pad}-{tokenizer_pad}", fill) / "out"

    return make


def scores_alone(directory):
    """The scores of each text by transformers, alone and so without any padding."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    with torch.no_grad():
        return [
            model(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].numpy()
            for text in TEXTS
        ]


def oracle(base, adapter):
    """The same of the base model with the adapter, by PEFT; the head is the adapter's."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    tuned = peft.PeftModel.from_pretrained(model, adapter).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    with torch.no_grad():
        return [
            tuned(input_ids=torch.tensor([tokenizer(text)["input_ids"]])).logits[0].numpy()
            for text in TEXTS
        ]


# No padding token at all; config.json's alone; the tokenizer's alone; two different ones.
PADS = {
    "none": (None, None, {"pad_token_id": 2}, {"pad_token": "</s>"}),
    "config": (4, None, {}, {"pad_token": "<other>"}),
    "tokenizer": (None, "<pad>", {"pad_token_id": 3}, {}),
    "both": (4, "<pad>", {"pad_token_id": 3}, {}),
    "same": (3, "<pad>", {}, {}),
}


@pytest.mark.parametrize(
    ("kind", "case"), [("gpt2", "none"), ("llama", "both"), ("mistral", "config"), ("gpt2", "same")]
)
def test_a_decoder_classifies_a_batch_as_each_row_alone(kind, case, make_base, trained, tmp_path):
    pad, tokenizer_pad, model_settings, tokenizer_settings = PADS[case]
    base, adapter = (make(kind, pad, tokenizer_pad) for make in (make_base, trained))
    expected = oracle(base, adapter)
    read = Adapter.read(adapter)
    assert read.model_settings == {"problem_type": "single_label_classification"} | model_settings
    assert read.tokenizer_settings == tokenizer_settings

    merge(adapter, tmp_path / "merged")
    if case in ("none", "both"):
        export_onnx([f"out={adapter}"], tmp_path / "onnx", mode="switchable")

    assert np.allclose(scores_alone(tmp_path / "merged"), expected, atol=1e-5)
    for directory in tmp_path.iterdir():
        replies = Session(directory)(TEXTS, adapter="out")
        assert np.allclose([reply.outputs["logits"] for reply in replies], expected, atol=1e-5)
        assert {reply.prediction["label"] for reply in replies} <= {"a", "b"}


def test_parity_judges_a_decoder_that_classifies(trained, tmp_path):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(TEXTS * 4))
    export_onnx([f"out={trained('gpt2')}"], tmp_path / "onnx")

    assert check_parity(tmp_path / "onnx", inputs=texts).passed


@pytest.mark.parametrize("mode", ["merged", "onnx"])
def test_an_adapter_of_pefts_own_gets_the_end_token_as_padding(mode, make_base, tmp_path):
    torch.manual_seed(1)
    base = make_base("gpt2")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.IA3Config(
        task_type="SEQ_CLS", target_modules=["c_attn"], feedforward_modules=[], fan_in_fan_out=True
    )
    tuned = peft.get_peft_model(model, config)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.5).add_(0.3 * torch.rand(parameter.shape))
    tuned.save_pretrained(tmp_path / "ia3")
    assert Adapter.read(tmp_path / "ia3").model_settings == {}

    if mode == "merged":
        merge(tmp_path / "ia3", tmp_path / "out", model=str(base))
    else:
        export_onnx([tmp_path / "ia3"], tmp_path / "out", model=str(base))

    replies = Session(tmp_path / "out")(TEXTS)
    expected = oracle(base, tmp_path / "ia3")
    assert np.allclose([reply.outputs["logits"] for reply in replies], expected, atol=1e-5)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 2


def test_slots_for_a_decoder_take_what_is_trained_later_and_refuse_other_padding(
    make_base, trained, tmp_path
):
    export_onnx([], tmp_path / "bank", model=str(make_base("gpt2")), mode="bank", max_labels=3)

    add_adapter(tmp_path / "bank", f"later={trained('gpt2')}")
    replies = Session(tmp_path / "bank")(TEXTS, adapter="later")
    expected = oracle(make_base("gpt2"), trained("gpt2"))
    assert np.allclose([reply.outputs["logits"] for reply in replies], expected, atol=1e-5)
    other = changed(trained("gpt2"), tmp_path / "other", model_settings={"pad_token_id": 4})
    with pytest.raises(AdapterError, match=r"other: was trained with pad_token_id 4, .* has 2"):
        add_adapter(tmp_path / "bank", other)
    assert list(Artifact.read(tmp_path / "bank").list_adapters()) == ["later"]


def test_training_on_single_labels_is_told_where_the_base_model_is_a_regressor(tmp_path):
    torch.manual_seed(0)
    config = transformers.BertConfig(**BERT, num_labels=1, problem_type="regression")
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base", "<pad>")
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS, "abab", strict=True)]
    (tmp_path / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 4))

    train(tmp_path / "base", tmp_path / "data.jsonl", tmp_path / "out", options=OPTIONS)
    merge(tmp_path / "out", tmp_path / "merged")

    assert Adapter.read(tmp_path / "out").model_settings == {
        "problem_type": "single_label_classification"
    }
    merged = transformers.pipeline("text-classification", model=str(tmp_path / "merged"))
    for text, reply in zip(TEXTS, Session(tmp_path / "merged")(TEXTS), strict=True):
        assert reply.prediction == pytest.approx(merged(text)[0], abs=2e-6)
        assert 0.5 <= reply.prediction["score"] < 1


def test_peft_records_what_several_labels_mean(make_base):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(
        make_base("bert", 3, "<pad>"), problem_type="multi_label_classification"
    )
    tuned = peft.get_peft_model(model, propulsion_export.PropulsionConfig(task_type="SEQ_CLS"))

    recorded = tuned.peft_config["default"].model_settings
    assert recorded == {"problem_type": "multi_label_classification"}


def changed(adapter, directory, **fields):
    shutil.copytree(adapter, directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    return directory


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_settings": {"pad_token_id": 4}},
            "other: was trained with pad_token_id 4, adapter",
        ),
        (
            {"tokenizer_settings": {"pad_token": "<pad>"}},
            "with pad_token '<pad>', adapter out with",
        ),
        ({"tokenizer_settings": {"pad_token": "<new>"}}, "other: was trained .* '<new>', which"),
    ],
)
def test_adapters_that_contradict_each_other_are_refused(fields, message, trained, tmp_path):
    other = changed(trained("gpt2"), tmp_path / "other", **fields)

    first = [f"out={trained('gpt2')}"] if "<new>" not in message else []
    with pytest.raises(AdapterError, match=message):
        export_onnx([*first, other], tmp_path / "bank", mode="bank")
    assert not (tmp_path / "bank").exists()
    silent = changed(trained("gpt2"), tmp_path / "silent", model_settings=None)
    assert Adapter.read(silent).model_settings == {}


def test_an_adapter_padded_otherwise_than_its_tokenizer_now_is_refused(trained, tmp_path):
    other = changed(trained("gpt2"), tmp_path / "other", model_settings={"pad_token_id": 4})

    with pytest.raises(AdapterError, match=r"padding token 4, the tokenizer of .* pads with 2"):
        merge(other, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "field",
    [
        {"model_settings": {"hidden_size": 3}},
        {"model_settings": {"pad_token_id": -1}},
        {"model_settings": {"pad_token_id": True}},
        {"model_settings": ["pad_token_id"]},
        {"tokenizer_settings": {"pad_token": 3}},
        {"tokenizer_settings": {"auto_map": "x.y"}},
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(field, trained, tmp_path):
    other = changed(trained("gpt2"), tmp_path / "other", **field)

    with pytest.raises(AdapterError, match=rf"adapter_config\.json: {next(iter(field))}: "):
        Adapter.read(other)


def test_a_model_that_no_token_can_pad_is_refused_before_any_work(make_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_base("llama"), base)
    file = base / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in settings.items() if k != "eos_token"}))

    with pytest.raises(BaseModelError, match="neither a padding nor an end token"):
        export_onnx([], tmp_path / "out", model=str(base))


def test_a_padding_token_beyond_the_embedding_is_refused(make_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_base("llama"), base)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<added>"}))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    model.config.vocab_size = 20
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)

    with pytest.raises(BaseModelError, match=r"pads with token 35, expected one of the 20"):
        settings_for_batches(model, tokenizer, CLASS, "base")


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_an_encoder_that_masks_its_padding_keeps_its_files(kind, make_base, tmp_path):
    """The twin: another padding token than config.json's changes nothing there."""
    base = make_base(kind, 3, "<other>")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    config = peft.IA3Config(task_type="SEQ_CLS", target_modules=["query"], feedforward_modules=[])
    tuned = peft.get_peft_model(model, config)
    for name, parameter in tuned.named_parameters():
        parameter.data.mul_(1.5 if "ia3" in name else 1)
    tuned.save_pretrained(tmp_path / "ia3")
    merge(tmp_path / "ia3", tmp_path / "out", model=str(base))

    file = "tokenizer_config.json"
    assert (tmp_path / "out" / file).read_bytes() == (base / file).read_bytes()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["pad_token_id"] == 3
    replies = Session(tmp_path / "out")(TEXTS)
    alone = scores_alone(tmp_path / "out")
    assert np.allclose([reply.outputs["logits"] for reply in replies], alone, atol=1e-5)


def test_left_padding_that_shifts_positions_is_refused(make_base, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(make_base("roberta", 3, "<other>"), base)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"padding_side": "left"}))

    with pytest.raises(BaseModelError, match="pads on the left with token 4, expected 3"):
        export_onnx([], tmp_path / "out", model=str(base))


def test_peft_keeps_the_settings(trained, make_base, tmp_path):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(make_base("gpt2"))
    peft.PeftModel.from_pretrained(model, trained("gpt2")).save_pretrained(tmp_path / "again")
    again, before = (Adapter.read(place) for place in (tmp_path / "again", trained("gpt2")))

    assert again.model_settings == before.model_settings
    assert again.tokenizer_settings == before.tokenizer_settings == {"pad_token": "</s>"}
    (tmp_path / "written").mkdir()
    replace(before, name="written").write(tmp_path / "written")
    assert Adapter.read(tmp_path / "written").tokenizer_settings == {"pad_token": "</s>"}


# Words


@pytest.fixture(scope="session")
def words_base(shared):
    """A byte-level base model for words that reads no space before a text, as RoBERTa's."""

    def fill(directory):
        torch.manual_seed(0)
        config = transformers.RobertaConfig(**BERT | {"vocab_size": 270, "type_vocab_size": 1})
        transformers.RobertaModel(config).save_pretrained(directory)
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        ids = {token: number for number, token in enumerate([*special, *alphabet, "Ġb", "ba"])}
        tokenizer = Tokenizer(models.BPE(ids, [("Ġ", "b"), ("b", "a")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
        tokenizer.add_special_tokens(special)
        transformers.RobertaTokenizer(
            vocab=ids, merges=[("Ġ", "b"), ("b", "a")], model_max_length=30
        ).save_pretrained(directory)

    return shared("words-base", fill)


@pytest.fixture(scope="session")
def words_adapter(shared, words_base):
    def fill(directory):
        rows = [{"tokens": ["ba", "be"], "labels": ["x", "y"]}, {"tokens": ["ce"], "labels": ["y"]}]
        data = directory / "data.jsonl"
        data.write_text("\n".join(json.dumps(row) for row in rows * 4))
        options = replace(OPTIONS, task="token-classification")
        train(words_base, data, directory / "out", options=options)

    return shared("words-adapter", fill) / "out"


@pytest.mark.parametrize("stage", ["merge", "slots"])
def test_words_are_read_as_in_training_by_every_stage(stage, words_base, words_adapter, tmp_path):
    assert Adapter.read(words_adapter).tokenizer_settings == {"add_prefix_space": True}
    if stage == "merge":
        merge(words_adapter, tmp_path / "out")
    else:
        task = "token-classification"
        export_onnx([], tmp_path / "out", model=str(words_base), mode="switchable", task=task)
        add_adapter(tmp_path / "out", words_adapter)

    spaced = transformers.AutoTokenizer.from_pretrained(words_base, add_prefix_space=True)
    plain = transformers.AutoTokenizer.from_pretrained(words_base)
    expected = spaced(["ba be"])["input_ids"]
    assert expected != plain(["ba be"])["input_ids"]
    tokens = read_serving_tokenizer(tmp_path / "out")(["ba be"], return_tensors="np")["input_ids"]
    assert np.asarray(tokens).tolist() == expected
    assert spaced([["ba", "be"]], is_split_into_words=True)["input_ids"] == expected
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again(["ba be"])["input_ids"] == expected
    (reply,) = Session(tmp_path / "out")("ba be", adapter="out")
    assert [one["word"] for one in reply.prediction["tokens"]] == ["ba", "be"]


def test_an_artifact_that_reads_words_otherwise_refuses_the_adapter(words_adapter, tmp_path):
    silent = changed(words_adapter, tmp_path / "silent", tokenizer_settings=None)
    export_onnx([silent], tmp_path / "out", mode="switchable")

    with pytest.raises(
        AdapterError, match=r"out: was trained with add_prefix_space True, .* False"
    ):
        add_adapter(tmp_path / "out", words_adapter)
