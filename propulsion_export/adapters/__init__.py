"""Adapters: scales, biases and heads trained on a base model, read from and written to disk."""
