"""Does a good file load, and does a bad one say everything that is wrong with it, and where?"""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.config.load import ConfigError, Problem, load, parse
from gateway.config.model import Config

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


def test_a_good_file_has_its_values_in_units_and_no_warnings() -> None:
    loaded = parse(GOOD)
    assert loaded.warnings == ()
    small, large = loaded.config.tiers
    assert (small.price.input, small.price.output) == (20_000_000, 40_000_000)
    assert (large.price.input, large.price.output) == (100_000_000, 1_000_000_000)
    assert loaded.config.routes["auto"].steps[0].doubt_below == 0.8
    assert loaded.config.server.port == 0
    assert loaded.marks["tiers", 1, "name"] == (9, 11)
    assert loaded.marks["backends", "two"] == (4, 3)


@pytest.mark.parametrize("file", ["gateway.yaml", "gateway.full.yaml"])
def test_the_files_of_the_repository_load_without_warnings(file: str) -> None:
    loaded = load(ROOT / file, local_model_ids=IDS)
    assert loaded.warnings == ()
    (key,) = loaded.config.keys
    assert key.admin
    assert key.sha256 == sha256(b"tw-demo-local-only-key").hexdigest()


def test_the_limits_of_the_example_need_their_marks_taken_off_only() -> None:
    text = (ROOT / "gateway.yaml").read_text()
    block = text[text.index("# limits:\n") :].split("\n\n")[0]
    taken_off = "".join(line.removeprefix("# ") for line in block.splitlines(keepends=True))
    loaded = parse(text.replace(block, taken_off), local_model_ids=IDS)
    assert loaded.warnings == ()
    assert [limit.name for limit in loaded.config.limits] == ["per-key", "budget"]


def test_what_loads_is_what_the_types_accept() -> None:
    config = load(ROOT / "gateway.full.yaml").config
    assert msgspec.convert(msgspec.to_builtins(config), Config) == config


def test_the_digest_is_of_the_content_alone() -> None:
    digest = parse(GOOD).digest
    assert len(digest) == 12
    assert parse("# a comment\n\n" + GOOD.replace("0.02", "$0.020"), "other.yaml").digest == digest
    assert parse(edited(("0.02", "0.03"))).digest != digest


