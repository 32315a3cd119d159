"""What is learnt is the response with its end, and nothing that stands before it."""

import pytest
import transformers
from tokenizers import processors

from propulsion_export.training.encode import IGNORED
from propulsion_export.training.passages import Passage
from propulsion_export.training.sequences import encode_pairs, encode_passages

END = 3  # [SEP], which ends a text; [CLS], 2, begins it


@pytest.fixture(name="tokenizer")
def make_tokenizer(tiny_checkpoint):
    return transformers.AutoTokenizer.from_pretrained(tiny_checkpoint("llama"))


def ids_of(tokenizer, words):
    return tokenizer(words, add_special_tokens=False)["input_ids"]


def test_the_prompt_is_not_learnt_and_the_end_is(tokenizer):
    made = encode_passages([Passage("ba ce", "di ko")], tokenizer, 32)

    response = ids_of(tokenizer, "di ko")
    (row,) = made.rows
    assert row["input_ids"] == [2, *ids_of(tokenizer, "ba ce"), *response, END]
    assert row["labels"] == [IGNORED, IGNORED, IGNORED, *response, END]
    assert row["attention_mask"] == [1] * 6
    assert (made.passages, made.cut, made.left_out, made.learnt) == (1, 0, 0, 3)


def test_all_of_a_text_is_learnt_but_its_first_token(tokenizer):
    (row,) = encode_passages([Passage(None, "ba ce")], tokenizer, 32).rows

    assert row["input_ids"] == [2, *ids_of(tokenizer, "ba ce"), END]
    assert row["labels"] == [IGNORED, *ids_of(tokenizer, "ba ce"), END]


def test_a_tokenizer_that_ends_every_text_ends_no_prompt_and_no_response_twice(tokenizer):
    plain = encode_passages([Passage("ba", "ce"), Passage("di", "ko")], tokenizer, 32).rows
    text = encode_passages([Passage(None, "ce")], tokenizer, 32).rows
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", END)]
    )

    assert tokenizer("ba")["input_ids"][-1] == END
    assert encode_passages([Passage("ba", "ce"), Passage("di", "ko")], tokenizer, 32).rows == plain
    assert encode_passages([Passage(None, "ce")], tokenizer, 32).rows == text


def test_a_long_response_is_cut_with_its_end_and_counted(tokenizer):
    made = encode_passages([Passage("ba", "ce " * 9), Passage("ba", "ce")], tokenizer, 5)

    assert made.cut == 1
    assert [len(row["input_ids"]) for row in made.rows] == [5, 4]
    assert END not in made.rows[0]["labels"]
    assert made.rows[1]["labels"][-1] == END


@pytest.mark.parametrize(("words", "left_out"), [(3, 0), (4, 1), (9, 1)])
def test_a_prompt_that_leaves_no_room_is_left_out_and_counted(words, left_out, tokenizer):
    made = encode_passages([Passage("ba " * words, "ce")], tokenizer, 5)

    assert (made.left_out, len(made.rows)) == (left_out, 1 - left_out)


def test_a_text_that_is_split_loses_no_token(tokenizer):
    words = "ba ce di ko la me pi"  # with [CLS] and [SEP]: 4 + 4 + 1 tokens
    made = encode_passages([Passage(None, words)], tokenizer, 4, split=True)

    whole = [2, *ids_of(tokenizer, words), END]
    assert [row["input_ids"] for row in made.rows] == [whole[:4], whole[4:8]]
    assert [row["labels"][0] for row in made.rows] == [IGNORED, IGNORED]
    assert made.cut == 0


def test_a_prompt_is_cut_where_texts_are_split(tokenizer):
    made = encode_passages([Passage("ba ce", "di " * 9)], tokenizer, 5, split=True)

    assert ([len(row["input_ids"]) for row in made.rows], made.cut) == ([5], 1)


def test_padding_with_the_end_token_leaves_the_real_end_to_be_learnt(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    rows = encode_passages([Passage("ba", "ce"), Passage("ba", "ce di ko")], tokenizer, 32).rows

    batch = transformers.DataCollatorForSeq2Seq(tokenizer)(rows)

    assert batch["input_ids"][0].tolist()[3:] == [END, END, END]
    assert batch["labels"][0].tolist()[3:] == [END, IGNORED, IGNORED]
    assert batch["attention_mask"][0].tolist()[3:] == [1, 0, 0]


def test_a_pair_is_read_by_the_encoder_and_learnt_by_the_decoder(tokenizer):
    made = encode_pairs([Passage("ba ce", "di ko")], tokenizer, 32)

    (row,) = made.rows
    assert row["input_ids"] == [2, *ids_of(tokenizer, "ba ce")]
    assert row["labels"] == [2, *ids_of(tokenizer, "di ko"), END]
    assert (made.passages, made.cut, made.left_out) == (1, 0, 0)


@pytest.mark.parametrize(
    ("prompt", "response", "cut"), [(8, 1, 1), (1, 8, 1), (8, 8, 1), (1, 1, 0)]
)
def test_a_pair_is_cut_on_either_side_and_counted_once(prompt, response, cut, tokenizer):
    made = encode_pairs([Passage("ba " * prompt, "ce " * response)], tokenizer, 5)

    (row,) = made.rows
    assert made.cut == cut
    assert len(row["input_ids"]) == min(5, prompt + 1)
    assert len(row["labels"]) == min(5, response + 2)
