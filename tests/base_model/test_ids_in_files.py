"""Whether tokens are below the embeddings is told by files only where it is certain."""

import json

import pytest

from propulsion_export.base_model.tokenizer.ids_in_files import all_ids_below

NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": None}


@pytest.fixture
def write(tmp_path):
    """`write(tokens, settings, **files)`: a tokenizer whose vocabulary is a list of tokens."""

    def make(tokens, settings, added=(), kind="BPE"):
        numbered = {token: number for number, token in enumerate(tokens)}
        vocab = numbered if kind == "BPE" else [[token, 0.0] for token in tokens]
        extra = [{"content": token, "id": number} for token, number in added]
        content = {"model": {"type": kind, "vocab": vocab}, "added_tokens": extra}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
        return tmp_path

    return make


@pytest.mark.parametrize("kind", ["BPE", "Unigram"])
def test_a_vocabulary_that_names_its_special_tokens_may_fill_the_embeddings(kind, write):
    directory = write(["<s>", "</s>", "a"], NAMES, kind=kind)

    assert all_ids_below(directory, 3)
    assert not all_ids_below(directory, 2)


def test_without_names_there_must_be_room_for_what_a_class_adds(write):
    directory = write(["a", "b"], {})

    assert not all_ids_below(directory, 2)
    assert all_ids_below(directory, 32)


@pytest.mark.parametrize(
    "settings",
    [
        {"pad_token": "<pad>"},
        {"mask_token": {"content": "<mask>"}},
        {"additional_special_tokens": ["<extra>"]},
        {"extra_special_tokens": {"image_token": "<image>"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_special_token_without_a_number_is_not_certain(settings, write):
    directory = write(["<s>", "</s>"], NAMES | settings)

    assert not all_ids_below(directory, 100)


def test_added_tokens_count(write, tmp_path):
    assert not all_ids_below(write(["<s>", "</s>"], NAMES, added=[("<far>", 9)]), 9)
    assert all_ids_below(tmp_path, 10)
    assert not all_ids_below(tmp_path, 10, ["<pad>"])
    assert all_ids_below(tmp_path, 10, ["<far>"])
    (tmp_path / "added_tokens.json").write_text('{"<farther>": 10}')
    assert not all_ids_below(tmp_path, 10)


def test_without_a_tokenizer_it_is_certain_and_with_a_vocabulary_of_another_kind_not(tmp_path):
    assert all_ids_below(tmp_path, 3)

    (tmp_path / "vocab.txt").write_text("a")

    assert not all_ids_below(tmp_path, 3)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": {"a": "b"}}}'])
def test_a_damaged_file_is_not_certain(text, tmp_path):
    (tmp_path / "tokenizer.json").write_text(text)

    assert not all_ids_below(tmp_path, 100)
