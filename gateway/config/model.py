"""What can stand in `gateway.yaml`? Every noun of the file as a type; the reference and the JSON Schema come from here.

Units live in the types: a `Duration` is written `500ms`, `2s`, `10m`, `1h` and held in seconds; a `Size` is written
`64KiB`, `16MiB` and held in bytes; `UsdPerMillion` is dollars per million tokens and held in integer nano-dollars per
million tokens. Optional settings are absent, never a magic zero.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from routing.confidence import AnyEstimator, MeanLogprob

Duration = Annotated[float, Meta(gt=0, extra={"unit": "duration"})]
Size = Annotated[int, Meta(gt=0, extra={"unit": "size"})]
UsdPerMillion = Annotated[int, Meta(ge=0, extra={"unit": "usd_per_million"})]
Share = Annotated[float, Meta(ge=0, le=1)]
# `words` say in a message, and in the reference, what the pattern says to a machine.
Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$",
        extra={"words": "a name (at most 128 letters, digits and `._:/@-`, a letter or digit first)"},
    ),
]
ModelId = Annotated[str, Meta(min_length=1)]
Sha256 = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{64}$",
        extra={"words": "a SHA-256 digest (64 lower-case hexadecimal digits; `tierway keygen` prints one)"},
    ),
]
Url = Annotated[
    str,
    Meta(
        pattern=r"^https?://[^\s?#@]+$",
        extra={"words": "an address such as `http://127.0.0.1:8000` (no user, password, query or fragment)"},
    ),
]
Variable = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", extra={"words": "the name of an environment variable"})
]
Origin = Annotated[
    str,
    Meta(
        pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$",
        extra={"words": "`*` or an origin such as `https://chat.example.com` (no path, no slash at its end)"},
    ),
]


class Noun(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The settings all nouns share: frozen, by name, nothing unknown."""


class SecretFromEnv(Noun, tag_field="from", tag="env", frozen=True, kw_only=True):
    """A secret in an environment variable."""

    name: Annotated[Variable, Meta(description="Name of the environment variable.")]


class SecretFromFile(Noun, tag_field="from", tag="file", frozen=True, kw_only=True):
    """A secret in a file, surrounding white space removed."""

    path: Annotated[
        str, Meta(min_length=1, description="Path of the file, from the folder of `gateway.yaml` if relative.")
    ]


SecretRef = SecretFromEnv | SecretFromFile


class Server(Noun, frozen=True, kw_only=True):
    """Where tierway listens and what it accepts."""

    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 8080
    max_body: Annotated[Size, Meta(le=64 * 1024 * 1024, description="Largest request body, at most 64MiB.")] = (
        16 * 1024 * 1024
    )
    shutdown_grace: Annotated[Duration, Meta(description="How long open streams may go on after SIGTERM.")] = 30.0
    kept_decisions: Annotated[
        int, Meta(ge=0, description="How many past Decisions each worker keeps for `GET /v1/requests/{exchange_id}`.")
    ] = 10_000
    cors_origins: Annotated[
        tuple[Origin, ...], Meta(description="Web origins whose pages may call; `*` allows any. Empty: CORS is off.")
    ] = ()


class TimeoutSettings(Noun, frozen=True, kw_only=True):
    """How long each phase of a call may take. None of them can be infinite."""

    connect: Annotated[Duration, Meta(description="To open a connection.")] = 2.0
    first_token: Annotated[Duration, Meta(description="From sending to the first token of a stream.")] = 60.0
    between_tokens: Annotated[Duration, Meta(description="Between two tokens of a stream.")] = 30.0
    total: Annotated[Duration, Meta(description="For the whole call.")] = 600.0


class VllmBackend(Noun, tag_field="kind", tag="vllm", frozen=True, kw_only=True):
    """A vLLM server, or any other that speaks the OpenAI API."""

    url: Annotated[Url, Meta(description="Base address, with or without `/v1` at its end.")]
    model: Annotated[ModelId, Meta(description="The model id that the server knows.")]
    api_key: Annotated[SecretRef | None, Meta(description="Reference to the server's API key, if it wants one.")] = None
    logprobs: Annotated[
        Literal["always", "not_with_streamed_tools", "never"],
        Meta(
            description="When the server takes a request for log-probabilities. llama.cpp refuses it for a stream with "
            "tools; some hosted models always do."
        ),
    ] = "always"
    timeouts: Annotated[TimeoutSettings, Meta(description="Limits of each phase of a call.")] = TimeoutSettings()


class LocalBackend(Noun, tag_field="kind", tag="local", frozen=True, kw_only=True):
    """A model on this machine: a supervised child process of llama.cpp's server."""

    weights: Annotated[
        str,
        Meta(
            min_length=1, description="`small`, `medium` or `large` of `tierway models`, or the path of a `.gguf` file."
        ),
    ]
    model: Annotated[
        ModelId | None,
        Meta(description="The model id it answers to. Default: that of the weights, or the file's name."),
    ] = None
    context_tokens: Annotated[int, Meta(ge=256, description="Context window of each parallel request.")] = 4096
    parallel: Annotated[int, Meta(ge=1, le=64, description="Requests decoded at the same time.")] = 4
    threads: Annotated[int, Meta(ge=1, description="CPU threads. One is best where models share the cores.")] = 1
    timeouts: Annotated[TimeoutSettings, Meta(description="Limits of each phase of a call.")] = TimeoutSettings()


