"""Load the base model of an export with room for what its adapters bring: heads and embeddings."""

from collections.abc import Sequence

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.head_room import labels_of
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.base_model.block_attention import check_one_attention
from propulsion_export.base_model.loading import BaseModel, load_base
from propulsion_export.base_model.model_inputs import check_inputs
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.errors import AdapterError, UsageError
from propulsion_export.graph.slots import SlotOptions, head_parameters
from propulsion_export.scaling.resizing import resize_for_

DEFAULT_MAX_LABELS = 16


def load_with_room(
    source: str,
    task: str,
    adapters: Sequence[Adapter],
    mode: Mode,
    slots: SlotOptions,
    *,
    trust_remote_code: bool,
) -> BaseModel:
    """Load the base model with the head to fold, or with room for its own and the largest.

    Args:
        source: path or name of the base model.
        task: one of `TASKS`.
        adapters: those of the artifact; may be none.
        mode: how the artifact holds its adapters.
        slots: without adapters, how much room to make for those to come.
        trust_remote_code: run code that the base model brings.

    Raises:
        BaseModelError: it cannot be loaded, or neither it nor the adapters have the whole head.
        UsageError: the options for slots do not fit its head.
    """
    base = load_base(source, task=task, trust_remote_code=trust_remote_code)
    check_one_attention(base.model.config, source)
    check_inputs(type(base.model), base.model.config, source, generates=TASKS[task].generates)
    for adapter in adapters:
        base.check_complete(adapter.modules)
    if not adapters:
        _make_room_for_slots_(base, mode, slots)
        return base
    count = labels_of(adapters, base.label_parameters)
    if count is None:
        return base
    if mode == "folded" or not base.own_head:
        same = base.own_head and count == len(base.own_labels)
        base.make_room_(count, adapters[0].labels or (base.own_labels if same else ()))
    else:
        base.make_room_(max(count, len(base.own_labels)), base.own_labels)
    return base


def _make_room_for_slots_(base: BaseModel, mode: Mode, slots: SlotOptions) -> None:
    """Make the head as wide as adapters to come may need; without slots it must be complete."""
    if mode == "folded" or not base.label_parameters:
        base.check_complete(())
        if slots.max_labels is not None:
            raise UsageError(
                f"--max-labels: {base.task} has no head that counts labels",
                remedy="Leave it out, or give another --task.",
            )
        return
    base.check_complete(head_parameters(base))
    own = base.own_labels if base.own_head else ()
    if slots.max_labels is not None and slots.max_labels < len(own):
        raise UsageError(
            f"--max-labels: {slots.max_labels}, expected at least the {len(own)} labels of the "
            "base model's own head"
        )
    base.make_room_(max(slots.max_labels or DEFAULT_MAX_LABELS, len(own)), own)


def resize_(
    base: BaseModel, adapters: Sequence[Adapter], mode: Mode, *, trust_remote_code: bool
) -> None:
    """Give the base model as many embeddings as the adapter to fold was trained with, in place.

    Raises:
        AdapterError: an adapter with other embeddings than the base model's is not to be folded.
    """
    for adapter in adapters:
        rows = resize_for_(base, adapter, trust_remote_code=trust_remote_code)
        if rows is not None and mode != "folded":
            raise AdapterError(
                f"adapter {adapter.name}: its embeddings were resized to {rows} rows, expected the "
                f"base model's own with --mode {mode}",
                remedy="Export it on its own with --mode folded.",
            )
