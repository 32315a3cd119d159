"""A tokenizer loaded by the package `tokenizers` alone, with the results of transformers' own.

transformers imports torch wherever torch is installed, which takes seconds; serving needs neither.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from propulsion_export.base_model.config import read_settings_file
from propulsion_export.base_model.tokenizer.classes import NAMED, PARTS, fits
from propulsion_export.environment.cached import cached_property
from propulsion_export.errors import UsageError

if TYPE_CHECKING:
    from tokenizers import AddedToken, Encoding, Tokenizer

# transformers loads tokenizer.json as it is for these classes; it builds all others anew.
_LOADED_AS_IS = ("PreTrainedTokenizerFast", "TokenizersBackend")
# Model types for which transformers 5.24 builds a class of its own, whichever the files name.
# A test looks for more in the transformers installed.
OWN_CLASS = frozenset(
    {
        "hyperclovax_vision_v2",
        "qwen2",
        "qwen3_5",
        "qwen3_5_moe",
        "qwen3_5_moe_text",
        "qwen4_exp",
        "siglip2",
    }
)
# transformers may repair the pre-tokenizer of these, if the vocabulary is that large.
_REPAIRED = frozenset({"ministral", "mistral", "mistral3", "pixtral", "voxtral"})
_REPAIRED_VOCABULARY = 100_000
_UNKNOWN_SETTINGS = (
    "auto_map",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "fast_tokenizer_files",
    "fix_mistral_regex",
    "split_special_tokens",
)
_NO_LIMIT = int(1e30)  # transformers' model_max_length of a tokenizer without one
# What transformers replaces in decoded text if tokenizer_config.json asks for it, in this order.
_CLEANED = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class EncodedBatch:
    """Token arrays by name, int64 [rows, longest], and each row's tokens with their places."""

    arrays: Mapping[str, Array]
    encodings: "Sequence[Encoding]"

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]


@dataclass(frozen=True)
class FastTokenizer:
    """A tokenizer that is called like one of transformers, with the arguments that serving uses.

    Attributes:
        backend_tokenizer: the tokenizer of the package `tokenizers`.
        special: the special tokens by name, such as `mask_token`.
        model_max_length: the most tokens of a text; 1e30 without a limit.
        padding_side: where short rows are filled up, `left` or `right`.
        truncation_side: where long texts are cut, `left` or `right`.
        clean_up: whether decoding removes the spaces before punctuation.
        model_input_names: the arrays that it returns unless told otherwise.
    """

    backend_tokenizer: "Tokenizer"
    special: Mapping[str, str]
    model_max_length: int = _NO_LIMIT
    padding_side: str = "right"
    truncation_side: str = "right"
    clean_up: bool = False
    model_input_names: tuple[str, ...] = ("input_ids", "token_type_ids", "attention_mask")
    is_fast = True

    @cached_property
    def mask_token_id(self) -> int | None:
        """The number of the mask token; None without one."""
        return self._number("mask_token")

    def __call__(
        self,
        text: str | Sequence[str],
        contexts: Sequence[str] | None = None,
        *,
        truncation: bool = False,
        max_length: int | None = None,
        padding: bool = False,
        return_token_type_ids: bool = False,
        return_attention_mask: bool = True,
        return_tensors: str | None = None,
        verbose: bool = False,
        add_special_tokens: bool = True,
    ) -> Any:
        """Encode one text as lists of numbers, or several as an `EncodedBatch`.

        Args:
            text: one text, or several.
            contexts: a second text for each of several.
            truncation: cut to `max_length` tokens, the longer of text and context first.
            max_length: the most tokens, special ones included.
            padding: fill up all rows to the length of the longest.
            return_token_type_ids: include which of the two texts a token belongs to.
            return_attention_mask: include which tokens are no padding.
            return_tensors: `np` for several texts.
            verbose: nothing is printed either way.
            add_special_tokens: put the tokens around a text that the tokenizer has for it.

        Raises:
            UsageError: rows are to be padded and there is no token for it.
        """
        del verbose, return_tensors
        self._set_limits(max_length if truncation else None, padding)
        names = ["input_ids"]
        names += ["token_type_ids"] if return_token_type_ids else []
        names += ["attention_mask"] if return_attention_mask else []
        if isinstance(text, str):
            [encoding] = self.backend_tokenizer.encode_batch(
                [text], add_special_tokens=add_special_tokens
            )
            return {name: _numbers(encoding, name) for name in names}
        rows: Any = list(text) if contexts is None else list(zip(text, contexts, strict=True))
        encodings = self.backend_tokenizer.encode_batch(rows, add_special_tokens=add_special_tokens)
        return EncodedBatch(
            {
                name: np.array([_numbers(row, name) for row in encodings], np.int64)
                for name in names
            },
            encodings,
        )

    def decode(self, tokens: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """The text of tokens."""
        text = self.backend_tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)
        for found, replacement in _CLEANED if self.clean_up else ():
            text = text.replace(found, replacement)
        return text

    def _number(self, name: str) -> int | None:
        token = self.special.get(name)
        return None if token is None else self.backend_tokenizer.token_to_id(token)

    def _set_limits(self, longest: int | None, padding: bool) -> None:
        """Set what differs from the call before.

        A setting must not change while other threads encode, nor in some versions while they
        decode, which is outside the lock for encoding.
        """
        backend = self.backend_tokenizer
        if longest is None:
            if backend.truncation is not None:
                backend.no_truncation()
        elif (backend.truncation or {}).get("max_length") != longest:
            backend.enable_truncation(longest, direction=self.truncation_side)
        if not padding:
            if backend.padding is not None:
                backend.no_padding()
        elif backend.padding is None:
            number = self._number("pad_token")
            if number is None:
                raise UsageError("the tokenizer has no padding token, expected one for a batch")
            backend.enable_padding(
                direction=self.padding_side, pad_id=number, pad_token=self.special["pad_token"]
            )


