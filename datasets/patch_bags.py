"""Bags of patches for end-to-end models: all of a slide's for evaluation, drawn anew in each epoch
of training."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace

import numpy as np

from datasets.epoch_draws import DrawnBags
from datasets.patch_sampling import Sampling, draw_rows, scale_shares
from datasets.patch_store import PatchStore
from datasets.patch_streams import PatchRows, StreamedPatches
from datasets.table import SlideTable
from utils.contracts import Bag
from utils.errors import ItemFailed, Refused


@dataclass(frozen=True, kw_only=True)
class Draws:
    """How patches of training slides are drawn; names and defaults of ``DrawOptions``."""

    same_psize: int = 0
    mul_scale_ratio: float = 2.0
    pad_enc_bs: bool = True
    sampling: Sampling = "random"
    num_group_2d: int = 8

    def check(self, store: PatchStore) -> None:
        """``Refused`` for what does nothing, and for what the patches of ``store`` do not allow."""
        absent = {"mul_scale_ratio": "" if store.low else "--patches_low",
                  "num_group_2d": "" if self.sampling == "grid" else "--sampling grid"}
        for item in fields(self)[1:]:
            needed = absent.get(item.name, "") if self.same_psize else "--same_psize"
            if needed and getattr(self, item.name) != item.default:
                flag = f"no_{item.name}" if item.default is True else item.name
                raise Refused(f"--{flag} has no effect without {needed}: give both or leave it "
                              "out")
        if self.same_psize and store.low and not scale_shares(self.same_psize,
                                                              self.mul_scale_ratio)[0]:
            raise Refused(f"of --same_psize {self.same_psize} none is of --patches_low with "
                          f"--mul_scale_ratio {self.mul_scale_ratio:g}: give a smaller ratio or "
                          "more patches")
        for source in store.sources(training=True):
            if self.sampling == "grid" and source.kind == "abmilx lmdb":
                raise Refused(f"--sampling grid needs to know where patches are, and {source.root} "
                              "(ABMILX's layout) holds no coordinates: use random or intervals, "
                              "or make the file with create_patches_fp.py --save_lmdb")


class PatchBags(DrawnBags):
    """Bags of the slides of a table, in its order, as ``BagDataset`` has them of features.

    Features have the width 0; ``bag.patches`` has the pixels, of the low magnification first,
    rows in the order of ``bag.coords``. Of all patches they are read when they are asked for, of
    drawn ones (``training``) at once. pin: page-locked memory for pixels, for fast copies to a GPU.
    ``Refused`` for draws that the store does not allow. Pickles to worker processes.
    """

    def __init__(self, table: SlideTable, store: PatchStore, *, pin: bool = False,
                 same_psize: int = 0, mul_scale_ratio: float = 2.0, pad_enc_bs: bool = True,
                 sampling: Sampling = "random", num_group_2d: int = 8) -> None:
        super().__init__(table)
        self.store, self.pin = store, pin
        self._draws = Draws(same_psize=same_psize, mul_scale_ratio=mul_scale_ratio,
                            pad_enc_bs=pad_enc_bs, sampling=sampling, num_group_2d=num_group_2d)
        self._draws.check(store)

    def verify(self) -> dict[str, str]:
        """Read one patch of each slide and magnification; slide -> reason for the bad ones."""
        with ThreadPoolExecutor(self.store.num_workers) as pool:
            found = zip(self.slide_ids, pool.map(self._problem, self.slide_ids), strict=True)
            return {slide_id: problem for slide_id, problem in found if problem}

    def _problem(self, slide_id: str) -> str:
        try:
            parts, _ = self._parts(slide_id)
            StreamedPatches(parts=tuple(replace(part, rows=part.rows[:1]) for part in parts),
                            threads=1).held()
        except (ItemFailed, OSError) as error:
            return str(error)
        return ""

    def read(self, slide_id: str) -> Bag:
        """See ``TableBags``; ``ItemFailed`` too when drawn patches cannot be read."""
        import torch

        draw = self._for_training and self._draws.same_psize > 0
        rng = self._random.generator(slide_id) if draw else None
        parts, coords = self._parts(slide_id, rng)
        patches = StreamedPatches(parts=parts, threads=self.store.num_workers, pin=self.pin)
        return Bag(slide_id=slide_id, features=torch.empty(len(patches), 0), coords=coords,
                   patches=patches.held() if draw else patches, **self.truth_of(slide_id))

    def _parts(self, slide_id: str, rng: np.random.Generator | None = None
               ) -> tuple[tuple[PatchRows, ...], np.ndarray | None]:
        """Rows of each source, low before high, drawn with ``rng`` or all; their places, None when
        unknown."""
        sources = self.store.sources(training=self._for_training)
        counts = [source.facts(slide_id).count for source in sources]
        if not counts[-1]:
            raise ItemFailed(f"{slide_id}: no patches, so there is nothing to learn from")
        places = [source.coords(slide_id) for source in sources]
        rows = ([np.arange(count) for count in counts] if rng is None
                else self._draw(counts, places, rng))
        known = [place[chosen] for place, chosen in zip(places, rows, strict=True)
                 if place is not None]
        return (tuple(PatchRows(source=source, slide_id=slide_id, rows=chosen)
                      for source, chosen in zip(sources, rows, strict=True) if len(chosen)),
                np.concatenate(known) if len(known) == len(sources) else None)

    def _draw(self, counts: Sequence[int], places: Sequence[np.ndarray | None],
              rng: np.random.Generator) -> list[np.ndarray]:
        """Rows of each source."""
        how, wanted = self._draws, [self._draws.same_psize]
        if len(counts) == 2:  # a slide without low patches gives high ones instead
            low, high = scale_shares(how.same_psize, how.mul_scale_ratio)
            wanted = [low, high] if counts[0] else [0, low + high]
        return [draw_rows(count, share, rng=rng, pad=how.pad_enc_bs, kind=how.sampling,
                          coords=place, cells=how.num_group_2d)
                for count, share, place in zip(counts, wanted, places, strict=True)]
