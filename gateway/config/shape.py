"""Does each node of the file have the type that its place wants? YAML nodes and a Struct type in, a value out.

One walk over both. It never stops at a fault: a place with one gets a stand-in of the right type and is remembered in
`broken`, so that everything else in the file is still read and checked. Messages never show what stands where a secret
may have been pasted: values are quoted only for numbers, words out of a list, and quantities.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import isfinite
from typing import Any

import msgspec
import yaml
from msgspec import inspect as mi

from gateway.config.problem import Problem, guess, quoted
from gateway.config.units import UNITS, UnitError

Place = tuple[str | int, ...]
"""Where in the file: `("tiers", 0, "price", "input")`."""
Mark = tuple[int, int]
"""Line and column, from 1."""

MOST_VALUES = 200_000
"""Most nodes read, an aliased one counted at each use: what bounds a file of aliases of aliases."""

_TAG = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(?:0|[1-9][0-9_]*)")
_NUMBER = re.compile(r"[-+]?(?:[0-9][0-9_]*(?:\.[0-9_]*)?|\.[0-9_]+)(?:[eE][-+]?[0-9]+)?")
_LONGEST_NUMBER = 40
_LARGEST_INT = 2**63 - 1


class Opened(msgspec.Struct, frozen=True):
    """A type without its wrapping: what stays when `None` (which YAML shall leave out) and metadata are taken off."""

    choices: tuple[mi.Type, ...]
    unit: str | None
    words: str | None
    description: str
    optional: bool


def open_type(wrapped: mi.Type) -> Opened:
    """Unwrap a field's type. `choices` has more than one member only for a union of tagged Structs."""
    unit = words = None
    description = ""
    optional = False
    while True:
        if isinstance(wrapped, mi.Metadata):
            extra = wrapped.extra or {}
            unit, words = unit or extra.get("unit"), words or extra.get("words")
            description = description or (wrapped.extra_json_schema or {}).get("description", "")
            wrapped = wrapped.type
        elif isinstance(wrapped, mi.UnionType):
            left = tuple(member for member in wrapped.types if not isinstance(member, mi.NoneType))
            optional = optional or len(left) < len(wrapped.types)
            if len(left) > 1:
                return Opened(left, unit, words, description, optional)
            wrapped = left[0]
        else:
            return Opened((wrapped,), unit, words, description, optional)


