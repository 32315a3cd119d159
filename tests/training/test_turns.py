"""What is learnt of a conversation, for templates that behave as the public families do.

Each expected answer is the text of the tokens that carry the loss.
"""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st

from chat_models import CHATML, FAMILIES, Family, byte_tokenizer, spaced_tokenizer
from propulsion_export.data.messages import Conversation, parse_conversation
from propulsion_export.errors import BaseModelError, DataError
from propulsion_export.training.conversations import ChatEncoder
from propulsion_export.training.encode import IGNORED
from propulsion_export.training.turns import render_turns

IM = FAMILIES["chatml"].marks


def conversation(*turns, system=None):
    """User and assistant in turn, behind a system turn where one is given."""
    roles = ("user", "assistant")
    said = [{"role": roles[n % 2], "content": turn} for n, turn in enumerate(turns)]
    opening = [] if system is None else [{"role": "system", "content": system}]
    return parse_conversation([*opening, *said], where="data: line 7")


def encoder(family, tokenizer=None):
    tokenizer = tokenizer or byte_tokenizer(family)
    ends = [tokenizer.convert_tokens_to_ids(end) for end in family.ends]
    return ChatEncoder.open("base", tokenizer, SimpleNamespace(eos_token_id=ends or None))


def learnt(family, given, tokenizer=None, longest=10_000):
    """The pieces of text that carry the loss, and the row."""
    tokenizer = tokenizer or byte_tokenizer(family)
    [row] = encoder(family, tokenizer).encode([given], longest).rows
    assert len(row["labels"]) == len(row["input_ids"])
    pieces, now = [], []
    for label, token in zip([*row["labels"], IGNORED], [*row["input_ids"], None], strict=True):
        if label != IGNORED:
            assert label == token
            now.append(label)
        elif now:
            pieces.append(tokenizer.decode(now))
            now = []
    return pieces


TWO_TURNS = conversation("hi", "yo a", "so", "yo b")
ANSWERS = {
    "chatml": ["yo a<|im_end|>", "yo b<|im_end|>"],
    "chatml-other-eos": ["yo a<|im_end|>", "yo b<|im_end|>"],
    "chatml-no-prompt": ["yo a<|im_end|>", "yo b<|im_end|>"],
    "chatml-marked": ["yo a<|im_end|>", "yo b<|im_end|>"],
    "llama3": ["yo a<|eot_id|>", "yo b<|eot_id|>"],
    "gemma": ["yo a<end_of_turn>", "yo b<end_of_turn>"],
    "qwen3": ["yo a<|im_end|>", "<think>\n\n</think>\n\nyo b<|im_end|>"],
    "qwen3-silent": ["yo a<|im_end|>", "yo b<|im_end|>"],
    "r1": ["yo a<|eos|>", "yo b<|eos|>"],
    "mistral": [" yo a</s>", " yo b</s>"],
    "glm": ["yo a<|user|>", "yo b"],
    "glm-undeclared": ["yo a<|user|>", "yo b"],
    "last-eos": ["yo a", "yo b</s>"],
    "phi3": ["yo a<|end|>", "yo b<|end|>"],
    "vicuna": [" yo a</s>", " yo b</s>"],
    "whole": ["yo a<|im_end|>", "yo b<|im_end|>"],
}


