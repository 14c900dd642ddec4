"""From a command line to a command, and from whatever ends it to an exit status."""

from __future__ import annotations

import sys
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import TextIO

import shtab
import torch

from kappa_lightning.cli.command import Command
from kappa_lightning.cli.registry import load, names
from kappa_lightning.cli.terminal import discard_output, prepare_streams, printable
from kappa_lightning.version import __version__

PROGRAM = "kappa-lightning"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments, by default those of this process.

    Returns:
        The exit status: 0, 1 after an error, 2 for a wrong usage, 130 if interrupted.
    """
    prepare_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    known = names()
    # Of one command that is named first, nothing else need be imported.
    commands = {name: load(name) for name in (argv[:1] if argv and argv[0] in known else known)}
    try:
        args = _parser(commands).parse_args(argv)
        status = _run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        # The reader has what it wants, as `head` does; what is left in the buffer must not be tried again at exit.
        discard_output()
        return 0


def _run(args: Namespace) -> int:
    command: Command = args.command
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            return command.run(args)
    except BrokenPipeError:
        raise
    except (torch.OutOfMemoryError, MemoryError) as error:
        return _fail(f"out of memory{_cpu_hint(args)} ({error})")
    except RuntimeError as error:
        # What PyTorch raises when a CPU has no memory left; anything else is a fault of this program.
        if "allocate memory" not in str(error):
            raise
        return _fail(f"out of memory ({error})")
    except (OSError, ValueError, TypeError, ImportError) as error:
        notes = "; ".join(getattr(error, "__notes__", ()))
        return _fail((str(error) or type(error).__name__) + (f" ({notes})" if notes else ""))
    except KeyboardInterrupt:
        hint = "; the same command goes on from there" if command.resumes(args) else ""
        print(f"{PROGRAM}: interrupted{hint}", file=sys.stderr)
        return 130


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    print(f"{PROGRAM}: warning: {printable(' '.join(str(message).split()))}", file=sys.stderr)


def _fail(reason: str) -> int:
    # A name from a file must not begin a line of its own.
    print(f"{PROGRAM}: error: {printable(' '.join(reason.split()))}", file=sys.stderr)
    return 1


def _cpu_hint(args: Namespace) -> str:
    device = getattr(args, "device", None)
    return "" if device is None or device.type == "cpu" else "; --device cpu may have the memory"


def _parser(commands: dict[str, Command]) -> ArgumentParser:
    examples = "\n".join(f"  {command.example}" for command in commands.values())
    parser = ArgumentParser(
        prog=PROGRAM,
        description="Choose what trains, and measure what is forgotten: the command line of kappa_lightning.",
        epilog=f"examples:\n{examples}\n\n{PROGRAM} COMMAND --help explains a command. For completion in bash\n"
        f'(or zsh, fish, tcsh, powershell):\n  eval "$({PROGRAM} --print-completion bash)"',
        formatter_class=RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    shtab.add_argument_to(
        parser,
        "--print-completion",
        help='print what makes a shell complete this command line: eval "$(kappa-lightning --print-completion bash)"',
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for name, command in commands.items():
        subparser = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.description,
            epilog=f"example:\n  {command.example}",
            formatter_class=RawDescriptionHelpFormatter,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(command=command)
    return parser
