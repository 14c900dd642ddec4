"""The command line of the comparison."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.forgetting.report import write_report
from benchmarks.forgetting.settings import Settings
from benchmarks.forgetting.sweep import Place, sweep


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.forgetting",
        description="Fine-tune with several methods and compare what they forget at equal held-out loss of the new "
        "task. Every finished run is kept, so that the same command goes on after an interruption. Writes "
        "<name>-paths.csv, <name>-retention.csv, <name>.md and <name>.png, name being the configuration's.",
    )
    parser.add_argument("settings", type=Path, metavar="CONFIG", help="TOML file; see settings.py beside this")
    parser.add_argument("--runs", type=Path, help="where runs are kept (default: runs/compare/<name>)")
    parser.add_argument("--report", type=Path, help="where the report goes (default: beside the configuration)")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each (default: 1, all threads)")
    parser.add_argument("--methods", nargs="+", help="only these of the configuration's")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these of the configuration's")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE", help="of the task, over the configuration's"
    )
    parser.add_argument(
        "--keep-weights", action="store_true", help="keep what each run trains, so that wise_ft need not train again"
    )
    parser.add_argument("--only-report", action="store_true", help="run nothing, report what is there")
    args = parser.parse_args(argv)
    if args.workers < 1:
        parser.error(f"--workers {args.workers}: give at least 1")
    for option in args.option:
        if "=" not in option:
            parser.error(f"--option {option}: give NAME=VALUE")
    try:
        settings = Settings.read(args.settings)
        for name in ("methods", "seeds"):
            wanted = getattr(args, name)
            unknown = [value for value in wanted or () if value not in getattr(settings, name)]
            if unknown:
                parser.error(f"--{name}: {args.settings} has no {', '.join(map(str, unknown))}")
        settings = replace(
            settings,
            methods=tuple(args.methods or settings.methods),
            seeds=tuple(args.seeds if args.seeds is not None else settings.seeds),
            options={**settings.options, **dict(option.split("=", 1) for option in args.option)},
        )
    except (OSError, ValueError) as error:
        parser.error(str(error))
    args.name = args.settings.stem
    args.settings_read = settings
    args.runs = args.runs or Path("runs/compare") / args.name
    args.report = args.report or args.settings.parent
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print its table; 130 if interrupted."""
    args = parse(argv)
    try:
        place = Place(args.runs, args.workers, args.only_report, args.keep_weights)
        found = sweep(args.settings_read, place)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        return 130
    print(write_report(found, args.settings_read, args.report, args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
