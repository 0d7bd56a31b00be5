"""The command line: parse, call one function, print. Imports no torch before a request is known to be valid.

stdout carries results only (paths, or JSON with --json); everything for people goes to stderr.
"""

from __future__ import annotations

import argparse
import difflib
import sys
import traceback
from typing import NoReturn

from videogen import __version__
from videogen.cli import generate, tools
from videogen.errors import FileError, InvalidRequest, OutOfMemory, VideogenError


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: see docs/command_line.md."""
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    try:
        args = parse(argv)
        args.run(args)
        return 0
    except VideogenError as error:
        return _report(str(error), error.exit_code, debug)
    except KeyboardInterrupt:
        return _report("\ninterrupted; no partial file is left.", 130, debug)
    except BrokenPipeError:  # the reader of our output, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
            known: VideogenError = OutOfMemory(
                "out of memory.", why=_line(error), hint="--memory low, or a smaller --size or --frames."
            )
        elif isinstance(error, OSError):
            known = FileError(f"{_line(error)}.", why="reading or writing failed.", hint="check the disk and the path.")
        else:
            what = f"{type(error).__name__}: {_line(error)}"
            known = VideogenError(what, why="this is a bug in videogen.", hint="--debug shows where; please report it.")
        return _report(str(known), known.exit_code, debug)


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


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


def parse(argv: list[str]) -> argparse.Namespace:
    """The arguments, with `run` set to the function of the command."""
    parser, commands = build()
    if argv and not argv[0].startswith("-") and argv[0] not in commands:
        raise _unknown("command", argv[0], list(commands), "videogen --help")
    if argv and argv[0].startswith("-") and argv[0] not in parser.names():
        raise _unknown("option", argv[0], parser.names(), "videogen --help")
    args, unknown = parser.parse_known_args(argv)
    if getattr(args, "config", None):
        args, unknown = parser.parse_known_args([argv[0], *generate.config_flags(*args.config), *argv[1:]])
    command = commands[args.command]
    for name in unknown:
        if name.startswith("-"):
            raise _unknown("option", name.partition("=")[0], command.names(), f"videogen {args.command} --help")
        raise InvalidRequest(
            f"{name!r} is one argument too many.",
            why="text of several words needs quotes.",
            hint=f"videogen {args.command} --help",
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
    for command in set(subparsers.choices.values()):
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser, dict(subparsers.choices)
