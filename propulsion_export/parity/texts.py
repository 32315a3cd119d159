"""The case `texts`: does an artifact read texts as its base model and its adapters do?

The expected side is what transformers loads from the base model's files, or from those of an
adapter that brings its own tokenizer, with the settings that the adapters were trained with. The
other side is what serving loads from the artifact.
"""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.own_tokenizer import has_own_tokenizer
from propulsion_export.adapters.settings import settings_in_use
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.hub import copy_files
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.positions import longest_input
from propulsion_export.base_model.settings import (
    Settings,
    read_tokenizer_settings,
    reads_padding,
    set_in_tokenizer_,
    write_tokenizer_settings,
)
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.base_model.tokenizer.classes import NAMED
from propulsion_export.base_model.tokenizer.fast import FastTokenizer
from propulsion_export.base_model.tokenizer.files import tokenizer_files
from propulsion_export.base_model.tokenizer.reading import (
    copy_tokenizer,
    read_serving_tokenizer,
    read_tokenizer,
)
from propulsion_export.base_model.tokenizer.token_ids import named_tokens, numbers_of
from propulsion_export.base_model.tokenizer.unreadable import OwnCodeError
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import (
    AdapterError,
    ArtifactError,
    BaseModelError,
    UnavailableError,
)
from propulsion_export.parity.reports.report import Check, Coverage

# Scripts, case, white space, punctuation, numbers, symbols, combined characters, long words, code.
TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "THE QUICK Brown fOX",
    "naïve café déjà-vu Ångström œuvre ﬁn ½",
    "e\u0301 e\u0300 n\u0303 \u00e9 \u00e8 \u00f1",
    "  two  spaces,\ttabs\nand\r\nlines  ",
    "no\u00a0break, zero\u200bwidth, soft\u00adhyphen",
    "",
    " ",
    "don't can't it's — “quotes” … (a+b)*c = 1,234.56 €",
    "0123456789 3.14159 1e-10 2026-11-30T16:15:00Z",
    "http://example.com/path?x=1&y=2 user@example.com #tag",
    "def f(x):\n    return {'a': x[0] ** 2}  # done\n",
    "Привет, мир! Ёлка",
    "Καλημέρα κόσμε",
    "你好世界。今天天气很好",
    "こんにちは世界 カタカナ ｶﾀｶﾅ",
    "안녕하세요 세계",
    "مرحبا بالعالم",
    "שלום עולם",
    "नमस्ते दुनिया",
    "สวัสดีชาวโลก",
    "🙂 👩‍👩‍👧‍👦 🇩🇪",
    "pneumonoultramicroscopicsilicovolcanoconiosis" * 4,
    "a" * 300,
)
_OWN_WORDS, _WORDS_A_TEXT = 64, 8
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}
_CUT = 8  # tokens, to see at which end a text is cut
_PREFIX_SPACE = "add_prefix_space"
_WHAT = "tokenizer"


@dataclass
class Texts:
    """What was found of the tokenizer.

    Attributes:
        checks: one check; none where nothing could be compared.
        coverage: what was compared, or why nothing was.
    """

    checks: list[Check] = field(default_factory=list)
    coverage: list[Coverage] = field(default_factory=list)


class _NotComparedError(Exception):
    """Why there is nothing to compare."""


def compare_texts(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    directories: Mapping[str, Path],
    *,
    trust_remote_code: bool = False,
) -> Texts:
    """Compare an artifact's tokenizer with that of its base model or of its adapters.

    Args:
        artifact: what is judged.
        base: its base model.
        adapters: its adapters; none where they are drawn.
        directories: where the adapters are, by name.
        trust_remote_code: run a tokenizer's own code.

    Raises:
        ArtifactError: the artifact's tokenizer is damaged.
    """
    try:
        expected = _expected(
            artifact, base, adapters, directories, trust_remote_code=trust_remote_code
        )
        found = _found(artifact.directory, trust_remote_code=trust_remote_code)
    except _NotComparedError as reason:
        return Texts([], [Coverage(_WHAT, False, str(reason))])
    if found is None:
        detail = "the artifact has no tokenizer, its base model has one"
        return Texts([Check("texts", "all", False, detail)], [Coverage(_WHAT, True, detail)])
    with quiet():
        texts = _texts(expected)
        findings = list(_findings(base, expected, found, texts))
        findings += _named_otherwise(expected, found)
        findings += [*_other_side(artifact, expected), *_other_padding(base, expected)]
    numbers = f"{len(texts)} texts and the numbers of {len(numbers_of(expected)):,} tokens"
    detail = "; ".join(findings) or f"{numbers} are the same"
    check = Check("texts", "all", not findings, detail)
    return Texts([check], [Coverage(_WHAT, True, numbers)])