class ScriptedBackend(Noun, tag_field="kind", tag="scripted", frozen=True, kw_only=True):
    """Plays a fixed answer token by token: for demonstrations and dry runs."""

    model: Annotated[ModelId, Meta(description="The model id it answers to.")]
    tokens: Annotated[tuple[str, ...], Meta(min_length=1, description="The pieces of the answer.")]
    logprob: Annotated[float, Meta(le=0, description="Log-probability of every token.")] = -0.05
    delay: Annotated[Duration | None, Meta(description="Pause before each token. Default: none.")] = None


AnyBackend = VllmBackend | LocalBackend | ScriptedBackend


class Price(Noun, frozen=True, kw_only=True):
    """Dollars per million tokens."""

    input: Annotated[UsdPerMillion, Meta(description="Prompt tokens.")]
    output: Annotated[UsdPerMillion, Meta(description="Completion tokens.")]
    cached_input: Annotated[
        UsdPerMillion | None, Meta(description="Prompt tokens from the prefix cache. Default: as `input`.")
    ] = None


class Tier(Noun, frozen=True, kw_only=True):
    """A model size: interchangeable backends at one price."""

    name: Annotated[Name, Meta(description="What clients and routes call it.")]
    backends: Annotated[tuple[Name, ...], Meta(min_length=1, description="Names of its backends.")]
    price: Annotated[Price, Meta(description="What its tokens cost.")]


class Step(Noun, frozen=True, kw_only=True):
    """One rung of a route."""

    tier: Annotated[Name, Meta(description="Name of the tier.")]
    doubt_below: Annotated[
        Share | None,
        Meta(
            description="Confidence below which the answer is doubted and the next tier asked. Absent: never doubted."
        ),
    ] = None


class Hold(Noun, frozen=True, kw_only=True):
    """How much of a stream is held back before it is judged: whichever limit is reached first."""

    tokens: Annotated[int, Meta(ge=1, description="Answer tokens of each choice.")] = 16
    time: Annotated[Duration, Meta(description="Time since the first token.")] = 2.0
    bytes: Annotated[Size, Meta(description="Bytes held in memory.")] = 256 * 1024


class Route(Noun, frozen=True, kw_only=True):
    """A name that clients ask for, and the tiers it may climb, cheapest first."""

    steps: Annotated[tuple[Step, ...], Meta(min_length=1, description="The tiers, cheapest first.")]
    aliases: Annotated[
        tuple[Name, ...], Meta(description="Other names for it, such as a model id that clients have built in.")
    ] = ()
    confidence: Annotated[AnyEstimator, Meta(description="How the confidence of an answer is read.")] = MeanLogprob()
    hold: Annotated[Hold, Meta(description="How much of a stream is judged before it is let through.")] = Hold()
    when_unknown: Annotated[
        Literal["doubt", "accept"],
        Meta(description="What to make of an answer that comes without log-probabilities."),
    ] = "doubt"
    keep_doubted: Annotated[
        Literal["until_first_token", "never"],
        Meta(description="Keep a doubted answer until the next tier has begun, as a fall-back, or drop it at once."),
    ] = "until_first_token"


class Key(Noun, frozen=True, kw_only=True):
    """One API key. Only its digest is kept; `tierway keygen` makes both."""

    name: Annotated[Name, Meta(description="What logs and Decisions call it.")]
    sha256: Annotated[Sha256, Meta(description="SHA-256 of the key, in hexadecimal.")]
    models: Annotated[
        tuple[Name, ...] | None, Meta(description="The names it may ask for as `model`. Absent: all of them.")
    ] = None
    admin: Annotated[bool, Meta(description="May read `/status`.")] = False


class Log(Noun, frozen=True, kw_only=True):
    """The operator's log, on standard error."""

    format: Annotated[Literal["json", "text"], Meta(description="One JSON object a line, or text for people.")] = "json"
    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least severe level written.")] = (
        "info"
    )


class Telemetry(Noun, frozen=True, kw_only=True):
    """What tierway tells about its work."""

    log: Annotated[Log, Meta(description="The operator's log.")] = Log()
    traces: Annotated[
        bool, Meta(description="One OpenTelemetry span an exchange, through the tracer provider of the process.")
    ] = False


class Config(Noun, frozen=True, kw_only=True):
    """All of `gateway.yaml`."""

    backends: Annotated[dict[Name, AnyBackend], Meta(min_length=1, description="The servers that answer, by name.")]
    tiers: Annotated[tuple[Tier, ...], Meta(min_length=1, description="The model sizes, cheapest first.")]
    keys: Annotated[tuple[Key, ...], Meta(min_length=1, description="Who may ask.")]
    routes: Annotated[dict[Name, Route], Meta(description="The names clients may ask for as `model`.")] = {}
    server: Annotated[Server, Meta(description="Where tierway listens and what it accepts.")] = Server()
    telemetry: Annotated[Telemetry, Meta(description="Logs and traces.")] = Telemetry()
