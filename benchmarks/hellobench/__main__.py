"""HelloBench for lazyfs: how long until a container is useful, by lazyfs and by what people use today.

  python -m benchmarks.hellobench run --workload python --workload nginx --link wan --samples 5
  python -m benchmarks.hellobench long
  python -m benchmarks.hellobench report
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.hellobench.catalogue import QUICK, WORKLOADS
from benchmarks.hellobench.links import LINKS
from benchmarks.hellobench.modes import MODES, OPERATIONS

# Not where the project keeps its own results: a run goes on with what is missing in the file.
RESULTS = Path("hellobench-results")
RESULTS_FILE = "results.jsonl"
SAMPLES = 5


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m benchmarks.hellobench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = top.add_subparsers(dest="command", required=True)

    run = commands.add_parser("run", help="measure starts (root)", description="Measure starts; build images before.")
    run.add_argument("--workload", action="append", choices=list(WORKLOADS), metavar="NAME",
                     help="(repeatable; default: all; see `list`)")  # fmt: skip
    run.add_argument("--quick", action="store_true", help=f"these workloads: {', '.join(QUICK)}")
    run.add_argument("--link", action="append", choices=list(LINKS), help="(repeatable; default: loopback)")
    run.add_argument("--mode", action="append", choices=list(MODES), help="(repeatable; default: all)")
    run.add_argument("--operation", action="append", choices=OPERATIONS, help="(repeatable; default: all)")
    run.add_argument("--samples", type=int, default=SAMPLES, metavar="N", help="of each (default: %(default)s)")

    build = commands.add_parser("build", help="build the images only (root)", description="Build what is missing.")
    build.add_argument("--workload", action="append", choices=list(WORKLOADS), metavar="NAME",
                       help="(repeatable; default: all)")  # fmt: skip
    build.set_defaults(quick=False, mode=["lazyfs"])  # a mode that needs no other image

    long = commands.add_parser("long", help="measure long runs, whole images and memory (root)")
    long.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    long.add_argument("--seconds", type=float, default=20.0, help="of load per side and round (default: %(default)s)")

    report = commands.add_parser("report", help="make the table and the figures from the results")
    report.add_argument("--output", type=Path, metavar="DIR", help="(default: where the results are)")
    for one in (run, long, report):
        one.add_argument(
            "--results", type=Path, default=RESULTS / RESULTS_FILE, metavar="FILE",
            help="JSON lines; what is there already is not measured again (default: %(default)s)",
        )  # fmt: skip
    commands.add_parser("list", help="show the workloads")
    return top


def main() -> int:
    args = parser().parse_args()
    if args.command == "list":
        for workload in WORKLOADS.values():
            print(f"{workload.name:16} {workload.category:14} {workload.kind}  {workload.ready}")
        return 0
    if args.command == "report":
        from benchmarks.hellobench import report

        print("\n".join(f"wrote {path}" for path in report.write(args.results, args.output or args.results.parent)))
        return 0
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