def _expected(
    artifact: Artifact,
    base: BaseModel,
    adapters: Sequence[Adapter],
    directories: Mapping[str, Path],
    *,
    trust_remote_code: bool,
) -> Any:
    """The tokenizer that texts should be read with, as transformers loads it.

    Raises:
        _NotComparedError: there is none, or it cannot be loaded here.
    """
    own = (str(place) for place in directories.values() if has_own_tokenizer(place))
    source = next(own, base.source)
    try:
        tokenizer = read_tokenizer(source, trust_remote_code=trust_remote_code)
        if tokenizer is None:
            raise _NotComparedError("not covered: the base model has no tokenizer")
        settings = settings_in_use(adapters, base.model, tokenizer, base.task, source)
        settings = _with_prefix_space(settings, artifact)
        if not settings.tokenizer and source == base.source:
            return tokenizer
        tokenizer = _as_exported(source, base.source, settings, trust_remote_code=trust_remote_code)
        set_in_tokenizer_(tokenizer, settings)
    except (AdapterError, BaseModelError, UnavailableError) as error:
        raise _NotComparedError(f"not covered: {error}") from error
    return tokenizer


def _with_prefix_space(settings: Settings, artifact: Artifact) -> Settings:
    """The settings with the space before words that an artifact has for adapters to come.

    A slot for adapters may have been filled and freed since.
    """
    manifest = artifact.manifest
    for_others = (
        manifest.mode != "folded" or TASKS[manifest.task].prediction == "word classes"
    ) and _PREFIX_SPACE not in settings.tokenizer
    own = read_tokenizer_settings(artifact.directory).get(_PREFIX_SPACE)
    if not for_others or own is not True:
        return settings
    return Settings(settings.model, {**settings.tokenizer, _PREFIX_SPACE: True})


