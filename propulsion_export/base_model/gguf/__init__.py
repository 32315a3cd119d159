"""A base model in a GGUF file: its configuration, tokenizer and weights, or why it is refused."""
