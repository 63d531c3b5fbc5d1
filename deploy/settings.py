"""Writes deploy/settings.md, every setting there is, from what `app/settings` says of itself."""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo

from app.settings import Settings

PAGE = Path(__file__).parent / "settings.md"
INTRODUCTION = """# Settings

One YAML file, `sluice gateway --config FILE`; every value has a default, but for those that say *required*. Environment
variables override single values (`SLUICE_LISTEN__PORT=9000`). An unknown key is an error; `--check` tells of it
beforehand. `[]` is a list. Written by `make settings` from `app/settings`, so change it there.
"""
KINDS: dict[Any, str] = {
    bool: "`true`, `false`",
    int: "number",
    float: "number",
    str: "text",
    Path: "file",
    SecretStr: "text",
    datetime: "date or time",
}
MIB = 1024 * 1024

Place = tuple[str, type[BaseModel]]


def page() -> str:
    """The page as it is committed."""
    return "\n".join([INTRODUCTION, *(_section(names, part) for names, part in _sections())])


def places(part: type[BaseModel], path: str = "") -> Iterator[Place]:
    """Every part of the settings with the path that leads to it, as they are read from top to bottom."""
    yield path, part
    for name, field in part.model_fields.items():
        for inner in _parts_in(field.annotation):
            yield from places(inner, _joined(path, name) + ("[]" if _is_list(field.annotation) else ""))


def _sections() -> list[tuple[list[str], type[BaseModel]]]:
    """Parts of one kind are told of once, with all their places; one that extends another tells for both."""
    found = list(places(Settings))
    kinds = dict.fromkeys(part for _, part in found)
    whole = {
        part: next((other for other in kinds if issubclass(other, part) and other is not part), part) for part in kinds
    }
    named: dict[type[BaseModel], list[str]] = {}
    for path, part in found:
        named.setdefault(whole[part], []).append(path)
    return [(paths, part) for part, paths in named.items()]


def _section(paths: list[str], part: type[BaseModel]) -> str:
    lines = [] if part is Settings else [f"## {_heading(paths)}", ""]
    lines += [*_told_of(part), "| Setting | Default | Values | Meaning |", "|---|---|---|---|"]
    required_first = sorted(part.model_fields.items(), key=lambda field: not field[1].is_required())
    lines += [_row(name, field) for name, field in required_first]
    return "\n".join([*lines, ""])


def _heading(paths: list[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths)


def _told_of(part: type[BaseModel]) -> list[str]:
    """The docstrings of the part and of those that it extends, as paragraphs."""
    kinds = [kind for kind in part.__mro__ if kind.__module__.startswith("app.settings") and kind.__name__ != "Part"]
    texts = [text for kind in kinds if kind is not Settings and (text := kind.__doc__)]
    return [line for text in texts for line in [*_unindented(text), ""]]


def _unindented(text: str) -> list[str]:
    return [line.strip() for line in text.strip().splitlines()]


def _row(name: str, field: FieldInfo) -> str:
    inner = _parts_in(field.annotation)
    meaning = field.description or (_unindented(inner[0].__doc__ or "")[0].rstrip(".") if inner else "")
    cells = [f"`{name}`", _default(name, field), _link(inner[0]) if inner else _values(field), meaning]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _link(part: type[BaseModel]) -> str:
    """To the section of a part, by the anchor that GitHub makes of its heading."""
    paths = next(paths for paths, told in _sections() if issubclass(told, part))
    anchor = "".join(char for char in _heading(paths) if char.isalnum() or char in " -_").replace(" ", "-")
    return f"[below](#{anchor})"


def _default(name: str, field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.default
    if isinstance(value, BaseModel):
        return ""
    if value is None or (not value and not isinstance(value, bool | int | float)):
        return "none"
    if name.endswith("_bytes") and value % 1024 == 0:
        return f"{value} ({_size(value)})"
    return _shown(value)


def _size(value: int) -> str:
    return f"{value // MIB} MiB" if value % MIB == 0 else f"{value // 1024} KiB"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return f"`{value}`".lower()
    if isinstance(value, dict):
        return ", ".join(f"{key}: {inner:g}" for key, inner in value.items())
    if isinstance(value, tuple | frozenset):
        return ", ".join(sorted(f"`{inner}`" for inner in value))
    return f"{value:.12g}" if isinstance(value, int | float) else f"`{value}`"


def _values(field: FieldInfo) -> str:
    kinds = [_kind(kind) for kind in _alternatives(field.annotation)]
    words = " or ".join(dict.fromkeys(kinds))
    return f"{words} {_bounds(field.metadata)}".rstrip()


def _kind(kind: Any) -> str:
    """A word for a type of values."""
    arguments = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin is typing.Annotated:
        return f"{_kind(arguments[0])} {_bounds(arguments[1:])}".rstrip()
    if origin is dict:
        return f"{_kind(arguments[0])} to {_kind(arguments[1])}"
    if origin in (tuple, frozenset):
        return f"list of {_kind(arguments[0])}"
    return KINDS[kind]


def _bounds(metadata: typing.Iterable[Any]) -> str:
    low = high = ""
    for bound in metadata:
        match bound:
            case FieldInfo(metadata=inner):
                return _bounds(inner)
            case annotated_types.Ge(ge=value):
                low = f"from {value}"
            case annotated_types.Gt(gt=value):
                low = f"above {value}"
            case annotated_types.Le(le=value):
                high = f"to {value}"
    return f"{low}, {high}" if low.startswith("above") and high else f"{low} {high}".strip()


def _alternatives(annotation: Any) -> list[Any]:
    """The types that a value may have; that it may be left out goes without saying."""
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return [kind for kind in typing.get_args(annotation) if kind is not type(None)]
    return [annotation]


def _parts_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [part for argument in typing.get_args(annotation) for part in _parts_in(argument)]


def _is_list(annotation: Any) -> bool:
    return any(typing.get_origin(kind) is tuple for kind in _alternatives(annotation))


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def main() -> int:
    if "--check" in sys.argv:
        return int(PAGE.read_text(encoding="utf-8") != page())
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
