"""What the flags of main.py and eval.py say of where bags come from, and the stores behind them.

Features, patches or whole images: which one a model takes decides what flags have an effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from datasets.image_options import ImageAugmentOptions, ImageSourceOptions
from datasets.patch_bag_options import DrawOptions, PatchSourceOptions
from utils.contracts import Material
from utils.errors import Refused
from utils.options import pick

if TYPE_CHECKING:
    from datasets.image_bags import ImageBags
    from datasets.image_store import ImageStore
    from datasets.patch_bags import PatchBags
    from datasets.patch_store import PatchStore
    from datasets.table import SlideTable


@dataclass(frozen=True, kw_only=True)
class PixelSourceOptions(PatchSourceOptions, ImageSourceOptions):
    """Where pixels are; of main.py and eval.py."""


@dataclass(frozen=True, kw_only=True)
class TrainingSourceOptions(PixelSourceOptions, DrawOptions, ImageAugmentOptions):
    """The same, and how they vary in training."""


_PLACES: dict[Material, type] = {"patches": PatchSourceOptions, "images": ImageSourceOptions}
_DRAWS: dict[Material, type] = {"patches": DrawOptions, "images": ImageAugmentOptions}
_FLAGS: dict[Material, dict[str, Any]] = {  # and their defaults
    "features": {"data_root_dir": None, "feature_dir": None, "child_levels": (), "child_dirs": (),
                 "feature_encoder": None, "cache": "auto", "lazy_children": False,
                 "data_h5_dir": None, "encoder_ckpt": None},
    **{material: {item.name: item.default for kind in (_PLACES[material], _DRAWS[material])
                  for item in fields(kind)} for material in _PLACES}}
_LAZY = ("data_slide_dir", "slide_ext")  # of --lazy_children too


@dataclass(frozen=True, kw_only=True)
class PixelSource:
    """Where the pixels of bags are (keywords of ``PatchStore.open`` or ``ImageStore.open``), and
    how those of training slides are drawn (of ``PatchBags`` or ``ImageBags``)."""

    material: Material
    place: Mapping[str, Any]
    draws: Mapping[str, Any] = field(default_factory=dict)

    def open(self) -> PatchStore | ImageStore:
        """The store; ``Refused`` when it is not there or not what it should be."""
        if self.material == "patches":
            from datasets.patch_store import PatchStore

            return PatchStore.open(**self.place)
        from datasets.image_store import ImageStore

        return ImageStore.open(**self.place)


def pixel_source(flags: object, *, model_type: str, material: Material,
                 trained: Mapping[str, Any] | None = None) -> PixelSource | None:
    """What the flags say of a model that learns from ``material``; None for features.

    flags: options that have those of ``PixelSourceOptions`` or more
    trained: what the images of its training were; --image_size and --whole_images are as there
        unless a size is given
    ``Refused`` when it is not said where the pixels are, and for a flag that does nothing.
    """
    _refuse_idle(flags, model_type=model_type, material=material)
    if material == "features":
        return None
    place = pick(_PLACES[material], flags)
    if material == "patches" and place["patches"] is None:
        raise Refused(f"--patches is missing: {model_type} learns from patches, an LMDB of "
                      "create_patches_fp.py --save_lmdb, or its folder of coordinates with "
                      "--data_slide_dir")
    if material == "images":
        if place["slide_images"] is None and place["image_mpp"] is None:
            raise Refused(f"--slide_images is missing: {model_type} learns from whole slides, the "
                          "folder slide_images of create_patches_fp.py --slide_images, or give "
                          "--data_slide_dir and --image_mpp to read slides themselves")
        if place["image_size"] is None:
            known = trained or {}
            place["image_size"] = known.get("image_size", 0)
            place["whole_images"] |= known.get("whole_images", False)
    draws = _DRAWS[material]
    own = all(hasattr(flags, item.name) for item in fields(draws))
    return PixelSource(material=material, place=place, draws=pick(draws, flags) if own else {})


def pixel_bags(table: SlideTable, store: PatchStore | ImageStore, *, pin: bool = False,
               draws: Mapping[str, Any] | None = None) -> PatchBags | ImageBags:
    """The bags of a table with the pixels of a store."""
    from datasets.image_bags import ImageBags
    from datasets.image_store import ImageStore
    from datasets.patch_bags import PatchBags

    if isinstance(store, ImageStore):
        return ImageBags(table, store, pin=pin, **(draws or {}))
    return PatchBags(table, store, pin=pin, **(draws or {}))


def _refuse_idle(flags: object, *, model_type: str, material: Material) -> None:
    """``Refused`` for a changed flag that belongs to models of another kind."""
    own = {*_FLAGS[material], *(_LAZY if material == "features" and
                                hasattr(flags, "lazy_children") else ())}
    for name, default in {name: default for kind in _FLAGS.values()
                          for name, default in kind.items()}.items():
        if name not in own and getattr(flags, name, default) != default:
            what = {"images": "whole images"}.get(material, material)
            raise Refused(f"--{name} has no effect: {model_type} learns from {what}; leave it out")
