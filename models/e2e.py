"""End to end: a patch encoder and a slide model that learn together from slide labels.

Patches come as uint8 chunks and are augmented on the device. The features of a few slides are made
at once; the slide model's losses, however many, collect their gradient on them, and then it goes
back through the encoder once. How much of the encoder's graph is held meanwhile is a matter of
memory alone (``enc_grad``), see ``models.two_pass``.
State-dict keys are those of E2E-WSI-ABMILX: ``encoder.model...`` and ``mil...``.
Source: Tang et al., "Revisiting End-to-End Learning with Slide-level Supervision in Computational
Pathology", NeurIPS 2025 (arXiv 2506.02408).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from itertools import count
from typing import Literal, Self, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from models.augment import Kind, PatchTransform
from models.patch_network import PatchNetwork, Run
from models.patch_parts import Part, PatchParts, patches_of, share_out
from models.sync_norm import convert
from models.two_pass import two_pass
from utils.contracts import Bag, PatchImages, SlideModel, SlideOutput, StepLoss
from utils.distributed import ALONE, Group, current_group
from utils.errors import ItemFailed, Refused
from utils.replay import kept_buffers

_CPU_BATCH = 16  # patches forwarded at once in evaluation on a CPU: more only misses the caches


def _run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = block(x)
    return result


class EndToEnd(nn.Module):
    """A slide model that makes its features itself (``utils.contracts.JointEncoder``).

    mil: the slide model, for features of width ``encoder.dim``. Options as in
    ``models.options.E2EOptions``; ``Refused`` where they do not fit the encoder or the objective.
    Frozen blocks stay in eval mode and run without a graph, and so do frozen batch norms but for
    their weight and bias, which are trained with their block.
    """

    def __init__(
        self, encoder: PatchNetwork, mil: nn.Module, *, train_blocks: int | None,
        enc_bn: Literal["frozen", "batch", "sync"],
        enc_grad: Literal["auto", "graph", "cached", "checkpointed"], batch_size: int,
        p_batch_size: int, p_batch_size_v: int, img_size: int, img_transform: Kind,
        crop_scale: float, channels: Literal["RGB", "BGR"],
    ) -> None:
        super().__init__()
        n_blocks = len(encoder.blocks())
        self.n_frozen = _n_frozen(n_blocks, train_blocks)
        self.trained = self.n_frozen < n_blocks
        self.resting = False
        self.enc_bn, self.enc_grad = enc_bn, enc_grad
        self.batch_size = batch_size
        self.p_batch_size, self.p_batch_size_v = p_batch_size, p_batch_size_v
        self.embed_dim = encoder.dim
        self.objective = cast(SlideModel, mil).objective
        self.contextual = cast(SlideModel, mil).contextual
        self.encoder = encoder.to(memory_format=torch.channels_last)
        self.mil = mil
        self.transform = PatchTransform(
            img_size=img_size, img_transform=img_transform, crop_scale=crop_scale,
            channels=channels, mean=encoder.mean, std=encoder.std)
        for part in self._frozen():
            part.requires_grad_(False)
        self._check()
        if enc_bn == "sync":
            convert(encoder)
        self.train()

    # ------------------------------------------------------------------------ what is trained

    def _frozen(self) -> Sequence[nn.Module]:
        return self.encoder.blocks()[:self.n_frozen] if self.trained else [self.encoder]

    def _check(self) -> None:
        """``Refused`` where an option would do nothing, or never end."""
        blocks = self.encoder.blocks()[self.n_frozen:]
        norms = any(isinstance(one, _BatchNorm) for block in blocks for one in block.modules())
        rules = [
            (self.enc_bn != "frozen" and not norms,
             f"--enc_bn {self.enc_bn}: no batch norm of the encoder is trained: leave it out"),
            (self.enc_grad != "auto" and not self.trained,
             f"--enc_grad {self.enc_grad}: nothing of the encoder is trained (--train_blocks 0): "
             "leave it out"),
            (self.enc_bn == "sync" and self.objective.needs_batch,
             "--enc_bn sync shares statistics between slides encoded together, Cox passes each "
             "slide alone: choose --enc_bn frozen or --bag_loss nll_surv")]
        for wrong, message in rules:
            if wrong:
                raise Refused(message)

    def rest(self, resting: bool) -> None:
        """See ``utils.contracts.JointEncoder``."""
        self.resting = resting

    def train(self, mode: bool = True) -> Self:
        """Training mode for all that is trained; see the class."""
        super().train(mode)
        for part in [self.encoder] if self.resting else self._frozen():
            part.eval()
        if self.enc_bn == "frozen":
            for module in self.encoder.modules():
                if isinstance(module, _BatchNorm):
                    module.training = False  # of the norm alone: timm's hold dropout as well
        return self

    # ------------------------------------------------------------------------ the slide model

    def forward(self, bag: Bag) -> SlideOutput:
        """What the slide model says of the features of the bag's patches, or of those it has.

        Without gradient the patches are streamed: beside the features memory does not grow with
        their number.
        """
        if bag.patches is None:
            return cast(SlideModel, self.mil)(bag)
        features = self._features(self._parts([bag]))
        return cast(SlideModel, self.mil)(replace(bag, features=features, patches=None))

    def losses(self, bag: Bag) -> Iterator[StepLoss]:
        """The slide model's losses; of a bag with patches, see ``encode``."""
        if bag.patches is None:
            yield from cast(SlideModel, self.mil).losses(bag)
            return
        with closing(self.encode([bag])) as encoded:
            for one in encoded:
                yield from cast(SlideModel, self.mil).losses(one)

    def encode(self, bags: Sequence[Bag]) -> Generator[Bag, None, None]:
        """See ``utils.contracts.JointEncoder``. Chunks go across the borders of slides.

        ``ItemFailed`` names the slide whose patches cannot be read; with shared statistics the
        other processes are not kept waiting for it, nor for a bag that is given up.
        """
        parts = self._parts(bags)
        features = self._features(parts)
        if parts.error is not None:
            self._accompany(features)
            raise parts.error
        leaves = [rows.detach().requires_grad_(features.requires_grad)
                  for rows in features.split([len(patches_of(bag)) for bag in bags])]
        try:
            for bag, leaf in zip(bags, leaves, strict=True):
                yield replace(bag, features=leaf, patches=None)
        except GeneratorExit:
            if parts.shared:
                self._accompany(features)
            raise
        used = parts.shared or any(leaf.grad is not None for leaf in leaves)
        if used and features.requires_grad:
            gradient = torch.cat([torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
                                  for leaf in leaves] or [torch.zeros_like(features)])
            with torch.autocast(features.device.type, enabled=False):
                features.backward(gradient)

    @torch.no_grad()
    def features(self, patches: PatchImages) -> torch.Tensor:
        """(N, D) float32 on the model's device, without gradient."""
        bag = Bag(slide_id="", features=torch.empty(len(patches), 0), patches=patches)
        return self._features(self._parts([bag]))

    # ------------------------------------------------------------------------ the encoder

    def _parts(self, bags: Sequence[Bag]) -> PatchParts:
        """The patches of all bags in chunks, as many on every process that shares statistics."""
        most = self.p_batch_size if self.training else self.p_batch_size_v
        total = sum(len(patches_of(bag)) for bag in bags)
        group = self._sharing()
        n_parts = max(group.gather(-(-total // most)))
        return PatchParts(bags, share_out(total, n_parts), shared=group.size > 1)

    def _sharing(self) -> Group:
        """The processes whose batch norms wait for each other."""
        shares = self.enc_bn == "sync" and self.training and not self.resting
        return current_group() if shares else ALONE

    def _features(self, parts: PatchParts) -> torch.Tensor:
        """(N, D) float32 of all patches, with gradient where grad mode is on."""
        with _single_patches(parts):
            learns = self.trained and not self.resting
            if learns and torch.is_grad_enabled() and parts.sizes:
                return self._with_gradient(parts)
            device = next(self.parameters()).device
            found = torch.empty(sum(parts.sizes), self.embed_dim, device=device)
            with torch.no_grad():
                for rows, part in zip(found.split(parts.sizes), parts(), strict=True):
                    rows.copy_(self._embed(part))
            return found

    def _with_gradient(self, parts: PatchParts) -> torch.Tensor:
        how = self.enc_grad
        if how == "auto":
            how = "graph" if len(parts.sizes) == 1 else "cached"
        if how == "cached":
            device = next(self.parameters()).device
            return torch.cat(two_pass(parts, self._embed, module=self.encoder, device=device))
        run = self._checkpointed if how == "checkpointed" else _run
        return torch.cat([self._embed(part, run) for part in parts()])

    def _embed(self, part: Part, run_trained: Run = _run) -> torch.Tensor:
        """A chunk of patches to (n, D) float32."""
        device = next(self.parameters()).device
        pieces = [self.transform(piece.to(device, non_blocking=True)) for piece in part]
        if not pieces:
            side = self.transform.img_size
            pieces = [torch.empty(0, 3, side, side, device=device)]
        images = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if device.type == "cpu" and not (self.training or torch.is_grad_enabled()):
            return torch.cat([self._encode(few, run_trained) for few in images.split(_CPU_BATCH)])
        return self._encode(images, run_trained)

    def _encode(self, images: torch.Tensor, run_trained: Run) -> torch.Tensor:
        """Normalised images to (n, D) float32; the frozen blocks without a graph."""
        turns = count()

        def run(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
            if next(turns) >= self.n_frozen:
                return run_trained(block, x)
            with torch.no_grad():
                return _run(block, x)

        features: torch.Tensor = self.encoder(images, run)
        return features.float()

    def _checkpointed(self, block: nn.Module, x: torch.Tensor) -> torch.Tensor:
        """What is inside the block is computed again in the backward pass, not held."""
        found: torch.Tensor = checkpoint(
            block, x, use_reentrant=False,
            context_fn=lambda: (nullcontext(), kept_buffers(block)))
        return found

    def _accompany(self, features: torch.Tensor) -> None:
        """A backward pass without effect, for the processes that wait for this one's share."""
        weights = [one for one in self.encoder.parameters() if one.requires_grad]
        torch.autograd.grad(features, weights, torch.zeros_like(features), allow_unused=True)


def _n_frozen(n_blocks: int, train_blocks: int | None) -> int:
    """How many of the first blocks are not trained; ``Refused`` when there are fewer blocks."""
    if train_blocks is None:
        return 0
    if train_blocks > n_blocks:
        raise Refused(f"--train_blocks is {train_blocks}, but the encoder has {n_blocks} blocks: "
                      "leave it out to train all")
    return n_blocks - train_blocks


@contextmanager
def _single_patches(parts: PatchParts) -> Iterator[None]:
    """``ItemFailed`` where torch says that there is nothing to take statistics of."""
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        names = ", ".join(bag.slide_id for bag in parts.bags)
        raise ItemFailed(f"{names}: one patch alone, shrunk to one pixel, has no batch statistics: "
                         "give --enc_bn frozen, or more patches in --p_batch_size") from None
