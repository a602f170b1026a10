"""Patches of slides at one or two magnifications, checked up front: ``FeatureStore`` for models
that encode patches themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets.features import FeatureStore, StoreCheck
from datasets.patch_sources import PatchSource, SlideFacts, open_source, shared_facts
from datasets.table import listed
from utils.errors import ItemFailed, Refused

TestScales = Literal["high", "both"]
SLIDE_EXT = ".svs"  # default of --slide_ext


@dataclass(kw_only=True)
class PatchStore:
    """Where patches are. high: those that every bag has; low: of a lower magnification, None
    without; test_scales: whether bags for evaluation have those too; num_workers: threads that
    read a bag. Pickled without anything open."""

    high: PatchSource
    low: PatchSource | None = None
    num_workers: int = 1
    test_scales: TestScales = "high"
    _seen: dict[str, dict[str, SlideFacts]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, patches: str, *, patches_low: str | None = None,
             data_slide_dir: Path | None = None, slide_ext: str = SLIDE_EXT, num_workers: int = 1,
             test_scales: TestScales = "high") -> PatchStore:
        """The store that the flags of ``PatchSourceOptions`` name.

        ``Refused`` when a source is not there or not what it should be, and for flags that do
        nothing.
        """
        if test_scales == "both" and patches_low is None:
            raise Refused("--test_scales both needs two magnifications: give --patches_low")
        high, low = (None if text is None else open_source(
            text, flag=flag, slide_dir=data_slide_dir, slide_ext=slide_ext)
            for text, flag in ((patches, "--patches"), (patches_low, "--patches_low")))
        assert high is not None
        if all(one is None or one.kind != "coordinates" for one in (high, low)):
            for flag, given in (("data_slide_dir", data_slide_dir is not None),
                                ("slide_ext", slide_ext != SLIDE_EXT)):
                if given:
                    raise Refused(f"--{flag} has no effect: an LMDB holds the pixels; leave it out")
        return cls(high=high, low=low, num_workers=num_workers, test_scales=test_scales)

    @property
    def root(self) -> Path:
        """The file or folder of the high magnification."""
        return self.high.root

    def sources(self, *, training: bool) -> tuple[PatchSource, ...]:
        """Where the patches of a bag come from, in their order: low, then high."""
        both = self.low is not None and (training or self.test_scales == "both")
        return (self.low, self.high) if both and self.low is not None else (self.high,)

    def stamps(self, slide_id: str) -> list[tuple[int, int]]:
        """(bytes, time of the newest change in ns) of each file that the slide's patches are in."""
        return [one for source in self.sources(training=True) for one in source.stamps(slide_id)]

    def facts(self) -> dict[str, Any]:
        """What the patches of the checked slides are: kind, px, um per px, encoding; of the low
        magnification under "low"."""
        high, *low = ({"kind": source.kind, **shared_facts(list(self._seen.get(name, {}).values()))}
                      for name, source in (("high", self.high), ("low", self.low)) if source)
        return {**high, "channels": "RGB", **({"low": low[0]} if low else {})}

    def check(self, slide_ids: Sequence[str], *, allow_missing: bool = False,
              table_ids: Iterable[str] | None = None, embed_dim: int | None = None,
              levels: Sequence[FeatureStore] = ()) -> StoreCheck:
        """Look at what there is of every slide, no pixel of it, before any work.

        As ``FeatureStore.check``: slides that are not there are ``Refused`` unless
        ``allow_missing``; unreadable ones and those without (high) patches are taken out and
        listed. rows: patches of both magnifications. embed_dim: the encoder's, which any patches
        suit; levels: ``Refused``, the finer levels of hag_mil are features.
        """
        if levels:
            raise Refused("finer levels (--child_levels, --child_dirs) are features: an end-to-end "
                          "model has none")
        sources = {"high": self.high, **({"low": self.low} if self.low else {})}
        lacking, failures = _look(sources, slide_ids, self._seen)
        if lacking and not allow_missing:
            first = next(iter(lacking.values()))
            raise Refused(f"{len(lacking)} of {len(slide_ids)} slides have no patches: "
                          f"{listed(list(lacking))}; there is no {first}: run "
                          "create_patches_fp.py, correct the flags that say where they are, or go "
                          "on without them with --allow_missing")
        high, low = self._seen["high"], self._seen.get("low", {})
        known = [slide for slide in slide_ids if slide not in lacking and slide not in failures]
        usable = [slide for slide in known if high[slide].count]
        if not usable:
            raise Refused(f"no slide has usable patches in {self.root}: "
                          f"{next(iter(failures.values()), 'all are empty')}")
        self._check_scales(usable)
        empty = [slide for slide in known if not high[slide].count]
        extra = sorted(set(self.high.slides()) - set(table_ids or slide_ids))
        return StoreCheck(
            usable=tuple(usable), empty=tuple(empty), missing=tuple(lacking), failures=failures,
            rows={slide: high[slide].count + (low[slide].count if low else 0) for slide in usable},
            width=0, encoder=None, n_bytes=0, kind="patches",
            notes=_notes(self.root, empty=empty, missing=list(lacking), extra=extra, bare=[
                slide for slide in usable if low and not low[slide].count], seen=self._seen))

    def _check_scales(self, slides: Sequence[str]) -> None:
        """``Refused`` when a patch of the low magnification shows less than one of the high."""
        for slide in slides if self.low else ():
            fine, coarse = (self._seen[name][slide].footprint_px_l0 for name in ("high", "low"))
            if fine is not None and coarse is not None and coarse < fine:
                raise Refused(
                    f"{slide}: patches of --patches_low show {coarse} px of level 0, those of "
                    f"--patches {fine} px: --patches_low is for the lower magnification, whose "
                    "patches show more (swap the two?)")


def _look(sources: dict[str, PatchSource], slide_ids: Sequence[str],
          seen: dict[str, dict[str, SlideFacts]]) -> tuple[dict[str, str], dict[str, str]]:
    """What the sources have of the slides, put into ``seen``; slide -> what it lacks, and slide ->
    why it cannot be used."""
    lacking: dict[str, str] = {}
    failures: dict[str, str] = {}
    for name, source in sources.items():
        seen[name] = {}
        for slide in slide_ids:
            try:
                if lack := source.lacks(slide):
                    lacking.setdefault(slide, lack)
                else:
                    seen[name][slide] = source.facts(slide)
            except ItemFailed as error:
                failures.setdefault(slide, str(error))
    return lacking, {slide: why for slide, why in failures.items() if slide not in lacking}


def _notes(root: Path, *, empty: Sequence[str], missing: Sequence[str], extra: Sequence[str],
           bare: Sequence[str], seen: dict[str, dict[str, SlideFacts]]) -> tuple[str, ...]:
    """One line for each thing that is allowed but worth knowing."""
    told = (
        (missing, "slides without patches in a source are left out"),
        (empty, "slides without patches are left out"),
        (bare, "slides have patches of the high magnification only: all of theirs are drawn of it"),
        (extra, f"slides in {root} are not in the table"))
    notes = [f"{len(slides)} {what}: {listed(slides)}" for slides, what in told if slides]
    for name, found in seen.items():
        facts = shared_facts(list(found.values()))
        if max(len(facts["px"]), len(facts["mpp_um"]), len(facts["encoding"])) > 1:
            notes.append(f"patches of the {name} magnification differ between slides: px "
                         f"{facts['px']}, um per px {facts['mpp_um']}, stored as "
                         f"{facts['encoding'] or 'nothing'}")
    return tuple(notes)
