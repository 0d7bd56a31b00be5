"""The command line: parse, call one function, print. Imports no torch before a request is known to be valid.

stdout carries results only (paths, or JSON with --json); everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import difflib
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from videogen import __version__
from videogen.cli import (
    batch,
    convert,
    data,
    decode,
    doctor,
    extend,
    generate,
    info,
    lora,
    models,
    plan,
    post,
    prompt,
    rerun,
    tools,
    train,
)
from videogen.errors import InvalidRequest, Note, VideogenError, as_known, visible


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: see docs/command_line.md."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        args = parse(argv)
        with warnings.catch_warnings():
            warnings.simplefilter("always", Note)
            warnings.showwarning = partial(_show, set(), warnings.showwarning)
            return args.run(args) or 0
    except VideogenError as error:
        return _report(str(error), error.exit_code, debug)
    except KeyboardInterrupt as error:
        kept = [f"  try: {note}" for note in getattr(error, "__notes__", [])]
        return _report("\n".join(["\ninterrupted; no partial file is left.", *kept]), 143 if error.args else 130, debug)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        known = as_known(error)
        return _report(str(known), known.exit_code, debug)


def _show(
    said: set[str],
    usual: Callable[..., None],
    message: Warning | str,
    category: type[Warning],
    *where: Any,
) -> None:
    """Our own notes on a line of their own, each once; warnings of libraries as ever."""
    if not issubclass(category, Note):
        usual(message, category, *where)
    elif str(message) not in said:
        said.add(str(message))
        print(visible(f"note: {message}"), file=sys.stderr)


def _terminate(*_: Any) -> NoReturn:
    """SIGTERM, which supervisors send, ends a command as ^C does: what is half written is removed."""
    raise KeyboardInterrupt("terminated")


def _report(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print(text, file=sys.stderr)
    return code


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ours: three lines, exit code 2, nearest names."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(f"{message}.", why="the arguments do not read as a command.", hint=f"{self.prog} --help")

    def names(self) -> list[str]:
        return [name for action in self._actions for name in action.option_strings]

    def inner(self) -> tuple[str, dict[str, Parser]]:
        """Of a command with commands of its own: where the chosen name goes in the namespace, and their parsers."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.dest, dict(action.choices)
        return "", {}

    def chosen(self, args: argparse.Namespace) -> Parser:
        """The parser of the innermost command that was given."""
        name, parsers = self.inner()
        return parsers[getattr(args, name)].chosen(args) if parsers else self


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `run` set to the function of the command."""
    parser, commands = build()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise _unknown("command", argv[0], list(commands), "videogen --help")
    if argv and argv[0].startswith("-") and argv[0] not in parser.names():
        raise _unknown("option", argv[0], parser.names(), "videogen --help")
    args, unknown = parser.parse_known_args(argv)
    given = argv[1:]
    if getattr(args, "config", None):
        given = [*generate.config_flags(*args.config), *given]
        args, unknown = parser.parse_known_args([argv[0], *given])
    if getattr(args, "preset", None):
        args, unknown = parser.parse_known_args([argv[0], *generate.preset_flags(args.preset, args.model), *given])
    command = commands[args.command].chosen(args)
    for name in unknown:
        if name.startswith("-"):
            raise _unknown("option", name.partition("=")[0], command.names(), f"{command.prog} --help")
        if "overrides" in args:  # settings may stand behind flags
            args.overrides.append(name)
            continue
        raise InvalidRequest(
            f"{name!r} is one argument too many.",
            why="text of several words needs quotes.",
            hint=f"{command.prog} --help",
        )
    return args


def _unknown(kind: str, name: str, known: list[str], help: str) -> InvalidRequest:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}?   ({help} lists all)" if near else help
    return InvalidRequest(
        f"there is no {kind} {name}.", why=f"videogen does not know this {kind}.", hint=hint, param=name
    )


def build() -> tuple[Parser, dict[str, Parser]]:
    """The parser, and each command's own by name and alias."""
    parser = Parser(
        prog="videogen",
        description="Text- and image-to-video with the CogVideoX family.",
        epilog="First clip: videogen text-to-video 'a small red circle moves right on a navy background'",
    )
    parser.add_argument("--version", action="version", version=f"videogen {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="command", required=True, parser_class=Parser)
    generate.add_commands(subparsers)
    tools.add_commands(subparsers)
    lora.add_command(subparsers)
    convert.add_command(subparsers)
    for module in (train, batch, rerun, extend, post, prompt):
        module.add_command(subparsers)
    data.add_command(subparsers)
    for module in (info, doctor, models, plan, decode):
        module.add_command(subparsers)
    outer = set(subparsers.choices.values())
    for command in outer | {inner for one in outer for inner in one.inner()[1].values()}:
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, dict(subparsers.choices)
