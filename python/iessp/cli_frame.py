"""What all verbs share: --json, one line for an error, exit codes.

0 done; 1 it failed; 2 wrong use, which the caller can put right; 130 interrupted. Errors go to stderr. With --json
stdout has the result and nothing else, and what a person reads goes to stderr.
"""

from __future__ import annotations

import inspect
import json
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout, suppress
from functools import wraps
from typing import Annotated, Any

import typer
import typer.core
from rich.console import Console
from rich.markup import escape

from stripe_kernels import __version__

Verb = Callable[..., dict[str, Any] | None]

_USAGE_ERROR = typer.BadParameter.__bases__[0]  # typer 0.29 keeps its click to itself
_CLICK_ERROR = _USAGE_ERROR.__bases__[0]
_WRONG_USE = (ValueError, FileNotFoundError, NotADirectoryError, IsADirectoryError, ModuleNotFoundError)
_FAILED = (RuntimeError, OSError, ImportError, TypeError, AssertionError)


class _Plain:
    """A flag's help names no type: it takes no value."""

    def get_params(self, ctx: Any) -> Any:
        found = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False):
                parameter.metavar = ""
        return found


class _Command(_Plain, typer.core.TyperCommand):
    pass


class _Group(_Plain, typer.core.TyperGroup):
    pass


app = typer.Typer(
    name="iessp",
    cls=_Group,
    help="Learn which stripes of a network's convolutions to keep, freeze them, and run the rest faster.",
    epilog="MODEL is a file, a run's folder, package.module:factory or a built-in name. Every verb has --json. "
    "Start with: iessp demo",
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"iessp, stripe_kernels {__version__}")
        raise typer.Exit


@app.callback()
def _all(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


class Failure(RuntimeError):
    """Something that went wrong although the command was right: one line, status 1."""


def verb(example: str) -> Callable[[Verb], Verb]:
    """Makes a function a verb. What it returns is printed by --json; its help ends with `example`."""

    def register(function: Verb) -> Verb:
        @wraps(function)
        def run(*, as_json: bool, **arguments: Any) -> None:
            with redirect_stdout(sys.stderr) if as_json else nullcontext():
                result = function(**arguments)
            if as_json and result is not None:
                print(json.dumps(result, indent=2))
            if result is not None and result.get("failed"):
                raise typer.Exit(1)

        option = typer.Option("--json", help="Print the result as JSON; text for people goes to stderr.")
        flag = inspect.Parameter(
            "as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option]
        )
        signature = inspect.signature(function, eval_str=True)
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=[*signature.parameters.values(), flag], return_annotation=None
        )
        run.__doc__ = "\n\n".join(" ".join(part.split()) for part in (function.__doc__ or "").split("\n\n"))
        app.command(cls=_Command, epilog=f"Example: [bold]{escape(example)}[/]")(run)
        return function

    return register


def main() -> None:
    """Runs the command line and ends the process."""
    arguments = sys.argv[1:] or ["--help"]
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    try:
        code = app(arguments, prog_name="iessp", standalone_mode=False)
        sys.stdout.flush()  # what fails here would else fail when the interpreter ends, with words of its own
    except Exception as error:
        ending = _ending(error)
        if ending is None:  # a defect of ours: its traceback is wanted
            raise
        code, message = ending
        _say(message, "--json" in arguments)
        try:
            sys.stdout.flush()
        except OSError:  # the output may be what failed, as on a full disk
            _drop_output()
    sys.exit(code or 0)


def _ending(error: Exception) -> tuple[int, str] | None:
    """Exit code and message of an error that has one."""
    from iessp.train import Interrupted

    if isinstance(error, _USAGE_ERROR):
        return 2, f"{error.format_message()} ({_where(error)} --help)"  # type: ignore[attr-defined]
    if isinstance(error, _CLICK_ERROR):
        return 1, error.format_message()  # type: ignore[attr-defined]
    if isinstance(error, Interrupted):
        return 130, f"{error}. Run the same command again."
    if isinstance(error, BrokenPipeError):
        _drop_output()
        return 1, "the reader of the output has gone"
    if isinstance(error, Failure):
        return 1, str(error)
    if isinstance(error, _WRONG_USE):
        return 2, str(error)
    return (1, str(error)) if isinstance(error, _FAILED) else None


def _where(error: Exception) -> str:
    """The command that was used wrong; errors of options that lack their value do not know it."""
    context = getattr(error, "ctx", None)
    if context is not None:
        return str(context.command_path)
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return " ".join(["iessp", *(name for name in sys.argv[1:2] if name in verbs)])


def _say(message: str, as_json: bool) -> None:
    line = " ".join(message.split())
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]error:[/] {escape(line)}")
    if as_json:
        with suppress(OSError):  # unbuffered, it fails here already
            print(json.dumps({"error": line}))


def _drop_output() -> None:
    """The interpreter flushes stdout once more when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
