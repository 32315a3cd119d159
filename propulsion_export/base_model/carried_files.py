"""The small files of a base model that go with its weights, whatever is folded into them."""

from fnmatch import fnmatchcase
from pathlib import Path

from propulsion_export.base_model.hub import copy_files, file_names

# What a licence asks to be kept, in capital letters.
_TERMS = ("LICEN[CS]E*", "NOTICE*", "COPYING*", "USE_POLICY*", "USE-POLICY*")
# How images, sounds and videos are read, for transformers and servers.
_PROCESSORS = (
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "feature_extractor_config.json",
    "video_preprocessor_config.json",
)


def carry_files(source: str, directory: Path) -> None:
    """Copy a base model's terms of use and settings of processors, but what is there already.

    Not its README: a model card speaks of the model that was not merged.

    Args:
        source: path or name of the base model.
        directory: of the merged checkpoint, with the files that the merge writes itself.
    """
    there = {path.name for path in directory.iterdir()}
    copy_files([name for name in file_names(source) if _is_carried(name, there)], source, directory)


def _is_carried(name: str, there: set[str]) -> bool:
    terms = any(fnmatchcase(name.upper(), pattern) for pattern in _TERMS)
    return (terms or name in _PROCESSORS) and name not in there
