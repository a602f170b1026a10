"""Random masks that belong to an image as a whole: one draw for all of its tiles.

Stochastic depth leaves out a residual branch of an image, dropout of whole channels leaves out
maps. Their masks have no extent in space, so an image computed tile by tile must draw them once,
or its map would not be that of one network. Such modules get their own random numbers here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from utils.replay import RandomState

_OF_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.FeatureAlphaDropout)
_OF_BRANCHES = {"DropPath", "StochasticDepth"}  # timm's, torchvision's and copies of them


class SharedMasks:
    """The masks of one image. Draws from torch's global generator of the CPU when made: one number
    for each such module that is active (in training, probability not 0), in the module's order.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self._device = device
        self._states = {one: _state(int(torch.randint(2 ** 62, ())), device)
                        for one in module.modules() if _is_active(one)}

    @contextmanager
    def shared(self) -> Iterator[None]:
        """Every pass over the network inside draws these masks, once each if called so."""
        states, before = dict(self._states), []

        def draw_own(module: nn.Module, args: Any) -> None:
            before.append(RandomState.capture(self._device))
            states[module].restore()

        def give_back(module: nn.Module, args: Any, result: Any) -> None:
            states[module] = RandomState.capture(self._device)  # a module may be called again
            before.pop().restore()

        with ExitStack() as stack:
            for one in self._states:
                stack.callback(one.register_forward_pre_hook(draw_own).remove)
                stack.callback(one.register_forward_hook(give_back, always_call=True).remove)
            yield


@contextmanager
def image_masks(module: nn.Module, device: torch.device) -> Iterator[None]:
    """For a network that sees an image in one piece: the masks that its tiles would share.

    Inside, one forward pass of ``module`` draws under a seed what ``models.streaming.stream`` of
    the same modules draws under it. What is elementwise draws from the global generators as ever.
    """
    with SharedMasks(module, device).shared():
        yield


def _is_active(module: nn.Module) -> bool:
    if not module.training:
        return False
    if isinstance(module, _OF_CHANNELS):
        return module.p > 0
    return (type(module).__name__ in _OF_BRANCHES
            and bool(getattr(module, "drop_prob", getattr(module, "p", 0))))


def _state(seed: int, device: torch.device) -> RandomState:
    """The generators just seeded."""
    cuda = torch.Generator(device) if device.type == "cuda" else None
    return RandomState(device=device, cpu=torch.Generator().manual_seed(seed).get_state(),
                       cuda=None if cuda is None else cuda.manual_seed(seed).get_state())
