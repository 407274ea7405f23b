"""The process that serves: page and API on one port, from its start to a graceful end.

fastapi, uvicorn and gradio are of the extra [app], and so are imported where they are used.
"""

import asyncio
import contextlib
import ipaddress
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

from instella_jax.app.api import Api
from instella_jax.app.studio import Studio
from instella_jax.errors import UserError

# Seconds that pictures which were asked for may still take after a signal to stop, and that
# connections have to close then.
DRAIN, CLOSE = 60.0, 2.0
# Everything that the page loads is the server's own.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)
HEADERS = {
    b"content-security-policy": POLICY.encode(),
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


class _Headers:
    """Adds `HEADERS` to what an application answers."""

    def __init__(self, app: Any):
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def add(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *HEADERS.items()]
            await send(message)

        await self._app(scope, receive, add if scope["type"] == "http" else send)


def make_app(studio: Studio, *, page: bool = True, host: str = "127.0.0.1", key: str = "") -> Any:
    """Return the application that answers for a studio.

    Args:
      studio: what makes the pictures.
      page: whether there is a web page besides the API.
      host: address that is listened at; at one of this machine alone, requests must be addressed
        to this machine by name, which a web page of somebody else's cannot make a browser do.
      key: what clients of the API must give; "" for none.
    """
    from fastapi import FastAPI

    app: Any = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    Api(studio, key).add_to(app)
    if page:
        from instella_jax.app.page import mount

        app = mount(app, studio)
    app.add_middleware(_Headers)
    if is_loopback(host):
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        hosts = ["localhost", "127.0.0.1", "[::1]", "::1", host]
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=hosts)
    return app


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens.

    Raises:
      UserError: the address is not to be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
        sock.listen(128)
    except OSError as error:
        sock.close()
        raise UserError(
            f"cannot listen at {host}:{port} ({error.strerror}): give --port=N, or --port=0 for "
            "any that is free"
        ) from None
    return sock


def serve(app: Any, studio: Studio, sock: socket.socket) -> None:
    """Answer requests until a signal to stop, then finish what was asked for.

    Args:
      app: of `make_app`.
      studio: likewise; it takes no more requests afterwards.
      sock: of `listen`.
    """
    import uvicorn

    class Server(uvicorn.Server):
        """Finishes the queue before it closes connections, and ends with status 0."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            caught = (signal.SIGINT, signal.SIGTERM)
            before = [signal.signal(number, self.handle_exit) for number in caught]
            try:
                yield
            finally:
                for number, handler in zip(caught, before, strict=True):
                    signal.signal(number, handler)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for server in self.servers:
                server.close()
            drained = asyncio.ensure_future(asyncio.to_thread(studio.batcher.drain, DRAIN))
            while not drained.done() and not self.force_exit:
                await asyncio.wait({drained}, timeout=0.1)
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=int(CLOSE),
        server_header=False,
    )  # fmt: skip
    Server(config).run(sockets=[sock])
