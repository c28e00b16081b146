"""Do the parts of a configuration fit together? A configuration and its positions in, errors and warnings out.

Runs also over a file with faults, whose broken places hold stand-ins: a stand-in is never complained about, and a name
is only called unknown where all names it could be have been read.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import PurePath

import msgspec

from gateway.config.model import AnyBackend, Config, LocalBackend
from gateway.config.problem import Problem, guess, quoted
from gateway.config.shape import Mark, Place, spelled

EMPTY_DIGEST = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
DEMO_DIGEST = "5564d756baca70129e8b5d2151b1217d60fff36e0e19c632489bf6481a4bc5ec"
"""SHA-256 of the key in this repository's `gateway.yaml`, which everybody can read."""
_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


def model_id(backend: AnyBackend, local_model_ids: Mapping[str, str]) -> str | None:
    """Return the model id that a backend answers to; None where only the catalogue of weights could say."""
    if not isinstance(backend, LocalBackend):
        return backend.model
    if backend.model is not None:
        return backend.model
    if backend.weights.endswith(".gguf"):
        return PurePath(backend.weights).stem
    return local_model_ids.get(backend.weights)


class _Use(msgspec.Struct, frozen=True):
    """One thing that a client's `model` can mean."""

    name: str
    what: str
    mark: Mark
    tier: str | None = None  # for a model id: the tier that serves it


