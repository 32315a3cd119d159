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
from propulsion_export.engine import BuildOptions
from propulsion_export.graph.files import read_graph
from propulsion_export.graph.quantisation import quantised_weights
from propulsion_export.pipeline.onnx import export_modes, export_onnx
from propulsion_export.pipeline.onnx_options import OnnxOptions
from propulsion_export.pipeline.trt import build_engine
from propulsion_export.runners.decoding import generate, greedy
from propulsion_export.runners.opening import choose_runner, open_candidate

TASKS = {
    "bert": "text-classification",
    "llama": "text-generation",
    "t5": "text2text-generation",
}
SIZES = {
    "bert": {"hidden_size": 64, "intermediate_size": 128},
    "llama": {"hidden_size": 64, "intermediate_size": 128},
    "t5": {"d_model": 64, "d_ff": 128},
}
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
W8A8 = FORMS["qdq-8"] | {"quantize_activations": True}


@pytest.fixture(scope="session")
def quantised_world(shared, tiny_model, random_adapter):
    """`quantised_world(kind)`: directories of a base model and two adapters, `one` and `two`.

    One scale in eight is negative, as a degree that is odd allows.
    """

    @cache
    def make(kind):
        def fill(root):
            model = tiny_model(kind, TASKS[kind], **SIZES[kind])
            model.save_pretrained(root / "base")
            save_tokenizer(root / "base", generative=kind != "bert")
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
        more = FORMS.get(form) or W8A8 | {"calibration": texts_file(world)}

        def fill(directory):
            export_onnx(adapters, directory / mode, mode=mode, dtype=dtype, **EXPORTER, **more)

        return shared(f"quantised-{kind}-{mode}-{form}-{dtype}", fill) / mode

    return make


RTX = BuildOptions(runtime="tensorrt-rtx", targets=("sm_86", "sm_89", "sm_120"))
EXPORTER = {"exporter": "transformers"}


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


slow = pytest.mark.slow
FOLDED_IN = [
    pytest.param("llama", "switchable", "matmulnbits-4"),
    *(
        pytest.param(kind, mode, form, marks=slow)
        for kind, mode, form in itertools.product(("llama", "t5"), MODES[1:], FORMS)
        if (mode, form) != ("switchable", "matmulnbits-4")
    ),
]


@pytest.mark.parametrize(("kind", "mode", "form"), FOLDED_IN)
def test_greedy_tokens_of_folded_and_of_switchable_and_bank_agree(kind, mode, form, quantised):
    folded, other = tokens_of(quantised(kind, "folded", form)), quantised(kind, mode, form)

    np.testing.assert_array_equal(tokens_of(other, "one"), folded)
    assert (tokens_of(other, "two") != folded).any()
    assert (tokens_of(other) != folded).any()


ONCE = [
    pytest.param("llama", "matmulnbits-4"),
    *(
        pytest.param(kind, form, marks=slow)
        for kind, form in itertools.product(TASKS, ("matmulnbits-4", "qdq-8"))
        if (kind, form) != ("llama", "matmulnbits-4")
    ),
]


@pytest.mark.parametrize(("kind", "form"), ONCE)
def test_the_base_is_quantised_once_for_every_mode(kind, form, quantised):
    folded, switchable = (
        {
            file: quantised_weights(read_graph(directory, file))
            for file in Artifact.read(directory).manifest.graphs or (GRAPH_FILE,)
        }
        for directory in (quantised(kind, mode, form) for mode in ("folded", "switchable"))
    )

    assert folded.keys() == switchable.keys()
    for file, weights in switchable.items():
        assert len(weights) > 10
        assert weights.keys() == folded[file].keys()
        changed = 0
        for parameter, weight in weights.items():
            assert weight.integers.tobytes() == folded[file][parameter].integers.tobytes()
            changed += bool((weight.scales != folded[file][parameter].scales).any())
        assert changed >= len(weights) - 2  # all but the heads


ENGINES = {"w4a16": "qdq-4", "w8a16": "qdq-8", "w8a8": "w8a8"}
QUICK = {("bert", "switchable", "w4a16"), ("bert", "folded", "w8a8"), ("llama", "bank", "w8a16")}
MATRIX = [
    pytest.param(*case, marks=() if case in QUICK else slow)
    for case in itertools.product(("bert", "llama"), MODES, ENGINES)
]


@pytest.mark.parametrize(("kind", "mode", "precision"), MATRIX)
def test_quantised_graphs_become_engines_for_every_target(
    kind, mode, precision, quantised, tmp_path
):
    pytest.importorskip("tensorrt_rtx", reason="an engine is built")
    directory = quantised(kind, mode, ENGINES[precision], "float16")

    built = build_engine(directory, tmp_path / "engine", RTX)

    assert built.path.stat().st_size > 10_000
    assert built.manifest.engine.targets == RTX.targets
    assert built.manifest.quantization == Artifact.read(directory).manifest.quantization
    scales = [w.scales for w in quantised_weights(read_graph(directory, GRAPH_FILE)).values()]
    assert all((each > 0).all() for each in scales)


def initializers(directory):
    graph = read_graph(directory, GRAPH_FILE).graph
    return sorted(value.const_value.numpy().tobytes() for value in graph.initializers.values())


@pytest.mark.parametrize(
    "form", ["matmulnbits-4", pytest.param("qdq-8", marks=slow), pytest.param("w8a8", marks=slow)]
)
def test_modes_exported_together_are_those_exported_alone(
    form, quantised, quantised_world, tmp_path
):
    world = quantised_world("llama")
    more = FORMS.get(form) or W8A8 | {"calibration": texts_file(world)}
    options = OnnxOptions(**EXPORTER, **more)

    export_modes([world / "one"], tmp_path / "out", MODES, options)

    alone = quantised("llama", "folded", form)
    nodes = [
        [node.op_type for node in read_graph(directory, GRAPH_FILE).graph]
        for directory in (tmp_path / "out" / "folded", alone)
    ]
    assert nodes[0] == nodes[1]
    together = tokens_of(tmp_path / "out" / "folded")
    np.testing.assert_array_equal(together, tokens_of(alone))
    assert initializers(tmp_path / "out" / "folded") == initializers(alone)
    for mode in MODES[1:]:
        np.testing.assert_array_equal(tokens_of(tmp_path / "out" / mode, "one"), together)
        assert (tokens_of(tmp_path / "out" / mode) != together).any()
