"""A network made ready for inference on the CPU: folded, traced, frozen, and checked.

float32 gives the eager result to rounding (about 1e-7) in half the time: channels-last memory,
batch norms folded into their convolutions, a frozen TorchScript graph. bfloat16 adds oneDNN's
graph fusion, 4 to 15 times faster by the processor (benchmarks/features.py), with a relative error
of 3e-3 (ResNet-50) to 4e-2 (EfficientNet-Lite0).
A network that cannot be traced, or whose traced result differs, stays eager, and says so.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

MAX_ERROR_FP32 = 1e-5  # relative to the eager network's features, as vectors
MAX_ERROR_BF16 = 0.1  # a broken graph is off by its whole size, rounding by a few per cent at most


def freeze_network(network: nn.Module, example: torch.Tensor, *, bf16: bool = False
                   ) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """A fast equivalent of ``network`` for inputs shaped like ``example``, and "" or a warning.

    network: in evaluation mode, on the CPU, in float32; it is left as it is
    example: (B, 3, H, W) float32; other batch sizes work, this one is fastest
    The result maps (B, 3, H, W) float32 to (B, D) float32. When the frozen graph cannot be built
    or its features differ from the eager ones, the eager network is returned and the text says
    why.
    """
    import torch

    with torch.no_grad():
        wanted = network(example)
        try:
            frozen = _trace(network, example, bf16=bf16)
            found = frozen(example)
        except Exception as error:  # tracing runs arbitrary model code; eager always works
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return _eager(network, bf16=bf16), f"it cannot be traced ({reason})"
        error_found = float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))
    limit = MAX_ERROR_BF16 if bf16 else MAX_ERROR_FP32
    if not error_found <= limit:  # NaN counts as wrong
        return _eager(network, bf16=bf16), (
            f"its frozen graph is off by {error_found:.1e} (relative), at most {limit:.0e} "
            "is accepted")
    return frozen, ""


def fold_batch_norms(network: nn.Module, example: torch.Tensor) -> int:
    """Fold each batch norm that directly follows a convolution into it, in place, in float32.

    Which follows which is observed on one forward pass, so networks that symbolic tracing cannot
    follow are folded too. Returns how many were folded. The caller checks the result.
    """
    import torch
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_weights

    made: dict[int, tuple[nn.Conv2d, torch.Tensor]] = {}  # the tensor is kept so ids stay unique
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def after_conv(module: nn.Module, inputs: object, output: torch.Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        made[id(output)] = (module, output)

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(module, nn.BatchNorm2d)
        if id(inputs[0]) in made and module.track_running_stats:
            pairs.append((made[id(inputs[0])][0], module))

    hooks = [module.register_forward_hook(after_conv) if isinstance(module, nn.Conv2d)
             else module.register_forward_pre_hook(before_norm)
             for module in network.modules() if isinstance(module, nn.Conv2d | nn.BatchNorm2d)]
    with torch.no_grad():
        network(example)
    for hook in hooks:
        hook.remove()
    once = [pair for pair in pairs  # a layer used twice cannot take two norms
            if sum(pair[0] is other[0] or pair[1] is other[1] for other in pairs) == 1]
    for conv, norm in once:
        assert norm.running_mean is not None and norm.running_var is not None
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps,
            norm.weight, norm.bias)
        _replace(network, norm)
    return len(once)


def _replace(network: nn.Module, norm: nn.BatchNorm2d) -> None:
    """Put what ``norm`` does besides normalising (timm: drop and activation) in its place."""
    from torch import nn

    rest = nn.Sequential(*(child for name, child in norm.named_children()
                           if name in ("drop", "act")))
    for parent in network.modules():
        for name, child in list(parent.named_children()):
            if child is norm:
                setattr(parent, name, rest if len(rest) else nn.Identity())


def _trace(network: nn.Module, example: torch.Tensor, *, bf16: bool
           ) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    ready = copy.deepcopy(network).eval()
    if bf16:  # freezing folds too, but in bfloat16, at twice the error
        fold_batch_norms(ready, example)
    dtype = torch.bfloat16 if bf16 else torch.float32
    ready = ready.to(dtype).to(memory_format=torch.channels_last)
    sample = example.to(dtype=dtype, memory_format=torch.channels_last)
    with _quiet(), _onednn_fusion(bf16):
        graph = torch.jit.freeze(torch.jit.trace(ready, sample, check_trace=False))
        for _ in range(3):  # the profiling executor settles on the fused graph within these
            graph(sample)

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():  # inference mode would change the graph's profile
            features = graph(batch.to(dtype=dtype, memory_format=torch.channels_last))
            return features.float()  # type: ignore[no-any-return]

    return run


def _eager(network: nn.Module, *, bf16: bool) -> Callable[[torch.Tensor], torch.Tensor]:
    import torch

    def run(batch: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return network(batch).float()  # type: ignore[no-any-return]

    return run


@contextmanager
def _quiet() -> Iterator[None]:
    """Tracing warns of every shape it makes constant; shapes are constant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def _onednn_fusion(on: bool) -> Iterator[None]:
    """The fusion pass is a switch of the whole process: on only while our graph is compiled."""
    import torch

    before = torch.jit.onednn_fusion_enabled()
    torch.jit.enable_onednn_fusion(on or before)
    try:
        yield
    finally:
        torch.jit.enable_onednn_fusion(before)
