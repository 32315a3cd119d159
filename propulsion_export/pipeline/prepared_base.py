"""Load the base model of an export and set in it what its adapters need."""

from collections.abc import Sequence
from dataclasses import dataclass

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.provenance import check_base
from propulsion_export.artifacts.manifest import Mode
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.loading import BaseModel
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.environment.stages import stage
from propulsion_export.graph.slots import SlotOptions, slots_for
from propulsion_export.pipeline.base_room import load_with_room, resize_
from propulsion_export.pipeline.base_settings import Settled, settle_
from propulsion_export.pipeline.text_files import TextFiles


@dataclass(frozen=True)
class PreparedBase:
    """A base model ready to be exported in a mode.

    Attributes:
        base: the base model, its head as wide as the mode needs it.
        fingerprint: of the base model as it was loaded.
        slots: adapters that together have a tensor for every slot; none where the base model is
            exported alone.
        settled: the settings of its artifact.
    """

    base: BaseModel
    fingerprint: Fingerprint
    slots: Sequence[Adapter]
    settled: Settled


def prepare_base(
    source: str,
    texts: TextFiles,
    adapters: Sequence[Adapter],
    mode: Mode,
    options: SlotOptions,
) -> PreparedBase:
    """Load a base model for its task with room for its adapters, and settle its configuration.

    Args:
        source: path or name of the base model.
        texts: the tokenizer of the artifact, for the task.
        adapters: those of the artifact; may be none.
        mode: how the artifact holds its adapters; `bank` needs what `switchable` does.
        options: without adapters, which slots to make for those to come.

    Raises:
        PropulsionExportError: the model cannot be loaded or exported, or is not the one that the
            adapters were trained on.
    """
    trusted = texts.trust_remote_code
    with stage("load"):
        base = load_with_room(
            source, texts.task, adapters, mode, options, trust_remote_code=trusted
        )
        fingerprint = fingerprint_of_model(base.model)
        check_base(fingerprint, source, adapters)
        resize_(base, adapters, mode, trust_remote_code=trusted)
        texts.check_tokens(base.model.config)
        settled = settle_(base.model, adapters, texts, mode=mode, own_head=base.own_head)
        alone = mode == "folded" and not adapters
        slots = adapters or ([] if alone else [slots_for(base, options)])
    return PreparedBase(base, fingerprint, slots, settled)
