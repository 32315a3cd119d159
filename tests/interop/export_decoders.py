"""Write what `check_decoders.py` loads: tiny exports, and the tokens that PyTorch generates.

    python tests/interop/export_decoders.py DIRECTORY

Runs in the project's environment, with `tests` on the path. Weights and adapters are random.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tiny_models import make_model, make_random_adapter, save_tokenizer

from propulsion_export import export_onnx
from propulsion_export.adapters.adapter import Adapter
from propulsion_export.base_model.model_fingerprint import fingerprint_of_model
from propulsion_export.scaling.attach import attached

# Rotary positions, a table of positions, and none at all.
DECODERS = ("llama", "gpt2", "bloom")
ENCODER_DECODERS = ("t5", "bart")
LENGTHS = (9, 4, 6)
NEW = 48
NAME = "tuned"


@torch.no_grad()
def tokens_behind(model: torch.nn.Module, prompt: list[int]) -> list[int]:
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
    )
    read = 1 if model.config.is_encoder_decoder else len(prompt)
    return found[0, read:].tolist()


def write(kind: str, output: Path) -> dict[str, list[list[int]]]:
    """Export one model both ways; returns prompts, and tokens by state."""
    model = make_model(kind)
    task = "text2text-generation" if kind in ENCODER_DECODERS else "text-generation"
    model.save_pretrained(output / "base")
    save_tokenizer(output / "base", generative=True)
    adapter = replace(
        make_random_adapter(model, name=NAME, task=task),
        base=str(output / "base"),
        fingerprint=fingerprint_of_model(model),
    )
    (output / NAME).mkdir(exist_ok=True)
    adapter.write(output / NAME)
    for mode in ("folded", "switchable"):
        export_onnx([output / NAME], output / mode, mode=mode, force=True)
    chooser = np.random.default_rng(0)
    prompts = [chooser.integers(5, 100, length).tolist() for length in LENGTHS]
    base = [tokens_behind(model, prompt) for prompt in prompts]
    with attached(model, Adapter.read(output / NAME)):
        tuned = [tokens_behind(model, prompt) for prompt in prompts]
    return {"prompts": prompts, "base": base, NAME: tuned}


def main() -> None:
    output = Path(sys.argv[1])
    expected = {}
    for kind in (*DECODERS, *ENCODER_DECODERS):
        (output / kind).mkdir(parents=True, exist_ok=True)
        expected[kind] = write(kind, output / kind)
    content = {
        "adapter": NAME, "new": NEW, "kinds": expected, "encoder_decoders": ENCODER_DECODERS
    }  # fmt: skip
    (output / "tokens.json").write_text(json.dumps(content))
    print(f"wrote {output}")


if __name__ == "__main__":
    main()
