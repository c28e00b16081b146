"""How is gateway.yaml written down? The reference page and the JSON Schema for editors, both read off the types.

Run as a module it prints the page, with `--schema` the schema; nothing is written.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import inspect as mi

from gateway.config.model import Config
from gateway.config.shape import Opened, open_type
from gateway.config.units import UNITS

EXAMPLE = """\
server:
  host: 0.0.0.0
  port: 8080
  max_body: 4MiB
  shutdown_grace: 1m
  workers: 4 # processes that share the port; limits then need Redis
  user_header: x-user-id # set by our own front end, which may be trusted
  admin: {port: 8081, key: {from: env, name: TIERWAY_ADMIN_KEY}}

backends:
  # Two vLLM servers of one model: interchangeable, so they stand in one tier.
  qwen-7b-a:
    kind: vllm
    url: http://gpu-1:8000
    model: Qwen/Qwen2.5-7B-Instruct
    api_key: {from: env, name: VLLM_API_KEY}
    timeouts: &near {connect: 500ms, first_token: 20s}
  qwen-7b-b:
    kind: vllm
    url: http://gpu-2:8000
    model: Qwen/Qwen2.5-7B-Instruct
    api_key: {from: env, name: VLLM_API_KEY}
    timeouts: *near # as above
  qwen-72b:
    kind: vllm
    url: https://models.example.com/v1
    model: Qwen/Qwen2.5-72B-Instruct
    api_key: {from: file, path: secrets/qwen-72b} # from the folder of this file
  tiny:
    kind: local # a model in a child process of the gateway
    weights: small
    model: smollm2-135m-instruct

tiers: # cheapest first; prices in dollars per million tokens
  - name: small
    backends: [tiny]
    price: {input: 0.02, output: 0.04}
  - name: medium
    backends: [qwen-7b-a, qwen-7b-b]
    price: {input: $0.10, cached_input: $0.025, output: $0.20}
    later_prices: # what is billed by from a moment on
      - {at: "2027-02-01T00:00:00Z", price: {input: 0.09 USD, cached_input: 0.02 USD, output: 0.18 USD}}
    context_tokens: 32768
    max_output_tokens: 4096
  - name: large
    backends: [qwen-72b]
    price: {gpu: {usd_per_hour: 2.49, count: 4}} # what a server costs, shared by the requests it works for
    context_tokens: 32768
    max_output_tokens: 4096
    queue: {concurrent: 64, size: 200, max_wait: 10s} # the others wait, whoever matters most first

routes: # what a client names as `model`
  auto:
    aliases: [gpt-4o]
    steps:
      - {tier: small, doubt_below: 0.80} # less sure than this: ask the next tier
      - {tier: medium, doubt_below: 0.75}
      - {tier: large}
    hold: {tokens: 24, time: 1.5s} # how much of a stream is judged before the client sees any
  careful:
    steps:
      - {tier: medium} # never doubted; the next tier takes over when it fails
      - {tier: large}

keys: # `tierway keygen` makes a key and its digest
  - name: operator
    sha256: 0a3f5d0cf5e9e4f1c0c5a2f7d1b8b3a6e7c49d2256f10e8ab94c73d5e1f2a6b7
    admin: true
  - name: website
    sha256: 7c1e9ab0d2f34c5b8e6a7d9f01234ab56cd78ef90ab12cd34ef56ab78cd90ef1
    models: [auto, small]
    team: web
    priority: 10
    metadata: {cost_centre: "4711"}

teams: [research] # beside those of `keys`: keys of the admin API can belong to it

limits: # a request must fit in all that apply to it
  - name: per-key
    scope: {key: each}
    requests: {limit: 600, per: minute, burst: 60}
    tokens: {limit: 200000, per: minute}
    concurrent: 32
  - name: team-budget
    scope: {team: each}
    spend: {usd: $500, per: month, timezone: Europe/Berlin}
  - name: research-grant
    scope: {team: research}
    spend: {usd: 2000} # in total
    reserve: strict # not a cent more: the longest answer is reserved, and what was not used given back
    when_down: closed
  - name: users-of-large
    scope: {user: each, tier: large}
    output_tokens: {limit: 50000, per: day}
    shadow: true # counted and reported only

