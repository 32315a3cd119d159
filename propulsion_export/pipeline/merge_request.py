"""What `merge` is asked for one adapter, and what is prepared before anything is written."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.manifest import AdapterEntry, BaseEntry, Manifest
from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.tasks import TaskName
from propulsion_export.base_model.tensor_files import DTYPES
from propulsion_export.environment.machine import tool_versions
from propulsion_export.merging.plan import Plan


@dataclass(frozen=True)
class MergeRequest:
    """One adapter and the base model to fold it into.

    Attributes:
        source: the base model's directory, name or GGUF file.
        adapter: the adapter.
        directory: the adapter's.
        task: one of `TASKS`, or `auto`.
        dtype: the format's name of the dtype to write, such as `BF16`; None keeps each.
        untie: whether a scaled weight that is shared gets a copy of its own.
        trust_remote_code: whether code of the base model may run.
    """

    source: str
    adapter: Adapter
    directory: str
    task: str
    dtype: str | None
    untie: bool
    trust_remote_code: bool


@dataclass(frozen=True)
class Prepared:
    """A merge that was checked and can be written.

    Attributes:
        checkpoint: the base model's.
        plan: what becomes of each tensor.
        manifest: of the artifact, without digests.
        note: what else the artifact changes, for a progress message; may be empty.
        write_small_files: writes config.json, the tokenizer and so on into a directory.
    """

    checkpoint: Checkpoint
    plan: Plan
    manifest: Manifest
    note: str
    write_small_files: Callable[[Path], None]


def merged_manifest(
    request: MergeRequest, entry: AdapterEntry, base: BaseEntry, task: TaskName, plan: Plan
) -> Manifest:
    """The manifest of a merged checkpoint, without digests."""
    return Manifest(
        kind="merged",
        mode="folded",
        task=task,
        dtype=str(DTYPES[plan.dtype]),  # type: ignore[arg-type]
        base=base,
        adapters={request.adapter.name: entry},
        tools=tool_versions(),
    )
