"""A GGUF file with an adapter folded in: only the scales of its blocks change."""
