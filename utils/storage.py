"""The one place that writes: a file appears whole or not at all.

Bytes go to a uniquely named temporary in the target's folder, are synced, and take the final name
in one step. An h5 image is built in memory first: HDF5 kills the interpreter when a disk fills up
under it. Every h5 carries a commit record (``RECORD_*`` root attributes: schema, tool version,
parameters, digest of the arrays), and "done" means opened and equal, never "exists".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, ItemFailed, Refused
from utils.faults import fault_point
from utils.temporaries import sweep_temporaries, temp_prefix, umask

if TYPE_CHECKING:
    import h5py
    import pandas as pd

SCHEMA_VERSION = 1
RECORD_STATUS, RECORD_SCHEMA = "milwright_status", "milwright_schema"
RECORD_VERSION, RECORD_PARAMETERS = "milwright_version", "milwright_parameters"  # json
RECORD_DIGEST = "milwright_digest"  # sha256 over names, dtypes, shapes and bytes of the arrays


# ---------------------------------------------------------------------------- names and places

def safe_id(text: str, *, what: str = "slide id") -> str:
    """``text`` if it is one safe path component, else ``Refused``.

    Ids come from tables and become file names, so separators, control characters, ``.``, ``..``,
    outer blanks and more than 200 bytes are refused.
    """
    ok = (
        text not in ("", ".", "..") and text == text.strip()
        and not any(sign in "/\\" or not sign.isprintable() for sign in text)
        and len(text.encode("utf-8", "replace")) <= 200
    )
    if not ok:
        raise Refused(f"{what} {text!r} is not a plain name (no slash, backslash, '..', control "
                      "sign or outer blank, at most 200 bytes): rename it in the table")
    return text


def inside(root: Path, *parts: str) -> Path:
    """``root/parts`` resolved, or ``Refused`` when it would leave ``root``."""
    base = Path(root).resolve()
    path = base.joinpath(*parts).resolve()
    if path != base and base not in path.parents:
        raise Refused(f"{Path(*parts)} would leave the folder {root}: give a name inside it")
    return Path(root).joinpath(*parts)


def writable_folder(path: Path, *, what: str) -> Path:
    """Create the folder if need be and prove that it can be written, or ``Refused``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path, prefix=temp_prefix()):
            pass
    except OSError as error:
        raise Refused(f"{what} {path} cannot be written ({error.strerror}): "
                      "choose another folder or change its permissions") from None
    sweep_temporaries(path)
    return path


# ---------------------------------------------------------------------------- atomic writing

