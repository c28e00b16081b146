"""What do chat users see of each tier: how fast, how sure, how dear? Locust users with think time, and a table.

Beside locust's own figures each answer counts as up to three entries, named after the tier that answered:
`first-token` in milliseconds, `confidence` in thousandths, `cost` in millionths of a dollar.
"""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import requests
from locust import HttpUser, between, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.event import EventHook

PATH = "/v1/chat/completions"
DEMO_KEY = "tw-demo-local-only-key"  # the key that `make run` makes; it opens nothing but this machine
EASY = (
    "What is the capital of France?",
    "What colour is the sky on a clear day?",
    "How many days has a week?",
    "Say hello in Spanish.",
    "What is 2 plus 3?",
    "Name a fruit that is yellow.",
    "What is the opposite of hot?",
    "Which animal says meow?",
)
HARD = (
    "A bat and a ball cost 1.10 dollars together. The bat costs 1 dollar more than the ball. What does the ball cost?",
    "What is 17 times 23? Answer with the number only.",
    "Write a Python function that returns the n-th Fibonacci number in logarithmic time.",
    "Three people need three days for three walls. How many days do six people need for six walls?",
    "Which is larger, 9.11 or 9.9, and why?",
    "In which year was the treaty signed that ended the Thirty Years' War, and in which two towns?",
    "Write a regular expression for a date such as 2024-02-29 that refuses the month 13.",
    "If yesterday was two days after Monday, which day is tomorrow?",
)


@dataclass
class Answer:
    """What one request showed of itself."""

    tier: str = "(none)"
    attempts: int = 0
    failed: bool = False
    total_ms: float = 0.0
    first_token_ms: float | None = None
    confidence: float | None = None
    cost_usd: float | None = None

    def learn(self, told: Mapping[str, Any], prefix: str = "") -> None:
        """Take over what headers or a final comment tell; what they leave out stays as it was."""
        self.tier = str(told.get(f"{prefix}tier") or self.tier)
        self.attempts = int(told.get(f"{prefix}attempts") or self.attempts)
        confidence, cost_usd = told.get(f"{prefix}confidence"), told.get(f"{prefix}cost{'-' if prefix else '_'}usd")
        self.confidence = self.confidence if confidence is None else float(confidence)
        self.cost_usd = self.cost_usd if cost_usd is None else float(cost_usd)


def share(values: list[float], quantile: float) -> float | None:
    """Return a quantile, by nearest rank; None of none."""
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, int(quantile * len(values)))]


def shown(value: float | None, digits: int) -> str:
    """Write a number, or a dash for none."""
    return "-" if value is None else f"{value:.{digits}f}"


@dataclass
class Tally:
    """The answers of a run, by tier."""

    answers: dict[str, list[Answer]] = field(default_factory=dict)

    def add(self, answer: Answer) -> None:
        self.answers.setdefault(answer.tier, []).append(answer)

    def lines(self) -> Iterator[str]:
        """Write the table, one line a tier and one for all."""
        columns = (
            "requests",
            "share",
            "failed",
            "attempts",
            "p50 ms",
            "p95 ms",
            "first p50",
            "conf",
            "mean uUSD",
            "total USD",
        )
        yield f"{'tier':<16}" + "".join(f"{name:>11}" for name in columns)
        every = [answer for answers in self.answers.values() for answer in answers]
        for tier, answers in [*sorted(self.answers.items()), ("all", every)]:
            done = [answer for answer in answers if not answer.failed]
            total_ms = [answer.total_ms for answer in done]
            first_ms = [answer.first_token_ms for answer in done if answer.first_token_ms is not None]
            confidences = [answer.confidence for answer in done if answer.confidence is not None]
            costs = [answer.cost_usd for answer in answers if answer.cost_usd is not None]
            cells = [
                str(len(answers)),
                f"{len(answers) / max(1, len(every)):.1%}",
                str(len(answers) - len(done)),
                shown(statistics.fmean(answer.attempts for answer in done) if done else None, 2),
                shown(share(total_ms, 0.5), 0),
                shown(share(total_ms, 0.95), 0),
                shown(share(first_ms, 0.5), 0),
                shown(statistics.fmean(confidences) if confidences else None, 3),
                shown(statistics.fmean(costs) * 1e6 if costs else None, 2),
                f"{sum(costs):.6f}",
            ]
            yield f"{tier:<16}" + "".join(f"{cell:>11}" for cell in cells)


def listen(hook: EventHook, handler: Callable[..., None]) -> None:
    """Have a handler called at an event of locust's."""
    hook.add_listener(handler)  # type: ignore[no-untyped-call]  # locust leaves it without types


