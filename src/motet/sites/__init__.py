"""Real sites: what runs at each owner of data, and what runs where they are coordinated.

In:  ``site.toml`` at a site, ``coordinate.toml`` at the coordinator.
Out: a host that answers a coordinator's requests; a run folder like any other.
"""
