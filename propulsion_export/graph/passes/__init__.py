"""Passes on a traced graph, each with its precondition."""