def add_options(parser: LocustArgumentParser) -> None:
    """Add what only tierway needs to know."""
    parser.add_argument("--tierway-key", default=DEMO_KEY, env_var="TIERWAY_KEY", help="API key", is_secret=True)
    parser.add_argument("--tierway-model", default="auto", help="the route or tier to ask for")
    parser.add_argument("--tierway-max-tokens", type=int, default=64, help="longest answer")


def collect(environment: Environment, **_: Any) -> None:
    """Gather every answer of this process, and print the table when it ends."""
    tally = Tally()

    def on_request(context: Mapping[str, Any], request_type: str, exception: Exception | None, **_: Any) -> None:
        answer = context.get("answer")
        if request_type == "POST" and isinstance(answer, Answer):
            answer.failed = exception is not None
            tally.add(answer)

    def on_quit(**_: Any) -> None:
        print("\n" + "\n".join(tally.lines()))

    listen(environment.events.request, on_request)
    listen(environment.events.quit, on_quit)


listen(events.init_command_line_parser, add_options)
listen(events.init, collect)


class ChatUser(HttpUser):
    """Somebody who asks, reads, thinks, and asks again: easy questions more often than hard ones."""

    wait_time = between(0.5, 2.5)

    def on_start(self) -> None:
        """Present the key with every request."""
        self.client.headers["authorization"] = f"Bearer {self.environment.parsed_options.tierway_key}"

    @task(3)
    def read_along(self) -> None:
        """Ask for a stream and note when its first token comes."""
        answer = Answer()
        headers = {"x-tierway-include": "comment"}
        began_s = time.perf_counter()
        with self.client.post(
            PATH,
            json=self._question(streamed=True),
            headers=headers,
            name=f"{PATH} (streamed)",
            stream=True,
            catch_response=True,
            context={"answer": answer},
            timeout=120,
        ) as response:
            answer.learn(response.headers or {}, "x-tierway-")
            problem = None
            if response.ok:
                try:
                    problem = self._read(response, answer, began_s)
                except requests.RequestException as fault:
                    problem = f"broken off: {type(fault).__name__}"
            answer.total_ms = (time.perf_counter() - began_s) * 1000
            # Locust stops its clock at the head of a streamed answer.
            response.request_meta["response_time"] = answer.total_ms
            if problem is not None:
                response.failure(problem)
        self._tell(answer)

    @task(2)
    def wait_for_all(self) -> None:
        """Ask for a whole answer."""
        answer = Answer()
        began_s = time.perf_counter()
        with self.client.post(
            PATH,
            json=self._question(streamed=False),
            name=f"{PATH} (whole)",
            catch_response=True,
            context={"answer": answer},
            timeout=120,
        ) as response:
            answer.learn(response.headers or {}, "x-tierway-")
            answer.total_ms = (time.perf_counter() - began_s) * 1000
        self._tell(answer)

    def _question(self, *, streamed: bool) -> dict[str, Any]:
        options = self.environment.parsed_options
        text = random.choice(EASY if random.random() < 0.6 else HARD)
        question = {"model": options.tierway_model, "messages": [{"role": "user", "content": text}]}
        return question | {"max_tokens": options.tierway_max_tokens, "stream": streamed}

    @staticmethod
    def _read(response: Any, answer: Answer, began_s: float) -> str | None:
        """Read a stream to its end as it comes; return what was wrong with it, if anything."""
        rest, ended, problem = b"", False, None
        # Without a size the pieces are handed on as they arrive.
        for piece in response.iter_content(chunk_size=None):
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                if line.startswith(b": tierway "):
                    answer.learn(json.loads(line[len(b": tierway ") :]))
                elif line == b"data: [DONE]":
                    ended = True
                elif line.startswith(b"data: ") and b'"error"' in line and "error" in json.loads(line[6:]):
                    problem = "error event"
                elif line.startswith(b"data: ") and answer.first_token_ms is None:
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    if choices[0].get("delta", {}).get("content"):
                        answer.first_token_ms = (time.perf_counter() - began_s) * 1000
        return problem or (None if ended else "the stream ended without [DONE]")

    def _tell(self, answer: Answer) -> None:
        """Show the answer's own figures among locust's."""
        figures = {
            "first-token": answer.first_token_ms,
            "confidence": None if answer.confidence is None else answer.confidence * 1000,
            "cost": None if answer.cost_usd is None else answer.cost_usd * 1e6,
        }
        for kind, value in figures.items():
            if value is not None and not answer.failed:
                self.environment.events.request.fire(
                    request_type=kind,
                    name=answer.tier,
                    response_time=value,
                    response_length=0,
                    exception=None,
                    context={},
                )
