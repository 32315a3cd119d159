"""How many planted mistakes are found at the module they were planted at; prints the share."""

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

from propulsion_export.graph.genai.nodes import Nodes
from propulsion_export.parity.reports.located import Located
from propulsion_export.scaling.layer_rules import layer_kind

LEAST = 0.95
MODES = ("folded", "switchable", "bank")
ENCODERS = ("bert", "roberta", "distilbert", "electra", "mpnet")
DECODERS = ("gpt2", "llama", "gemma3", "qwen3", "opt")
EXPORTS = [
    *((kind, "text-classification", mode) for kind in ENCODERS for mode in MODES),
    *((kind, None, mode) for kind in DECODERS for mode in MODES),
    *((kind, None, mode) for kind in ("t5", "bart") for mode in ("folded", "switchable")),
]
GENAI = [(kind, mode) for kind in ("llama", "qwen3", "gemma2") for mode in ("folded", "switchable")]


@dataclass
class Planted:
    """A mistake and where it is."""

    kind: str
    path: str
    found: object
    same: set

    @property
    def right(self):
        return isinstance(self.found, Located) and self.found.path in self.same


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
        found = judged.locate(feeds=judged.feeds_with(with_scale(judged.adapter, path, change)))
        yield Planted(f"scale {change.__name__}", path, found, same.get(path, {path}))


def weights_planted(judged, place, step):
    """Wrong weights and lost biases of the graphs' initializers."""
    model = judged.base.model
    modules, same = dict(model.named_modules(remove_duplicate=False)), same_modules(model)
    changes = {"linear": cycle((row_wrong, all_wrong)), "conv1d": cycle((row_wrong, all_wrong))}
    for file in judged.artifact.manifest.graphs or ("model.onnx",):
        found = parameters_in(judged.directory, file)
        for index, (name, path, kind) in list(enumerate(found))[::step]:
            change = all_wrong if kind == "weight" else zeroed
            if path in modules and kind == "weight":
                change = next(changes.get(layer_kind(modules[path]), cycle((all_wrong,))))
            directory = plant_in_graph(
                judged.directory, place / f"{file}-{index}", name, change, file=file
            )
            yield Planted(
                f"{kind} {change.__name__}", path, judged.locate(directory), same.get(path, {path})
            )


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
            yield Planted("epsilon", path, judged.locate(directory), {path})


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
        begin = places[0].begin

        def change(values, begin=begin, rows=product is not None):
            values = values.copy()
            values[..., begin + 3] += 0.05 * np.abs(values).max()
            return values

        directory = plant_in_graph(
            judged.directory, place / path.replace(".", "-"), weight.name, change
        )
        yield Planted("norm" if norm else "weight", path, judged.locate(directory), {path})


def share(planted):
    """The share of mistakes that are found where they are; the others are printed."""
    for one in planted:
        if not one.right:
            found = one.found
            print(
                f"  missed: {one.kind} at {one.path}: "
                f"{(found.path, found.reads) if isinstance(found, Located) else found.reason}"
            )
    right = sum(one.right for one in planted)
    print(f"{right} of {len(planted)} found at their module ({right / len(planted):.1%})")
    return right / len(planted)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "task", "mode"), EXPORTS)
def test_nearly_every_mistake_is_found_at_its_module(kind, task, mode, exported, tmp_path, capsys):
    judged = Judged(exported(kind, mode, task=task))
    assert not isinstance(judged.locate(), Located)

    planted = [
        *scales_planted(judged, step=5),
        *weights_planted(judged, tmp_path, step=5),
        *epsilons_planted(judged, tmp_path, step=4),
    ]

    with capsys.disabled():
        print(f"\n{kind} {mode}: ", end="")
        assert share(planted) >= LEAST


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), GENAI)
def test_nearly_every_mistake_is_found_in_graphs_of_the_builder(
    kind, mode, genai_artifact, tmp_path, capsys
):
    judged = Judged(genai_artifact(kind, mode))
    assert not isinstance(judged.locate(), Located)

    planted = [
        *scales_planted(judged, step=4),
        *builder_weights_planted(judged, tmp_path, step=3),
    ]

    with capsys.disabled():
        print(f"\n{kind} {mode}, builder: ", end="")
        assert share(planted) >= LEAST
