"""A folder of splits: what belongs in it, whether that is there, and writing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets.splits import RECORD, Split, read_split, split_files, split_folder_name
from datasets.table import SlideTable, listed
from datasets.tasks import Task
from utils import __version__
from utils.errors import BrokenFile, Refused
from utils.options import option
from utils.storage import (
    canonical,
    differences,
    read_json,
    writable_folder,
    write_json,
    write_text,
)


@dataclass(frozen=True, kw_only=True)
class SplitPlace:
    """Flags that say where the splits of a training lie."""

    label_frac: float = option(1.0, help="share of training labels: names the split folder",
                               low=0, high=1)
    splits_root: Path = option(Path("splits"), help="folder that holds the folders of splits")
    split_dir: str | None = option(None, help="folder under --splits_root, or a path (default: "
                                   "<task>_<percent of labels>)")


def find_split_folder(splits_root: Path, split_dir: str | None = None, *, task: Task,
                      label_frac: float = 1.0) -> Path:
    """See ``SplitPlace``; ``Refused`` with the command that makes it, where there is none."""
    name = split_dir or split_folder_name(task.name, label_frac)
    for path in (splits_root / name, Path(name)):
        if path.is_dir():
            return path
    raise Refused(f"split folder {splits_root / name} does not exist: make it with python "
                  f"create_splits_seq.py --task {task.name} (or {task.flags}), or name one with "
                  "--split_dir")


@dataclass(frozen=True)
class SplitFolder:
    """Where splits go, the parameters that make them, and the text of every file."""

    path: Path
    parameters: Mapping[str, Any]
    splits: Sequence[Split]
    files: Mapping[str, str]

    @classmethod
    def of(cls, path: Path, splits: Sequence[Split], table: SlideTable,
           parameters: Mapping[str, Any]) -> SplitFolder:
        """The folder that these splits make."""
        files = {name: text for fold, split in enumerate(splits)
                 for name, text in split_files(fold, split, table).items()}
        return cls(path, parameters, splits, files)

    def _others(self) -> list[Path]:
        """Split files there that these parameters would not give."""
        return [path for path in sorted(self.path.glob("splits_*.csv"))
                if path.read_bytes() != self.files.get(path.name, "").encode()]

    def is_done(self, *, overwrite: bool = False) -> bool:
        """Is every file there and equal? ``Refused`` when other splits are in the way.

        Equal files without a record (CLAM's) are taken over; missing ones are simply not done.
        """
        others = self._others()
        record = _recorded(self.path)
        same = record is None or canonical(record) == canonical(self.parameters)
        if (others or not same) and not overwrite:
            what = (f"made with other parameters ({differences(record or {}, self.parameters)})"
                    if not same else "that differ from what these parameters give: "
                    + listed(path.name for path in others))
            raise Refused(f"{self.path} holds splits {what}: choose another --split_dir, or "
                          "replace them with --overwrite")
        complete = all((self.path / name).exists() for name in self.files)
        return not others and same and record is not None and complete

    def write(self, table: SlideTable, *, csv_path: Path) -> None:
        """Clear what is of other parameters, write, and read everything back, checked."""
        writable_folder(self.path, what="split folder")
        for path in (self.path / RECORD, *self._others()):  # first: a kill leaves no mixture
            path.unlink(missing_ok=True)
        write_json(self.path / RECORD, {"version": __version__, "csv_path": csv_path,
                                        "parameters": self.parameters})
        for name, text in self.files.items():
            write_text(self.path / name, text)
        for fold, split in enumerate(self.splits):
            path = self.path / f"splits_{fold}.csv"
            found = read_split(path, table).parts()
            if any(set(ids) != set(found[part]) for part, ids in split.parts().items()):
                raise BrokenFile(f"{path} does not read back as it was written")


def _recorded(folder: Path) -> Mapping[str, Any] | None:
    """Parameters in the folder's record, or None without a readable one."""
    try:
        parameters: Mapping[str, Any] = read_json(folder / RECORD)["parameters"]
    except (BrokenFile, KeyError, TypeError):
        return None
    return parameters
