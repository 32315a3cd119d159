"""What sentence-transformers makes of a model's token vectors, computed without torch."""
