"""Threads of one session could get another's text: fast tokenizers are not safe in every call.

Encoding sets how the tokenizer cuts and pads, and decoding reads the same object meanwhile.
"""

import threading
from dataclasses import replace

import pytest

from propulsion_export.base_model.tokenizer.fast import FastTokenizer
from propulsion_export.pipeline.merge import merge
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session

pytestmark = pytest.mark.usefixtures("many_turns")

THREADS, REQUESTS = 32, 2
CORPUS = (
    "Grüße aus Köln",
    "日本 and some words",
    "a large wild cat with stripes",
    "to run to run to run again",
    "naïve café",
    "short",
    "some more words that stand behind the others, for a longer row than these",
    "👋🏽 hello",
)


def _byte_level():
    """A tokenizer as GPT-2's, which cuts characters into several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<mask>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _unigram():
    """A tokenizer as T5's, which marks the beginnings of words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<mask>", "<s>", "</s>", "<unk>"],
        unk_token="<unk>",
    )
    tokenizer.train_from_iterator(CORPUS * 4, trainer)
    return tokenizer


KINDS = {
    "bert": ("fill-mask", _byte_level),
    "t5": ("text2text-generation", _unigram),
    "gpt2": ("text-generation", _byte_level),
}


@pytest.fixture(scope="module", params=KINDS)
def served(request, tiny_model, positive_adapter, write_adapter, tmp_path_factory):
    """A merged checkpoint with a fast tokenizer, and its texts."""
    from transformers import PreTrainedTokenizerFast

    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

    task, make_tokenizer = KINDS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    model = tiny_model(request.param, task, vocab_size=320)
    model.save_pretrained(root / "base")
    PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer(), pad_token="<pad>", mask_token="<mask>",
        bos_token="<s>", eos_token="</s>", model_max_length=40,
    ).save_pretrained(root / "base")  # fmt: skip
    adapter = positive_adapter(model, 1, "one", task=task)
    adapter = replace(adapter, base=str(root / "base"), fingerprint=fingerprint_of_model(model))
    merge(write_adapter(adapter, root / "one"), root / "merged", task=task)
    ending = " <mask>" if task == "fill-mask" else ""
    return root / "merged", [text + ending for text in CORPUS], task != "fill-mask"


def test_each_of_32_threads_gets_the_answers_of_its_texts_alone(served):
    directory, texts, generates = served
    options = {"settings": Settings(new_tokens=10)} if generates else {}
    quiet = Session(directory)
    expected = {text: quiet(text, **options)[0].prediction for text in texts}
    session, found, failed = Session(directory), [], []
    ready = threading.Barrier(THREADS)

    def ask(number):
        ready.wait()
        try:
            for turn in range(REQUESTS):
                own = [texts[(number + turn + each) % len(texts)] for each in range(1 + number % 3)]
                replies = session(own, **options)
                found.extend(zip(own, (reply.prediction for reply in replies), strict=True))
        except Exception as error:  # told below
            failed.append(error)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not failed
    assert len(found) == sum(REQUESTS * (1 + number % 3) for number in range(THREADS))
    assert [text for text, prediction in found if prediction != expected[text]] == []
    assert len({str(prediction) for prediction in expected.values()}) > 1


@pytest.mark.parametrize(
    "options",
    [{}, {"truncation": True, "max_length": 5}, {"padding": True}],
    ids=["plain", "cut", "padded"],
)
def test_a_call_like_the_one_before_changes_nothing_that_others_read(options):
    # Some versions of tokenizers raise "Already borrowed" if another thread decodes meanwhile.
    counting = _Counting(_unigram())
    tokenizer = FastTokenizer(counting, {"pad_token": "<pad>"})
    tokenizer(CORPUS[0], **options)
    counting.changes = 0

    again = tokenizer(CORPUS[1], **options)

    assert counting.changes == 0
    assert again["input_ids"]
    # The twin: other settings are set.
    tokenizer(list(CORPUS), truncation=True, max_length=3, padding=True)
    assert counting.changes


class _Counting:
    """A tokenizer that counts the calls by which its settings change."""

    def __init__(self, tokenizer):
        self.tokenizer, self.changes = tokenizer, 0

    def __getattr__(self, name):
        if name.startswith(("no_", "enable_")):
            self.changes += 1
        return getattr(self.tokenizer, name)
