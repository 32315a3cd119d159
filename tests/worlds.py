"""Tiny base models, two adapters for each and their exports, which many tests start from.

Two adapters of different label counts, one with trained biases; nothing is the identity.
"""

import json
import shutil
from dataclasses import replace
from functools import cache, cached_property, partial
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import LABELS

from kinds import ENCODER_DECODERS, EXPERTS, GENERATIVE
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.adapters.scales import Scale
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.layout import pack

DEGREE = 15


class World(SimpleNamespace):
    """A base model and its adapters on disk; the model itself is made when it is first used."""

    @cached_property
    def model(self):
        return self.make_model()


@pytest.fixture(scope="session")
def write_adapter():
    """`write_adapter(adapter, directory)`: a Propulsion directory of degree 15, as trained.

    Scales must be above zero.
    """

    def write(adapter, directory, degree=DEGREE):
        directory.mkdir(parents=True)
        vectors = {
            path: Scale(scale.values ** (1 / DEGREE)) for path, scale in adapter.scales.items()
        }
        replace(adapter, scales=vectors).write(directory)
        file = directory / "adapter_config.json"
        config = json.loads(file.read_text()) | {"degree": degree}
        file.write_text(json.dumps(config))
        return directory

    return write


@pytest.fixture(scope="session")
def positive_adapter(random_adapter):
    """A random adapter whose scales are above zero."""

    def make(model, *arguments, **options):
        adapter = random_adapter(model, *arguments, **options)
        positive = {path: Scale(np.abs(s.values)) for path, s in adapter.scales.items()}
        return replace(adapter, scales=positive)

    return make


@pytest.fixture(scope="session")
def world(shared, tiny_model, tiny_checkpoint, positive_adapter, write_adapter):
    """Base model, adapters `three` (3 labels, trained biases) and `five` (5 labels), on disk."""
    base = tiny_checkpoint("bert", "feature-extraction")

    def fill(root):
        for seed, name, count in ((1, "three", 3), (2, "five", 5)):
            names = tuple(f"{name}-{index}" for index in range(count))
            model = tiny_model("bert", num_labels=count, id2label=None, label2id=None)
            made = positive_adapter(
                model, seed, name, head=True, biases=name == "three", labels=names,
                task="text-classification",
            )  # fmt: skip
            fingerprint = _fingerprint(_load(base))
            write_adapter(replace(made, base=str(base), fingerprint=fingerprint), root / name)

    root = shared("world", fill)
    return SimpleNamespace(base=base, root=root, three=root / "three", five=root / "five")


@pytest.fixture(scope="session")
def export_world(world, shared):
    """`export_world(mode, dtype)`: `three` folded, or both adapters; copy it before changing it."""

    @cache
    def make(mode, dtype="keep"):
        adapters = [world.three] if mode == "folded" else [world.three, world.five]

        def fill(directory):
            _export(adapters, directory / mode, mode=mode, dtype=dtype)

        return shared(f"world-{mode}-{dtype}", fill) / mode

    return make


@pytest.fixture(scope="session")
def export_slots(world, shared):
    """`export_slots(mode)`: the base model with slots and no adapter; copy it before changing it.

    They have room for biases and five labels.
    """
    options = {"task": "text-classification", "train_bias": True, "max_labels": 5}

    @cache
    def make(mode):
        def fill(directory):
            _export([], directory / mode, model=str(world.base), mode=mode, **options)

        return shared(f"world-slots-{mode}", fill) / mode

    return make


@pytest.fixture(scope="session")
def switchable(export_world):
    """The switchable export of both adapters; copy it before changing it."""
    return export_world("switchable")


@pytest.fixture(scope="session")
def folded(export_world):
    """The folded export of `three`; copy it before changing it."""
    return export_world("folded")


@pytest.fixture(scope="session")
def banked(export_world):
    """The bank of both adapters; copy it before changing it."""
    return export_world("bank")


@pytest.fixture
def copied(switchable, banked, tmp_path):
    """`copied(kind)`: a copy of `switchable` or `banked` that the test may change."""
    places = {"switchable": switchable, "banked": banked}
    return lambda kind: shutil.copytree(places[kind], tmp_path / kind)