def spelled(place: Place) -> str:
    """`tiers[0].price.input` of a place, empty for the root."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text if len(text) <= 3 * _LONGEST_NUMBER else text[: 3 * _LONGEST_NUMBER] + "…"


class Walk:
    """The walk and what it found: `problems`, the `marks` of values, the `key_marks` of keys, the `broken` places."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.problems: list[Problem] = []
        self.marks: dict[Place, Mark] = {}
        self.key_marks: dict[Place, Mark] = {}
        self.broken: set[Place] = set()
        self._read = 0

    def value(self, node: yaml.Node, wrapped: mi.Type, place: Place) -> Any:
        """Read one node as one type: its value, or after a fault a stand-in."""
        self.marks[place] = _mark(node)
        self._read += 1
        opened = open_type(wrapped)
        if self._read > MOST_VALUES:
            if self._read == MOST_VALUES + 1:
                self._say(node, (), f"more than {MOST_VALUES} values, counting an alias (`*name`) at each use")
            self.broken.add(place)
            return stand_in(wrapped)
        read = self._by_type(node, opened, place)
        if read is None:
            self.broken.add(place)
            return stand_in(wrapped)
        return read

    def _by_type(self, node: yaml.Node, opened: Opened, place: Place) -> Any:
        want = opened.choices[0]
        if _is(node, "null") and not isinstance(want, mi.LiteralType):
            end = "; leave the key out to get the default" if opened.optional else ""
            return self._say(node, place, f"expected {plain(opened)}, found nothing{end}")
        if isinstance(want, mi.StructType):
            return self._struct(node, opened, place)
        if isinstance(want, mi.DictType):
            return self._dict(node, want, opened, place)
        if isinstance(want, mi.VarTupleType):
            return self._tuple(node, want, opened, place)
        if not isinstance(node, yaml.ScalarNode):
            return self._say(node, place, f"expected {plain(opened)}, found {_found(node)}")
        if opened.unit is not None:
            return self._quantity(node, want, opened.unit, place)
        if isinstance(want, mi.StrType):
            return self._text(node, want, opened, place)
        if isinstance(want, mi.LiteralType):
            if node.value in want.values and not _is(node, "bool"):
                return node.value
            choices = ", ".join(f"`{value}`" for value in want.values)
            hint = guess(node.value, (str(value) for value in want.values))
            return self._say(node, place, f"expected one of {choices}, found {quoted(node.value)}{hint}")
        if isinstance(want, mi.BoolType):
            return self._truth(node, place)
        if isinstance(want, mi.IntType):
            return self._whole(node, want, place)
        assert isinstance(want, mi.FloatType), want  # noqa: S101  (a new type in the model needs its reader here)
        return self._number(node, want, place)

    def _struct(self, node: yaml.Node, opened: Opened, place: Place) -> Any:
        structs = {str(s.tag): s for s in opened.choices if isinstance(s, mi.StructType)}
        tag_field = next(iter(structs.values())).tag_field
        if not isinstance(node, yaml.MappingNode):
            return self._say(node, place, f"expected {plain(opened)}, found {_found(node)}")
        items = self._items(node, place)
        chosen = next(iter(structs.values()))
        if tag_field is not None:
            tag = items.pop(tag_field, None)
            choices = ", ".join(f"`{name}`" for name in sorted(structs))
            if tag is None:
                return self._say(node, place, f"missing key `{tag_field}`: one of {choices}")
            if not isinstance(tag, yaml.ScalarNode) or tag.value not in structs:
                word = tag.value if isinstance(tag, yaml.ScalarNode) else ""
                message = (
                    f"expected one of {choices}, found {quoted(word) if word and tag_field != 'from' else _found(tag)}"
                )
                return self._say(tag, (*place, tag_field), message + guess(word, structs))
            chosen = structs[tag.value]
        fields = {field.encode_name: field for field in chosen.fields}
        values: dict[str, Any] = {}
        for key, child in items.items():
            if key in fields:
                values[fields[key].name] = self.value(child, fields[key].type, (*place, key))
            else:
                # Whoever misses the key that was meant can see that something was meant.
                self.broken.add((*place, key))
                known = ([tag_field] if tag_field else []) + list(fields)
                hint = guess(key, known) or f"; known here: {', '.join(f'`{name}`' for name in known)}"
                self._say_at(self.key_marks[(*place, key)], place, f"unknown key {quoted(key)}{hint}")
        for key, field in fields.items():
            if key not in items and field.required:
                self._say(node, place, f"missing key `{key}`")
                self.broken.add((*place, key))
                values[field.name] = stand_in(field.type)
        return chosen.cls(**values)

    def _dict(self, node: yaml.Node, want: mi.DictType, opened: Opened, place: Place) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return self._say(node, place, f"expected {plain(opened)}, found {_found(node)}")
        misnamed: list[yaml.Node] = []
        items = self._items(node, place, want.key_type, misnamed)
        for child in misnamed:  # for the problems in them
            self.value(child, want.value_type, (*place, "?"))
        if not items and want.min_length and place not in self.broken:
            return self._say(node, place, f"expected {plain(opened)}, at least one, found none")
        if want.max_length is not None and len(items) > want.max_length:
            return self._say(node, place, f"expected {plain(opened)}, at most {want.max_length}, found {len(items)}")
        values = {}
        for key, child in items.items():
            values[key] = self.value(child, want.value_type, (*place, key))
            self.marks[(*place, key)] = self.key_marks[(*place, key)]  # a reader looks for the name
        return values

    def _items(
        self,
        node: yaml.MappingNode,
        place: Place,
        key_type: mi.Type | None = None,
        misnamed: list[yaml.Node] | None = None,
    ) -> dict[str, yaml.Node]:
        """Return the entries of a mapping by key; what is wrong with the keys is said here.

        Where keys are names of type `key_type`, the values under unusable ones are put into `misnamed`.
        """
        items: dict[str, yaml.Node] = {}
        for key_node, child in node.value:
            self._read += 1
            if not isinstance(key_node, yaml.ScalarNode):
                self._say(key_node, place, f"expected a key, found {_found(key_node)}")
                self.broken.add(place)
                continue
            key = key_node.value
            if _is(key_node, "merge"):
                self._say(key_node, place, "merge keys (`<<`) are not read; write the keys out")
                self.broken.add(place)
            elif key in items:
                line, column = self.key_marks[(*place, key)]
                self._say(key_node, place, f"duplicate key {quoted(key)}; the first is at {line}:{column}")
            elif key_type is not None and self._text(key_node, *_key(key_type), place) is None:
                self.broken.add(place)
                if misnamed is not None:
                    misnamed.append(child)
            else:
                items[key] = child
                self.key_marks[(*place, key)] = _mark(key_node)
        return items

    def _tuple(self, node: yaml.Node, want: mi.VarTupleType, opened: Opened, place: Place) -> Any:
        if not isinstance(node, yaml.SequenceNode):
            return self._say(node, place, f"expected {plain(opened)}, found {_found(node)}")
        if len(node.value) < (want.min_length or 0):
            return self._say(node, place, f"expected {plain(opened)}, at least {want.min_length}, found none")
        if want.max_length is not None and len(node.value) > want.max_length:
            found = len(node.value)
            return self._say(node, place, f"expected {plain(opened)}, at most {want.max_length}, found {found}")
        return tuple(self.value(child, want.item_type, (*place, index)) for index, child in enumerate(node.value))

    def _text(self, node: yaml.ScalarNode, want: mi.StrType, opened: Opened, place: Place) -> Any:
        text: str = node.value
        what = plain(opened)
        if _is(node, "bool", "int", "float", "null"):
            if _is(node, "bool"):
                shown = quoted(f'"{text}"')
                return self._say(
                    node, place, f"expected {what}, found a word that YAML reads as true or false; write {shown}"
                )
            kind = "nothing" if _is(node, "null") else "a number"
            return self._say(node, place, f"expected {what}, found what YAML reads as {kind}; put it in quotes")
        if node.tag.startswith("!") and not node.tag.startswith("!!"):
            return self._say(node, place, f"expected {what}, found the unknown YAML tag {quoted(node.tag)}")
        if want.pattern is not None and re.fullmatch(want.pattern, text) is None:
            return self._say(node, place, f"expected {what}")
        if len(text) < (want.min_length or 0):
            return self._say(node, place, f"expected {what}, found empty text")
        if want.max_length is not None and len(text) > want.max_length:
            return self._say(node, place, f"expected at most {want.max_length} characters, found {len(text)}")
        return text

    def _truth(self, node: yaml.ScalarNode, place: Place) -> Any:
        if _is(node, "bool") and node.value.lower() in {"true", "false"}:
            return bool(node.value.lower() == "true")
        hint = ""
        if _is(node, "bool"):
            hint = f"; write `{'true' if node.value.lower() in {'yes', 'on'} else 'false'}`"
        return self._say(node, place, f"expected `true` or `false`, found {_found(node)}{hint}")

    def _whole(self, node: yaml.ScalarNode, want: mi.IntType, place: Place) -> Any:
        text: str = node.value
        if not _is(node, "int") or len(text) > _LONGEST_NUMBER or _WHOLE.fullmatch(text) is None:
            hint = ""
            if _is(node, "int") and re.fullmatch(r"0[0-7]+", text) and len(text) <= _LONGEST_NUMBER:
                hint = f", which YAML reads as octal {int(text, 8)}; write `{text.lstrip('0')}` or `{int(text, 8)}`"
            elif _is(node, "str") and _WHOLE.fullmatch(text) and node.style:
                hint = "; take off the quotes"
            return self._say(node, place, f"expected a whole number, found {_found(node)}{hint}")
        number = int(text.replace("_", ""))
        return self._bounded(node, number, want, None, place)

    def _number(self, node: yaml.ScalarNode, want: mi.FloatType, place: Place) -> Any:
        text: str = node.value
        # `1e-3` is text to YAML 1.1 and a number to everybody else.
        if node.style or len(text) > _LONGEST_NUMBER or _NUMBER.fullmatch(text) is None:
            return self._say(node, place, f"expected a number, found {_found(node)}")
        number = float(text.replace("_", ""))
        if not isfinite(number):
            return self._say(node, place, "expected a number, found one that is too large")
        return self._bounded(node, number, want, None, place)

    def _quantity(self, node: yaml.ScalarNode, want: mi.Type, unit: str, place: Place) -> Any:
        try:
            number = UNITS[unit].parse(node.value)
        except UnitError as fault:
            return self._say(node, place, str(fault))
        assert isinstance(want, mi.IntType | mi.FloatType), want  # noqa: S101  (units stand on numbers only)
        return self._bounded(node, number, want, unit, place)

    def _bounded(
        self, node: yaml.ScalarNode, number: Any, want: mi.IntType | mi.FloatType, unit: str | None, place: Place
    ) -> Any:
        def shown(limit: float) -> str:
            return f"`{UNITS[unit].render(limit)}`" if unit and limit else f"{limit:g}" if limit < 1 else str(limit)

        missed = ""
        if want.gt is not None and number <= want.gt:
            missed = f"more than {shown(want.gt)}"
        elif want.ge is not None and number < want.ge:
            missed = f"at least {shown(want.ge)}"
        elif want.le is not None and number > want.le:
            missed = f"at most {shown(want.le)}"
        elif want.lt is not None and number >= want.lt:
            missed = f"less than {shown(want.lt)}"
        elif abs(number) > _LARGEST_INT:
            missed = f"at most {_LARGEST_INT}"
        return self._say(node, place, f"must be {missed}, found {quoted(node.value)}") if missed else number

    def _say(self, node: yaml.Node, place: Place, message: str) -> Any:
        """Note a problem. Returns None, which is what a reader returns for a value that is none."""
        return self._say_at(_mark(node), place, message)

    def _say_at(self, mark: Mark, place: Place, message: str) -> Any:
        where = spelled(place)
        self.problems.append(Problem(self.file, *mark, f"{where}: {message}" if where else message))
        return None


