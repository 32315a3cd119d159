"""Passes on the traced graph, and reading and writing it.

`dimensions` names the symbolic dimensions, `packing` makes initializers inputs, `finishing`
optimises, sets defaults and reads the signature, `files` reads and writes.
"""
