"""Find and copy single files of a model, in a directory, from a GGUF file or on a hub."""

import shutil
import time
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath

from propulsion_export.base_model.gguf.files import small_files
from propulsion_export.base_model.gguf.source import is_gguf
from propulsion_export.environment.hub_files import refuse_pointers
from propulsion_export.environment.paths import user_path
from propulsion_export.environment.quiet import quiet
from propulsion_export.errors import BaseModelError, first_line

_SECONDS = 5.0  # until a hub that does not answer counts as out of reach
_REMEDY = "Give the base model's directory with -m."


def locate(source: str, name: str) -> Path | None:
    """The path of a model's file, downloaded if necessary; None if the model does not have it.

    Raises:
        BaseModelError: only the pointer that git-lfs left is there, or the model is a GGUF file
            that is refused.
    """
    file = _found(source, name)
    if file is not None:
        refuse_pointers([file], BaseModelError)
    return file


def _found(source: str, name: str) -> Path | None:
    source = small_files(source)
    directory = Path(source)
    if directory.is_dir():
        return directory / name if (directory / name).is_file() else None
    from transformers.utils import cached_file

    try:
        with quiet():
            file = cached_file(
                source,
                name,
                local_files_only=only_cached(source),
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
    except OSError:  # neither a directory nor a possible name
        return None
    return Path(file) if file is not None else None


def check_findable(source: str) -> None:
    """Refuse a file that is no GGUF file, and a base model that is neither here nor on a hub.

    Without a network that takes seconds; huggingface_hub alone asks again for each file, for
    minutes together.

    Raises:
        BaseModelError: says what was looked for.
    """
    path = user_path(source)
    if path.is_file() and not is_gguf(path):
        raise BaseModelError(
            f"{source}: is a file, expected a directory with a transformers checkpoint, or a GGUF "
            "file",
            remedy=_REMEDY,
        )
    if path.exists():
        return
    if source.startswith(("/", ".", "~")) or source.count("/") > 1:  # no name on a hub
        raise BaseModelError(
            f"{source}: does not exist, expected a directory with a transformers checkpoint",
            remedy=_REMEDY,
        )
    if (reason := _unreachable(source)) is None:
        return
    if locate(source, "config.json") is None:
        raise BaseModelError(
            f"{source}: there is no directory of this name, and as a name on a hub it is not in "
            f"the cache and {reason}",
            remedy=_REMEDY,
        )


def only_cached(source: str) -> bool:
    """Whether a model's files have to come from a hub's cache, since no hub answers.

    transformers and huggingface_hub are to be told: they would ask again for each file.
    """
    return not user_path(source).is_dir() and _unreachable(source) is not None


def _unreachable(source: str) -> str | None:
    """Why a hub cannot be asked for a model; None if it answers, whatever it says."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HFValidationError

    try:
        hf_hub_url(source, "config.json")
    except HFValidationError:
        return "is no name that a hub has"
    return _unreachable_hub(source, int(time.monotonic() // 60))


@lru_cache(maxsize=16)
def _unreachable_hub(source: str, _: int) -> str | None:
    """The same; it is asked once a minute and once for each model."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    # Its bases are errors of the HTTP client, which differs between versions of huggingface_hub.
    failures: tuple[type[Exception], ...] = (OSError, *HfHubHTTPError.__bases__)
    try:
        with quiet():
            get_hf_file_metadata(hf_hub_url(source, "config.json"), timeout=_SECONDS)
    except HfHubHTTPError:  # an answer
        return None
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set"
    except failures as error:
        return f"{constants.ENDPOINT} cannot be reached ({first_line(error)})"
    return None


def leads_inside(name: str) -> bool:
    """Whether the name of a file stays inside the model that it is a file of."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and bool(path.name)


def file_names(source: str) -> list[str]:
    """The names of a model's files, without those in folders.

    Of a hub that does not answer, or not everybody, those in its cache.
    """
    directory = Path(small_files(source))
    if not directory.is_dir() and _unreachable(source) is None:
        from huggingface_hub import list_repo_files
        from huggingface_hub.errors import HfHubHTTPError

        try:
            with quiet():
                return sorted(name for name in list_repo_files(source) if "/" not in name)
        except HfHubHTTPError:  # such as that of a private model
            pass
    if not directory.is_dir():
        config = locate(source, "config.json")
        if config is None:
            return []
        directory = config.parent
    return sorted(file.name for file in directory.iterdir() if file.is_file())


def copy_files(names: Sequence[str], source: str, directory: Path) -> None:
    """Copy the named files unchanged, as far as the model has them."""
    for name in names:
        file = locate(source, name)
        if file is not None:
            shutil.copyfile(file, directory / name)
