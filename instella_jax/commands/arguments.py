"""Parsing of the command line: any mistake in it becomes one sentence."""

import itertools
import json
import re
import sys
from pathlib import Path

from absl import flags, logging

from instella_jax.commands.config_file import EXAMPLE, find_config, load_config
from instella_jax.errors import UserError
from instella_jax.user_paths import expand

NO_CONFIG = f"--config is missing: for example --config={EXAMPLE}"


def given(argv: list[str], flag: str) -> str | None:
    """Return the value that a flag has on a command line, None where it is not there."""
    value = None
    for item, following in itertools.zip_longest(argv, argv[1:], fillvalue=""):
        if match := re.fullmatch(rf"--?{flag}(?:=(.*))?", item, re.DOTALL):
            value = following if match[1] is None else match[1]
    return value


def with_own_config(argv: list[str]) -> list[str]:
    """Put the config of the workdir's run in the place of `--config` where that is to be used.

    Evaluation, sampling and planning with a workdir take the run's own config; so does training
    where no other is named.

    Raises:
      UserError: no config is named, and the workdir is of no run.
    """
    workdir, config = given(argv, "workdir"), given(argv, "config")
    training = (given(argv, "mode") or "train") == "train"
    if workdir is None or (training and config is not None):
        return argv
    if not (Path(expand(workdir)) / "config.json").is_file():
        if config is None:
            raise UserError(
                f"--config is missing, and {workdir} is not the workdir of a run, whose config "
                f"would be taken: give --config=FILE, for example {EXAMPLE}"
            )
        return argv
    if config is not None:
        config = find_config(config)
    rest, left_out = [], False
    for item in argv[1:]:
        if not left_out and not re.fullmatch(r"--?config(=.*)?", item, re.DOTALL):
            rest.append(item)
        left_out = item in ("--config", "-config")
    own = json.dumps({"workdir": expand(workdir), "config": config})
    return [argv[0], f"--config={Path(__file__).with_name('own_config.py')}:{own}", *rest]


def with_config_file(argv: list[str]) -> list[str]:
    """Return arguments whose --config names the file that `find_config` finds.

    Raises:
      UserError: there is none, or keys are changed without it.
    """
    result = list(argv)
    for index, item in enumerate(argv):
        match = re.fullmatch(r"--?config(?:=(.*))?", item, re.DOTALL)
        if not match:
            continue
        if match[1] is None:
            result[index + 1 : index + 2] = [find_config("".join(argv[index + 1 : index + 2]))]
        else:
            result[index] = f"--config={find_config(match[1])}"
    if given(argv, "config") is None and any(re.match(r"--?(no)?config\.", item) for item in argv):
        raise UserError(NO_CONFIG)
    return result


def unknown_key(error: Exception, argv: list[str]) -> UserError:
    """Return the sentence for a change of a key that the config does not have."""
    text = str(error)
    found = re.search(r"lookup: ([\w.]+)", text) or re.search(r"'(\w+)\\?'", text)
    name = found[1] if found else text
    names = (item.partition("=")[0] for item in argv)
    flag = next((n for n in names if re.search(rf"\.{re.escape(name)}\b", n)), "--config")
    near = re.search(r'Did you mean "(\w+)"', text)
    hint = f"did you mean {near[1]!r}?" if near else "the config file shows the keys there are"
    return UserError(f"unknown key {name!r} in {flag}: {hint}")


def default_workdir(config: str) -> Path:
    """Return runs/<config name>[-<variant>] of a --config argument."""
    path, _, variant = config.partition(":")
    name = Path(path).stem
    return Path("runs") / (f"{name}-{variant}" if variant else name)


def usage(text: str) -> str:
    """Return a text followed by the flags of a run, wherever they were started from."""
    module = flags.FLAGS.find_module_defining_flag("config")
    return f"{text}\nflags:\n{flags.FLAGS.module_help(module)}"


def parse_flags(argv: list[str], *, text: str) -> list[str]:
    """Parse the flags.

    Args:
      argv: the program's name and its arguments.
      text: what `--help` says above the flags.

    Returns:
      The name, and arguments that are no flags.

    Raises:
      UserError: a flag is unknown, its value does not fit, or the config file fails.
    """
    if {"--help", "-help", "-h"} & set(argv):
        print(usage(text))
        sys.exit(0)
    argv = with_own_config(argv)
    argv = [argv[0], *with_config_file(argv[1:])]
    if (config := given(argv, "config")) is not None:
        load_config(config)  # whose mistakes absl would bury in a traceback
    # Where the config's flags look for changed keys.
    sys.argv[:] = argv
    try:
        rest = flags.FLAGS(argv)
    except (AttributeError, KeyError) as error:
        raise unknown_key(error, argv[1:]) from None
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if flags.FLAGS["verbosity"].using_default_value:
        # absl would raise it to INFO, at which orbax tells every step of a save.
        flags.FLAGS.verbosity = logging.WARNING
    return rest
