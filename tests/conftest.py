"""Fixtures for all tests: tiny models, and exports of them; each module says what it gives."""

pytest_plugins = ["tiny_models", "worlds"]
