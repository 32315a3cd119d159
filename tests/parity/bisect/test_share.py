"""How many planted mistakes are found at the module they were planted at; prints the shares.

A mistake counts if parity fails of it: one within the tolerance is no failure to locate.
"""

from dataclasses import dataclass
from itertools import cycle

import numpy as np
import onnx_ir as ir
import pytest
from planted_modules import (
    SCALES,
    Judged,
    all_wrong,
    parameters_in,
    plant_in_graph,
    plant_in_nodes,
    row_wrong,
    with_scale,
    zeroed,
)

from propulsion_export import export_onnx
from propulsion_export.graph.genai.nodes import Nodes
from propulsion_export.graph.quantisation.reading import parameter_of
from propulsion_export.parity.reports.located import Located
from propulsion_export.scaling.layer_rules import layer_kind

LEAST = 0.95
MODES = ("folded", "switchable", "bank")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "mpnet")
DECODERS = ("gpt2", "llama", "gemma3", "qwen3", "opt")
GENAI = ("llama", "qwen3", "gemma2")
CLASSIFIER = "text-classification"


@dataclass(frozen=True)
class Case:
    """One artifact to plant mistakes in; `quantize`: options of the export."""

    kind: str
    mode: str
    dtype: str = "keep"
    exporter: str = "transformers"
    quantize: tuple = ()

    @property
    def task(self):
        return CLASSIFIER if self.kind in ENCODERS else None


def each_mode(kinds, modes=MODES, **options):
    return [Case(kind, mode, **options) for kind in kinds for mode in modes]


def one_mode_each(kinds, **options):
    return [Case(kind, mode, **options) for kind, mode in zip(kinds, cycle(MODES), strict=False)]


def quantised(**quantize):
    """A BERT in every mode and a Llama."""
    options = {"quantize": tuple(quantize.items())}
    return [*each_mode(["bert"], **options), *each_mode(["llama"], MODES[:2], **options)]


TWO = MODES[:2]
GROUPS = {
    "float32, encoders": each_mode(ENCODERS),
    "float32, decoders": each_mode(DECODERS),
    "float32, encoder-decoders": each_mode(("t5", "bart"), TWO),
    "float32, genai's builder": each_mode(GENAI, TWO, exporter="genai"),
    "float16, encoders": one_mode_each(ENCODERS, dtype="float16"),
    "float16, decoders": one_mode_each(DECODERS, dtype="float16"),
    # transformers' code of BART branches on values in float16, so that it cannot be traced.
    "float16, encoder-decoders": each_mode(["t5"], TWO, dtype="float16"),
    "bfloat16": [
        *one_mode_each(("bert", "llama", "distilbert"), dtype="bfloat16"),
        Case("bart", "folded", dtype="bfloat16"),
    ],
    "int4": quantised(quantize="int4"),
    "int8": quantised(quantize="int8"),
    "int8 in the form qdq": quantised(quantize="int8", quantization_form="qdq"),
    "int4, genai's builder": each_mode(
        ["llama"], TWO, exporter="genai", quantize=(("quantize", "int4"),)
    ),
}


@dataclass
class Planted:
    """A mistake, where it is, and what was found; None where parity passes."""

    kind: str
    path: str
    found: object
    same: set

    @property
    def counts(self):
        return self.found is not None

    @property
    def right(self):
        return isinstance(self.found, Located) and self.found.path in self.same


def all_far_off(values):
    return values * np.asarray(1.05, values.dtype)


# 0.3 % is within the tolerance of 16 bits.
SIZES = {"float32": all_wrong, "float16": all_far_off, "bfloat16": all_far_off}


def same_modules(model):
    """By module path, the paths of all modules that have the same weight."""
    owners = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name.rpartition(".")[0])
    return {path: paths for paths in owners.values() for path in paths}


def scales_planted(judged, step):
    """Mistaken scales, of another kind from module to module."""
    if judged.artifact.manifest.mode == "folded":
        return
    paths = [path for path, scale in judged.adapter.scales.items() if scale.values.ndim == 1]
    same = same_modules(judged.base.model)
    for path, change in zip(paths[::step], cycle(SCALES), strict=False):
        feeds = judged.feeds_with(with_scale(judged.adapter, path, change))
        found = judged.locate_if_failed(feeds=feeds)
        yield Planted(f"scale {change.__name__}", path, found, same.get(path, {path}))


def weights_planted(judged, place, step):
    """Wrong weights and lost biases of the graphs' initializers."""
    model, off = judged.base.model, SIZES[judged.artifact.manifest.dtype]
    modules, same = dict(model.named_modules(remove_duplicate=False)), same_modules(model)
    changes = {"linear": cycle((row_wrong, off)), "conv1d": cycle((row_wrong, off))}
    for file in judged.artifact.manifest.graphs or ("model.onnx",):
        found = parameters_in(judged.directory, file)
        for index, (name, path, kind) in list(enumerate(found))[::step]:
            change = off if kind == "weight" else zeroed
            if path in modules and kind == "weight":
                change = next(changes.get(layer_kind(modules[path]), cycle((off,))))
            directory = plant_in_graph(
                judged.directory, place / f"{file}-{index}", name, change, file=file
            )
            located = judged.locate_if_failed(directory)
            yield Planted(f"{kind} {change.__name__}", path, located, same.get(path, {path}))


