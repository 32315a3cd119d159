"""The artifacts that mistakes are planted in: tiny models and adapters, exported every way."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import genai_toys
import numpy as np
from tiny_models import LABELS, make_model, make_random_adapter, save_tokenizer

from kinds import ENCODER_DECODERS, GENERATIVE
from propulsion_export.adapters.scales import Scale

DEGREE = 15
PRECISIONS = ("float32", "float16", "bfloat16")
ARCHITECTURES = ("encoder", "decoder", "encoder-decoder")


@dataclass(frozen=True)
class Toy:
    """One artifact.

    Attributes:
        kind: of the model, see `tiny_models`.
        mode: `folded`, `switchable`, `bank`, or `merged`, a checkpoint.
        dtype: of weights and activations.
        task: of an encoder; generative models have one task.
        exporter: `transformers` or `genai`.
        form: the form of quantised weights; None for weights in floating point.
        bits: of a quantised weight.
    """

    kind: str
    mode: str
    dtype: str = "float32"
    task: str = ""
    exporter: str = "transformers"
    form: str | None = None
    bits: int = 4

    @property
    def architecture(self) -> str:
        if self.kind in ENCODER_DECODERS:
            return "encoder-decoder"
        return "decoder" if self.kind in GENERATIVE else "encoder"

    @property
    def name(self) -> str:
        quantised = f"int{self.bits}-{self.form}" if self.form else ""
        exporter = self.exporter if self.exporter == "genai" else ""
        parts = (self.kind, self.task, self.mode, exporter, quantised, self.dtype)
        return "_".join(filter(None, parts))

    @property
    def precision(self) -> str:
        """The dtype of its weights, or the integers that they are quantised to."""
        return self.dtype if self.form is None else f"int{self.bits}"

    @property
    def shape(self) -> str:
        """Its mode, or what is more telling: quantised weights, or the builder's graph."""
        if self.form is not None:
            return "quantised"
        return "builder" if self.exporter == "genai" else self.mode

    @property
    def runs_in_python(self) -> bool:
        """Whether no runtime here has kernels for it, but onnx's own evaluator."""
        return self.dtype == "bfloat16" and self.mode != "merged"

    @property
    def adapters(self) -> tuple[str, ...]:
        """The names of its adapters."""
        return ("one",) if self.mode in ("folded", "merged") else ("one", "two")


def _all() -> Iterator[Toy]:
    modes = ("switchable", "folded", "bank", "merged")
    for dtype, mode in product(PRECISIONS, modes):
        yield Toy("bert", mode, dtype, "text-classification")
        yield Toy("llama", mode, dtype)
        yield from _encoder_decoders(dtype, mode)
    for dtype in PRECISIONS:
        yield Toy("gpt2", "switchable", dtype)
        yield Toy("t5", "switchable", dtype)
    yield Toy("bert", "switchable", "float32", "feature-extraction")
    yield Toy("mistral", "switchable")
    yield Toy("llama", "switchable", exporter="genai")
    yield Toy("llama", "folded", exporter="genai")
    for mode in ("switchable", "folded"):
        yield Toy("llama", mode, form="matmulnbits")
    yield Toy("llama", "switchable", form="qdq", bits=8)


def _encoder_decoders(dtype: str, mode: str) -> Iterator[Toy]:
    """In float16 BART's code branches on the values of a batch, which no graph can hold."""
    if dtype == "float32" or mode == "merged" or (dtype, mode) == ("bfloat16", "switchable"):
        yield Toy("bart", mode, dtype)
    if dtype == "float16" and mode != "switchable":
        yield Toy("t5", mode, dtype)


TOYS = tuple(_all())


def build(toy: Toy, root: Path) -> Path:
    """The directory of the artifact below `root`, exported if it is not there yet.

    Other processes that want the same wait.
    """
    directory = root / "artifacts" / toy.name
    with _locked(root / f"{_base_name(toy)}.lock"):
        if not directory.is_dir():
            sources = [_world(toy, root) / name for name in toy.adapters]
            staged = directory.with_name(f"{toy.name}.exporting")
            shutil.rmtree(staged, ignore_errors=True)
            _export(toy, sources, staged)
            staged.rename(directory)
    return directory


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _base_name(toy: Toy) -> str:
    exporter = toy.exporter if toy.exporter == "genai" else ""
    return "_".join(filter(None, (exporter, toy.kind, toy.task)))


def _world(toy: Toy, root: Path) -> Path:
    """The directory of the base model and its adapters."""
    world = root / _base_name(toy)
    if not (world / "complete").exists():
        shutil.rmtree(world, ignore_errors=True)
        _write_world(toy, world)
        (world / "complete").touch()
    return world


def _write_world(toy: Toy, world: Path) -> None:
    """Write the base model, and adapters that are never the identity."""
    from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

    generative = toy.kind in GENERATIVE
    model = _model(toy)
    base = world / "base"
    model.save_pretrained(base)
    save_tokenizer(base, generative=generative)
    if toy.task == "feature-extraction":
        _write_sentence_pipeline(base)
    for seed, name in ((1, "one"), (2, "two")):
        made = make_random_adapter(
            model,
            seed,
            name,
            task=toy.task or _generative_task(toy),
            biases=not generative,
            embeddings=toy.exporter != "genai",  # which the builder has no place for
            head=toy.task == "text-classification",
            labels=LABELS if toy.task == "text-classification" else None,
        )
        # The root of a scale, as training finds it; an odd degree keeps its sign.
        vectors = {
            path: Scale(np.sign(s.values) * np.abs(s.values) ** (1 / DEGREE))
            for path, s in made.scales.items()
        }
        fingerprint = fingerprint_of_model(model)
        directory = world / name
        directory.mkdir()
        replace(made, scales=vectors, base=str(base), fingerprint=fingerprint).write(directory)
        config = directory / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"degree": DEGREE}))


def _model(toy: Toy) -> Any:
    if toy.exporter == "genai":
        return genai_toys.make_model(toy.kind)  # heads as wide as the builder's kernels need
    return make_model(toy.kind, *(() if toy.kind in GENERATIVE else (toy.task,)))


def _generative_task(toy: Toy) -> str:
    return "text2text-generation" if toy.kind in ENCODER_DECODERS else "text-generation"


def _write_sentence_pipeline(base: Path) -> None:
    """The files of a sentence-transformers model with mean pooling and a normalisation."""
    kinds = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds.items())
    ]
    (base / "modules.json").write_text(json.dumps(modules))
    (base / "1_Pooling").mkdir()
    (base / "2_Normalize").mkdir()
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    (base / "1_Pooling" / "config.json").write_text(json.dumps(pooling))


def _export(toy: Toy, adapters: list[Path], directory: Path) -> None:
    from propulsion_export import export_onnx, merge

    directory.parent.mkdir(parents=True, exist_ok=True)
    if toy.mode == "merged":
        merge(adapters[0], directory, dtype=toy.dtype)
        return
    quantised: dict[str, Any] = {}
    if toy.form is not None:
        quantised = {"quantize": f"int{toy.bits}", "quantization_form": toy.form}
    if toy.form == "matmulnbits":
        quantised |= {"block_size": 16, "accuracy_level": 1}
    export_onnx(
        adapters,
        directory,
        mode=toy.mode,
        dtype=toy.dtype,
        exporter=toy.exporter,
        **quantised,
    )