@pytest.fixture(scope="session")
def make_world(shared, tiny_model, tiny_checkpoint, positive_adapter, write_adapter):
    """`make_world(kind, task)`: a base model and two adapters for it, `one` and `two`, on disk.

    Encoders' are trained in their biases and their head too, if they have any. Of experts only the
    attention is scaled where `experts` is false, as a bank has it.
    """

    @cache
    def make(kind, task=None, *, experts=True):
        if kind in GENERATIVE:
            task = "text2text-generation" if kind in ENCODER_DECODERS else "text-generation"
        make_model = partial(tiny_model, kind, *(() if kind in GENERATIVE else (task,)))
        base = tiny_checkpoint(kind, task)
        options = {
            "biases": kind not in ("deberta-v2", *GENERATIVE),
            "head": task in ("text-classification", "token-classification", "question-answering"),
            "labels": LABELS if task == "token-classification" else None,
            "only": None if experts else "self_attn",
        }

        def fill(root):
            model = make_model()
            fingerprint = _fingerprint(model)
            for seed, name in ((1, "one"), (2, "two")):
                made = positive_adapter(model, seed, name, task=task, **options)
                write_adapter(replace(made, base=str(base), fingerprint=fingerprint), root / name)

        root = shared(f"adapters-{kind}-{task}" + ("" if experts else "-attention"), fill)
        return World(
            base=base,
            make_model=make_model,
            root=root,
            one=root / "one",
            two=root / "two",
            task=task,
        )

    return make


@pytest.fixture(scope="session")
def exported(make_world, shared):
    """`exported(kind, mode, dtype, task)`: folded has the adapter `one`, the others both.

    Copy it before changing it.
    """

    @cache
    def make(kind, mode, dtype="keep", task=None):
        world = make_world(kind, task, experts=mode != "bank" or kind not in EXPERTS)
        adapters = [world.one] if mode == "folded" else [world.one, world.two]

        def fill(directory):
            untie = mode == "folded" and task == "fill-mask"  # whose head shares the embedding
            _export(adapters, directory / mode, mode=mode, dtype=dtype, untie=untie)

        return shared(f"export-{kind}-{world.task}-{mode}-{dtype}", fill) / mode

    return make


@pytest.fixture
def out_of_range(world, write_adapter, tmp_path):
    """`three`, whose first scale in float16 is inf in channel 4 and rounds badly in channel 5."""
    adapter = Adapter.read(world.three)
    path = next(iter(adapter.scales))
    values = adapter.scales[path].values.copy()
    values[4:6] = 1e5, 1e-7
    changed = replace(adapter, scales={**adapter.scales, path: Scale(values)})
    return write_adapter(changed, tmp_path / "out-of-range")


@pytest.fixture
def plant(switchable, tmp_path):
    """`plant(mistaken)`: the switchable export, its adapter `three` secretly another one."""

    return lambda mistaken: plant_adapter(switchable, tmp_path / "planted", mistaken)


def plant_adapter(artifact, directory, mistaken: Adapter):
    """A copy of a switchable artifact whose adapter `three` is secretly another one."""
    from safetensors.numpy import save_file

    shutil.copytree(artifact, directory)
    read = Artifact.read(directory)
    feeds = pack(mistaken, read.manifest.layout, read.feeds("base"))
    save_file(feeds, directory / "adapters" / "three.safetensors")
    Artifact.write(directory, read.manifest)
    return directory


def query_and_value_swapped(right: Adapter, world):
    """A mistaken adapter of a BERT of two layers: two scales of each are exchanged."""
    swapped = dict(right.scales)
    for layer in (0, 1):
        one, other = (
            f"bert.encoder.layer.{layer}.attention.self.{kind}" for kind in ("query", "value")
        )
        swapped[one], swapped[other] = swapped[other], swapped[one]
    return replace(right, scales=swapped)


def _load(directory):
    from transformers import AutoModel

    return AutoModel.from_pretrained(directory)


def _fingerprint(model):
    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

    return fingerprint_of_model(model)


def _export(adapters, directory, **options):
    from propulsion_export.pipeline.onnx import export_onnx

    export_onnx(adapters, directory, **options)
