"""`instella-jax keys`: every key of the configs, its range and its meaning."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from instella_jax.commands.config_file import find_config, load_config, shipped_configs
from instella_jax.config_keys import KEYS, flat

TITLE = """\
# Keys of the configs

Written by `instella-jax keys`, from `instella_jax/config_keys.py`. Each is changed as
`--config.KEY=VALUE`; other values than those expected are refused before anything begins.
`instella-jax keys t2i_diffusion:instella_512` prints what a config has. Numbers are finite
everywhere, and a path may begin with `~`.
"""


def values_of(config: str) -> dict[str, Any]:
    """Return the values by key of the config that a value of --config stands for.

    Raises:
      UserError: there is no such file or variant.
    """
    return dict(flat(load_config(find_config(config))))


def _section(name: str) -> str:
    return name.split(".")[0] if "." in name else "The run as a whole"


def table(values: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield lines of Markdown: a table for each section of keys.

    Args:
      values: of each column of values, by its title: values by key.
    """
    names = [name for name in KEYS if any(name in column for column in values.values())]
    for section, members in itertools.groupby(names, _section):
        yield f"\n## {section}\n"
        yield f"| key | {' | '.join(values)} | expected | meaning |"
        yield "|---" * (3 + len(values)) + "|"
        for name in members:
            cells = [f"`{c[name]!r}`" if name in c else "" for c in values.values()]
            cells = [f"`{name}`", *cells, KEYS[name].expected, KEYS[name].meaning]
            yield f"| {' | '.join(cells)} |"


def document() -> str:
    """Return `docs/config.md`: all keys, with what they are in the demos."""
    configs = {f"`{name}`": values_of(name) for name in shipped_configs()}
    return "\n".join([TITLE.rstrip(), *table(configs)]) + "\n"


def main(config: str | None) -> dict[str, dict[str, Any]]:
    """Print all keys, or those of one config; return what is expected of each, and its value.

    Raises:
      UserError: there is no such config.
    """
    about = {name: {"expected": k.expected, "meaning": k.meaning} for name, k in KEYS.items()}
    if config is None:
        print(document(), end="")
        return about
    values = values_of(config)
    print("\n".join(table({"value": values})).lstrip())
    return {name: {"value": value, **about[name]} for name, value in values.items()}
