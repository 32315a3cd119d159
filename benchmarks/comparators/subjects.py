"""Toy models with a trained-looking adapter each: right exports, and what PyTorch computes."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from propulsion_export import Adapter, export_onnx, merge
from propulsion_export.artifacts.artifact import Artifact
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from tiny_models import LABELS, make_model, make_random_adapter, save_tokenizer

VOCABULARY = 300  # more ids than 8 bits hold
LONGEST = 128
KINDS = {"encoder": "bert", "decoder": "llama"}
TASKS = {"encoder": "text-classification", "decoder": "text-generation"}
# Ends of the length range, and what lies behind the positions that a mistake leaves alone.
ROW_LENGTHS = (LONGEST, 1, 2, 5, 17, 63, 66, 100)
PROMPTS = (80, 66, 33, 5, 80, 12)
LONGEST_PROMPT = max(PROMPTS)
WORD = 50  # a token that the inputs hold
Tensors = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Subject:
    """A model with its adapter, exported rightly; what mistakes are planted into.

    Attributes:
        kind: `encoder`, a BERT that classifies texts, or `decoder`, a Llama with its cache.
        dtype: of the exports: `float32` or `float16`.
        root: directory that holds `base`, `adapter`, `other` (another adapter), `merged` (a
            checkpoint with the adapter folded) and `clean` (the ONNX artifact).
    """

    kind: str
    dtype: str
    root: Path

    @property
    def name(self) -> str:
        return f"{self.kind} {self.dtype}"

    @property
    def clean(self) -> Path:
        return self.root / "clean"

    @property
    def adapter(self) -> Adapter:
        return Adapter.read(self.root / "adapter", "tuned")

    def export(self, adapter: Adapter, directory: Path, base: Path | None = None) -> Path:
        """Fold another adapter, or another base model, into an artifact that says it is right."""
        wrong = directory.with_name(f"{directory.name}-adapter")
        model = Path(adapter.base or "") if base is None else base
        fingerprint = fingerprint_of_model(load(self.kind, model))
        wrong.mkdir(parents=True)
        replace(adapter, base=str(model), fingerprint=fingerprint).write(wrong)
        export_onnx([f"tuned={wrong}"], directory, dtype=self.dtype, exporter="transformers")
        right = Artifact.read(self.clean).manifest
        Artifact.write(directory, replace(right, files={}))
        return directory


def make_subject(kind: str, dtype: str, root: Path) -> Subject:
    """Write everything that a Subject holds below `root`."""
    subject = Subject(kind, dtype, root)
    model = make(kind, seed=0)
    for place, seed in (("base", 0), ("sibling", 1)):
        make(kind, seed=seed, near=model).save_pretrained(root / place)
        save_tokenizer(root / place, generative=kind == "decoder")
    for place, seed in (("adapter", 1), ("other", 2)):
        write_adapter(model, kind, root / place, seed, root / "base")
    merge(f"tuned={root / 'adapter'}", root / "merged", dtype=dtype)
    adapter = f"tuned={root / 'adapter'}"
    export_onnx([adapter], subject.clean, dtype=dtype, exporter="transformers")
    return subject


def make(kind: str, seed: int, near: torch.nn.Module | None = None) -> torch.nn.Module:
    """A random toy; with another seed than 0, `near` trained on: every weight a little off."""
    model = make_model(KINDS[kind], vocab_size=VOCABULARY, max_position_embeddings=LONGEST, seed=0)
    if seed and near is not None:
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.01 * parameter.std() * torch.randn(parameter.shape))
    return model


def write_adapter(
    model: torch.nn.Module, kind: str, directory: Path, seed: int, base: Path
) -> None:
    encoder = kind == "encoder"
    made = make_random_adapter(
        model,
        seed,
        "tuned",
        biases=encoder,
        head=encoder,
        labels=LABELS if encoder else None,
        task=TASKS[kind],
    )
    directory.mkdir(parents=True)
    replace(made, base=str(base), fingerprint=fingerprint_of_model(model)).write(directory)


def load(kind: str, directory: Path, dtype: str = "float32") -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    family = AutoModelForSequenceClassification if kind == "encoder" else AutoModelForCausalLM
    return family.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()


def reference_runs(subject: Subject) -> list[tuple[Tensors, Tensors]]:
    """Inputs and PyTorch's outputs at the artifact's precision, the right adapter folded."""
    model = load(subject.kind, subject.root / "merged", subject.dtype)
    with torch.inference_mode():
        if subject.kind == "encoder":
            return [encoder_run(model)]
        return decoder_runs(model)


def encoder_run(model: torch.nn.Module) -> tuple[Tensors, Tensors]:
    """Rows of all lengths, padded at their ends, with both token types."""
    chooser = np.random.default_rng(7)
    tokens = chooser.integers(5, VOCABULARY, (len(ROW_LENGTHS), LONGEST))
    mask = (np.arange(LONGEST) < np.array(ROW_LENGTHS)[:, None]).astype(np.int64)
    tokens[0, -1], tokens[1, 0], tokens[0, 1] = VOCABULARY - 1, 2, WORD
    types = chooser.integers(0, 2, tokens.shape)
    inputs = {
        "input_ids": tokens * mask,
        "attention_mask": mask,
        "token_type_ids": types * mask,
    }
    return inputs, {"logits": model(**as_torch(inputs)).logits.numpy()}


def decoder_runs(model: torch.nn.Module) -> list[tuple[Tensors, Tensors]]:
    """Prompts, padded at their ends, then a token more for each, which reads the cache."""
    chooser = np.random.default_rng(7)
    tokens = chooser.integers(5, VOCABULARY, (len(PROMPTS), LONGEST_PROMPT + 1))
    tokens[0, 0], tokens[1, 1], tokens[0, 2] = VOCABULARY - 1, 2, WORD
    lengths = np.array(PROMPTS)[:, None]
    mask = (np.arange(LONGEST_PROMPT) < lengths).astype(np.int64)
    places = np.broadcast_to(np.arange(LONGEST_PROMPT), mask.shape)
    prompt = {
        "input_ids": tokens[:, :-1],
        "attention_mask": mask,
        "position_ids": places,
    }
    first = model(**as_torch(prompt), use_cache=True)
    before = cache_of(first)
    nothing = {name: values[:, :, :0] for name, values in before.items()}
    step = {
        "input_ids": tokens[:, -1:],
        "attention_mask": np.concatenate([mask, np.ones_like(lengths)], axis=1),
        "position_ids": lengths,
    }
    second = model(**as_torch(step), past_key_values=first.past_key_values, use_cache=True)
    return [
        (prompt | fed(nothing), {"logits": first.logits.numpy(), **returned(before)}),
        (step | fed(before), {"logits": second.logits.numpy(), **returned(cache_of(second))}),
    ]


def cache_of(output: object) -> dict[str, np.ndarray]:
    """Keys and values by layer, [rows, heads, positions, width], copied."""
    layers = output.past_key_values.layers
    return {
        f"{place}.{part}": getattr(layer, f"{part}s").numpy().copy()
        for place, layer in enumerate(layers)
        for part in ("key", "value")
    }


def fed(cache: Tensors) -> dict[str, np.ndarray]:
    return {f"past_key_values.{name}": values for name, values in cache.items()}


def returned(cache: Tensors) -> dict[str, np.ndarray]:
    return {f"present.{name}": values for name, values in cache.items()}


def as_torch(inputs: Tensors) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.ascontiguousarray(each)) for name, each in inputs.items()}
