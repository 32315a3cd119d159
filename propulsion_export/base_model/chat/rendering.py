"""Render a chat template as transformers does, without loading transformers or torch.

The settings of the environment, the functions that a template may call and what it may not reach
are those of `transformers.utils.chat_template_utils` 5.24; a test compares the two.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from propulsion_export.errors import UnavailableError, first_line

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]
# What stands around the text inside `{% generation %}` while `mark_generation` is on.
GENERATION_START, GENERATION_END = "\U0010fffc", "\U0010fffd"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_REASONING = ("reasoning_content", "thinking", "reasoning")
_marking: ContextVar[bool] = ContextVar("marking", default=False)


class TemplateRefusal(Exception):
    """A template failed on a conversation, or refused it; the text is its reason, on one line."""


def marks_generation(template: str) -> bool:
    """Whether a template says by `{% generation %}` what an assistant generates."""
    return _GENERATION.search(template) is not None


def render(
    template: str,
    messages: Sequence[Message],
    *,
    special: Mapping[str, str],
    tools: Sequence[Any] | None = None,
    generation_prompt: bool = False,
    mark_generation: bool = False,
    now: datetime | None = None,
) -> str:
    """The text of a conversation.

    Args:
        template: a chat template.
        messages: plain JSON values, see `data.messages`.
        special: the special tokens by name, such as `bos_token`.
        tools: the tools that the assistant may call, as JSON schemas.
        generation_prompt: end with the header of the assistant's next turn.
        mark_generation: put `GENERATION_START` and `GENERATION_END` around what the template says
            is generated.
        now: the date that a template may write; default: now.

    Raises:
        TemplateRefusal: the template refuses the conversation, or fails on it.
        UnavailableError: jinja2 is not installed.
    """
    moment = now or datetime.now()
    _environment()  # or say that it cannot be had
    token = _marking.set(mark_generation)
    try:
        return _compiled(template).render(
            messages=[_with_reasoning(message) for message in messages],
            tools=tools,
            documents=None,
            add_generation_prompt=generation_prompt,
            strftime_now=moment.strftime,
            **special,
        )
    except Exception as error:  # whatever a template does with what it is given
        raise TemplateRefusal(first_line(error)) from error
    finally:
        _marking.reset(token)


def check_template(template: str) -> str | None:
    """What is wrong with the syntax of a template; None where it can be used.

    Raises:
        UnavailableError: jinja2 is not installed.
    """
    environment = _environment()
    from jinja2 import TemplateSyntaxError

    try:
        environment.from_string(template)
    except TemplateSyntaxError as error:
        return f"line {error.lineno}: {first_line(error)}"
    return None


def _with_reasoning(message: Message) -> dict[str, Any]:
    """A message with its reasoning under the names that templates read it by."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if found is None:
        return dict(message)
    return {"thinking": found, **message, "reasoning_content": found}


@lru_cache(maxsize=64)
def _compiled(template: str) -> "Template":
    compiled: Template = _environment().from_string(template)
    return compiled


@lru_cache(maxsize=1)
def _environment() -> Any:
    try:
        import jinja2
    except ModuleNotFoundError as error:
        raise UnavailableError(
            "chat templates: only jinja2 renders them, which is not installed",
            remedy="Run: pip install 'jinja2>=3.1.6'.",
        ) from error
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_tag(), loopcontrols]
    )

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    environment.globals["dict"] = _TemplateDict()
    environment.globals["namespace"] = _namespace_class()
    return environment


def _generation_tag() -> Any:
    """The tag `{% generation %}`, whose text is marked only where it is asked for."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_marked")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _marked(self, caller: Callable[[], str]) -> str:
            text = caller()
            return f"{GENERATION_START}{text}{GENERATION_END}" if _marking.get() else text

    return Generation


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja2's own filter escapes HTML.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _TemplateDict:
    """`dict` for templates, which must not reach the class itself."""

    fromkeys = staticmethod(dict.fromkeys)

    def __call__(self, *values: Any, **items: Any) -> dict[Any, Any]:
        return dict(*values, **items)


def _namespace_class() -> Any:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    def check(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot have the attribute {name!r}")

    class SafeNamespace(Namespace):
        """jinja2's namespace without attributes that lead into the interpreter."""

        def __init__(*args: Any, **items: Any) -> None:
            own, *values = args
            found = dict(*values, **items)
            for name in found:
                check(name)
            Namespace.__init__(own, found)

        def __setitem__(self, name: str, value: Any) -> None:
            check(name)
            super().__setitem__(name, value)

    return SafeNamespace
