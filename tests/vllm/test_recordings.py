"""Do the recordings still tell the truth? Each is asked again; the answers must have the same shape."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

RECORDINGS = Path(__file__).parents[1] / "contract" / "vllm"
NAMES = sorted(path.stem for kind in ("chat", "completions", "err") for path in RECORDINGS.glob(f"{kind}_*.json"))


def shape(value: Any, path: str = "") -> Iterator[str]:
    """Every path to a value, and what kind of value; indexes, and keys that are token ids, are told as `*`."""
    if isinstance(value, dict):
        yield f"{path}{{}}"
        for key, inner in value.items():
            yield from shape(inner, f"{path}.{'*' if key.isdigit() else key}")
    elif isinstance(value, list):
        yield f"{path}[]"
        for inner in value:
            yield from shape(inner, f"{path}.*")
    else:
        yield f"{path}: {'number' if type(value) in {int, float} else type(value).__name__}"


def events(body: str) -> list[str]:
    return [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]


def stream_shape(body: str) -> set[str]:
    """The shapes of all events of a stream, and how it ends."""
    told = events(body)
    assert told[-1] == "[DONE]"
    return {one for event in told[:-1] for one in shape(json.loads(event))}


def ask(address: str, request: dict[str, Any]) -> tuple[int, str, str]:
    """Status, content type and body of the answer to a recorded request."""
    if "shortened_from_chars" in request:
        request = json.loads(json.dumps(request), object_hook=lambda d: whole_again(d, request["shortened_from_chars"]))
    body = request["raw"] if request["raw"] is not None else json.dumps(request["json"]) if request["json"] else None
    sent = urllib.request.Request(
        f"{address}{request['path']}",
        data=None if body is None else body.encode(),
        headers={"content-type": "application/json", **request["headers"]},
        method=request["method"],
    )
    try:
        with urllib.request.urlopen(sent, timeout=60) as answer:
            return answer.status, answer.headers["content-type"], answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.headers["content-type"], refused.read().decode()


def whole_again(part: dict[str, Any], chars: int) -> dict[str, Any]:
    """Give a prompt that was cut in the recording its length back."""
    for key in ("content", "prompt"):
        if isinstance(part.get(key), str):
            part[key] = (part[key] * chars)[:chars]
    return part


@pytest.mark.parametrize("name", NAMES)
def test_vllm_answers_as_it_did(vllm_address: str, name: str) -> None:
    recording = json.loads((RECORDINGS / f"{name}.json").read_text())
    then = recording["response"]
    status, content_type, body = ask(vllm_address, recording["request"])
    assert (status, content_type) == (then["status"], then["headers"]["content-type"]), body
    if "body_file" in then:
        assert stream_shape(body) == stream_shape((RECORDINGS / then["body_file"]).read_text())
    else:
        assert set(shape(json.loads(body))) == set(shape(then["body"]))


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/metrics"])
def test_vllm_still_has_what_is_watched(vllm_address: str, path: str) -> None:
    request: dict[str, Any] = {"method": "GET", "path": path, "headers": {}, "json": None, "raw": None}
    status, _, body = ask(vllm_address, request)
    assert status == 200
    if path == "/metrics":
        recorded = names_of_metrics((RECORDINGS / "get_metrics.txt").read_text())
        assert recorded
        assert recorded <= names_of_metrics(body)


def names_of_metrics(text: str) -> set[str]:
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE vllm:")}


def test_there_is_something_to_compare() -> None:
    assert len(NAMES) > 50
