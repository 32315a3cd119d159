"""A session answers each row as its adapter alone would, whatever else goes on.

The oracle is PyTorch in float64 with the adapter attached; what PyTorch itself is off in float32
says how far an answer may be off, as in the verdict.
"""

import gc
import hashlib
import json
import os
import pickle
import re
import shutil
import sqlite3
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.artifacts.bank import REGISTRY_FILE
from propulsion_export.artifacts.changing import add_adapter, remove_adapter
from propulsion_export.artifacts.manifest import EngineEntry
from propulsion_export.errors import (
    ArtifactError,
    ToolError,
    UnavailableError,
    UnknownAdapterError,
    UsageError,
)
from propulsion_export.parity.comparison import FACTOR
from propulsion_export.pipeline.run import predict
from propulsion_export.runners import tensorrt as engines
from propulsion_export.serving import generation as generation_module
from propulsion_export.serving import texts as texts_module
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session
from propulsion_export.serving.token_sampling import Sampling

TEXTS = ["ba be bi", "ko", "do re mi fa bol", "Ka ke. ki", "ba", "la ti lor", "na ne ni", "hi"]
ROWS, LENGTH = 16, 7
KINDS = ("switchable", "banked")


@pytest.fixture(scope="session")
def merged(world, shared):
    pytest.importorskip("torch", reason="runs a checkpoint")
    from propulsion_export.pipeline.merge import merge

    return shared("world-merged", lambda root: merge(world.three, root / "three")) / "three"


@pytest.fixture(scope="session")
def opened(request):
    """`opened(kind)`: a session of it that all tests share; none changes its adapters."""
    return cache(lambda kind: Session(request.getfixturevalue(kind)))


@pytest.fixture
def copied(switchable, banked, tmp_path):
    """`copied(kind)`: a copy that the test may change."""
    places = {"switchable": switchable, "banked": banked}
    return lambda kind: shutil.copytree(places[kind], tmp_path / kind)


@pytest.fixture(scope="session")
def oracle(world, shared):
    """`oracle(name, inputs)`: logits by PyTorch, in float64 and in float32; computed once."""
    adapters = {name: Adapter.read(getattr(world, name)) for name in ("three", "five")}
    # What the checkpoint lacks, the head, is the first adapter's in the base model's row.
    adapters["base"] = replace(adapters["three"], scales={}, biases={})

    def compute(name, inputs):
        digest = hashlib.sha256(inputs["input_ids"].tobytes()).hexdigest()[:12]
        file = shared(f"oracle-{name}-{digest}", lambda to: fill(name, inputs, to)) / "logits.npz"
        with np.load(file) as found:
            return [found["float64"], found["float32"]]

    def fill(name, inputs, directory):
        import torch
        from transformers import AutoModelForSequenceClassification

        from propulsion_export.runners.pytorch import torch_runner
        from propulsion_export.scaling.attach import attached

        model = AutoModelForSequenceClassification.from_pretrained(
            world.base, num_labels=len(adapters[name].labels)
        ).eval()
        found = {}
        for dtype in ("float64", "float32"):
            with attached(model.to(getattr(torch, dtype)), adapters[name]):
                found[dtype] = torch_runner(model)(inputs)["logits"]
        np.savez(directory / "logits.npz", **found)

    return compute


def random_inputs(seed=0):
    """Random tokens, all of them real, int64 [16, 7]."""
    tokens = np.random.default_rng(seed).integers(5, 99, (ROWS, LENGTH))
    return {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "token_type_ids": np.zeros_like(tokens),
    }


def own(inputs, row):
    return {name: values[row : row + 1] for name, values in inputs.items()}


# Each row with its adapter


