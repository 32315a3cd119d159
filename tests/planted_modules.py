"""Plant one mistake at a known module of an artifact, and ask for the module."""

import copy
import re
import shutil
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.layout import pack, packed_inputs, to_row
from propulsion_export.artifacts.tensor_names import BANK_INPUT, IDS_INPUT
from propulsion_export.environment.progress import silent
from propulsion_export.parity.bisect.locate import locate_failures
from propulsion_export.parity.cases import judge
from propulsion_export.parity.evidence import Evidence, allowed_errors
from propulsion_export.parity.forwards import compute_whole
from propulsion_export.parity.inputs import load_recorded_base, make_batches
from propulsion_export.parity.oracle import compute_oracle
from propulsion_export.parity.own_error import ceiling_of
from propulsion_export.parity.probes import Limits, make_probes
from propulsion_export.parity.probing import judge_inputs, split
from propulsion_export.parity.quantised.verdict import quantise_base_
from propulsion_export.parity.reports.report import Check
from propulsion_export.parity.states import feeds_of
from propulsion_export.parity.subject import Subject
from propulsion_export.runners.opening import REFERENCE_LENGTH, choose_runner, open_candidate


@dataclass
class Judged:
    """An artifact, and what PyTorch computes for its first adapter, which copies are judged by."""

    directory: Path

    def __post_init__(self):
        self.artifact = Artifact.read(self.directory)
        entries = self.artifact.list_adapters()
        self.adapters = [Adapter.read(entry.source, name) for name, entry in entries.items()]
        merged = self.artifact.manifest.kind == "merged"
        self.runner = "torch" if merged else choose_runner(self.artifact, "auto")
        self.shortest = REFERENCE_LENGTH if self.runner == "reference" else None
        self.compute = compute_whole("cpu")
        self._base = load_recorded_base(self.artifact, self.adapters, None)
        self.batches = make_batches(self._base, None, 0, short=self.shortest is not None)
        quantise_base_(self.artifact, self._base, self.adapters, self.batches, self.compute)

    @property
    def adapter(self):
        return self.adapters[0]

    @property
    def base(self):
        """A copy of the base model: what computes with it rounds it to the artifact's precision."""
        return replace(self._base, model=copy.deepcopy(self._base.model))

    def locate(self, directory=None, feeds=None):
        """The first wrong module, or why there is none; the verdict is taken to have failed."""
        evidence = self._evidence(
            directory, feeds, [Subject(self.adapter.name, (), (), None, {})], []
        )
        return self._first(evidence, [Check("parity", self.adapter.name, False, "planted")])

    def locate_if_failed(self, directory=None, feeds=None):
        """The first wrong module, or why there is none; None where parity passes."""
        subjects, probed = self._expected
        evidence = self._evidence(directory, feeds, subjects, probed)
        dtype = self.artifact.manifest.dtype
        ceiling = ceiling_of(self._base.model.config, dtype)
        checks = list(judge(evidence.subjects, self.batches, evidence.runner, dtype, ceiling))
        checks += judge_inputs(evidence, allowed_errors(checks))
        failed = any(not check.passed for check in checks)
        return self._first(evidence, checks) if failed else None

    @cached_property
    def _probes(self):
        manifest = self.artifact.manifest
        limits = Limits.of(manifest, self.shortest, empty=not manifest.pads_right)
        return make_probes(self._base, 0, "standard", limits)[0]

    @cached_property
    def _expected(self):
        """What PyTorch computes for the first adapter: on the batches, and on the probes."""
        every = [*self.batches, *(probe.batch for probe in self._probes)]
        subjects = compute_oracle(
            self.artifact, self.base, self.adapters[:1], every, silent, steps=1
        )
        own = [subject for subject in subjects if subject.name == self.adapter.name]
        return split(own, len(self.batches))

    def _evidence(self, directory, feeds, subjects, probed):
        artifact = Artifact.read(directory or self.directory)
        fed = feeds or feeds_of(artifact, self.adapter.name, {})
        in_float = artifact.manifest.quantization is not None
        return Evidence(
            artifact,
            self.base,
            self.adapters,
            self.batches,
            [replace(subject, feeds=fed) for subject in subjects],
            open_candidate(artifact, self.runner, in_float=in_float),
            self.compute,
            0,
            self._probes if probed else (),
            [replace(subject, feeds=fed) for subject in probed],
        )

    def _first(self, evidence, checks):
        located, not_run = locate_failures(evidence, checks, self.runner, self.base)
        return (located or not_run)[0]

    def feeds_with(self, mistaken):
        """The inputs of the first adapter, of another one in truth."""
        layout, base = self.artifact.manifest.layout, packed_inputs(self.artifact, "base")
        packed = pack(mistaken, layout, base)
        if self.artifact.manifest.mode != "bank":
            return packed
        feeds = dict(self.artifact.feeds(self.adapter.name))
        feeds[BANK_INPUT] = feeds[BANK_INPUT].copy()
        feeds[BANK_INPUT][int(feeds[IDS_INPUT][0])] = to_row(packed, layout)
        return feeds


def slightly(values):
    return values * 1.01


def permuted(values):
    return values[::-1].copy()


def shifted(values):
    return np.roll(values, 1)


def one_channel(values):
    values = values.copy()
    values[5] *= 1.01
    return values


def lost(values):
    return np.ones_like(values)


SCALES = (slightly, permuted, shifted, one_channel, lost)


def with_scale(adapter, path, change):
    """An adapter with one mistaken scale."""
    scale = adapter.scales[path]
    changed = Scale(change(scale.values), scale.side)
    return replace(adapter, scales={**adapter.scales, path: changed})


def row_wrong(values):
    values = values.copy()
    values[1] += 0.05 * np.abs(values).max()
    return values


def all_wrong(values):
    return values * np.asarray(1.003, values.dtype)


def zeroed(values):
    return np.zeros_like(values)


def plant_in_graph(source, directory, name, change, *, file="model.onnx"):
    """A copy of an artifact with another value of one initializer of a graph."""
    shutil.copytree(source, directory)
    manifest = Artifact.read(directory).manifest
    model = ir.load(directory / file)
    value = model.graph.initializers[name]
    changed = np.ascontiguousarray(change(value.const_value.numpy()))
    value.const_value = ir.tensor(changed, name=name)
    _save(model, directory, file)
    Artifact.write(directory, manifest)
    return directory


def plant_in_nodes(source, directory, change, *, file="model.onnx"):
    """A copy of an artifact with a graph that `change(graph)` has changed."""
    shutil.copytree(source, directory)
    manifest = Artifact.read(directory).manifest
    model = ir.load(directory / file)
    change(model.graph)
    _save(model, directory, file)
    Artifact.write(directory, manifest)
    return directory


def _save(model, directory, file):
    for value in model.graph.initializers.values():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = ir.tensor(value.const_value.numpy().copy(), name=value.name)
    ir.save(model, directory / file)


WEIGHT = re.compile(r"(?P<path>.+)\.(?P<kind>weight|bias)(?P<ending>\.T)?")


def parameters_in(directory, file="model.onnx"):
    """The initializers that are parameters of a module: (name, module path, `weight` or `bias`)."""
    graph = ir.load(Path(directory) / file).graph
    found = ((name, WEIGHT.fullmatch(name)) for name in graph.initializers)
    return [(name, match["path"], match["kind"]) for name, match in found if match]
