"""Reports of an evaluation: JSON with all that is needed to repeat it, and a table in Markdown."""

import contextlib
import datetime
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from instella_jax.runtime.files import fresh_folder, write_bytes, write_json

_PACKAGES = ("instella-jax", "jax", "flax", "numpy", "pillow")


def _versions() -> dict[str, str]:
    """Return versions by package, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def provenance() -> dict[str, Any]:
    """Return what ran, on what and when: command, versions, devices, date (UTC)."""
    devices = jax.devices()
    return {
        "command": ["instella-jax", *sys.argv[1:]],
        "python": platform.python_version(),
        "versions": _versions(),
        "devices": f"{len(devices)} {devices[0].platform}: {devices[0].device_kind}",
        "processes": jax.process_count(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table in Markdown; numbers with a fraction get three digits after the point."""

    def cell(value: Any) -> str:
        return f"{value:.3f}" if isinstance(value, float) else str(value).replace("|", "\\|")

    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(cell, line))} |\n" for line in lines)


def save_report(folder: Path, report: dict[str, Any], table: str) -> None:
    """Write `report.json`, with where it comes from, and `report.md`, its table."""
    write_json(folder / "report.json", {**report, "provenance": provenance()})
    write_bytes(folder / "report.md", table.encode())


def publish(
    out: Path | None, report: dict[str, Any], head: Sequence[str], rows: Sequence[Sequence[Any]]
) -> None:
    """Print a table, and write it with the report to a new folder where one is given."""
    table = markdown_table(head, rows)
    if out is not None:
        with fresh_folder(out) as folder:
            save_report(folder, report, table)
    print(table, end="")
