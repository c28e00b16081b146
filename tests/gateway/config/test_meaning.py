"""Is everything told that does not fit together, with both places where there are two?"""

from __future__ import annotations

from pathlib import Path
from types import MappingProxyType

import pytest

from gateway.config.load import ConfigError, model_id, parse
from gateway.config.model import LocalBackend, ScriptedBackend

ROOT = Path(__file__).parents[3]
IDS = MappingProxyType(
    {
        "small": "smollm2-135m-instruct",
        "medium": "qwen2.5-coder-0.5b-instruct",
        "large": "qwen2.5-coder-1.5b-instruct",
    }
)
DIGEST = "ab" * 32

GOOD = (Path(__file__).parent / "good.yaml").read_text()


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse(text, "g.yaml", local_model_ids=IDS)
    return [str(problem) for problem in caught.value.problems]


def edited(*edits: tuple[str, str]) -> str:
    text = GOOD
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def warnings_of(text: str) -> list[str]:
    return [str(warning) for warning in parse(text, "g.yaml", local_model_ids=IDS).warnings]


RESERVED = "`each` is a word of `limits`, where it stands for every one apart"

MEANING_CASES = {
    "tier to backend": (("[one]", "[oen]"), "7:16: tiers[0].backends[0]: no backend `oen`; did you mean `one`?"),
    "step to tier": (
        ("{tier: large}", "{tier: lrge}"),
        "15:53: routes.auto.steps[1].tier: no tier `lrge`; did you mean `large`?",
    ),
    "key to model": (
        ("[auto, m-two]", "[atuo]"),
        "19:14: keys[0].models[0]: no route, tier or model `atuo`; did you mean `auto`?",
    ),
    "tier twice": (("name: large", "name: small"), "9:11: tiers[1].name: a second tier `small`; the first is at 6:11"),
    "backend twice in a tier": (
        ("[one]", "[one, one]"),
        "7:21: tiers[0].backends[1]: `one` twice; the first is at 7:16",
    ),
    "backend in two tiers": (
        ("[two]", "[two, one]"),
        (
            "10:21: tiers[1].backends[1]: `one` is in another tier already, at 7:16; a backend has one price, so it has "
            "one tier"
        ),
    ),
    "climbs twice": (
        ("{tier: large}", "{tier: small}"),
        "15:53: routes.auto.steps[1].tier: climbs `small` twice; the first is at 15:20",
    ),
    "climbs down": (
        ("[{tier: small, doubt_below: 0.8}, {tier: large}]", "[{tier: large}, {tier: small}]"),
        "15:35: routes.auto.steps[1].tier: `small` stands before `large` in `tiers`; a route climbs in that order",
    ),
    "alias is a tier": (
        ("[gpt-4o]", "[small]"),
        "14:15: `small` is an alias of route `auto` here and a tier at 6:11; a name has one meaning",
    ),
    "route is a model": (
        ("  auto:", "  m-one:"),
        "13:3: `m-one` is a route here and the model id of backend `one` at 3:32; a name has one meaning",
    ),
    "tier is a model": (
        ("name: large", "name: m-two"),
        "9:11: `m-two` is a tier here and the model id of backend `two` at 4:47; a name has one meaning",
    ),
    "alias of itself": (
        ("[gpt-4o]", "[auto]"),
        "14:15: `auto` is an alias of route `auto` here and a route at 13:3; a name has one meaning",
    ),
    "one model in two tiers": (
        ("m-two", "m-one"),
        (
            "4:47: `m-one` is the model id of backend `two` here and the model id of backend `one` at 3:32, in tier "
            "`large` and in tier `small`; a name has one meaning"
        ),
    ),
    "unknown weights": (
        ("{kind: scripted, model: m-one, tokens: [a]}", "{kind: local, weights: smal}"),
        (
            "3:31: backends.one.weights: neither one of `small`, `medium`, `large` nor the path of a `.gguf` file; "
            "did you mean `small`?"
        ),
    ),
    "key twice": (
        ("  - name: k\n", f"  - {{name: k, sha256: {'cd' * 32}}}\n  - name: k\n"),
        "18:11: keys[1].name: a second key `k`; the first is at 17:12",
    ),
    "digest twice": (
        ("  - name: k\n", f"  - {{name: j, sha256: {DIGEST}}}\n  - name: k\n"),
        "19:13: keys[1].sha256: the digest of another key too, at 17:23",
    ),
    "digest of zeros": (
        (DIGEST, f'"{"0" * 64}"'),
        "18:13: keys[0].sha256: all zeros, which no key has; `tierway keygen` makes a key and its digest",
    ),
    "each for a key": (("name: k", "name: each"), f"17:11: keys[0].name: {RESERVED}"),
    "each for a team": (("name: k\n", "name: k\n    team: each\n"), f"18:11: keys[0].team: {RESERVED}"),
    "each for a user": (("name: k\n", "name: k\n    user: each\n"), f"18:11: keys[0].user: {RESERVED}"),
    "each for a declared team": (("routes:", "teams: [each]\nroutes:"), f"12:9: teams[0]: {RESERVED}"),
    "each for a route": (("  auto:", "  each:"), f"13:3: {RESERVED}, so it cannot be the name of a route"),
    "each for an alias": (
        ("[gpt-4o]", "[each]"),
        f"14:15: {RESERVED}, so it cannot be the name of an alias of route `auto`",
    ),
    "each for a tier": (("name: large", "name: each"), f"9:11: {RESERVED}, so it cannot be the name of a tier"),
    "each for a model": (
        ("m-two", "each"),
        f"4:47: {RESERVED}, so it cannot be the name of the model id of backend `two`",
    ),
    "team twice": (("routes:", "teams: [a, b, a]\nroutes:"), "12:15: teams[2]: `a` twice; the first is at 12:9"),
    "answer longer than the window": (
        ("name: large\n", "name: large\n    context_tokens: 10\n    max_output_tokens: 11\n"),
        "11:24: tiers[1].max_output_tokens: more than `context_tokens`, 10, into which it has to fit",
    ),
    "a day that is none": (
        ("name: k\n", "name: k\n    expires: 2027-02-30T00:00:00Z\n"),
        "18:14: keys[0].expires: `2027-02-30T00:00:00Z` is no day or time of the calendar",
    ),
    "a zone that is none": (
        ("name: k\n", "name: k\n    expires: 2027-01-31T00:00:00+99:00\n"),
        "18:14: keys[0].expires: `2027-01-31T00:00:00+99:00` is no day or time of the calendar",
    ),
    "the end of a key without a time": (
        ("name: k\n", "name: k\n    expires: 2027-01-31\n"),
        "18:14: keys[0].expires: expected a time with its zone, such as `2027-01-31T00:00:00Z`",
    ),
    "long metadata": (
        ("name: k\n", f"name: k\n    metadata: {{a: b, c: {'d' * 257}}}\n"),
        "18:25: keys[0].metadata.c: expected at most 256 characters, found 257",
    ),
    "metadata that YAML takes for a number": (
        ("name: k\n", "name: k\n    metadata: {cost_centre: 4711}\n"),
        "18:29: keys[0].metadata.cost_centre: expected text, found what YAML reads as a number; put it in quotes",
    ),
    "much metadata": (
        ("name: k\n", f"name: k\n    metadata: {{{', '.join(f'k{n}: v' for n in range(33))}}}\n"),
        "18:15: keys[0].metadata: expected a mapping of names, at most 32, found 33",
    ),
    "a header that is a secret": (
        ("port: 0", "user_header: Authorization"),
        "1:23: server.user_header: `Authorization` has a meaning of its own; use another, such as `x-user-id`",
    ),
    "a header that is none": (
        ("port: 0", "user_header: x user"),
        "1:23: server.user_header: expected the name of a header, such as `x-user-id`",
    ),
    "one port for two": (
        ("{port: 0}", "{port: 80, admin: {port: 80, key: {from: env, name: K}}}"),
        "1:34: server.admin.port: the port of `server` itself; the admin API has one of its own",
    ),
    "one port for two on every address": (
        ("{port: 0}", "{host: 0.0.0.0, port: 80, admin: {port: 80, key: {from: env, name: K}}}"),
        "1:49: server.admin.port: the port of `server` itself; the admin API has one of its own",
    ),
    "digest of nothing": (
        (DIGEST, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        "18:13: keys[0].sha256: the digest of no text at all; `tierway keygen` makes a key and its digest",
    ),
}


@pytest.mark.parametrize("case", MEANING_CASES)
def test_parts_that_do_not_fit_are_told_with_their_place(case: str) -> None:
    edit, message = MEANING_CASES[case]
    assert f"g.yaml:{message}" in problems_of(edited(edit))


WARNING_CASES = {
    "idle backend": (
        ("tiers:", "  idle: {kind: scripted, model: x, tokens: [a]}\ntiers:"),
        "5:3: backends.idle: in no tier, so it is never asked",
    ),
    "doubt at the top": (
        ("{tier: large}", "{tier: large, doubt_below: 0.5}"),
        (
            "15:73: routes.auto.steps[1].doubt_below: no step follows, so nothing better can be asked; the answer is "
            "served as it is"
        ),
    ),
    "cheaper above": (
        ("output: 1}", "output: 0.03}"),
        "11:37: tiers[1].price.output: cheaper than tiers[0].price.output, but tiers stand cheapest first",
    ),
    "key that has ended": (
        ("name: k\n", "name: k\n    expires: 2020-01-01T00:00:00+02:00\n"),
        "18:14: keys[0].expires: in the past: the key is refused",
    ),
    "admin API for everybody": (
        ("{port: 0}", "{port: 0, admin: {host: 0.0.0.0, key: {from: env, name: K}}}"),
        ("1:33: server.admin.host: its key travels unencrypted; keep it on 127.0.0.1 or in a network of your own"),
    ),
    "dear cache": (
        ("input: 0.02", "input: 0.02, cached_input: 0.03"),
        "8:40: tiers[0].price.cached_input: dearer than `input`: a cache hit should not cost more",
    ),
}


@pytest.mark.parametrize("case", WARNING_CASES)
def test_what_is_odd_but_works_is_a_warning(case: str) -> None:
    edit, message = WARNING_CASES[case]
    assert warnings_of(edited(edit)) == [f"g.yaml:{message}"]


LOCAL = ("{kind: scripted, model: m-one, tokens: [a]}", "{kind: local, weights: small}")


@pytest.mark.parametrize("key", ["context_tokens", "max_output_tokens"])
def test_a_local_model_has_the_window_of_its_server(key: str) -> None:
    message = f"tiers[0].{key}: more than the context window of backend `one`, 4096"
    tokens = ("name: small\n", f"name: small\n    {key}: 4097\n")
    assert any(problem.endswith(message) for problem in problems_of(edited(LOCAL, tokens)))
    assert warnings_of(edited(LOCAL, (tokens[0], tokens[1].replace("4097", "4096")))) == []


def test_without_keys_there_is_an_admin_api() -> None:
    text = GOOD[: GOOD.index("keys:")]
    assert problems_of(text) == ["g.yaml:1:1: keys: no keys and no `server.admin` to make some, so nobody could ask"]
    assert problems_of(text + "keys: []\n") == [
        "g.yaml:16:7: keys: no keys and no `server.admin` to make some, so nobody could ask"
    ]
    assert warnings_of(text.replace("{port: 0}", "{port: 0, admin: {key: {from: env, name: K}}}")) == []
    for misspelt in (text + "kyes: []\n", text.replace("{port: 0}", "{admn: {key: {from: env, name: K}}}")):
        (problem,) = problems_of(misspelt)
        assert "unknown key" in problem


def test_two_ports_of_the_systems_choice_are_two() -> None:
    assert warnings_of(edited(("{port: 0}", "{port: 0, admin: {port: 0, key: {from: env, name: K}}}"))) == []


def test_a_file_without_routes_is_told_that_nothing_escalates() -> None:
    text = GOOD[: GOOD.index("routes:")] + GOOD[GOOD.index("keys:") :].replace("auto, ", "")
    assert warnings_of(text) == [
        "g.yaml:1:1: no route: clients can ask for tiers and models by name, and no answer is ever escalated"
    ]


def test_the_published_key_on_a_public_address_is_told() -> None:
    text = (ROOT / "gateway.yaml").read_text().replace("host: 127.0.0.1", "host: 0.0.0.0")
    (warning,) = parse(text, local_model_ids=IDS).warnings
    assert "the published demo key" in warning.message


def test_a_step_below_the_last_need_not_doubt() -> None:
    assert warnings_of(edited((", doubt_below: 0.8", ""))) == []


def test_a_model_id_is_given_or_that_of_the_weights() -> None:
    assert model_id(LocalBackend(weights="small"), IDS) == "smollm2-135m-instruct"
    assert model_id(LocalBackend(weights="small"), {}) is None
    assert model_id(LocalBackend(weights="models/Tiny-Q4.gguf"), {}) == "Tiny-Q4"
    assert model_id(LocalBackend(weights="small", model="mine"), IDS) == "mine"
    assert model_id(ScriptedBackend(model="m", tokens=("a",)), {}) == "m"


def test_the_same_model_on_two_servers_of_one_tier_is_one_name() -> None:
    text = edited(
        ("tiers:", '  three: {kind: vllm, url: "http://h:2", model: m-two}\ntiers:'), ("[two]", "[two, three]")
    )
    assert warnings_of(text) == []


def test_a_broken_noun_makes_no_references_dangle() -> None:
    text = edited(("name: small", "name: [small]"))
    assert problems_of(text) == [
        (
            "g.yaml:6:11: tiers[0].name: expected a name (at most 128 letters, digits and `._:/@-`, a letter or digit "
            "first), found a list"
        )
    ]
    assert problems_of(GOOD[: GOOD.index("tiers:")] + GOOD[GOOD.index("routes:") :]) == [
        "g.yaml:1:1: missing key `tiers`"
    ]
