"""utils.options: one dataclass makes the parser, reads the YAML and says what is wrong."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from utils.errors import Refused
from utils.options import load_yaml, option, parse, resolved, save_options


@dataclass(frozen=True, kw_only=True)
class Example:
    source: Path = option(help="folder")
    lr: float = option(1e-4, help="learning rate", low=0)
    k: int = option(10, help="folds", low=1, high=50)
    seg: bool = option(False, help="segment")
    auto_skip: bool = option(True, help="do not skip")
    kind: Literal["a", "b"] = option("a", help="kind")
    drop_out: float = option(0.25, help="dropout", bare=0.25)
    label_dict: dict[str, int] | None = option(None, help="labels")
    names: tuple[str, ...] = option((), help="names")
    preset: str | None = option(None, help="preset")


def read(*argv: str) -> Example:
    return parse(Example, prog="x.py", description="x", argv=list(argv))


def test_defaults_and_flags() -> None:
    options = read("--source", "s")
    assert options == Example(source=Path("s"))
    options = read("--source", "s", "--seg", "--no_auto_skip", "--lr", "2e-4", "--kind", "b",
                   "--drop_out", "--label_dict", "normal:0,tumor: 1", "--names", "x", "y")
    assert options.seg and not options.auto_skip and options.kind == "b"
    assert (options.lr, options.drop_out) == (2e-4, 0.25)
    assert options.label_dict == {"normal": 0, "tumor": 1} and list(options.names) == ["x", "y"]


@pytest.mark.parametrize("argv", [("--lr", "-1"), ("--k", "0"), ("--k", "51"), ("--lr", "nan"),
                                  ("--lr", "inf")])
def test_limits(argv: tuple[str, ...]) -> None:
    with pytest.raises(Refused, match=argv[0]):
        read("--source", "s", *argv)


def test_required() -> None:
    with pytest.raises(Refused, match="--source is required"):
        read()


def test_yaml_replaces_defaults_and_the_command_line_wins(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("source: s\nlr: 1e-3\nk: 5\nseg: yes\nlabel_dict: {a: 0, b: 1}\n")
    options = read("--config", str(config), "--k", "7")
    assert (options.lr, options.k, options.seg) == (1e-3, 7, True)
    assert options.label_dict == {"a": 0, "b": 1}


@pytest.mark.parametrize(("text", "message"), [
    ("lrr: 1", "did you mean 'lr'"),
    ("lr: fast", "expected float"),
    ("k: 2.5", "expected int"),
    ("kind: c", "one of a, b"),
    ("k: 0", "c.yaml: k is 0, expected from 1"),
    ("- 1\n- 2", "expected 'key: value'"),
    ("lr: !!python/object/apply:os.system ['true']", "not plain YAML"),
    ("a: &x [1]\nb: *x", "aliases"),
    ("lr: [", "not plain YAML"),
    ("a: " + "[" * 3000 + "]" * 3000, "nested"),
])
def test_bad_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(Refused, match=message):
        read("--source", "s", "--config", str(config))


def test_large_or_missing_yaml(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_text("a: " + "x" * (1 << 20))
    with pytest.raises(Refused, match="1 MiB"):
        load_yaml(big)
    with pytest.raises(Refused, match="cannot be read"):
        load_yaml(tmp_path / "none.yaml")


def test_saved_options_come_back(tmp_path: Path) -> None:
    options = read("--source", "s", "--lr", "3e-4", "--label_dict", "a:0", "--names", "x")
    save_options(options, tmp_path / "o.yaml")
    again = read("--config", str(tmp_path / "o.yaml"))
    assert resolved(again) == resolved(options)


@dataclass(frozen=True, kw_only=True)
class Tabled(Example):
    table: bool = option(False, alone=True, help="print the table")
    plugins: tuple[Path, ...] = option((), repeat=True, help="files")
    models: tuple[str, ...] = option(("a", "b"), help="names")


def test_a_switch_that_stands_alone_needs_nothing_else() -> None:
    found = parse(Tabled, prog="x.py", description="x", argv=["--table"])
    assert found.table and found.source is None
    with pytest.raises(Refused, match="--source is required"):
        parse(Tabled, prog="x.py", description="x", argv=["--plugins", "a.py"])


def test_a_flag_given_again_adds_or_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    found = parse(Tabled, prog="x.py", description="x", argv=[
        "--table", "--plugins", "a.py", "b.py", "--plugins", "c.py", "--models", "x", "--models",
        "y"])
    assert [str(path) for path in found.plugins] == ["a.py", "b.py", "c.py"]
    assert list(found.models) == ["y"]
    with pytest.raises(SystemExit):
        parse(Tabled, prog="x.py", description="x", argv=["--help"])
    assert "names (default: a b)" in capsys.readouterr().out