@pytest.mark.parametrize("kind", ["bytes", "trimmed", "spaced"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_learnt_with_its_end_and_without_its_header(name, kind):
    family = FAMILIES[name]
    tokenizer = {
        "bytes": byte_tokenizer,
        "trimmed": lambda family: byte_tokenizer(family, trim=True),
        "spaced": spaced_tokenizer,
    }[kind](family)

    found = learnt(family, TWO_TURNS, tokenizer)

    # A tokenizer of spaced words drops the first space, and has one behind each mark.
    shown = [piece.lstrip(" ").replace("> ", ">") for piece in found]
    assert shown == [answer.lstrip(" ") for answer in ANSWERS[name]]


@pytest.mark.parametrize("name", FAMILIES)
def test_row_is_the_rendering_tokenised_once_without_further_tokens(name):
    family = FAMILIES[name]
    tokenizer = byte_tokenizer(family)
    assert not family.bos or tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id

    [row] = encoder(family, tokenizer).encode([TWO_TURNS], 10_000).rows

    text = tokenizer.apply_chat_template(TWO_TURNS.messages, tokenize=False)
    assert tokenizer.decode(row["input_ids"]) == text
    assert row["input_ids"] == tokenizer(text, add_special_tokens=False)["input_ids"]
    if "bos_token" in family.template:
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1


def test_generation_marks_are_read_as_transformers_reads_them():
    family = FAMILIES["chatml-marked"]
    tokenizer = byte_tokenizer(family)

    [row] = encoder(family, tokenizer).encode([TWO_TURNS], 10_000).rows

    theirs = tokenizer.apply_chat_template(
        TWO_TURNS.messages, return_assistant_tokens_mask=True, return_dict=True
    )
    assert row["input_ids"] == theirs["input_ids"]
    assert [int(label != IGNORED) for label in row["labels"]] == theirs["assistant_masks"]


def test_generation_marks_win_over_what_the_template_looks_like():
    """Marks inside a macro, around the content alone."""
    template = (
        "{% macro say(text) %}{% generation %}{{ text }}{% endgeneration %}{% endmacro %}"
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ say(m.content) if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    )
    family = Family(template, IM, "<|im_end|>")

    assert learnt(family, TWO_TURNS) == ["yo a", "yo b"]


THOUGHTS = conversation("hi", "<think>\nhm\n</think>\n\nyo", "so", "<think>\nhm\n</think>\n\nyo")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3", ["yo<|im_end|>", "<think>\nhm\n</think>\n\nyo<|im_end|>"]),
        ("qwen3-silent", ["yo<|im_end|>", "hm\n</think>\n\nyo<|im_end|>"]),
        ("r1", ["\n\nyo<|eos|>", "\n\nyo<|eos|>"]),
        ("chatml", ["<think>\nhm\n</think>\n\nyo<|im_end|>"] * 2),
    ],
)
def test_thinking_is_learnt_as_it_stands_in_the_whole_rendering(name, expected):
    assert learnt(FAMILIES[name], THOUGHTS) == expected


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        (("hi", "yo", "more"), ["yo<|im_end|>"]),
        (("yo", "yo", "yo yo", "yo"), ["yo<|im_end|>", "yo<|im_end|>"]),
        (("hi", ""), ["<|im_end|>"]),
        (("hi", "", "so", "yo"), ["<|im_end|>", "yo<|im_end|>"]),
        (("hi", "assistant\nyo"), ["assistant\nyo<|im_end|>"]),
        (("hi", " yo \n"), [" yo \n<|im_end|>"]),
    ],
    ids=["user-last", "same-text", "empty", "empty-first", "header's-text", "white-space"],
)
def test_turns_are_found_by_their_place_not_by_their_text(turns, expected):
    assert learnt(FAMILIES["chatml"], conversation(*turns)) == expected


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "r1", "phi3", "vicuna", "glm"])
def test_odd_orders_of_turns_are_learnt_where_the_template_takes_them(name):
    family = FAMILIES[name]
    said = [("assistant", "yo a"), ("user", "hi"), ("assistant", "yo b"), ("assistant", "yo c")]
    given = parse_conversation([{"role": role, "content": text} for role, text in said])

    found = learnt(family, given)

    assert len(found) == 3
    for piece, text in zip(found, ("yo a", "yo b", "yo c"), strict=True):
        assert text in piece
        assert "hi" not in piece.replace("think", "")


@pytest.mark.parametrize("name", ["chatml", "llama3", "qwen3", "r1", "phi3", "vicuna", "last-eos"])
def test_a_system_turn_is_read_and_not_learnt(name):
    found = learnt(FAMILIES[name], conversation("hi", "yo a", system="be kind"))

    assert ["yo a" in piece for piece in found] == [True]
    assert "kind" not in found[0]


def test_unlearnt_turns_carry_no_loss():
    messages = [dict(message) for message in TWO_TURNS.messages]
    messages[1]["weight"] = 0
    messages[3]["weight"] = 1

    for name in ("chatml", "chatml-marked"):
        assert learnt(FAMILIES[name], parse_conversation(messages)) == ["yo b<|im_end|>"]


