"""Are the counters of servers read as the recordings have them?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Counters
from backends.server_counters import counters_in

RECORDED = Path(__file__).parents[1] / "contract"


def recorded(name: str) -> bytes:
    return (RECORDED / f"{name}.txt").read_bytes()


def test_what_servers_counted_is_read_from_their_metrics() -> None:
    assert counters_in(recorded("vllm/get_metrics")) == Counters(
        prompt_tokens=37, completion_tokens=8, running=0, started_s=1795150496.47
    )
    assert counters_in(recorded("vllm/variants/metrics_under_load")) == Counters(
        prompt_tokens=94, completion_tokens=46, running=1, started_s=1795150733.27
    )
    assert counters_in(recorded("llamacpp/get_metrics")) == Counters(
        prompt_tokens=1660, completion_tokens=1600, running=0
    )


VLLM = b"""
vllm:num_requests_running{engine="0",model_name="a"} 2.0
vllm:num_requests_running{engine="1",model_name="b}c \\" d"} 3.0
vllm:prompt_tokens_total{engine="0",model_name="a"} 1000.0
vllm:prompt_tokens_total{engine="1",model_name="b}c \\" d"} 1.2e+03
vllm:generation_tokens_total{engine="0",model_name="a"} 10.0
vllm:generation_tokens_total{engine="1",model_name="b}c \\" d"} 20.0
vllm:generation_tokens_created{engine="1",model_name="a"} 1.7e+09
"""


def test_engines_and_models_of_a_server_add_up() -> None:
    assert counters_in(VLLM) == Counters(prompt_tokens=2200, completion_tokens=30, running=5)


@pytest.mark.parametrize("name", ["prompt_tokens_cached_total", "prefix_cache_hits_total"])
def test_cached_prompt_tokens_are_no_work_whatever_an_older_server_calls_them(name: str) -> None:
    found = counters_in(VLLM + b'vllm:%b{engine="0"} 200\n' % name.encode())
    assert found is not None
    assert found.prompt_tokens == 2000


def test_what_a_server_says_it_computed_goes_before_what_it_read() -> None:
    by_source = b'vllm:prompt_tokens_by_source_total{engine="0",source="%b"} %d\n'
    found = counters_in(VLLM + by_source % (b"local_compute", 700) + by_source % (b"local_cache_hit", 1500))
    assert found is not None
    assert found.prompt_tokens == 700


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"<html>vllm:generation_tokens_total 3</html>",
        b"# TYPE vllm:generation_tokens_total counter\nvllm:prompt_tokens_total 3\n",
        b"vllm:generation_tokens_total 3\n",
        b"vllm:prompt_tokens_total NaN\nvllm:generation_tokens_total +Inf\n",
        b"vllm:prompt_tokens_total -1\nvllm:generation_tokens_total x\n",
        b"sglang:prompt_tokens_total 3\nsglang:generation_tokens_total 3\n",
    ],
)
def test_what_is_no_counter_that_is_known_is_none(text: bytes) -> None:
    assert counters_in(text) is None


@given(st.binary(max_size=200) | st.lists(st.sampled_from(VLLM.splitlines()), max_size=9).map(b"\n".join))
def test_any_text_is_read_or_not(text: bytes) -> None:
    found = counters_in(text)
    assert found is None or min(found.prompt_tokens, found.completion_tokens, found.running) >= 0
