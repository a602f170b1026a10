"""MILwright's tables of slides, patient-level splits, and bags of features for the training loop.

May import ``wsi_core`` and ``utils``; never ``models``. Third-party packages of the name
``datasets`` are not meant here: import those late, and from outside the repository root.
"""