def epsilons_planted(judged, place, step):
    """An epsilon of 1e-3 in each LayerNormalization."""
    for file in judged.artifact.manifest.graphs or ("model.onnx",):
        graph = ir.load(judged.directory / file).graph
        nodes = [node for node in graph if node.op_type == "LayerNormalization"]
        for node in nodes[::step]:
            name = str(node.inputs[1].name)

            def change(graph, wanted=node.name):
                found = next(each for each in graph if each.name == wanted)
                found.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-3)

            directory = plant_in_nodes(
                judged.directory, place / f"epsilon-{file}-{name}", change, file=file
            )
            path = name.removesuffix(".weight")
            yield Planted("epsilon", path, judged.locate_if_failed(directory), {path})


def neighbouring(values):
    return np.roll(values, 1, 0)


def one_step(values):
    """The first scale a tenth larger."""
    values = values.copy()
    values.reshape(-1)[0] *= 1.1
    return values


# By operator, where the integers and the scales are among the inputs.
QUANTISED_INPUTS = {"MatMulNBits": (1, 2), "DequantizeLinear": (0, 1)}


def integers_planted(judged, place, step):
    """Integers and scales of quantised weights that are the neighbouring channel's, or off."""
    graph = ir.load(judged.directory / "model.onnx").graph
    nodes = [node for node in graph if node.op_type in QUANTISED_INPUTS]
    same = same_modules(judged.base.model)
    changes = cycle(((0, neighbouring), (1, neighbouring), (1, one_step)))
    for node, (at, change) in zip(nodes[::step], changes, strict=False):
        name = node.inputs[QUANTISED_INPUTS[node.op_type][at]].name
        path = parameter_of(node.name).removesuffix(".T").removesuffix(".weight")
        directory = plant_in_graph(judged.directory, place / f"integers-{path}", name, change)
        located = judged.locate_if_failed(directory)
        kind = f"{('integers', 'block scales')[at]} {change.__name__}"
        yield Planted(kind, path, located, same.get(path, {path}))


def one_entry(channel):
    def change(values):
        values = values.copy()
        values[..., channel] += 0.05 * np.abs(values).max()
        return values

    return change


def one_row_of_scales(channel, channels):
    def change(values):
        rows = values.copy().reshape(channels, -1)
        rows[channel] *= 1.1
        return rows.reshape(values.shape)

    return change


def builder_weights_planted(judged, place, step):
    """Wrong channels of the products in a graph of onnxruntime-genai's builder."""
    model, program = judged.base.model, ir.load(judged.directory / "model.onnx")
    nodes = Nodes(model, program)
    for path, places in list(nodes.places.items())[::step]:
        product = None if places[0].norm else nodes.product(places[0])
        norm = nodes.norm(places[0])
        node = product or norm
        weight = None if node is None else node.inputs[2 if "Skip" in node.op_type else 1]
        if weight is None or weight.const_value is None:
            continue
        change = one_entry(places[0].begin + 3)
        if node.op_type == "MatMulNBits":
            weight = node.inputs[2]
            change = one_row_of_scales(places[0].begin + 3, node.attributes["N"].value)

        directory = plant_in_graph(
            judged.directory, place / path.replace(".", "-"), weight.name, change
        )
        kind = "norm" if norm else "weight"
        yield Planted(kind, path, judged.locate_if_failed(directory), {path})


@dataclass(frozen=True)
class Share:
    """How many mistakes are found where they are, of those that count."""

    right: int
    counted: int
    within: int

    @classmethod
    def of(cls, planted):
        """The share of some mistakes; those that are missed are printed."""
        counted = [one for one in planted if one.counts]
        for one in counted:
            if not one.right:
                found = one.found
                where = (found.path, found.reads) if isinstance(found, Located) else found.reason
                print(f"\n  missed: {one.kind} at {one.path}: {where}", end="")
        right = sum(one.right for one in counted)
        return cls(right, len(counted), len(planted) - len(counted))

    @property
    def is_enough(self):
        """Whether 95 % are found, or all but one where so few are planted."""
        return self.counted - self.right <= max(1, (1 - LEAST) * self.counted)

    def __str__(self):
        return f"{self.right} of {self.counted} at their module, {self.within} within the tolerance"


@pytest.fixture
def artifact_of(exported, genai_artifact, make_world, genai_world, tmp_path):
    """The export of a case; it is copied before it is changed."""

    def make(case):
        genai = case.exporter == "genai"
        if not case.quantize:
            if genai:
                return genai_artifact(case.kind, case.mode)
            return exported(case.kind, case.mode, case.dtype, case.task)
        world = genai_world(case.kind) if genai else make_world(case.kind, case.task)
        names = ("one",) if case.mode == "folded" else ("one", "two")
        adapters = [getattr(world, name) for name in names]
        directory = tmp_path / f"{case.kind}-{case.mode}"
        options = dict(case.quantize)
        export_onnx(adapters, directory, mode=case.mode, exporter=case.exporter, **options)
        return directory

    return make


def planted_in(case, judged, place):
    if case.exporter == "genai":
        return [
            *scales_planted(judged, step=4),
            *builder_weights_planted(judged, place, step=3),
        ]
    integers = integers_planted(judged, place, step=3) if case.quantize else ()
    return [
        *scales_planted(judged, step=5),
        *weights_planted(judged, place, step=5),
        *epsilons_planted(judged, place, step=4),
        *integers,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_nearly_every_mistake_is_found_at_its_module(group, artifact_of, tmp_path, capsys):
    planted = []
    for case in GROUPS[group]:
        judged = Judged(artifact_of(case))
        assert judged.locate_if_failed() is None
        assert not isinstance(judged.locate(), Located)
        found = planted_in(case, judged, tmp_path / "planted" / f"{case.kind}-{case.mode}")
        planted += found
        with capsys.disabled():
            print(f"\n{group}: {case.kind} {case.mode}: {Share.of(found)}", end="")

    share = Share.of(planted)
    with capsys.disabled():
        print(f"\n{group}: {share}")
    assert share.is_enough
