"""Run both sides of a bisection: an artifact that shows all its values, and PyTorch."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.names import BASE_NAME
from propulsion_export.adapters.scales import Array
from propulsion_export.artifacts.artifact import Artifact, Runner, Tensors
from propulsion_export.artifacts.file_names import ENCODER_DECODER_FILES
from propulsion_export.base_model.dtypes import cast_
from propulsion_export.base_model.generation_settings import first_decoder_token
from propulsion_export.base_model.loading import BaseModel, load_base
from propulsion_export.base_model.tasks import TASKS
from propulsion_export.parity.bisect.marked import ADAPTER_INPUTS, mark_graph
from propulsion_export.parity.bisect.modules import Call, ModuleRun, record_modules
from propulsion_export.parity.bisect.places import Place
from propulsion_export.parity.forwards import precision
from propulsion_export.runners.decoding import Candidate, CausalModel, EncoderDecoder
from propulsion_export.runners.opening import candidate_of
from propulsion_export.runners.pytorch import (
    torch_cross_decoder_runner,
    torch_decoder_runner,
    torch_encoder_runner,
    torch_runner,
)

_CHECKPOINT = ""  # stands for a graph's file where there is none
_NONE = Adapter(BASE_NAME, scales={})


@dataclass(frozen=True)
class GraphRun:
    """One run of one graph.

    Attributes:
        graph: its file.
        feeds: the data that it was fed, without an adapter's inputs.
        values: every floating-point value that it computed or was fed.
        mask: int64 [rows, length], 0 where nothing counts; None where all does.
    """

    graph: str
    feeds: Tensors
    values: Tensors
    mask: Array | None


@dataclass
class CandidateSide:
    """An artifact that records what it computes.

    Attributes:
        candidate: runs it.
        runs: what it has computed, run by run.
        places: by graph, where the outputs of modules are.
    """

    candidate: Candidate = field(init=False)
    runs: list[GraphRun] = field(default_factory=list)
    places: dict[str, dict[Call, tuple[Place, ...]]] = field(default_factory=dict)

    def clear(self) -> None:
        """Forget the runs."""
        self.runs.clear()


def open_side(artifact: Artifact, runner: str, base: BaseModel) -> CandidateSide:
    """Open an artifact so that it records; engines cannot.

    Raises:
        PropulsionExportError: the runtime cannot load the copies of its graphs.
    """
    side = CandidateSide()
    if artifact.manifest.kind == "merged":
        side.candidate = _open_merged(artifact, side)
        return side

    def open_path(path: Path) -> Runner:
        marked = mark_graph(artifact, path.name, runner, base.model)
        side.places[path.name] = dict(marked.places)

        def run(feeds: Tensors) -> Tensors:
            found = marked.run(feeds)
            data = {n: np.asarray(v) for n, v in feeds.items() if n not in ADAPTER_INPUTS}
            both = {**data, **found}  # a module may read an input of the graph
            values = {name: np.asarray(v) for name, v in both.items() if _is_float(v)}
            side.runs.append(GraphRun(path.name, data, values, _mask_of(data)))
            return {name: found[name] for name in marked.outputs}

        return run

    side.candidate = candidate_of(artifact, open_path)
    return side


def torch_sides(
    base: BaseModel, runs: Sequence[GraphRun], adapter: Adapter, dtype: str
) -> Iterator[tuple[GraphRun, dict[Call, ModuleRun], dict[Call, ModuleRun]]]:
    """Every run with the modules' numbers in float64, and at the precision `dtype`.

    Both are fed what the graph was fed, its cache and its encoder's output too.
    """
    wide = copy.deepcopy(base.model).to("cpu", torch.float64)
    own = base.model
    cast_(own, getattr(torch, dtype), "cpu")  # as the verdict's own error was measured
    for run in runs:
        yield (
            run,
            _recorded(wide, base.task, run, adapter),
            _recorded(own, base.task, run, adapter),
        )


def _recorded(model: Any, task: str, run: GraphRun, adapter: Adapter) -> dict[Call, ModuleRun]:
    step = _torch_runner(model, task, run.graph)
    feeds = {name: _without_bfloat16(values) for name, values in run.feeds.items()}
    with precision(model.dtype):
        return record_modules(model, adapter, lambda: step(feeds))


def _without_bfloat16(values: Any) -> Any:
    """The same in float32, which holds every bfloat16: torch reads no arrays of that dtype."""
    return values.astype(np.float32) if values.dtype.kind == "V" else values


def _torch_runner(model: Any, task: str, graph: str) -> Runner:
    architecture = TASKS[task].architecture
    if architecture == "decoder":
        return torch_decoder_runner(model)
    if architecture == "encoder-decoder":
        encoding = graph == ENCODER_DECODER_FILES[0]
        return torch_encoder_runner(model) if encoding else torch_cross_decoder_runner(model)
    return torch_runner(model)


def _mask_of(data: Tensors) -> Array | None:
    """The mask of the tokens that a graph reads, not of those in its cache."""
    if "encoder_attention_mask" in data:
        return data["encoder_attention_mask"]
    mask = data.get("attention_mask")
    return None if mask is None else mask[:, -data["input_ids"].shape[1] :]


def _is_float(values: Any) -> bool:
    return getattr(values, "dtype", None) is not None and values.dtype.kind in "fV"


def _open_merged(artifact: Artifact, side: CandidateSide) -> Candidate:
    """A merged checkpoint whose modules are recorded by hooks."""
    manifest = artifact.manifest
    dtype = getattr(torch, manifest.dtype)
    model = load_base(str(artifact.directory), task=manifest.task, dtype=dtype).model

    def recording(step: Runner, graph: str) -> Runner:
        def run(feeds: Tensors) -> Tensors:
            found: list[Tensors] = []
            modules = record_modules(model, _NONE, lambda: found.append(step(feeds)))
            side.places.setdefault(graph, {}).update(
                {call: (Place((_value_of(call),)),) for call in modules}
            )
            data = {name: np.asarray(values) for name, values in feeds.items()}
            side.runs.append(GraphRun(graph, data, _values(modules), _mask_of(data)))
            return found[0]

        return run

    architecture = TASKS[manifest.task].architecture
    if architecture == "decoder":
        return CausalModel(recording(torch_decoder_runner(model), _CHECKPOINT))
    if architecture == "encoder-decoder":
        encode = recording(torch_encoder_runner(model), ENCODER_DECODER_FILES[0])
        decode = recording(torch_cross_decoder_runner(model), ENCODER_DECODER_FILES[1])
        return EncoderDecoder(encode, decode, first_decoder_token(artifact.directory))
    return recording(torch_runner(model), _CHECKPOINT)


def _value_of(call: Call) -> str:
    return f"{call[0]} {call[1]}"


def _values(modules: dict[Call, ModuleRun]) -> dict[str, Array]:
    """What modules read and return, by a name for each."""
    outputs = {_value_of(call): run.output for call, run in modules.items()}
    reads = {f"{_value_of(call)} reads": run.read for call, run in modules.items()}
    return outputs | {name: values for name, values in reads.items() if values is not None}
