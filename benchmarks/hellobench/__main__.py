"""HelloBench for lazyfs: how long until a container is useful, by lazyfs and by what people use today.

  python -m benchmarks.hellobench run --workload python --workload nginx --link wan --samples 5
  python -m benchmarks.hellobench long
  python -m benchmarks.hellobench report
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.hellobench.catalogue import EVERY, HELD_BACK, QUICK
from benchmarks.hellobench.links import LINKS
from benchmarks.hellobench.modes import BEFORE, MODES, OPERATIONS

# Not where the project keeps its own results: a run goes on with what is missing in the file.
RESULTS = Path("hellobench-results")
RESULTS_FILE = "results.jsonl"
SAMPLES = 5


def names(known: Iterable[str]) -> Callable[[str], list[str]]:
    """The type of an option's argument: one of these names, or several with commas between."""
    choices = list(known)

    def split(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in choices:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(choices)}")
        return found

    return split


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.hellobench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)

    def choice(command: argparse.ArgumentParser, option: str, known: Iterable[str], default: str) -> None:
        help_ = f"(several: with commas or repeated; default: {default})"
        command.add_argument(option, action="extend", type=names(known), metavar="NAME", help=help_)

    run = commands.add_parser("run", help="measure starts (root)", description="Measure starts; build images before.")
    build = commands.add_parser("build", help="build the images only (root)", description="Build what is missing.")
    for command in (run, build):
        choice(command, "--workload", EVERY, "all of HelloBench; see `list`")
        command.add_argument("--quick", action="store_true", help=f"these workloads: {', '.join(QUICK)}")
        command.add_argument("--held-back", action="store_true", help=f"these workloads: {', '.join(HELD_BACK)}")
    choice(run, "--link", LINKS, "loopback")
    choice(run, "--mode", MODES, f"all; {BEFORE} with --before")
    choice(run, "--operation", OPERATIONS, "all")
    run.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help="of each (default: %(default)s)")
    run.add_argument(
        "--before", type=Path, metavar="DIR",
        help=f"another checkout of lazyfs, set up, which the mode {BEFORE} starts containers with",
    )  # fmt: skip
    build.set_defaults(mode=["lazyfs"], before=None)  # a mode that needs no other image

    long = commands.add_parser("long", help="measure long runs, whole images and memory (root)")
    long.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    long.add_argument("--seconds", type=float, default=20.0, help="of load per side and round (default: %(default)s)")

    report = commands.add_parser("report", help="make the table and the figures from the results")
    report.add_argument("--output", type=Path, metavar="DIR", help="(default: where the results are)")
    goals = commands.add_parser("goals", help="print what is to be reached, and what the results say")
    for one in (run, long, report, goals):
        one.add_argument(
            "--results", type=Path, default=RESULTS / RESULTS_FILE, metavar="FILE",
            help="JSON lines; what is there already is not measured again (default: %(default)s)",
        )  # fmt: skip
    commands.add_parser("list", help="show the workloads")
    return top


def main() -> int:
    args = parser().parse_args()
    if args.command == "list":
        for workload in EVERY.values():
            print(f"{workload.name:16} {workload.category:14} {workload.kind}  {workload.ready}")
        return 0
    if args.command == "report":
        from benchmarks.hellobench import report

        print("\n".join(f"wrote {path}" for path in report.write(args.results, args.output or args.results.parent)))
        return 0
    if args.command == "goals":
        from benchmarks.hellobench import goals, summary

        print(goals.markdown(summary.load(args.results)))
        return 0
    if args.command == "run" and BEFORE in (args.mode or []) and args.before is None:
        print(f"the mode {BEFORE} needs the other checkout: --before DIR", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("hellobench mounts file systems and makes network namespaces: run it as root", file=sys.stderr)
        return 1
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    """Build the images that are missing, with the host's network; then measure in namespaces of our own."""
    from benchmarks.hellobench import sandbox, suite

    if not sandbox.inside():
        suite.build(args)
    if args.command == "build":
        return 0
    sandbox.enter(sys.argv[1:])
    return suite.run_long(args) if args.command == "long" else suite.run(args)


if __name__ == "__main__":
    sys.exit(main())
