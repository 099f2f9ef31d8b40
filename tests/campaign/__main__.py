"""`python -m tests.campaign [--seed N] [--short]`, from the repository's root: exit 1 where a row was lost."""

from __future__ import annotations

import argparse
import random
import sys
import time

from tests.campaign import plan


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**6), help="default: random")
    parser.add_argument("--short", action="store_true", help="the part that the ordinary tests run: about a minute")
    arguments = parser.parse_args()
    started = time.monotonic()
    with plan.fresh_ground(short=arguments.short) as ground:
        print(f"campaign: seed {arguments.seed}, undisturbed run made", file=sys.stderr, flush=True)
        tallies = plan.run(ground, arguments.seed, short=arguments.short)
    plan.show(tallies, arguments.seed)
    failed = plan.failures(tallies)
    print(f"{len(tallies)} faults, {len(failed)} failures, {time.monotonic() - started:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
