"""The command line: one file per command, which parses, calls one function and prints.

Importing this package loads neither torch nor any command, so that `--help` answers at once.
"""

from .app import main

__all__ = ["main"]
