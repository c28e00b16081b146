"""Is the confidence of an answer what its log-probabilities say, and nothing where they say nothing?"""

from __future__ import annotations

from math import exp, inf, log, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.confidence import ChoiceSignals, MeanLogprob

logprobs = st.lists(st.floats(-50, 0.5), min_size=1, max_size=30)


def choice(*scores: float) -> ChoiceSignals:
    signals = ChoiceSignals()
    signals.add(scores)
    return signals


def test_it_is_the_geometric_mean_of_the_token_probabilities() -> None:
    assert MeanLogprob().score({0: choice(log(0.5), log(0.125))}) == pytest.approx(0.25)


def test_a_certain_answer_has_confidence_one_and_an_impossible_one_zero() -> None:
    assert MeanLogprob().score({0: choice(0.0, 0.0)}) == 1.0
    assert MeanLogprob().score({0: choice(-inf, -0.1)}) == 0.0
    assert MeanLogprob().score({0: choice(-9999.0)}) == 0.0


def test_a_logprob_above_zero_counts_as_zero() -> None:
    assert MeanLogprob().score({0: choice(0.001, 0.2, inf)}) == 1.0
    assert MeanLogprob().score({0: choice(5.0, log(0.25))}) == pytest.approx(0.5)


def test_the_least_sure_choice_decides() -> None:
    assert MeanLogprob().score({0: choice(log(0.9)), 1: choice(log(0.3)), 2: choice(log(0.6))}) == pytest.approx(0.3)


def test_where_a_choice_has_no_scores_nothing_is_known() -> None:
    assert MeanLogprob().score({}) is None
    assert MeanLogprob().score({0: ChoiceSignals(pieces=5)}) is None
    assert MeanLogprob().score({0: choice(-0.1), 1: ChoiceSignals(reasoning_pieces=9)}) is None


@pytest.mark.parametrize("scores", [(nan,), (-0.1, nan), (nan, -0.1), (nan, 0.5), (0.5, nan), (-inf, nan)])
def test_a_token_without_a_number_spoils_the_answer(scores: tuple[float, ...]) -> None:
    assert MeanLogprob().score({0: choice(*scores)}) is None


def test_an_unknown_choice_is_never_hidden_by_a_sure_one() -> None:
    assert MeanLogprob().score({0: choice(0.0), 1: choice(nan)}) is None
    assert MeanLogprob().score({0: choice(nan), 1: choice(0.0)}) is None


@given(st.lists(logprobs, min_size=1, max_size=4))
def test_it_is_a_probability_and_no_surer_than_any_choice(answers: list[list[float]]) -> None:
    found = MeanLogprob().score({index: choice(*scores) for index, scores in enumerate(answers)})
    alone = [exp(sum(min(one, 0.0) for one in scores) / len(scores)) for scores in answers]
    assert found == pytest.approx(min(alone))
    assert found is not None
    assert 0.0 <= found <= 1.0


@given(logprobs, st.integers(0, 30))
def test_it_does_not_matter_how_the_tokens_come_together(scores: list[float], cut: int) -> None:
    parts = ChoiceSignals()
    parts.add(scores[:cut])
    parts.add(scores[cut:])
    whole = choice(*scores)
    assert parts.scored_tokens == whole.scored_tokens == len(scores)
    assert parts.logprob_sum == pytest.approx(whole.logprob_sum)


def test_tokens_are_counted_by_their_scores_or_their_pieces_whichever_are_more() -> None:
    assert ChoiceSignals(scored_tokens=3, pieces=5, reasoning_pieces=100).answer_tokens == 5
    assert ChoiceSignals(scored_tokens=7, pieces=5).answer_tokens == 7
    assert ChoiceSignals(reasoning_pieces=100).answer_tokens == 0
