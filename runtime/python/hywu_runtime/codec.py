"""JSON to frozen dataclasses and back, driven by the dataclasses' own type hints.

A field's type says what JSON it takes: ``int``, ``float``, ``str``, ``bool``, ``X | None``,
``tuple[X, ...]``, ``Mapping[str, X]``, ``Literal[...]``, another dataclass, or a union of these that differ
in JSON type. ``Annotated[X, Rule(...)]`` narrows the values; ``field(metadata={"key": ...})`` names a key
that Python reserves.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from hywu_runtime.errors import BundleError

MAX_INT = 2**53  # what a double, and so every JSON reader, holds exactly
REMEDY = "Export the bundle again with a toolchain of the same format, or correct the manifest"


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its JSON type; ``what`` completes the sentence "expected …"."""

    what: str
    test: Callable[[Any], bool]


def malformed(where: str, problem: str, expected: str) -> BundleError:
    """The error for one key of a manifest, for example ``program[3].phase``."""
    return BundleError(f"manifest.json: `{where}` {problem}", f"Expected {expected}", REMEDY)


def show(value: object, limit: int = 60) -> str:
    """``repr`` cut to ``limit`` characters, so that hostile values cannot flood a message."""
    text = ascii(value) if not isinstance(value, (dict, list)) else f"{type(value).__name__} of {len(value)}"
    return text if len(text) <= limit else text[: limit - 1] + "…"


def parse(text: bytes) -> Any:
    """Strict JSON: UTF-8, no duplicate keys, no NaN or Infinity, no lone surrogates, no unreasonable nesting.

    Numbers lie within a double's range, as most JSON readers want it, even under keys that are ignored.

    Raises:
        BundleError: not such a text.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            raise ValueError("an object has the same key twice")
        return result

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is not a JSON number")

    def real(digits: str) -> float:
        if math.isinf(number := float(digits)):
            raise ValueError("a number is too large")
        return number

    def integer(digits: str) -> int:
        return int(digits if len(digits) < 300 or real(digits) else "")

    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=pairs,
            parse_constant=constant,
            parse_float=real,
            parse_int=integer,
        )
        if re.search(rb"\\u[dD][89a-fA-F]", text):  # whole pairs are fine, lone halves cannot be encoded
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except (ValueError, RecursionError) as error:
        problem = "it nests too deeply" if isinstance(error, RecursionError) else str(error)
        raise BundleError(
            f"manifest.json is not valid JSON: {problem}",
            "Expected a UTF-8 JSON object",
            "The file is damaged: copy or export the bundle again",
        ) from None


def decode(kind: Any, value: Any, where: str) -> Any:
    """``value``, as parsed from JSON, as an instance of ``kind``.

    Raises:
        BundleError: naming ``where`` and the key below it that does not fit.
    """
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        inner, *rules = typing.get_args(kind)
        result = decode(inner, value, where)
        for rule in rules:
            if not rule.test(result):
                raise malformed(where, f"is {show(value)}", rule.what)
        return result
    if origin in (typing.Union, types.UnionType):
        for option in typing.get_args(kind):
            if _json_type_fits(option, value):
                return decode(option, value, where)
    elif not _json_type_fits(kind, value):
        pass
    elif origin is tuple:
        item = typing.get_args(kind)[0]
        return tuple(decode(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    elif origin is Mapping:
        key_kind, item = typing.get_args(kind)
        result = {}
        for key, entry in value.items():
            if not key.startswith("x-"):
                result[decode(key_kind, key, f"{where}: key")] = decode(item, entry, f"{where}[{show(key)}]")
        return result
    elif dataclasses.is_dataclass(kind):
        return _decode_object(kind, value, where)
    else:
        return float(value) if kind is float else value
    raise malformed(where, f"is {show(value)}", describe(kind))


def encode(value: Any) -> Any:
    """The inverse of :func:`decode`: plain JSON values, fields in declaration order, defaults left out."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            key: encode(getattr(value, name))
            for name, (key, _, default) in _fields(type(value)).items()
            if default is dataclasses.MISSING or getattr(value, name) != default
        }
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    return value


def describe(kind: Any) -> str:
    """A kind in words, for messages."""
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return str(typing.get_args(kind)[1].what)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(describe(option) for option in typing.get_args(kind))
    if origin is typing.Literal:
        return "one of " + ", ".join(str(option) for option in typing.get_args(kind))
    if origin is tuple:
        return "an array"
    if origin is Mapping or dataclasses.is_dataclass(kind):
        return "an object"
    names = {int: "an integer", float: "a finite number", str: "a string", bool: "true or false"}
    return names.get(kind, "null")


def _json_type_fits(kind: Any, value: Any) -> bool:
    origin = typing.get_origin(kind)
    if origin is typing.Annotated:
        return _json_type_fits(typing.get_args(kind)[0], value)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in typing.get_args(kind))
    if origin is tuple:
        return isinstance(value, list)
    if origin is Mapping or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if kind is bool:
        return isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= MAX_INT
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e300
    if kind is type(None):
        return value is None
    return isinstance(value, kind)


def _decode_object(kind: Any, value: dict[str, Any], where: str) -> Any:
    fields = _fields(kind)
    prefix = f"{where}." if where else ""
    keys = {key for key, _, _ in fields.values()}
    for key in value:
        if key not in keys and not key.startswith("x-"):
            raise malformed(
                prefix + show(key)[1:-1], "is not a key of this format", "one of " + ", ".join(sorted(keys))
            )
    arguments = {}
    for name, (key, hint, default) in fields.items():
        if key in value:
            arguments[name] = decode(hint, value[key], prefix + key)
        elif default is dataclasses.MISSING:
            raise malformed(prefix + key, "is missing", describe(hint))
    return kind(**arguments)


@functools.cache
def _fields(kind: type) -> dict[str, tuple[str, Any, Any]]:
    """Field name to (JSON key, type, default or MISSING)."""
    hints = typing.get_type_hints(kind, include_extras=True)
    result = {}
    for field in dataclasses.fields(kind):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        result[field.name] = (field.metadata.get("key", field.name), hints[field.name], default)
    return result
