"""The command line of the worlds; knows the options, not how a task is made."""

import argparse
from pathlib import Path

from benchmarks.prior.worlds.write import write_worlds


def main() -> None:
    """Write invented question-answering tasks, every kind of document in turn, the same ones for the same seed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prior.worlds", description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="which worlds; tasks of two seeds share none")
    parser.add_argument("--tasks", type=int, default=3000, help="how many tasks")
    parser.add_argument("--out", type=Path, required=True, help="the JSON lines file to write")
    options = parser.parse_args()
    write_worlds(options.out, seed=options.seed, tasks=options.tasks)


if __name__ == "__main__":
    main()
