"""Does the client get what it would have got without us, and do we learn what the answer says?

The golden transcripts are recordings of real servers. What a client should see of them is computed here from plain
JSON, without a word of `gateway.wire`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from copy import deepcopy
from math import isnan
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.backend import Broken, Endpoint
from backends.sse import DONE, EventSplitter
from gateway.body import Asked, read_body
from gateway.wire import TokenUsage, make_tap

RECORDED = Path(__file__).parents[1] / "contract"
Json = dict[str, Any]
ALL = 10**6


class Transcript(msgspec.Struct):
    """One recorded answer: what was asked, and the chunks of JSON that came."""

    name: str
    asked: Asked
    raw: bytes

    @property
    def chunks(self) -> list[Json]:
        return chunks_of(self.raw) if self.asked.stream else [json.loads(self.raw)]


def chunks_of(raw: bytes) -> list[Json]:
    payloads = [line[6:] for line in raw.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(payload) for payload in payloads if payload != "[DONE]"]


def recorded() -> Iterator[Transcript]:
    for path in sorted(RECORDED.glob("*/*.json")):
        record = json.loads(path.read_bytes())
        request, response = record.get("request", {}), record.get("response", {})
        endpoint = request.get("path", "").removeprefix("/v1/")
        if response.get("status") != 200 or endpoint not in ("chat/completions", "completions"):
            continue
        body = request["json"]
        if body.get("stream"):
            raw = path.with_suffix(".sse").read_bytes()
        else:
            raw = json.dumps(response["body"], separators=(",", ":"), ensure_ascii=False).encode()
        yield Transcript(f"{path.parent.name}/{path.stem}", facts_of(endpoint, body), raw)


def facts_of(endpoint: Endpoint, body: Json) -> Asked:
    """What the recorded request asked for, so far as it matters here; some of them are refused by ours."""
    prompt = body.get("prompt", "")
    prompts = len(prompt) if isinstance(prompt, list) and not isinstance(prompt[0], int) else 1
    options = body.get("stream_options") or {}
    logprobs = body.get("logprobs")
    if endpoint == "chat/completions":
        logprobs = body.get("top_logprobs", 0) if logprobs else None
    return Asked(
        endpoint=endpoint,
        model=body["model"],
        stream=bool(body.get("stream")),
        usage_wanted=bool(options.get("include_usage")),
        usage_everywhere=bool(options.get("continuous_usage_stats")),
        choices=body.get("n", 1) * prompts,
        logprobs=logprobs,
        prompt_bytes=len(json.dumps(body)),
        echoed_chars=(len(prompt),) if body.get("echo") else (),
    )


TRANSCRIPTS = list(recorded())
STREAMS = [one for one in TRANSCRIPTS if one.asked.stream]
every_transcript = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda one: one.name)
every_stream = pytest.mark.parametrize("transcript", STREAMS, ids=lambda one: one.name)


def test_there_are_transcripts_of_both_servers_whole_and_streamed() -> None:
    kinds = {
        (one.name.split("/")[0], one.asked.endpoint, one.asked.stream, one.asked.logprobs is not None)
        for one in TRANSCRIPTS
    }
    assert len(kinds) == 16


# -- what a client of the server itself would parse -------------------------------------------------------------------


def as_the_client_would_see(chunks: Sequence[Json], asked: Asked) -> list[Json]:
    """Take out what only we asked for: scores and usage."""
    shown: list[Json] = []
    finished: set[int] = set()
    for chunk in map(deepcopy, chunks):
        usage = chunk.get("usage")
        for choice in chunk["choices"]:
            if choice.get("finish_reason"):
                finished.add(choice["index"])
            without_our_scores(choice, asked)
        complete = len(finished) == asked.choices
        if not asked.stream:
            shown.append(chunk)
        elif not chunk["choices"]:
            if usage is None or (asked.usage_wanted and complete):
                shown.append(chunk)
        elif asked.usage_everywhere or (usage is None and asked.usage_wanted):
            shown.append(chunk)
        else:
            chunk.pop("usage", None)
            shown.append(chunk)
            if usage is not None and asked.usage_wanted and complete:
                shown.append({**chunk, "choices": [], "usage": usage})
    return shown


def without_our_scores(choice: Json, asked: Asked) -> None:
    scores = choice.get("logprobs")
    if not isinstance(scores, dict):
        return
    if asked.logprobs is None:
        choice["logprobs"] = None
        if "prompt_logprobs" in choice and asked.echoed_chars:
            choice["prompt_logprobs"] = None
    elif asked.logprobs == 0:
        for token in scores.get("content") or []:
            token["top_logprobs"] = []
        if scores.get("top_logprobs"):
            scores["top_logprobs"] = [
                top if top is None else {token: top[token]}
                for token, top in zip(scores["tokens"], scores["top_logprobs"], strict=True)
            ]


def events_of(transcript: Transcript) -> list[bytes]:
    return EventSplitter().feed(transcript.raw) if transcript.asked.stream else [transcript.raw]


def seen(events: Sequence[bytes], asked: Asked, *, scored: bool = True, read_tokens: int = ALL) -> list[Json]:
    """What the client parses of what the tap lets through."""
    tap = make_tap(asked, scored=scored, read_tokens=read_tokens)
    passed = [out for event in events if (out := tap.feed(event)) is not None]
    assert tap.complete
    assert tap.done
    if not asked.stream:
        return [json.loads(out) for out in passed]
    for out in passed:
        assert out.endswith(b"\n\n")
    return chunks_of(b"".join(passed))


def wishes(transcript: Transcript) -> Iterator[Asked]:
    """What another client might have asked for that gets the same answer."""
    for logprobs in {None, 0, transcript.asked.logprobs}:
        for usage in ((False, False), (True, False), (True, True), (False, True)):
            yield msgspec.structs.replace(
                transcript.asked, logprobs=logprobs, usage_wanted=usage[0], usage_everywhere=usage[1]
            )


@every_transcript
@pytest.mark.parametrize("read_tokens", [0, 1, 4, ALL])
def test_a_client_sees_what_it_asked_for_and_nothing_of_ours(transcript: Transcript, read_tokens: int) -> None:
    events = events_of(transcript)
    for asked in wishes(transcript):
        assert seen(events, asked, read_tokens=read_tokens) == as_the_client_would_see(transcript.chunks, asked)


def rewritten(transcript: Transcript, write: Callable[[Json], str]) -> list[bytes]:
    """The same answer as another server would write it."""
    if not transcript.asked.stream:
        return [write(transcript.chunks[0]).encode()]
    return [*(b"data: " + write(chunk).encode() + b"\n\n" for chunk in transcript.chunks), DONE]


def upside_down(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: upside_down(inner) for key, inner in reversed(value.items())}
    return [upside_down(inner) for inner in value] if isinstance(value, list) else value


WRITERS: dict[str, Callable[[Json], str]] = {
    "with blanks": json.dumps,
    "sorted": lambda chunk: json.dumps(chunk, sort_keys=True, separators=(",", ":")),
    "upside down": lambda chunk: json.dumps(upside_down(chunk), separators=(",", ":")),
    "escaped": lambda chunk: json.dumps(chunk, ensure_ascii=True, separators=(",", ":")),
    "a blank before the value": lambda chunk: json.dumps(chunk, separators=(",", ": ")),
    "a blank on both sides": lambda chunk: json.dumps(chunk, separators=(" , ", " : ")),
}


@every_transcript
@pytest.mark.parametrize("writer", WRITERS)
def test_it_does_not_matter_how_a_server_writes_its_json(transcript: Transcript, writer: str) -> None:
    events = rewritten(transcript, WRITERS[writer])
    for asked in wishes(transcript):
        for read_tokens in (1, ALL):
            found = seen(events, asked, read_tokens=read_tokens)
            assert found == as_the_client_would_see(transcript.chunks, asked)


@every_transcript
def test_what_needs_no_change_is_not_touched(transcript: Transcript) -> None:
    asked = msgspec.structs.replace(transcript.asked, usage_wanted=True, usage_everywhere=True, logprobs=20)
    tap = make_tap(asked, scored=True, read_tokens=1)
    for event in events_of(transcript):
        out = tap.feed(event)
        assert out == (None if event == DONE else event) or b'"usage"' in event


@every_transcript
def test_where_we_added_nothing_scores_pass_as_they_came(transcript: Transcript) -> None:
    asked = msgspec.structs.replace(transcript.asked, logprobs=None)
    shown = seen(events_of(transcript), asked, scored=False)
    kept = msgspec.structs.replace(asked, logprobs=20)
    assert shown == as_the_client_would_see(transcript.chunks, kept)


def test_a_client_that_asked_for_no_alternatives_gets_what_the_server_gives_to_such_a_client() -> None:
    given = next(one for one in TRANSCRIPTS if one.name == "vllm/chat_logprobs")
    wanted = next(one for one in TRANSCRIPTS if one.name == "vllm/chat_logprobs_no_top")
    (shown,) = seen(events_of(given), wanted.asked)
    assert shown["choices"] == wanted.chunks[0]["choices"]


@every_stream
def test_the_splice_and_the_slow_path_agree(transcript: Transcript) -> None:
    asked = msgspec.structs.replace(transcript.asked, logprobs=None, usage_wanted=False)
    events = events_of(transcript)
    assert seen(events, asked, read_tokens=0) == seen(events, asked, read_tokens=ALL)


# -- signals ----------------------------------------------------------------------------------------------------------


def scores_of(choice: Json, echoed_chars: int = 0) -> list[float]:
    scores = choice.get("logprobs") or {}
    if "content" in scores:
        return [token["logprob"] for token in scores["content"]]
    pairs = zip(scores.get("text_offset", []), scores.get("token_logprobs", []), strict=True)
    return [score for offset, score in pairs if offset >= echoed_chars]


def text_of(choice: Json) -> str:
    said = choice.get("delta") or choice.get("message") or {}
    tools = "".join(call["function"].get("arguments") or "-" for call in said.get("tool_calls") or [])
    return choice.get("text") or said.get("content") or tools


@every_transcript
def test_signals_are_those_of_the_recording(transcript: Transcript) -> None:
    asked = transcript.asked
    tap = make_tap(asked, scored=True, read_tokens=ALL)
    for event in events_of(transcript):
        tap.feed(event)
    assert set(tap.signals) == set(range(asked.choices))
    for index, signals in tap.signals.items():
        choices = [one for chunk in transcript.chunks for one in chunk["choices"] if one["index"] == index]
        echoed = asked.echoed_chars[0] if asked.echoed_chars else 0
        scores = [score for one in choices for score in scores_of(one, echoed)]
        assert signals.finished
        assert signals.scored_tokens == len(scores)
        assert signals.logprob_sum == pytest.approx(sum(scores))
        assert signals.pieces == sum(bool(text_of(one)) for one in choices)
        assert signals.reasoning_pieces == 0


@every_stream
@pytest.mark.parametrize("read_tokens", [1, 3])
def test_of_a_stream_only_the_beginning_is_read(transcript: Transcript, read_tokens: int) -> None:
    tap = make_tap(transcript.asked, scored=True, read_tokens=read_tokens)
    for event in events_of(transcript):
        tap.feed(event)
    for signals in tap.signals.values():
        assert signals.answer_tokens >= read_tokens
        assert signals.finished
        if transcript.asked.choices == 1:
            assert signals.answer_tokens <= read_tokens + 1


@every_stream
def test_a_stream_has_begun_with_its_first_text_and_is_complete_with_its_last_choice(transcript: Transcript) -> None:
    tap = make_tap(transcript.asked, scored=True, read_tokens=4)
    spoken = False
    finished: set[int] = set()
    for event in events_of(transcript):
        tap.feed(event)
        for choice in chunks_of(event)[0]["choices"] if event != DONE else []:
            spoken |= bool(text_of(choice)) or bool(choice.get("finish_reason"))
            finished |= {choice["index"]} if choice.get("finish_reason") else set()
        assert tap.begun == spoken
        assert tap.complete == (len(finished) == transcript.asked.choices)
        assert tap.done == (event == DONE)


# -- answers made up for a case ---------------------------------------------------------------------------------------

CHAT = Asked(endpoint="chat/completions", model="m", stream=True, prompt_bytes=40)
TEXT = Asked(endpoint="completions", model="m", stream=True, prompt_bytes=40)
WHOLE_CHAT = msgspec.structs.replace(CHAT, stream=False)
WHOLE_TEXT = msgspec.structs.replace(TEXT, stream=False)


def token(text: str, logprob: float, *others: str) -> Json:
    tops = [{"token": one, "logprob": logprob - 1, "bytes": list(one.encode())} for one in (text, *others)]
    return {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": tops}


def vllm_event(delta: Json, scores: list[Json] | None = None, finish: str | None = None, **more: Any) -> bytes:
    logprobs = None if scores is None else {"content": scores}
    choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish, "token_ids": None}
    return sse({"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice], **more})


def llama_event(delta: Json, scores: list[Json] | None = None, finish: str | None = None) -> bytes:
    choice = {"finish_reason": finish, "index": 0, "delta": delta}
    if scores is not None:
        choice["logprobs"] = {"content": scores}
    return sse({"choices": [choice], "created": 1, "id": "c", "model": "m", "object": "chat.completion.chunk"})


def text_event(text: str, scores: Json | None = None, finish: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "text": text, "logprobs": scores, "finish_reason": finish, "stop_reason": None, **more}
    return sse({"id": "c", "object": "text_completion", "created": 1, "model": "m", "choices": [choice]})


def sse(chunk: Json) -> bytes:
    return b"data: " + compact(chunk) + b"\n\n"


def compact(value: Json) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def whole(message: Json, scores: list[Json] | None, **more: Any) -> bytes:
    logprobs = None if scores is None else {"content": scores}
    choice = {"index": 0, "message": {"role": "assistant", **message}, "logprobs": logprobs, "finish_reason": "stop"}
    return compact({"id": "c", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], **more})


def test_reasoning_is_counted_apart_and_not_scored() -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=ALL)
    tap.feed(vllm_event({"role": "assistant", "content": ""}))
    assert not tap.begun
    tap.feed(vllm_event({"reasoning_content": "Hm"}, [token("Hm", -5.0)]))
    tap.feed(vllm_event({"reasoning": "so"}, [token("so", -6.0)]))
    assert tap.begun
    assert (tap.signals[0].reasoning_pieces, tap.signals[0].answer_tokens) == (2, 0)
    tap.feed(vllm_event({"content": "42"}, [token("42", -0.5)]))
    tap.feed(vllm_event({}, [token("<end>", -0.25)], "stop"))
    signals = tap.signals[0]
    assert (signals.reasoning_pieces, signals.pieces, signals.scored_tokens) == (2, 1, 2)
    assert signals.logprob_sum == -0.75
    assert tap.complete


def test_a_stream_is_read_through_its_reasoning_to_the_answer() -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=1)
    for _ in range(5):
        tap.feed(vllm_event({"reasoning_content": "Hm"}, [token("Hm", -5.0)]))
    tap.feed(vllm_event({"content": "42"}, [token("42", -0.5)]))
    assert (tap.signals[0].scored_tokens, tap.signals[0].logprob_sum) == (1, -0.5)


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_of_a_whole_answer_with_reasoning_only_the_answer_is_scored(field: str) -> None:
    scores = [token(one, score) for one, score in (("<think>", -9), ("hm", -8), ("</think>", -7), ("4", -1), ("2", -2))]
    tap = make_tap(WHOLE_CHAT, scored=True, read_tokens=ALL)
    tap.feed(whole({"content": "42", field: "hm"}, scores))
    signals = tap.signals[0]
    assert (signals.scored_tokens, signals.logprob_sum, signals.reasoning_pieces, signals.pieces) == (2, -3.0, 1, 1)


def test_a_whole_answer_of_reasoning_alone_says_nothing_of_an_answer() -> None:
    tap = make_tap(WHOLE_CHAT, scored=True, read_tokens=ALL)
    tap.feed(whole({"content": None, "reasoning": "hm"}, [token("hm", -0.1)]))
    assert tap.signals[0].scored_tokens == 0
    assert tap.signals[0].answer_tokens == 0


def test_of_a_tool_call_the_arguments_are_scored() -> None:
    marks = [token("<tool_call>", -9), token('{"name": "f", "arguments": ', -8)]
    arguments = [token('{"city": ', -0.5), token('"Paris"}', -0.25)]
    end = [token("}</tool_call>", -7)]
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Paris"}'}}
    tap = make_tap(WHOLE_CHAT, scored=True, read_tokens=ALL)
    tap.feed(whole({"content": None, "tool_calls": [call]}, [*marks, *arguments, *end]))
    assert (tap.signals[0].scored_tokens, tap.signals[0].logprob_sum) == (2, -0.75)


def test_arguments_that_a_server_wrote_anew_are_scored_as_a_whole() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city":"Paris"}'}}
    tap = make_tap(WHOLE_CHAT, scored=True, read_tokens=ALL)
    tap.feed(whole({"content": None, "tool_calls": [call]}, [token("<call>", -1), token("{'city': 'Paris'}", -1)]))
    assert tap.signals[0].scored_tokens == 2


def test_parallel_tool_calls_all_count() -> None:
    calls = [{"function": {"name": name, "arguments": f'{{"x":"{name}"}}'}} for name in "ab"]
    scores = [token("<c>", -9), token('{"x":"a"}', -1), token("</c><c>", -9), token('{"x":"b"}', -2), token("</c>", -9)]
    tap = make_tap(WHOLE_CHAT, scored=True, read_tokens=ALL)
    tap.feed(whole({"content": "", "tool_calls": calls}, scores))
    assert (tap.signals[0].scored_tokens, tap.signals[0].logprob_sum) == (2, -3.0)


def test_a_streamed_tool_call_is_an_answer() -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=ALL)
    tap.feed(vllm_event({"tool_calls": [{"index": 0, "function": {"name": "f"}}]}))
    assert tap.begun
    tap.feed(vllm_event({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]}, [token("{}", -0.5)]))
    assert (tap.signals[0].pieces, tap.signals[0].scored_tokens) == (2, 1)


def test_a_refusal_is_an_answer() -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=ALL)
    tap.feed(vllm_event({"refusal": "No."}, [token("No.", -0.5)]))
    assert (tap.signals[0].pieces, tap.signals[0].scored_tokens) == (1, 1)


def test_a_token_without_a_score_makes_the_sum_unknown() -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=ALL)
    tap.feed(vllm_event({"content": "a"}, [{"token": "a", "logprob": None}]))
    assert isnan(tap.signals[0].logprob_sum)


# -- echo -------------------------------------------------------------------------------------------------------------


def text_scores(start: int, *tokens: tuple[str, float | None]) -> Json:
    offsets, at = [], start
    for text, _ in tokens:
        offsets.append(at)
        at += len(text)
    return {
        "text_offset": offsets,
        "token_logprobs": [score for _, score in tokens],
        "tokens": [text for text, _ in tokens],
        "top_logprobs": [None if score is None else {text: score, "x": -9.0} for text, score in tokens],
    }


ECHOED = (("Say", None), (" yes", -8.0))


@pytest.mark.parametrize("asked", [{"echoed_chars": (7,)}, {"echoed_tokens": (2,)}], ids=["text", "token ids"])
@pytest.mark.parametrize("restarts", [True, False], ids=["offsets anew", "offsets on"])
def test_the_echoed_prompt_of_a_stream_is_not_scored_and_all_that_follows_is(asked: Json, restarts: bool) -> None:
    # vLLM counts the offsets of later chunks from the beginning of the answer.
    later = 0 if restarts else 7
    tap = make_tap(msgspec.structs.replace(TEXT, **asked), scored=True, read_tokens=ALL)
    tap.feed(text_event("Say yes yes", text_scores(0, *ECHOED, (" yes", -0.5))))
    tap.feed(text_event(".", text_scores(later + 4, (".", -0.25))))
    tap.feed(text_event("", text_scores(later + 5, ("<end>", -1.0)), "stop"))
    assert (tap.signals[0].scored_tokens, tap.signals[0].logprob_sum) == (3, -1.75)


def test_an_echo_that_comes_in_parts_is_not_scored_either() -> None:
    tap = make_tap(msgspec.structs.replace(TEXT, echoed_chars=(7,)), scored=True, read_tokens=ALL)
    tap.feed(text_event("Say", text_scores(0, ECHOED[0])))
    tap.feed(text_event(" yes", text_scores(3, ECHOED[1])))
    tap.feed(text_event(" yes", text_scores(7, (" yes", -0.5))))
    assert (tap.signals[0].scored_tokens, tap.signals[0].logprob_sum) == (1, -0.5)


def test_every_prompt_has_an_echo_of_its_own() -> None:
    body = {"model": "m", "prompt": ["Say yes", "No"], "n": 2, "echo": True}
    asked = read_body("completions", json.dumps(body).encode()).asked
    choices = [
        {"text": "", "logprobs": text_scores(0, *ECHOED, (" a", -0.5)), "finish_reason": "stop", "index": 0},
        {"text": "", "logprobs": text_scores(0, *ECHOED, (" b", -0.25)), "finish_reason": "stop", "index": 1},
        {"text": "", "logprobs": text_scores(0, ("No", None), (" c", -1.0)), "finish_reason": "stop", "index": 2},
        {"text": "", "logprobs": text_scores(0, ("No", None), (" d", -2.0)), "finish_reason": "stop", "index": 3},
    ]
    tap = make_tap(asked, scored=True, read_tokens=ALL)
    tap.feed(compact({"choices": choices}))
    assert [tap.signals[index].logprob_sum for index in range(4)] == [-0.5, -0.25, -1.0, -2.0]
    assert {tap.signals[index].scored_tokens for index in range(4)} == {1}


# -- what is no answer ------------------------------------------------------------------------------------------------

NO_EVENTS = {
    "an error": sse({"error": {"message": "EngineCore encountered an issue.", "code": 500}}),
    "an error in words": sse({"error": "boom"}),
    "an error beside choices": sse({"error": {"message": "x"}, "choices": []}),
    "no JSON": b"data: Internal Server Error\n\n",
    "half a JSON": b'data: {"choices":[{"index":0,"delta":{"content":"a"\n\n',
    "a list": b"data: []\n\n",
    "choices of another kind": b'data: {"choices":7}\n\n',
    "too deep": b"data: " + b"[" * 100_000 + b"\n\n",
    "no UTF-8": b'data: {"choices":[{"index":0,"delta":{"content":"\xff"}}]}\n\n',
}


@pytest.mark.parametrize("name", NO_EVENTS)
@pytest.mark.parametrize("read_tokens", [0, ALL])
@pytest.mark.parametrize("wish", [CHAT, msgspec.structs.replace(CHAT, logprobs=0)], ids=["none", "zero"])
def test_what_is_no_event_of_an_answer_is_broken(name: str, read_tokens: int, wish: Asked) -> None:
    tap = make_tap(wish, scored=True, read_tokens=read_tokens)
    tap.feed(vllm_event({"content": "a"}, [token("a", -0.1)]))
    with pytest.raises(Broken):
        tap.feed(NO_EVENTS[name])
    assert not tap.complete


def test_the_recorded_death_of_an_engine_breaks_the_stream_after_what_it_said() -> None:
    record = json.loads((RECORDED / "vllm" / "failures" / "killworker_midstream.json").read_bytes())
    events = EventSplitter().feed(b"data: " + record["stream_tail"].encode()[record["stream_tail"].index("{") :])
    tap = make_tap(CHAT, scored=False, read_tokens=0)
    *said, last, done = [event for event in events if event.startswith((b'data: {"id"', b'data: {"error"', DONE))]
    assert said
    for event in said:
        assert tap.feed(event) == event
    with pytest.raises(Broken):
        tap.feed(last)
    assert done == DONE
    assert not tap.complete


@pytest.mark.parametrize(
    "event",
    [
        b'data: {"choices":[{"index":0,"finish_reason":null,"logprobs":{"content":[\n\n',
        b'data: {"choices":[{"index":0,"finish_reason":null,"logprobs":{"content":[7]}}]}\n\n',
        b'data: {"choices":[7,{"finish_reason":null}]}\n\n',
        b'data: {"choices":{"finish_reason":null}}\n\n',
        b'data: [{"finish_reason":null}]\n\n',
    ],
)
@pytest.mark.parametrize("wish", [CHAT, msgspec.structs.replace(CHAT, logprobs=0)], ids=["none", "zero"])
def test_rubbish_behind_a_good_beginning_is_passed_or_broken_and_nothing_worse(event: bytes, wish: Asked) -> None:
    tap = make_tap(wish, scored=True, read_tokens=0)
    tap.feed(vllm_event({"content": "a"}, [token("a", -0.1)]))
    with suppress(Broken):
        tap.feed(event)
    assert not tap.complete


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"<html>",
        b'{"choices":[]}',
        b'{"choices":null}',
        b'{"object":"list"}',
        b'{"error":{"message":"x"},"choices":[{"index":0}]}',
        b'{"choices":[{"index":"0"}]}',
        b'{"choices":[{"index":0,"message":{"content":"a"}}]',
    ],
)
def test_a_whole_answer_that_is_none_is_broken(body: bytes) -> None:
    with pytest.raises(Broken):
        make_tap(WHOLE_CHAT, scored=True, read_tokens=0).feed(body)


def test_an_error_of_null_is_no_error() -> None:
    assert make_tap(WHOLE_CHAT, scored=False, read_tokens=0).feed(whole({"content": "a"}, None, error=None)) is not None


def test_a_finish_reason_of_nothing_is_none() -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=0)
    tap.feed(vllm_event({"content": "a"}, [token("a", -0.1)], ""))
    assert not tap.complete
    tap.feed(vllm_event({}, None, "stop"))
    assert tap.complete


@pytest.mark.parametrize("event", [b": keep-alive\n\n", b"event: ping\n\n", b"id: 7\n\n"])
def test_what_carries_no_data_passes(event: bytes) -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=0)
    assert tap.feed(event) == event
    assert not tap.begun


@pytest.mark.parametrize("event", [DONE, b"data:[DONE]\n\n"])
def test_the_end_is_noted_and_not_passed(event: bytes) -> None:
    tap = make_tap(CHAT, scored=True, read_tokens=0)
    assert tap.feed(event) is None
    assert tap.done


def test_a_chunk_without_choices_or_usage_is_the_servers_own_and_passes() -> None:
    event = sse({"id": "", "choices": [], "prompt_filter_results": [{"index": 0}]})
    assert make_tap(CHAT, scored=True, read_tokens=0).feed(event) == event


def test_a_usage_of_null_stays_where_usage_was_asked_for_and_goes_where_it_was_not() -> None:
    event = vllm_event({"content": "a"}, None, None, usage=None)
    wanted = msgspec.structs.replace(CHAT, usage_wanted=True)
    for read_tokens in (0, ALL):
        assert seen([event, vllm_event({}, None, "stop"), DONE], wanted, read_tokens=read_tokens)[0]["usage"] is None
        assert "usage" not in seen([event, vllm_event({}, None, "stop"), DONE], CHAT, read_tokens=read_tokens)[0]


# -- bills ------------------------------------------------------------------------------------------------------------


@every_transcript
def test_the_bill_is_the_servers_own(transcript: Transcript) -> None:
    tap = make_tap(transcript.asked, scored=True, read_tokens=4)
    for event in events_of(transcript):
        tap.feed(event)
    bills = [usage for chunk in transcript.chunks if (usage := chunk.get("usage"))]
    found = tap.usage()
    if not bills:
        assert found.counted
        assert found.completion_tokens > 0
        assert found.prompt_tokens > 0
        return
    bill = bills[-1]
    assert found.prompt_tokens == bill["prompt_tokens"]
    assert found.cached_prompt_tokens == ((bill.get("prompt_tokens_details") or {}).get("cached_tokens") or 0)
    assert found.completion_tokens >= bill["completion_tokens"]
    if transcript.asked.choices == 1 or not found.counted:
        # llama.cpp bills one choice of several; there what was seen is counted instead.
        assert found.completion_tokens == bill["completion_tokens"]
        assert not found.counted


def test_a_stream_without_a_bill_is_counted_by_its_events() -> None:
    tap = make_tap(CHAT, scored=False, read_tokens=0)
    for number in range(10):
        tap.feed(vllm_event({"content": str(number)}))
    assert tap.usage() == TokenUsage(prompt_tokens=10, completion_tokens=10, counted=True)


def test_a_bill_in_the_middle_of_a_stream_does_not_hide_what_follows() -> None:
    for wanted in (False, True):
        asked = msgspec.structs.replace(CHAT, usage_wanted=wanted, usage_everywhere=wanted)
        tap = make_tap(asked, scored=False, read_tokens=0)
        tap.feed(vllm_event({"content": "a"}, usage={"prompt_tokens": 7, "completion_tokens": 1}))
        for _ in range(9):
            tap.feed(vllm_event({"content": "b"}))
        assert tap.usage() == TokenUsage(prompt_tokens=7, completion_tokens=10, counted=True)
        tap.feed(vllm_event({}, finish="stop", usage={"prompt_tokens": 7, "completion_tokens": 10}))
        assert tap.usage() == TokenUsage(prompt_tokens=7, completion_tokens=10)


METERED = next(one for one in STREAMS if one.name == "vllm/chat_stream_continuous_usage")


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("scored", [False, True])
def test_a_metered_stream_that_is_cut_is_billed_up_to_the_cut(everywhere: bool, scored: bool) -> None:
    asked = msgspec.structs.replace(METERED.asked, usage_wanted=everywhere, usage_everywhere=everywhere)
    events = [event for event in events_of(METERED) if b'"choices":[{' in event]
    for last in range(1, len(events) + 1):
        tap = make_tap(asked, scored=scored, read_tokens=1)
        for event in events[:last]:
            tap.feed(event)
            tap.usage()
        bill = chunks_of(events[last - 1])[0]["usage"]
        expected = TokenUsage(prompt_tokens=37, completion_tokens=bill["completion_tokens"])
        assert tap.usage() == tap.usage() == expected


def test_a_bill_in_every_event_is_cut_out_of_the_bytes() -> None:
    asked = msgspec.structs.replace(CHAT, usage_wanted=True)
    tap = make_tap(asked, scored=False, read_tokens=0)
    tap.feed(vllm_event({"content": "a"}, usage={"prompt_tokens": 7, "completion_tokens": 1}))
    odd = {"content": '"usage":{"prompt_tokens":1}}],"usage":{'}
    with_bill = vllm_event(odd, usage={"prompt_tokens": 7, "completion_tokens": 2, "completion_tokens_details": None})
    nested = {"prompt_tokens": 7, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 1}}
    assert tap.feed(with_bill) == vllm_event(odd)
    assert tap.usage() == TokenUsage(prompt_tokens=7, completion_tokens=2)
    assert tap.feed(vllm_event(odd, usage=nested)) == vllm_event(odd)
    assert tap.feed(vllm_event(odd, usage=nested, vendor="kept")) == vllm_event(odd, vendor="kept")
    assert tap.usage() == TokenUsage(prompt_tokens=7, cached_prompt_tokens=1, completion_tokens=3)


def test_a_bill_that_cannot_be_read_is_none() -> None:
    tap = make_tap(CHAT, scored=False, read_tokens=0)
    tap.feed(vllm_event({"content": "a"}, usage={"prompt_tokens": 7, "completion_tokens": 1}))
    broken = vllm_event({"content": "b"}, usage={"prompt_tokens": "x", "completion_tokens": 2})
    tap.feed(broken)
    assert tap.usage().prompt_tokens == 7


def test_where_the_server_reports_nothing_the_prompt_is_what_the_caller_says_it_is() -> None:
    tap = make_tap(CHAT, scored=False, read_tokens=0, prompt_tokens=123)
    tap.feed(vllm_event({"content": "a"}))
    assert tap.usage() == TokenUsage(prompt_tokens=123, completion_tokens=1, counted=True)
    ids = msgspec.structs.replace(TEXT, prompt_tokens=5)
    assert make_tap(ids, scored=False, read_tokens=0).usage().prompt_tokens == 5


def test_a_whole_answer_without_a_bill_is_counted_by_its_scores_or_its_length() -> None:
    scored = make_tap(WHOLE_CHAT, scored=True, read_tokens=0)
    scored.feed(whole({"content": "a b c"}, [token(one, -0.1) for one in ("a", " ", "b", " ", "c")]))
    assert scored.usage() == TokenUsage(prompt_tokens=10, completion_tokens=5, counted=True)
    plain = make_tap(WHOLE_CHAT, scored=False, read_tokens=0)
    plain.feed(whole({"content": "word " * 100}, None))
    assert plain.usage() == TokenUsage(prompt_tokens=10, completion_tokens=125, counted=True)


@pytest.mark.parametrize(
    "usage", [None, {"prompt_tokens": -1, "completion_tokens": 3}, {"prompt_tokens": 3, "completion_tokens": -3}]
)
def test_a_bill_that_cannot_be_true_is_none(usage: Json | None) -> None:
    tap = make_tap(WHOLE_CHAT, scored=False, read_tokens=0)
    tap.feed(whole({"content": "four"}, None, usage=usage))
    assert tap.usage() == TokenUsage(prompt_tokens=10, completion_tokens=1, counted=True)


def test_the_details_of_a_bill_are_read() -> None:
    tap = make_tap(WHOLE_CHAT, scored=False, read_tokens=0)
    usage = {
        "prompt_tokens": 10,
        "completion_tokens": 20,
        "prompt_tokens_details": {"cached_tokens": 4, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 15},
    }
    tap.feed(whole({"content": "a"}, None, usage=usage))
    assert tap.usage() == TokenUsage(
        prompt_tokens=10, cached_prompt_tokens=4, completion_tokens=20, reasoning_tokens=15
    )


# -- any text ---------------------------------------------------------------------------------------------------------

TRAPS = [
    '"finish_reason":null',
    '"finish_reason":"stop"',
    '},"finish_reason":',
    '"logprobs":{',
    '"logprobs":null',
    '"logprobs": {',
    ']}}],"created":',
    '"usage":',
    '"prompt_logprobs":[',
    "data: [DONE]\n\n",
    "\n\n",
    "\r\n",
    '"',
    "\\",
    '\\"',
    '{"error":{}}',
    "\u2028",
    "é",
    "日本",
    "🙂",
    "\x7f",
    "\t",
]
texts = st.lists(
    st.one_of(st.sampled_from(TRAPS), st.text(st.characters(exclude_categories=["Cs"]), max_size=4)), max_size=4
).map("".join)
plain_values = st.one_of(st.none(), st.booleans(), st.integers(-5, 5), texts)
vendor_keys = texts.filter(lambda key: key not in ("logprobs", "finish_reason", "error", "index", "delta", "choices"))
vendor_values = st.recursive(
    plain_values,
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(vendor_keys, inner, max_size=2)),
    max_leaves=4,
)
scores = st.lists(st.tuples(texts, texts).map(lambda both: token(both[0], -0.5, both[1])), min_size=1, max_size=2)
WRITINGS: list[Callable[[Json], bytes]] = [
    compact,
    lambda chunk: json.dumps(chunk, separators=(",", ":")).encode(),
    lambda chunk: json.dumps(chunk).encode(),
]
BEGINNING = vllm_event({"content": "a"}, [token("a", -0.1)])


def passed(event: bytes, asked: Asked) -> tuple[Json, bool]:
    tap = make_tap(asked, scored=True, read_tokens=0)
    tap.feed(BEGINNING)
    out = tap.feed(event)
    assert out is not None
    assert out.endswith(b"\n\n")
    (found,) = EventSplitter().feed(out)
    return json.loads(found[6:]), tap.complete


@given(texts, scores, st.sampled_from([vllm_event, llama_event]), st.sampled_from([None, "stop"]))
def test_no_text_is_damaged_by_the_splice(
    text: str, given_scores: list[Json], write: Callable[..., bytes], finish: str | None
) -> None:
    event = write({"content": text}, given_scores, finish)
    expected = json.loads(event[6:])
    expected["choices"][0]["logprobs"] = None
    assert passed(event, CHAT) == (expected, finish is not None)


@given(st.lists(texts, min_size=1, max_size=3), st.sampled_from([None, "length"]))
def test_no_text_completion_is_damaged_by_the_splice(words: list[str], finish: str | None) -> None:
    event = text_event("".join(words), text_scores(0, *((word, -0.5) for word in words)), finish)
    expected = json.loads(event[6:])
    expected["choices"][0]["logprobs"] = None
    assert passed(event, TEXT) == (expected, finish is not None)


@st.composite
def chunks_of_any_order(draw: st.DrawFn) -> Json:
    """A chunk with scores, its fields in any order, a vendor's among them."""
    vendor, finish = draw(vendor_values), draw(st.sampled_from([None, "stop"]))
    delta = draw(st.sampled_from([{"content": "a"}, {"tool_calls": [{"function": {"arguments": "{}"}}]}]))
    parts: Json = {"index": 0, "delta": delta, "logprobs": {"content": draw(scores)}}
    parts |= {"finish_reason": finish, "vendor": vendor}
    chunk: Json = {"id": "c", "created": 1, "vendor": vendor}
    chunk["choices"] = [{key: parts[key] for key in draw(st.permutations(list(parts)))}]
    return {key: chunk[key] for key in draw(st.permutations(list(chunk)))}


