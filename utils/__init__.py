"""Ground floor: storage, options, registry, engine, losses, metrics, parallel work, reports.

Imports none of ``wsi_core``, ``models``, ``datasets``.
"""

__version__ = "0.1.0"