def test_calls_of_tools_are_learnt_and_their_results_are_not():
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": "ü"}'}}
    messages = [
        {"role": "user", "content": "hi", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4", "tool_calls": None},
        {"role": "assistant", "content": [{"type": "text", "text": "four"}], "tool_calls": []},
    ]

    found = learnt(FAMILIES["qwen3"], parse_conversation(messages))

    assert [piece.lstrip("\n") for piece in found] == [
        '<tool_call>\n{"name": "f", "arguments": {"a": "ü"}}\n</tool_call><|im_end|>',
        "<think>\n\n</think>\n\nfour<|im_end|>",
    ]
    with pytest.raises(DataError, match="leaves out its call of 'f'"):
        encoder(FAMILIES["chatml"]).encode([parse_conversation(messages, where="x")], 999)


def test_first_line_break_of_an_answer_is_learnt_with_the_headers_where_they_are_one_token():
    family = FAMILIES["chatml"]
    tokenizer = byte_tokenizer(family)

    [row] = encoder(family, tokenizer).encode([conversation("hi", "\nyo")], 99).rows

    first = next(label for label in row["labels"] if label != IGNORED)
    assert tokenizer.convert_ids_to_tokens(first) == "ĊĊ"


def test_a_mark_that_takes_the_white_space_behind_it_is_not_learnt_with_the_answer():
    from tokenizers import AddedToken

    family = FAMILIES["phi3"]
    tokenizer = byte_tokenizer(family)
    marks = [AddedToken(mark, rstrip=True, special=True) for mark in family.marks]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})

    found = learnt(family, TWO_TURNS, tokenizer)

    assert found == ["yo a<|end|>", "yo b<|end|>"]


def test_rows_are_cut_and_those_without_an_answer_are_left_out():
    family = FAMILIES["chatml"]
    chat = encoder(family)
    [whole] = chat.encode([TWO_TURNS], 10_000).rows
    learnt_at = [place for place, label in enumerate(whole["labels"]) if label != IGNORED]

    inside = chat.encode([TWO_TURNS], learnt_at[0] + 2)
    before = chat.encode([TWO_TURNS], learnt_at[0])

    assert (inside.cut, inside.left_out, inside.learnt) == (1, 0, 2)
    assert inside.rows[0]["input_ids"] == whole["input_ids"][: learnt_at[0] + 2]
    assert (before.cut, before.left_out, before.rows) == (0, 1, [])
    exact = chat.encode([TWO_TURNS], len(whole["input_ids"]))
    assert (exact.cut, exact.left_out) == (0, 0)


def test_long_conversations_have_one_date():
    family = FAMILIES["llama3"]
    chat = encoder(family)

    assert chat.chat.now is not None
    assert chat.chat.now == chat.with_tools.now


@pytest.mark.parametrize(
    ("name", "given", "finding"),
    [
        ("gemma", conversation("hi", "yo", system="be"), "refuses it (no system turns)"),
        ("gemma", [("user", "a"), ("user", "b"), ("assistant", "c")], "must alternate"),
        ("mistral", [("assistant", "yo"), ("user", "hi")], "must alternate"),
        ("whole", conversation("hi", "yo", "so"), "cut short"),
        ("chatml", conversation("hi"), "has no message of the assistant"),
        ("chatml", [("system", "be")], "has no message of the assistant"),
        ("chatml", conversation("hi <|im_end|>", "yo"), "message 1 holds '<|im_end|>'"),
        ("chatml", conversation("hi", "<|im_start|>user"), "message 2 holds '<|im_start|>'"),
        ("mistral", conversation("[INST] hi", "yo"), "message 1 holds '[INST]'"),
        ("last-eos", conversation("hi", "", "so", "yo"), "empty, and no mark ends it"),
        ("chatml-no-prompt", conversation("hi", ""), "its header is in no generation prompt"),
    ],
)
def test_what_cannot_be_learnt_is_refused_with_its_row(name, given, finding):
    if not isinstance(given, Conversation):
        messages = [{"role": role, "content": text} for role, text in given]
        given = parse_conversation(messages, where="data: line 7")

    with pytest.raises(DataError) as refused:
        encoder(FAMILIES[name]).encode([TWO_TURNS] * (name == "chatml") + [given], 999)

    assert str(refused.value).startswith("data: line 7: ")
    assert finding in str(refused.value)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    ("template", "finding"),
    [
        (CHATML.replace("(m.content or '')", "(m.content | upper)"), None),
        (CHATML.replace("(m.content or '')", "(m.content | reverse)"), None),
        (CHATML.replace("(m.content or '')", "''"), "the chat template leaves it out"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", None),
        (
            "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>robot\n' }}{% endif %}",
            "cannot be learnt",
        ),
    ],
    ids=["upper", "reverse", "left-out", "bare", "other-header"],
)
def test_a_template_that_hides_the_turns_is_right_or_refused(template, finding):
    family = Family(template, IM, "<|im_end|>")
    if finding is None:
        first, second = (piece.lower() for piece in learnt(family, TWO_TURNS))
        assert first[:4] in ("yo a", "a oy")
        assert second[:4] in ("yo b", "b oy")
    else:
        with pytest.raises(DataError, match=finding):
            learnt(family, TWO_TURNS)


