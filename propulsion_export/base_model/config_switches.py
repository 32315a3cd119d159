"""Settings in a base model's `config.json` that change the form of its outputs, not their values.

Somebody set them for a use of the model in PyTorch. Graphs, runners and the oracle need the outputs
in their usual form, so they are reset on loading; a merged checkpoint has them as before.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# The values that every command loads with.
OUTPUT_SWITCHES: Mapping[str, Any] = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
    "torchscript": False,
    # Computes in chunks of a length that every input's must be a multiple of.
    "chunk_size_feed_forward": 0,
}
# How to compute, which may need another machine's packages; None lets transformers choose.
_IMPLEMENTATIONS = ("_attn_implementation", "_experts_implementation")


def reset_switches_(config: "PretrainedConfig") -> None:
    """Set the switches of a configuration and of its parts to their usual values."""
    for part in _parts(config):
        for name, usual in OUTPUT_SWITCHES.items():
            if getattr(part, name, usual) != usual:
                setattr(part, name, usual)
        for name in _IMPLEMENTATIONS:
            setattr(part, name, None)


def keep_switches_(content: dict[str, Any], written: Mapping[str, Any]) -> None:
    """Set the switches in a `config.json` and its parts as another one, `written`, has them."""
    content |= {name: written[name] for name in OUTPUT_SWITCHES if name in written}
    for name, part in content.items():
        if isinstance(part, dict) and isinstance(written.get(name), dict):
            keep_switches_(part, written[name])


def _parts(config: "PretrainedConfig") -> Iterator["PretrainedConfig"]:
    """A configuration, and those that it consists of, such as a text model's."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _parts(part)
