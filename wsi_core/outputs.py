"""What a slide gets beside its coordinates: stitch, overlays, GeoJSON, patch images.

Everything here is made from the finished coordinates, so it can be asked for later as well. Only
the image of a whole slide (``slide_images.py``) is made from the tissue, by ``patching``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from utils.storage import write_image
from wsi_core.coords import PatchCoords
from wsi_core.drawing import draw_stitch
from wsi_core.find_tissue import Overviews
from wsi_core.slide_images import FOLDER, ImagePlan
from wsi_core.tissue import Tissue

Overlay = Literal["mask", "contours", "grid"]
ImageKind = Literal["png", "jpeg"]
VISUALIZATION = "visualization"


@dataclass(frozen=True, kw_only=True)
class OutputPlan:
    """What is written beside the coordinates.

    stitch: ``stitches/<slide>.jpg``, the patches put together
    overlays: ``visualization/<slide>_{mask,contours,grid}.png``; mask also as black and white
    geojson: ``contours_geojson/<slide>.geojson``, editable in QuPath
    images: kind of ``images/<slide>/*``; at most ``max_images`` a slide, None = all
    slide_image: ``slide_images/<slide>.tif``, the packed tissue
    """

    save_dir: Path
    stitch: bool = False
    overlays: tuple[Overlay, ...] = ()
    geojson: bool = False
    images: ImageKind | None = None
    jpeg_quality: int = 90
    max_images: int | None = None
    slide_image: ImagePlan | None = None

    @property
    def folders(self) -> tuple[str, ...]:
        """Folders in ``save_dir`` that files go into."""
        wanted = ((True, "stitches"), (bool(self.overlays), VISUALIZATION),
                  (self.geojson, "contours_geojson"), (self.images is not None, "images"),
                  (self.slide_image is not None, FOLDER))
        return tuple(name for asked, name in wanted if asked)

    @property
    def pictures(self) -> bool:
        """Whether the slide has to be opened to make what is asked for."""
        return (self.stitch or bool(self.overlays) or self.images is not None
                or self.slide_image is not None)

    def outlines(self, slide_id: str, *, redo: bool, drawn: Path | None) -> tuple[str, ...]:
        """What shows the tissue alone, so can be had without coordinates, and is to be written.

        redo: also what is there, but for the file (``drawn``) that the outlines come from
        """
        asked = (*(name for name in self.overlays if name != "grid"),
                 *(("geojson",) if self.geojson else ()))
        return tuple(what for what in asked
                     if not (path := self.path(slide_id, what)).exists()
                     or (redo and not _same(path, drawn)))

    def path(self, slide_id: str, what: str) -> Path:
        """Where ``stitch``, an overlay, ``geojson`` or ``images`` (a folder) of a slide lies."""
        if what == "stitch":
            return self.save_dir / "stitches" / f"{slide_id}.jpg"
        if what == "geojson":
            return self.save_dir / "contours_geojson" / f"{slide_id}.geojson"
        if what == "images":
            return self.save_dir / "images" / slide_id
        return self.save_dir / VISUALIZATION / f"{slide_id}_{what}.png"

    def missing(self, slide_id: str, patches: PatchCoords) -> tuple[str, ...]:
        """What is asked for and not there. Empty slides get no stitch, grid or patch images;
        outlines are drawn only where the coordinates hold them (CLAM's do not)."""
        outlines = patches.tissue is not None
        found = []
        if self.stitch and len(patches) and not any(
                self.path(slide_id, "stitch").with_suffix(end).exists()
                for end in (".jpg", ".png")):
            found.append("stitch")
        found += [name for name in self.overlays if (len(patches) if name == "grid" else outlines)
                  and not self.path(slide_id, name).exists()]
        if self.geojson and outlines and not self.path(slide_id, "geojson").exists():
            found.append("geojson")
        if self.images is not None and len(patches):
            from wsi_core.patch_images import images_done

            if not images_done(self.path(slide_id, "images"), patches, kind=self.images,
                               most=self.max_images):
                found.append("images")
        return tuple(found)

    def clear(self, slide_id: str, *, drawn: Path | None) -> None:
        """Take away what shows coordinates that are about to be replaced.

        GeoJSON may hold hours of somebody's drawing: it goes only where a new one is asked for,
        and never when it is the very file (``drawn``) that the outlines come from.
        """
        for what in ("stitch", "mask", "mask_bw", "contours", "grid"):
            path = self.path(slide_id, what)
            for suffix in (path.suffix, ".png"):
                path.with_suffix(suffix).unlink(missing_ok=True)
        if self.geojson and not _same(self.path(slide_id, "geojson"), drawn):
            self.path(slide_id, "geojson").unlink(missing_ok=True)
        if self.path(slide_id, "images").is_dir():
            from wsi_core.patch_images import remove_images

            remove_images(self.path(slide_id, "images"))

    def make(self, overviews: Overviews, patches: PatchCoords, which: tuple[str, ...]) -> None:
        """Write these outputs of one slide. Raises SlideError, OSError."""
        for what in which:
            path = self.path(patches.slide_id, what)
            if what == "geojson":
                from wsi_core.geojson import write_contours

                assert patches.tissue is not None
                write_contours(path, patches.tissue, slide_id=patches.slide_id,
                               slide_size=patches.slide_size)
            elif what == "images":
                from wsi_core.patch_images import save_patch_images

                assert self.images is not None
                save_patch_images(overviews.slide, patches, path, kind=self.images,
                                  quality=self.jpeg_quality, most=self.max_images)
            elif what == "stitch":
                write_picture(path, draw_stitch(*overviews.picture(), patches.coords,
                                                patches.footprint_px_l0))
            else:
                self._overlay(what, overviews, patches, path)

    def _overlay(self, what: str, overviews: Overviews, patches: PatchCoords, path: Path) -> None:
        from wsi_core import overlays

        image, tissue = overviews.picture(), patches.tissue or Tissue()
        if what == "grid":
            picture = overlays.draw_grid(*image, patches)
        elif what == "contours":
            picture = overlays.draw_contours(*image, tissue)
        else:
            picture = overlays.draw_mask_overlay(*image, tissue)
            write_image(path.with_name(f"{patches.slide_id}_mask_bw.png"),
                        overlays.draw_mask_bw(*image, tissue))
        write_image(path, picture)


def _same(path: Path, drawn: Path | None) -> bool:
    return drawn is not None and drawn.resolve() == path.resolve()


def write_picture(path: Path, image: np.ndarray) -> None:
    """Write a .jpg, or a .png where it is too large; an older one of the other kind goes."""
    written = write_image(path, image)
    for suffix in (".jpg", ".png"):
        if path.with_suffix(suffix) != written:
            path.with_suffix(suffix).unlink(missing_ok=True)
