"""Tiny decoders that chat: a Llama over bytes, with the template of a family."""

import json

import pytest
from tiny_models import make_model

from chat_models import FAMILIES, byte_tokenizer
from propulsion_export.training import TrainOptions


@pytest.fixture(scope="session", name="chat_base")
def make_chat_base(tmp_path_factory):
    """A function: a checkpoint of a tiny Llama with a family's tokenizer and template."""
    made = {}

    def make(family="chatml", *, kind="llama"):
        if (family, kind) not in made:
            directory = tmp_path_factory.mktemp(f"{kind}-{family}")
            tokenizer = byte_tokenizer(FAMILIES[family])
            ends = [tokenizer.convert_tokens_to_ids(end) for end in FAMILIES[family].ends]
            config = {"bos_token_id": None, "eos_token_id": ends or tokenizer.eos_token_id}
            config |= {"pad_token_id": None, "vocab_size": len(tokenizer)}
            make_model(kind, **config).save_pretrained(directory)
            tokenizer.save_pretrained(directory)
            made[family, kind] = directory
        return made[family, kind]

    return make


@pytest.fixture(scope="session", name="write_rows")
def make_write_rows():
    """A function: write rows as JSONL."""

    def write(file, rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture(name="chat_options")
def make_chat_options():
    """Fast enough for a test, and enough to learn something."""
    return TrainOptions(
        task="text-generation", epochs=2, batch_size=4, learning_rate=5e-3, max_length=160
    )
