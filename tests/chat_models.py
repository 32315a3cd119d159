"""Chat templates that behave as the public families do, and small tokenizers with their marks.

`FAMILIES` has, by name, the template, the special tokens, and the tokens that end an answer by the
model's generation settings. The templates are written for these tests.
"""

from dataclasses import dataclass, field

import pytest

CHATML = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
CHATML_NO_PROMPT = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}
{%- endfor %}
"""
CHATML_MARKED = """
{%- for m in messages %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}
{%- generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}
"""
LLAMA3 = """
{{- bos_token }}
{%- set date = strftime_now('%d %b %Y') %}
{%- if messages[0].role == 'system' %}
{%- set said = messages[0].content | trim %}{% set rest = messages[1:] %}
{%- else %}{% set said = '' %}{% set rest = messages %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date + '\n' + said + '<|eot_id|>' }}
{%- for m in rest %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
"""
GEMMA = """
{{- bos_token }}
{%- if messages[0].role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('turns must alternate user/assistant') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' }}
{{- m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}
"""
QWEN3 = """
{%- set ns = namespace(last=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought = '' %}{% set said = m.content or '' %}
{%- if m.reasoning_content is string %}{% set thought = m.reasoning_content %}
{%- elif '</think>' in said %}
{%- set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set said = said.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' + said.lstrip('\n') }}
{%- else %}{{ said }}{% endif %}
{%- for call in m.tool_calls or [] %}
{{- '\n<tool_call>\n{"name": "' + call.function.name + '", "arguments": ' }}
{{- call.function.arguments | tojson + '}\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\n' }}
{%- if silent is defined %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
{%- endif %}
"""
QWEN3_SILENT = QWEN3.replace("silent is defined", "true")
R1 = """
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<|User|>' + m.content }}
{%- else %}{{ '<|Assistant|>' + m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|Assistant|><think>\n' }}{% endif %}
"""
MISTRAL = """
{{- bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('roles must alternate user/assistant') }}
{%- endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}
"""
GLM = """
{{- '[gMASK]<sop>' }}
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""
LAST_EOS = """
{%- for m in messages %}
{{- '<|' + m.role + '|>\n' + m.content }}
{%- if loop.last and not add_generation_prompt %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}
"""
PHI3 = """
{%- for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}
"""
VICUNA = """
{%- for m in messages %}
{%- if m.role == 'user' %}{{ 'USER: ' + m.content + ' ' }}
{%- elif m.role == 'assistant' %}{{ 'ASSISTANT: ' + m.content + eos_token }}
{%- else %}{{ m.content + ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""
WHOLE = (
    """
{%- if messages[-1].role != 'assistant' and not add_generation_prompt %}
{{- raise_exception('the conversation is cut short') }}
{%- endif %}
{%- if messages | length > 2 and messages[-1].role == 'user' %}
{{- raise_exception('the conversation is cut short') }}
{%- endif %}
"""
    + CHATML
)


@dataclass(frozen=True)
class Family:
    template: str
    marks: tuple[str, ...]
    eos: str
    bos: str | None = None
    ends: tuple[str, ...] = ()
    plain_marks: tuple[str, ...] = field(default=("<think>", "</think>"))


_IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
FAMILIES = {
    "chatml": Family(CHATML, _IM, "<|im_end|>"),
    "chatml-other-eos": Family(CHATML, _IM, "<|endoftext|>"),
    "chatml-no-prompt": Family(CHATML_NO_PROMPT, _IM, "<|im_end|>"),
    "chatml-marked": Family(CHATML_MARKED, _IM, "<|im_end|>"),
    "llama3": Family(
        LLAMA3,
        ("<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"),
        "<|end_of_text|>",
        "<|begin|>",
    ),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<bos>"
    ),
    "qwen3": Family(QWEN3, _IM, "<|im_end|>"),
    "qwen3-silent": Family(QWEN3_SILENT, _IM, "<|im_end|>"),
    "r1": Family(R1, ("<|bos|>", "<|eos|>", "<|User|>", "<|Assistant|>"), "<|eos|>", "<|bos|>"),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "glm": Family(
        GLM,
        ("<|endoftext|>", "[gMASK]", "<sop>", *_ROLES),
        "<|endoftext|>",
        ends=("<|endoftext|>", "<|user|>", "<|observation|>"),
    ),
    "glm-undeclared": Family(GLM, ("<|endoftext|>", "[gMASK]", "<sop>", *_ROLES), "<|endoftext|>"),
    "last-eos": Family(LAST_EOS, ("</s>", *_ROLES), "</s>"),
    "phi3": Family(PHI3, ("<|endoftext|>", "<|end|>", *_ROLES), "<|endoftext|>"),
    "vicuna": Family(VICUNA, ("<s>", "</s>"), "</s>", "<s>"),
    "whole": Family(WHOLE, _IM, "<|im_end|>"),
}


def byte_tokenizer(family, *, trim=False):
    """A token for each byte, and one for each mark; puts bos before every text where there is one.

    With `trim`, the places it gives for tokens leave out white space, as GPT-2's do.
    """
    transformers = pytest.importorskip("transformers", reason="a tokenizer is made")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("Ċ", "Ċ"), ("Ġ", "a"), (".", "Ċ")]
    vocabulary = {t: n for n, t in enumerate([*alphabet, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrapped(transformers, tokenizer, family, AddedToken, processors, trim=trim)


def spaced_tokenizer(family):
    """Words with a space before them, as SentencePiece has them; unknown words are letters."""
    transformers = pytest.importorskip("transformers", reason="a tokenizer is made")
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = [*map(chr, range(33, 127)), "\n", "▁"]
    merges = [("▁", "h"), ("▁h", "i"), ("▁", "y"), ("▁y", "o"), ("y", "o"), ("h", "i")]
    vocabulary = {t: n for n, t in enumerate(["<unk>", *letters, *map("".join, merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return _wrapped(transformers, tokenizer, family, AddedToken, processors)


def _wrapped(transformers, tokenizer, family, added, processors, *, trim=False):
    tokenizer.add_special_tokens([added(mark, special=True) for mark in family.marks])
    tokenizer.add_tokens([added(mark, normalized=False) for mark in family.plain_marks])
    steps = [processors.ByteLevel(trim_offsets=True)] if trim else []
    if family.bos:
        number = tokenizer.token_to_id(family.bos)
        steps.append(
            processors.TemplateProcessing(
                single=f"{family.bos} $A", special_tokens=[(family.bos, number)]
            )
        )
    if steps:
        tokenizer.post_processor = processors.Sequence(steps)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.eos,
        pad_token=family.eos,  # as most published chat models have it
        **({"bos_token": family.bos} if family.bos else {}),
    )
    fast.chat_template = family.template
    return fast
