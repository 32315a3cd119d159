"""A model's tokenizer: its files, how it is loaded, and the tokens of a text."""