@given(chunks_of_any_order(), st.sampled_from(WRITINGS))
def test_no_order_of_fields_and_no_field_of_a_vendor_is_damaged(chunk: Json, write: Callable[[Json], bytes]) -> None:
    expected = deepcopy(chunk)
    expected["choices"][0]["logprobs"] = None
    finished = chunk["choices"][0]["finish_reason"] is not None
    assert passed(b"data: " + write(chunk) + b"\n\n", CHAT) == (expected, finished)


@given(st.lists(st.tuples(texts, st.one_of(st.none(), scores), st.booleans()), min_size=1, max_size=3), st.booleans())
def test_no_choice_of_a_whole_answer_is_damaged(
    answers: list[tuple[str, list[Json] | None, bool]], llama: bool
) -> None:
    choices: list[Json] = []
    for index, (text, given_scores, tool) in enumerate(answers):
        message: Json = {"role": "assistant", "content": text}
        if tool:
            message["tool_calls"] = [{"function": {"name": "f", "arguments": text}}]
        logprobs = None if given_scores is None else {"content": given_scores}
        if llama:
            choice = {"finish_reason": "stop", "index": index, "message": message}
            choices.append(choice if logprobs is None else {**choice, "logprobs": logprobs})
        else:
            choices.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": "stop"})
    body: Json = {"choices": choices, "created": 1, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}
    asked = msgspec.structs.replace(WHOLE_CHAT, choices=len(choices))
    expected = as_the_client_would_see([body], asked)
    assert seen([compact(body)], asked) == expected


