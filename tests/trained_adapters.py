"""What tests compare of a trained adapter's directory."""

import json

import pytest

# PEFT reads the old name; training itself is quiet about it.
peft_reads_an_old_name = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def weights_of(directory):
    return (directory / "adapter_model.safetensors").read_bytes()


def metrics_of(directory):
    return json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
