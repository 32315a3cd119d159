"""The command line: a file a command; parse, call one function, print.

Importing this package loads neither torch nor any command, so that `--help` answers at once.
"""

from .app import main

__all__ = ["main"]