@given(texts, scores)
def test_no_text_is_damaged_where_alternatives_are_taken_out(text: str, given_scores: list[Json]) -> None:
    asked = msgspec.structs.replace(CHAT, logprobs=0)
    event = vllm_event({"content": text}, given_scores)
    expected = json.loads(event[6:])
    for one in expected["choices"][0]["logprobs"]["content"]:
        one["top_logprobs"] = []
    assert passed(event, asked) == (expected, False)


@given(st.binary(max_size=40), st.booleans())
def test_whatever_a_server_sends_is_passed_or_broken(data: bytes, stream: bool) -> None:
    tap = make_tap(CHAT if stream else WHOLE_CHAT, scored=True, read_tokens=0)
    with suppress(Broken):
        tap.feed(b"data: " + data.replace(b"\n", b"") + b"\n\n" if stream else data)
    tap.usage()


# -- bills that cannot be true ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reported", "why"),
    [
        ({"prompt_tokens": -1, "completion_tokens": 2}, "negative"),
        ({"prompt_tokens": 5, "completion_tokens": -2}, "negative"),
        ({"prompt_tokens": 0, "completion_tokens": 2}, "something was read"),
        ({"prompt_tokens": 5, "completion_tokens": 0}, "something was said"),
        ({"prompt_tokens": 101, "completion_tokens": 2}, "more than the window"),
        ({"prompt_tokens": 5, "completion_tokens": 101}, "more than the window"),
        ({"prompt_tokens": 2**63, "completion_tokens": 2}, "absurd"),
        ({"prompt_tokens": "5", "completion_tokens": 2}, "not a number"),
        ({"prompt_tokens": 5.5, "completion_tokens": 2}, "not whole"),
        ("none", "not a bill"),
    ],
    ids=str,
)
def test_a_bill_that_cannot_be_true_is_counted_instead(reported: Any, why: str) -> None:
    streamed = make_tap(CHAT, scored=False, read_tokens=ALL, prompt_tokens=7, context_tokens=100)
    streamed.feed(vllm_event({"content": "42"}))
    streamed.feed(vllm_event({}, finish="stop"))
    streamed.feed(b"data: " + compact({"choices": [], "usage": reported}) + b"\n\n")
    entire = make_tap(WHOLE_CHAT, scored=False, read_tokens=ALL, prompt_tokens=7, context_tokens=100)
    entire.feed(whole({"content": "42"}, None, usage=reported))
    for tap in (streamed, entire):
        usage = tap.usage()
        assert usage.counted, why
        assert usage.prompt_tokens == 7
        assert 1 <= usage.completion_tokens <= 2


