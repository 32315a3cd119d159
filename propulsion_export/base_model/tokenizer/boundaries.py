"""Where a text can be cut in two without changing a token on either side.

A boundary lies between a letter or digit and a blank, a new line or tab, a punctuation mark or an
ideograph. It is safe if every step of the tokenizer treats its two sides apart:

| step | why it does |
|---|---|
| added tokens | none has such a pair of characters in it |
| normalizer | it changes characters one by one, or in groups that end there |
| pre-tokenizer | it splits there; or it neither splits there nor looks beyond, and then: |
| model | no token of the vocabulary has such a pair in it: no merge and no path crosses it |

With a part of an unknown kind, such as a regular expression that is not listed here, no boundary
is known to be safe.
"""

import json
import re
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, pairwise
from typing import TYPE_CHECKING, Any

from propulsion_export.environment.cached import cached_property

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BLANK = " "
# Those of ASCII, and the ideographic comma and full stop with the full-width forms.
MARKS = frozenset(",.;:!?\u3001\u3002\uff0c\uff01\uff1f\uff1b\uff1a")
_LINES = frozenset("\n\r\t")
_IDEOGRAPHS = "\u4e00-\u9fff"
_BYTE_BLANK = "\u0120"
_TRIED = 10_000  # places that are tried before a text counts as one without boundaries
_JOINS_THE_NEXT = "\u0d4e"  # a letter that is in one grapheme with what comes behind it
# Normalizers that treat a letter apart from a blank or mark behind it; see `_replaced` for another.
_LOCAL_NORMALIZERS = frozenset(
    {"BertNormalizer", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled", "Prepend"}
    | {"Strip", "StripAccents"}
)
_LOCAL_REPLACEMENTS = frozenset({" {2,}", " +", r"\s+", r"\s{2,}"})
# Patterns of which no match has a letter or digit before a blank or mark, and that look ahead only
# behind blanks: those of GPT-2, Llama 3, Qwen 2, Qwen 3.5 and DeepSeek.
_SPLITTING_PATTERNS = frozenset(
    {
        r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
        r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
        r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+"
        "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    }
)
# Patterns whose matches are of letters or of digits alone.
_LOCAL_PATTERNS = frozenset({r"\p{N}{1,3}", r"\p{N}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"})

Parts = list[Mapping[str, Any]]


@dataclass(frozen=True)
class Boundaries:
    """Where texts can be cut for one tokenizer: behind a letter or digit, before some characters.

    Attributes:
        before: blanks, new lines and marks before which a text can be cut to keep its beginning.
        behind: whether it can be cut before a blank to keep its end.
        isolated: whether each ideograph is a word of its own.
        joined: pairs of ideographs that a token holds; None where others cannot be cut apart.
        known: the ideographs that are tokens.
    """

    before: frozenset[str]
    behind: bool = False
    isolated: bool = False
    joined: frozenset[str] | None = None
    known: frozenset[str] = frozenset()

    @classmethod
    def of(cls, backend: "Tokenizer") -> "Boundaries | None":
        """The boundaries of a tokenizer; None where none is known to be safe."""
        added = list(backend.get_added_tokens_decoder().values())
        normalizers = _parts(backend.normalizer, "normalizers")
        blank = _blank_behind(normalizers)
        # Such a token takes the blanks behind it.
        swallowing = any(token.rstrip and token.content[-1:].isalnum() for token in added)
        if blank is None or swallowing:
            return None
        inside = _behind_letters(token.content for token in added)
        chars = {char: blank if char == BLANK else char for char in MARKS | {BLANK}}
        if BLANK not in inside:  # a normalizer may have made one of it
            chars |= _normal_lines(backend, normalizers)
        chars = {char: now for char, now in chars.items() if not {char, _folded(now)} & inside}
        pre_tokenizers = _parts(backend.pre_tokenizer, "pretokenizers")
        splitting, whole = _split(pre_tokenizers, chars)
        keeps = _keeps_ideographs(backend, pre_tokenizers)
        vocabulary = _Vocabulary.of(backend, pre_tokenizers, blank) if whole or keeps else None
        before = splitting | (vocabulary.apart(whole) if vocabulary else set())
        ideographs = not any(token.single_word for token in added)
        ideographs = ideographs and not any(map(_is_ideograph, inside))
        isolated = BLANK in splitting and any(map(_isolates_ideographs, normalizers))
        found = cls(
            frozenset(before),
            BLANK in splitting and all(p["type"] not in ("Prepend", "Strip") for p in normalizers),
            ideographs and isolated,
            vocabulary.pairs if ideographs and keeps and vocabulary else None,
            vocabulary.ideographs if vocabulary else frozenset(),
        )
        some = before or found.isolated or found.joined is not None
        return found if some else None

    def first(self, text: str, start: int) -> int | None:
        """The first boundary at or behind a character that keeps the beginning; None without."""
        found = islice(self._candidates.finditer(text, max(1, start)), _TRIED)
        return next((one.start() for one in found if self._is_safe(text, one.start())), None)

    def last(self, text: str, start: int) -> int | None:
        """The last boundary at or before a character that keeps the end; None without."""
        place = start + 1
        for _ in range(_TRIED):
            place = text.rfind(BLANK, 1, place)
            if place < 0 or not self.behind:
                return None
            if _is_letter(text[place - 1]):
                return place
        return None

    @cached_property
    def _candidates(self) -> re.Pattern[str]:
        ideographs = _IDEOGRAPHS if self.isolated or self.joined is not None else ""
        # The set first, which is searched for fast.
        chars = re.escape("".join(sorted(self.before)))
        return re.compile(f"[{chars}{ideographs}](?<=[^\\W_].)", re.DOTALL)

    def _is_safe(self, text: str, place: int) -> bool:
        left, right = text[place - 1], text[place]
        if right in self.before or self.isolated:
            return _is_letter(left)
        if self.joined is None or not _is_ideograph(left):
            return False
        return right in self.known and left + right not in self.joined


@dataclass(frozen=True)
class _Vocabulary:
    """What tokens hold, of a model whose tokens may span what its pre-tokenizer leaves whole.

    Attributes:
        single: the tokens of one character.
        inner: characters that stand behind a letter or digit in a token.
        pairs: pairs of ideographs in a token.
    """

    single: frozenset[str]
    inner: frozenset[str]
    pairs: frozenset[str]

    @classmethod
    def of(cls, backend: "Tokenizer", pre_tokenizers: Parts, blank: str) -> "_Vocabulary | None":
        """None for a model of another kind than BPE or Unigram, or with marks at a word's end."""
        model: Any = backend.model
        kind = type(model).__name__
        if kind not in ("BPE", "Unigram"):
            return None
        if kind == "BPE" and (
            model.dropout
            or model.ignore_merges
            or model.continuing_subword_prefix
            or model.end_of_word_suffix
        ):
            return None
        of_bytes = any(part["type"] == "ByteLevel" for part in pre_tokenizers)
        blanks = {blank, *(p["replacement"] for p in pre_tokenizers if p["type"] == "Metaspace")}
        tokens = backend.get_vocab(with_added_tokens=False)
        inner, pairs = set(), set()
        for token in tokens:
            for left, right in pairwise(token):
                if of_bytes or left.isalnum() or (right in blanks and left not in blanks):
                    inner.add(right)
                    if _is_ideograph(left) and _is_ideograph(right):
                        pairs.add(left + right)
        single = frozenset(token for token in tokens if len(token) == 1)
        return cls(single, frozenset(inner), frozenset(pairs))

    @property
    def ideographs(self) -> frozenset[str]:
        return frozenset(filter(_is_ideograph, self.single))

    def apart(self, whole: Mapping[str, str]) -> set[str]:
        """The characters that no token has behind a letter, and that are tokens.

        One that is none would be one unknown token with an unknown letter before it.
        """
        return {
            char
            for char, now in whole.items()
            if {now, _folded(now)} <= self.single and not {now, _folded(now)} & self.inner
        }


def _parts(component: Any, name: str) -> Parts:
    """The parts of a normalizer or pre-tokenizer, in order, as tokenizer.json writes them."""
    return [] if component is None else list(_flat(json.loads(component.__getstate__()), name))


def _flat(part: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    if part["type"] != "Sequence":
        yield part
        return
    for inner in part[name]:
        yield from _flat(inner, name)


def _blank_behind(normalizers: Parts) -> str | None:
    """What a blank is behind all normalizers; None where one of them is not known to be local."""
    blank: str | None = BLANK
    for part in normalizers:
        if blank is not None and part["type"] == "Replace":
            blank = _replaced(part["pattern"], part["content"], blank)
        elif part["type"] not in _LOCAL_NORMALIZERS:
            return None
    return blank


def _replaced(pattern: Mapping[str, str], content: str, blank: str) -> str | None:
    """What a blank is behind a replacement; None where that may cross a boundary, or move it."""
    if "Regex" in pattern:
        local = pattern["Regex"] in _LOCAL_REPLACEMENTS and content == blank
        return blank if local else None
    replaced = pattern["String"]
    if replaced == blank:
        return content if len(content) == 1 else None
    movable = replaced[:1] in MARKS | {BLANK, blank} or any(map(str.isalnum, replaced))
    return None if movable else blank


def _normal_lines(backend: "Tokenizer", normalizers: Parts) -> dict[str, str]:
    """What new lines and tabs behind a letter are behind all normalizers, where that is known."""
    replaced = "".join(part["pattern"].get("String", "") for part in normalizers if _replaces(part))
    if _LINES & set(replaced):
        return {}
    found = {}
    for char in _LINES:
        text = f"a{char}a"
        normal = text if backend.normalizer is None else backend.normalizer.normalize_str(text)
        if len(normal) > 2 and normal[-3] == normal[-1] == "a":
            found[char] = normal[-2]
    return found


def _replaces(part: Mapping[str, Any]) -> bool:
    return bool(part["type"] == "Replace")


def _split(pre_tokenizers: Parts, chars: Mapping[str, str]) -> tuple[set[str], dict[str, str]]:
    """Before which characters behind a letter there is a split, and which are left in a whole.

    Args:
        pre_tokenizers: the parts, in order.
        chars: the characters, and what the normalizer has made of each.

    Returns:
        The characters with a split, and the others where it is known that there is none, with what
        the model sees of each.
    """
    splitting: set[str] = set()
    whole = dict(chars)
    for part in pre_tokenizers:
        steps = {char: _step(part, now) for char, now in whole.items()}
        splitting |= {char for char, step in steps.items() if step is True}
        whole = {char: step for char, step in steps.items() if isinstance(step, str)}
    return splitting, whole


def _step(part: Mapping[str, Any], char: str) -> str | bool:
    """What a pre-tokenizer makes of a character behind a letter or digit.

    Returns:
        True for a split before it; else the character as it is then; False where that is not known.
    """
    kind = part["type"]
    if kind in _SPLITTERS or (kind == "ByteLevel" and part.get("use_regex", True)):
        return char in MARKS or _is_blank(char)
    step = _STEPS.get(kind)
    return step is not None and step(part, char)


def _is_blank(char: str) -> bool:
    return char == BLANK or char in _LINES


def _metaspace_step(part: Mapping[str, Any], char: str) -> str | bool:
    if char not in (BLANK, part["replacement"]):
        return char
    return True if part.get("split", True) else str(part["replacement"])


def _punctuation_step(part: Mapping[str, Any], char: str) -> str | bool:
    return part["behavior"] in ("Isolated", "Removed", "Contiguous") if char in MARKS else char


def _byte_step(part: Mapping[str, Any], char: str) -> str | bool:
    return _BYTE_BLANK if char == BLANK else char.isascii() and char.isprintable() and char


def _pattern_step(part: Mapping[str, Any], char: str) -> str | bool:
    pattern, behavior = part["pattern"], part["behavior"]
    if part["invert"]:
        return False
    if (text := pattern.get("String")) is not None:
        if text == char:
            return bool(behavior != "MergedWithPrevious")
        return char not in text and char
    if pattern["Regex"] in _LOCAL_PATTERNS:
        return char
    return pattern["Regex"] in _SPLITTING_PATTERNS and behavior == "Isolated"


_SPLITTERS = frozenset({"BertPreTokenizer", "Whitespace"})
_STEPS: dict[str, Callable[[Mapping[str, Any], str], str | bool]] = {
    "WhitespaceSplit": lambda part, char: _is_blank(char) or char,
    "Digits": lambda part, char: char,
    "Punctuation": _punctuation_step,
    "Metaspace": _metaspace_step,
    "ByteLevel": _byte_step,
    "Split": _pattern_step,
}


def _behind_letters(tokens: Iterable[str]) -> set[str]:
    """The characters that stand behind a letter or digit in a token."""
    return {right for token in tokens for left, right in pairwise(token) if left.isalnum()}


def _isolates_ideographs(normalizer: Mapping[str, Any]) -> bool:
    return normalizer["type"] == "BertNormalizer" and bool(normalizer["handle_chinese_chars"])


def _keeps_ideographs(backend: "Tokenizer", pre_tokenizers: Parts) -> bool:
    """Whether ideographs come to the model as they are, and side by side."""
    kinds: Collection[str] = ("Metaspace", "WhitespaceSplit")
    kept = "\u4e2d\u56fd"
    normal = kept if backend.normalizer is None else backend.normalizer.normalize_str(kept)
    return normal.endswith(kept) and all(part["type"] in kinds for part in pre_tokenizers)


def _folded(char: str) -> str:
    return unicodedata.normalize("NFKC", char)


def _is_ideograph(char: str) -> bool:
    return "\u4e00" <= char <= "\u9fff"


@lru_cache(4096)
def _is_letter(char: str) -> bool:
    """Whether a character is a letter or digit that no normalizer makes something else of."""
    kind = unicodedata.category(char)
    plain = kind in ("Lu", "Ll", "Lo", "Nd") and char <= "\uffff" and char != _JOINS_THE_NEXT
    return plain and _folded(char) == char
