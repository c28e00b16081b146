"""What might a year of spending look like? Hourly series with the habits of real ones, seeded.

`python -m tests.policies.spending` judges every hour of many of them and prints how often it is wrong.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable
from time import perf_counter

from policies.anomaly import DAY, WEEK, Past, begins, judge

NUSD = 1_000_000_000
LEAST_NUSD = NUSD

Level = Callable[[int], float]
"""Dollars that are expected of an hour."""


def office(hour: int) -> float:
    """Days twice to ten times as dear as nights, weekends a fifth."""
    day = 1.0 if hour % WEEK < 5 * DAY else 0.2
    return (
        40.0 * day * (0.1 + 0.9 * max(0.0, math.sin((hour % DAY - 6) / 14 * math.pi)) if 6 <= hour % DAY <= 20 else 0.1)
    )


def round_the_clock(hour: int) -> float:
    """A product of many time zones."""
    return 20.0 * (1 + 0.3 * math.sin(hour % DAY / DAY * 2 * math.pi))


def nightly(hour: int) -> float:
    """A batch job at two o'clock, now and then an hour late, and nothing else."""
    return 30.0 if hour % DAY == 2 else 0.0


def cents(hour: int) -> float:
    """A team that hardly asks."""
    return 0.05


def growing(percent_a_week: float) -> Level:
    """The office, more of it every week."""
    return lambda hour: office(hour) * (1 + percent_a_week / 100) ** (hour / WEEK)


def with_holidays(hour: int) -> float:
    """The office, closed for a week in ten and on some Mondays."""
    week, day = divmod(hour // DAY, 7)
    closed = week % 10 == 9 or (week % 7 == 3 and day == 0)
    return office(hour) * (0.15 if closed else 1.0)


def in_summer(hour: int) -> float:
    """The office, an hour earlier by UTC in every second half of 26 weeks."""
    return office(hour + (1 if hour // WEEK % 26 >= 13 else 0))


def series(
    level: Level, weeks: int, *, seed: int, noise: float = 0.25, usd_per_request: float = 0.02, bursts: float = 0.0
) -> Past:
    """Return noise around a level: of the hour (log-normal), of single requests (exponential), and rare busy hours."""
    chance = random.Random(seed)
    nusd, requests = [], []
    for hour in range(weeks * WEEK):
        usd = level(hour) * math.exp(chance.gauss(0, noise))
        if bursts and chance.random() < bursts:
            usd += 25.0 * math.exp(chance.gauss(0, 0.5))
        mean = usd / usd_per_request
        count = max(0, round(chance.gauss(mean, math.sqrt(mean)))) if mean > 30 else poisson(mean, chance)
        # The sum of that many exponential costs.
        spent = chance.gammavariate(count, usd_per_request) if count else 0.0
        nusd.append(round(spent * NUSD))
        requests.append(count)
    return Past(nusd, requests)


def poisson(mean: float, chance: random.Random) -> int:
    """Return a small number of events (Knuth)."""
    least, product, count = math.exp(-mean), chance.random(), 0
    while product > least:
        product *= chance.random()
        count += 1
    return count


KINDS: dict[str, Callable[[int, int], Past]] = {
    "office hours": lambda weeks, seed: series(office, weeks, seed=seed),
    "office hours, noisy": lambda weeks, seed: series(office, weeks, seed=seed, noise=0.5),
    "round the clock": lambda weeks, seed: series(round_the_clock, weeks, seed=seed),
    "dear requests ($2 each)": lambda weeks, seed: series(round_the_clock, weeks, seed=seed, usd_per_request=2.0),
    "nightly batch": lambda weeks, seed: series(nightly, weeks, seed=seed),
    "bursts in 5 % of hours": lambda weeks, seed: series(lambda _: 0.0, weeks, seed=seed, bursts=0.05),
    "office and bursts in 3 %": lambda weeks, seed: series(office, weeks, seed=seed, bursts=0.03),
    "cents": lambda weeks, seed: series(cents, weeks, seed=seed),
    "growing 10 % a week": lambda weeks, seed: series(growing(10), weeks, seed=seed),
    "growing 25 % a week": lambda weeks, seed: series(growing(25), weeks, seed=seed),
    "holidays": lambda weeks, seed: series(with_holidays, weeks, seed=seed),
    "summer time": lambda weeks, seed: series(in_summer, weeks, seed=seed),
}


def raised(past: Past, at: int, times: float) -> Past:
    """Return the series with one hour a multiple of what it was."""
    nusd, requests = list(past.nusd), list(past.requests)
    nusd[at], requests[at] = round(nusd[at] * times), round(requests[at] * times)
    return Past(nusd, requests)


def false_alarms(past: Past, first: int, last: int) -> tuple[int, int]:
    """Return how many hours were called a spike or a drop, and how many alerts that were."""
    wrong = [at for at in range(first, last) if judge(past, at, least_nusd=LEAST_NUSD).word in ("spike", "drop")]
    return len(wrong), sum(begins(past, at, least_nusd=LEAST_NUSD) for at in wrong)


def found(past: Past, hours: list[int], times: float) -> float:
    """Return the share of hours that are called a spike when they are raised."""
    words = [judge(raised(past, at, times), at, least_nusd=LEAST_NUSD).word for at in hours]
    return words.count("spike") / len(words)


def main(weeks: int, seeds: int) -> None:
    """Print the figures."""
    print(
        f"{'series':28} {'hours':>7} {'wrong':>6} {'alerts':>6} {'per 1000 h':>10} {'3x found':>9} {'5x':>6} {'10x':>6}"
    )
    for name, make in KINDS.items():
        wrong = alerts = hours = 0
        shares: dict[float, list[float]] = {3: [], 5: [], 10: []}
        began_s = perf_counter()
        for seed in range(seeds):
            past = make(weeks, seed)
            first, last = WEEK, weeks * WEEK
            one, two = false_alarms(past, first, last)
            wrong, alerts, hours = wrong + one, alerts + two, hours + last - first
            # A spike of cents, or in an hour without any, is none.
            dear = [at for at in range(9 * WEEK, last) if past.nusd[at] >= 4 * LEAST_NUSD][::23]
            for times, all_found in shares.items():
                if dear:
                    all_found.append(found(past, dear, times))
        spent_us = (perf_counter() - began_s) / hours * 1e6
        shown = " ".join(f"{100 * sum(of) / len(of):5.0f}%" if of else "     -" for of in shares.values())
        print(f"{name:28} {hours:7} {wrong:6} {alerts:6} {1000 * alerts / hours:10.2f}    {shown}  ({spent_us:.0f} us)")


if __name__ == "__main__":
    main(weeks=int(sys.argv[1]) if len(sys.argv) > 1 else 26, seeds=int(sys.argv[2]) if len(sys.argv) > 2 else 5)