def _as_exported(source: str, base: str, settings: Settings, *, trust_remote_code: bool) -> Any:
    """A tokenizer as transformers loads it beside the base model's configuration and settings."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        copy_files(("config.json",), base, directory)
        copy_tokenizer(source, directory)
        write_tokenizer_settings(directory, settings)
        return read_tokenizer(directory, trust_remote_code=trust_remote_code)


def _found(directory: Path, *, trust_remote_code: bool) -> Any | None:
    """The artifact's tokenizer as serving loads it; None without one.

    Raises:
        _NotComparedError: it cannot be loaded here.
        ArtifactError: it is damaged.
    """
    if not tokenizer_files(str(directory)):
        return None
    try:
        return read_serving_tokenizer(directory)
    except UnavailableError as error:
        raise _NotComparedError(f"not covered: {error}") from error
    except ArtifactError as error:
        if not isinstance(error.__cause__, OwnCodeError):
            raise
        if not trust_remote_code:
            raise _NotComparedError(f"not covered: {error}") from error
        return read_tokenizer(directory, trust_remote_code=True)


def _texts(tokenizer: Any) -> list[str]:
    """The fixed texts, texts around special tokens, and texts of the tokenizer's own words."""
    special = [getattr(tokenizer, name, None) for name in NAMED]
    around = [f"a {token} b{token}c" for token in dict.fromkeys(special) if token]
    numbers = sorted(numbers_of(tokenizer).values())
    chosen = numbers[:: max(1, len(numbers) // _OWN_WORDS)]
    words = [word for number in chosen if (word := tokenizer.decode([number]).strip())]
    starts = range(0, len(words), _WORDS_A_TEXT)
    own = [" ".join(words[start : start + _WORDS_A_TEXT]) for start in starts]
    spelled = [text for line in own for text in _spellings(line)]
    return [*TEXTS, *around, *spelled]


def _spellings(line: str) -> Iterator[str]:
    """A text in the ways in which tokenizers differ: case, spaces, accents, width, punctuation."""
    yield from (line, line.upper(), line.title(), line.replace(" ", ""), f" {line}")
    yield line.replace("a", "á").replace("e", "e\u0301").replace("o", "ö")
    yield line.translate(_FULL_WIDTH)
    yield line.replace(" ", ", ") + "."


def _findings(base: BaseModel, expected: Any, found: Any, texts: Sequence[str]) -> Iterator[str]:
    """In words, how two tokenizers differ."""
    ours, theirs = numbers_of(expected), numbers_of(found)
    if lacking := dict(ours.items() - theirs.items()):
        yield f"the artifact's tokenizer has not {named_tokens(lacking)}"
    if extra := dict(theirs.items() - ours.items()):
        yield f"the artifact's tokenizer has {named_tokens(extra)}, its base model has not"
    wrong = [text for text in texts if _tokens(expected, text) != _tokens(found, text)]
    if wrong:
        yield (
            f"{len(wrong)} of {len(texts)} texts have other tokens ({wrong[0][:40]!r}: "
            f"{_shown(_tokens(found, wrong[0]))}, expected {_shown(_tokens(expected, wrong[0]))})"
        )
    pair = texts[0], texts[-1]
    if _pair(expected, *pair) != _pair(found, *pair):
        yield "a pair of texts has other tokens or other token types"
    if _tokens(expected, " ".join(texts), _CUT) != _tokens(found, " ".join(texts), _CUT):
        yield "a long text is cut otherwise"
    if (
        TASKS[base.task].generates
        and not wrong
        and _decoded(expected, texts) != _decoded(found, texts)
    ):
        yield "tokens are decoded to other texts"
    yield from _other_limits(base, expected, found)


def _other_limits(base: BaseModel, expected: Any, found: Any) -> Iterator[str]:
    """What is different where texts are cut and filled up."""
    longest = [longest_input(base.model.config, each) for each in (found, expected)]
    if longest[0] != longest[1]:
        yield f"texts are cut at {longest[0]} tokens, expected {longest[1]}"
    padding = [_special(each, "pad_token") for each in (found, expected)]
    if padding[1] is not None and padding[0] != padding[1]:
        yield f"batches are filled up with {padding[0]!r}, expected {padding[1]!r}"


def _named_otherwise(expected: Any, found: Any) -> Iterator[str]:
    """Special tokens by name, which chat templates and programs ask for; padding has its own."""
    for name in NAMED:
        pair = [_special(each, name) for each in (found, expected)]
        if name != "pad_token" and None not in pair and pair[0] != pair[1]:
            yield f"{name} is {pair[0]!r}, expected {pair[1]!r}"


def _special(tokenizer: Any, name: str) -> str | None:
    if isinstance(tokenizer, FastTokenizer):
        return tokenizer.special.get(name)
    token = getattr(tokenizer, name, None)
    return None if token is None else str(token)


def _other_side(artifact: Artifact, expected: Any) -> Iterator[str]:
    """Where transformers fills short rows up, which decides what a language model generates."""
    found = read_tokenizer_settings(artifact.directory).get("padding_side")
    if found is not None and found != expected.padding_side:
        yield f"short rows are filled up on the {found}, expected {expected.padding_side}"


def _other_padding(base: BaseModel, expected: Any) -> Iterator[str]:
    """Whether a model that looks for padding, which it does as the artifact says, finds it."""
    if not reads_padding(base.model, base.task) or expected.pad_token is None:
        return
    number = expected.convert_tokens_to_ids(expected.pad_token)
    if base.model.config.pad_token_id != number:
        yield (
            f"config.json: pad_token_id is {base.model.config.pad_token_id}, expected {number}, by "
            "which the model finds a text's last token"
        )


def _tokens(tokenizer: Any, text: str, limit: int | None = None) -> list[int]:
    encoding = tokenizer(
        [text], truncation=limit is not None, max_length=limit, verbose=False, padding=False
    )
    return [int(token) for token in encoding["input_ids"][0]]


def _pair(tokenizer: Any, text: str, context: str) -> list[list[int]]:
    encoding = tokenizer([text], [context], return_token_type_ids=True, verbose=False)
    return [[int(n) for n in encoding[name][0]] for name in ("input_ids", "token_type_ids")]


def _decoded(tokenizer: Any, texts: Sequence[str]) -> list[str]:
    return [tokenizer.decode(_tokens(tokenizer, each), skip_special_tokens=True) for each in texts]


def _shown(tokens: Sequence[int]) -> str:
    return f"{list(tokens[:6])}{'…' if len(tokens) > 6 else ''}"
