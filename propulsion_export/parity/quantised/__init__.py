"""Parity of an artifact whose base model has quantised weights: its verdict and its price."""
