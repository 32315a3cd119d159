"""Find the base model that adapters were trained on, and check that a model is that one."""

from collections.abc import Sequence

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.gguf.source import find_gguf
from propulsion_export.base_model.hub import check_findable
from propulsion_export.base_model.tasks import TaskName
from propulsion_export.environment.paths import user_path
from propulsion_export.errors import BaseModelError, UsageError


def adapter_tasks(adapters: Sequence[Adapter]) -> set[TaskName]:
    """The tasks that the adapters name."""
    return {adapter.task for adapter in adapters if adapter.task}


def base_source(model: str | None, adapters: Sequence[Adapter]) -> str:
    """Where the base model is: `model`, else the one base model that the adapters name.

    Raises:
        UsageError: there is neither, or the adapters name several.
    """
    if model is not None:
        return absolute(model)
    if not adapters:
        raise UsageError(
            "no base model is given and no adapter that names one, expected either",
            remedy="Give the base model with -m, or an adapter with -a.",
        )
    named = {adapter.base for adapter in adapters if adapter.base}
    if len(named) != 1:
        found = f"name the bases {', '.join(sorted(named))}" if named else "name no base model"
        raise UsageError(f"the adapters {found}, expected one", remedy="Give it with -m.")
    return absolute(named.pop())


def find_base(model: str | None, adapters: Sequence[Adapter]) -> str:
    """The same, of a base model that is here or on a hub.

    Raises:
        UsageError: as `base_source` says.
        BaseModelError: it is nowhere; says so in seconds where there is no network.
    """
    source = base_source(model, adapters)
    check_findable(source)
    return source


def absolute(source: str) -> str:
    """A local path as an absolute path, which an artifact can record; a hub name unchanged.

    Of a directory that means its GGUF file, the file.

    Raises:
        BaseModelError: a GGUF file does not exist, is one part of several, or a directory has
            several.
    """
    path = find_gguf(source) or user_path(source)
    return str(path.resolve()) if path.exists() else source


def check_base(
    found: Fingerprint,
    source: str,
    adapters: Sequence[Adapter],
    *,
    remedy: str = "Give the model it was trained on with -m.",
) -> None:
    """Refuse adapters that were trained on another base model.

    Raises:
        BaseModelError: naming the adapter and where the weights differ.
    """
    strangers = [
        f"{source}: is not the base model of adapter {adapter.name} ({difference})"
        for adapter in adapters
        if adapter.fingerprint
        # What the adapter brings whole may have been trained, or resized.
        and (difference := adapter.fingerprint.without(adapter.modules).difference(found))
    ]
    if strangers:
        raise BaseModelError(*strangers, remedy=remedy)
