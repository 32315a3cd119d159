"""What onnxruntime-genai reads beside a graph and its adapter files: its configuration."""

from collections.abc import Sequence
from typing import Any

from propulsion_export.decoding import LOGITS, PAST, PRESENT
from propulsion_export.manifest import GRAPH_FILE, TensorSpec
from propulsion_export.special_tokens import SpecialTokens

CONFIG_FILE = "genai_config.json"
# Its name for any graph of the inputs and outputs below. For the architectures whose names it
# knows (`llama`, `phi3`) it does nothing else; for others (`gptj`, `bloom`) it has no name.
_TYPE = "decoder"
_READ = ("input_ids", "attention_mask", "position_ids")


def genai_config(
    inputs: Sequence[TensorSpec], config: Any, special: SpecialTokens, *, longest: int
) -> dict[str, Any]:
    """What `genai_config.json` has to say of a decoder graph.

    Args:
        inputs: of the graph.
        config: transformers' configuration of the model.
        special: its special tokens.
        longest: tokens of prompt and answer together.
    """
    names = [spec.name for spec in inputs]
    key = next(spec for spec in inputs if spec.name.startswith(f"{PAST}."))
    kinds = ("key", "value")
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": GRAPH_FILE,
        "head_size": key.shape[3],
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": key.shape[1],
        "num_hidden_layers": sum(name.startswith(f"{PAST}.") for name in names) // len(kinds),
        "inputs": {name: name for name in _READ if name in names}
        | {f"past_{kind}_names": f"{PAST}.%d.{kind}" for kind in kinds},
        "outputs": {LOGITS: LOGITS}
        | {f"present_{kind}_names": f"{PRESENT}.%d.{kind}" for kind in kinds},
    }
    return {
        "model": {
            "type": _TYPE,
            "context_length": longest,
            "vocab_size": config.vocab_size,
            **_tokens(special),
            "decoder": decoder,
        },
        # Each step returns a longer cache; the other way is for graphs that write into a fixed one.
        "search": {"do_sample": False, "max_length": longest, "past_present_share_buffer": False},
    }


def _tokens(special: SpecialTokens) -> dict[str, Any]:
    """The runtime wants a number for each, and masks padding in a batch by its number."""
    return {
        "bos_token_id": 0 if special.begin is None else special.begin,
        "eos_token_id": list(special.end),
        "pad_token_id": next(iter(special.end), 0) if special.pad is None else special.pad,
    }
