"""Are the page and the schema what the types say, and true of the files of this repository?"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from gateway.config.document import EXAMPLE, main, reference, schema, schema_text
from gateway.config.load import parse
from gateway.config.units import DURATION, MONEY, SIZE

ROOT = Path(__file__).parents[3]


def test_the_page_is_fresh() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "python -m gateway.config.document"


def test_the_schema_is_fresh() -> None:
    assert (ROOT / "docs/gateway.schema.json").read_text() == schema_text(), (
        "python -m gateway.config.document --schema"
    )


def test_the_worked_example_loads_without_warnings_and_is_on_the_page() -> None:
    loaded = parse(EXAMPLE, local_model_ids={"small": "smollm2-135m-instruct"})
    assert loaded.warnings == ()
    assert f"```yaml\n{EXAMPLE}```" in reference()


def test_every_noun_of_the_file_is_in_the_example() -> None:
    assert set(schema()["properties"]) == set(yaml.safe_load(EXAMPLE))


def test_every_link_of_the_page_has_its_anchor() -> None:
    page = reference()
    links = set(re.findall(r"\]\(#([a-z]+)\)", page))
    assert links
    assert links <= set(re.findall(r'<a id="([a-z]+)">', page))


def test_every_key_has_a_meaning() -> None:
    for line in reference().splitlines():
        assert not line.endswith("|  |"), line


@pytest.mark.parametrize("file", ["gateway.yaml", "gateway.full.yaml"])
def test_the_schema_accepts_the_files_of_the_repository(file: str) -> None:
    text = (ROOT / file).read_text()
    assert text.startswith("# yaml-language-server: $schema=docs/gateway.schema.json\n")
    assert list(faults(yaml.safe_load(text), schema())) == []


def test_the_schema_accepts_the_example() -> None:
    assert list(faults(yaml.safe_load(EXAMPLE), schema())) == []


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1.5s", "1.5"),
        ("4MiB", "4M"),
        ("$0.10", "0.1 EUR"),
        ("kind: vllm", "kind: vlm"),
        ("port:", "prot:"),
        ("doubt_below: 0.80", "doubt_below: 80"),
        ("from: env", "from: envir"),
        ("admin: true", "admin: 1"),
        ("usd: $500", "usd: 500 EUR"),
        ("per: minute, burst", "per: month, burst"),
        ("limit: 600", "limit: 0"),
        ("kind: redis", "kind: memory"),
        ("redis-1:6379", "redis-1"),
        ("x-user-id", "x user"),
        ('"4711"', '"' + 257 * "4" + '"'),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(old: str, new: str) -> None:
    assert old in EXAMPLE
    assert list(faults(yaml.safe_load(EXAMPLE.replace(old, new)), schema()))


@pytest.mark.parametrize(
    ("pattern", "good", "bad"),
    [
        (DURATION, ["500ms", "1.5s", "1h", "30d"], ["1", "s", "1w", "1 s"]),
        (SIZE, ["64KiB", "10MB", "1B"], ["1", "1K", "1kib"]),
        (MONEY, ["$0.05", "0.05 USD", "0.05USD", "1"], ["$1 USD", "-1", "1 EUR", "0.0123456789"]),
    ],
)
def test_the_patterns_of_the_schema(pattern: str, good: list[str], bad: list[str]) -> None:
    assert all(re.search(pattern, text) for text in good)
    assert not any(re.search(pattern, text) for text in bad)


def test_the_module_prints_and_writes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    main([])
    assert capsys.readouterr().out == reference()
    main(["--schema"])
    assert json.loads(capsys.readouterr().out) == schema()


def faults(value: Any, part: dict[str, Any], where: str = "") -> list[str]:
    """Check a value against the words of JSON Schema that ours uses; an unknown word is an error of the test."""
    found: list[str] = []
    told = {"$schema", "title", "description", "default", "definitions", "patternErrorMessage", "required"}
    kinds: dict[str, Any] = {
        "object": dict,
        "array": list,
        "string": str,
        "boolean": bool,
        "integer": int,
        "number": (int, float),
    }
    for word, rule in part.items():
        match word:
            case "$ref":
                found += faults(value, schema()["definitions"][rule.rsplit("/", 1)[1]], where)
            case "allOf":
                found += [fault for choice in rule for fault in faults(value, choice, where)]
            case "anyOf":
                tried: list[list[str]] = [faults(value, choice, where) for choice in rule]
                found += [] if [] in tried else [f"{where}: none of the choices"]
            case "type":
                if not isinstance(value, kinds[rule]) or (isinstance(value, bool) and rule != "boolean"):
                    return [f"{where}: not {rule}"]
            case "const":
                found += [] if value == rule else [f"{where}: not {rule}"]
            case "enum":
                found += [] if value in rule else [f"{where}: none of {rule}"]
            case "pattern":
                found += [] if re.search(rule, value) else [f"{where}: not {rule}"]
            case "properties":
                found += [
                    fault for key in rule if key in value for fault in faults(value[key], rule[key], f"{where}.{key}")
                ]
            case "propertyNames":
                found += [fault for key in value for fault in faults(key, rule, f"{where}.{key}")]
            case "additionalProperties":
                others = [key for key in value if key not in part.get("properties", {})]
                found += [
                    fault
                    for key in others
                    for fault in (faults(value[key], rule, f"{where}.{key}") if rule else [f"{where}.{key}: unknown"])
                ]
            case "items":
                found += [fault for i, item in enumerate(value) for fault in faults(item, rule, f"{where}[{i}]")]
            case "maxItems" | "maxProperties" | "maxLength":
                found += [] if len(value) <= rule else [f"{where}: too long"]
            case "minItems" | "minProperties" | "minLength":
                found += [] if len(value) >= rule else [f"{where}: too short"]
            case "minimum":
                found += [] if value >= rule else [f"{where}: below {rule}"]
            case "maximum":
                found += [] if value <= rule else [f"{where}: over {rule}"]
            case _:
                assert word in told, word
    found += [f"{where}.{key}: missing" for key in part.get("required", []) if key not in value]
    return found
