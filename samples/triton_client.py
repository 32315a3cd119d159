"""Send texts to Triton Inference Server, each for an adapter: `topic="a large wild cat"`."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import tritonclient.http as triton
from transformers import AutoTokenizer
from tritonclient.utils import triton_to_np_dtype

BUCKET = 8  # tokens: Triton batches requests of equal lengths only, so there should be few lengths


def encode(directory, texts, adapters):
    """The tensors of a request by name: one row per text, padded to one length."""
    if not texts or len(adapters) != len(texts):
        raise SystemExit(
            f"{len(texts)} texts and {len(adapters)} adapters, expected an adapter for each text, "
            "and one text at least"
        )
    tokenizer = AutoTokenizer.from_pretrained(directory)
    known = json.loads((directory / "adapters.json").read_text(encoding="utf-8"))
    if unknown := set(adapters) - known.keys():
        raise SystemExit(f"{directory}: has no adapter {min(unknown)!r}, only {', '.join(known)}")
    pipeline = sentences(directory, tokenizer)
    if pipeline:
        texts = pipeline.with_prompt(texts)
    tokens = tokenizer(
        texts,
        padding=True,
        pad_to_multiple_of=BUCKET,
        truncation=True,
        max_length=pipeline.limit if pipeline else None,
        return_tensors="np",
    )
    # An id of no adapter gives NaN, and an engine does not check ids at all.
    ids = [known[name]["id"] for name in adapters]
    id_feeds = {} if None in ids else {"adapter_ids": np.array(ids, np.int64)[:, None]}
    heads = [(known[name]["labels"], known[name]["problem_type"]) for name in adapters]
    # Some models need token_type_ids although their tokenizer does not return them.
    types = {"token_type_ids": np.zeros_like(tokens["input_ids"])}
    types |= {"task_type_ids": types["token_type_ids"]}  # of ERNIE: zero, as in transformers
    return {**types, **tokens, **id_feeds}, tokens["attention_mask"], heads


def sentences(directory, tokenizer):
    """How sentence-transformers embeds texts with this model; None where it does not say."""
    if not (directory / "modules.json").exists():
        return None
    from propulsion_export.base_model.sentences.texts import open_sentence_texts  # loads no torch

    return open_sentence_texts(directory, tokenizer)


def embed(directory, hidden, mask):
    """The embedding of each row's token vectors."""
    texts = sentences(directory, AutoTokenizer.from_pretrained(directory))
    if texts is None:
        print("the base has no sentence pipeline: mean over the tokens", file=sys.stderr)
    pool = texts.embed if texts else lambda own: own.mean(axis=0)
    rows = zip(hidden, mask, strict=True)
    return [pool(row[own == 1]).round(6).tolist() for row, own in rows]


def infer(client, name, tensors):
    """The model's outputs by name; sends those of the tensors that are its inputs."""
    metadata = client.get_model_metadata(name)
    inputs = []
    for wanted in metadata["inputs"]:
        values = tensors[wanted["name"]].astype(triton_to_np_dtype(wanted["datatype"]))
        inputs.append(triton.InferInput(wanted["name"], values.shape, wanted["datatype"]))
        inputs[-1].set_data_from_numpy(values)
    result = client.infer(name, inputs)
    return {output["name"]: result.as_numpy(output["name"]) for output in metadata["outputs"]}


def predict(client, directory, texts, adapters):
    """For each text its label or labels, a label for each token, an embedding, or numbers.

    For other tasks the outputs' shapes.
    """
    tensors, mask, heads = encode(directory, texts, adapters)
    outputs = infer(client, directory.name, tensors)
    if "last_hidden_state" in outputs:
        return embed(directory, outputs["last_hidden_state"], mask)
    if "logits" not in outputs or any(names is None for names, _ in heads):
        return [
            {name: values[row].shape for name, values in outputs.items()}
            for row in range(len(texts))
        ]
    answers = []
    for row, (names, kind) in enumerate(heads):
        # Heads with fewer labels are padded: the adapter's own come first.
        logits = outputs["logits"][row][..., : len(names)]
        if kind == "regression":
            answers.append(logits.tolist())
            continue
        if kind == "multi_label_classification":  # a logit above 0 is a probability above 0.5
            answers.append([name for name, logit in zip(names, logits, strict=True) if logit >= 0])
            continue
        best = logits.argmax(-1)
        answers.append([names[one] for one in best[mask[row] == 1]] if best.ndim else names[best])
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="the model's directory in the repository")
    parser.add_argument("texts", nargs="+", metavar="ADAPTER=TEXT", help="`base`: no adapter")
    parser.add_argument("--url", default="localhost:8000")
    given = parser.parse_args()
    pairs = [text.partition("=") for text in given.texts]
    texts, adapters = [text for _, _, text in pairs], [name for name, _, _ in pairs]
    client = triton.InferenceServerClient(given.url)
    for text, name, answer in zip(
        texts, adapters, predict(client, given.directory, texts, adapters), strict=True
    ):
        print(f"{text}\t{name}\t{answer}")


if __name__ == "__main__":
    main()
