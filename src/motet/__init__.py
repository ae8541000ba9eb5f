"""motet: federated preference alignment that keeps conflicting tastes apart."""

import os

# Telemetry of the libraries below is off unless a user turns it on; nothing here reaches for the network at import.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
