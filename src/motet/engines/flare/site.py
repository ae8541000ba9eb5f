"""The site's part of a job: one published method, bytes in and bytes out.

In:  a frame from the server of the job.
Out: the frame that the site's host answers; nothing where it cannot.

What the host is stands in the environment of the site's own process (``processes``): a job cannot say what is opened.
No exception gets through, for FLARE would carry its traceback to the server. The object stays as long as the job does,
so that models are loaded once.
"""

import importlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nvflare.collab import collab

from motet.engines.flare.processes import OPEN_HOST, SITE, SITE_ENTRY, SITES

log = logging.getLogger(__name__)


class FlareSite:
    """Opens its host when the job begins, and passes frames on to it."""

    def __init__(self) -> None:
        self._host: Any = None
        self._opening = threading.Lock()

    @collab.init  # type: ignore[untyped-decorator]
    def begin(self) -> None:
        """Open in the background: to load a model takes longer than FLARE waits for a site to say hello."""
        leave_with_parent()
        threading.Thread(target=self._tried, args=(collab.site_name,), daemon=True, name="open-host").start()

    @collab.publish  # type: ignore[untyped-decorator]
    def handle(self, kind: str, step: int, frame: bytes) -> bytes:
        """What the host answers; nothing where there is no answer. Never raises."""
        try:
            answer = self._opened(collab.site_name).handle(kind, step, frame)
            if isinstance(answer, bytes):
                return answer
            log.error("the host answered %s with %s, not with bytes", kind, type(answer).__name__)
        except Exception:
            log.exception("the host could not answer %s", kind)  # at the site only
        return b""

    def _opened(self, site: str) -> Any:
        with self._opening:
            if self._host is None:  # tried again at the next request where it failed
                paths = json.loads(os.environ[SITES]) if SITES in os.environ else {site: os.environ[SITE]}
                self._host = entry(os.environ.get(SITE_ENTRY, OPEN_HOST))(Path(paths[site]))
        return self._host

    def _tried(self, site: str) -> None:
        try:
            self._opened(site)
        except Exception:
            log.exception("the host cannot be opened")


def entry(name: str) -> Callable[..., Any]:
    """``module:function``."""
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def leave_with_parent() -> None:
    """End this job's process when the server or site that started it is gone: nobody would end it otherwise."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="stay-with-parent").start()
