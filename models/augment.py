"""From stored uint8 patches to what an encoder sees: normalised, augmented in training, resized.

Source: spec abmilx.md 4.1, 15.6, 15.8, 15.20. Every patch has its own flips, shift and crop, drawn
on the device it is on, and all three are one sampling. A crop is a window of an area that is a
uniform share (``crop_scale``, 1) of the patch and of log-uniform aspect 3/4 to 4/3; windows may
lie between pixels.

Where this differs from the published programs: they store patches twice, at 256 px for training
and at 224 px for tests, and replace the crop by a resize where ``img_size`` is 224. One stored size
serves both here, and a crop is always a crop; ``crop_scale`` 1 is the plain resize. They crop
quarters of a batch alike. Nothing black comes in beside a shifted patch: it goes on mirrored, so
that no colour appears that the tissue does not have.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

Kind = Literal["none", "weak", "weak_strong", "strong", "strong_v2"]
Triple = tuple[float, float, float]

SHIFTS: dict[Kind, float] = {"weak_strong": 100 / 256, "strong_v2": 0.5}  # shares of the side
FLIPPED: tuple[Kind, ...] = ("strong", "strong_v2")
_LOG_ASPECT = math.log(4 / 3)  # of width to height, either way
_ON_A_THREAD = 4  # patches sampled at once; they stay in the cache, which makes it twice as fast
_ON_A_GPU = 64


class PatchTransform(nn.Module):
    """(n, h, w, 3) uint8 RGB -> (n, 3, img_size, img_size) float32, channels last in memory.

    In training mode each patch is augmented as ``img_transform`` says, with numbers of torch's
    global generator of the device: who sets its state back gets the same patches again. Otherwise
    the whole patch is resized to a square, bilinear with antialias, or left as it is if it fits.

    crop_scale: smallest share of the area that a crop keeps
    channels:   BGR turns the channels around before normalisation, which stays in RGB order:
                weights of the published programs were trained so (spec 15.6)
    mean, std:  of RGB values from 0 to 1
    """

    mean: Tensor
    std: Tensor

    def __init__(self, *, img_size: int, img_transform: Kind, crop_scale: float,
                 channels: Literal["RGB", "BGR"], mean: Triple, std: Triple) -> None:
        super().__init__()
        self.img_size = img_size
        self.img_transform = img_transform
        self.crop_scale = crop_scale
        self.channels = channels
        self.register_buffer("mean", torch.tensor(mean), persistent=False)
        self.register_buffer("std", torch.tensor(std), persistent=False)

    def forward(self, patches: Tensor) -> Tensor:
        """See the class; ``patches`` is not changed. Memory beyond the result: a few patches."""
        count, height, width, _ = patches.shape
        out = torch.empty((count, 3, self.img_size, self.img_size), device=patches.device,
                          memory_format=torch.channels_last)
        windows = None
        if self.training and self.img_transform != "none":
            windows = draw_windows(count, kind=self.img_transform, crop_scale=self.crop_scale,
                                   width_by_height=width / height, device=patches.device)
        step = _ON_A_GPU if patches.is_cuda else _ON_A_THREAD * torch.get_num_threads()
        for start in range(0, count, step):
            part = slice(start, start + step)
            images = self._normalised(patches[part])
            if windows is not None:
                images = sample(images, windows[part], side_px=self.img_size)
            elif (height, width) != (self.img_size, self.img_size):
                images = functional.interpolate(images, (self.img_size, self.img_size),
                                                mode="bilinear", antialias=True)
            out[part] = images
        return out

    def _normalised(self, patches: Tensor) -> Tensor:
        """(n, h, w, 3) uint8 -> (n, 3, h, w) float32, the same memory order.

        Before the resampling, not after: its weights add up to 1, so that makes no difference, and
        rows of pixels are six times as fast to scale as planes whose channels lie side by side.
        """
        if self.channels == "BGR":
            patches = patches.flip(-1)
        width = patches.shape[2]
        scale = (1 / (255 * self.std)).repeat(width)
        shift = (-self.mean / self.std).repeat(width)
        rows = torch.addcmul(shift, patches.flatten(2).float(), scale)
        return rows.view(*patches.shape).permute(0, 3, 1, 2)


def draw_windows(count: int, *, kind: Kind, crop_scale: float, width_by_height: float,
                 device: torch.device) -> Tensor:
    """What each output shows of its patch: (count, 2, 2), for x and y the centre and half the side.

    Coordinates run from -1 to 1 across the patch; a negative half side is a flip, and a window may
    reach beyond the patch after a shift. The crop alone never does: where a window of the drawn
    area fits with some aspects only, the aspect is drawn of those. Every kind takes eight numbers
    a patch of the generator.
    """
    share, aspect, left, top, right, down, flip_x, flip_y = torch.rand(
        (count, 8), device=device).unbind(1)
    share = crop_scale + (1 - crop_scale) * share
    # log(width / height) of a window in px: between these it fits into the patch
    middle, reach = math.log(width_by_height), -share.log()
    least = (middle - reach).clamp(min=-_LOG_ASPECT).minimum(middle + reach)
    most = (middle + reach).clamp(max=_LOG_ASPECT).maximum(middle - reach)
    log_aspect = torch.lerp(least, most, aspect) - middle
    log_halves = torch.stack((log_aspect - reach, -log_aspect - reach), dim=1) / 2
    halves = log_halves.exp().clamp(max=1)
    centres = (2 * torch.stack((left, top), dim=1) - 1) * (1 - halves)
    if kind in SHIFTS:
        centres = centres - 2 * SHIFTS[kind] * (2 * torch.stack((right, down), dim=1) - 1)
    windows = torch.stack((centres, halves), dim=2)
    if kind in FLIPPED:
        flips = torch.where(torch.stack((flip_x, flip_y), dim=1) < 0.5, -1.0, 1.0)
        windows = windows * flips[:, :, None]
    return windows


def sample(images: Tensor, windows: Tensor, *, side_px: int) -> Tensor:
    """The windows of ``draw_windows`` in (n, 3, h, w) images -> (n, 3, side_px, side_px).

    Bilinear; what lies outside an image is its mirror image. Images that are larger than the
    result are sampled that many times finer, then averaged, so that little is lost to aliasing.
    """
    finer = max(1, round(max(images.shape[2:]) / side_px))
    ends = 1 - 1 / (side_px * finer)
    steps = torch.linspace(-ends, ends, side_px * finer, device=images.device)
    x, y = (windows[:, axis, :1] + windows[:, axis, 1:] * steps for axis in (0, 1))
    size = (len(images), len(steps), len(steps))
    grid = torch.stack((x[:, None, :].expand(size), y[:, :, None].expand(size)), dim=3)
    found: Tensor = functional.grid_sample(images, grid, padding_mode="reflection",
                                           align_corners=False)
    if finer > 1:
        found = functional.avg_pool2d(found, finer)
    return found
