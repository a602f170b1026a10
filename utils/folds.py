"""An experiment folder: which file is what, which folds are finished, and with what settings.

``s_{k}_checkpoint.json`` is written last and says that fold k is complete; ``{k}/state.pt`` says
that it was begun. ``s_{k}_ema_*`` and ``split_{k}_ema_*`` are of the running mean of the weights.
Folds of other settings are never mixed in, nor replaced unless asked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from utils import __version__
from utils.errors import BrokenFile, Refused
from utils.objectives import TASK_LOSSES, TaskType
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

# Settings in which folds of one experiment may differ; the last four come from training slides
_OF_ONE_FOLD = ("slides", "n_patches", "left_out", "class_weights", "bin_edges", "target_mean",
                "target_std", "start_sha256")


class FoldState(str, Enum):
    """How far a fold is."""

    NEW = "new"
    STARTED = "started"  # killed, or failed: goes on from its last whole epoch
    DONE = "done"
    REPLACED = "replaced"  # to be trained anew, because --overwrite was given


@dataclass(frozen=True)
class FoldFiles:
    """The files of one fold, by CLAM's names.

    averaged: those of the running mean of the weights, where it is tested beside them
    """

    folder: Path
    fold: int
    averaged: bool = False

    @property
    def of_mean(self) -> FoldFiles:
        """The checkpoint, record and results of the running mean of the weights."""
        return replace(self, averaged=True)

    @property
    def _name(self) -> str:
        return f"{self.fold}_ema" if self.averaged else str(self.fold)

    @property
    def checkpoint(self) -> Path:
        """The bare state dict."""
        return self.folder / f"s_{self._name}_checkpoint.pt"

    @property
    def record(self) -> Path:
        """What the checkpoint is: model, classes, encoder, settings, metrics."""
        return self.folder / f"s_{self._name}_checkpoint.json"

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
        """Test predictions: CLAM's pickle (classes only; never read here), and csv."""
        stem = f"split_{self._name}_results"
        return self.folder / f"{stem}.pkl", self.folder / f"{stem}.csv"

    def clear(self) -> None:
        """Remove the fold; what is left at any moment does not look finished."""
        self.record.unlink(missing_ok=True)
        discard_state(self.work)
        for one in (self.of_mean, self):
            others = self.folder.glob(f"{one.checkpoint.stem}_epoch_*.pt")  # of --save_top_k
            for path in (one.record, one.checkpoint, *others, *one.results, one.split):
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
    both = str(settings.get("test_type")).startswith("both")
    if not all(_unaltered(one) for one in ((files, files.of_mean) if both else (files,))):
        return "has files that are missing or were altered after training"
    return ""


def _unaltered(files: FoldFiles) -> bool:
    """Are the files there that belong to the record, and is the checkpoint the one it names?"""
    try:
        record = read_json(files.record)
    except BrokenFile:
        return False
    as_pickle, as_csv = files.results
    needed = [files.checkpoint, files.split, as_csv]
    needed += [as_pickle] if record["task_type"] == "classification" else []
    return (all(path.is_file() for path in needed)
            and file_sha256(files.checkpoint) == record["checkpoint_sha256"])


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

def write_results(files: FoldFiles, predictions: Predictions, *,
                  task_type: TaskType = "classification", names: Sequence[str] = ()) -> None:
    """Test predictions as csv, one row a slide; see ``_truth_columns`` and ``_score_columns``.

    For classification also as CLAM's pickle (slide id -> its id, prob (1, C), label).
    names: of the labels (multilabel); their numbers where there are none
    """
    import pandas as pd

    as_pickle, as_csv = files.results
    if task_type == "classification":
        rows = zip(predictions.slide_ids, predictions.scores, predictions.labels, strict=True)
        write_bytes(as_pickle, pickle.dumps({
            slide_id: {"slide_id": np.array(slide_id), "prob": row[None], "label": int(label)}
            for slide_id, row, label in rows}))
    write_table(as_csv, pd.DataFrame({
        "slide_id": predictions.slide_ids, **_truth_columns(predictions, task_type, names),
        **_score_columns(predictions.scores, task_type)}))


