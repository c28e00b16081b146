"""Do the parts of a configuration fit together? A configuration and its positions in, errors and warnings out.

Runs also over a file with faults, whose broken places hold stand-ins: a stand-in is never complained about, and a name
is only called unknown where all names it could be have been read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import PurePath

import msgspec

from gateway.config.findings import Findings, spot
from gateway.config.limits_meaning import LimitsCheck, Names
from gateway.config.model import AnyBackend, Config, Key, LocalBackend, Tier
from gateway.config.prices_meaning import PricesCheck
from gateway.config.problem import guess, quoted
from gateway.config.shape import Mark, Place
from gateway.config.state_meaning import check_state
from policies.limits import EACH

EMPTY_DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
DEMO_DIGEST = "5564d756baca70129e8b5d2151b1217d60fff36e0e19c632489bf6481a4bc5ec"
"""SHA-256 of the key in this repository's `gateway.yaml`, which everybody can read."""
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})
_EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})  # noqa: S104  (compared with, not bound)
_TAKEN_HEADERS = frozenset(
    {
        *("accept", "accept-encoding", "authorization", "connection", "content-encoding", "content-length"),
        *("content-type", "cookie", "host", "origin", "te", "traceparent", "tracestate", "transfer-encoding"),
        *("upgrade", "user-agent", "x-api-key", "x-request-id"),
    }
)
"""Headers that mean something else, some of them secret: none of them says who the user is."""


def model_id(backend: AnyBackend, local_model_ids: Mapping[str, str]) -> str | None:
    """Return the model id that a backend answers to; None where only the catalogue of weights could say."""
    if not isinstance(backend, LocalBackend):
        return backend.model
    if backend.model is not None:
        return backend.model
    if backend.weights.endswith(".gguf"):
        return PurePath(backend.weights).stem
    return local_model_ids.get(backend.weights)


_RESERVED = f"{quoted(EACH)} is a word of `limits`, where it stands for every one apart"


class _Use(msgspec.Struct, frozen=True):
    """One thing that a client's `model` can mean."""

    name: str
    what: str
    mark: Mark
    tier: str | None = None  # for a model id: the tier that serves it


