"""Names of slide models: those of the registry, ``e2e_<encoder>_<slide model>``, and
``streaming_<network>``.

An end-to-end model is an encoder and any slide model, trained together. A streaming model takes a
slide as one image; what follows its network is the option ``head``. Imports no torch.
"""

from __future__ import annotations

import difflib

from utils.contracts import Material
from utils.errors import Refused

E2E, STREAMING = "e2e_", "streaming_"
MIL_NAMES = ("abmil", "abmilx", "clam_mb", "clam_sb", "dsmil", "hag_mil", "max", "mean", "mil",
             "transmil")  # of models.slide_models, where a test compares them


def material_of(model_type: str) -> Material:
    """What a model learns from: which kind of bag it takes."""
    if is_end_to_end(model_type):
        return "patches"
    return "images" if is_streaming(model_type) else "features"


def is_streaming(model_type: str) -> bool:
    """Does this model take a slide as one image?"""
    return model_type.startswith(STREAMING)


def is_end_to_end(model_type: str) -> bool:
    """Does this model make its features itself, of patches?"""
    return model_type.startswith(E2E)


def known_name(model_type: str) -> bool:
    """Is this the name of a model (as far as the encoder's own name can be left open)?"""
    try:
        split_name(model_type)
    except Refused:
        return False
    return True


def mil_name(model_type: str) -> str:
    """The slide model of a name, ``abmilx`` of ``e2e_r18_abmilx``; "" of a streaming model.
    ``Refused`` if unknown."""
    return split_name(model_type)[1]


def split_name(model_type: str) -> tuple[str, str]:
    """(encoder, slide model) of a name; the encoder is "" for a model that takes features, the
    slide model "" for a streaming one.

    The longest slide model that the name ends in counts, so ``e2e_r18_clam_sb`` is r18 with
    clam_sb. ``Refused`` when there is none, with the nearest name.
    """
    names = MIL_NAMES
    if is_streaming(model_type):
        network = model_type.removeprefix(STREAMING)
        if not network:
            raise Refused("model_type 'streaming_' lacks the network: give streaming_resnet34, for "
                          "example")
        return network, ""
    if not is_end_to_end(model_type):
        if model_type not in names:
            near = difflib.get_close_matches(model_type, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
            raise Refused(f"unknown slide model '{model_type}': {hint} (or e2e_<encoder>_<one of "
                          "them>, which trains an encoder too, or streaming_<network>)")
        return "", model_type
    rest = model_type.removeprefix(E2E)
    fitting = [name for name in names if rest.endswith(f"_{name}") and rest != f"_{name}"]
    if not fitting:
        raise Refused(f"model_type '{model_type}' is e2e_<encoder>_<slide model>, but it ends in "
                      f"no slide model: {', '.join(names)}")
    mil = max(fitting, key=len)
    return rest.removesuffix(f"_{mil}"), mil
