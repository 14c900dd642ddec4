"""The command line of the comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.forgetting.comparison import compare, executing, kept_runs, looking_up
from benchmarks.forgetting.page import write_page
from benchmarks.forgetting.protocol import Protocol
from benchmarks.forgetting.table import read_runs, write_runs


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description="Fine-tune with several methods and compare what they forget at equal held-out loss of the new "
        "task. Every finished run is kept, so that the same command goes on after an interruption. Writes "
        "<name>-runs.csv with every point of every run and, from that file alone, <name>.md and <name>.png. What is in "
        "that file already is not run again.",
    )
    parser.add_argument("protocol", type=Path, metavar="PROTOCOL", help="TOML file; see protocol.py beside this")
    parser.add_argument("--runs", type=Path, help="where runs are kept (default: runs/forgetting/<task>)")
    parser.add_argument("--report", type=Path, help="where the page goes (default: beside the protocol)")
    parser.add_argument("--methods", nargs="+", help="only these of the protocol's")
    parser.add_argument("--seeds", nargs="*", type=int, help="only these of the protocol's")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the task, over the protocol's"
    )
    parser.add_argument(
        "--page", action="store_true", help="run nothing: write the page from the CSV that is beside the protocol"
    )
    args = parser.parse_args(argv)
    for option in args.option:
        if "=" not in option:
            parser.error(f"--option {option}: give NAME=VALUE")
    try:
        args.read = Protocol.read(args.protocol)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    for name in ("methods", "seeds"):
        unknown = [value for value in getattr(args, name) or () if value not in getattr(args.read, name)]
        if unknown:
            parser.error(f"--{name}: {args.protocol} has no {', '.join(map(repr, unknown))}")
    args.runs = args.runs or Path("runs/forgetting") / args.read.task
    args.report = args.report or args.protocol.parent
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print its page; 130 if interrupted."""
    args = parse(argv)
    given = dict(option.split("=", 1) for option in args.option)
    whole: Protocol = replace(args.read, options={**args.read.options, **given})
    csv = args.report / f"{args.protocol.stem}-runs.csv"
    if not args.page:
        methods = tuple(name for name in whole.methods if args.methods is None or name in args.methods)
        wanted = replace(
            whole,
            methods=methods,
            starts={name: step for name, step in whole.starts.items() if name in methods},
            primary=whole.primary if args.methods is None else (),
            secondary=whole.secondary if args.methods is None else (),
        )
        try:
            finished = read_runs(csv, whole.mark()) if csv.is_file() else []
        except ValueError as error:
            print(f"{error}: move it away, or write elsewhere with --report", file=sys.stderr)
            return 1
        try:
            compare(wanted, executing(wanted, args.runs, finished), seeds=args.seeds)
        except KeyboardInterrupt:
            print("interrupted; the same command goes on from there", file=sys.stderr)
            return 130
        finally:
            write_runs(kept_runs(args.runs), whole, csv)
    print(write_page(whole, compare(whole, looking_up(read_runs(csv))), args.report, args.protocol.stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
