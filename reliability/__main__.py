"""Faults for so many minutes, or (`mutations`) guards taken out one by one. Knows the command line alone."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

from faults import NoSmallDisk, on_small_disk

from reliability import report
from reliability.history import History, Usual, history
from reliability.mutate import Verdict, listed, try_all
from reliability.trial import Trial

DISK_BYTES = 6 << 20


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m reliability", description=__doc__)
    commands = parser.add_subparsers(dest="command")
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--rounds", type=int, help="how many histories instead, each of some 70 faults")
    parser.add_argument("--seed", type=int, default=1, help="of the first history; the next has the next (default 1)")
    parser.add_argument("--folder", type=Path, help="where banks are made (default: the system's temporary folder)")
    parser.add_argument(
        "--log", type=Path, help="a file for every trial as a JSON line; one that is there is gone on with"
    )
    parser.add_argument("--write", action="store_true", help="put the figures into docs/reliability.md")
    mutations = commands.add_parser("mutations", help="take each guard out: the tests named beside it must fail")
    mutations.add_argument("words", nargs="*", help="only those whose guard or file holds one of these")
    arguments = parser.parse_args()
    return _mutations(arguments.words) if arguments.command else _faults(arguments)


def _mutations(words: list[str]) -> int:
    wanted = [each for each in listed() if not words or any(word in f"{each.file}: {each.guard}" for word in words)]
    missed = 0
    for verdict in try_all(wanted):
        if not isinstance(verdict, Verdict):
            print(verdict)
            return 1
        missed += not verdict.noticed
        mark = "noticed" if verdict.noticed else "MISSED "
        print(f"{mark} {verdict.seconds:5.0f} s  {verdict.mutation.file}: {verdict.mutation.guard} | {verdict.what}")
        sys.stdout.flush()
    print(f"{len(wanted)} guards taken out, {len(wanted) - missed} noticed, {missed} missed")
    return 1 if missed else 0


def _faults(arguments: argparse.Namespace) -> int:
    started, counted, disk = time.monotonic(), report.Counted(), True
    seeds = []
    for trial in _logged(arguments.log):
        counted.add(trial)
        seeds.append(trial.seed)
    first, seed = min(seeds, default=arguments.seed), max(seeds, default=arguments.seed - 1) + 1
    begun = seed
    while True:
        over = time.monotonic() - started >= 60 * arguments.minutes
        if over if arguments.rounds is None else seed - begun >= arguments.rounds:
            break
        with tempfile.TemporaryDirectory(prefix="regrad-reliability-", dir=arguments.folder) as folder:
            if disk and seed % 2:
                try:
                    result = on_small_disk(DISK_BYTES, lambda place, seed=seed: history(seed, place, True))
                except NoSmallDisk as error:
                    print(f"full disks: NOT RUN ({error}); they need the right to mount, or user namespaces")
                    disk = False
                    continue
            else:
                result = history(seed, Path(folder), False)
        History.usual = {name: Usual(**usual) for name, usual in result["usual"].items()}
        for trial in (Trial(*each) for each in result["trials"]):
            counted.add(trial)
            if arguments.log is not None:
                with arguments.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(trial._asdict()) + "\n")
        seed += 1
        if sys.stderr.isatty():
            print(f"\r{seed - begun} histories, {counted.faults:,} faults", end="", file=sys.stderr)
    told = f"{counted.faults:,} faults in {seed - first:,} histories (seeds {first} to {seed - 1}): "
    told += f"**{len(counted.lost)} lost**." + ("" if disk else " Full disks were not run: nothing could be mounted.")
    figures = f"{told}\n\n{counted.tables()}"
    print(figures)
    for trial in counted.lost:
        print(f"LOST: seed {trial.seed}, {trial.work}\n{trial.detail}", file=sys.stderr)
    if arguments.write:
        report.write(report.PAGE, figures)
    return 1 if counted.lost else 0


def _logged(log: Path | None) -> list[Trial]:
    """The trials of an earlier run."""
    if log is None or not log.exists():
        return []
    return [Trial(**json.loads(line)) for line in log.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
