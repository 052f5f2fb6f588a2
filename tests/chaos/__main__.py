"""`python -m tests.chaos --minutes 20 --seed 7`: exit status 1 if it found anything."""

from __future__ import annotations

import argparse
import asyncio
import random
import signal
import sys
import time
from pathlib import Path

from raftkv.sim.scenario import load
from tests.chaos.run import OPTIONS, Plan, run
from tests.chaos.scenario import plan_of


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description="Chaos on real processes.")
    parser.add_argument("--minutes", type=float, default=3.0, help="of load and faults, at least")
    parser.add_argument("--seed", type=int, default=None, help="drawn and printed if not given")
    parser.add_argument("--each", type=int, default=2, help="how often each process fault must happen")
    parser.add_argument("--replicas", default="3,3", help="of each group, for instance 5,3")
    parser.add_argument("--spares", default="3", help="replicas of the groups that join later; '' for none")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--reads", choices=["readindex", "lease"], default="readindex", help="as for the daemons")
    parser.add_argument("--folder", type=Path, default=None, help="for data, logs and history")
    parser.add_argument("--scenario", metavar="FILE", help="one of the simulator's, by name or as a TOML file")
    options = parser.parse_args()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    plan = Plan(
        minutes=options.minutes,
        seed=seed,
        each=options.each,
        replicas=[int(count) for count in options.replicas.split(",")],
        spares=[int(count) for count in options.spares.split(",") if count],
        clients=options.clients,
        options=[*OPTIONS, "--reads", options.reads],
    )
    if options.scenario is not None:
        scenario = load(options.scenario)
        plan, missing = plan_of(scenario, minutes=options.minutes, seed=seed, each=options.each)
        print(f"scenario {scenario.name}; only in the simulator: {', '.join(missing) or 'nothing'}")
    began_s = time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began_s:7.1f} s  {line}", flush=True)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are ended as after Ctrl-C
    report = asyncio.run(run(plan, say, options.folder))
    print(report, flush=True)
    return 1 if report.problems else 0


if __name__ == "__main__":
    sys.exit(main())
