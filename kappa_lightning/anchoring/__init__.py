"""Holding on to the pretrained model: its tensors, its outputs, and the way back to it.

Nothing here knows Lightning. :mod:`pretrained` keeps what trains as it was; :mod:`losses` says how far the outputs have
moved; :mod:`strength` weighs that against the new task; :mod:`path` and :mod:`spectral_filter` lead from the trained
weights back; :mod:`choice` picks a point there; :mod:`checkpoints` walks in files.
"""