def test_a_bill_up_to_the_window_is_believed() -> None:
    tap = make_tap(WHOLE_CHAT, scored=False, read_tokens=ALL, prompt_tokens=7, context_tokens=100)
    tap.feed(whole({"content": "42"}, None, usage={"prompt_tokens": 99, "completion_tokens": 1}))
    assert tap.usage() == TokenUsage(prompt_tokens=99, completion_tokens=1)
    several = make_tap(
        msgspec.structs.replace(WHOLE_CHAT, choices=3, sequences=3),
        scored=False,
        read_tokens=ALL,
        context_tokens=100,
    )
    several.feed(whole({"content": "42"}, None, usage={"prompt_tokens": 90, "completion_tokens": 240}))
    assert several.usage().completion_tokens == 240


def test_parts_that_are_more_than_the_whole_are_cut_and_flagged() -> None:
    bill = {
        "prompt_tokens": 10,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 11},
        "completion_tokens_details": {"reasoning_tokens": 6},
    }
    tap = make_tap(WHOLE_CHAT, scored=False, read_tokens=ALL)
    tap.feed(whole({"content": "42"}, None, usage=bill))
    assert tap.usage() == TokenUsage(
        prompt_tokens=10, cached_prompt_tokens=10, completion_tokens=5, reasoning_tokens=5, counted=True
    )


def test_the_version_of_a_model_is_what_its_server_says_first() -> None:
    tap = make_tap(WHOLE_CHAT, scored=False, read_tokens=ALL)
    tap.feed(whole({"content": "42"}, None, system_fingerprint="vllm-0.32.0-a47a8369"))
    assert tap.model_version == "vllm-0.32.0-a47a8369"
    for said in (None, 7, "", {"a": 1}):
        odd = make_tap(WHOLE_CHAT, scored=False, read_tokens=ALL)
        odd.feed(whole({"content": "42"}, None, system_fingerprint=said))
        assert odd.model_version is None
    long = make_tap(WHOLE_CHAT, scored=False, read_tokens=ALL)
    long.feed(whole({"content": "42"}, None, system_fingerprint="x" * 1000))
    assert long.model_version == "x" * 128
