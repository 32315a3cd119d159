"""The program `propulsion-export`: finds commands and shows known failures in one line."""

import errno
import importlib
import json
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import click

from propulsion_export.artifacts.disk_errors import FULL
from propulsion_export.environment.locale_encoding import LOCALE_REMEDY, unread_bytes
from propulsion_export.environment.paths import check_current_directory
from propulsion_export.environment.quiet import silence_optional_packages
from propulsion_export.environment.threads import limit_threads
from propulsion_export.errors import PropulsionExportError, UnavailableError, UsageError

from .streams import (
    READER_GONE,
    ReaderGone,
    broken_pipes_as_ours,
    forget_unwritten,
    prepare_streams,
    print_note,
    print_result,
)

# What --help shows. A command's module is imported when the command runs.
COMMANDS = {
    "train": "Train a Propulsion adapter on labelled text.",
    "merge": "Fold an adapter into the weights: a plain transformers checkpoint.",
    "onnx": "Export to ONNX: an adapter folded in, several to switch, or one in every row.",
    "trt": "Build a TensorRT or TensorRT-RTX engine from an ONNX export.",
    "parity": "Compare an artifact with PyTorch: does it compute the same?",
    "run": "Predict with an artifact, or generate text.",
    "package": "Write what a server loads: onnxruntime-genai, Triton, ONNX Runtime adapters.",
    "inspect": "Describe an adapter, artifact, engine or GGUF file.",
    "adapter": "Add, remove and list adapters of a switchable artifact or a bank.",
    "export": "All in one: adapters in; ONNX graph, engine and parity reports out.",
    "doctor": "Show what this machine can do, and what is missing.",
}
# The extra that installs a module; other modules come with the package itself.
_EXTRAS = {
    "gguf": "gguf",
    "onnxruntime": "cpu",
    "onnxruntime_genai": "genai",
    "polygraphy": "rtx",
    "tensorrt": "tensorrt",
    "tensorrt_rtx": "rtx",
}
# Come with the plain install; an environment that only serves lacks them.
_PLAIN = {"torch", "transformers", "peft", "onnx", "onnx_ir", "onnxscript", "datasets"}
# Errors caused by a path, a disk or a limit, not by this tool.
_FILE_ERRORS = {errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.EIO, *FULL}
_HELP = {"-h", "--help", "--version"}
_BUG = 70  # EX_SOFTWARE of sysexits.h


class LazyGroup(click.Group):
    """Imports a command's module, of the same name, when the command is called."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        with broken_pipes_as_ours():  # --help and --version print here
            return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        with broken_pipes_as_ours():
            return super().invoke(ctx)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f".{cmd_name}", __package__)
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                raise click.UsageError(
                    f"{error.message} Did you mean '{near[0]}'?", ctx=ctx
                ) from error
            raise


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: propulsion-export doctor. Shell completion: docs/command-line.md.",
)
@click.version_option(package_name="propulsion-export")
def app() -> None:
    """Propulsion adapters to production: train, fold or keep switchable, ONNX, engines, parity."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the program and exit: 0, 1 out of tolerance, 2, 3, 4, 70 for a bug, 130 or 141."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    try:
        prepare_streams(arguments)
        _check_surroundings(arguments)
        silence_optional_packages()
        code = app.main(list(arguments), prog_name="propulsion-export", standalone_mode=False)
    except ReaderGone:
        code = READER_GONE
    except (KeyboardInterrupt, Exception) as error:
        code = _explain(error, arguments)
    forget_unwritten()
    sys.exit(code if isinstance(code, int) else 0)


def _check_surroundings(arguments: Sequence[str]) -> None:
    """Refuse what no command can work with, and mend what it can.

    Raises:
        UsageError: an argument is not in the locale's encoding; the current directory has been
            deleted.
    """
    for argument in arguments:
        if finding := unread_bytes(argument):
            raise UsageError(f"{argument!a}: {finding}", remedy=LOCALE_REMEDY)
    if not _HELP & set(arguments):
        check_current_directory()
    finding = limit_threads()
    if finding and not {"-q", "--quiet"} & set(arguments):
        print_note(finding)


def _explain(error: BaseException, arguments: Sequence[str]) -> int:
    """Print what went wrong, in one line unless it is a bug; return the exit code."""
    if isinstance(error, click.exceptions.Abort) and isinstance(error.__cause__, EOFError):
        error = error.__cause__  # click takes the end of any file for the end of a prompt
    if isinstance(error, KeyboardInterrupt | click.exceptions.Abort):
        return _fail("interrupted", 130, arguments)
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "propulsion-export"
        return _fail(f"{error.format_message()} See {path} --help.", 2, arguments)
    if isinstance(error, ModuleNotFoundError) and error.name in {*_EXTRAS, *_PLAIN}:
        extra = f"[{_EXTRAS[error.name]}]" if error.name in _EXTRAS else ""
        remedy = f"Run: pip install 'propulsion-export{extra}'."
        error = UnavailableError(f"{error.name} is not installed", remedy=remedy)
    if isinstance(error, PropulsionExportError):
        if "-v" in arguments or "--verbose" in arguments:
            print_note("".join(traceback.format_exception(error)).rstrip())
        return _fail(str(error), error.exit_code, arguments)
    if isinstance(error, FileNotFoundError) and "No usable temporary directory" in str(error):
        return _fail(f"{error.strerror}. Set TMPDIR to one that can be written to.", 3, arguments)
    if isinstance(error, OSError) and error.errno in _FILE_ERRORS:
        return _fail(f"{error.filename or 'the output'}: {error.strerror}", 2, arguments)
    # A bug keeps its traceback; Python's own exit code 1 means a failed comparison here.
    print_note("".join(traceback.format_exception(error)).rstrip())
    return _BUG


def _fail(message: str, code: int, arguments: Sequence[str]) -> int:
    print_note(f"propulsion-export: {message}")
    if "--json" in arguments:
        with suppress(ReaderGone, UsageError):
            print_result(json.dumps({"error": message, "exit_code": code}))
    return code