@contextlib.contextmanager
def atomic_file(path: Path, *, durable: bool = True) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` when the block ends well, and vanishes when not.

    ``durable`` False does not wait for the disk: a power cut may leave it empty.
    Raises OSError (no space, read-only), ItemFailed when the folder is gone.
    """
    path = Path(path)
    try:
        handle, temp = tempfile.mkstemp(dir=path.parent, prefix=temp_prefix())
    except (FileNotFoundError, NotADirectoryError):
        raise ItemFailed(f"{path} cannot be written, its folder is gone: was it moved or unmounted "
                         "while we worked?") from None
    try:
        with os.fdopen(handle, "wb") as file:
            fault_point("storage.open")
            yield file
            file.flush()
            fault_point("storage.write")
            if durable:
                os.fsync(file.fileno())
        os.chmod(temp, 0o666 & ~umask())
        fault_point("storage.replace")
        os.replace(temp, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temp)
        raise
    if durable:
        _sync_folder(path.parent)
    fault_point("storage.done")


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system lets a folder be synced
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_bytes(path: Path, data: bytes | memoryview, *, durable: bool = True) -> None:
    """Write ``data`` to ``path``, whole or not at all; ``durable`` as in ``atomic_file``."""
    with atomic_file(path, durable=durable) as file:
        file.write(data)


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Readable json; NaN and infinity become null, NumPy scalars and arrays plain values."""
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def plain(value: Any) -> Any:
    """Tables of plain Python values out of NumPy scalars, arrays, tuples, paths and enums."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value


def read_json(path: Path) -> Any:
    """A json file of ours, or ``BrokenFile``."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BrokenFile(f"{path} is not readable json ({error})") from None


def write_image(path: Path, rgb: np.ndarray, *, quality: int = 95) -> Path:
    """An RGB or grey uint8 image (H, W[, 3]) as the suffix says (.jpg, .png); returns its path.

    JPEG cannot hold a side above 65,500 px: such an image is written as PNG beside it.
    """
    import cv2

    path = Path(path)
    if path.suffix.lower() in (".jpg", ".jpeg") and max(rgb.shape[:2]) > 65_500:
        path = path.with_suffix(".png")
    bgr = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR) if rgb.ndim == 3 else rgb
    settings = [] if path.suffix.lower() == ".png" else [cv2.IMWRITE_JPEG_QUALITY, quality]
    done, data = cv2.imencode(path.suffix, bgr, settings)
    if not done:
        raise OSError(f"{path}: the image could not be encoded")
    write_bytes(path, data.tobytes())
    return path


# ---------------------------------------------------------------------------- tables

def write_table(path: Path, table: pd.DataFrame, *, index: bool = False) -> None:
    """A csv, whole or not at all."""
    write_text(path, table.to_csv(index=index))


def read_table(path: Path, *, what: str = "table") -> pd.DataFrame:
    """A csv with every cell as text, byte for byte; empty cells are ``''``.

    The separator (``,`` ``;`` tab) is taken from the header; a byte-order mark and UTF-16 are
    understood. ``Refused`` when the file is missing, empty or not a table.
    """
    import pandas as pd

    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise Refused(f"{what} {path} cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(f"{what} {path} is neither UTF-8 nor UTF-16 text: save it as UTF-8 csv"
                      ) from None
    header = text.lstrip().split("\n", 1)[0]
    separator = max(",;\t", key=header.count)
    try:
        table = pd.read_csv(BytesIO(text.encode()), sep=separator, dtype=str,
                            keep_default_na=False, na_filter=False)
    except (ValueError, pd.errors.ParserError) as error:
        first = str(error).splitlines()[0]
        raise Refused(f"{what} {path} is not a csv table ({first})") from None
    if not isinstance(table.index, pd.RangeIndex):  # pandas shifts them
        raise Refused(f"{what} {path} has rows with more cells than its header: quote cells that "
                      "hold the separator")
    table.columns = [str(name).strip() for name in table.columns]
    return table


# ---------------------------------------------------------------------------- h5 with a record

@dataclass(frozen=True)
class H5Data:
    """Arrays of an h5 file, the attributes of each, those of the root, and its record."""

    arrays: dict[str, np.ndarray]
    attrs: dict[str, dict[str, Any]] = field(default_factory=dict)
    root: dict[str, Any] = field(default_factory=dict)

    @property
    def parameters(self) -> dict[str, Any] | None:
        """What the file was made with, or None for a file that is not ours."""
        text = self.root.get(RECORD_PARAMETERS)
        return None if text is None else json.loads(text)


class State(Enum):
    """What a result file on disk is, seen from the parameters of this run."""

    MISSING = "missing"
    DONE = "done"
    OTHER = "other parameters"  # complete, made with other parameters
    FOREIGN = "no record"  # readable, but not written by this toolkit
    BROKEN = "broken"


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """sha256 over names, dtypes, shapes and bytes, in name order."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        total.update(array.reshape(-1).view(np.uint8).data if array.size else b"")
    return total.hexdigest()


def write_h5(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    parameters: Mapping[str, Any],
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
    root: Mapping[str, Any] | None = None,
    chunk_rows: Mapping[str, int] | None = None,
    extend: Callable[[h5py.File], None] | None = None,
) -> None:
    """Write arrays with a commit record, whole or not at all.

    ``attrs`` maps an array's name to attributes of that data set; ``parameters`` is what
    ``h5_state`` compares later. First axes are resizable (as CLAM's), checksummed by chunk of
    8192 rows, or as ``chunk_rows`` says. ``extend`` may add groups, outside the record.
    """
    import h5py

    image = BytesIO()
    with h5py.File(image, "w") as file:
        for name, array in arrays.items():
            rows = max(1, min((chunk_rows or {}).get(name, 8192), len(array)))
            data = file.create_dataset(
                name, data=array, maxshape=(None, *array.shape[1:]),
                chunks=(rows, *array.shape[1:]), fletcher32=array.size > 0,
                compression="gzip" if array.dtype.kind == "S" else None)
            for key, value in (attrs or {}).get(name, {}).items():
                data.attrs[key] = value
        if extend is not None:
            extend(file)
        for key, value in (root or {}).items():
            file.attrs[key] = value
        file.attrs[RECORD_SCHEMA] = SCHEMA_VERSION
        file.attrs[RECORD_VERSION] = __version__
        file.attrs[RECORD_PARAMETERS] = canonical(parameters)
        file.attrs[RECORD_DIGEST] = digest(arrays)
        file.attrs[RECORD_STATUS] = "complete"
    write_bytes(path, image.getbuffer())


def canonical(parameters: Mapping[str, Any]) -> str:
    """Parameters as sorted compact json: equal text means equal parameters."""
    return json.dumps(plain(parameters), sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def read_h5(path: Path, *, verify: bool = True) -> H5Data:
    """Everything in an h5 file, or ``BrokenFile`` (missing, truncated, altered, half-written).

    A file of ours is checked against its digest when ``verify``; a foreign one (CLAM's) is read
    as it is and has ``parameters is None``.
    """
    import h5py

    try:
        with h5py.File(path, "r", locking=False) as file:
            names = [n for n in file if isinstance(n, str) and isinstance(file[n], h5py.Dataset)]
            data = H5Data(
                arrays={name: file[name][()] for name in names},
                attrs={name: dict(file[name].attrs) for name in names},
                root=dict(file.attrs))
    except FileNotFoundError:
        raise BrokenFile(f"{path} is missing") from None
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise BrokenFile(f"{path} cannot be read ({error}): it is truncated, damaged or no h5 "
                         "file") from None
    if RECORD_PARAMETERS in data.root or RECORD_STATUS in data.root:
        if data.root.get(RECORD_STATUS) != "complete":
            raise BrokenFile(f"{path} was never finished")
        if verify and digest(data.arrays) != data.root.get(RECORD_DIGEST):
            raise BrokenFile(f"{path} fails its checksum: its data were altered after writing")
    return data


def h5_state(path: Path, parameters: Mapping[str, Any], *, verify: bool = True) -> State:
    """Is ``path`` the finished result of these parameters? Opens and compares."""
    if not Path(path).exists():
        return State.MISSING
    try:
        found = read_h5(path, verify=verify).parameters
    except BrokenFile:
        return State.BROKEN
    same = found is not None and canonical(found) == canonical(parameters)
    return State.FOREIGN if found is None else State.DONE if same else State.OTHER


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """``name: file has A, you ask B`` for what differs, for a message."""
    found, wanted = plain(found), plain(wanted)
    names = [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]
    return "; ".join(f"{name}: file has {found.get(name)!r}, you ask {wanted.get(name)!r}"
                     for name in names)


# ---------------------------------------------------------------------------- torch files

def save_torch(path: Path, value: Any) -> None:
    """``torch.save`` of tensors and plain values, whole or not at all."""
    import torch

    buffer = BytesIO()
    torch.save(value, buffer)
    write_bytes(path, buffer.getbuffer())


def load_torch(path: Path, *, mmap: bool = False) -> Any:
    """Tensors and plain values on the CPU, or ``BrokenFile``. Pickled objects are refused."""
    import pickle

    import torch

    warnings.filterwarnings("ignore", message="Detected pickle protocol")  # refused below anyway
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except FileNotFoundError:
        raise BrokenFile(f"{path} is missing") from None
    except pickle.UnpicklingError:
        raise BrokenFile(f"{path} holds objects that could run code, or is no torch file: "
                         "refused (only tensors and plain values are loaded)") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BrokenFile(f"{path} cannot be read ({first}): it is truncated or no torch file"
                         ) from None


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_bytes(folder: Path) -> int:
    """Free space where ``folder`` lies."""
    return shutil.disk_usage(folder).free