class Check:
    """The checks over one file. `errors` and `warnings` fill up; read them once at the end."""

    def __init__(
        self,
        config: Config,
        file: str,
        marks: Mapping[Place, Mark],
        broken: set[Place],
        local_model_ids: Mapping[str, str],
    ) -> None:
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []
        self._config = config
        self._file = file
        self._marks = marks
        self._broken = broken
        self._local_model_ids = local_model_ids
        self._tier_names = [tier.name for tier in config.tiers]
        self._tiers()
        self._weights()
        self._routes()
        uses = list(self._uses())
        self._one_meaning(uses)
        self._keys({use.name for use in uses})
        self._exposure()

    def _tiers(self) -> None:
        config = self._config
        names_whole = ("backends",) not in self._broken
        first_tier: dict[str, Mark] = {}
        first_use: dict[str, tuple[int, Mark]] = {}
        for i, tier in enumerate(config.tiers):
            place: Place = ("tiers", i, "name")
            if tier.name in first_tier:
                self._error(place, f"a second tier {quoted(tier.name)}; the first is at {_spot(first_tier[tier.name])}")
            elif tier.name:
                first_tier[tier.name] = self._marks[place]
            for j, backend in enumerate(tier.backends):
                place = ("tiers", i, "backends", j)
                if not backend:
                    continue
                if backend not in config.backends and names_whole:
                    self._error(place, f"no backend {quoted(backend)}{guess(backend, config.backends)}")
                if backend not in first_use:
                    first_use[backend] = (i, self._marks[place])
                elif first_use[backend][0] == i:
                    self._error(place, f"{quoted(backend)} twice; the first is at {_spot(first_use[backend][1])}")
                else:
                    message = f"{quoted(backend)} is in another tier already, at {_spot(first_use[backend][1])}"
                    self._error(place, f"{message}; a backend has one price, so it has one tier")
            if i:
                self._price(i)
            if tier.price.cached_input is not None and tier.price.cached_input > tier.price.input:
                self._warn(
                    ("tiers", i, "price", "cached_input"), "dearer than `input`: a cache hit should not cost more"
                )
        for name in config.backends:
            if name not in first_use:
                self._warn(("backends", name), "in no tier, so it is never asked")

    def _price(self, i: int) -> None:
        below, price = self._config.tiers[i - 1].price, self._config.tiers[i].price
        for part in ("input", "output"):
            if getattr(price, part) < getattr(below, part):
                before = spelled(("tiers", i - 1, "price", part))
                self._warn(("tiers", i, "price", part), f"cheaper than {before}, but tiers stand cheapest first")

    def _weights(self) -> None:
        for name, backend in self._config.backends.items():
            place = ("backends", name, "weights")
            if not isinstance(backend, LocalBackend) or place not in self._marks or place in self._broken:
                continue
            known = self._local_model_ids
            if known and backend.weights not in known and not backend.weights.endswith(".gguf"):
                words = ", ".join(quoted(word) for word in known)
                hint = guess(backend.weights, known)
                self._error(place, f"neither one of {words} nor the path of a `.gguf` file{hint}")

    def _routes(self) -> None:
        if not self._config.routes:
            self._warn((), "no route: clients can ask for tiers and models by name, and no answer is ever escalated")
        names_whole = not any(place[0] == "tiers" and (len(place) < 3 or place[2] == "name") for place in self._broken)
        for name, route in self._config.routes.items():
            highest = -1
            seen: dict[str, Mark] = {}
            for i, step in enumerate(route.steps):
                place = ("routes", name, "steps", i, "tier")
                if not step.tier:
                    continue
                if step.tier in seen:
                    self._error(place, f"climbs {quoted(step.tier)} twice; the first is at {_spot(seen[step.tier])}")
                elif step.tier in self._tier_names:
                    seen[step.tier] = self._marks[place]
                    rank = self._tier_names.index(step.tier)
                    if rank < highest:
                        above = quoted(self._tier_names[highest])
                        message = f"{quoted(step.tier)} stands before {above} in `tiers`; a route climbs in that order"
                        self._error(place, message)
                    highest = max(highest, rank)
                elif names_whole:
                    self._error(place, f"no tier {quoted(step.tier)}{guess(step.tier, self._tier_names)}")
            # A step without `doubt_below` before the last is meant: what stands above it only takes over failures.
            if route.steps and route.steps[-1].doubt_below is not None:
                place = ("routes", name, "steps", len(route.steps) - 1, "doubt_below")
                self._warn(place, "no step follows, so nothing better can be asked; the answer is served as it is")

    def _uses(self) -> Iterator[_Use]:
        """Everything that a client's `model` can mean."""
        config = self._config
        for name, route in config.routes.items():
            yield _Use(name, "a route", self._at(("routes", name)))
            for i, alias in enumerate(route.aliases):
                yield _Use(alias, f"an alias of route {quoted(name)}", self._at(("routes", name, "aliases", i)))
        for i, tier in enumerate(config.tiers):
            if tier.name not in self._tier_names[:i]:  # a second one has its own message
                yield _Use(tier.name, "a tier", self._at(("tiers", i, "name")))
        for tier in config.tiers:
            for name in tier.backends:
                backend = config.backends.get(name)
                answers_to = model_id(backend, self._local_model_ids) if backend else None
                if answers_to:
                    place: Place = ("backends", name, "model")
                    mark = self._at(place if place in self._marks else ("backends", name))
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
                other = f"{first.what} at {_spot(first.mark)}"
                tiers = (
                    f", in tier {quoted(use.tier)} and in tier {quoted(first.tier)}" if use.tier and first.tier else ""
                )
                message = f"{quoted(name)} is {use.what} here and {other}{tiers}; a name has one meaning"
                self.errors.append(Problem(self._file, *use.mark, message))

    def _keys(self, known: set[str]) -> None:
        # A model id is unknown also where the catalogue of weights, which was not given, would say it.
        known_whole = all(
            model_id(backend, self._local_model_ids) for backend in self._config.backends.values()
        ) and not any(place[0] in {"backends", "tiers", "routes"} for place in self._broken)
        names: dict[str, Mark] = {}
        digests: dict[str, Mark] = {}
        for i, key in enumerate(self._config.keys):
            place: Place = ("keys", i, "name")
            if key.name in names:
                self._error(place, f"a second key {quoted(key.name)}; the first is at {_spot(names[key.name])}")
            elif key.name:
                names[key.name] = self._marks[place]
            place = ("keys", i, "sha256")
            if key.sha256 in digests:
                self._error(place, f"the digest of another key too, at {_spot(digests[key.sha256])}")
            elif key.sha256:
                digests[key.sha256] = self._marks[place]
            if key.sha256 == EMPTY_DIGEST:
                self._error(place, "the digest of no text at all; `tierway keygen` makes a key and its digest")
            elif key.sha256 and not key.sha256.strip("0"):
                self._error(place, "all zeros, which no key has; `tierway keygen` makes a key and its digest")
            for j, model in enumerate(key.models or ()):
                if model and model not in known and known_whole:
                    self._error(
                        ("keys", i, "models", j), f"no route, tier or model {quoted(model)}{guess(model, known)}"
                    )

    def _exposure(self) -> None:
        if self._config.server.host in _LOOPBACK:
            return
        for i, key in enumerate(self._config.keys):
            if key.sha256 == DEMO_DIGEST:
                host = quoted(self._config.server.host)
                self._warn(
                    ("keys", i, "sha256"), f"the published demo key, while the server listens on {host}; make your own"
                )

    def _at(self, place: Place) -> Mark:
        while place not in self._marks:
            place = place[:-1]
        return self._marks[place]

    def _error(self, place: Place, message: str) -> None:
        self.errors.append(self._problem(place, message))

    def _warn(self, place: Place, message: str) -> None:
        self.warnings.append(self._problem(place, message))

    def _problem(self, place: Place, message: str) -> Problem:
        where = spelled(place)
        return Problem(self._file, *self._at(place), f"{where}: {message}" if where else message)


def _spot(mark: Mark) -> str:
    return f"{mark[0]}:{mark[1]}"
