"""Write what `check_optimum.py` loads: each kind of export, and the logits PyTorch computes.

    python tests/interop/export.py DIRECTORY

Runs in the project's environment. The adapter is random and far from the identity.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from minilm import model_directory
from propulsion_export import export_onnx, merge
from propulsion_export.adapters.adapter import Adapter, Scale
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model

NAME = "tuned"
LABELS = ("animal", "artifact", "place")
# Of different lengths, so that the batch is padded; a capital, which the tokenizer has to lower.
TEXTS = ("a cat", "a sharp tool for cutting wood by hand", "The capital of a country")


def random_adapter(model: torch.nn.Module) -> Adapter:
    """Scales between 0.5 and 1.5 for every Linear and Embedding under the head, and a new head."""
    chooser = np.random.default_rng(1)
    widths = {
        path: module.weight.shape[0 if isinstance(module, torch.nn.Linear) else 1]
        for path, module in model.bert.named_modules(prefix="bert")
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    head = {f"classifier.{name}": value for name, value in model.classifier.named_parameters()}
    return Adapter(
        name=NAME,
        scales={path: Scale(chooser.uniform(0.5, 1.5, width)) for path, width in widths.items()},
        modules={
            name: chooser.normal(0, 0.2, value.shape).astype(np.float32)
            for name, value in head.items()
        },
        base=str(model_directory()),
        fingerprint=fingerprint_of_model(model),
        task="text-classification",
        labels=LABELS,
    )


@torch.no_grad()
def expected(model: torch.nn.Module, adapter: Adapter) -> dict[str, torch.Tensor]:
    """The batch of TEXTS, and its logits with the adapter and, its head kept, without."""
    tokens = AutoTokenizer.from_pretrained(model_directory())(
        list(TEXTS), padding=True, return_tensors="pt"
    )
    head = {name: torch.from_numpy(values) for name, values in adapter.modules.items()}
    model.load_state_dict(head, strict=False)
    base = model(**tokens).logits
    for path, scale in adapter.scales.items():
        values = torch.from_numpy(scale.values).float()
        model.get_submodule(path).register_forward_hook(
            lambda module, arguments, output, values=values: output * values
        )
    return {**tokens, "logits.base": base, f"logits.{NAME}": model(**tokens).logits}


def main() -> None:
    output = Path(sys.argv[1])
    model = AutoModelForSequenceClassification.from_pretrained(
        model_directory(), num_labels=len(LABELS)
    ).eval()
    adapter = random_adapter(model)
    directory = output / NAME
    directory.mkdir(parents=True, exist_ok=True)
    adapter.write(directory)
    merge(directory, output / "merged", force=True)
    export_onnx([directory], output / "folded", force=True)
    export_onnx([directory], output / "switchable", mode="switchable", force=True)
    metadata = {"texts": "\n".join(TEXTS), "labels": "\n".join(LABELS), "adapter": NAME}
    save_file(expected(model, adapter), output / "expected.safetensors", metadata)
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
