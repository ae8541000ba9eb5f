"""Mixing: one run of MoR, from settings to a folder.

In:  a recipe (``mor``, ``mor-demo``), settings, a folder.
Out: clients with their reward models, a router, a server's model trained with their scores. See ``docs/mixture.md``.
"""

from collections.abc import Mapping

MIXTURES: Mapping[str, str] = {
    "mor-demo": "five domains of drawn pictures; needs no data",
    "mor": "five domains of real pictures, found by --data",
}
"""Recipes of mixtures, and what each is."""
