"""From command-line arguments to an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType

from ..ir.errors import CutsetError, RuntimeFailure
from . import calibrate, explain, export, place, plan, profile, run, simulate, verify
from .command import Command
from .console import Console

__all__ = ["COMMANDS", "build_parser", "main"]

COMMANDS: tuple[Command, ...] = (
    plan.COMMAND,
    explain.COMMAND,
    verify.COMMAND,
    simulate.COMMAND,
    place.COMMAND,
    export.COMMAND,
    run.COMMAND,
    calibrate.COMMAND,
    profile.COMMAND,
)
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    Args:
        argv: arguments without the program's name; None: those of the process.
    """
    try:
        options = build_parser().parse_args(argv)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 2
    console = Console(json_wanted=options.json)
    try:
        # A model that prints must not spoil the JSON on stdout.
        with (
            _interruptible_imports(console),
            contextlib.redirect_stdout(sys.stderr),
            console.catching_warnings(),
        ):
            options.command.run(options, console)
    except KeyboardInterrupt:
        console.note("interrupted")
        return _INTERRUPTED
    except BrokenPipeError:
        return 1
    except Exception as error:
        if options.debug:
            traceback.print_exc(file=console.err)
        known = error if isinstance(error, CutsetError) else _unexpected(error)
        console.error(known)
        return known.exit_code
    return 0


@contextlib.contextmanager
def _interruptible_imports(console: Console) -> Iterator[None]:
    """Ctrl-C while torch is imported ends the process at once; nothing has begun by then.

    torch imports numpy from C++, drops what that raises, and goes on with half of it.
    """

    def on_interrupt(number: int, frame: FrameType | None) -> None:
        spec = getattr(sys.modules.get("torch"), "__spec__", None)
        if getattr(spec, "_initializing", False):
            console.note("interrupted")
            os._exit(_INTERRUPTED)
        signal.default_int_handler(number, frame)

    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # who called has a way of his own
        return
    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _unexpected(error: Exception) -> CutsetError:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return RuntimeFailure(
        f"{type(error).__name__}: {error}",
        where=f"{frame.filename}:{frame.lineno}, in {frame.name}",
        ways_out=("run again with --debug to see the traceback",),
    )


def build_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; `options.command` is the verb's `Command`."""
    parser = argparse.ArgumentParser(
        prog="cutset",
        description="Partition PyTorch models over devices: plan, inspect, prove, run.",
        epilog="exit codes: 0 success, 1 infeasible or failed, 2 bad usage or input",
    )
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for command in COMMANDS:
        verb = verbs.add_parser(
            command.name,
            help=command.summary,
            description=command.summary,
            epilog="examples:\n" + "\n".join(f"  {line}" for line in command.examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.configure(verb)
        verb.add_argument("--json", action="store_true", help="print the result as JSON")
        verb.add_argument("--debug", action="store_true", help="show tracebacks of errors")
        verb.set_defaults(command=command)
    return parser