@pytest.mark.parametrize("kind", [*KINDS, "folded", "merged"])
def test_each_row_is_what_pytorch_computes_with_its_adapter(kind, opened, oracle):
    inputs = random_inputs()
    single = kind in ("folded", "merged")
    names = ["three"] * ROWS if single else ["three", "base", "five", "three"] * 4
    wanted = {name: oracle(name, inputs) for name in ("three", "five", "base")}
    allowed = FACTOR * max(np.abs(exact - rough).max() for exact, rough in wanted.values())

    replies = opened(kind)(inputs, adapter=names)

    for row, (name, reply) in enumerate(zip(names, replies, strict=True)):
        exact = {other: logits[row] for other, (logits, _) in wanted.items()}
        assert reply.adapter == name
        assert reply.outputs["logits"].shape == exact[name].shape
        assert np.abs(reply.outputs["logits"] - exact[name]).max() <= allowed
        # The twin: the answers of another adapter, or of the base model, would not do.
        count = min(len(logits) for logits in exact.values())
        others = [exact[other] for other in exact if other != name]
        assert all(
            np.abs(reply.outputs["logits"][:count] - o[:count]).max() > 1e3 * allowed
            for o in others
        )


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_what_it_is_alone(kind, opened, oracle):
    session, inputs = opened(kind), random_inputs(1)
    names = ["three", "base", "five", "base"] * 4
    own_error = max(np.abs(np.subtract(*oracle(name, inputs))).max() for name in set(names))

    together = session(inputs, names)

    for row, (name, reply) in enumerate(zip(names, together, strict=True)):
        [alone] = session(own(inputs, row), adapter=name)
        difference = np.abs(alone.outputs["logits"] - reply.outputs["logits"]).max()
        assert difference <= FACTOR * own_error
        assert (alone.labels, alone.version) == (reply.labels, reply.version)


