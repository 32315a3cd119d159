"""int4 and int8 weights of encoders and decoders, from the export to tokens and engines.

The base models are twice as wide as elsewhere, so that blocks of 32 weights divide every layer.
"""

import itertools
import json
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
from tiny_models import save_tokenizer

from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.file_names import GRAPH_FILE
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.quantisation import quantised_weights
from propulsion_export.pipeline.onnx import export_onnx
from propulsion_export.runners.decoding import generate, greedy
from propulsion_export.runners.opening import choose_runner, open_candidate

TASKS = {"bert": "text-classification", "llama": "text-generation"}
SIZES = {"hidden_size": 64, "intermediate_size": 128}
DEGREE = 15
PROMPTS = [[11, 42, 7, 65, 23], [50, 9, 31], [8, 90, 77, 16, 29, 33, 60, 71]]
STEPS = 24
MODES = ("folded", "switchable", "bank")
FORMS = {
    "matmulnbits-4": {"quantize": "int4", "accuracy_level": 1},
    "matmulnbits-8": {"quantize": "int8", "accuracy_level": 1},
    "qdq-4": {"quantize": "int4", "quantization_form": "qdq"},
    "qdq-8": {"quantize": "int8", "quantization_form": "qdq"},
}


@pytest.fixture(scope="session")
def quantised_world(shared, tiny_model, random_adapter):
    """`quantised_world(kind)`: directories of a base model and two adapters, `one` and `two`.

    One scale in eight is negative, as a degree that is odd allows.
    """

    @cache
    def make(kind):
        def fill(root):
            model = tiny_model(kind, TASKS[kind], **SIZES)
            model.save_pretrained(root / "base")
            save_tokenizer(root / "base", generative=kind == "llama")
            for seed, name in ((1, "one"), (2, "two")):
                made = random_adapter(model, seed, name, task=TASKS[kind])
                made = replace(
                    made, base=str(root / "base"), fingerprint=fingerprint_of_model(model)
                )
                write(made, root / name)

        return shared(f"quantised-{kind}", fill)

    return make


def write(adapter, directory):
    directory.mkdir()
    roots = {
        path: Scale(np.sign(scale.values) * np.abs(scale.values) ** (1 / DEGREE))
        for path, scale in adapter.scales.items()
    }
    replace(adapter, scales=roots).write(directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"degree": DEGREE}))


@pytest.fixture(scope="session")
def quantised(quantised_world, shared):
    """`quantised(kind, mode, form)`: an export; `one` folded, or both adapters."""

    @cache
    def make(kind, mode, form, dtype="float32"):
        world = quantised_world(kind)
        adapters = [world / "one"] if mode == "folded" else [world / "one", world / "two"]
        more = FORMS[form]
        if form == "w8a8":
            more = more | {"calibration": texts_file(world)}

        def fill(directory):
            export_onnx(adapters, directory / mode, mode=mode, dtype=dtype, **EXPORTER, **more)

        return shared(f"quantised-{kind}-{mode}-{form}-{dtype}", fill) / mode

    return make


EXPORTER: dict[str, str] = {}
FORMS["w8a8"] = FORMS["qdq-8"] | {"quantize_activations": True}


def texts_file(world):
    file = world.parent / f"{world.name}-texts.txt"
    words = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("a", "e", "i")]
    chooser = np.random.default_rng(4)
    lines = [" ".join(chooser.choice(words, 6)) for _ in range(16)]
    file.write_text("\n".join(lines) + "\n")
    return file


def tokens_of(directory, adapter=None):
    artifact = Artifact.read(directory)
    model = open_candidate(artifact, choose_runner(artifact, "auto"))
    feeds = {**model.pad([np.array(p) for p in PROMPTS], 0), **artifact.feeds(adapter)}
    return np.stack(list(itertools.islice(generate(model, feeds, greedy), STEPS)), axis=1)


@pytest.mark.parametrize("form", ["matmulnbits-4", "qdq-8"])
def test_greedy_tokens_of_folded_switchable_and_bank_agree(form, quantised):
    folded = tokens_of(quantised("llama", "folded", form))

    for mode in ("switchable", "bank"):
        directory = quantised("llama", mode, form)
        np.testing.assert_array_equal(tokens_of(directory, "one"), folded)
        assert (tokens_of(directory, "two") != folded).any()
        assert (tokens_of(directory) != folded).any()


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("form", ["matmulnbits-4", "qdq-8"])
def test_the_base_is_quantised_once_for_every_mode(kind, form, quantised):
    graphs = {mode: read_graph(quantised(kind, mode, form), GRAPH_FILE) for mode in MODES}

    read = {mode: quantised_weights(graph) for mode, graph in graphs.items()}

    assert len(read["folded"]) > 10
    for mode in ("switchable", "bank"):
        assert read[mode].keys() == read["folded"].keys()
        for parameter, weight in read[mode].items():
            assert weight.integers.tobytes() == read["folded"][parameter].integers.tobytes()
    changed = [
        parameter
        for parameter, weight in read["folded"].items()
        if (weight.scales != read["bank"][parameter].scales).any()
    ]
    assert 10 < len(changed) < len(read["bank"])  # all but the head, which has no scale
