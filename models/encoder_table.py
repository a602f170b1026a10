"""The table of ``--list_encoders``: every encoder, and what is missing here to use it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from models.encoder_networks import ENCODERS
from models.encoder_registry import missing_package
from models.encoder_weights import is_local


def encoder_table(plugins: Sequence[Path] = ()) -> list[dict[str, Any]]:
    """A row an encoder, by name; torch is not imported (unless plug-ins are loaded).

    Columns: name, aliases, dim, patch_px and mpp_um ("" = no recommendation), precision (on a
    GPU), output, licence, gated, remote_code, weights ("found" or ""), missing (pip command for
    its package, or ""), source.
    """
    if plugins:
        from models.encoder_plugin import load_plugins

        load_plugins(plugins)
    specs = [ENCODERS.get(name) for name in ENCODERS]
    return [{"name": spec.name, "aliases": " ".join(spec.aliases), "dim": spec.dim,
             "patch_px": spec.patch_px or "", "mpp_um": spec.mpp_um or "",
             "precision": spec.precision, "output": spec.output, "licence": spec.licence,
             "gated": "yes" if spec.gated else "", "remote_code": "yes" if spec.remote_code else "",
             "weights": "found" if is_local(spec.weights) else "",
             "missing": missing_package(spec), "source": spec.source} for spec in specs]
