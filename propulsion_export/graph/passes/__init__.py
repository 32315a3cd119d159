"""Passes over a traced graph, each of which checks its precondition."""
