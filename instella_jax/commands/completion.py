"""`instella-jax completion`: what a shell runs to complete commands, by argcomplete."""

import argparse
from typing import Any

from instella_jax.errors import UserError

EXAMPLES = """\
examples:
  eval "$(instella-jax completion bash)"               in ~/.bashrc
  instella-jax completion zsh > ~/.zfunc/_instella-jax
  instella-jax completion fish > ~/.config/fish/completions/instella-jax.fish"""


def add_parser(commands: Any) -> None:
    """Add `completion` to the parser of the console command."""
    parser = commands.add_parser(
        "completion",
        help="a script that completes this command in a shell",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    parser.add_argument("shell", choices=("bash", "zsh", "fish"))


def _library() -> Any:
    try:
        import argcomplete
    except ImportError:
        raise UserError(
            "completion needs the package argcomplete: pip install 'instella-jax[completion]'"
        ) from None
    return argcomplete


def run(options: argparse.Namespace) -> None:
    """Print the script.

    Raises:
      UserError: argcomplete is not installed.
    """
    print(_library().shellcode(["instella-jax"], shell=options.shell))


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell that has asked, and end the process."""
    try:
        library = _library()
    except UserError:
        raise SystemExit(1) from None
    library.autocomplete(parser)
