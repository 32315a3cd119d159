"""The generative architectures that tests go through; `tiny_models.make_model` makes a tiny one."""

DECODERS = (
    "gpt2",
    "gptj",
    "bloom",
    "opt",
    "llama",
    "mistral",
    "qwen3",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3-moe",
)
EXPERTS = ("mixtral", "qwen3-moe")
ENCODER_DECODERS = ("t5", "bart")
GENERATIVE = (*DECODERS, *ENCODER_DECODERS)
