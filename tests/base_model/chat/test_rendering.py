"""Templates are rendered as transformers renders them, and what they must not do is refused."""

from datetime import datetime

import pytest

from chat_models import FAMILIES, byte_tokenizer
from propulsion_export.base_model.chat.rendering import (
    GENERATION_END,
    GENERATION_START,
    TemplateRefusal,
    check_template,
    render,
)

TALK = [
    {"role": "user", "content": "hi <b> "},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nyo"},
    {"role": "user", "content": "and"},
    {"role": "assistant", "content": "so", "reasoning_content": "why"},
]
CALL = {
    "role": "assistant",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "ü<"}}}],
}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.mark.parametrize("prompt", [False, True], ids=["whole", "prompt"])
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"whole"}))
def test_conversation_is_rendered_as_transformers_does(family, prompt):
    tokenizer = byte_tokenizer(FAMILIES[family])
    messages = TALK[:3] if prompt else TALK

    ours = render(
        FAMILIES[family].template,
        messages,
        special=tokenizer.special_tokens_map,
        generation_prompt=prompt,
    )

    assert ours == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages | tojson(indent=2) }}",
        "{{ tools | tojson }}{{ documents }}",
        "{% set n = namespace(a=1) %}{% set n.a = 2 %}{{ n.a }}{{ dict(a=1) }}",
        "{{ dict.fromkeys(['a']) }}",
        "{% for m in messages %}\n  {%- if loop.first %}{% continue %}{% endif %}\n {{ m.role }}\n"
        "{% endfor %}\n",
        "{{ messages[0].thinking }}{{ messages[3].thinking }}{{ messages[3].reasoning_content }}",
        "{{ strftime_now('%Y') }}{{ bos_token }}",
    ],
)
def test_functions_for_templates_are_those_of_transformers(template):
    tokenizer = byte_tokenizer(FAMILIES["llama3"])
    tokenizer.chat_template = template

    ours = render(template, TALK, special=tokenizer.special_tokens_map, tools=TOOLS)

    assert ours == tokenizer.apply_chat_template(TALK, tools=TOOLS, tokenize=False)
    assert ours


def test_calls_are_rendered_as_transformers_does():
    tokenizer = byte_tokenizer(FAMILIES["qwen3"])
    messages = [TALK[0], CALL, {"role": "tool", "content": "4"}]

    ours = render(tokenizer.chat_template, messages, special={}, generation_prompt=True)

    assert '{"name": "f", "arguments": {"a": "ü<"}}' in ours
    assert ours == tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


def test_date_is_the_one_given():
    text = render("{{ strftime_now('%d %b %Y') }}", TALK, special={}, now=datetime(2024, 7, 26))

    assert text == "26 Jul 2024"


def test_generated_text_is_marked_only_on_request():
    template = "a{% generation %}b{% endgeneration %}c"

    assert render(template, TALK, special={}) == "abc"
    marked = render(template, TALK, special={}, mark_generation=True)
    assert marked == f"a{GENERATION_START}b{GENERATION_END}c"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no\nsystem') }}", "no"),
        ("{{ messages[0].content + none }}", "concatenate"),
        ("{{ messages[9].content }}", "no element 9"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ namespace(__class__=1) }}", "cannot have the attribute"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% if %}", "Expected an expression"),
    ],
)
def test_a_template_that_fails_says_why_in_one_line(template, reason):
    with pytest.raises(TemplateRefusal, match=reason) as refused:
        render(template, TALK, special={})

    assert "\n" not in str(refused.value)


def test_a_mistake_in_a_template_is_found_with_its_line():
    assert check_template("{{ messages }}") is None
    assert check_template("\n{% for %}").startswith("line 2: ")