def _truth_columns(predictions: Predictions, task_type: TaskType, names: Sequence[str]
                   ) -> dict[str, np.ndarray]:
    """Y and Y_hat; y_<label>; y_<i>; or time and event."""
    if task_type == "classification":
        scores = predictions.scores
        return {"Y": predictions.labels,
                "Y_hat": scores.argmax(axis=1) if scores.size else np.zeros(0, np.int64)}
    columns = predictions.truths.T
    if task_type == "survival":
        return dict(zip(("time", "event"), columns, strict=False))
    named = names if task_type == "multilabel" and len(names) == len(columns) else ()
    return {f"y_{name}": column
            for name, column in zip(named or range(len(columns)), columns, strict=True)}


def _score_columns(scores: np.ndarray, task_type: TaskType) -> dict[str, np.ndarray]:
    """p_<i> (classes, labels), yhat_<i> (values), or risk and S_1 ... (survival)."""
    if task_type == "survival":
        return {"risk" if index == 0 else f"S_{index}": column
                for index, column in enumerate(scores.T)}
    stem = "yhat" if task_type == "regression" else "p"
    return {f"{stem}_{index}": column for index, column in enumerate(scores.T)}


def write_record(files: FoldFiles, record: Mapping[str, Any]) -> None:
    """Write what the checkpoint is."""
    write_json(files.record, {**record, "fold": files.fold, "version": __version__,
                              "checkpoint_sha256": file_sha256(files.checkpoint)})


def finish_fold(files: FoldFiles, record: Mapping[str, Any]) -> None:
    """Write the record, by which the fold is complete, and drop its training state."""
    write_record(files, record)
    discard_state(files.work)


def fold_rows(files: FoldFiles, *, status: Status) -> list[Row]:
    """Rows of a finished fold: itself with its figures, and each slide it had to do without."""
    return [Row(item=f"fold {files.fold}", status=status,
                numbers=dict(read_summary(files))),
            *(Row(item=slide, status=Status.FAILED, reason=reason)
              for slide, reason in read_json(files.record)["failures"].items())]


def read_summary(files: FoldFiles) -> dict[str, float]:
    """``test_<figure>`` and ``val_<figure>`` of a finished fold; NaN for what is not defined."""
    headline = read_json(files.record)["headline"]
    found = {f"{part}_{key}": headline[part][key] for key in headline["test"]
             for part in ("test", "val")}
    return {name: float("nan") if value is None else float(value) for name, value in found.items()}


def write_summary(folder: Path, *, folds: range, k: int) -> str:
    """Write ``summary.csv``, or ``summary_partial_{start}_{end}.csv`` for some of ``k`` folds.

    Returns the table for a terminal, with mean and standard deviation. A fold that is not
    finished has empty cells.
    """
    import pandas as pd

    found = {fold: read_summary(files) for fold in folds
             if (files := FoldFiles(folder, fold)).record.exists()}
    columns = list(next(iter(found.values()), {}))
    nothing = dict.fromkeys(columns, float("nan"))
    rows = [{"folds": fold, **found.get(fold, nothing)} for fold in folds]
    name = "summary.csv" if len(folds) == k else f"summary_partial_{folds.start}_{folds.stop}.csv"
    write_table(folder / name, pd.DataFrame(rows), index=True)
    return _format_summary(rows, columns)


def _format_summary(rows: Sequence[Mapping[str, float]], columns: Sequence[str]) -> str:
    lines = ["fold  " + "".join(f"{column:>17}" for column in columns)]
    lines += [f"{row['folds']:<6}" + "".join(f"{row[column]:17.4f}" for column in columns)
              for row in rows]
    cells = []
    for column in columns:
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
    """``experiment_<exp_code>.txt``: the Python form of one dictionary, with CLAM's keys.

    A ``bag_loss`` that was left out is named: the usual one of the task.
    """
    names = [*_CLAM_SETTINGS, *_LEFT_OUT_BY_CLAM]
    if "clam" in options["model_type"]:
        names += _CLAM_SETTINGS_OF_CLAM
    settings = {"num_splits": options["k"], "task": task, "results_dir": options["results_dir"],
                "experiment": exp_code, "use_drop_out": options["drop_out"],
                "split_dir": str(split_dir), **{name: options[name] for name in names},
                "bag_loss": options["bag_loss"] or TASK_LOSSES[
                    options.get("task_type") or "classification"][0]}
    write_text(folder / f"experiment_{exp_code}.txt", f"{settings!r}\n")
