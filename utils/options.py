"""Options of a script: one frozen dataclass with defaults, help, choices and limits in one place.

``argparse`` is generated from the dataclass; a YAML given by ``--config`` only replaces defaults
(an unknown key is refused with the nearest name); the command line wins. Conventions:

* field ``patch_size`` is the flag ``--patch_size``;
* a bool that is False becomes a switch ``--name``; one that is True becomes ``--no_name``;
* ``Literal[...]`` gives choices, ``X | None`` may be left out, ``tuple[X, ...]`` takes several;
* ``dict[str, int]`` is written ``normal:0,tumor:1`` (or as a mapping in YAML).
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import types
from collections.abc import Callable, Mapping, Sequence
from math import inf
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from utils import __version__
from utils.errors import Refused
from utils.storage import plain, write_text

T = TypeVar("T")

_YAML_MAX_BYTES = 1 << 20
_YAML_MAX_DEPTH = 50  # PyYAML's time grows with the square of it
_MISSING = dataclasses.MISSING


def option(
    default: Any = _MISSING,
    *,
    help: str,
    low: float | None = None,
    high: float | None = None,
    bare: Any = None,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
    aliases: Sequence[str] = (),
    alone: bool = False,
    repeat: bool = False,
) -> Any:
    """A dataclass field that is also a flag.

    default: left out = required. low, high: inclusive limits of a number.
    bare: value when the flag is given without one (CLAM's old bare ``--drop_out``).
    aliases: further spellings, e.g. ``("--slides",)``.
    alone: a switch with which nothing is required (what is not given is then None).
    repeat: of a tuple: the flag given again adds values instead of replacing them.
    """
    metadata = {"help": help, "low": low, "high": high, "bare": bare, "metavar": metavar,
                "choices": choices, "aliases": tuple(aliases), "alone": alone, "repeat": repeat}
    return dataclasses.field(default=default, metadata=metadata, kw_only=True)


# ---------------------------------------------------------------------------- the parser

def parse(kind: type[T], *, prog: str, description: str, argv: Sequence[str] | None = None,
          config_flag: bool = True,
          translate: Callable[[dict[str, Any], str], dict[str, Any]] | None = None) -> T:
    """The options of a script from its command line (and its ``--config`` file).

    translate: (keys of the file, its name) -> keys of ours, for files of other programs
    Raises ``Refused`` for bad values; argparse itself exits with 2 for bad syntax.
    """
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=_Help,
        epilog="exit codes: 0 all done, 2 refused before work, 3 finished with failures, "
               "130/141/143 interrupted")
    parser.add_argument("--version", action="version", version=f"MILwright {__version__}")
    if config_flag:
        parser.add_argument("--config", metavar="YAML",
                            help="yaml file whose keys replace the defaults below")
    hints = get_type_hints(kind)
    for item in dataclasses.fields(kind):  # type: ignore[arg-type]
        _add_flag(parser, item, hints[item.name])
    given = vars(parser.parse_args(argv))
    config = given.pop("config", None)
    values: dict[str, Any] = {}
    if config is not None:
        keys = load_yaml(Path(config))
        if translate is not None:
            keys = translate(keys, str(config))
        values.update(from_mapping(kind, keys, source=str(config)))
    values.update({name: value for name, value in given.items() if value is not argparse.SUPPRESS})
    return build(kind, values)


def build(kind: type[T], values: Mapping[str, Any], *, prefix: str = "--") -> T:
    """An instance of ``kind``, its required fields present and its limits checked.

    prefix: what stands before a field's name in a message: that of a flag, or a place in a file
    """
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    alone = any(item.metadata.get("alone") and values.get(item.name) for item in fields)
    required = {item.name: None for item in fields if item.default is _MISSING}
    for item in fields:
        if item.name in values:
            _check(item, values[item.name], prefix)
        elif item.name in required and not alone:
            raise Refused(f"{prefix}{item.name} is required ({item.metadata['help']})")
    return kind(**{**required, **values})


def pick(kind: type, options: object) -> dict[str, Any]:
    """The values of those fields of ``options`` that ``kind`` has too."""
    return {item.name: getattr(options, item.name) for item in dataclasses.fields(kind)}


class _Help(argparse.RawDescriptionHelpFormatter):  # a docstring keeps its command lines
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=100)


def _add_flag(parser: argparse.ArgumentParser, item: dataclasses.Field[Any], hint: Any) -> None:
    about = item.metadata
    default = None if item.default is _MISSING else item.default
    silent = default in (None, ()) or isinstance(default, bool)
    shown = " ".join(map(str, default)) if isinstance(default, tuple) else default
    text = about["help"] + ("" if silent else f" (default: {shown})")
    names = [f"--{item.name}", *about["aliases"]]
    common: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS,
                              "help": text.replace("%", "%%")}
    inner = _strip_none(hint)
    if inner is bool:
        if default:
            names = [f"--no_{item.name}", *about["aliases"]]
            parser.add_argument(*names, action="store_false", **common)
        else:
            parser.add_argument(*names, action="store_true", **common)
        return
    common["metavar"] = about["metavar"]
    if about["bare"] is not None:
        common.update(nargs="?", const=about["bare"])
    if get_origin(inner) is tuple:
        common.update(nargs="+", **({"action": "extend"} if about["repeat"] else {}))
        inner = get_args(inner)[0]
    choices = get_args(inner) if get_origin(inner) is Literal else about["choices"]
    if choices:
        common["choices"] = list(choices)
        common.pop("metavar")
    elif common["metavar"] is None:
        common["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(inner, "TEXT")
    parser.add_argument(*names, type=_reader(inner), **common)


def _reader(hint: Any) -> Any:
    if get_origin(hint) is Literal:
        return type(get_args(hint)[0])
    if get_origin(hint) is dict:
        return parse_mapping
    return hint


def parse_mapping(text: str) -> dict[str, int]:
    """``normal:0,tumor:1`` as a dictionary."""
    try:
        pairs = [part.rsplit(":", 1) for part in text.split(",") if part.strip()]
        return {name.strip(): int(value) for name, value in pairs}
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not of the form name:0,other:1") from None


def _strip_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        if len(inner) == 1:
            return inner[0]
    return hint


def _check(item: dataclasses.Field[Any], value: Any, prefix: str) -> None:
    low, high = item.metadata.get("low"), item.metadata.get("high")
    for one in value if isinstance(value, tuple | list) else (value,):
        if isinstance(one, bool) or not isinstance(one, int | float):
            continue
        finite = one == one and abs(one) != inf
        if not finite or (low is not None and one < low) or (high is not None and one > high):
            span = (f"from {low} to {high}" if None not in (low, high) else
                    f"at least {low}" if low is not None else
                    f"at most {high}" if high is not None else "a finite number")
            raise Refused(f"{prefix}{item.name} is {one}, expected {span}")


# ---------------------------------------------------------------------------- yaml

def load_yaml(path: Path) -> dict[str, Any]:
    """A small plain YAML mapping, or ``Refused`` (missing, too big, tags, aliases, not a map)."""
    import yaml

    try:
        if path.stat().st_size > _YAML_MAX_BYTES:
            raise Refused(f"{path} is larger than 1 MiB: that is no settings file")
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise Refused(f"{path} is not UTF-8 text") from None
    try:
        _check_tokens(text, path)
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise Refused(f"{path} is not plain YAML ({' '.join(str(error).split())})") from None
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Refused(f"{path} holds a {type(value).__name__}, expected 'key: value' lines")
    return {str(key): item for key, item in value.items()}


def _check_tokens(text: str, path: Path) -> None:
    """``Refused`` for aliases and deep nesting, before a tree is built of them."""
    import yaml

    opening = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken,
               yaml.BlockSequenceStartToken, yaml.BlockMappingStartToken)
    closing = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken, yaml.BlockEndToken)
    depth = 0
    for token in yaml.scan(text, Loader=yaml.SafeLoader):
        if isinstance(token, yaml.AliasToken):
            raise Refused(f"{path} uses YAML aliases (*name): write the value out")
        depth += isinstance(token, opening) - isinstance(token, closing)
        if depth > _YAML_MAX_DEPTH:
            raise Refused(f"{path} is nested too deeply (more than {_YAML_MAX_DEPTH} levels)")


def from_mapping(kind: type, mapping: Mapping[str, Any], *, source: str) -> dict[str, Any]:
    """Values of a YAML section converted to the declared types of ``kind``'s fields.

    Raises ``Refused`` for a key that is no field (naming the nearest) or a value of another type.
    YAML's own guesses do not count: ``1e-4`` is a number where a number is declared.
    """
    hints = get_type_hints(kind)
    known = {item.name: item for item in dataclasses.fields(kind)}
    values = {}
    for key, value in mapping.items():
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
            raise Refused(f"{source}: unknown key '{key}', {hint}")
        values[key] = convert(value, hints[key], where=f"{source}: {key}")
        if known[key].metadata:
            _check(known[key], values[key], f"{source}: ")
    return values


def convert(value: Any, hint: Any, *, where: str) -> Any:
    """One YAML or table value as the declared type, or ``Refused`` naming the place."""
    inner = _strip_none(hint)
    if value is None and inner is not hint:
        return None
    try:
        return _convert(value, inner)
    except (TypeError, ValueError, argparse.ArgumentTypeError):
        name = getattr(inner, "__name__", str(inner))
        if get_origin(inner) is Literal:
            name = "one of " + ", ".join(map(str, get_args(inner)))
        raise Refused(f"{where} is {value!r}, expected {name}") from None


def _convert(value: Any, hint: Any) -> Any:
    origin = get_origin(hint)
    if hint is Any:
        return value
    if origin is Literal:
        if value not in get_args(hint):
            raise ValueError
        return value
    if origin is tuple:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(_convert(item, get_args(hint)[0]) for item in items)
    if origin is dict:
        if isinstance(value, str):
            return parse_mapping(value)
        key_type, item_type = get_args(hint)
        return {_convert(key, key_type): _convert(item, item_type)
                for key, item in dict(value).items()}
    if origin in (Union, types.UnionType):
        for part in get_args(hint):
            try:
                return _convert(value, part)
            except (TypeError, ValueError):
                continue
        raise ValueError
    if hint is bool:
        return _to_bool(value)
    if isinstance(value, bool | dict | list) or value is None:
        raise TypeError
    if hint is int and isinstance(value, float) and value != int(value):
        raise ValueError
    return hint(value)


def _to_bool(value: Any) -> bool:
    words = {"true": True, "false": False, "yes": True, "no": False, "1": True, "0": False}
    word = str(value).strip().lower()
    if word not in words:
        raise ValueError
    return words[word]


# ---------------------------------------------------------------------------- the record

def resolved(options: Any) -> dict[str, Any]:
    """The options as plain values, for saving beside the results."""
    record: dict[str, Any] = plain(dataclasses.asdict(options))
    return record


def save_options(options: Any, path: Path) -> None:
    """Write the resolved options as YAML that ``--config`` takes back."""
    import yaml

    write_text(path, yaml.safe_dump(resolved(options), sort_keys=False, allow_unicode=True))
