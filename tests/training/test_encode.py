"""Texts become token ids, and each word's class sits on its first token."""

import transformers

from propulsion_export.training.data import Example
from propulsion_export.training.encode import IGNORED, encode


def tokens_of(tokenizer, row):
    return tokenizer.convert_ids_to_tokens(row["input_ids"])


def test_only_the_first_token_of_a_word_has_a_class(tiny_base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    examples = [Example(["cats", "the", "oldy"], ["noun", "other", "noun"])]

    (row,) = encode(examples, ["noun", "other"], tokenizer, 32)

    assert tokens_of(tokenizer, row) == ["[CLS]", "cat", "##s", "the", "old", "##y", "[SEP]"]
    assert row["labels"] == [IGNORED, 0, IGNORED, 1, 0, IGNORED, IGNORED]


def test_two_words_that_are_alike_each_have_a_class(tiny_base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    examples = [Example(["cat", "cat"], ["b", "a"])]

    (row,) = encode(examples, ["a", "b"], tokenizer, 32)

    assert row["labels"] == [IGNORED, 1, 0, IGNORED]


def test_a_long_text_is_cut_with_its_labels(tiny_base):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_base)
    words = encode([Example(["cats"] * 9, ["a"] * 9)], ["a"], tokenizer, 5)
    text = encode([Example("cat " * 9, "b")], ["a", "b"], tokenizer, 5)

    assert tokens_of(tokenizer, words[0]) == ["[CLS]", "cat", "##s", "cat", "[SEP]"]
    assert words[0]["labels"] == [IGNORED, 0, IGNORED, 0, IGNORED]
    assert len(text[0]["input_ids"]) == 5
    assert text[0]["labels"] == 1