def test_in_a_bank_each_row_is_bit_for_bit_what_it_is_in_a_batch_of_its_adapter(opened):
    session, inputs = opened("banked"), random_inputs(2)
    names = ["three", "base", "five", "base"] * 4

    together = session(inputs, names)

    of_one = {name: session(inputs, name) for name in set(names)}
    for row, (name, reply) in enumerate(zip(names, together, strict=True)):
        np.testing.assert_array_equal(reply.outputs["logits"], of_one[name][row].outputs["logits"])
    assert not np.array_equal(
        of_one["three"][0].outputs["logits"], of_one["base"][0].outputs["logits"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_texts_are_what_they_are_alone_and_what_the_two_artifacts_agree_on(kind, opened):
    session = opened(kind)
    names = ["three", "base", "five", "three"] * 2

    together = session(TEXTS, adapter=names)

    other = opened("banked" if kind == "switchable" else "switchable")(TEXTS, adapter=names)
    for text, name, reply, twin in zip(TEXTS, names, together, other, strict=True):
        [alone] = session(text, name)
        for same in (alone, twin):
            assert reply.prediction["label"] == same.prediction["label"]
            assert reply.prediction["score"] == pytest.approx(same.prediction["score"], abs=1e-5)
            np.testing.assert_allclose(
                reply.outputs["logits"], same.outputs["logits"], atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize("kind", KINDS)
def test_labels_are_the_adapters_own_and_the_logits_are_cut_to_them(kind, opened):
    replies = opened(kind)(TEXTS[:3], adapter=["three", "five", "base"])

    for reply, name, count in zip(replies, ("three", "five", "three"), (3, 5, 3), strict=True):
        assert reply.labels == tuple(f"{name}-{index}" for index in range(count))
        assert reply.outputs["logits"].shape == (count,)
        assert reply.prediction["label"] == reply.labels[reply.outputs["logits"].argmax()]


@pytest.mark.parametrize(
    ("kind", "name"),
    [("folded", "three"), ("merged", "three"), ("switchable", "base"), ("banked", "base")],
)
def test_without_a_name_it_is_the_only_adapter_or_the_base_model(kind, name, opened):
    assert [reply.adapter for reply in opened(kind)(TEXTS[:2])] == [name, name]


def test_what_transformers_tokenizes_is_taken_as_it_is(world, opened):
    transformers = pytest.importorskip("transformers", reason="is the oracle")
    tokenizer = transformers.AutoTokenizer.from_pretrained(world.base)
    encoded = tokenizer(TEXTS, padding=True, return_token_type_ids=True, return_tensors="pt")

    of_tensors = opened("banked")(encoded, "five")

    for reply, of_text in zip(of_tensors, opened("banked")(TEXTS, "five"), strict=True):
        np.testing.assert_array_equal(reply.outputs["logits"], of_text.outputs["logits"])
    assert of_tensors[0].prediction is None


# All tasks


@pytest.fixture(scope="session")
def make_task(make_world, exported, shared):
    """`make_task(task)`: a bank of two adapters, and `merged(name)`, a checkpoint of each."""

    def make(task):
        world = make_world("bert", task)

        def fill(root):
            from propulsion_export.pipeline.merge import merge

            for name in ("one", "two"):
                merge(world.root / name, root / name, untie=task == "fill-mask")

        def merged(name):
            return shared(f"merged-bert-{task}", fill) / name

        return SimpleNamespace(bank=exported("bert", "bank", task=task), merged=merged)

    return make


@pytest.mark.parametrize(
    "task",
    [
        "text-classification",
        "token-classification",
        "question-answering",
        "fill-mask",
        "feature-extraction",
    ],
)
def test_predictions_of_every_task_are_those_of_the_merged_checkpoints(task, make_task):
    pytest.importorskip("torch", reason="runs a checkpoint")
    made = make_task(task)
    texts = ["ba [MASK] bi ko", "bas be, bi", "ko [MASK]"]
    contexts = ["do re mi fa bol", "Ko,  bas bi", "la"] if task == "question-answering" else ()
    names = ["one", "two", "one"]

    replies = Session(made.bank)(texts, names, context=contexts)

    of_run = predict(made.bank, text=texts, adapter=names, context=contexts)
    merged = {
        name: predict(made.merged(name), text=texts, context=contexts) for name in ("one", "two")
    }
    for row, (name, reply, told) in enumerate(zip(names, replies, of_run, strict=True)):
        assert {"text": texts[row], "adapter": name, **reply.prediction} == told
        for key, value in reply.prediction.items():
            assert approximately(value) == merged[name][row][key]
    assert merged["one"] != merged["two"]


def approximately(value):
    """Equal but for the last digits of floats, whatever holds them."""
    if isinstance(value, float):
        return pytest.approx(value, abs=2e-5)
    if isinstance(value, dict):
        return {key: approximately(item) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item) for item in value]
    return value


def test_outputs_of_tokens_are_those_of_the_text_without_padding(make_task):
    session = Session(make_task("token-classification").bank)
    texts = ["bas be, bi ko do", "ko"]

    long, short = session(texts, ["one", "two"])

    assert (long.outputs["logits"].shape, short.outputs["logits"].shape) == ((9, 3), (3, 3))
    [alone] = session("ko", "two")
    np.testing.assert_allclose(alone.outputs["logits"], short.outputs["logits"], atol=1e-5)


# Generating


@pytest.fixture(scope="session")
def generative(make_world, exported):
    """`generative(kind)`: a session of a bank of two adapters, with what it was made of."""

    @cache
    def make(kind):
        bank = exported(kind, "bank")
        return SimpleNamespace(session=Session(bank), world=make_world(kind), directory=bank)

    return make


@pytest.fixture
def continuations(make_world, shared):
    """`continuations(kind, texts, adapters)`: 12 tokens for each by transformers; kept on disk."""

    def fill(kind, texts, adapters, directory):
        from transformers import AutoTokenizer

        from propulsion_export.scaling.attach import attached

        world = make_world(kind)
        tokenizer, found = AutoTokenizer.from_pretrained(world.base), []
        for text, name in zip(texts, adapters, strict=True):
            adapter = Adapter("none", {}) if name == "base" else Adapter.read(world.root / name)
            with attached(world.model, adapter):
                found.append(generate(world.model, tokenizer(text)["input_ids"], 12))
        (directory / "tokens.json").write_text(json.dumps(found))

    def make(kind, texts, adapters):
        name = f"continuations-{kind}"
        directory = shared(name, lambda to: fill(kind, texts, adapters, to))
        return json.loads((directory / "tokens.json").read_text())

    return make


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_each_prompt_goes_on_as_alone_with_its_adapter(kind, generative, continuations):
    made = generative(kind)
    names = ["one", "base", "two", "one", "two", "base"]
    texts = TEXTS[:6]
    settings = Settings(new_tokens=12)
    expected = continuations(kind, texts, names)

    together = made.session(texts, names, settings=settings)

    for text, name, reply, tokens in zip(texts, names, together, expected, strict=True):
        [alone] = made.session(text, name, settings=settings)
        assert reply.prediction == alone.prediction
        assert reply.prediction["tokens"] == tokens
        assert (reply.outputs, reply.adapter) == ({}, name)
    # The twin: with another adapter they would have been other texts.
    told = [made.session(texts, name, settings=settings) for name in ("one", "two", "base")]
    assert len({str([reply.prediction for reply in replies]) for replies in told}) == 3


def generate(model, prompt, new):
    """Greedy tokens by transformers, without the one that ends them."""
    import torch

    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), do_sample=False, max_new_tokens=new
    )[0]
    found = found[1 if model.config.is_encoder_decoder else len(prompt) :].tolist()
    return found[:-1] if found[-1:] == [model.config.eos_token_id] else found


