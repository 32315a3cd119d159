"""A tiny random BERT with a tokenizer, and labelled texts that it can learn; passages for decoders.

The words of passages are in the vocabulary of `tiny_checkpoint`.
"""

import json
import random

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from propulsion_export.training import TrainOptions

WORDS = {
    "food": ["bread", "soup", "apple", "rice"],
    "animal": ["cat", "horse", "bird", "wolf"],
    "place": ["town", "river", "hill", "lake"],
}
FILLERS = ["a", "the", "old", "some", "near", "with", "good", "small"]


@pytest.fixture(scope="session", name="tiny_base")
def make_tiny_base(tmp_path_factory):
    """A BERT without dropout, so that one process and two compute the same."""
    return tiny_bert(tmp_path_factory.mktemp("base"))


def tiny_bert(directory, *, pooler=True, **config):
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
    model = transformers.BertModel(
        transformers.BertConfig(**(sizes | config)), add_pooling_layer=pooler
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session", name="save_base")
def make_save_base():
    """A function: write a tiny BERT, with other settings, to a directory."""
    return tiny_bert


@pytest.fixture(scope="session", name="write_jsonl")
def make_write_jsonl():
    """A function: write rows to a file."""
    return jsonl


@pytest.fixture(name="tagged_rows")
def make_tagged_rows():
    """Rows of words, each tagged as noun or filler; a noun has two sub-words."""
    nouns = {word for words in WORDS.values() for word in words}
    rows = []
    for row in text_rows(96, 1):
        words = row["text"].split()
        rows.append(
            {
                "tokens": [f"{word}s" if word in nouns else word for word in words],
                "labels": ["noun" if word in nouns else "filler" for word in words],
            }
        )
    return rows


def tiny_tokenizer():
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = [word for group in WORDS.values() for word in group]
    vocabulary = [*special, *words, *FILLERS, "##s", "##y"]
    ids = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=32,
    )


def text_rows(count, seed):
    """Every class equally often; the class is that of the one word which is no filler."""
    chooser = random.Random(seed)
    labels = list(WORDS) * (count // len(WORDS))
    rows = []
    for label in labels:
        words = [*chooser.sample(FILLERS, 3), chooser.choice(WORDS[label])]
        chooser.shuffle(words)
        rows.append({"text": " ".join(words), "label": label})
    chooser.shuffle(rows)
    return rows


def jsonl(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


@pytest.fixture(scope="session", name="texts")
def make_texts(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", text_rows(96, 1))


@pytest.fixture(scope="session", name="held_out_texts")
def make_held_out_texts(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", text_rows(30, 2))


@pytest.fixture(name="options")
def make_options(held_out_texts):
    """Fast enough for a test, and enough to learn something."""
    return TrainOptions(
        validation=held_out_texts, epochs=2, batch_size=16, learning_rate=5e-3, head_only=False
    )


ANSWERS = {"ba": "tol", "ce": "ran ko", "di": "si fon me"}


def passage_rows(count, seed):
    """Prompts of unequal length; the response follows from the prompt's last word."""
    chooser = random.Random(seed)
    rows = []
    for number in range(count):
        key = list(ANSWERS)[number % len(ANSWERS)]
        before = chooser.choices(["ga", "he", "li", "mel"], k=chooser.randint(1, 6))
        rows.append({"prompt": " ".join([*before, key]), "response": ANSWERS[key]})
    chooser.shuffle(rows)
    return rows


@pytest.fixture(scope="session", name="make_passages")
def make_make_passages():
    """A function: so many rows with prompt and response, drawn with a seed."""
    return passage_rows


@pytest.fixture(scope="session", name="passages")
def make_passages(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "train.jsonl", passage_rows(48, 1))


@pytest.fixture(scope="session", name="held_out_passages")
def make_held_out_passages(tmp_path_factory):
    return jsonl(tmp_path_factory.mktemp("data") / "held-out.jsonl", passage_rows(18, 2))


@pytest.fixture(name="generation")
def make_generation(held_out_passages):
    """Options for decoders: fast enough for a test, and enough to learn something."""
    return TrainOptions(
        task="text-generation",
        validation=held_out_passages,
        epochs=2,
        batch_size=16,
        learning_rate=5e-3,
        max_length=32,
    )
