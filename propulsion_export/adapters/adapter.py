"""An adapter as all stages after training use it: effective scales by module path.

A Propulsion vector z of degree k acts as the scale s = z**k (arXiv 2409.10927). (IA)^3 vectors are
scales already; those of its feed-forward modules multiply a layer's INPUT. This module needs only
numpy and safetensors.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from propulsion_export.adapters.names import name_of
from propulsion_export.adapters.peft_directory import (
    BIAS_SUFFIX,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    PREFIX,
    VECTOR_SUFFIX,
    read_peft_directory,
)
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tasks import TASKS, TaskName, task_of_peft
from propulsion_export.environment.cached import cached_property
from propulsion_export.environment.paths import real_directory, user_path
from propulsion_export.errors import AdapterError


@dataclass(frozen=True)
class Adapter:
    """The parameters trained on top of a frozen base model, and their provenance.

    Attributes:
        name: the adapter's name in artifacts; by default its directory's name.
        scales: the scales by module path of the base model, or by name of an experts' parameter.
        biases: trained biases, shape [channels], by module path; they replace the frozen ones
            inside the product: (x W^T + b) * s.
        modules: parameters of modules trained and saved whole (the head), by parameter name.
        frozen: shapes of the copies of frozen parameters that PEFT saved too, by parameter name.
        base: name or path of the base model that the adapter was trained on.
        fingerprint: the fingerprint of that base model; None for adapters of other tools.
        task: a task such as `text-classification`; None if the adapter names none.
        labels: class names in the order of the logits; None if the adapter names none.
        model_settings: what training changed in the base model's config.json, such as
            `pad_token_id`, and the `problem_type` of its head.
        tokenizer_settings: what it changed in tokenizer_config.json, such as `pad_token`.
        source: the directory that it was read from, absolute and through no link, so that all else
            that is in it is read from there too; empty for one that was not read.
    """

    name: str
    scales: Mapping[str, Scale]
    biases: Mapping[str, Array] = field(default_factory=dict)
    modules: Mapping[str, Array] = field(default_factory=dict)
    frozen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    base: str | None = None
    fingerprint: Fingerprint | None = None
    task: TaskName | None = None
    labels: tuple[str, ...] | None = None
    model_settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer_settings: Mapping[str, Any] = field(default_factory=dict)
    source: str = field(default="", compare=False)

    @property
    def size(self) -> int:
        """The number of scales of all modules together."""
        return sum(scale.values.size for scale in self.scales.values())

    @cached_property
    def digest(self) -> str:
        """`sha256:…` of everything that affects the outputs, so not of the name; computed once."""
        digest = hashlib.sha256()
        for kind, arrays in (
            ("scale", {path: scale.values for path, scale in self.scales.items()}),
            ("bias", self.biases),
            ("module", self.modules),
        ):
            for key in sorted(arrays):
                side = self.scales[key].side if kind == "scale" else ""
                values = np.ascontiguousarray(arrays[key], dtype=np.float64)
                digest.update(f"{kind} {key} {side} {values.shape}\n".encode())
                digest.update(values.tobytes())
        return f"sha256:{digest.hexdigest()}"

    def is_identity(self) -> bool:
        """Whether the frozen layers compute the same without the adapter; its head may differ."""
        return not self.biases and all((s.values == 1).all() for s in self.scales.values())

    @classmethod
    def read(cls, directory: Path | str, name: str | None = None) -> "Adapter":
        """Read a PEFT adapter directory, `peft_type` PROPULSION or IA3.

        Raises:
            AdapterError: something is missing, damaged, of the wrong shape or not finite; the
                adapter is of another method, or only a pickle.
        """
        directory = user_path(directory)
        real = real_directory(directory)
        found = read_peft_directory(real)
        return cls(
            name=name or name_of(directory),
            scales=found.scales,
            biases=found.biases,
            modules=found.modules,
            frozen=found.frozen,
            base=found.base,
            fingerprint=found.fingerprint,
            task=task_of_peft(found.task_type),
            labels=found.labels,
            model_settings=found.model_settings,
            tokenizer_settings=found.tokenizer_settings,
            source=str(real.absolute()),
        )

    def write(self, directory: Path) -> None:
        """Write a Propulsion adapter of degree 1, which PEFT reads once this package is imported.

        `directory` must exist. Scales are rounded to float32; everything else keeps its dtype.

        Raises:
            AdapterError: a scale multiplies a module's input, which Propulsion cannot express, or
                is too large for float32.
        """
        config = json.dumps(self._peft_config(), indent=2) + "\n"
        weights = save(self._peft_tensors(), metadata={"format": "pt"})
        (directory / PEFT_CONFIG).write_text(config, encoding="utf-8")
        (directory / PEFT_WEIGHTS).write_bytes(weights)

    def _peft_tensors(self) -> dict[str, Array]:
        """What PEFT's file of weights holds, by PEFT's names."""
        inputs = [path for path, scale in self.scales.items() if scale.side == "input"]
        if inputs:
            raise AdapterError(
                *(
                    f"{path}: scales the input, a Propulsion vector scales outputs"
                    for path in inputs
                )
            )
        with np.errstate(over="ignore"):
            tensors = {
                f"{PREFIX}{path}{VECTOR_SUFFIX}": scale.values.astype(np.float32)
                for path, scale in self.scales.items()
            }
        overflowing = [
            f"{key.removeprefix(PREFIX)}: holds a scale that is too large for float32"
            for key, values in tensors.items()
            if not np.isfinite(values).all()
        ]
        if overflowing:
            raise AdapterError(*overflowing)
        tensors |= {f"{PREFIX}{path}{BIAS_SUFFIX}": bias for path, bias in self.biases.items()}
        tensors |= {PREFIX + name: values for name, values in self.modules.items()}
        # safetensors writes an array's memory and ignores its strides.
        return {key: np.ascontiguousarray(values) for key, values in tensors.items()}

    def _peft_config(self) -> dict[str, Any]:
        """What PEFT's configuration file holds."""
        # PEFT knows modules only; an experts' parameter is named by the module that has it.
        targets = {
            path.rpartition(".")[0] if scale.values.ndim > 1 else path
            for path, scale in self.scales.items()
        }
        return {
            "peft_type": "PROPULSION",
            "degree": 1,
            "target_modules": sorted(targets),
            "train_bias": bool(self.biases),
            "modules_to_save": sorted({name.rpartition(".")[0] for name in self.modules}) or None,
            "base_model_name_or_path": self.base,
            "base_fingerprint": self.fingerprint.to_json() if self.fingerprint else None,
            "labels": list(self.labels) if self.labels else None,
            "model_settings": dict(self.model_settings) or None,
            "tokenizer_settings": dict(self.tokenizer_settings) or None,
            "scaled_modules": len(self.scales),
            "task_type": TASKS[self.task].peft_type if self.task in TASKS else None,
            "inference_mode": True,
        }
