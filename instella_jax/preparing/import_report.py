"""What an import has kept and left out: counted, put together, and told in lines."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from instella_jax.data.images import is_picture
from instella_jax.preparing.items import NO_CAPTION, UNPAIRED, NotRead

# Names that are told of each reason, and columns that are told where there is no caption.
EXAMPLES, NAMES = 5, 30


@dataclasses.dataclass
class Tally:
    """Counts by reason, with the first few examples of each."""

    numbers: dict[str, int] = dataclasses.field(default_factory=dict)
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, reason: str, number: int = 1) -> None:
        """Count something that is named by one name."""
        self.merge({reason: number}, {reason: [name]})

    def merge(self, numbers: Mapping[str, int], examples: Mapping[str, Sequence[str]]) -> None:
        """Add the counts of another tally."""
        for reason, number in numbers.items():
            self.numbers[reason] = self.numbers.get(reason, 0) + number
            names = self.examples.setdefault(reason, [])
            names += examples[reason][: EXAMPLES - len(names)]


def _most_first(numbers: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(numbers.items(), key=lambda entry: -entry[1]))


def summarize(
    results: Sequence[Mapping[str, Any]], not_read: Iterable[NotRead] = ()
) -> dict[str, Any]:
    """Add up the results of units, and files that belong to none.

    All of "read" is in "kept" or "dropped"; "not_read" counts files of other kinds.
    """
    dropped, flaws, others = Tally(), Tally(), Tally()
    for result in results:
        dropped.merge(result["dropped"], result["examples"])
        flaws.merge(result.get("flaws", {}), result["examples"])
        others.merge(result.get("not_read", {}), result.get("not_read_examples", {}))
    for file in not_read:
        others.add(file.name, file.kind)
    kept = sum(result["kept"] for result in results)
    return {
        "read": kept + sum(dropped.numbers.values()),
        "kept": kept,
        "captions": sum(result["captions"] for result in results),
        "bytes": sum(result["shard"]["bytes"] for result in results if result["shard"]),
        "shards": sum(result["shard"] is not None for result in results),
        "dropped": _most_first(dropped.numbers),
        "flaws": _most_first(flaws.numbers),
        "examples": {**dropped.examples, **flaws.examples},
        "not_read": _most_first(others.numbers),
        "not_read_examples": others.examples,
        # Nobody knows how many pictures were in what could not be read of them.
        "damaged_files": sum(bool(result["damaged"]) for result in results),
        "damage": [place for result in results for place in result["damaged"]][:EXAMPLES],
        # Columns, keys and files beside the pictures without a caption.
        "seen": list(dict.fromkeys(name for r in results for name in r.get("seen", ())))[:NAMES],
    }


def report_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """Format a report as lines."""
    yield (
        f"kept {report['kept']} of {report['read']} pictures with {report['captions']} captions "
        f"in {report['shards']} shard(s), {report['bytes'] / 2**20:.1f} MiB"
    )
    for reason, number in report["dropped"].items():
        yield f"  left out, {reason}: {number} ({_some(report['examples'][reason], number)})"
    if {NO_CAPTION, UNPAIRED} <= report["dropped"].keys():
        yield (
            "  a picture and its caption go together by their names, 000123.jpg and 000123.txt or "
            "000123.json, and only within one tar"
        )
    if hint := caption_hint(report):
        yield f"  {hint}"
    for flaw, number in report["flaws"].items():
        yield f"  kept as it is, {flaw}: {number} ({_some(report['examples'][flaw], number)})"
    for kind, number in report["not_read"].items():
        yield f"  not read, {kind}: {number} ({_some(report['not_read_examples'][kind], number)})"
    if any(is_picture(f"a{kind}") for kind in report["not_read"]):
        yield (
            "  pictures beside tar or Parquet files are read by --kind=folder, into a folder of "
            "their own"
        )
    if report["damaged_files"]:
        places = ", ".join(report["damage"])
        yield f"  damaged files, read in part: {report['damaged_files']} ({places})"


def caption_hint(report: Mapping[str, Any]) -> str:
    """Say where captions could have been; "" where none was missed."""
    if not report["seen"]:
        return ""
    return (
        f"pictures without a caption have {', '.join(report['seen'])}: name what their captions "
        "are in by --caption-keys, or keep them by --no-captions"
    )


def _some(examples: Sequence[str], number: int) -> str:
    return ", ".join(examples) + (", ..." if number > len(examples) else "")
