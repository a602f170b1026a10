"""An experiment folder: which file is what, which folds are finished, and with what settings.

``s_{k}_checkpoint.json`` is written last and says that fold k is complete; ``{k}/state.pt`` says
that it was begun. Folds of other settings are never mixed in, nor replaced unless asked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, Refused
from utils.report import Row, Status
from utils.storage import (
    differences,
    file_sha256,
    read_json,
    write_bytes,
    write_json,
    write_table,
    write_text,
)
from utils.training_state import STATE_FILE, discard_state, load_state, same_parameters

if TYPE_CHECKING:
    from utils.engine import Predictions

SUMMARY_COLUMNS = ("test_auc", "val_auc", "test_acc", "val_acc")
# Settings in which folds of one experiment may differ
_OF_ONE_FOLD = ("slides", "n_patches", "left_out")


class FoldState(str, Enum):
    """How far a fold is."""

    NEW = "new"
    STARTED = "started"  # killed, or failed: goes on from its last whole epoch
    DONE = "done"
    REPLACED = "replaced"  # to be trained anew, because --overwrite was given


@dataclass(frozen=True)
class FoldFiles:
    """The files of one fold, by CLAM's names."""

    folder: Path
    fold: int

    @property
    def checkpoint(self) -> Path:
        """The bare state dict."""
        return self.folder / f"s_{self.fold}_checkpoint.pt"

    @property
    def record(self) -> Path:
        """What the checkpoint is: model, classes, encoder, settings, metrics."""
        return self.folder / f"s_{self.fold}_checkpoint.json"

    @property
    def work(self) -> Path:
        """Folder of the TensorBoard log and, while training, of the state."""
        return self.folder / str(self.fold)

    @property
    def split(self) -> Path:
        """The split that was used."""
        return self.folder / f"splits_{self.fold}.csv"

    @property
    def results(self) -> tuple[Path, Path]:
        """Test predictions: CLAM's pickle (for its readers; never read here), and csv."""
        stem = f"split_{self.fold}_results"
        return self.folder / f"{stem}.pkl", self.folder / f"{stem}.csv"

    def clear(self) -> None:
        """Remove the fold; what is left at any moment does not look finished."""
        self.record.unlink(missing_ok=True)
        discard_state(self.work)
        for path in (self.checkpoint, *self.results, self.split):
            path.unlink(missing_ok=True)


def fold_range(k: int, *, k_start: int, k_end: int) -> range:
    """CLAM's folds: ``k_end`` exclusive, -1 means from the first, to the last."""
    first, end = (0 if k_start == -1 else k_start), (k if k_end == -1 else k_end)
    if not 0 <= first < end <= k:
        raise Refused(f"--k_start {k_start} --k_end {k_end} with --k {k} is no range of folds: "
                      f"expected 0 <= k_start < k_end <= {k} (k_end is not included)")
    return range(first, end)


# ---------------------------------------------------------------------------- what is there

def fold_state(files: FoldFiles, settings: Mapping[str, Any], *, overwrite: bool,
               readable: Callable[[str], bool]) -> FoldState:
    """How far the fold is with these settings.

    readable: can this slide's bag be read now? Asked of slides that a finished fold had to do
    without. Raises ``Refused`` for other settings, or files of unknown origin, unless
    ``overwrite``.
    """
    if files.record.exists():
        problem = _problem_of_finished(files, settings, readable)
        if not problem:
            return FoldState.DONE
    elif (files.work / STATE_FILE).exists():
        problem = _problem_of_begun(files, settings)
        if not problem:
            return FoldState.STARTED
    elif files.checkpoint.exists():
        problem = f"has a checkpoint of unknown origin ({files.record.name} is missing)"
    else:
        return FoldState.NEW
    if overwrite:
        return FoldState.REPLACED
    raise Refused(f"fold {files.fold} in {files.folder} {problem}: choose another --exp_code, or "
                  "train it anew with --overwrite")


def _problem_of_finished(files: FoldFiles, settings: Mapping[str, Any],
                         readable: Callable[[str], bool]) -> str:
    """Why a fold with a record cannot count as finished for these settings, or ''."""
    try:
        record = read_json(files.record)
    except BrokenFile as error:
        return f"has a damaged record ({error})"
    found = record.get("settings", {})
    if not same_parameters(found, settings):
        return f"was trained with other settings ({differences(found, settings)})"
    repaired = [slide for slide in record["failures"] if readable(slide)]
    if repaired:
        return f"was trained without {', '.join(repaired)}, which can be read now"
    if not (all(path.is_file() for path in (files.checkpoint, files.split, *files.results))
            and file_sha256(files.checkpoint) == record["checkpoint_sha256"]):
        return "has files that are missing or were altered after training"
    return ""


def _problem_of_begun(files: FoldFiles, settings: Mapping[str, Any]) -> str:
    """Why a fold cannot go on from its state with these settings, or ''."""
    try:
        state = load_state(files.work)
    except BrokenFile as error:
        return f"was begun, but its state is damaged ({error})"
    if state is None or same_parameters(state.parameters, settings):
        return ""
    return f"was begun with other settings ({differences(state.parameters, settings)})"


