"""`instella-jax app`: the web demo and the HTTP API."""

import argparse
import importlib.util
import logging
import os

from instella_jax.errors import UserError

PORT = 7860
KEY = "INSTELLA_JAX_API_KEY"
# What the extra [app] brings, by what is left out without the page.
NEEDED = ("fastapi", "uvicorn", "gradio")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to a parser."""
    parser = commands.add_parser(
        "app",
        help="a web page to try the models on, and an HTTP API in OpenAI's form",
        description="Serves a web page and, at /v1, an HTTP API in the form of OpenAI's images.",
        epilog="examples: instella-jax app; instella-jax app --api --port 8000; "
        "instella-jax app --model runs/t2i_diffusion --model demo_ar",
    )
    parser.set_defaults(run=run)
    parser.add_argument(
        "--model",
        action="append",
        metavar="MODEL",
        help="demo, demo_ar, a folder or an id of the Hugging Face hub; may be given several "
        "times (default: demo and demo_ar)",
    )
    parser.add_argument("--api", action="store_true", help="the API alone, without the page")
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at (default: 127.0.0.1, this machine alone; 0.0.0.0 is for all "
        "who can reach it)",
    )
    parser.add_argument(
        "--port", type=_port, default=PORT, help=f"default {PORT}; 0 for any that is free"
    )
    parser.add_argument(
        "--batch",
        type=_positive,
        default=8,
        help="pictures sampled at a time, at most (default 8)",
    )
    parser.add_argument(
        "--waiting",
        type=_positive,
        default=64,
        help="pictures that may wait; more are refused (default 64)",
    )


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: expected 0 to 65535")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 4_096:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from 1 to 4096")
    return int(text)


def run(options: argparse.Namespace) -> None:
    """Serve until a signal to stop.

    Raises:
      UserError: a package is missing, there is no such model, or the port is taken.
    """
    check_installed(page=not options.api)
    key = os.environ.get(KEY, "")
    if key and not options.api:
        raise UserError(f"{KEY} is set, and the page asks for no key: give --api, or unset it")
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    from instella_jax.app import server
    from instella_jax.app.requests import Limits
    from instella_jax.app.studio import Studio

    sock = server.listen(options.host, options.port)
    print("opening the models ...", flush=True)
    limits = Limits(batch=options.batch, waiting=options.waiting)
    studio = Studio.open(options.model or ["demo", "demo_ar"], limits)
    app = server.make_app(studio, page=not options.api, host=options.host, key=key)
    studio.warm_up()
    host, port = sock.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    if not server.is_loopback(options.host):
        guard = "with the key" if key else "without any key"
        print(f"warning: whoever reaches {shown}:{port} can make pictures, {guard}", flush=True)
    what = "API" if options.api else "page"
    path = "/v1" if options.api else ""
    print(f"{what} at http://{shown}:{port}{path} (Ctrl-C stops it)", flush=True)
    server.serve(app, studio, sock)
    print("stopped", flush=True)


def check_installed(page: bool) -> None:
    """Check that the extra is there.

    Raises:
      UserError: it is not.
    """
    needed = NEEDED if page else NEEDED[:-1]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"instella-jax app needs {', '.join(missing)}: pip install 'instella-jax[app]'"
        )
