"""What tests with real processes on this machine want: a port, and patience."""

import socket
import time
from collections.abc import Callable
from typing import Any


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def until(happens: Callable[[], Any], seconds: float = 150) -> Any:
    """A busy machine takes a minute for what an idle one does in ten seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := happens():
            return found
        time.sleep(0.1)
    raise AssertionError(f"did not happen within {seconds} s")
