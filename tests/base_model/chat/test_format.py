"""What ends an answer, and which marks no message may hold, found from the template alone."""

import pytest

from chat_models import FAMILIES, byte_tokenizer
from propulsion_export.base_model.chat.format import ChatFormat

ENDS = {
    "chatml": {"<|im_end|>"},
    "chatml-other-eos": {"<|im_end|>", "<|endoftext|>"},
    "chatml-no-prompt": {"<|im_end|>"},
    "chatml-marked": {"<|im_end|>"},
    "llama3": {"<|eot_id|>", "<|end_of_text|>"},
    "gemma": {"<end_of_turn>", "<eos>"},
    "qwen3": {"<|im_end|>"},
    "qwen3-silent": {"<|im_end|>"},
    "r1": {"<|eos|>"},
    "mistral": {"</s>"},
    "glm": {"<|user|>", "<|observation|>", "<|endoftext|>"},
    "glm-undeclared": {"<|user|>", "<|endoftext|>"},
    "last-eos": {"</s>"},
    "phi3": {"<|end|>", "<|endoftext|>"},
    "vicuna": {"</s>"},
    "whole": {"<|im_end|>"},
}


def format_of(name):
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(family)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    return ChatFormat.of(family.template, tokenizer, ends)


@pytest.mark.parametrize("name", FAMILIES)
def test_answer_ends_at_the_mark_of_the_template(name):
    assert format_of(name).ends == ENDS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_marks_that_divide_turns_are_known_and_those_of_thinking_are_not_among_them(name):
    found = format_of(name).structure

    assert ENDS[name] <= found
    assert not found & {"<think>", "</think>"}


def test_thinking_that_a_header_opens_may_stand_in_an_answer():
    tokenizer = byte_tokenizer(FAMILIES["r1"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    chat = ChatFormat.of(FAMILIES["r1"].template, tokenizer, [])

    assert "<think>" in chat.marks
    assert "<think>" not in chat.structure
    assert "<|Assistant|>" in chat.structure


def test_a_mark_that_begins_like_the_headers_is_no_part_of_the_header():
    assert format_of("phi3").header == "<|assistant|>\n"


@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"whole"}))
def test_prompt_is_what_transformers_renders(name):
    family = FAMILIES[name]
    messages = [{"role": "user", "content": "hi"}]

    prompt = format_of(name).prompt(messages)

    theirs = byte_tokenizer(family).apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    # This one has a header before answers, which is not learnt, but none in its prompts.
    header = "<|im_start|>assistant\n" if name == "chatml-no-prompt" else ""
    assert prompt == theirs + header