state: # where limits are counted and keys of the admin API are kept
  kind: redis
  addresses: [redis-1:6379]
  password: {from: env, name: REDIS_PASSWORD}
  tls: {ca: certs/redis.pem}

ledger: # the bill of every request; without this noun it is a file of SQLite beside this one
  store:
    kind: postgres
    dsn: {from: env, name: LEDGER_DSN} # postgresql://user:password@host/database
    spool: /var/lib/tierway/spool.db # what the database has not taken yet: a disk that outlives the process
  keep_for: 730d
  idle: teams # who bears what a GPU costs while it does nothing
  alerts:
    webhooks: [{url: "https://hooks.example.com/tierway", secret: {from: env, name: HOOK_SECRET}}]
    budgets: [0.8, 1.0]

telemetry:
  log: {format: json, level: info}
  traces: true
"""

_HEAD = f"""\
# Configuration

<!-- Written by `python -m gateway.config.document`; change gateway/config/model.py instead of this page. -->

tierway reads one file, `gateway.yaml`. `tierway check` lists everything that is wrong with it, by line and column. An
editor that knows JSON Schema completes and checks it while you type: put
`# yaml-language-server: $schema=docs/gateway.schema.json` on its first line.

```yaml
{EXAMPLE}```

## How values are written

| what | how | examples |
| --- | --- | --- |
| duration | a number and its unit: `ms`, `s`, `m`, `h`, `d` | `500ms`, `1.5s`, `10m` |
| size | a number and its unit: `B`, `kB`, `MB`, `GB`, or binary `KiB`, `MiB`, `GiB` | `64KiB`, `10MB` |
| money | dollars, of a price per million tokens; at most 9 decimal places, read exactly | `5`, `$0.05`, `0.05 USD` |
| name | letters, digits and `._:/@-`, a letter or digit first, at most 128 | `gpt-4o`, `Qwen/Qwen2.5-7B` |
| truth | `true` or `false`; `yes`, `no`, `on` and `off` are refused | `true` |
| secret | a reference to where it is, never the secret | `{{from: env, name: VLLM_API_KEY}}` |

