"""The parts that transformers' own tokenizer classes build, as tokenizer.json writes them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer

NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def fits(found: Any, expected: Any) -> bool:
    """Whether a part of tokenizer.json has these settings; of several possible ones, any."""
    if isinstance(expected, tuple):
        return any(fits(found, one) for one in expected)
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return bool(found == expected)
    return all(fits(found.get(name), value) for name, value in expected.items())


def _bert(
    config: Mapping[str, Any], named: Mapping[str, str], backend: "Tokenizer"
) -> dict[str, Any] | None:
    """The parts that transformers' BertTokenizer builds."""
    if not {"unk_token", "sep_token", "pad_token", "cls_token", "mask_token"} <= named.keys():
        return None
    cls, sep = named["cls_token"], named["sep_token"]
    return {
        "model": {
            "type": "WordPiece",
            "unk_token": named["unk_token"],
            "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100,
        },
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": config.get("tokenize_chinese_chars", True),
            "strip_accents": config.get("strip_accents"),
            "lowercase": config.get("do_lower_case", True),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "post_processor": (
            {
                "type": "BertProcessing",
                "cls": [cls, backend.token_to_id(cls)],
                "sep": [sep, backend.token_to_id(sep)],
            },
            {
                "type": "TemplateProcessing",
                "single": [_token(cls, 0), _text("A", 0), _token(sep, 0)],
                "pair": [
                    *(_token(cls, 0), _text("A", 0), _token(sep, 0)),
                    *(_text("B", 1), _token(sep, 1)),
                ],
            },
        ),
    }


def _roberta(
    config: Mapping[str, Any], named: Mapping[str, str], backend: "Tokenizer"
) -> dict[str, Any] | None:
    """The parts that transformers' RobertaTokenizer builds."""
    if not set(NAMED) <= named.keys():
        return None
    cls, sep = named["cls_token"], named["sep_token"]
    spaced = config.get("add_prefix_space", False)
    return {
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": ("", None),
            "end_of_word_suffix": ("", None),
            "fuse_unk": False,
            "byte_fallback": (False, None),  # older files lack this and the next
            "ignore_merges": (False, None),
        },
        "normalizer": None,
        "pre_tokenizer": {
            "type": "ByteLevel",
            "add_prefix_space": spaced,
            "use_regex": (True, None),
        },
        "decoder": {"type": "ByteLevel"},
        "post_processor": {
            "type": "RobertaProcessing",
            "cls": [cls, backend.token_to_id(cls)],
            "sep": [sep, backend.token_to_id(sep)],
            "trim_offsets": config.get("trim_offsets", True),
            "add_prefix_space": spaced,
        },
    }


def _token(name: str, kind: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": name, "type_id": kind}}


def _text(name: str, kind: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": kind}}


# Where several settings of a part are possible, they are in a tuple.
PARTS = {"BertTokenizer": _bert, "RobertaTokenizer": _roberta}
