"""The layout of a graph's packed inputs: where each tensor of an adapter is in them.

`propulsion_scales` holds all scales, `propulsion_biases` all trained biases, `propulsion_modules`
all parameters of modules saved whole (the head). One file with these three vectors is one adapter,
ready to be fed. A slot that an adapter has no tensor for keeps the base model's value. A row of a
bank holds the same three vectors one after the other.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Tensors
from propulsion_export.artifacts.manifest import Slot
from propulsion_export.artifacts.rounding import numpy_dtype, rounded
from propulsion_export.artifacts.tensor_names import (
    BANK_INPUT,
    BIASES_INPUT,
    IDS_INPUT,
    MODULES_INPUT,
    SCALES_INPUT,
)
from propulsion_export.errors import AdapterError, UsageError

Layout = Mapping[str, tuple[Slot, ...]]

# The largest relative rounding error of a scale that is accepted in a dtype.
_ROUNDING = {"float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


def plan_layout(
    adapters: Sequence[Adapter], order: Sequence[str], label_parameters: Iterable[str] = ()
) -> Layout:
    """Give every tensor of any adapter its slot.

    Args:
        adapters: the adapters to be exported together.
        order: all module paths and parameter names of the model, in the model's own order; the
            scale of expert weights has the parameter's name.
        label_parameters: parameters whose first dimension counts labels; their slots fit the
            adapter with the most labels.

    Raises:
        AdapterError: two adapters give one tensor different shapes, or one is not in `order`.
    """
    position = {name: index for index, name in enumerate(order)}
    _check_known(adapters, position)
    scales: dict[tuple[str, str], tuple[int, ...]] = {}
    biases: dict[tuple[str, str], tuple[int, ...]] = {}
    modules: dict[tuple[str, str], tuple[int, ...]] = {}
    growing = set(label_parameters)
    for adapter in adapters:
        for path, scale in adapter.scales.items():
            _reserve(scales, (path, scale.side), scale.values.shape, adapter)
        for path, bias in adapter.biases.items():
            _reserve(biases, (path, "output"), bias.shape, adapter)
        for name, values in adapter.modules.items():
            _reserve(modules, (name, "output"), values.shape, adapter, grows=name in growing)
    wanted = {SCALES_INPUT: scales, BIASES_INPUT: biases, MODULES_INPUT: modules}
    return {
        packed: _slots(sorted(shapes.items(), key=lambda item: (position[item[0][0]], item[0][1])))
        for packed, shapes in wanted.items()
        if shapes
    }


def pack(adapter: Adapter, layout: Layout, defaults: Tensors) -> dict[str, Array]:
    """The feeds of the packed inputs for one adapter, shape [D] each, in the dtype of `defaults`.

    Raises:
        AdapterError: the layout has no slot for one of the adapter's tensors, or one too small.
    """
    feeds = {name: np.array(values) for name, values in defaults.items()}
    missing: list[str] = []
    for packed, tensors in _tensors(adapter).items():
        slots = {(slot.path, str(slot.side)): slot for slot in layout.get(packed, ())}
        for key, values in tensors.items():
            slot = slots.get(key)
            if slot is None or not _fits(values.shape, slot.shape, packed):
                room = f"room for shape {list(slot.shape)}" if slot else "no slot for it"
                missing.append(
                    f"{adapter.name}: {key[0]} has shape {list(values.shape)}, the artifact {room}"
                )
                continue
            part = np.zeros(slot.shape, np.float64)
            part[tuple(map(slice, values.shape))] = values
            place = slice(slot.offset, slot.offset + slot.length)
            feeds[packed][place] = rounded(part.reshape(-1), feeds[packed].dtype)
    if missing:
        raise AdapterError(
            *missing, remedy="Export again with this adapter among those given by -a."
        )
    return feeds


def labels_in(
    adapter: Adapter,
    layout: Layout,
    base: tuple[str, ...] | None,
    room: int | None = None,
) -> tuple[str, ...] | None:
    """The adapter's class names; `base`, the base model's, if it uses the base model's head.

    A head without names that is as wide as the checkpoint's own keeps the names of that one. Else
    they are `LABEL_0` and so on if the head has fewer rows than its slot: the other logits are
    padding, which must never be predicted.

    Args:
        adapter: the adapter.
        layout: of the artifact's packed inputs.
        base: the class names of the base model.
        room: how many labels the head of the artifact has room for; None if `base` are not the
            names of the checkpoint's own head.
    """
    if adapter.labels is not None:
        return adapter.labels
    if not adapter.modules:
        return base
    shapes = {slot.path: slot.shape for slot in layout.get(MODULES_INPUT, ())}
    counts = {
        values.shape[0]
        for name, values in adapter.modules.items()
        if name in shapes and values.shape != shapes[name]
    }
    count = counts.pop() if counts else None
    if base is not None and room is not None and len(base) == (count or room):
        return base
    return None if count is None else tuple(f"LABEL_{number}" for number in range(count))


def parts_of_one_side(layout: Layout) -> tuple[Layout, ...]:
    """The layout in parts that one adapter each can fill: it scales a module on one side only.

    The second part, of input sides, is there only if some module is scaled on both. Biases and
    saved modules are in each part.
    """
    scales = layout.get(SCALES_INPUT, ())
    outputs = {slot.path for slot in scales if slot.side == "output"}
    both = tuple(slot for slot in scales if slot.side == "input" and slot.path in outputs)
    if not both:
        return (layout,)
    rest = tuple(slot for slot in scales if slot not in both)
    return ({**layout, SCALES_INPUT: rest}, {**layout, SCALES_INPUT: both})


def width_of(layout: Layout) -> int:
    """D, the number of elements of one adapter in all packed inputs together."""
    return sum(slot.length for slots in layout.values() for slot in slots)


def to_row(feeds: Tensors, layout: Layout) -> Array:
    """The packed inputs of one adapter, one after the other, as its row of a bank, [D]."""
    return np.concatenate([feeds[packed] for packed in layout])


def packed_inputs(artifact: Artifact, adapter: str) -> Tensors:
    """The packed inputs, [D] each, of an adapter or the base model, from a file or a bank.

    Raises:
        UnknownAdapterError: there is no such adapter.
        ArtifactError: the adapter cannot be read.
    """
    feeds, layout = artifact.feeds(adapter), artifact.manifest.layout
    if artifact.manifest.mode != "bank":
        return feeds
    row = feeds[BANK_INPUT][int(feeds[IDS_INPUT][0])]
    ends = np.cumsum([sum(slot.length for slot in slots) for slots in layout.values()])
    return dict(zip(layout, np.split(row, ends[:-1]), strict=True))


def check_range(adapter: Adapter, dtype: str) -> None:
    """Refuse scales that overflow, vanish or round badly in `dtype`, and other overflows.

    Raises:
        UsageError: naming each module path with its worst channel.
    """
    target = numpy_dtype(dtype)
    findings = []
    for path, scale in adapter.scales.items():
        stored = rounded(scale.values, target).astype(np.float64)
        with np.errstate(over="ignore"):
            off = np.abs(stored - scale.values) / np.where(
                scale.values == 0, 1, np.abs(scale.values)
            )
        off = np.where(np.isfinite(stored), off, np.inf)
        worst = np.unravel_index(int(off.argmax()), off.shape)
        if off[worst] > _ROUNDING[dtype]:
            channel = f"{worst[-1]}" + (f" of expert {worst[0]}" if len(worst) > 1 else "")
            findings.append(
                f"{path}: scale {scale.values[worst]:.4g} of channel {channel} becomes "
                f"{stored[worst]:.4g} in {dtype} ({int((off > _ROUNDING[dtype]).sum())} such "
                "channels)"
            )
    for name, values in {**adapter.biases, **adapter.modules}.items():
        beyond = ~np.isfinite(rounded(values, target))
        if beyond.any():
            findings.append(f"{name}: {int(beyond.sum())} trained values are too large for {dtype}")
    if findings:
        raise UsageError(
            *findings, remedy="Export in float32, or accept the rounding with --allow-range."
        )


def _tensors(adapter: Adapter) -> dict[str, dict[tuple[str, str], Array]]:
    return {
        SCALES_INPUT: {(path, s.side): s.values for path, s in adapter.scales.items()},
        BIASES_INPUT: {(path, "output"): bias for path, bias in adapter.biases.items()},
        MODULES_INPUT: {(name, "output"): values for name, values in adapter.modules.items()},
    }


def _check_known(adapters: Sequence[Adapter], position: Mapping[str, int]) -> None:
    unknown = [
        f"{adapter.name}: {name} is not in the base model"
        for adapter in adapters
        for name in (*adapter.scales, *adapter.biases, *adapter.modules)
        if name not in position
    ]
    if unknown:
        raise AdapterError(*unknown, remedy="Was the adapter trained on this base model?")


def _reserve(
    shapes: dict[tuple[str, str], tuple[int, ...]],
    key: tuple[str, str],
    shape: tuple[int, ...],
    adapter: Adapter,
    *,
    grows: bool = False,
) -> None:
    known = shapes.setdefault(key, shape)
    if known == shape:
        return
    if not grows or not known or not shape or known[1:] != shape[1:]:
        raise AdapterError(
            f"{adapter.name}: {key[0]} has shape {list(shape)}, another adapter's {list(known)}",
            remedy="Adapters of one artifact must be trained on one base model.",
        )
    shapes[key] = (max(known[0], shape[0]), *shape[1:])


def _slots(shapes: Iterable[tuple[tuple[str, str], tuple[int, ...]]]) -> tuple[Slot, ...]:
    slots, offset = [], 0
    for (path, side), shape in shapes:
        length = int(np.prod(shape))
        slots.append(Slot(path, offset, length, shape, "input" if side == "input" else "output"))
        offset += length
    return tuple(slots)


def _fits(shape: tuple[int, ...], room: tuple[int, ...], packed: str) -> bool:
    """Whether a tensor fits its slot: the same shape, or a head with fewer labels."""
    if shape == room or packed != MODULES_INPUT:
        return shape == room
    return len(shape) == len(room) > 0 and shape[0] <= room[0] and shape[1:] == room[1:]