def plain(opened: Opened) -> str:
    """Say the type in plain words: `a whole number`, `a list of names`."""
    want = opened.choices[0]
    if opened.words:
        return opened.words
    if opened.unit:
        return {
            "duration": "a duration such as `2s`",
            "size": "a size such as `64KiB`",
            "usd": "dollars such as `$5`",
        }.get(opened.unit, "dollars per million tokens")
    if isinstance(want, mi.StructType) and want.tag_field == "from":
        return "a reference such as `{from: env, name: …}` (a secret never stands in this file)"
    if isinstance(want, mi.StructType) and want.tag_field:
        return f"a mapping with the key `{want.tag_field}`"
    plain_words: Mapping[type[mi.Type], str] = {
        mi.StructType: "a mapping",
        mi.DictType: "a mapping of names",
        mi.VarTupleType: "a list",
        mi.StrType: "text",
        mi.IntType: "a whole number",
        mi.FloatType: "a number",
        mi.BoolType: "`true` or `false`",
    }
    return plain_words.get(type(want), "one of " + ", ".join(f"`{v}`" for v in getattr(want, "values", ())))


def stand_in(wrapped: mi.Type) -> Any:
    """Return an empty value of the type, for a place whose own could not be read."""
    opened = open_type(wrapped)
    want = opened.choices[0]
    if opened.optional:
        return None
    if isinstance(want, mi.StructType):
        return want.cls(**{field.name: stand_in(field.type) for field in want.fields if field.required})
    if isinstance(want, mi.LiteralType):
        return want.values[0]
    empty: Mapping[type[mi.Type], Any] = {mi.StrType: "", mi.DictType: {}, mi.VarTupleType: (), mi.BoolType: False}
    return empty.get(type(want), 0)


def _key(key_type: mi.Type) -> tuple[mi.StrType, Opened]:
    opened = open_type(key_type)
    assert isinstance(opened.choices[0], mi.StrType), key_type  # noqa: S101  (YAML keys are names)
    return opened.choices[0], opened


def _mark(node: yaml.Node) -> Mark:
    return node.start_mark.line + 1, node.start_mark.column + 1


def _is(node: yaml.Node, *kinds: str) -> bool:
    return isinstance(node, yaml.ScalarNode) and any(node.tag == _TAG + kind for kind in kinds)


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if _is(node, "null"):
        return "nothing"
    if _is(node, "bool", "int", "float"):
        return quoted(str(node.value))
    return "text"