def test_a_seed_draws_the_same_for_a_row_whatever_adapters_are_beside_it(generative):
    session = generative("llama").session
    settings = Settings(new_tokens=8, sampling=Sampling(temperature=2.0), seed=3)

    mixed = session(TEXTS[:3], ["one", "two", "base"], settings=settings)
    same = session(TEXTS[:3], ["one", "one", "base"], settings=settings)

    assert mixed[0].prediction == same[0].prediction
    assert mixed[2].prediction == same[2].prediction
    assert mixed[1].prediction != same[1].prediction


def test_tensors_of_a_generative_model_give_logits_of_every_position(generative, tiny_model):
    made, model = generative("llama"), tiny_model("llama")
    inputs = {name: values for name, values in random_inputs().items() if "type" not in name}

    replies = made.session(inputs, ["one", "two"] * 8)

    from propulsion_export.runners.pytorch import torch_runner
    from propulsion_export.scaling.attach import attached

    for row, reply in enumerate(replies[:4]):
        with attached(model, Adapter.read(made.world.root / reply.adapter)):
            logits = torch_runner(model)(own(inputs, row))["logits"][0]
        np.testing.assert_allclose(reply.outputs["logits"], logits, atol=1e-3)


# What cannot be


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (["ba"], {"adapter": "nine"}, UnknownAdapterError, "no adapter 'nine', expected one"),
        (["ba"], {"adapter": ""}, UnknownAdapterError, "no adapter ''"),
        (["ba"] * 3, {"adapter": ["three", "five"]}, UsageError, "2 adapters for 3 rows"),
        (["ba"], {"adapter": []}, UsageError, "0 adapters for 1 rows"),
        ([], {}, UsageError, "there are no rows"),
        ({}, {}, UsageError, "there are no rows"),
        ({"input_ids": np.zeros((0, 3), np.int64)}, {}, UsageError, "there are no rows"),
        (
            {"input_ids": np.zeros((2, 3)), "attention_mask": np.zeros((1, 3))},
            {},
            UsageError,
            r"input_ids \[2, 3\], attention_mask \[1, 3\], expected as many rows each",
        ),
        (
            {"input_ids": np.zeros((2, 3), np.int64)},
            {},
            UsageError,
            "the inputs are input_ids, expected attention_mask besides",
        ),
        (["ba", "be"], {"context": ["be"] * 3}, UsageError, "3 contexts for 2 rows"),
        (["ba"], {"settings": Settings()}, UsageError, "settings: are for generating text, the"),
        (random_inputs(), {"settings": Settings()}, UsageError, "go with texts"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_call_is_told_in_a_line(inputs, options, error, message, kind, opened):
    with pytest.raises(error, match=message):
        opened(kind)(inputs, **options)


@pytest.mark.parametrize("kind", ["folded", "merged"])
def test_a_folded_adapter_is_the_only_one(kind, opened):
    with pytest.raises(
        UnknownAdapterError, match=r"'three' folded in, .*'five'.* --mode switchable"
    ):
        opened(kind)(TEXTS[:2], adapter=["three", "five"])


def test_contexts_are_one_for_all_or_one_each(make_task):
    session = Session(make_task("question-answering").bank)

    with pytest.raises(UsageError, match="2 contexts for 3 rows"):
        session(TEXTS[:3], context=["a", "b"])
    with pytest.raises(UsageError, match="no context is given"):
        session(TEXTS[:3])
    one, each = (session(TEXTS[:3], context=c) for c in ("ba be", ["ba be"] * 3))
    assert [r.prediction for r in one] == [r.prediction for r in each]


@pytest.mark.parametrize(
    ("field", "change", "message"),
    [
        ("inputs", {"dtype": "int32"}, r"the graph has the input 'input_ids' \(int64 .* \(int32"),
        ("inputs", {"name": "ids"}, "the manifest has the input 'ids', the graph no such one"),
        ("outputs", {"dtype": "float16"}, r"the output 'logits' \(float32 .* \(float16"),
    ],
    ids=["input-type", "input-name", "output-type"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_manifest_that_differs_from_its_graph_is_refused(kind, field, change, message, copied):
    artifact = Artifact.read(copied(kind))
    first, *others = getattr(artifact.manifest, field)
    changed = replace(artifact.manifest, **{field: (replace(first, **change), *others)})

    with pytest.raises(ArtifactError, match=message):
        Session(artifact.with_manifest(changed).directory)


def test_an_artifact_without_a_tokenizer_takes_tensors_alone(copied):
    directory = copied("banked")
    manifest = Artifact.read(directory).manifest
    for file in directory.glob("tokenizer*"):
        file.unlink()
    Artifact.write(directory, manifest)
    session = Session(directory)

    assert len(session(random_inputs(), "five")) == ROWS
    with pytest.raises(UsageError, match="has no tokenizer"):
        session("ba")


def test_without_a_gpu_what_needs_one_is_unavailable(banked, copied, monkeypatch):
    monkeypatch.setattr(engines, "cuda_devices", lambda: ())
    monkeypatch.setattr(engines, "cuda_reason", lambda: "there is no CUDA driver")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UnavailableError, match="has no CUDAExecutionProvider"):
        Session(banked, runner="onnxruntime-cuda")

    directory = copied("banked")
    manifest = Artifact.read(directory).manifest
    (directory / "model.onnx").rename(directory / "model.engine")
    engine = EngineEntry("tensorrt-rtx", "1.7", ("sm_90",), (), {}, "sha256:0")
    Artifact.write(directory, replace(manifest, kind="engine", engine=engine))
    with pytest.raises(UnavailableError, match="an engine runs on a GPU only, and there is no"):
        Session(directory)


def test_a_number_that_is_no_token_is_told_in_a_line(banked):
    inputs = {"input_ids": [[5, 9_999]], "attention_mask": [[1, 1]]}

    with pytest.raises(ToolError, match=r"the model failed on inputs input_ids \[1, 2\], .*"):
        Session(banked)(inputs, "five")


# Changing


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_session_changes_the_next_request_sees(kind, copied, world):
    session = Session(copied(kind))
    [three] = session("ba be", "three")

    session.add(f"new={world.three}")
    assert session.adapters == ("five", "new", "three")
    [new] = session("ba be", "new")
    session.add(f"new={world.five}", force=True)
    [replaced] = session("ba be", "new")
    session.remove("new")

    assert (new.prediction, new.version) == (three.prediction, three.version)
    assert replaced.version == Adapter.read(world.five).digest
    assert replaced.labels == Adapter.read(world.five).labels
    with pytest.raises(UnknownAdapterError, match="no adapter 'new'"):
        session("ba be", "new")
    with pytest.raises(UsageError, match="has an adapter 'three' already"):
        session.add(f"three={world.five}")
    assert session("ba be", "three")[0].version == three.version


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_stays_with_its_artifact_wherever_the_process_goes(
    kind, copied, world, tmp_path, monkeypatch
):
    here = copied(kind)
    other = shutil.copytree(here, tmp_path / "other" / here.name)
    monkeypatch.chdir(tmp_path)
    session = Session(here.name)
    monkeypatch.chdir(other.parent)

    session.add(f"new={world.three}")

    assert session("ba be", "new")[0].adapter == "new"
    assert sorted(Artifact.read(here).list_adapters()) == ["five", "new", "three"]
    assert sorted(Artifact.read(other).list_adapters()) == ["five", "three"]
    assert pickle.loads(pickle.dumps(session)).adapters == ("five", "new", "three")


@pytest.mark.parametrize("kind", KINDS)
def test_a_refresh_sees_another_artifact_of_the_same_model_in_its_place(
    kind, copied, world, tmp_path
):
    here = copied(kind)
    other = shutil.copytree(here, tmp_path / "other")
    add_adapter(here, f"x={world.three}")
    add_adapter(other, f"x={world.five}")
    session = Session(here)
    before = session("ba be", "x")[0].version
    here.rename(tmp_path / "gone")
    other.rename(here)

    session.refresh()

    assert before == Adapter.read(world.three).digest
    assert session("ba be", "x")[0].version == Adapter.read(world.five).digest


@pytest.mark.parametrize("kind", KINDS)
def test_of_what_others_change_new_names_are_seen_and_the_rest_after_a_refresh(kind, copied, world):
    directory = copied(kind)
    session = Session(directory)
    [before] = session("ba be", "three")

    another_process(f"""
        add_adapter(Path({str(directory)!r}), "three={world.five}", force=True)
        add_adapter(Path({str(directory)!r}), "new={world.three}")
    """)

    assert session("ba be", "three")[0].version == before.version
    [new] = session("ba be", "new")  # and with it comes all else
    assert (new.version, new.prediction) == (before.version, before.prediction)
    assert session("ba be", "three")[0].version == Adapter.read(world.five).digest
    Session(directory).add(f"three={world.three}", force=True)
    assert session("ba be", "three")[0].version == Adapter.read(world.five).digest
    session.refresh()
    assert session("ba be", "three")[0].version == before.version


def another_process(lines):
    """Run lines of Python in one."""
    program = "from pathlib import Path\nfrom propulsion_export import add_adapter\n"
    program += "\n".join(line.strip() for line in lines.splitlines())
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_an_unknown_name_does_not_read_the_whole_artifact_again(copied, monkeypatch):
    """Else anybody who may name an adapter could keep a server busy with its weights."""
    for kind in KINDS:
        session = Session(copied(kind))
        monkeypatch.setattr(Artifact, "read", lambda *_: pytest.fail("was read again"))

        with pytest.raises(UnknownAdapterError, match="no adapter 'nine'"):
            session("ba", "nine")
        monkeypatch.undo()


def test_a_name_that_nobody_gave_is_looked_up_where_it_came_from(copied, world):
    """The only adapter is the default; with two it is the base model."""
    directory = copied("switchable")
    remove_adapter(directory, "five")
    session = Session(directory)
    before = session._roster

    class Swapping(type(before)):
        """Between the two looks at it another thread has changed the adapters."""

        @property
        def default(self):
            session.add(f"four={world.five}")
            session.remove("three")
            return super().default

    session._roster = Swapping(**vars(before))

    assert session("ba be")[0].adapter == "three"
    assert session("ba be")[0].adapter == "four"


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_has_one_version_of_a_name_while_it_is_replaced(kind, copied, world):
    directory = copied(kind)
    session, other = Session(directory), Session(directory)
    session.add(f"x={world.three}")
    labels = {Adapter.read(d).digest: Adapter.read(d).labels for d in (world.three, world.five)}
    texts = [TEXTS[row % 8] for row in range(64)]
    seen, over = set(), threading.Event()

    def change():
        turn = 0
        while not over.is_set():
            turn += 1
            who = session if turn % 2 else other
            who.add(f"x={(world.three, world.five)[turn % 2]}", force=True)
            if turn % 3 == 0:
                other.add(f"y={world.three}")
                session.refresh()
                other.remove("y")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(40):
            replies = session(texts, ["x", "three", "x", "base"] * 16)
            versions = {reply.version for reply in replies if reply.adapter == "x"}
            assert len(versions) == 1
            assert all(r.labels == labels[r.version] for r in replies if r.adapter == "x")
            assert all(len(r.outputs["logits"]) == len(r.labels) for r in replies)
            seen |= versions
    finally:
        over.set()
        changer.join()
    assert seen == labels.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_opens_while_others_change_the_artifact(kind, copied, world):
    """Files that the manifest named a moment ago may be gone."""
    directory = copied(kind)
    other, over = Session(directory), threading.Event()

    def change():
        while not over.is_set():
            other.add(f"x={world.three}", force=True)
            other.remove("x")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        for _ in range(10):
            session = Session(directory)
            assert {"three", "five"} <= set(session.adapters) <= {"three", "five", "x"}
            session.refresh()
    finally:
        over.set()
        changer.join()


# The bank stays where it is


def resident():
    """Bytes of memory that belong to this process alone, and of all its memory."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        lines = dict(line.split(":", 1) for line in status)
    return tuple(int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))


def test_a_large_bank_is_mapped_and_not_copied(copied, world):
    directory = copied("banked")
    bank = Artifact.read(directory).open_bank()
    stride = bank.width * 4
    rows = 256 * 2**20 // stride
    with sqlite3.connect(directory / REGISTRY_FILE) as db:  # as if as many had come and gone
        db.execute("UPDATE bank SET next_row = ?", (rows,))
    db.close()
    os.truncate(bank.find_file(), rows * stride)
    Session(directory)("ba be")  # what loading costs anyway
    gc.collect()
    anonymous, everything = resident()

    session = Session(directory)
    session.add(f"last={world.five}")
    replies = session(TEXTS, ["last", "three", "base", "five"] * 2)

    grown = np.subtract(resident(), (anonymous, everything))
    values = session._roster.snapshot.values
    assert values.nbytes >= 256 * 2**20
    assert session._roster.placed.value.data_ptr() == values.ctypes.data
    assert session._roster.snapshot.rows["last"].number == rows
    assert (grown < 40 * 2**20).all(), grown
    assert replies[0].prediction["label"].startswith("five-")


def test_a_request_in_flight_keeps_the_bank_that_it_began_with(copied, world):
    directory = copied("banked")
    session = Session(directory)
    session.add(f"gone={world.five}")
    inputs, names = random_inputs(), ["three", "gone", "base", "three"] * 4
    before = [reply.outputs["logits"] for reply in session(inputs, names)]
    [group] = session._roster.groups(names, ROWS)

    session.remove("five")
    session.remove("gone")
    Artifact.read(directory).open_bank().compact()
    session.add(f"three={world.five}", force=True)
    gc.collect()

    assert [path.name for path in directory.glob("adapters/bank*.bin")] == ["bank-1.bin"]
    for logits, reply in zip(before, session._model.answer_tensors(inputs, group), strict=True):
        np.testing.assert_array_equal(logits, reply.outputs["logits"])
    assert session(inputs, "three")[0].version == Adapter.read(world.five).digest


# Threads and processes


class Borrowed:
    """A tokenizer that fails as some versions do when two threads are in it."""

    def __init__(self, tokenizer):
        self.tokenizer, self.inside = tokenizer, threading.Lock()

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *arguments, **options):
        if not self.inside.acquire(blocking=False):
            raise RuntimeError("Already borrowed")
        try:
            return self.tokenizer(*arguments, **options)
        finally:
            self.inside.release()


def in_threads(count, work):
    """Run `work(number)` in threads that start together; what they raised."""
    raised, barrier = [], threading.Barrier(count)

    def run(number):
        barrier.wait()
        try:
            work(number)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


@pytest.mark.parametrize("kind", ["banked", "llama"])
def test_one_thread_at_a_time_is_in_the_tokenizer(kind, banked, generative, monkeypatch):
    module = texts_module if kind == "banked" else generation_module
    read = module.read_serving_tokenizer
    opened_times = []

    def counting(directory):
        opened_times.append(directory)
        return Borrowed(read(directory))

    directory = banked if kind == "banked" else generative(kind).directory
    monkeypatch.setattr(module, "read_serving_tokenizer", counting)
    session = Session(directory)
    settings = None if kind == "banked" else Settings(new_tokens=1)
    texts = [" ".join(["ba be bi"] * 40)] * 6 if kind == "banked" else TEXTS

    raised = in_threads(8, lambda _: [session(texts, settings=settings) for _ in range(6)])

    assert raised == []
    assert len(opened_times) == 1

    # The twin: without the lock it would have been noticed.
    class Open:
        def __enter__(self): ...
        def __exit__(self, *_): ...

    model = session._model
    model._text = replace(model._text, one_at_a_time=Open())
    assert {str(e) for e in in_threads(8, lambda _: [
        session(texts, settings=settings) for _ in range(20)
    ])} == {"Already borrowed"}  # fmt: skip


def test_threads_get_what_one_gets(opened, generative):
    session, made = opened("banked"), generative("llama")
    settings = Settings(new_tokens=4)
    names = ["three", "five", "base", "five"] * 2
    wanted = [reply.prediction for reply in session(TEXTS, names)]
    written = [r.prediction for r in made.session(TEXTS[:2], ["one", "two"], settings=settings)]

    def work(_):
        for _ in range(5):
            assert [reply.prediction for reply in session(TEXTS, names)] == wanted
            replies = made.session(TEXTS[:2], ["one", "two"], settings=settings)
            assert [reply.prediction for reply in replies] == written

    assert in_threads(6, work) == []


def test_generating_in_threads_leaves_standard_output_alone(generative):
    session, before = generative("llama").session, sys.stdout

    assert in_threads(6, lambda _: session(TEXTS, settings=Settings(new_tokens=1))) == []

    assert sys.stdout is before


def test_a_session_is_pickled_as_its_artifact(opened):
    session = opened("banked")

    again = pickle.loads(pickle.dumps(session))

    assert [r.prediction for r in again(TEXTS, "five")] == [
        r.prediction for r in session(TEXTS, "five")
    ]
    assert repr(again) == repr(session)
    assert repr(session).endswith("bank: text-classification, onnxruntime, 2 adapters>")


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_is_told_to_open_its_own(opened):
    session = opened("banked")
    session("ba")

    child = os.fork()
    if child == 0:
        try:
            session("ba")
        except UsageError as error:
            os._exit(7 if "Open a session in each process" in str(error) else 1)
        os._exit(2)

    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


MASK = np.ones((2, 3), np.int64)
IDS = np.array([[5, 6, 7], [8, 9, 10]])


def test_tensors_are_taken_as_a_tokenizer_or_torch_gives_them(banked):
    session = Session(banked)
    whole = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": 0 * MASK}
    expected = session(whole, adapter=["three", "five"])

    for inputs in (
        {"input_ids": IDS, "attention_mask": MASK},
        {"input_ids": IDS.astype(np.int32), "attention_mask": MASK.astype(bool)},
        {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist()},
    ):
        for reply, other in zip(session(inputs, adapter=["three", "five"]), expected, strict=True):
            np.testing.assert_array_equal(reply.outputs["logits"], other.outputs["logits"])


@pytest.mark.parametrize(
    ("inputs", "found"),
    [
        ({"adapter_ids": IDS}, "the input 'adapter_ids' is unknown, expected only"),
        (
            {"input_ids": IDS.astype(float)},
            r"input_ids: is float64 \[2, 3\], expected whole",
        ),
        ({"attention_mask": MASK[:, 0]}, r"attention_mask: is int64 \[2\], expected whole numbers"),
        (
            {"attention_mask": np.ones((2, 7), int)},
            r"attention_mask \[2, 7\], .*expected one shape",
        ),
        ({"input_ids": -MASK}, "input_ids: has -1, expected no number below zero"),
        ({"input_ids": [[1, 2, 3], [4, 5]]}, "input_ids: has rows of different lengths"),
        ({"token_type_ids": 0 * MASK[:, :2]}, r"token_type_ids \[2, 2\], expected one shape"),
    ],
)
def test_tensors_that_the_model_would_not_take_are_told_in_a_line(inputs, found, banked):
    with pytest.raises(UsageError, match=found):
        Session(banked)({"input_ids": IDS, "attention_mask": MASK, **inputs})


@pytest.mark.parametrize(
    ("text", "found"),
    [("ba \ud800 ce", "text 2: holds half a character"), (None, "text 2: is NoneType")],
)
def test_what_no_tokenizer_reads_is_told_in_a_line(text, found, banked):
    with pytest.raises(UsageError, match=found):
        Session(banked)(["ba", text], adapter="three")


@pytest.mark.parametrize(
    "inputs", [0, None, b"ba", {"ba", "be"}, iter(["ba"]), np.array("ba")], ids=type
)
def test_what_is_neither_texts_nor_tensors_is_told_in_a_line(inputs, banked):
    found = f"the inputs are {type(inputs).__name__}, expected a text, a list of texts, or tensors"

    with pytest.raises(UsageError, match=found):
        Session(banked)(inputs)


@pytest.mark.parametrize(
    ("adapter", "found"),
    [
        (0, "adapter: is int, expected a name, or a list of one for each row"),
        (1.5, "adapter: is float"),
        (b"three", "adapter: is bytes"),
        ({"three"}, "adapter: is set"),
        ({"three": 1}, "adapter: is dict"),
        ([["three"]], "adapter 1: is list, expected a name"),
        (["three", None], "adapter 2: is NoneType, expected a name"),
        ([0, 1], "adapter 1: is int, expected a name; adapter 2: is int, expected a name"),
        (np.array(0), "adapter: is ndarray"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["switchable", "bank"])
def test_what_names_no_adapter_is_told_in_a_line(kind, adapter, found, export_world):
    session = Session(export_world(kind))

    for inputs in (["ba", "be"], {"input_ids": IDS, "attention_mask": MASK}):
        with pytest.raises(UsageError, match=re.escape(found)):
            session(inputs, adapter)


def test_names_may_be_in_a_tuple_or_an_array(banked):
    session = Session(banked)

    for adapter in (("three", "five"), np.array(["three", "five"])):
        assert [one.adapter for one in session(["ba", "be"], adapter)] == ["three", "five"]


def test_what_is_no_adapter_is_neither_added_nor_removed(switchable):
    session = Session(switchable)

    with pytest.raises(UsageError, match="adapter: is int, expected a directory, or NAME=DIR"):
        session.add(0)
    with pytest.raises(UsageError, match="adapter: is list, expected a name"):
        session.remove(["three"])
