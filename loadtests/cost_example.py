"""What does a day's small traffic cost? Asks the questions of the quality set, again and again, and counts the answers.

A black box: it speaks HTTP to a gateway that is running. `docs/cost.md` says what to do with what it leaves behind in
the ledger.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

if not __package__:  # run by its path: the folder that holds `loadtests` is not on the path of modules yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loadtests.quality import QUESTIONS, Answer, ask, read_questions


def main(argv: Sequence[str]) -> int:
    """Ask, and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8090")
    parser.add_argument(
        "--keys", nargs="+", default=["tw-demo-local-only-key", "tw-example-local-only-key"], help="used in turn"
    )
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--max-tokens", type=int, default=64)
    asked = parser.parse_args(argv)
    questions = islice(cycle(read_questions(QUESTIONS)), asked.requests)
    work = list(zip(questions, cycle(asked.keys), strict=False))

    def one(number: int) -> Answer:
        question, key = work[number]
        return ask(asked.url, key, "auto", question, max_tokens=asked.max_tokens, own_logprobs=False)

    with ThreadPoolExecutor(asked.concurrency) as pool:
        answers = list(pool.map(one, range(asked.requests)))
    tiers = Counter(answer.tier for answer in answers)
    print(json.dumps({"requests": len(answers), "right": sum(one.right for one in answers), "tiers": tiers}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
