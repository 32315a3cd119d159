"""Fold an adapter into a checkpoint on disk, as `merge` does after its checks."""

from propulsion_export.base_model.checkpoint import Checkpoint
from propulsion_export.base_model.config import read_config, save_config
from propulsion_export.base_model.loading import load_empty
from propulsion_export.base_model.tensor_files import DTYPES
from propulsion_export.merging.files import plan_files
from propulsion_export.merging.plan import plan_changes
from propulsion_export.merging.writing import Output, write_outputs
from propulsion_export.scaling.fold.listing import jobs_of
from propulsion_export.scaling.fold.stored import StoredParts, untie_as_stored_
from propulsion_export.scaling.fold.ties import check_untied


def parts_of(source, task, adapter, *, untie=False):
    """The stored parts of the model for a task, untied as far as allowed."""
    empty = load_empty(read_config(str(source)), task, head=adapter.modules, labels=adapter.labels)
    parts = StoredParts(Checkpoint.find(str(source)), empty)
    untie_as_stored_(parts)
    check_untied(empty, adapter, untie=untie)
    return parts


def fold_parts(parts, adapter, directory, *, dtype=None, max_shard_size=None):
    """Write weights alone; returns numpy's name of their dtype."""
    plan = plan_changes(parts.checkpoint, jobs_of(parts, adapter), adapter, dtype)
    write_outputs([Output(directory, plan, plan_files(plan, parts.checkpoint, max_shard_size))])
    return str(DTYPES[plan.dtype])


def fold(source, task, adapter, out, *, untie=False, **options):
    """Write weights and config.json; `dtype` is a name of the safetensors format."""
    out.mkdir(exist_ok=True)
    parts = parts_of(source, task, adapter, untie=untie)
    dtype = fold_parts(parts, adapter, out, **options)
    save_config(parts.model, out, dtype)
    return dtype
