"""What has a server counted? vLLM's and llama.cpp's metrics, in Prometheus' text format, as they are written today.

A server may have several engines and models; what it counted is the sum of them. vLLM's names come from its
`vllm/v1/metrics/loggers.py`, llama.cpp's from its `tools/server/server-context.cpp`.
"""

from __future__ import annotations

import re
from contextlib import suppress
from math import isfinite

from backends.backend import Counters

_SAMPLE = re.compile(
    rb"^(?:vllm:(?P<vllm>prompt_tokens_by_source_total|prompt_tokens_total|prompt_tokens_cached_total"
    rb"|prefix_cache_hits_total|generation_tokens_total|num_requests_running)"
    rb"|llamacpp:(?P<llama>prompt_tokens_total|tokens_predicted_total|requests_processing)"
    rb"|(?P<process>process_start_time_seconds))"
    rb'(?:\{(?P<labels>(?:[^}"]|"(?:[^"\\]|\\.)*")*)\})?[ \t]+(?P<value>[^ \t\r\n]+)',
    re.MULTILINE,
)
_COMPUTED = b'source="local_compute"'


def counters_in(metrics: bytes) -> Counters | None:
    """Read the text of `/metrics`; None where the counters of no server that is known are in it."""
    sums: dict[str, float] = {}
    for sample in _SAMPLE.finditer(metrics):
        name = _name(sample)
        value = _number(sample["value"])
        if name is not None and value is not None:
            sums[name] = sums.get(name, 0.0) + value
    started_s = sums.get("process_start_time_seconds")
    completion = sums.get("generation_tokens_total", sums.get("tokens_predicted_total"))
    prompt = _computed(sums)
    if completion is None or prompt is None:
        return None
    return Counters(
        prompt_tokens=int(prompt),
        completion_tokens=int(completion),
        running=int(sums.get("num_requests_running", sums.get("requests_processing", 0))),
        started_s=started_s,
    )


def _name(sample: re.Match[bytes]) -> str | None:
    if sample["llama"] is not None:
        # Its count of prompt tokens is without cached ones, as vLLM's by source is.
        name = sample["llama"].decode()
        return "computed" if name == "prompt_tokens_total" else name
    if sample["vllm"] == b"prompt_tokens_by_source_total":
        return "computed" if _COMPUTED in (sample["labels"] or b"") else None
    return (sample["vllm"] or sample["process"]).decode()


def _computed(sums: dict[str, float]) -> float | None:
    """Return the prompt tokens that were not cached. Older servers of vLLM only say how many were."""
    if "computed" in sums:
        return sums["computed"]
    if "prompt_tokens_total" not in sums:
        return None
    cached = sums.get("prompt_tokens_cached_total", sums.get("prefix_cache_hits_total", 0.0))
    return max(0.0, sums["prompt_tokens_total"] - cached)


def _number(text: bytes) -> float | None:
    with suppress(ValueError):
        value = float(text)
        return value if isfinite(value) and value >= 0 else None
    return None
