"""Which models onnxruntime-genai's builder knows, and which of them it is known to get wrong.

A model that is not refused here may still be refused later: its graph is compared with PyTorch.
"""

from typing import Any

from propulsion_export.errors import ToolError
from propulsion_export.graph.genai.options import GenaiOptions

REMEDY = "Export with --exporter transformers."

# The builder's class for each model class of transformers. Left out: those that need code from
# outside transformers, and those for images and sound.
_CLASSES = {
    "Ernie4_5ForCausalLM": "ErnieModel",
    "GemmaForCausalLM": "GemmaModel",
    "Gemma2ForCausalLM": "Gemma2Model",
    "GptOssForCausalLM": "GPTOSSModel",
    "GraniteForCausalLM": "GraniteModel",
    "GraniteMoeHybridForCausalLM": "GraniteMoEHybridModel",
    "HunYuanDenseV1ForCausalLM": "HunyuanDenseV1Model",
    "Lfm2ForCausalLM": "LFM2Model",
    "Lfm2MoeForCausalLM": "LFM2MoEModel",
    "LlamaForCausalLM": "LlamaModel",
    "MistralForCausalLM": "MistralModel",
    "NemotronForCausalLM": "NemotronModel",
    "OlmoForCausalLM": "OLMoModel",
    "PhiForCausalLM": "PhiModel",
    "Phi3ForCausalLM": "Phi3MiniModel",
    "Qwen2ForCausalLM": "QwenModel",
    "Qwen3ForCausalLM": "Qwen3Model",
    "SmolLM3ForCausalLM": "SmolLM3Model",
}
# Names that the builder of 0.18 has but fails on, as transformers 5 configures these models.
_NESTED_ROPE = "reads rope settings that transformers 5 keeps for each kind of layer"
_GLOBAL_HEADS = "reads a setting that transformers 5 does not have (global_head_dim)"
_FAILING = {
    "Gemma3ForCausalLM": _NESTED_ROPE,
    "Gemma3ForConditionalGeneration": _NESTED_ROPE,
    "Gemma4ForCausalLM": _GLOBAL_HEADS,
    "Gemma4ForConditionalGeneration": _GLOBAL_HEADS,
}
_STEP = 16  # of GroupQueryAttention's head size and rotary dimension on the CPU
_EXPERTS = ("GptOssForCausalLM", "Lfm2MoeForCausalLM")


def builder_class(config: Any, model: str, options: GenaiOptions) -> str:
    """The name of the builder's class for a model.

    Args:
        config: transformers' configuration of the model.
        model: the name of its class in transformers.
        options: of the builder.

    Raises:
        ToolError: the builder does not know the model, or is known to get it wrong.
    """
    if (name := _CLASSES.get(model)) is None:
        reason = _FAILING.get(model, "does not know this architecture")
        raise ToolError(f"{model}: onnxruntime-genai's builder {reason}", remedy=REMEDY)
    if found := _known_mistake(config, model, options):
        raise ToolError(f"{model}: onnxruntime-genai's builder {found}", remedy=REMEDY)
    original = getattr(config, "original_max_position_embeddings", None)
    if model == "Phi3ForCausalLM" and original not in (None, config.max_position_embeddings):
        return "Phi3MiniLongRoPEModel"
    return name


def _known_mistake(config: Any, model: str, options: GenaiOptions) -> str | None:
    """What the builder does wrong, where no attribute of the graph mends it; None if nothing."""
    if model == "PhiForCausalLM" and getattr(config, "qk_layernorm", False):
        return "leaves out the norms of queries and keys (qk_layernorm)"
    if model == "SmolLM3ForCausalLM" and 0 in config.no_rope_layers:
        return "fails on layers without rotary embedding (no_rope_layers)"
    if options.bits is not None and model in _EXPERTS:
        return "quantises experts in a form that is not checked here"
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rotary = int(width * (getattr(config, "partial_rotary_factor", None) or 1))
    if options.execution_provider == "cpu" and (width % _STEP or rotary % _STEP):
        return (
            f"makes attention of heads of {width} with {rotary} rotated channels, which ONNX "
            f"Runtime's CPU provider computes for multiples of {_STEP} only"
        )
    return None
