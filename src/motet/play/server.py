"""Serving the page on this computer only.

In:  the folder of an aligned model, or any ``Playable``.
Out: a page on 127.0.0.1 that asks nothing of any other address, whoever's libraries it is made with.

Three fences: gradio's telemetry, sharing, web fonts and web app are off; a content security policy forbids the browser
to ask other addresses, even for a picture in an answer; and requests that another page of the same browser makes are
refused, for the export writes files.
"""

import os
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from motet.errors import ConfigError
from motet.play.contract import Playable
from motet.play.page import build
from motet.play.session import open_session

HOST = "127.0.0.1"
QUIET = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
"""Read by gradio and by the hub's client when they are imported."""
POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; "  # gradio compiles its templates in the browser
    "object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'none'"
)
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "Noto Sans", "Liberation Sans", "sans-serif"]

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class OwnPageOnly:
    """ASGI: refuses what another page asks for, and forbids this one to ask elsewhere."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        # a name that resolves to this computer is not enough: its page would come from elsewhere (DNS rebinding)
        if urlsplit(f"//{host}").hostname not in (HOST, "localhost") or (origin and urlsplit(origin).netloc != host):
            if scope["type"] == "http":
                await send({"type": "http.response.start", "status": 403, "headers": []})
                await send({"type": "http.response.body", "body": b"This page answers only to its own address."})
            else:
                await send({"type": "websocket.close", "code": 1008})
            return None

        async def fenced(message: Any) -> None:
            if message["type"] == "http.response.start":
                fences = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *fences]}
            await send(message)

        return await self.app(scope, receive, fenced)


def need_gradio() -> None:
    """Import it, with its telemetry off.

    Raises:
        ConfigError: It is not installed.
    """
    if find_spec("gradio") is None:
        raise ConfigError("motet play needs gradio; run: pip install 'motet[play]'")
    os.environ.update(QUIET)
    # gradio asks its own page whether it is up, which must not go through a proxy
    os.environ["NO_PROXY"] = ",".join(filter(None, (os.environ.get("NO_PROXY"), HOST, "localhost")))


def start(page: Any, port: int = 0, open_browser: bool = False) -> str:
    """Serve a page that ``build`` made, and return its address at once. ``page.close()`` ends it.

    Args:
        page: A ``gradio.Blocks``.
        port: Of 127.0.0.1; 0 takes the first free one from 7860 on.
        open_browser: Show it in the browser.

    Raises:
        ConfigError: The port is taken.
    """
    import gradio as gr
    from starlette.middleware import Middleware

    theme = gr.themes.Base(font=FONTS, font_mono=["ui-monospace", "monospace"])
    try:
        page.launch(
            server_name=HOST, server_port=port or None, inbrowser=open_browser, share=False, prevent_thread_lock=True,
            quiet=True, show_error=False, ssr_mode=False, pwa=False, mcp_server=False, run_history=False,
            enable_monitoring=False, footer_links=[], strict_cors=True, inline=False, num_workers=0,
            app_kwargs={
                "middleware": [Middleware(OwnPageOnly)], "docs_url": None, "redoc_url": None, "openapi_url": None,
            },
            theme=theme, css_paths=Path(__file__).with_name("play.css"),
        )  # fmt: skip
    except OSError as error:
        raise ConfigError(f"port must be a free one, got {port or '7860 to 7959'}: {error}; 0 looks for one") from None
    return f"http://{HOST}:{page.server_port}/"


def serve(folder: Path, cache: Path | None, port: int, open_browser: bool) -> None:
    """Show the page of an aligned model until the person presses Ctrl-C.

    Args:
        folder: What ``motet align`` wrote.
        cache: Feature cache.
        port: Of 127.0.0.1; 0 takes the first free one.
        open_browser: Show it in the browser.

    Raises:
        ConfigError: gradio is not installed, the port is taken, or the model has no prototypes.
        RunError: The folder holds no aligned model.
    """
    need_gradio()  # mistakes first: a language model takes seconds to open
    session: Playable = open_session(folder, cache)
    page = build(session)
    print(f"{session.title}: {start(page, port, open_browser)}  (Ctrl-C ends it)", flush=True)
    page.block_thread()