class Check:
    """The checks over one file: what they find goes to `findings`."""

    def __init__(self, config: Config, findings: Findings, local_model_ids: Mapping[str, str]) -> None:
        self._config = config
        self._found = findings
        self._local_model_ids = local_model_ids
        self._tier_names = [tier.name for tier in config.tiers]
        self._tiers()
        self._weights()
        self._routes()
        uses = list(self._uses())
        self._one_meaning(uses)
        names = self._names(uses)
        self._keys(names)
        self._teams()
        self._server()
        PricesCheck(config, findings)
        LimitsCheck(config, findings, names)
        check_state(config, findings)

    def _tiers(self) -> None:
        config = self._config
        names_whole = ("backends",) not in self._found.broken
        first_tier: dict[str, Mark] = {}
        first_use: dict[str, tuple[int, Mark]] = {}
        for i, tier in enumerate(config.tiers):
            place: Place = ("tiers", i, "name")
            if tier.name in first_tier:
                self._found.error(
                    place, f"a second tier {quoted(tier.name)}; the first is at {spot(first_tier[tier.name])}"
                )
            elif tier.name:
                first_tier[tier.name] = self._found.marks[place]
            for j, backend in enumerate(tier.backends):
                place = ("tiers", i, "backends", j)
                if not backend:
                    continue
                if backend not in config.backends and names_whole:
                    self._found.error(place, f"no backend {quoted(backend)}{guess(backend, config.backends)}")
                if backend not in first_use:
                    first_use[backend] = (i, self._found.marks[place])
                elif first_use[backend][0] == i:
                    self._found.error(place, f"{quoted(backend)} twice; the first is at {spot(first_use[backend][1])}")
                else:
                    message = f"{quoted(backend)} is in another tier already, at {spot(first_use[backend][1])}"
                    self._found.error(place, f"{message}; a backend has one price, so it has one tier")
            self._lengths(i, tier)
        for name in config.backends:
            if name not in first_use:
                self._found.warn(("backends", name), "in no tier, so it is never asked")

    def _lengths(self, i: int, tier: Tier) -> None:
        """Say which of a tier's numbers of tokens cannot both be true."""
        answer, window = tier.max_output_tokens, tier.context_tokens
        if answer and window and answer > window:
            self._found.error(
                ("tiers", i, "max_output_tokens"), f"more than `context_tokens`, {window}, into which it has to fit"
            )
        for name in tier.backends:
            backend = self._config.backends.get(name)
            if not isinstance(backend, LocalBackend) or not backend.context_tokens:
                continue
            for key, tokens in (("context_tokens", window), ("max_output_tokens", answer)):
                if tokens and tokens > backend.context_tokens:
                    have = f"the context window of backend {quoted(name)}, {backend.context_tokens}"
                    self._found.error(("tiers", i, key), f"more than {have}")

    def _weights(self) -> None:
        for name, backend in self._config.backends.items():
            place = ("backends", name, "weights")
            if not isinstance(backend, LocalBackend) or not self._found.whole(place):
                continue
            known = self._local_model_ids
            if known and backend.weights not in known and not backend.weights.endswith(".gguf"):
                words = ", ".join(quoted(word) for word in known)
                hint = guess(backend.weights, known)
                self._found.error(place, f"neither one of {words} nor the path of a `.gguf` file{hint}")

    def _routes(self) -> None:
        if not self._config.routes:
            self._found.warn(
                (), "no route: clients can ask for tiers and models by name, and no answer is ever escalated"
            )
        names_whole = self._found.all_named("tiers", "name")
        for name, route in self._config.routes.items():
            highest = -1
            seen: dict[str, Mark] = {}
            for i, step in enumerate(route.steps):
                place = ("routes", name, "steps", i, "tier")
                if not step.tier:
                    continue
                if step.tier in seen:
                    self._found.error(
                        place, f"climbs {quoted(step.tier)} twice; the first is at {spot(seen[step.tier])}"
                    )
                elif step.tier in self._tier_names:
                    seen[step.tier] = self._found.marks[place]
                    rank = self._tier_names.index(step.tier)
                    if rank < highest:
                        above = quoted(self._tier_names[highest])
                        message = f"{quoted(step.tier)} stands before {above} in `tiers`; a route climbs in that order"
                        self._found.error(place, message)
                    highest = max(highest, rank)
                elif names_whole:
                    self._found.error(place, f"no tier {quoted(step.tier)}{guess(step.tier, self._tier_names)}")
            # A step without `doubt_below` before the last is meant: what stands above it only takes over failures.
            if route.steps and route.steps[-1].doubt_below is not None:
                place = ("routes", name, "steps", len(route.steps) - 1, "doubt_below")
                self._found.warn(
                    place, "no step follows, so nothing better can be asked; the answer is served as it is"
                )

    def _uses(self) -> Iterator[_Use]:
        """Everything that a client's `model` can mean."""
        config = self._config
        for name, route in config.routes.items():
            yield _Use(name, "a route", self._found.at(("routes", name)))
            for i, alias in enumerate(route.aliases):
                yield _Use(alias, f"an alias of route {quoted(name)}", self._found.at(("routes", name, "aliases", i)))
        for i, tier in enumerate(config.tiers):
            if tier.name not in self._tier_names[:i]:  # a second one has its own message
                yield _Use(tier.name, "a tier", self._found.at(("tiers", i, "name")))
        for tier in config.tiers:
            for name in tier.backends:
                backend = config.backends.get(name)
                answers_to = model_id(backend, self._local_model_ids) if backend else None
                if answers_to:
                    place: Place = ("backends", name, "model")
                    mark = self._found.at(place if place in self._found.marks else ("backends", name))
                    yield _Use(answers_to, f"the model id of backend {quoted(name)}", mark, tier.name)

    def _one_meaning(self, uses: Iterable[_Use]) -> None:
        by_name: dict[str, list[_Use]] = {}
        for use in sorted(uses, key=lambda use: use.mark):
            by_name.setdefault(use.name, []).append(use)
        for name, same in by_name.items():
            first = same[0]
            for use in same[1:]:
                # Servers of one model in one tier are interchangeable; a backend in two tiers has its own message.
                same_backend = (use.what, use.mark) == (first.what, first.mark)
                if not name or same_backend or (use.tier is not None and use.tier == first.tier):
                    continue
                other = f"{first.what} at {spot(first.mark)}"
                tiers = (
                    f", in tier {quoted(use.tier)} and in tier {quoted(first.tier)}" if use.tier and first.tier else ""
                )
                message = f"{quoted(name)} is {use.what} here and {other}{tiers}; a name has one meaning"
                self._found.error_at(use.mark, message)

    def _names(self, uses: Iterable[_Use]) -> Names:
        """Return what a client's `model` can mean, and the tiers that each of the names leads to."""
        config = self._config
        for use in uses:
            if use.name == EACH:
                self._found.error_at(use.mark, f"{_RESERVED}, so it cannot be the name of {use.what}")
        reach: dict[str, tuple[str, ...]] = {}
        aliases: dict[str, str] = {}
        for name, route in config.routes.items():
            for one in (name, *route.aliases):
                reach[one] = tuple(step.tier for step in route.steps)
            aliases |= dict.fromkeys(route.aliases, name)
        for use in uses:
            reach.setdefault(use.name, (use.tier or use.name,))
        # A model id is unknown also where the catalogue of weights, which was not given, would say it.
        whole = all(
            model_id(backend, self._local_model_ids) for backend in config.backends.values()
        ) and self._found.all_read("backends", "tiers", "routes")
        return Names(reach=reach, aliases=aliases, whole=whole)

    def _keys(self, asked: Names) -> None:
        if not self._config.keys and self._config.server.admin is None and self._found.all_read("keys", "server"):
            self._found.error(("keys",), "no keys and no `server.admin` to make some, so nobody could ask")
        names: dict[str, Mark] = {}
        digests: dict[str, Mark] = {}
        for i, key in enumerate(self._config.keys):
            place: Place = ("keys", i, "name")
            if key.name in names:
                self._found.error(place, f"a second key {quoted(key.name)}; the first is at {spot(names[key.name])}")
            elif key.name:
                names[key.name] = self._found.marks[place]
            for word in ("name", "team", "user"):
                if getattr(key, word) == EACH:
                    self._found.error(("keys", i, word), _RESERVED)
            place = ("keys", i, "sha256")
            if key.sha256 in digests:
                self._found.error(place, f"the digest of another key too, at {spot(digests[key.sha256])}")
            elif key.sha256:
                digests[key.sha256] = self._found.marks[place]
            if key.sha256 == EMPTY_DIGEST:
                self._found.error(place, "the digest of no text at all; `tierway keygen` makes a key and its digest")
            elif key.sha256 and not key.sha256.strip("0"):
                self._found.error(place, "all zeros, which no key has; `tierway keygen` makes a key and its digest")
            for j, model in enumerate(key.models or ()):
                if model and model not in asked.reach and asked.whole:
                    hint = guess(model, asked.reach)
                    self._found.error(("keys", i, "models", j), f"no route, tier or model {quoted(model)}{hint}")
            self._expiry(i, key)

    def _teams(self) -> None:
        first: dict[str, Mark] = {}
        for i, team in enumerate(self._config.teams):
            place = ("teams", i)
            if team == EACH:
                self._found.error(place, _RESERVED)
            if team in first:
                self._found.error(place, f"{quoted(team)} twice; the first is at {spot(first[team])}")
            elif team:
                first[team] = self._found.marks[place]

    def _expiry(self, i: int, key: Key) -> None:
        if not key.expires:
            return
        place = ("keys", i, "expires")
        try:
            # The zone can carry a time past the last year there is.
            ends = datetime.fromisoformat(key.expires).astimezone(UTC)
        except (ValueError, OverflowError):
            self._found.error(place, f"{quoted(key.expires)} is no day or time of the calendar")
            return
        if ends <= datetime.now(UTC):
            self._found.warn(place, "in the past: the key is refused")

    def _server(self) -> None:
        server = self._config.server
        if server.user_header is not None and server.user_header.lower() in _TAKEN_HEADERS:
            what = quoted(server.user_header)
            self._found.error(
                ("server", "user_header"), f"{what} has a meaning of its own; use another, such as `x-user-id`"
            )
        admin = server.admin
        if admin is not None:
            shared = admin.host == server.host or {admin.host, server.host} & _EVERY_ADDRESS
            if shared and admin.port and admin.port == server.port:
                self._found.error(
                    ("server", "admin", "port"), "the port of `server` itself; the admin API has one of its own"
                )
            if admin.host and admin.host not in _LOOPBACK:
                message = "its key travels unencrypted; keep it on 127.0.0.1 or in a network of your own"
                self._found.warn(("server", "admin", "host"), message)
        if server.host not in _LOOPBACK:
            self._exposure()

    def _exposure(self) -> None:
        for i, key in enumerate(self._config.keys):
            if key.sha256 == DEMO_DIGEST:
                host = quoted(self._config.server.host)
                self._found.warn(
                    ("keys", i, "sha256"), f"the published demo key, while the server listens on {host}; make your own"
                )
