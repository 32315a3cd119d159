"""Tokenizers of GGUF files: as transformers builds them, and as the file says where it does not."""

import pytest
from gguf_files import VOCABULARY, tiny_language_model, write_gguf
from transformers import AutoTokenizer

from propulsion_export.base_model.tokenizer.fast import read_fast_tokenizer
from propulsion_export.base_model.tokenizer.reading import copy_tokenizer, read_tokenizer
from propulsion_export.base_model.tokenizer.recorded import (
    read_recorded_tokenizer,
    record_tokenizer,
)
from propulsion_export.errors import BaseModelError

TEXTS = ["the cat", "  the   cats, it's 1234", "the\n\nthe</s>the", "naïve Straße", "t" * 9]
WORDS = ["▁the", "▁cat", "the", "cat", "▁t", "he", "s", "1", "2", "3", "4", "▁", "c", "a", "t", "h"]


def sentencepiece(**more):
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *WORDS]
    tokens += ["e", *(f"[unused{index}]" for index in range(VOCABULARY - len(tokens) - 1))]
    kinds = [3, 3, 3, 2, *[6] * 256, *[1] * (len(WORDS) + 1)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(VOCABULARY)],
        "tokenizer.ggml.token_type": kinds + [5] * (VOCABULARY - len(kinds)),
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.unknown_token_id": 3,
        **more,
    }


SAME = {
    "llama-as-gpt2": ("llama", {"tokenizer.ggml.pre": "gpt-2"}),
    "llama-3": ("llama", {"tokenizer.ggml.pre": "llama-bpe"}),
    "llama-3-begin": (
        "llama",
        {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.add_bos_token": True},
    ),
    "llama-begin-and-end": (
        "llama",
        {
            "tokenizer.ggml.pre": "gpt-2",
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.ggml.add_eos_token": True,
        },
    ),
    "llama-2": ("llama", sentencepiece()),
    "llama-2-no-begin": ("llama", sentencepiece(**{"tokenizer.ggml.add_bos_token": False})),
    "qwen2": ("qwen2", {"tokenizer.ggml.pre": "qwen2"}),
    "qwen3": ("qwen3", {"tokenizer.ggml.pre": "qwen2"}),
    "gemma2": ("gemma2", sentencepiece()),
    "gemma3": ("gemma3_text", sentencepiece()),
    "phi3": ("phi3", sentencepiece()),
    "starcoder2-gpt2": ("starcoder2", {"tokenizer.ggml.pre": "gpt-2"}),
    "gpt2": ("gpt2", {"tokenizer.ggml.pre": "gpt-2"}),
}


def written(kind, keys, directory):
    return write_gguf(directory / "model.gguf", tiny_language_model(kind), keys=keys)


@pytest.mark.parametrize("name", SAME)
def test_tokens_are_those_of_transformers_own_reader(name, tmp_path):
    file = written(*SAME[name], tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file.name)

    ours = read_tokenizer(str(file))

    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    assert len(ours) <= VOCABULARY + (name == "qwen2")  # its class adds <|endoftext|>


@pytest.mark.parametrize("name", SAME)
def test_serving_reads_the_same_tokens(name, tmp_path):
    file = written(*SAME[name], tmp_path)
    served = tmp_path / "served"
    served.mkdir()
    ours = read_tokenizer(str(file))
    copy_tokenizer(str(file), served)
    record_tokenizer(ours, served)

    fast = read_recorded_tokenizer(served) or read_fast_tokenizer(served)

    assert fast is not None
    assert [fast(text)["input_ids"] for text in TEXTS] == [ours.encode(text) for text in TEXTS]


def test_digits_are_cut_one_by_one_where_the_file_says_so(tmp_path):
    merges = {"tokenizer.ggml.merges": ["t h", "th e", "1 2"]}
    digits = {"tokenizer.ggml.pre": "smollm"} | merges
    tokens = written("llama", {}, tmp_path)
    tokenizer = read_tokenizer(str(tokens))
    place = tokenizer.convert_tokens_to_ids(["1", "2"])

    (tmp_path / "other").mkdir()
    pair = ["[unused0]"]
    vocabulary = [*tokenizer.convert_ids_to_tokens(range(VOCABULARY))]
    vocabulary[vocabulary.index(pair[0])] = "12"
    own = {"tokenizer.ggml.tokens": vocabulary}
    one_by_one = read_tokenizer(str(written("llama", digits | own, tmp_path / "other")))
    (tmp_path / "third").mkdir()
    joined = {"tokenizer.ggml.pre": "gpt-2"} | merges | own
    together = read_tokenizer(str(written("llama", joined, tmp_path / "third")))

    assert one_by_one.encode("12") == place
    assert together.encode("12") == [vocabulary.index("12")]


@pytest.mark.parametrize("cuts", [None, "default"], ids=["missing", "default"])
def test_a_file_that_does_not_say_how_texts_are_cut_is_refused(cuts, tmp_path):
    file = written("llama", {"tokenizer.ggml.pre": cuts}, tmp_path)

    with pytest.raises(BaseModelError, match=r"cuts texts as 'default' does, expected one of"):
        read_tokenizer(str(file))


def test_an_unknown_kind_of_tokenizer_is_refused(tmp_path):
    file = written("llama", {"tokenizer.ggml.model": "rwkv"}, tmp_path)

    with pytest.raises(BaseModelError, match=r"its tokenizer cannot be read \(Cannot build"):
        read_tokenizer(str(file))


def test_a_file_without_a_tokenizer_has_none(tmp_path):
    file = write_gguf(tmp_path / "model.gguf", tiny_language_model("llama"), tokenizer=False)

    assert read_tokenizer(str(file)) is None