A name that YAML takes for something else (`no`, `on`, `2024`) needs quotes. Anchors and aliases (`&a`, `*a`) work,
merge keys (`<<`) do not. An unknown key, a key given twice, an empty value and a reference to nothing are errors: to
get a default, leave the key out. What a client can name as `model` (a route, an alias, a tier, a model id) has one
meaning: the same name for two of them is an error.
"""


class _Noun(msgspec.Struct, frozen=True):
    """A section of the page: a Struct and where it stands in the file."""

    struct: mi.StructType
    place: str


def reference() -> str:
    """Return the page docs/configuration.md, in Markdown."""
    parts = [_HEAD]
    for noun in _nouns(_struct(mi.type_info(Config)), "", set()):
        struct = noun.struct
        title = f"`{noun.place}`" if noun.place else "The file"
        if struct.tag_field:
            title += f" with `{struct.tag_field}: {struct.tag}`"
        lines = [f'<a id="{_anchor(struct)}"></a>', "", f"## {title}", "", inspect.getdoc(struct.cls) or "", ""]
        lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        if struct.tag_field:
            lines.append(f"| `{struct.tag_field}` | `{struct.tag}` | required | Which kind this is. |")
        for field in struct.fields:
            opened = open_type(field.type)
            cells = (f"`{field.encode_name}`", _words(field.type), _default(field), opened.description)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        if lines[-1].startswith("| ---"):
            lines = lines[:-2]
        parts.append("\n".join(lines).rstrip() + "\n")
    return "\n".join(parts)


def schema() -> dict[str, Any]:
    """Return the JSON Schema of the file, draft 7: what editors of YAML read."""
    definitions: dict[str, Any] = {}
    root = _struct(mi.type_info(Config))
    _define(root, definitions)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "gateway.yaml of tierway",
        **definitions.pop(root.cls.__name__),
        "definitions": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """Return the schema as docs/gateway.schema.json holds it."""
    return msgspec.json.format(msgspec.json.encode(schema()), indent=2).decode() + "\n"


def _struct(kind: mi.Type) -> mi.StructType:
    assert isinstance(kind, mi.StructType)  # noqa: S101  (said of types of the model only)
    return kind


def _anchor(struct: mi.StructType) -> str:
    return str(struct.cls.__name__).lower()


def _nouns(struct: mi.StructType, place: str, seen: set[type]) -> Iterator[_Noun]:
    """Every Struct that can stand below one, each once, in the order of the file."""
    if struct.cls in seen:
        return
    seen.add(struct.cls)
    yield _Noun(struct, place)
    for field in struct.fields:
        below = f"{place}.{field.encode_name}" if place else field.encode_name
        member, choices = below, open_type(field.type).choices
        if isinstance(choices[0], mi.VarTupleType):
            member, choices = f"{below}[]", open_type(choices[0].item_type).choices
        elif isinstance(choices[0], mi.DictType):
            member, choices = f"{below}.<name>", open_type(choices[0].value_type).choices
        for choice in choices:
            if isinstance(choice, mi.StructType):
                yield from _nouns(choice, member, seen)


def _words(wrapped: mi.Type) -> str:
    """Say a type as a cell of a table: plain words, its unit, its limits."""
    opened = open_type(wrapped)
    want = opened.choices[0]
    if isinstance(want, mi.StructType):
        links = [f"[`{s.tag or s.cls.__name__.lower()}`](#{_anchor(s)})" for s in map(_struct, opened.choices)]
        if want.tag_field == "from":
            return "secret: " + " or ".join(links)
        return " or ".join(links)
    if isinstance(want, mi.VarTupleType):
        items = {"name": "names", "text": "texts"}
        item = _words(want.item_type)
        return f"list of {items.get(item, item)}" + _how_many(want)
    if isinstance(want, mi.DictType):
        return f"name → {_words(want.value_type)}" + _how_many(want)
    if isinstance(want, mi.LiteralType):
        return " or ".join(f"`{value}`" for value in want.values)
    if isinstance(want, mi.IntType | mi.FloatType):
        return _number(want, opened)
    if isinstance(want, mi.BoolType):
        return "`true` or `false`"
    return (opened.words or "text").split(" (")[0].removeprefix("a ").removeprefix("an ").removeprefix("the ")


def _how_many(want: mi.VarTupleType | mi.DictType) -> str:
    return ", at least one" if want.min_length else f", at most {want.max_length}" if want.max_length else ""


def _number(want: mi.IntType | mi.FloatType, opened: Opened) -> str:
    unit = UNITS[opened.unit] if opened.unit else None

    def shown(limit: float) -> str:
        return f"`{unit.render(limit)}`" if unit else str(limit) if isinstance(limit, int) else f"{limit:g}"

    words = unit.words if unit else "whole number" if isinstance(want, mi.IntType) else "number"
    if want.ge is not None and want.le is not None:
        return f"{words}, {shown(want.ge)} to {shown(want.le)}"
    if want.ge is not None and unit is None:
        return f"{words}, at least {shown(want.ge)}"
    return f"{words}, at most {shown(want.le)}" if want.le is not None else words


def _default(field: mi.Field) -> str:
    if field.required:
        return "required"
    value = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
    if value is None:
        return "absent"
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        return "its defaults" if tag is None else f"`{{{value.__struct_config__.tag_field}: {tag}}}`"
    if value in ((), {}):
        return "empty"
    return f"`{_plain(value, open_type(field.type))}`"


def _plain(value: Any, opened: Opened) -> Any:
    """Return a default as the file writes it."""
    return UNITS[opened.unit].render(value) if opened.unit else value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _define(struct: mi.StructType, definitions: dict[str, Any]) -> None:
    name = struct.cls.__name__
    if name in definitions:
        return
    definitions[name] = {}  # before the fields: a Struct may stand below itself
    properties: dict[str, Any] = {struct.tag_field: {"const": struct.tag}} if struct.tag_field else {}
    required = list(properties)
    for field in struct.fields:
        opened = open_type(field.type)
        member = _schema_of(field.type, definitions)
        if opened.description:
            # Beside a `$ref` draft 7 reads nothing.
            member = {"allOf": [member]} if "$ref" in member else member
            member = {"description": opened.description, **member}
        if field.required:
            required.append(field.encode_name)
        elif isinstance(field.default, bool | int | float | str):
            plain = _plain(field.default, opened)
            member["default"] = plain if opened.unit else field.default
        properties[field.encode_name] = member
    definitions[name] = {
        "description": inspect.getdoc(struct.cls),
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
    }
    if required:
        definitions[name]["required"] = required


def _schema_of(wrapped: mi.Type, definitions: dict[str, Any]) -> dict[str, Any]:
    opened = open_type(wrapped)
    want = opened.choices[0]
    if isinstance(want, mi.StructType):
        references = []
        for choice in map(_struct, opened.choices):
            _define(choice, definitions)
            references.append({"$ref": f"#/definitions/{choice.cls.__name__}"})
        return references[0] if len(references) == 1 else {"anyOf": references}
    if isinstance(want, mi.VarTupleType):
        items = {"type": "array", "items": _schema_of(want.item_type, definitions)}
        limits = {"minItems": want.min_length, "maxItems": want.max_length}
        return items | {name: limit for name, limit in limits.items() if limit}
    if isinstance(want, mi.DictType):
        members = {
            "type": "object",
            "propertyNames": {"pattern": getattr(open_type(want.key_type).choices[0], "pattern", None)},
            "additionalProperties": _schema_of(want.value_type, definitions),
        }
        limits = {"minProperties": want.min_length, "maxProperties": want.max_length}
        return members | {name: limit for name, limit in limits.items() if limit}
    if isinstance(want, mi.LiteralType):
        return {"enum": list(want.values)}
    if isinstance(want, mi.BoolType):
        return {"type": "boolean"}
    if isinstance(want, mi.IntType | mi.FloatType):
        return _schema_of_number(want, opened)
    assert isinstance(want, mi.StrType), want  # noqa: S101  (a new type in the model needs its lines here)
    text: dict[str, Any] = {"type": "string"}
    if want.pattern:
        text |= {"pattern": want.pattern, "patternErrorMessage": f"expected {opened.words}"}
    limits = {"minLength": want.min_length, "maxLength": want.max_length}
    return text | {name: limit for name, limit in limits.items() if limit}


def _schema_of_number(want: mi.IntType | mi.FloatType, opened: Opened) -> dict[str, Any]:
    if opened.unit:
        unit = UNITS[opened.unit]
        text = {"type": "string", "pattern": unit.pattern, "patternErrorMessage": f"expected {unit.words}"}
        return {"anyOf": [{"type": "number", "minimum": 0}, text]} if unit.numeric else text
    limits = {"exclusiveMinimum": want.gt, "minimum": want.ge, "exclusiveMaximum": want.lt, "maximum": want.le}
    kind = "integer" if isinstance(want, mi.IntType) else "number"
    return {"type": kind, **{name: limit for name, limit in limits.items() if limit is not None}}


def main(arguments: list[str] | None = None) -> None:
    """Print the page, or with `--schema` the schema."""
    parser = argparse.ArgumentParser(prog="python -m gateway.config.document", description=main.__doc__)
    parser.add_argument("--schema", action="store_true", help="print the JSON Schema instead of the page")
    asked = parser.parse_args(arguments)
    sys.stdout.write(schema_text() if asked.schema else reference())


if __name__ == "__main__":
    main()
