"""What can stand in `gateway.yaml`? Every noun of the file as a type; the reference and the JSON Schema come from here.

Units live in the types: a `Duration` is written `500ms`, `2s`, `10m`, `1h` and held in seconds; a `Size` is written
`64KiB`, `16MiB` and held in bytes; `UsdPerMillion` is dollars per million tokens and held in integer nano-dollars per
million tokens; `Usd` is an amount of dollars and held in integer nano-dollars. Optional settings are absent, never a
magic zero; a `Wait` of `0s` is not one, it means what it says.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from routing.confidence import AnyEstimator, MeanLogprob

Duration = Annotated[float, Meta(gt=0, extra={"unit": "duration"})]
Lease = Annotated[float, Meta(ge=1, le=600, extra={"unit": "duration"})]
Wait = Annotated[float, Meta(ge=0, le=3600, extra={"unit": "duration"})]
Size = Annotated[int, Meta(gt=0, extra={"unit": "size"})]
UsdPerMillion = Annotated[int, Meta(ge=0, extra={"unit": "usd_per_million"})]
Usd = Annotated[int, Meta(gt=0, le=9_000_000_000_000_000, extra={"unit": "usd"})]
Share = Annotated[float, Meta(ge=0, le=1)]
Count = Annotated[int, Meta(ge=1, le=1_000_000_000)]
Concurrent = Annotated[int, Meta(ge=1, le=1_000_000)]
Text = Annotated[str, Meta(min_length=1)]
Label = Annotated[str, Meta(min_length=1, max_length=256)]
# `words` say in a message, and in the reference, what the pattern says to a machine.
Name = Annotated[
    str,
    Meta(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,127}$(?!\n)",
        extra={"words": "a name (at most 128 letters, digits and `._:/@-`, a letter or digit first)"},
    ),
]
Moment = Annotated[
    str,
    Meta(
        pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(Z|[+-][0-9]{2}:[0-9]{2})$(?!\n)",
        extra={"words": "a time with its zone, such as `2027-01-31T00:00:00Z`"},
    ),
]
ModelId = Text
Sha256 = Annotated[
    str,
    Meta(
        pattern=r"^[0-9a-f]{64}$(?!\n)",
        extra={"words": "a SHA-256 digest (64 lower-case hexadecimal digits; `tierway keygen` prints one)"},
    ),
]
Url = Annotated[
    str,
    Meta(
        pattern=r"^https?://[^\s?#@]+$(?!\n)",
        extra={"words": "an address such as `http://127.0.0.1:8000` (no user, password, query or fragment)"},
    ),
]
Variable = Annotated[
    str, Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$(?!\n)", extra={"words": "the name of an environment variable"})
]
Origin = Annotated[
    str,
    Meta(
        pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^/\s]+)$(?!\n)",
        extra={"words": "`*` or an origin such as `https://chat.example.com` (no path, no slash at its end)"},
    ),
]


HeaderName = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9-]{1,64}$(?!\n)", extra={"words": "the name of a header, such as `x-user-id`"})
]
HostPort = Annotated[
    str,
    Meta(
        pattern=r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$(?!\n)",
        extra={"words": "a `host:port` such as `redis-1:6379`"},
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


class Admin(Noun, frozen=True, kw_only=True):
    """The operator's own API, on a port of its own: keys, and what the limits hold."""

    host: Annotated[str, Meta(description="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, Meta(ge=0, le=65535, description="Port to listen on; 0 picks a free one.")] = 8081
    key: Annotated[SecretRef, Meta(description="Reference to the key it asks for.")]


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
    workers: Annotated[int, Meta(ge=1, le=255, description="Processes that share the port; one a core is enough.")] = 1
    user_header: Annotated[
        HeaderName | None,
        Meta(
            description="Request header that names the end user, for limits by `user`; it goes before the body's "
            "`user`. Only where whatever sets it is trusted."
        ),
    ] = None
    admin: Annotated[Admin | None, Meta(description="The admin API. Absent: there is none.")] = None
    cors_origins: Annotated[
        tuple[Origin, ...], Meta(description="Web origins whose pages may call; `*` allows any. Empty: CORS is off.")
    ] = ()


class TimeoutSettings(Noun, frozen=True, kw_only=True):
    """How long each phase of a call may take. None of them can be infinite."""

    connect: Annotated[Duration, Meta(description="To open a connection.")] = 2.0
    first_token: Annotated[Duration, Meta(description="From sending to the first token of a stream.")] = 60.0
    between_tokens: Annotated[Duration, Meta(description="Between two tokens of a stream.")] = 30.0
    total: Annotated[Duration, Meta(description="For the whole call.")] = 600.0


class GpuPrice(Noun, frozen=True, kw_only=True):
    """A server that costs by the hour, whether it works or not."""

    usd_per_hour: Annotated[Usd, Meta(description="Dollars of one GPU for an hour.")]
    count: Annotated[int, Meta(ge=1, le=10_000, description="GPUs of each server.")] = 1


class Price(Noun, frozen=True, kw_only=True):
    """What tokens cost: dollars per million of them, or what the server costs by the hour, or LiteLLM's price list."""

    input: Annotated[UsdPerMillion | None, Meta(description="Prompt tokens. With `output`.")] = None
    output: Annotated[UsdPerMillion | None, Meta(description="Completion tokens. With `input`.")] = None
    cached_input: Annotated[
        UsdPerMillion | None, Meta(description="Prompt tokens from the prefix cache. Default: as `input`.")
    ] = None
    gpu: Annotated[
        GpuPrice | None,
        Meta(description="In place of prices of tokens: what each server costs. Requests share the time it works."),
    ] = None
    litellm: Annotated[
        Text | None,
        Meta(description="In place of prices of tokens: a model in LiteLLM's price list (needs `tierway[hosted]`)."),
    ] = None


class LaterPrice(Noun, frozen=True, kw_only=True):
    """A price that applies from a moment on."""

    at: Annotated[Moment, Meta(description="From when on, as `2027-01-31T00:00:00Z`.")]
    price: Annotated[Price, Meta(description="What tokens cost from then on.")]


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
    priority: Annotated[
        bool,
        Meta(
            description="The server schedules by priority (vLLM's `--scheduling-policy priority`): each call carries "
            "the priority of its key in place of the client's own."
        ),
    ] = False
    tokenizer: Annotated[
        Text | None,
        Meta(
            description="Path of the model's `tokenizer.json`, to count prompt tokens here (needs "
            "`tierway[tokenizers]`). Default: the server's `/tokenize` where it has one, tiktoken for models that it "
            "knows, an estimate learned from what the server reports otherwise.",
        ),
    ] = None
    timeouts: Annotated[TimeoutSettings, Meta(description="Limits of each phase of a call.")] = TimeoutSettings()
    price: Annotated[Price | None, Meta(description="What it costs. Default: the price of its tier.")] = None
    later_prices: Annotated[
        tuple[LaterPrice, ...], Meta(max_length=100, description="What it costs from a moment on, in order of time.")
    ] = ()


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
    price: Annotated[Price | None, Meta(description="What it costs. Default: the price of its tier.")] = None
    later_prices: Annotated[
        tuple[LaterPrice, ...], Meta(max_length=100, description="What it costs from a moment on, in order of time.")
    ] = ()


class ScriptedBackend(Noun, tag_field="kind", tag="scripted", frozen=True, kw_only=True):
    """Plays a fixed answer token by token: for demonstrations and dry runs."""

    model: Annotated[ModelId, Meta(description="The model id it answers to.")]
    tokens: Annotated[tuple[str, ...], Meta(min_length=1, description="The pieces of the answer.")]
    logprob: Annotated[float, Meta(le=0, description="Log-probability of every token.")] = -0.05
    delay: Annotated[Duration | None, Meta(description="Pause before each token. Default: none.")] = None
    price: Annotated[Price | None, Meta(description="What it costs. Default: the price of its tier.")] = None
    later_prices: Annotated[
        tuple[LaterPrice, ...], Meta(max_length=100, description="What it costs from a moment on, in order of time.")
    ] = ()


AnyBackend = VllmBackend | LocalBackend | ScriptedBackend


class Queue(Noun, frozen=True, kw_only=True):
    """How many requests a tier serves at a time, and how many may wait for that."""

    concurrent: Annotated[Concurrent, Meta(description="Calls to the tier at the same time, all replicas together.")]
    size: Annotated[int, Meta(ge=0, le=100_000, description="Requests that may wait in each replica.")] = 128
    max_wait: Annotated[
        Wait, Meta(description="Longest wait. A request that would wait longer is passed on at once.")
    ] = 10.0


class Tier(Noun, frozen=True, kw_only=True):
    """A model size: interchangeable backends at one price."""

    name: Annotated[Name, Meta(description="What clients and routes call it.")]
    backends: Annotated[tuple[Name, ...], Meta(min_length=1, description="Names of its backends.")]
    price: Annotated[Price, Meta(description="What its tokens cost.")]
    later_prices: Annotated[
        tuple[LaterPrice, ...], Meta(max_length=100, description="What they cost from a moment on, in order of time.")
    ] = ()
    context_tokens: Annotated[
        Count | None,
        Meta(description="Context window of its models. Default: what a server says of itself, where it does."),
    ] = None
    max_output_tokens: Annotated[
        Count | None,
        Meta(
            description="Most tokens of one answer: sent as `max_tokens` where the client wants more or says nothing.",
        ),
    ] = None
    queue: Annotated[
        Queue | None, Meta(description="How many requests it serves at a time. Absent: as many as come.")
    ] = None


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
    team: Annotated[Name | None, Meta(description="The team it belongs to.")] = None
    user: Annotated[
        Label | None,
        Meta(description="The user it belongs to, whatever a request says."),
    ] = None
    priority: Annotated[
        int, Meta(ge=-100, le=100, description="Who is served first where requests wait: the higher one.")
    ] = 0
    tags: Annotated[tuple[Name, ...], Meta(max_length=32, description="Words to find it by.")] = ()
    metadata: Annotated[
        dict[Name, Annotated[str, Meta(max_length=256)]],
        Meta(max_length=32, description="What the bill should carry, such as a cost centre."),
    ] = {}
    expires: Annotated[Moment | None, Meta(description="When it ends, as `2027-01-31T00:00:00Z`. Absent: never.")] = (
        None
    )
    disabled: Annotated[bool, Meta(description="Known, but refused.")] = False


class RateLimit(Noun, frozen=True, kw_only=True):
    """So many in a period. The allowance fills up evenly, up to `burst`."""

    limit: Annotated[Count, Meta(description="How many in a period.")]
    per: Annotated[Literal["second", "minute", "hour", "day"], Meta(description="The period.")]
    burst: Annotated[Count | None, Meta(description="How many at once. Default: as `limit`.")] = None


class SpendLimit(Noun, frozen=True, kw_only=True):
    """So many dollars in a window of time, or in total."""

    usd: Annotated[Usd, Meta(description="How many dollars.")]
    per: Annotated[
        Literal["hour", "day", "month"] | None, Meta(description="The window. Absent: in total, for ever.")
    ] = None
    window: Annotated[
        Literal["calendar", "rolling"],
        Meta(
            description="From midnight (the full hour, the first of the month) on, or the last so many hours (30 days)."
        ),
    ] = "calendar"
    timezone: Annotated[Label, Meta(description="Whose calendar, as `Europe/Berlin`.")] = "UTC"


class LimitScope(Noun, frozen=True, kw_only=True):
    """What is counted together: `each` counts every one apart, a name counts that one alone. All given must match."""

    key: Annotated[Label | None, Meta(description="Name of a key, or `each`.")] = None
    team: Annotated[Label | None, Meta(description="Name of a team, or `each`.")] = None
    user: Annotated[Label | None, Meta(description="A user (of the key, the header or the body), or `each`.")] = None
    route: Annotated[
        Label | None, Meta(description="Name of a route, tier or model that requests go to, or `each`.")
    ] = None
    model: Annotated[Label | None, Meta(description="What requests name as `model`, aliases too, or `each`.")] = None
    tier: Annotated[
        Label | None,
        Meta(description="Name of a tier, or `each`. Counts the attempts on it, when they start."),
    ] = None


class Limit(Noun, frozen=True, kw_only=True):
    """How much of what, for whom. A request must fit in all limits that apply to it."""

    name: Annotated[Name, Meta(description="What errors, metrics and `GET /v1/limits` call it.")]
    scope: Annotated[LimitScope, Meta(description="What is counted together. Absent: everything.")] = LimitScope()
    requests: Annotated[RateLimit | None, Meta(description="Requests.")] = None
    tokens: Annotated[RateLimit | None, Meta(description="Prompt and completion tokens together.")] = None
    input_tokens: Annotated[RateLimit | None, Meta(description="Prompt tokens.")] = None
    output_tokens: Annotated[RateLimit | None, Meta(description="Completion tokens.")] = None
    concurrent: Annotated[Concurrent | None, Meta(description="Requests at the same time.")] = None
    spend: Annotated[SpendLimit | None, Meta(description="Dollars, all attempts included.")] = None
    reserve: Annotated[
        Literal["estimate", "strict"],
        Meta(
            description="What a request reserves before its length is known: what answers usually take, or the most it "
            "can come to."
        ),
    ] = "estimate"
    counted: Annotated[
        Literal["shown", "all_attempts"],
        Meta(description="Which tokens count: those the client is shown as its usage, or those of every attempt."),
    ] = "shown"
    max_wait: Annotated[
        Wait,
        Meta(
            description="How long a request may wait that would fit once others have given back what they reserved; "
            "with `0s` it is refused at once."
        ),
    ] = 5.0
    priority: Annotated[
        int | None,
        Meta(
            description="Of the limits with a priority that match a request only those with the highest one apply. "
            "Absent: applies whatever else does."
        ),
    ] = None
    shadow: Annotated[bool, Meta(description="Count and report, refuse nothing.")] = False
    when_down: Annotated[
        Literal["open", "closed", "share"],
        Meta(
            description="While the store cannot be asked: let everything through, nothing, or let each replica give "
            "out its share."
        ),
    ] = "share"


class MemoryState(Noun, tag_field="kind", tag="memory", frozen=True, kw_only=True):
    """Counted in the process itself, and forgotten with it."""

    per_worker_shares: Annotated[
        bool, Meta(description="Give every worker its share of each limit. Otherwise several workers are refused.")
    ] = False


class Tls(Noun, frozen=True, kw_only=True):
    """How the connection to the store is encrypted."""

    ca: Annotated[Label | None, Meta(description="File with the certificates to trust. Default: the system's.")] = None
    server_name: Annotated[Label | None, Meta(description="Name the certificate must be for. Default: the host.")] = (
        None
    )


class RedisState(Noun, tag_field="kind", tag="redis", frozen=True, kw_only=True):
    """Counted in Redis or Valkey, exactly, for any number of workers and replicas."""

    addresses: Annotated[
        tuple[HostPort, ...],
        Meta(min_length=1, description="The server; with `sentinel` the sentinels, with `cluster` some of its nodes."),
    ]
    mode: Annotated[Literal["standalone", "sentinel", "cluster"], Meta(description="What stands there.")] = "standalone"
    master: Annotated[Label | None, Meta(description="With `sentinel`: the name of the master it watches.")] = None
    database: Annotated[int, Meta(ge=0, le=15, description="Number of the database; a cluster has only 0.")] = 0
    user: Annotated[Label | None, Meta(description="User name, where access lists are used.")] = None
    password: Annotated[SecretRef | None, Meta(description="Reference to the password.")] = None
    tls: Annotated[Tls | None, Meta(description="Encrypt the connection. Absent: plain.")] = None
    prefix: Annotated[Name, Meta(description="How all its keys begin: one deployment, one prefix.")] = "tierway"
    partition: Annotated[
        Literal["deployment", "team", "key"],
        Meta(
            description="What shares a slot of a cluster. Limits are exact within a partition, so none may cross it: "
            "with `team` each must be of a team or key, with `key` of a key."
        ),
    ] = "deployment"
    timeout: Annotated[Duration, Meta(le=10.0, description="Longest wait for an answer.")] = 0.05
    lease: Annotated[Lease, Meta(description="How long a reservation of a replica that has died is held.")] = 30.0
    expected_replicas: Annotated[
        int, Meta(ge=1, le=10_000, description="How many processes share the limits, where the store could never tell.")
    ] = 1
    keys_valid_for: Annotated[
        Duration, Meta(description="How long a key of the store is believed while the store cannot be asked.")
    ] = 30.0


AnyState = MemoryState | RedisState


class SqliteLedger(Noun, tag_field="kind", tag="sqlite", frozen=True, kw_only=True):
    """A file of SQLite, for one machine."""

    path: Annotated[Text, Meta(description="The file, from the folder of `gateway.yaml` if relative.")] = (
        "tierway-ledger.db"
    )


class PostgresLedger(Noun, tag_field="kind", tag="postgres", frozen=True, kw_only=True):
    """PostgreSQL, for any number of replicas, with a file that absorbs its outages (needs `tierway[postgres]`)."""

    dsn: Annotated[SecretRef, Meta(description="Reference to its address, `postgresql://user:password@host/database`.")]
    schema: Annotated[Name, Meta(description="The schema its tables are in; made if it is not there.")] = "tierway"
    timeout: Annotated[
        Duration, Meta(le=60.0, description="Longest wait for it. What it has not taken by then goes to the spool.")
    ] = 1.0
    spool: Annotated[
        Text,
        Meta(
            description="The file that holds what it has not taken yet, from the folder of `gateway.yaml` if relative."
        ),
    ] = "tierway-spool.db"
    spool_size: Annotated[Size, Meta(description="How large that file may become.")] = 1024 * 1024 * 1024


class NoLedger(Noun, tag_field="kind", tag="none", frozen=True, kw_only=True):
    """Nothing is kept. For benchmarks and dry runs."""


AnyLedgerStore = SqliteLedger | PostgresLedger | NoLedger


class DecisionInputs(Noun, frozen=True, kw_only=True):
    """What a decision was made from, without any text: for training, simulation and replay. It is personal data."""

    kept: Annotated[bool, Meta(description="Keep them.")] = True
    keep_for: Annotated[Duration, Meta(description="How long.")] = 30 * 24 * 3600.0


class Webhook(Noun, frozen=True, kw_only=True):
    """Where alerts are sent: a signed POST of JSON, repeated until it is taken."""

    url: Annotated[Url, Meta(description="Its address.")]
    secret: Annotated[SecretRef, Meta(description="Reference to the secret that signs what is sent.")]


class Alerts(Noun, frozen=True, kw_only=True):
    """When somebody should hear of spending."""

    webhooks: Annotated[tuple[Webhook, ...], Meta(max_length=16, description="Who is told.")] = ()
    budgets: Annotated[
        tuple[Share, ...],
        Meta(max_length=16, description="At which parts of a `spend` limit. Empty: never."),
    ] = (0.5, 0.8, 1.0)
    anomalies: Annotated[
        bool, Meta(description="Where a team or a route spends unlike the same hour of past weeks.")
    ] = True


class Ledger(Noun, frozen=True, kw_only=True):
    """Where the bill of every request is kept, and what is done with it."""

    store: Annotated[AnyLedgerStore, Meta(description="Where rows are kept.")] = SqliteLedger()
    commit_within: Annotated[
        float,
        Meta(
            ge=0,
            le=1,
            extra={"unit": "duration"},
            description="How long a row may wait for others, to be committed with them.",
        ),
    ] = 0.005
    when_unwritable: Annotated[
        Literal["refuse", "serve"],
        Meta(
            description="While rows cannot be written: refuse new requests with 503 and end open ones with an error, "
            "or serve them and raise the alarm."
        ),
    ] = "refuse"
    lease: Annotated[
        Lease,
        Meta(description="How long after its last sign of life a process is taken for dead, its requests billed."),
    ] = 30.0
    keep_for: Annotated[Duration | None, Meta(description="How long rows are kept. Absent: for ever.")] = None
    decision_inputs: Annotated[DecisionInputs, Meta(description="What decisions were made from.")] = DecisionInputs()
    idle: Annotated[
        Literal["nobody", "teams", "requests"],
        Meta(
            description="Who bears what a GPU costs while it does nothing: nobody, the teams by their share of its "
            "work, or every request by its share."
        ),
    ] = "nobody"
    alerts: Annotated[Alerts, Meta(description="When somebody should hear of spending.")] = Alerts()


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
    keys: Annotated[
        tuple[Key, ...],
        Meta(description="Who may ask. May be empty where the admin API is on, whose keys are in the store."),
    ] = ()
    teams: Annotated[
        tuple[Name, ...], Meta(description="Teams that keys of the store may belong to, beside those of `keys`.")
    ] = ()
    limits: Annotated[tuple[Limit, ...], Meta(max_length=1000, description="How much of what, for whom.")] = ()
    state: Annotated[AnyState, Meta(description="Where limits are counted and keys of the admin API are kept.")] = (
        MemoryState()
    )
    ledger: Annotated[Ledger, Meta(description="Where the bill of every request is kept.")] = Ledger()
    routes: Annotated[dict[Name, Route], Meta(description="The names clients may ask for as `model`.")] = {}
    server: Annotated[Server, Meta(description="Where tierway listens and what it accepts.")] = Server()
    telemetry: Annotated[Telemetry, Meta(description="Logs and traces.")] = Telemetry()
