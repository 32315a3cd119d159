"""What transformers builds anew is recorded, and read without it, with the same results."""

import json

import numpy as np
import pytest
import transformers
from tokenizers import pre_tokenizers

from propulsion_export.base_model.tokenizer.reading import encode_texts, read_serving_tokenizer
from propulsion_export.base_model.tokenizer.recorded import (
    RECORD_FILE,
    read_recorded_tokenizer,
    record_tokenizer,
)
from propulsion_export.errors import ArtifactError

TEXTS = ["the cat", "", "  two  spaces", "caf\u00e9 \u2603 \U0001f600", "<s>the</s> <|endoftext|>"]
NAMES = ("input_ids", "attention_mask")


@pytest.fixture(params=["GPT2Tokenizer", "LlamaTokenizer", "Qwen2Tokenizer"])
def made(request, tmp_path):
    """A directory with the files of a tokenizer of that class, and the tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, "<|endoftext|>", "<unk>", "<s>", "</s>", "th", "the", "\u0120the"]
    vocabulary = {word: number for number, word in enumerate(words)}
    kind = getattr(transformers, request.param)
    tokenizer = kind(vocab=vocabulary, merges=[("t", "h"), ("th", "e"), ("\u0120", "the")])
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = 12
    tokenizer.save_pretrained(tmp_path)
    return tmp_path, transformers.AutoTokenizer.from_pretrained(tmp_path)


@pytest.mark.parametrize("limit", [3, 12])
def test_a_recorded_tokenizer_encodes_as_transformers_does(made, limit):
    directory, expected = made
    record_tokenizer(expected, directory)

    found = read_serving_tokenizer(directory)

    assert type(found).__name__ == "FastTokenizer"
    assert found.model_max_length == expected.model_max_length
    for texts in (TEXTS, TEXTS[:1]):
        ours = encode_texts(NAMES, found, texts, limit=limit)
        theirs = encode_texts(NAMES, expected, texts, limit=limit)
        assert all(np.array_equal(ours[name], theirs[name]) for name in NAMES)


@pytest.mark.parametrize("text", TEXTS)
def test_a_recorded_tokenizer_reads_prompts_and_decodes_as_transformers_does(made, text):
    directory, expected = made
    record_tokenizer(expected, directory)
    found = read_recorded_tokenizer(directory)

    tokens = expected(text)["input_ids"]

    assert found(text)["input_ids"] == tokens
    for skip in (True, False):
        ours = found.decode(tokens, skip_special_tokens=skip)
        assert ours == expected.decode(tokens, skip_special_tokens=skip)


def test_the_files_alone_would_not_have_done(made):
    directory, _ = made

    assert read_recorded_tokenizer(directory) is None
    assert type(read_serving_tokenizer(directory)).__name__ != "FastTokenizer"


def test_files_that_suffice_are_not_recorded(tiny_checkpoint, tmp_path):
    import shutil

    shutil.copytree(tiny_checkpoint(), tmp_path / "copy")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")

    record_tokenizer(tokenizer, tmp_path / "copy")
    record_tokenizer(None, tmp_path / "copy")

    assert not (tmp_path / "copy" / RECORD_FILE).exists()


@pytest.mark.parametrize("content", ["", "[]", '{"backend": {}}'])
def test_a_damaged_record_is_refused(made, content):
    directory, _ = made
    (directory / RECORD_FILE).write_text(content)

    with pytest.raises(ArtifactError, match=RECORD_FILE):
        read_recorded_tokenizer(directory)


def test_a_record_of_another_tokenizer_changes_the_tokens(made):
    directory, expected = made
    record_tokenizer(expected, directory)
    content = json.loads((directory / RECORD_FILE).read_text())
    content["backend"]["model"]["merges"] = []
    (directory / RECORD_FILE).write_text(json.dumps(content))

    found = read_serving_tokenizer(directory)

    assert found("the cat")["input_ids"] != expected("the cat")["input_ids"]
