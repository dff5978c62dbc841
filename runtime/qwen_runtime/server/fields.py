"""Tables of a request's fields: one table reads a body and describes it in OpenAPI.

Kind     a type of value: how it is read, and its JSON schema
Field    a named value of an object
Table    an object: its fields; a name that is none of them is refused
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qwen_runtime.errors import RequestError
from qwen_runtime.server.kinds import Kind, Schema, one_of, wrong

__all__ = ["Field", "Table", "given", "tagged", "together"]


@dataclass(frozen=True, slots=True)
class Field:
    """A named value of an object. Unless it is required, null means that it was left out."""

    name: str
    kind: Kind
    doc: str
    """One line for the API's description."""
    required: bool = False
    default: Any = None
    """What is read where the field was left out."""


@dataclass(frozen=True, slots=True)
class Table:
    """An object with the fields of a table and no others."""

    name: str
    """Name of the schema."""
    fields: tuple[Field, ...]
    hints: Mapping[str, str] = field(default_factory=dict)
    """For names that clients of other servers know: what to send instead."""
    rules: tuple[Schema, ...] = ()
    """Schemas that the whole object keeps to as well. They describe what readers of several
    fields check; see `together`."""

    def read(self, value: Any, path: str = "") -> dict[str, Any]:
        """Read an object.

        Args:
            value: A JSON value.
            path: Where it stands in the body: "messages[0]"; empty for the body itself.

        Returns:
            The value of every field by its name, defaults filled in.

        Raises:
            RequestError: Naming the first field that is unknown, missing or wrong.
        """
        if not isinstance(value, dict):
            raise wrong(path or "the body", "an object", value, param=path or None)
        known = {item.name for item in self.fields}
        for name in value:
            if name not in known:
                where = _join(path, name)
                hint = self.hints.get(name, "remove it; /openapi.json lists what is known")
                raise RequestError(f"{where:.200} is not a known field; {hint}", param=where[:200])
        return {item.name: _read_field(item, value, path) for item in self.fields}

    def schema(self) -> Schema:
        """The object's JSON schema."""
        described: Schema = {
            "type": "object",
            "properties": {item.name: _field_schema(item) for item in self.fields},
            "additionalProperties": False,
        }
        required = [item.name for item in self.fields if item.required]
        described |= {"required": required} if required else {}
        return described | ({"allOf": list(self.rules)} if self.rules else {})

    def kind(self) -> Kind:
        """The table as the kind of a field."""
        return Kind("an object", self.read, self.schema())


def _read_field(item: Field, values: Mapping[str, Any], path: str) -> Any:
    where, value = _join(path, item.name), values.get(item.name)
    if value is not None:
        return item.kind.read(value, where)
    if item.required:
        raise RequestError(f"{where} must be {item.kind.name}, got none; add it", param=where)
    return item.default


def _field_schema(item: Field) -> Schema:
    schema = dict(item.kind.schema)
    if not item.required:
        if isinstance(schema.get("type"), str) and "enum" not in schema and "const" not in schema:
            schema["type"] = [schema["type"], "null"]
        else:
            schema = {"anyOf": [schema, {"type": "null"}]}
    schema["description"] = item.doc
    if item.default is not None:
        schema["default"] = item.default
    return schema


def given(name: str, schema: Schema | None = None) -> Schema:
    """Schema of an object in which a field was not left out.

    Args:
        name: The field.
        schema: What its value is then; None is anything but null.
    """
    value = {"not": {"type": "null"}} if schema is None else schema
    return {"properties": {name: value}, "required": [name]}


def together(name: str, needed: Schema) -> Schema:
    """Schema of an object in which a field is null or left out, or all of it is as needed."""
    return {"anyOf": [{"properties": {name: {"type": "null"}}}, needed]}


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def tagged(tag: str, tables: Sequence[tuple[str, Table]]) -> Kind:
    """Objects of several forms; a field of theirs says which.

    Args:
        tag: Name of that field. Each table has it as a required `one_of` of a single value.
        tables: The forms by the field's value.

    Returns:
        A kind that reads the fields of the form.
    """
    by_value = dict(tables)
    choices = one_of(*by_value)

    def read(value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise wrong(path, f"an object with {tag}", value, param=path)
        if tag not in value:
            where = _join(path, tag)
            raise RequestError(f"{where} must be {choices.name}, got none; add it", param=where)
        return by_value[choices.read(value[tag], _join(path, tag))].read(value, path)

    schema = {"oneOf": [table.schema() for table in by_value.values()]}
    return Kind(f"an object with {tag}", read, schema)
