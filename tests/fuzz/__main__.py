"""Runs a target with atheris, or all of them in turn: `python -m tests.fuzz TARGET --seconds N`. Knows no format.

    python -m tests.fuzz list
    python -m tests.fuzz all --seconds 20
    python -m tests.fuzz packed --seconds 600 --corpus FOLDER

Prints how often each ran and what was found, as JSON; ends with 1 where something was. Each finding's bytes are kept in
--findings, and `python -m tests.fuzz TARGET --input FILE` runs them again. atheris is in the extra `test`.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import atheris

from .targets import Target, all_targets, within

MEMORY_MB = 4096  # of the whole process, libraries included: libFuzzer ends it beyond that


class Driver:
    """What libFuzzer calls: gives a target its turn, counts, and keeps what was found."""

    def __init__(self, targets: list[Target], seconds: float, findings: Path, scratch: Path) -> None:
        self.targets, self.seconds, self.findings, self.scratch = targets, seconds, findings, scratch
        self.counts = {target.name: 0 for target in targets}
        self.found: dict[tuple[str, str], str] = {}
        self.started = time.process_time()

    def one(self, data: bytes) -> None:
        """The first byte says which target the others are for."""
        target = self.targets[data[0] % len(self.targets) if data else 0]
        self.run(target, bytes(data[1:]))
        if time.process_time() - self.started > self.seconds:
            self.end()

    def run(self, target: Target, data: bytes) -> None:
        self.counts[target.name] += 1
        try:
            with within():
                target.run(data)
        except KeyboardInterrupt:
            self.end()
        except BaseException as error:  # a panic of a Rust library is no Exception
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = (target.name, f"{type(error).__name__} at {Path(last.filename).name}:{last.lineno}")
            if place not in self.found:
                self.found[place] = "".join(traceback.format_exception(error))
                self.findings.mkdir(parents=True, exist_ok=True)
                (self.findings / f"{target.name}-{len(self.found)}").write_bytes(data)
                print(f"{target.name}: {self.found[place]}", file=sys.stderr, flush=True)

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """A change that a target knows of, or one of libFuzzer's own."""
        chance = random.Random(seed)
        first, rest = bytes(data[:1]), bytes(data[1:])
        if chance.randrange(8) == 0:
            first = bytes([chance.randrange(len(self.targets))])
            target = self.targets[first[0] % len(self.targets)]
            seeds = target.seeds()
            rest = seeds[chance.randrange(len(seeds))]
        target = self.targets[first[0] % len(self.targets) if first else 0]
        if chance.randrange(4) == 0:
            rest = bytes(atheris.Mutate(rest, max(1, max_size - 1)))
        for _ in range(1 + chance.randrange(3)):
            rest = target.mutate(rest, lambda n: chance.randrange(max(1, n)))
        return (first + rest)[:max_size]

    def end(self) -> None:
        told = {
            "seconds": round(time.process_time() - self.started, 1),
            "executions": self.counts,
            "findings": [f"{name}: {place}" for name, place in self.found],
        }
        print(json.dumps(told), flush=True)
        shutil.rmtree(self.scratch, ignore_errors=True)
        sys.stderr.flush()
        os._exit(1 if self.found else 0)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.split("\n", 1)[0])
    parser.add_argument("target", help="a target's name, all, or list")
    parser.add_argument("--seconds", type=float, default=60.0, help="how long, of the processor, once all is loaded")
    parser.add_argument("--seed", type=int, default=1, help="of libFuzzer's choices")
    parser.add_argument("--corpus", type=Path, help="a folder that keeps inputs which reached something new")
    parser.add_argument("--findings", type=Path, default=Path("findings"), help="where what was found is kept")
    parser.add_argument("--input", type=Path, help="run these bytes once and nothing else")
    given = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="regrad-fuzz-"))
    os.environ |= {"REGRAD_CACHE": str(scratch / "cache"), "REGRAD_STATE": str(scratch / "state")}
    os.environ |= {"HF_HUB_OFFLINE": "1", "XDG_CONFIG_HOME": str(scratch / "config"), "OMP_NUM_THREADS": "1"}
    faulthandler.enable()
    with atheris.instrument_imports(include=["regrad_cli", "gguf"]):
        targets = all_targets(scratch)
        if given.target == "list":
            print("\n".join(f"{target.name:16} {target.reads}" for target in targets.values()))
            shutil.rmtree(scratch)
            return
        if given.target not in (*targets, "all"):
            parser.error(f"there is no target {given.target}: {', '.join(targets)}")
        chosen = list(targets.values()) if given.target == "all" else [targets[given.target]]
        driver = Driver(chosen, given.seconds, given.findings, scratch)
        if given.input is not None:
            driver.run(chosen[0], given.input.read_bytes())
            driver.end()
        for target in chosen:  # what they import late is watched as well
            for seed in target.seeds():
                driver.run(target, seed)
    driver.started = time.process_time()
    options = ["-timeout=300", "-max_len=200000", "-verbosity=0", "-detect_leaks=0", f"-rss_limit_mb={MEMORY_MB}"]
    options += [f"-seed={given.seed}", f"-artifact_prefix={given.findings}/"]
    given.findings.mkdir(parents=True, exist_ok=True)
    corpus: list[Any] = [given.corpus] if given.corpus is not None else []
    for folder in corpus:
        folder.mkdir(parents=True, exist_ok=True)
    atheris.Setup([sys.argv[0], *options, *map(str, corpus)], driver.one, custom_mutator=driver.mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
