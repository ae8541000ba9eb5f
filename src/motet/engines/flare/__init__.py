"""NVIDIA FLARE 2.9 as an engine: resident sites over mutual TLS, asked one frame at a time.

In:  names of sites, a host and a port; then the settings of a run.
Out: start-up kits, processes, and a carrier for whoever serves the run; the run folder is the server's business.

Files, in the order of use: ``kits`` (certificates and what a site allows), ``processes`` (a server and its sites),
``site`` and ``carrier`` (what runs inside a job), ``job`` (a job without code; the simulator), ``following`` (submit,
follow, and submit again). NVIDIA FLARE is imported where it is used: importing motet never brings it.
"""

from motet.engines.flare.following import coordinate, status, stop
from motet.engines.flare.job import simulate
from motet.engines.flare.kits import add_site, provision
from motet.engines.flare.processes import Running, running, start_server, start_site

__all__ = [
    "Running",
    "add_site",
    "coordinate",
    "provision",
    "running",
    "simulate",
    "start_server",
    "start_site",
    "status",
    "stop",
]
