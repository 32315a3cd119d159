"""Conversations as a model reads them: the chat template, rendered without torch."""
