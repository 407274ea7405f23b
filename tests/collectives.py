"""The collectives of a compiled program: between which devices, and which may run at once."""

import itertools
import re

import numpy as np

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


def kinds(text):
    """Yields each operation that communicates, and the groups of devices that do.

    Args:
      text: a compiled program.
    """
    everyone = np.arange(int(re.search(r"num_partitions=(\d+)", text)[1]))
    for line in text.splitlines():
        found = re.search(KINDS, line)
        if found:
            yield found[1], _groups(line, everyone).tolist()


def _groups(line, everyone):
    """Devices [groups, size] of an operation, in any of the forms in which XLA writes them."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        return np.array([row.split(",") for row in re.findall(r"\{([\d,]+)\}", listed[1])], int)
    if "replica_groups={}" in line:
        return everyone[None]
    cut = re.search(r"replica_groups=\[(\d+),\d+\]<=(\[\S+)", line)
    if cut:
        return _order(cut[2]).reshape(int(cut[1]), -1)
    mesh, ids, axes = re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((\[.*?\](?:T\(.*?\))?)\))? \{(.*?)\}", line
    ).groups()
    together = {name: part for name, *part in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", axes)}
    shape, among = [], []
    for name, size in re.findall(r"'(\w+)'=(\d+)", mesh):
        size = int(size)
        if any(together.get(name, ())):  # a part of an axis
            before, part = map(int, together[name])
            shape += [before, part, size // before // part]
        else:
            shape += [1, size, 1]
        if name in together:
            among.append(len(shape) - 2)
    devices = (_order(ids) if ids else everyone).reshape(shape)
    devices = np.moveaxis(devices, among, range(-len(among), 0))
    return devices.reshape(-1, np.prod([shape[i] for i in among], dtype=int))


def _order(text):
    """Device numbers in the order that "[4,2]T(1,0)" is."""
    shape, axes = re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    shape = [int(n) for n in shape.split(",")]
    devices = np.arange(np.prod(shape)).reshape(shape)
    return devices.transpose([int(n) for n in axes.split(",")] if axes else None).reshape(-1)
