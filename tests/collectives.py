"""Which collectives of a compiled program may run at the same time."""

import itertools
import re

KINDS = r" (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("


def computations(text):
    """Yields the lines `name = ...` of each computation of a program, by its name."""
    for found in re.finditer(r"^(?:ENTRY )?%(\S+) .*\{\n((?:  .*\n)+)\}", text, re.MULTILINE):
        lines = (line.strip().removeprefix("ROOT ") for line in found[2].splitlines())
        yield found[1], dict(line[1:].split(" = ", 1) for line in lines if line.startswith("%"))


def at_once(text):
    """Pairs of operations with collectives, of which neither waits for the other.

    Args:
      text: a compiled program, in which what is called or used comes before.
    """
    communicates, pairs = set(), []
    for computation, operations in computations(text):
        waits_for = {}
        for name, operation in operations.items():
            uses = set(re.findall(r"%([\w.\-]+)", operation))
            before = [waits_for[x] | ({x} & communicates) for x in uses & waits_for.keys()]
            waits_for[name] = set().union(*before)
            if re.search(KINDS, operation) or uses - operations.keys() & communicates:
                communicates.add(name)
        own = [name for name in operations if name in communicates]
        if own:
            communicates.add(computation)
        pairs += [(a, b) for a, b in itertools.combinations(own, 2) if a not in waits_for[b]]
    return pairs
