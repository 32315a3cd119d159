"""Graphs of onnxruntime-genai's builder generate: ragged prompts, mixed rows, every cache."""

import json
import shutil

import numpy as np
import pytest
from genai_toys import KINDS

from propulsion_export.adapters.adapter import Adapter
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.serving.generation import Settings
from propulsion_export.serving.session import Session

NEW = 40
# Of 3, 10 and 6 tokens: shorter and longer than the window of gemma2 and qwen3.
TEXTS = ("ba be", "ba be bi ca ce ci da de di", "fol for got gol ha")
MODES = ("switchable", "bank")


@pytest.fixture(scope="session")
def by_transformers(genai_world):
    """`by_transformers(kind, text, name)`: PyTorch's greedy tokens, without the end token."""
    import torch
    from transformers import AutoTokenizer

    from propulsion_export.scaling.attach import attached

    def generate(kind, text, name=None, new=NEW):
        world = genai_world(kind)
        tokens = AutoTokenizer.from_pretrained(world.base)(text, return_tensors="pt")["input_ids"]
        adapter = Adapter(name="none", scales={})
        if name is not None:
            adapter = Adapter.read(getattr(world, name), name)
        with attached(world.model, adapter), torch.no_grad():
            found = world.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=new,
            )
        made = found[0, tokens.shape[1] :].tolist()
        return made[:-1] if made[-1] == 3 else made

    return generate


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_prompts_generate_pytorchs_tokens(kind, mode, genai_artifact, by_transformers):
    session = Session(genai_artifact(kind, mode))
    names = (None, "one", "two")

    rows = [(text, name) for name in names for text in TEXTS]
    replies = session(
        [text for text, _ in rows],
        [name or "base" for _, name in rows],
        settings=Settings(new_tokens=NEW),
    )

    found = [reply.prediction["tokens"] for reply in replies]
    assert found == [by_transformers(kind, *row) for row in rows]
    # The twins: neither another adapter nor another prompt gives the same.
    assert len({tuple(tokens) for tokens in found}) == len(rows)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "lfm2"])
def test_texts_end_at_different_tokens_and_are_streamed(
    kind, genai_artifact, by_transformers, tmp_path
):
    names = ("one", "two", "base")
    asked = zip(TEXTS, ("one", "two", None), strict=True)
    whole = [by_transformers(kind, *row) for row in asked]
    last = whole[1][5]  # the second text is the first to end, or one of the first
    directory = shutil.copytree(genai_artifact(kind, "bank"), tmp_path / "artifact")
    file = directory / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [3, last]}))
    Artifact.write(directory, Artifact.read(genai_artifact(kind, "bank")).manifest)
    pieces = {row: [] for row in range(3)}
    settings = Settings(new_tokens=NEW, on_text=lambda row, piece: pieces[row].append(piece))

    replies = Session(directory)(TEXTS, names, settings=settings)

    for row, reply in enumerate(replies):
        ended = last in whole[row]
        expected = whole[row][: whole[row].index(last)] if ended else whole[row]
        assert reply.prediction["tokens"] == expected
        assert reply.prediction["stopped"] == ("end" if ended or len(expected) < NEW else "length")
        assert "".join(pieces[row]) == reply.prediction["generated"]
    assert len(replies[1].prediction["tokens"]) <= 5


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_tensors_lie_where_their_tokens_do(kind, genai_artifact, genai_world):
    import torch

    from propulsion_export.scaling.attach import attached

    chooser = np.random.default_rng(5)
    tokens = chooser.integers(4, 100, (3, 12))
    mask = np.ones_like(tokens)
    mask[0, :7] = 0
    mask[1, 5:] = 0
    session = Session(genai_artifact(kind, "bank"))

    replies = session({"input_ids": tokens, "attention_mask": mask}, ["one", "two", "base"])

    world = genai_world(kind)
    for row, name in enumerate(("one", "two", None)):
        adapter = Adapter(name="none", scales={})
        if name is not None:
            adapter = Adapter.read(getattr(world, name), name)
        real = mask[row] == 1
        with attached(world.model, adapter), torch.no_grad():
            expected = world.model(torch.tensor(tokens[row][real])[None]).logits[0].numpy()
        np.testing.assert_allclose(replies[row].outputs["logits"][real], expected, atol=1e-3)
