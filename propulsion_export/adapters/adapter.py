"""An adapter as every stage after training sees it: effective scales by module path.

A Propulsion vector z of degree k acts as the scale s = z**k (arXiv 2409.10927). (IA)^3 vectors are
scales already; those of its feed-forward modules multiply a layer's INPUT. numpy and safetensors
are all that is needed.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from propulsion_export.adapters.peft_directory import (
    BIAS_SUFFIX,
    CONFIG_FILE,
    PREFIX,
    VECTOR_SUFFIX,
    WEIGHTS_FILE,
    read_peft_directory,
)
from propulsion_export.adapters.scales import Array, Scale
from propulsion_export.base_model.fingerprint import Fingerprint
from propulsion_export.base_model.tasks import TASKS, TaskName, task_of_peft
from propulsion_export.errors import AdapterError


@dataclass(frozen=True)
class Adapter:
    """What was trained on top of a frozen base model.

    Attributes:
        name: what the adapter is called in artifacts; a directory's name unless said otherwise.
        scales: by module path of the base model, or name of a parameter that holds experts.
        biases: trained biases, shape [channels], by module path; they replace the frozen ones
            inside the product: (x W^T + b) * s.
        modules: parameters of modules trained and saved whole (the head), by parameter name.
        base: name or path of the base model it was trained on.
        fingerprint: of that base model; None for adapters of other tools.
        task: such as `text-classification`; None when the adapter does not say.
        labels: class names in the order of the logits; None when the adapter does not say.
    """

    name: str
    scales: Mapping[str, Scale]
    biases: Mapping[str, Array] = field(default_factory=dict)
    modules: Mapping[str, Array] = field(default_factory=dict)
    base: str | None = None
    fingerprint: Fingerprint | None = None
    task: TaskName | None = None
    labels: tuple[str, ...] | None = None

    @property
    def size(self) -> int:
        """How many scales there are in all."""
        return sum(scale.values.size for scale in self.scales.values())

    @property
    def digest(self) -> str:
        """`sha256:…` of everything that changes what the adapter computes; not of its name."""
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
        """Whether the frozen layers compute as without it: all scales one, no trained bias."""
        return not self.biases and all((s.values == 1).all() for s in self.scales.values())

    @classmethod
    def read(cls, directory: Path | str, name: str | None = None) -> "Adapter":
        """Read a PEFT adapter directory, `peft_type` PROPULSION or IA3.

        Raises:
            AdapterError: something is missing, damaged, of the wrong shape, not finite, of another
                method, or would run code to be read.
        """
        directory = Path(directory).expanduser()
        found = read_peft_directory(directory)
        return cls(
            name=name or directory.resolve().name,
            scales=found.scales,
            biases=found.biases,
            modules=found.modules,
            base=found.base,
            fingerprint=found.fingerprint,
            task=task_of_peft(found.task_type),
            labels=found.labels,
        )

    def write(self, directory: Path) -> None:
        """Write as a degree-1 Propulsion adapter, which PEFT reads once this package is imported.

        `directory` must exist. Input-side scales have no Propulsion form; scales are rounded to
        float32, the rest keeps its dtype.

        Raises:
            AdapterError: a scale multiplies a module's input, or is too large for float32.
        """
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
            f"{key.removeprefix(PREFIX)}: holds a scale that float32 has no number for"
            for key, values in tensors.items()
            if not np.isfinite(values).all()
        ]
        if overflowing:
            raise AdapterError(*overflowing)
        tensors |= {f"{PREFIX}{path}{BIAS_SUFFIX}": bias for path, bias in self.biases.items()}
        tensors |= {PREFIX + name: values for name, values in self.modules.items()}
        # safetensors writes memory as it lies, whatever the strides say.
        tensors = {key: np.ascontiguousarray(values) for key, values in tensors.items()}
        peft_type = TASKS[self.task].peft_type if self.task in TASKS else None
        config = {
            "peft_type": "PROPULSION",
            "degree": 1,
            "target_modules": sorted(
                # PEFT knows modules only; the experts' module owns the parameter.
                {
                    path.rpartition(".")[0] if scale.values.ndim > 1 else path
                    for path, scale in self.scales.items()
                }
            ),
            "train_bias": bool(self.biases),
            "modules_to_save": sorted({name.rpartition(".")[0] for name in self.modules}) or None,
            "base_model_name_or_path": self.base,
            "base_fingerprint": self.fingerprint.to_json() if self.fingerprint else None,
            "labels": list(self.labels) if self.labels else None,
            "scaled_modules": len(self.scales),
            "task_type": peft_type,
            "inference_mode": True,
        }
        (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (directory / WEIGHTS_FILE).write_bytes(save(tensors, metadata={"format": "pt"}))
