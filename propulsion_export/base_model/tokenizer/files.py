"""Find every file of a checkpoint that belongs to its tokenizer.

Which files those are is said by the tokenizer's class, by tokenizer_config.json, and by the code
that a checkpoint brings.
"""

import ast
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from propulsion_export.base_model.config import settings_in
from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.base_model.hub import leads_inside, locate, only_cached
from propulsion_export.base_model.remote_code import AUTO_MAP, present_modules
from propulsion_export.environment.quiet import quiet

TOKENIZER_CONFIG = "tokenizer_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json")
TEMPLATE_DIRECTORY = "additional_chat_templates"
# What the tokenizer classes of transformers 5.24 name; a test looks for more in the transformers
# installed. A class may need a package to be asked itself.
VOCABULARY_FILES = (
    "tokenizer.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "bpe.codes",
    "dict.txt",
    "emoji.json",
    "byte_maps.json",
    "entity_vocab.json",
    "normalizer.json",
    "prophetnet.tokenizer",
    "sentencepiece.bpe.model",
    "sentencepiece.model",
    "source.spm",
    "spiece.model",
    "spm.model",
    "spm_char.model",
    "target.spm",
    "target_vocab.json",
    "tekken.json",
    "tiktoken.model",
    "tokenizer.model",
    "vocab-src.json",
    "vocab-tgt.json",
    "word_pronunciation.json",
    "word_shape.json",
)
# Vocabularies that transformers converts for any class that can also read tokenizer.json.
CONVERTED = ("tekken.json", "tiktoken.model", "tokenizer.model")
# Arguments whose files a class can do without.
_OPTIONAL = ("tokenizer_file", "tokenizer_config_file", "normalizer_file", "target_vocab_file")
_NAMED_IN_CODE = ("VOCAB_FILES_NAMES", "vocab_files_names")


def tokenizer_files(source: str, *, ask_classes: bool = True) -> dict[str, Path]:
    """The files of a checkpoint's tokenizer, by path in the checkpoint; empty without a tokenizer.

    They include chat templates and the modules of a tokenizer that is code of its own.

    Args:
        source: the checkpoint's directory or name.
        ask_classes: ask the tokenizer's class of transformers too, which imports it; without, it
            is one that names no more than `VOCABULARY_FILES`.
    """
    found = _located(source, VOCABULARY_FILES)
    if not found:
        return {}
    settings = settings_in(source, TOKENIZER_CONFIG)
    modules = present_modules(source, settings.get(AUTO_MAP))
    names = [*_versioned(settings), *(_named_by_classes(source, settings) if ask_classes else ())]
    for module in modules.values():
        names += _named_in_code(module)
    names += [*_TEMPLATES, *_more_templates(source)]
    return found | modules | _located(source, names)


def class_names(source: str, settings: Mapping[str, Any]) -> list[str]:
    """The tokenizer classes that a checkpoint may mean, the one it names first."""
    from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING_NAMES

    config = settings_in(source, "config.json")
    kind = config.get("model_type")
    known = TOKENIZER_MAPPING_NAMES.get(kind) if isinstance(kind, str) else None
    names = (settings.get("tokenizer_class"), config.get("tokenizer_class"), known)
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


def class_called(name: str) -> Any | None:
    """The tokenizer class of that name; None where transformers knows none.

    It is a stand-in that raises ImportError when used if a package is not installed.
    """
    from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

    with quiet():
        return tokenizer_class_from_name(name)


def required_files(tokenizer_class: Any) -> list[str]:
    """The files that a class reads its vocabulary from where there is no tokenizer.json."""
    named = _vocab_files(tokenizer_class)
    return [name for argument, name in named.items() if argument not in _OPTIONAL]


def _located(source: str, names: Iterable[str]) -> dict[str, Path]:
    inside = [name for name in dict.fromkeys(names) if leads_inside(name)]
    located = {name: locate(source, name) for name in inside}
    return {name: path for name, path in located.items() if path is not None}


def _versioned(settings: Mapping[str, Any]) -> list[str]:
    """Tokenizers for older versions of transformers, such as `tokenizer.4.0.0.json`."""
    names = settings.get("fast_tokenizer_files")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


def _named_by_classes(source: str, settings: Mapping[str, Any]) -> Iterator[str]:
    for name in class_names(source, settings):
        yield from _vocab_files(class_called(name)).values()


def _vocab_files(tokenizer_class: Any) -> dict[str, str]:
    """The files that a class names, by argument; none of a stand-in for a missing package."""
    try:
        return {
            argument: name for argument, name in tokenizer_class.vocab_files_names.items() if name
        }
    except (AttributeError, ImportError):
        return {}


def _named_in_code(module: Path) -> Iterator[str]:
    """The files that a tokenizer's own class names, read from its code, which is not run."""
    try:
        tree = ast.parse(module.read_text(encoding="utf-8"))
    except (SyntaxError, ValueError, OSError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            names = {target.id for target in node.targets if isinstance(target, ast.Name)}
            values = [value for value in node.value.values if isinstance(value, ast.Constant)]
            if names & set(_NAMED_IN_CODE):
                yield from (value.value for value in values if isinstance(value.value, str))


def _more_templates(source: str) -> list[str]:
    source = small_files(source)
    directory = Path(source)
    if directory.is_dir():
        files = sorted((directory / TEMPLATE_DIRECTORY).glob("*.jinja"))
        return [f"{TEMPLATE_DIRECTORY}/{file.name}" for file in files]
    from transformers.utils.hub import list_repo_templates

    try:
        with quiet():
            found = list_repo_templates(source, local_files_only=only_cached(source))
    except (OSError, ValueError):
        return []
    return [f"{TEMPLATE_DIRECTORY}/{name}" for name in found]
