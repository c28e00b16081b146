"""How often is each model right, how sure is it, and what does it cost? A committed set of questions, one table.

A black box: it speaks HTTP to the gateway, or to any other server of the OpenAI API, and reads the answer and its
headers. One question at a time, temperature 0, so that two runs can be compared.
"""

from __future__ import annotations

import argparse
import http.client
import json
import math
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

QUESTIONS = Path(__file__).with_name("questions.jsonl")
HEAD = ("model", "right", "tokens/s", "mean cost", "answered by", "AUROC of confidence")


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question; an answer is right if one of the patterns is found in it, in whatever case."""

    question: str
    answers: tuple[str, ...]
    kind: str

    def accepts(self, text: str) -> bool:
        """Say whether `text` is right."""
        return any(re.search(pattern, text, re.IGNORECASE) for pattern in self.answers)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back. What the server did not say is None; cost in dollars, time in seconds."""

    question: Question
    text: str
    right: bool
    tokens: int
    time_s: float
    tier: str | None
    cost_usd: float | None
    confidence: float | None


def read_questions(path: Path) -> list[Question]:
    """Read the questions, one JSON object a line."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Question(question=row["question"], answers=tuple(row["answers"]), kind=row["kind"]) for row in rows]


def ask(url: str, key: str | None, model: str, question: Question, *, max_tokens: int, own_logprobs: bool) -> Answer:
    """Ask one question and judge the answer. Raises `OSError` or `ValueError` when there is none."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question.question}],
        "temperature": 0,
        "max_tokens": max_tokens,
    }
    if own_logprobs:
        body |= {"logprobs": True, "top_logprobs": 1}
    headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {key}"} if key else {})
    connection = kind(parts.netloc, timeout=300)  # one a question: no kept connection that could have been dropped
    try:
        begun = time.perf_counter()
        connection.request("POST", f"{parts.path.rstrip('/')}/v1/chat/completions", json.dumps(body), headers)
        response = connection.getresponse()
        raw = response.read()
        time_s = time.perf_counter() - begun
    finally:
        connection.close()
    if response.status != http.client.OK:
        raise ValueError(f"{response.status} for {question.question!r}: {raw[:300]!r}")
    whole = json.loads(raw)
    choice = whole["choices"][0]
    text = choice["message"].get("content") or ""
    cost, confidence = response.headers.get("x-tierway-cost-usd"), response.headers.get("x-tierway-confidence")
    return Answer(
        question=question,
        text=text,
        right=question.accepts(text),
        tokens=whole.get("usage", {}).get("completion_tokens", 0),
        time_s=time_s,
        tier=response.headers.get("x-tierway-tier"),
        cost_usd=float(cost) if cost else None,
        confidence=float(confidence) if confidence else mean_probability(choice.get("logprobs")),
    )


def mean_probability(logprobs: dict[str, Any] | None) -> float | None:
    """Return the mean log-probability of an answer's tokens, as a probability; None without any."""
    tokens = (logprobs or {}).get("content") or []
    return math.exp(sum(token["logprob"] for token in tokens) / len(tokens)) if tokens else None


def auroc(answers: Sequence[Answer]) -> float | None:
    """Return the chance that a right answer was surer than a wrong one, ties counting half; None if all are alike."""
    right = [a.confidence for a in answers if a.right and a.confidence is not None]
    wrong = [a.confidence for a in answers if not a.right and a.confidence is not None]
    if not right or not wrong:
        return None
    wins = sum((r > w) + (r == w) / 2 for r in right for w in wrong)
    return wins / (len(right) * len(wrong))


def row_of(model: str, answers: Sequence[Answer]) -> tuple[str, ...]:
    """Return the line of the table for one name that was asked; what nobody said is blank."""
    tiers = Counter(a.tier for a in answers if a.tier)
    costs = [a.cost_usd for a in answers if a.cost_usd is not None]
    # Confidences of different tiers are not on one scale: a figure for a mixture would say nothing about either.
    separation = auroc(answers) if len(tiers) <= 1 else None
    return (
        model,
        f"{100 * sum(a.right for a in answers) / len(answers):.0f} %",
        f"{sum(a.tokens for a in answers) / sum(a.time_s for a in answers):.0f}",
        f"${sum(costs) / len(costs):.7f}" if costs else "",
        ", ".join(f"{tier} {100 * count / len(answers):.0f} %" for tier, count in sorted(tiers.items())),
        f"{separation:.2f}" if separation is not None else "",
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Ask everything, print the table; return 1 if a question was not answered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--url", default="http://127.0.0.1:8080", help="the server, without /v1")
    parser.add_argument("--key", help="API key")
    parser.add_argument("--models", nargs="+", required=True, help="the names to ask for, e.g. small medium auto")
    parser.add_argument("--questions", type=Path, default=QUESTIONS, help="one JSON object a line")
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="ask for log-probabilities and take the confidence from them where no header tells it",
    )
    parser.add_argument("--kinds", action="store_true", help="also print how often each kind of question was right")
    parser.add_argument("--wrong", action="store_true", help="also print the wrong answers")
    options = parser.parse_args(arguments)

    questions = read_questions(options.questions)
    print(
        f"{len(questions)} questions of {options.questions.name}, temperature 0, at most {options.max_tokens} tokens\n"
    )
    print("| " + " | ".join(HEAD) + " |")
    print("|" + " --- |" * len(HEAD))
    asked: dict[str, list[Answer]] = {}
    for model in options.models:
        try:
            asked[model] = [
                ask(
                    options.url,
                    options.key,
                    model,
                    question,
                    max_tokens=options.max_tokens,
                    own_logprobs=options.logprobs,
                )
                for question in questions
            ]
        except (OSError, ValueError, http.client.HTTPException) as why:
            print(f"quality.py: {model}: {why}", file=sys.stderr)
            return 1
        print("| " + " | ".join(row_of(model, asked[model])) + " |", flush=True)
    if options.kinds:
        print_kinds(asked)
    if options.wrong:
        for model, answers in asked.items():
            for answer in answers:
                if not answer.right:
                    print(f"{model}: {answer.question.question} -> {answer.text!r} ({answer.confidence})")
    return 0


def print_kinds(asked: dict[str, list[Answer]]) -> None:
    """Print how often each kind of question was answered right."""
    kinds = sorted({answer.question.kind for answers in asked.values() for answer in answers})
    print("\n| model | " + " | ".join(kinds) + " |")
    print("|" + " --- |" * (len(kinds) + 1))
    for model, answers in asked.items():
        shares = []
        for kind in kinds:
            of_kind = [answer.right for answer in answers if answer.question.kind == kind]
            shares.append(f"{100 * sum(of_kind) / len(of_kind):.0f} %")
        print(f"| {model} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    sys.exit(main())