@pytest.mark.parametrize("edge", ["startswith", "endswith"])
def test_templates_that_look_at_the_edges_of_contents_are_understood(edge):
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        f"{{% if m.content.{edge}('yo') %}}!{{% endif %}}"
        "{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    given = conversation("hi", "yo", "so", "yo")

    assert learnt(Family(template, IM, "<|im_end|>"), given) == ["!yo<|im_end|>"] * 2


def test_a_base_model_without_a_usable_template_is_refused():
    tokenizer = byte_tokenizer(FAMILIES["chatml"])
    for template, finding in ((None, "has no chat template"), ("{% if %}", "no jinja template")):
        tokenizer.chat_template = template
        with pytest.raises(BaseModelError, match=finding):
            ChatEncoder.open("base", tokenizer)


def test_of_several_templates_rows_with_tools_take_the_one_for_tools():
    family = FAMILIES["chatml"]
    tokenizer = byte_tokenizer(family)
    tools = "{{ 'TOOLS' }}" + CHATML
    tokenizer.chat_template = {"default": CHATML, "tool_use": tools}
    chat = ChatEncoder.open("base", tokenizer)
    given = parse_conversation(list(TWO_TURNS.messages), [{"type": "function"}])

    [plain], [with_tools] = (chat.encode([one], 999).rows for one in (TWO_TURNS, given))

    assert tokenizer.decode(plain["input_ids"]).startswith("<|im_start|>user")
    assert tokenizer.decode(with_tools["input_ids"]).startswith("TOOLS<|im_start|>user")


PIECES = [
    "yo",
    "assistant",
    "\n",
    " ",
    "<",
    "|",
    "<|",
    "a.",
    "ASSISTANT:",
    "USER: ",
    "{{",
    "é",
    "漢",
]
SAID = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
WITH_END = ("chatml", "chatml-marked", "llama3", "gemma", "phi3", "vicuna", "mistral")


@pytest.mark.parametrize("name", WITH_END)
@settings(max_examples=40, deadline=None)
@drawn(turns=st.lists(st.tuples(SAID, SAID), min_size=1, max_size=3))
def test_spans_hold_the_answers_and_one_mark_each(name, turns):
    chat = encoder(FAMILIES[name]).chat
    given = conversation(*(text for pair in turns for text in pair))

    rendered = render_turns(given, chat)

    assert len(rendered.spans) == len(turns)
    for (start, end), (_, answer) in zip(rendered.spans, turns, strict=True):
        piece = rendered.text[start:end]
        (mark,) = [mark[0] for mark in chat.marks_in(piece)]
        assert piece.removesuffix(mark).strip() == answer.strip()


def test_messages_may_be_json_text():
    given = parse_conversation(json.dumps(list(TWO_TURNS.messages)))

    assert given == TWO_TURNS


def test_a_content_that_begins_as_the_header_ends_is_learnt_behind_it():
    assert learnt(FAMILIES["r1"], conversation("hi", "<think>\nyo")) == ["yo<|eos|>"]
