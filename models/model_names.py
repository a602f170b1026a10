"""Names of slide models: those of the registry, and ``e2e_<encoder>_<slide model>``.

An end-to-end model is an encoder and any slide model, trained together. Imports no torch.
"""

from __future__ import annotations

import difflib

from utils.errors import Refused

E2E = "e2e_"
MIL_NAMES = ("abmil", "abmilx", "clam_mb", "clam_sb", "dsmil", "hag_mil", "max", "mean", "mil",
             "transmil")  # of models.slide_models, where a test compares them


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
    """The slide model of a name, ``abmilx`` of ``e2e_r18_abmilx``; ``Refused`` if unknown."""
    return split_name(model_type)[1]


def split_name(model_type: str) -> tuple[str, str]:
    """(encoder, slide model) of a name; the encoder is "" unless it is end to end.

    The longest slide model that the name ends in counts, so ``e2e_r18_clam_sb`` is r18 with
    clam_sb. ``Refused`` when there is none, with the nearest name.
    """
    names = MIL_NAMES
    if not is_end_to_end(model_type):
        if model_type not in names:
            near = difflib.get_close_matches(model_type, names, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(names)}"
            raise Refused(f"unknown slide model '{model_type}': {hint} (or e2e_<encoder>_<one of "
                          "them>, which trains an encoder too)")
        return "", model_type
    rest = model_type.removeprefix(E2E)
    fitting = [name for name in names if rest.endswith(f"_{name}") and rest != f"_{name}"]
    if not fitting:
        raise Refused(f"model_type '{model_type}' is e2e_<encoder>_<slide model>, but it ends in "
                      f"no slide model: {', '.join(names)}")
    mil = max(fitting, key=len)
    return rest.removesuffix(f"_{mil}"), mil
