"""What is kept of a request? The rows of the ledger, one Struct a table, its fields in the order of the columns.

Rules a reader must not break:

* Every row has a key of ours, so that writing it twice changes nothing.
* Rows are appended, never edited. The one exception: a row that is `estimated`, because its process died, gives way to
  the true one, where that was on its way.
* Never a word of a prompt or an answer.
* Money is integer nano-dollars, times are integer milliseconds since the epoch (`_ms`) or microseconds (`_us`),
  a truth is 0 or 1: what SQLite and PostgreSQL both keep exactly.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import msgspec

Outcome = Literal["answered", "broken", "abandoned", "exhausted", "lost"]
"""How an exchange ended. `lost`: its process died, and it is billed at what was last known of it."""

WhenThere = Literal["ignore", "replace", "replace_estimated"]
"""What becomes of a row whose key is there already."""


class Row(Protocol):
    """A row of any table."""

    TABLE: ClassVar[str]
    KEY: ClassVar[tuple[str, ...]]
    WHEN_THERE: ClassVar[WhenThere]
    __struct_fields__: ClassVar[tuple[str, ...]]


class ExchangeRow(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange. Tokens and money are the sums of its attempts.

    `at_ms` is when the request came, `settled_ms` when its bill was made: limits count it from then. `tags` is a JSON
    array and `metadata` a JSON object, both of the key. `tier`, `backend`, `model` and `model_version` are those of the
    answer that was shown, null where none was; `served` is the number of that attempt, `calls` how many were made,
    which those that found their tier full were not. `wasted_nusd` is what attempts cost that were not shown.
    `baseline_nusd` is what the tokens of the answer shown would have cost on `baseline_tier`, the dearest of the route.
    `queued_us`, `first_token_us` and `decided_us` count from `at_ms`. `instance` is the process that wrote it.
    """

    TABLE: ClassVar[str] = "exchanges"
    KEY: ClassVar[tuple[str, ...]] = ("exchange_id",)
    WHEN_THERE: ClassVar[WhenThere] = "replace_estimated"

    exchange_id: str
    at_ms: int
    settled_ms: int
    key_name: str
    team: str | None
    user_name: str | None
    user_digest: str | None
    tags: str
    metadata: str
    asked: str
    route: str
    endpoint: str
    streamed: int
    tier: str | None
    backend: str | None
    model: str | None
    model_version: str | None
    outcome: Outcome
    error: str | None
    degraded: int
    calls: int
    served: int | None
    estimated: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    counted: int
    input_nusd: int
    cached_input_nusd: int
    output_nusd: int
    gpu_nusd: int
    wasted_nusd: int
    baseline_nusd: int
    baseline_tier: str | None
    queued_us: int
    first_token_us: int | None
    decided_us: int
    confidence: float | None
    confidence_kind: str
    config: str
    request_id: str
    instance: str


class AttemptRow(msgspec.Struct, frozen=True, kw_only=True):
    """One call to one backend.

    `started_ms` and `ended_ms` are moments; `waited_us` is how long it waited for room in its tier before, and
    `first_token_us` counts from the start. `counted` says that tokens were counted here, because the server reported
    none that can be true. Of a `price_version` that is a GPU's only `gpu_nusd` is not 0, and it is provisional.
    """

    TABLE: ClassVar[str] = "attempts"
    KEY: ClassVar[tuple[str, ...]] = ("exchange_id", "number")
    WHEN_THERE: ClassVar[WhenThere] = "replace_estimated"

    exchange_id: str
    number: int
    role: str
    tier: str
    backend: str
    model: str
    model_version: str | None
    outcome: str
    fault: str | None
    estimated: int
    prompt_tokens: int
    cached_prompt_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    counted: int
    price_version: str
    input_nusd: int
    cached_input_nusd: int
    output_nusd: int
    gpu_nusd: int
    started_ms: int
    waited_us: int
    first_token_us: int | None
    ended_ms: int
    confidence: float | None
    doubt_below: float | None


