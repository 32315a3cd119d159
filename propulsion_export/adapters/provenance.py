"""The base model that adapters were trained on: where it is, and whether a model is it."""

from collections.abc import Sequence
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tasks import TaskName
from propulsion_export.errors import (
    BaseModelError,
    UsageError,
)


def adapter_tasks(adapters: Sequence[Adapter]) -> set[TaskName]:
    """The tasks that the adapters name."""
    return {adapter.task for adapter in adapters if adapter.task}


def base_source(model: str | None, adapters: Sequence[Adapter]) -> str:
    """Where the base model is: as said, else where the adapters say.

    Raises:
        UsageError: nobody says.
    """
    if model is not None:
        return absolute(model)
    told = {adapter.base for adapter in adapters if adapter.base}
    if len(told) != 1:
        found = f"name the bases {', '.join(sorted(told))}" if told else "do not name a base model"
        raise UsageError(f"the adapters {found}, expected one", remedy="Give it with -m.")
    return absolute(told.pop())


def absolute(source: str) -> str:
    """A local path made absolute, so that an artifact finds it from anywhere; a name as it is."""
    directory = Path(source).expanduser()
    return str(directory.resolve()) if directory.exists() else source


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
        if adapter.fingerprint and (difference := adapter.fingerprint.difference(found))
    ]
    if strangers:
        raise BaseModelError(*strangers, remedy=remedy)
