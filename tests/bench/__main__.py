"""The command line: measures, prints the table and the goals, writes JSON.

Ends with 0 when everything was measured, whatever the figures; with 1 on a broken run.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

from tests.bench import process, report, wire
from tests.bench.measure import QUICK, Sizes, measure
from tests.bench.targets import Target, all_targets, other_checkout


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description="Measure what the relay costs.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure of every round there")
    parser.add_argument("--rounds", type=int, help=f"rounds per target (default {Sizes.rounds})")
    parser.add_argument("--only", metavar="A,B", help="targets to measure, by name; direct always runs too")
    parser.add_argument("--against", type=Path, metavar="DIR", help="measure the proxy of that checkout as well")
    parser.add_argument("--reference", action="store_true", help="add a row: a plain proxy on aiohttp's ClientSession")
    parser.add_argument("--quick", action="store_true", help="tiny amounts: shows that it works, measures nothing")
    return parser.parse_args()


def chosen(only: str | None, *, reference: bool) -> list[Target]:
    """The targets of this checkout that are asked for; `direct` among them, for the rest is compared with it."""
    if only is None:
        return all_targets(reference=reference)
    names = {"direct", *only.split(",")}
    targets = [target for target in all_targets(reference=True) if target.name in names]
    missing = names - {target.name for target in targets}
    if missing:
        sys.exit(f"no such target here: {', '.join(sorted(missing))}")
    return targets


def main() -> None:
    options = arguments()
    sizes = QUICK if options.quick else Sizes()
    if options.rounds:
        sizes = replace(sizes, rounds=options.rounds)
    targets = chosen(options.only, reference=options.reference)
    if options.against:
        try:
            targets.append(other_checkout(options.against))
        except FileNotFoundError as exc:
            sys.exit(f"not there: {exc}")
    cores = process.choose_cores()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
    try:
        measured = measure(targets, sizes, cores, lambda line: print(line, file=sys.stderr, flush=True))
    except wire.BrokenRun as broken:
        sys.exit(f"broken run, no figures: {broken}")
    except KeyboardInterrupt:
        sys.exit(1)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.document(measured, sizes, cores), indent=1) + "\n")
    print(report.text(measured, sizes, cores))


if __name__ == "__main__":
    main()