class DeliveryRow(msgspec.Struct, frozen=True, kw_only=True):
    """How an answer reached its client, known after its bill was written. `total_us` counts from its `at_ms`."""

    TABLE: ClassVar[str] = "deliveries"
    KEY: ClassVar[tuple[str, ...]] = ("exchange_id",)
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    exchange_id: str
    delivered: int
    total_us: int


class DecisionInputRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision was made from; personal data, with a retention of its own.

    `features` is a vector of `feature_version` (`routing/features.py`): one signed byte a dimension. `facts`, `scores`,
    `fleet` and `thresholds` are JSON. `propensity` is the chance that the plan taken was taken; `artefacts` is a JSON
    array of the ids of what was learned and used.
    """

    TABLE: ClassVar[str] = "decision_inputs"
    KEY: ClassVar[tuple[str, ...]] = ("exchange_id",)
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    exchange_id: str
    at_ms: int
    feature_version: str
    features: bytes
    facts: str
    scores: str
    fleet: str
    thresholds: str
    propensity: float
    artefacts: str


class OpenRow(msgspec.Struct, frozen=True, kw_only=True):
    """An exchange under way: what to write of it if its process dies now. `bill` is the JSON of a `Bill`."""

    TABLE: ClassVar[str] = "open_exchanges"
    KEY: ClassVar[tuple[str, ...]] = ("exchange_id",)
    WHEN_THERE: ClassVar[WhenThere] = "replace"

    exchange_id: str
    instance: str
    seen_ms: int
    bill: str


class RefusalRow(msgspec.Struct, frozen=True, kw_only=True):
    """How many requests one process refused for one reason in one hour (`hour` counts them since the epoch).

    `key_name` is empty where nobody was recognised.
    """

    TABLE: ClassVar[str] = "refusals"
    KEY: ClassVar[tuple[str, ...]] = ("hour", "instance", "key_name", "code")
    WHEN_THERE: ClassVar[WhenThere] = "replace"

    hour: int
    instance: str
    key_name: str
    code: str
    requests: int


class PriceRow(msgspec.Struct, frozen=True, kw_only=True, weakref=True):
    """A price that was billed by: nano-dollars per million tokens. `at_ms` is when it was first used.

    `kind` is `tokens`, `gpu` or `litellm`. Of a GPU the hour costs `hour_nusd` and the rest is provisional.
    """

    TABLE: ClassVar[str] = "prices"
    KEY: ClassVar[tuple[str, ...]] = ("version",)
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    version: str
    at_ms: int
    tier: str
    backend: str
    kind: str
    input_nusd: int
    cached_input_nusd: int
    output_nusd: int
    hour_nusd: int | None


class InstanceRow(msgspec.Struct, frozen=True, kw_only=True):
    """A process that writes to the ledger, and when it was last heard of."""

    TABLE: ClassVar[str] = "instances"
    KEY: ClassVar[tuple[str, ...]] = ("instance",)
    WHEN_THERE: ClassVar[WhenThere] = "replace"

    instance: str
    heard_ms: int


class MeterRow(msgspec.Struct, frozen=True, kw_only=True):
    """What a server's own counters said of a part of an hour (`hour` counts them since the epoch).

    The part is from `from_ms` to `until_ms`, as `instance` watched it. `prompt_tokens` and `completion_tokens` are how
    far its counters went on meanwhile (prompt tokens without cached ones), `busy_ms` how long it was seen to work. One
    that was started anew in between has `restarts`, and its counters are added up across them. `ready_ms` is how long
    it answered at all.
    """

    TABLE: ClassVar[str] = "server_meters"
    KEY: ClassVar[tuple[str, ...]] = ("backend", "hour", "instance", "from_ms")
    WHEN_THERE: ClassVar[WhenThere] = "replace"

    backend: str
    hour: int
    instance: str
    from_ms: int
    until_ms: int
    prompt_tokens: int
    completion_tokens: int
    busy_ms: int
    ready_ms: int
    restarts: int


class ClosingRow(msgspec.Struct, frozen=True, kw_only=True):
    """What an hour of a server came to: `shares_nusd + idle_nusd + outside_nusd` is `hour_nusd`, always.

    `revision` counts from 1; another one follows where rows of that hour come late. `attempts` is how many overlapped
    it, and `provisional_nusd` what they had been billed for it before: the changes of all adjustments of the hour, up
    to this revision, come to `shares_nusd - provisional_nusd`. `price_version` names the price of the hour,
    `decode_weight` the work of a completion token, in thousandths of that of a prompt token. When rows are no longer
    those it was `made_from`, it is time for another revision.
    """

    TABLE: ClassVar[str] = "closings"
    KEY: ClassVar[tuple[str, ...]] = ("backend", "hour", "revision")
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    backend: str
    hour: int
    revision: int
    tier: str
    at_ms: int
    hour_nusd: int
    shares_nusd: int
    idle_nusd: int
    outside_nusd: int
    busy_ms: int
    attempts: int
    price_version: str
    instance: str
    provisional_nusd: int = 0
    decode_weight: int = 0
    made_from: str = ""


class AdjustmentRow(msgspec.Struct, frozen=True, kw_only=True):
    """What the bill of an attempt changed by when an hour of its server was closed: its share less what it had paid.

    `share_nusd` is its share of the hour, `change_nusd` what is added to (or taken from) the bill by this row. What
    follows is of the exchange (`at_ms`, `key_name`, `team`, `route`) and of the attempt (`tier`; `shown`: it was the
    answer), so that reports need not look up either: a million look-ups take longer than the whole report may.
    """

    TABLE: ClassVar[str] = "adjustments"
    KEY: ClassVar[tuple[str, ...]] = ("exchange_id", "number", "hour", "revision")
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    exchange_id: str
    number: int
    hour: int
    revision: int
    backend: str
    share_nusd: int
    change_nusd: int
    at_ms: int
    key_name: str
    team: str | None
    route: str
    tier: str
    shown: int


class AlertRow(msgspec.Struct, frozen=True, kw_only=True):
    """Something somebody should hear of, and which process tells them: the `instance` of the highest `claim` of an id.

    The id says what happened, so whoever finds the same makes the same row, and the first one written counts. Claims
    after the first are those of processes that took it over from a dead one. `kind` is `budget.threshold`,
    `spend.anomaly` or `ledger.unwritable`, `payload` the JSON that is sent. `at_ms` is when it was found.
    """

    TABLE: ClassVar[str] = "alerts"
    KEY: ClassVar[tuple[str, ...]] = ("id", "claim")
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    id: str
    claim: int
    at_ms: int
    claimed_ms: int
    kind: str
    payload: str
    instance: str


class AlertEndingRow(msgspec.Struct, frozen=True, kw_only=True):
    """What became of an alert at one webhook (a digest of its address): `taken`, or `given_up` after a day."""

    TABLE: ClassVar[str] = "alert_endings"
    KEY: ClassVar[tuple[str, ...]] = ("id", "webhook")
    WHEN_THERE: ClassVar[WhenThere] = "ignore"

    id: str
    webhook: str
    at_ms: int
    ending: str


AnyRow = (
    ExchangeRow
    | AttemptRow
    | DeliveryRow
    | DecisionInputRow
    | OpenRow
    | RefusalRow
    | PriceRow
    | InstanceRow
    | MeterRow
    | ClosingRow
    | AdjustmentRow
    | AlertRow
    | AlertEndingRow
)


class Bill(msgspec.Struct, frozen=True, kw_only=True):
    """All that is written of one exchange at once, or not at all. `prices` are those it was rated by."""

    exchange: ExchangeRow
    attempts: tuple[AttemptRow, ...]
    prices: tuple[PriceRow, ...] = ()
    inputs: DecisionInputRow | None = None

    @property
    def cost_nusd(self) -> int:
        """What it comes to."""
        row = self.exchange
        return row.input_nusd + row.cached_input_nusd + row.output_nusd + row.gpu_nusd