def check_other_folds(folder: Path, folds: range, settings: Mapping[str, Any]) -> None:
    """``Refused`` when folds outside this run were trained with other settings."""
    wanted = {name: value for name, value in settings.items() if name not in _OF_ONE_FOLD}
    for path in sorted(folder.glob("s_*_checkpoint.json")):
        record = read_json(path)
        if record.get("fold") in folds:
            continue
        found = {name: value for name, value in record.get("settings", {}).items()
                 if name not in _OF_ONE_FOLD}
        if not same_parameters(found, wanted):
            raise Refused(f"fold {record.get('fold')} in {folder} was trained with other settings "
                          f"({differences(found, wanted)}): choose another --exp_code")


# ---------------------------------------------------------------------------- writing

def write_results(files: FoldFiles, predictions: Predictions) -> None:
    """Test predictions as CLAM's pickle (slide id -> its id, prob (1, C), label) and as csv."""
    import pandas as pd

    rows = list(zip(predictions.slide_ids, predictions.probabilities, predictions.labels,
                    strict=True))
    as_pickle, as_csv = files.results
    write_bytes(as_pickle, pickle.dumps({
        slide_id: {"slide_id": np.array(slide_id), "prob": row[None], "label": int(label)}
        for slide_id, row, label in rows}))
    write_table(as_csv, pd.DataFrame({
        "slide_id": predictions.slide_ids, "Y": predictions.labels,
        "Y_hat": predictions.probabilities.argmax(axis=1) if rows else [],
        **{f"p_{index}": column for index, column in enumerate(predictions.probabilities.T)}}))


def finish_fold(files: FoldFiles, record: Mapping[str, Any]) -> None:
    """Write the record, by which the fold is complete, and drop its training state."""
    write_json(files.record, {**record, "fold": files.fold, "version": __version__,
                              "checkpoint_sha256": file_sha256(files.checkpoint)})
    discard_state(files.work)


def fold_rows(files: FoldFiles, *, status: Status) -> list[Row]:
    """Rows of a finished fold: itself with its figures, and each slide it had to do without."""
    return [Row(item=f"fold {files.fold}", status=status,
                numbers=dict(read_summary(files))),
            *(Row(item=slide, status=Status.FAILED, reason=reason)
              for slide, reason in read_json(files.record)["failures"].items())]


def read_summary(files: FoldFiles) -> dict[str, float]:
    """Test and validation AUC and accuracy of a finished fold; NaN for what is not defined."""
    metrics = read_json(files.record)["metrics"]
    found = {f"{part}_{short}": metrics[part][name] for part in ("test", "val")
             for short, name in (("auc", "auc"), ("acc", "accuracy"))}
    return {name: float("nan") if found[name] is None else float(found[name])
            for name in SUMMARY_COLUMNS}


def write_summary(folder: Path, *, folds: range, k: int) -> str:
    """Write ``summary.csv``, or ``summary_partial_{start}_{end}.csv`` for some of ``k`` folds.

    Returns the table for a terminal, with mean and standard deviation. A fold that is not
    finished has empty cells.
    """
    import pandas as pd

    found = {fold: read_summary(files) for fold in folds
             if (files := FoldFiles(folder, fold)).record.exists()}
    nothing = dict.fromkeys(SUMMARY_COLUMNS, float("nan"))
    rows = [{"folds": fold, **found.get(fold, nothing)} for fold in folds]
    name = "summary.csv" if len(folds) == k else f"summary_partial_{folds.start}_{folds.stop}.csv"
    write_table(folder / name, pd.DataFrame(rows), index=True)
    return _format_summary(rows)


def _format_summary(rows: Sequence[Mapping[str, float]]) -> str:
    lines = ["fold  " + "".join(f"{column:>17}" for column in SUMMARY_COLUMNS)]
    lines += [f"{row['folds']:<6}" + "".join(f"{row[column]:17.4f}" for column in SUMMARY_COLUMNS)
              for row in rows]
    cells = []
    for column in SUMMARY_COLUMNS:
        known = [row[column] for row in rows if not np.isnan(row[column])]
        cells.append(f"{np.mean(known):.4f} ± {np.std(known):.4f}" if known else "not defined")
    lines.append("mean  " + "".join(f"{cell:>17}" for cell in cells))
    return "\n".join(lines)


_CLAM_SETTINGS = ("k_start", "k_end", "max_epochs", "lr", "reg", "label_frac", "bag_loss", "seed",
                  "model_type", "model_size", "weighted_sample", "opt")
_CLAM_SETTINGS_OF_CLAM = ("bag_weight", "inst_loss", "B")
_LEFT_OUT_BY_CLAM = ("embed_dim", "early_stopping", "subtyping", "no_inst_cluster")


def write_settings(folder: Path, exp_code: str, options: Mapping[str, Any], *, task: str,
                   split_dir: Path) -> None:
    """``experiment_<exp_code>.txt``: the Python form of one dictionary, with CLAM's keys."""
    names = [*_CLAM_SETTINGS, *_LEFT_OUT_BY_CLAM]
    if "clam" in options["model_type"]:
        names += _CLAM_SETTINGS_OF_CLAM
    settings = {"num_splits": options["k"], "task": task, "results_dir": options["results_dir"],
                "experiment": exp_code, "use_drop_out": options["drop_out"],
                "split_dir": str(split_dir), **{name: options[name] for name in names}}
    write_text(folder / f"experiment_{exp_code}.txt", f"{settings!r}\n")