SHAPE_CASES = {
    "unknown key": (("port: 0", "prot: 0"), "1:10: server: unknown key `prot`; did you mean `port`?"),
    "unknown noun": (("server:", "sever:"), "1:1: unknown key `sever`; did you mean `server`?"),
    "nothing near": (
        ("port: 0", "zzz: 0"),
        (
            "1:10: server: unknown key `zzz`; known here: `host`, `port`, `max_body`, `shutdown_grace`, `kept_decisions`, "
            "`workers`, `user_header`, `admin`, `cors_origins`"
        ),
    ),
    "duplicate key": (("port: 0", "port: 0, port: 1"), "1:19: server: duplicate key `port`; the first is at 1:10"),
    "missing key": (("    price: {input: 0.02, output: $0.04}\n", ""), "6:5: tiers[0]: missing key `price`"),
    "text for a number": (
        ("port: 0", 'port: "0"'),
        "1:16: server.port: expected a whole number, found text; take off the quotes",
    ),
    "list for a number": (("port: 0", "port: [0]"), "1:16: server.port: expected a whole number, found a list"),
    "fraction": (("port: 0", "port: 1.5"), "1:16: server.port: expected a whole number, found `1.5`"),
    "too large": (("port: 0", "port: 65536"), "1:16: server.port: must be at most 65535, found `65536`"),
    "too small": (("port: 0", "port: -1"), "1:16: server.port: must be at least 0, found `-1`"),
    "octal": (
        ("port: 0", "port: 0100"),
        "1:16: server.port: expected a whole number, found `0100`, which YAML reads as octal 64; write `100` or `64`",
    ),
    "base 60": (("port: 0", "port: 1:30"), "1:16: server.port: expected a whole number, found `1:30`"),
    "host of base 60": (
        ("port: 0", "host: 1:30"),
        "1:16: server.host: expected text, found what YAML reads as a number; put it in quotes",
    ),
    "size over the limit": (
        ("port: 0", "max_body: 65MiB"),
        "1:20: server.max_body: must be at most `64MiB`, found `65MiB`",
    ),
    "bare size": (
        ("port: 0", "max_body: 1048576"),
        "1:20: server.max_body: expected a size with its unit, found the bare number `1048576`; write `1MiB`",
    ),
    "bare duration": (
        ("port: 0", "shutdown_grace: 30"),
        "1:26: server.shutdown_grace: expected a duration with its unit, found the bare number `30`; write `30s`",
    ),
    "no duration": (
        ("port: 0", "shutdown_grace: 0s"),
        "1:26: server.shutdown_grace: must be more than 0, found `0s`",
    ),
    "endless duration": (
        ("port: 0", "shutdown_grace: .inf"),
        "1:26: server.shutdown_grace: expected a duration such as `500ms`, `2s`, `10m`, `1h` or `30d`, found `.inf`",
    ),
    "empty value": (("port: 0", "port: "), "1:16: server.port: expected a whole number, found nothing"),
    "no permission by accident": (
        ("models: [auto, m-two]", "models:"),
        "19:12: keys[0].models: expected a list, found nothing; leave the key out to get the default",
    ),
    "yes": (
        ("    models: [auto, m-two]", "    admin: yes"),
        "19:12: keys[0].admin: expected `true` or `false`, found `yes`; write `true`",
    ),
    "a name that YAML takes for a truth": (
        ("name: large", "name: on"),
        (
            "9:11: tiers[1].name: expected a name (at most 128 letters, digits and `._:/@-`, a letter or digit first), "
            'found a word that YAML reads as true or false; write `"on"`'
        ),
    ),
    "a key that YAML takes for a truth": (
        ("  auto:", "  no:"),
        (
            "13:3: routes: expected a name (at most 128 letters, digits and `._:/@-`, a letter or digit first), "
            'found a word that YAML reads as true or false; write `"no"`'
        ),
    ),
    "no name": (
        ("name: large", "name: la rge"),
        "9:11: tiers[1].name: expected a name (at most 128 letters, digits and `._:/@-`, a letter or digit first)",
    ),
    "unknown kind": (
        ("kind: vllm", "kind: vlm"),
        "4:15: backends.two.kind: expected one of `local`, `scripted`, `vllm`, found `vlm`; did you mean `vllm`?",
    ),
    "missing kind": (("kind: vllm, ", ""), "4:8: backends.two: missing key `kind`: one of `local`, `scripted`, `vllm`"),
    "unknown way to a secret": (
        ("model: m-two", "model: m-two, api_key: {from: environ, name: X}"),
        "4:70: backends.two.api_key.from: expected one of `env`, `file`, found text; did you mean `env`?",
    ),
    "none of the words": (
        ("    aliases:", "    keep_doubted: nevr\n    aliases:"),
        (
            "14:19: routes.auto.keep_doubted: expected one of `never`, `until_first_token`, found `nevr`; "
            "did you mean `never`?"
        ),
    ),
    "no share": (
        ("doubt_below: 0.8", "doubt_below: 80"),
        "15:40: routes.auto.steps[0].doubt_below: must be at most 1, found `80`",
    ),
    "not a number": (
        ("doubt_below: 0.8", "doubt_below: .nan"),
        "15:40: routes.auto.steps[0].doubt_below: expected a number, found `.nan`",
    ),
    "ten decimal places": (
        ("input: 0.02", "input: 0.0123456789"),
        "8:20: tiers[0].price.input: expected dollars with at most 9 decimal places, found `0.0123456789`",
    ),
    "negative price": (("input: 0.02", "input: -1"), "8:20: tiers[0].price.input: a price must not be negative"),
    "euros": (
        ("input: 0.02", "input: 1 EUR"),
        (
            "8:20: tiers[0].price.input: expected dollars per million tokens, such as `0.05`, `$0.05` or `0.05 USD`, "
            "found `1 EUR`"
        ),
    ),
    "empty list": (
        ("backends: [one]", "backends: []"),
        "7:15: tiers[0].backends: expected a list, at least 1, found none",
    ),
    "merge key": (("port: 0", "<<: {port: 0}"), "1:10: server: merge keys (`<<`) are not read; write the keys out"),
    "key that is a list": (("port: 0", "[a]: 0"), "1:10: server: expected a key, found a list"),
    "unknown tag": (("m-one", "!x m-one"), "3:32: backends.one.model: expected text, found the unknown YAML tag `!x`"),
    "url with a password": (
        ("http://h:1", "http://u:p@h:1"),
        (
            "4:26: backends.two.url: expected an address such as `http://127.0.0.1:8000` (no user, password, query or "
            "fragment)"
        ),
    ),
}


@pytest.mark.parametrize("case", SHAPE_CASES)
def test_a_fault_of_form_is_told_with_its_place(case: str) -> None:
    edit, message = SHAPE_CASES[case]
    assert f"g.yaml:{message}" in problems_of(edited(edit))


def test_all_problems_are_listed_in_order_form_and_meaning_together() -> None:
    text = edited(("port: 0", "prot: 0"), ("[one]", "[oen]"), ("0.8", "8"), ("[auto, ", "[auto, x y, "))
    assert [line.split(": ", 1)[0] for line in problems_of(text)] == [
        "g.yaml:1:10",
        "g.yaml:7:16",
        "g.yaml:15:40",
        "g.yaml:19:20",
    ]


def test_what_is_under_a_bad_name_is_still_checked() -> None:
    assert any(
        ":4:14: " in line and "one of" in line for line in problems_of(edited(("two: {kind: vllm", "no: {kind: vlm")))
    )