def read_fast_tokenizer(directory: Path) -> FastTokenizer | None:
    """The tokenizer of an artifact.

    Returns:
        None where transformers would not use tokenizer.json as it is: there is no such file, it is
        not what the class named in tokenizer_config.json builds, or other files add tokens to it.

    Raises:
        ArtifactError: one of its files is no JSON object.
    """
    file = directory / "tokenizer.json"
    config = read_settings_file(directory / "tokenizer_config.json")
    kind = read_settings_file(directory / "config.json").get("model_type")
    if not file.is_file() or any(config.get(name) for name in _UNKNOWN_SETTINGS):
        return None
    if kind in OWN_CLASS:
        return None
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(file))
    named, others = _special_tokens(directory, config, backend)
    if not _are_added(backend, [*named.values(), *others], config):
        return None
    if not _is_as_built(file, backend, config, named):
        return None
    if kind in _REPAIRED and backend.get_vocab_size() > _REPAIRED_VOCABULARY:
        return None
    return _configured(backend, config, named)


def _configured(
    backend: "Tokenizer", config: Mapping[str, Any], named: Mapping[str, str]
) -> FastTokenizer:
    padding, truncation = backend.padding or {}, backend.truncation or {}
    backend.no_padding()
    backend.no_truncation()
    limit = config.get("model_max_length", config.get("max_len"))
    return FastTokenizer(
        backend,
        named,
        model_max_length=_NO_LIMIT if limit is None else int(limit),
        padding_side=config.get("padding_side", padding.get("direction", "right")),
        truncation_side=config.get("truncation_side", truncation.get("direction", "right")),
        clean_up=bool(config.get("clean_up_tokenization_spaces"))
        and type(backend.model).__name__ != "BPE",
        model_input_names=_input_names(config),
    )


def _input_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """What tokenizer_config.json names, else what the tokenizer's class returns."""
    if isinstance(config.get("model_input_names"), list):
        return tuple(config["model_input_names"])
    bert = str(config.get("tokenizer_class")).removesuffix("Fast") == "BertTokenizer"
    return ("input_ids", *(("token_type_ids",) if bert else ()), "attention_mask")


def _special_tokens(
    directory: Path, config: Mapping[str, Any], backend: "Tokenizer"
) -> tuple[dict[str, str], list[str]]:
    """The special tokens by name, and all other tokens that the files beside tokenizer.json name.

    Where tokenizer_config.json lists the added tokens, transformers reads no older files.
    """
    settings = dict(config)
    others: list[str] = []
    if "added_tokens_decoder" not in config:
        settings |= read_settings_file(directory / "special_tokens_map.json")
        others += read_settings_file(directory / "added_tokens.json")
    padding = backend.padding
    if padding is not None:
        settings.setdefault("pad_token", padding["pad_token"])
    named = {name: _content(settings[name]) for name in NAMED if settings.get(name) is not None}
    others += [
        _content(token)
        for name, token in settings.items()
        if name.endswith("_token") and name not in NAMED and isinstance(token, str | dict)
    ]
    for name in ("extra_special_tokens", "additional_special_tokens"):
        more = settings.get(name) or ()
        others += [_content(t) for t in (more.values() if isinstance(more, dict) else more)]
    return named, others


def _are_added(backend: "Tokenizer", tokens: Iterable[str], config: Mapping[str, Any]) -> bool:
    """Whether tokenizer.json has all these tokens already, with the settings given elsewhere."""
    added = {token.content: token for token in backend.get_added_tokens_decoder().values()}
    listed = (config.get("added_tokens_decoder") or {}).values()
    return all(token in added for token in tokens) and all(
        _same(token, added.get(token["content"])) for token in listed
    )


def _same(settings: Mapping[str, Any], token: "AddedToken | None") -> bool:
    return token is not None and all(
        getattr(token, name) == value for name, value in settings.items()
    )


def _is_as_built(
    file: Path, backend: "Tokenizer", config: Mapping[str, Any], named: Mapping[str, str]
) -> bool:
    """Whether transformers' class, which may build the tokenizer anew, arrives at the file's."""
    name = str(config.get("tokenizer_class"))
    if name in _LOADED_AS_IS:
        if backend.post_processor is None:
            from tokenizers.processors import TemplateProcessing

            backend.post_processor = TemplateProcessing(single="$A:0", pair="$A:0 $B:1")
        return True
    parts = PARTS.get(name.removesuffix("Fast"))
    content = read_settings_file(file)
    vocabulary = content["model"]["vocab"]
    listed = {token["content"] for token in (config.get("added_tokens_decoder") or {}).values()}
    contents = {token["content"] for token in content["added_tokens"]}
    if parts is None or not contents <= vocabulary.keys() or (listed and listed != contents):
        return False
    expected = parts(config, named, backend)
    return expected is not None and all(
        fits(content.get(part), expected[part]) for part in expected
    )


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def _numbers(encoding: "Encoding", name: str) -> list[int]:
    match name:
        case "token_type_ids":
            return encoding.type_ids
        case "attention_mask":
            return encoding.attention_mask
        case _:
            return encoding.ids
