"""`run`: predict with an artifact."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from propulsion_export.artifact import Artifact, Tensors
from propulsion_export.errors import UsageError
from propulsion_export.manifest import BASE_NAME
from propulsion_export.pipeline.inputs import read_texts
from propulsion_export.pipeline.running import RunnerName, choose_runner, open_runner


def predict(
    artifact: Path,
    *,
    text: Sequence[str] = (),
    inputs: Path | None = None,
    adapter: Sequence[str] = (),
    runner: RunnerName = "auto",
) -> list[dict[str, Any]]:
    """Predict for texts; one plain JSON value a text.

    Args:
        artifact: directory of a merged checkpoint, an ONNX export or an engine.
        text: the texts.
        inputs: more of them, a line each (.txt) or JSONL with `text`.
        adapter: names, one for all texts or one for each; default: the only one, or the base model.
        runner: what runs it.

    Raises:
        UsageError: there is no text, or another number of adapters than of texts.
        ArtifactError: the artifact has no such adapter.
        UnavailableError: this machine cannot run it.
    """
    read = Artifact.read(artifact)
    texts = [*text, *(read_texts(inputs) if inputs else ())]
    if not texts:
        raise UsageError("no text is given, expected some", remedy="Give --text or --inputs.")
    names = _one_each(read, adapter, len(texts))
    run = open_runner(read, choose_runner(read, runner))
    predictions: dict[int, dict[str, Any]] = {}
    # One adapter for a whole batch: rows of the same adapter go together.
    for name in dict.fromkeys(names):
        rows = [index for index, other in enumerate(names) if other == name]
        batch = _encode(read, [texts[row] for row in rows])
        outputs = run({**batch, **read.feeds(name)})
        for position, row in enumerate(rows):
            predictions[row] = {
                "text": texts[row],
                "adapter": name or BASE_NAME,
                **_describe(read, name, batch, outputs, position),
            }
    return [predictions[row] for row in range(len(texts))]


def _one_each(artifact: Artifact, given: Sequence[str], count: int) -> list[str | None]:
    if len(given) > 1 and len(given) != count:
        raise UsageError(f"{len(given)} adapters for {count} texts, expected one, or one each")
    if given:
        return [*given] if len(given) == count else [given[0]] * count
    known = artifact.manifest.adapters
    return [next(iter(known)) if len(known) == 1 else None] * count


def _encode(artifact: Artifact, texts: list[str]) -> Tensors:
    from propulsion_export.base import read_config, read_tokenizer
    from propulsion_export.sampling import text_inputs

    tokenizer = read_tokenizer(artifact.directory)
    if tokenizer is None:
        raise UsageError(f"{artifact.directory}: has no tokenizer to read texts with")
    config = read_config(str(artifact.directory))
    names: tuple[str, ...] = ("input_ids", "attention_mask", "token_type_ids")
    if artifact.manifest.inputs:
        known = {spec.name for spec in artifact.manifest.inputs}
        names = tuple(name for name in names if name in known)
    limit = int(getattr(config, "max_position_embeddings", 512))
    return text_inputs(names, tokenizer, texts, limit)


def _describe(
    artifact: Artifact, name: str | None, batch: Tensors, outputs: Tensors, row: int
) -> dict[str, Any]:
    """What a person wants to know of one row's outputs, by task."""
    task = artifact.manifest.task
    length = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else None
    if task == "text-classification":
        return _best(outputs["logits"][row], _labels(artifact, name))
    if task == "token-classification":
        labels = _labels(artifact, name)
        return {"tokens": [_best(token, labels) for token in outputs["logits"][row][:length]]}
    if task == "question-answering":
        return {
            "start": int(outputs["start_logits"][row][:length].argmax()),
            "end": int(outputs["end_logits"][row][:length].argmax()),
        }
    if task == "fill-mask":
        return _fill(artifact, batch["input_ids"][row], outputs["logits"][row])
    hidden = outputs["last_hidden_state"][row][:length].astype(np.float64)
    mean = hidden.mean(axis=0)
    return {"embedding": [round(float(value), 6) for value in mean]}


def _labels(artifact: Artifact, name: str | None) -> Sequence[str] | None:
    entries = artifact.manifest.adapters
    if name is None or name == BASE_NAME:
        return artifact.manifest.base.labels
    return entries[name].labels


def _best(logits: Any, labels: Sequence[str] | None) -> dict[str, Any]:
    """The likeliest class and its probability, among the adapter's own labels only."""
    wide = np.asarray(logits, dtype=np.float64)[: len(labels) if labels else None]
    shares = np.exp(wide - wide.max())
    shares /= shares.sum()
    best = int(shares.argmax())
    return {
        "label": labels[best] if labels else f"LABEL_{best}",
        "score": round(float(shares[best]), 6),
    }


def _fill(artifact: Artifact, tokens: Any, logits: Any) -> dict[str, Any]:
    from propulsion_export.base import read_tokenizer

    tokenizer = read_tokenizer(artifact.directory)
    places = [int(p) for p in np.flatnonzero(tokens == tokenizer.mask_token_id)]  # type: ignore[union-attr]
    best = [tokenizer.decode([int(logits[place].argmax())]).strip() for place in places]  # type: ignore[union-attr]
    return {"filled": best}
