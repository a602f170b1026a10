"""The global lattice against its definition, for any tissue, step and slide."""

from __future__ import annotations

from random import Random

import cv2
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from wsi_core.lattice import CELL_PIXELS, TissueArea, global_lattice
from wsi_core.tissue import Tissue

Blob = tuple[int, int, int, int, int]  # of an ellipse: centre, half axes, angle in degrees
SIDE = 600
BLOBS = st.tuples(st.integers(0, SIDE - 1), st.integers(0, SIDE - 1), st.integers(20, 200),
                  st.integers(20, 200), st.integers(0, 180))


def outlined(blobs: list[Blob], holes: list[Blob]
             ) -> tuple[np.ndarray, Tissue]:
    """Ellipses with holes as a mask of level 0, and its outlines."""
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for colour, ellipses in ((1, blobs), (0, holes)):
        for x, y, a, b, angle in ellipses:
            scale = 1 if colour else 3
            cv2.ellipse(mask, (x, y), (a // scale, b // scale), angle, 0, 360, colour, -1)
    found, tree = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    if tree is None:
        return mask, Tissue()
    points = [one.reshape(-1, 2) for one in found]
    outer = [index for index, parent in enumerate(tree[0, :, 3]) if parent < 0]
    return mask, Tissue([points[index] for index in outer],
                        [[points[hole] for hole, parent in enumerate(tree[0, :, 3])
                          if parent == index] for index in outer])


@given(blobs=st.lists(BLOBS, max_size=4), holes=st.lists(BLOBS, max_size=2),
       patch=st.floats(30, 200), step=st.floats(30, 200),
       least=st.sampled_from((0.0, 0.1, 0.5, 0.9, 1.0)), pad=st.booleans(),
       order=st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_lattice_is_its_definition(blobs: list[Blob], holes: list[Blob], patch: float, step: float,
                                   least: float, pad: bool, order: Random) -> None:
    mask, tissue = outlined(blobs, holes)

    def lattice(of: Tissue) -> np.ndarray:
        return global_lattice(of, patch_px_l0=(patch, patch), step_px_l0=(step, step),
                              slide_size=(SIDE, SIDE), min_tissue=least, pad=pad)

    cells = lattice(tissue)
    chosen = set(map(tuple, cells.tolist()))
    assert len(chosen) == len(cells)
    begins = np.arange(SIDE // step + 1) * step
    ticks = np.rint(begins).astype(int)
    ticks = ticks[ticks < SIDE] if pad else ticks[
        (ticks + round(patch) <= SIDE) & (begins + patch <= SIDE + 1e-6)]
    assert chosen <= {(int(x), int(y)) for x in ticks for y in ticks}
    # The raster knows an outline to its own pixels: the share lies between that of the tissue
    # without a rim of such a pixel and that of the tissue with one more.
    rim = int(np.ceil(patch / CELL_PIXELS)) + 1
    kernel = np.ones((2 * rim + 1, 2 * rim + 1), np.uint8)
    limit = max(least - 1e-9, 1e-6)
    must, may = (shares(of, ticks, ticks, patch) >= limit
                 for of in (cv2.erode(mask, kernel), cv2.dilate(mask, kernel)))
    taken = np.array([[(x, y) in chosen for x in ticks.tolist()] for y in ticks.tolist()], bool)
    taken = taken.reshape(may.shape)  # also where there is no cell
    assert not (must & ~taken).any() and not (taken & ~may).any()
    pieces = list(zip(tissue.contours, tissue.holes, strict=True))
    order.shuffle(pieces)
    shuffled = Tissue([outline for outline, _ in pieces], [inner for _, inner in pieces])
    assert np.array_equal(lattice(shuffled), cells)


def shares(mask: np.ndarray, xs: np.ndarray, ys: np.ndarray, side: float) -> np.ndarray:
    """(len(ys), len(xs)) share of tissue in squares, by counting parts of pixels."""
    pixels = np.arange(SIDE)
    across, down = (np.clip(np.minimum(pixels + 1, begins[:, None] + side)
                            - np.maximum(pixels, begins[:, None]), 0, 1) for begins in (xs, ys))
    return np.asarray(down @ mask @ across.T / side**2)


@given(blobs=st.lists(BLOBS, min_size=1, max_size=3), holes=st.lists(BLOBS, max_size=2),
       corners=st.lists(st.tuples(st.floats(-50, SIDE), st.floats(-50, SIDE)), min_size=1,
                        max_size=20), side=st.floats(1, 15))
@settings(max_examples=60, deadline=None)
def test_shares_are_exact_on_a_raster_of_the_masks_own_pixels(
        blobs: list[Blob], holes: list[Blob],
        corners: list[tuple[float, float]], side: float) -> None:
    mask, tissue = outlined(blobs, holes)
    area = TissueArea.of(tissue, slide_size=(SIDE, SIDE), cell_px_l0=(side, side))
    assert area.downsample == (1.0, 1.0)
    found = area.fraction(np.array(corners), (side, side))
    expected = [shares(mask, np.array([x]), np.array([y]), side)[0, 0] for x, y in corners]
    assert np.allclose(found, expected, atol=1e-9)
