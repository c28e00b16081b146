"""How sure is a model of its own answer? Signals of the answer in, a confidence in [0, 1] out.

What is judged: each choice over the tokens of its answer. Reasoning is counted apart and never judged alone; an
attempt is as sure as its least sure choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import exp, isnan
from typing import Protocol

import msgspec


class ChoiceSignals(msgspec.Struct):
    """What is known so far of one choice. Grows token by token.

    `scored_tokens` answer tokens came with a log-probability, `logprob_sum` is their sum (nats), `pieces` counts the
    pieces of answer text whether scored or not, `reasoning_pieces` those of reasoning.
    """

    scored_tokens: int = 0
    logprob_sum: float = 0.0
    pieces: int = 0
    reasoning_pieces: int = 0
    finished: bool = False

    @property
    def answer_tokens(self) -> int:
        """How many answer tokens have come, as far as can be told."""
        return max(self.scored_tokens, self.pieces)

    def add(self, logprobs: Sequence[float]) -> None:
        """Count answer tokens. A log-probability above 0 is a server's rounding and counts as 0; NaN spoils the sum."""
        if logprobs:
            self.scored_tokens += len(logprobs)
            self.logprob_sum += (
                sum(logprobs) if max(logprobs) <= 0.0 else sum(0.0 if one > 0 else one for one in logprobs)
            )


Signals = dict[int, ChoiceSignals]
"""Signals of an attempt by the index of the choice."""


class Estimator(Protocol):
    """Turns the signals of an answer, or of its beginning, into a confidence."""

    def score(self, signals: Signals) -> float | None:
        """Confidence in [0, 1] of the least sure choice; None where the signals say nothing."""
        ...


class MeanLogprob(msgspec.Struct, frozen=True, tag_field="kind", tag="mean_logprob"):
    """exp of the mean token log-probability: the geometric mean of the token probabilities. Raw, not calibrated."""

    def score(self, signals: Signals) -> float | None:
        lowest: float | None = None
        for choice in signals.values():
            if not choice.scored_tokens:
                return None
            mean = choice.logprob_sum / choice.scored_tokens
            if isnan(mean):
                return None
            confidence = exp(mean)
            if lowest is None or confidence < lowest:
                lowest = confidence
        return lowest


AnyEstimator = MeanLogprob
"""The registry: the union of every estimator that a configuration can name."""