def test_no_message_shows_what_may_be_a_secret() -> None:
    for edit in (
        ("model: m-two", "model: m-two, api_key: sk-sesame"),
        ("model: m-two", "model: m-two, api_key: {from: env, name: sk-sesame}"),
        ("http://h:1", "http://user:sk-sesame@h:1"),
        ("model: m-two", "model: m-two, api_key: {from: sk-sesame}"),
        (DIGEST, "sk-sesame"),
    ):
        assert "sesame" not in "\n".join(problems_of(edited(edit)))


SYNTAX_CASES = {
    "empty": ("", "1:1: the file is empty; docs/configuration.md has an example"),
    "comments only": ("# nothing\n", "1:1: the file is empty; docs/configuration.md has an example"),
    "a list": ("- a\n", "1:1: expected a mapping, found a list"),
    "a word": ("hello\n", "1:1: expected a mapping, found text"),
    "tab": ("server:\n\tport: 1\n", "2:1: a tab; YAML is indented with spaces"),
    "two documents": ("a: 1\n---\nb: 2\n", "2:1: a second YAML document begins here; the file must hold one"),
    "deep": ("a: " + "[" * 40 + "]" * 40, "1:35: nested more than 32 levels deep"),
    "control character": ("a: 1\nb: \x07", "2:4: the character U+0007 cannot stand in YAML"),
    "lone surrogate": ("a: \ud800", "1:4: the character U+D800 cannot stand in YAML"),
    "unknown alias": ("a: *b", "1:4: not YAML: found undefined alias"),
}


@pytest.mark.parametrize("case", SYNTAX_CASES)
def test_what_is_no_mapping_in_yaml_is_told_alone(case: str) -> None:
    text, message = SYNTAX_CASES[case]
    (problem,) = problems_of(text)
    assert problem.startswith(f"g.yaml:{message}")


def test_a_syntax_error_has_its_line() -> None:
    (problem,) = problems_of("server:\n  port: 1\n bad\n")
    assert problem.startswith("g.yaml:3:2: not YAML: ")  # the rest is the parser's wording


def test_aliases_work_and_their_growth_is_bounded() -> None:
    shared = edited(
        ("price: {input: 0.02, output: $0.04}", "price: &p {input: 1, output: 1}"),
        ("{input: 0.1 USD, output: 1}", "*p"),
    )
    assert parse(shared).config.tiers[0].price == parse(shared).config.tiers[1].price
    many = ", ".join(["*s"] * 1000)
    bomb = f"routes:\n  a: {{steps: [&s {{tier: x}}, {many}]}}\n"
    bomb = bomb.replace("steps: [", "steps: &all [") + "".join(f"  r{i}: {{steps: *all}}\n" for i in range(100))
    assert any("more than 200000 values" in problem for problem in problems_of(bomb))


def test_an_alias_of_itself_ends() -> None:
    assert problems_of("backends: &a\n  b: *a\n")


def test_a_file_that_cannot_be_read_is_a_problem_too(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"

    def message() -> str:
        with pytest.raises(ConfigError) as caught:
            load(file)
        (problem,) = caught.value.problems
        assert problem.file == str(file)
        return f"{problem.line}:{problem.column}: {problem.message}"

    assert message() == "1:1: cannot be read: No such file or directory"
    file.write_bytes(b"server:\n  host: caf\xe9\n")
    assert message() == "2:12: not UTF-8 text"
    file.write_bytes(b"#" * (1024 * 1024 + 1))
    assert message() == "1:1: larger than 1MiB, which no configuration is"
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert load(file).digest == parse(GOOD).digest


def test_paths_start_at_the_folder_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "gateway.yaml"
    file.write_text(GOOD)
    assert load(file).beside("keys/a") == tmp_path / "keys/a"
    assert load(file).beside("/keys/a") == Path("/keys/a")


YAML_LIKE = st.text(st.sampled_from("abk:-{}[],&*!<|>'\"#%@`?~. \n\t019$") | st.characters(), max_size=80)


def ends_well(text: str) -> None:
    """Either a configuration or ConfigError with places in the text; nothing else."""
    problems: tuple[Problem, ...] = ()
    try:
        assert parse(text, "g.yaml").digest
    except ConfigError as error:
        problems = error.problems
        if not problems:
            raise
    assert list(problems) == sorted(problems, key=lambda problem: (problem.line, problem.column, problem.message))
    assert all(problem.line >= 1 and problem.column >= 1 and "\n" not in problem.message for problem in problems)


@given(YAML_LIKE)
def test_no_text_raises_anything_but_config_error(text: str) -> None:
    ends_well(text)


@given(st.integers(0, len(GOOD)), st.integers(0, 12), YAML_LIKE)
def test_no_edit_of_a_good_file_raises_anything_but_config_error(at: int, cut: int, inserted: str) -> None:
    ends_well(GOOD[:at] + inserted + GOOD[at + cut :])
