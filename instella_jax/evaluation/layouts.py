"""The layouts of nine benchmarks: which pictures of which prompts, in which files.

Each function reads the benchmark's own prompt files, which the user has, and returns what is to be
made: `Piece`s, one for every file or group of files that is written at once. The layouts are those
that the benchmarks' own programs read (2026). Picture j of a prompt has the seed SEED + j in all of
them; where a prompt comes again, it goes on counting.
"""

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from instella_jax.errors import UserError

_LONGEST_NAME = 255


@dataclasses.dataclass(frozen=True)
class Piece:
    """Pictures of a prompt that are made and written together.

    Attributes:
      prompt: their prompt.
      files: one for each picture; or one for all, as a grid of two by two.
      count: of pictures.
      first: j of the first picture among those of the prompt.
      grid: whether one file has all of them.
      texts: contents of other files by their names, written before the pictures.
    """

    prompt: str
    files: tuple[str, ...]
    count: int
    first: int = 0
    grid: bool = False
    texts: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a benchmark wants its pictures.

    Attributes:
      pieces: makes them of the prompt files, the pictures a prompt, and the model's name.
      count: pictures a prompt by default.
      prompts: what the prompt files are, in words.
      most: the most pictures a prompt.
      index: makes the contents of other files once all is there, by their names, of the pieces and
        the folder.
    """

    pieces: Callable[[Sequence[Path], int, str], list[Piece]]
    count: int
    prompts: str
    most: int = 10_000
    index: Callable[[Sequence[Piece], Path], dict[str, Any]] | None = None


def counted(pieces: Sequence[Piece]) -> list[Piece]:
    """Let the pictures of a prompt that comes again go on counting."""
    seen: Counter[str] = Counter()
    result = []
    for piece in pieces:
        result.append(dataclasses.replace(piece, first=seen[piece.prompt]))
        seen[piece.prompt] += piece.count
    return result


def read_text(path: Path) -> str:
    """Return a text file's content.

    Raises:
      UserError: it cannot be read as UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"prompt file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"prompt file {path} is not UTF-8: save it as UTF-8") from None


def _lines(paths: Sequence[Path]) -> Iterator[str]:
    for path in paths:
        yield from (line for line in read_text(path).splitlines() if line.strip())


def _json_lines(paths: Sequence[Path]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in _lines(paths):
        try:
            values = json.loads(line)
            yield line, {**values, "prompt": str(values["prompt"])}
        except (ValueError, TypeError, KeyError):
            raise UserError(
                f"{paths[0]} has the line {line[:60]!r}: expected a JSON object with a prompt"
            ) from None


def _records(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """Yield the objects of JSON lists, or the rows of CSV files, of several files."""
    for path in paths:
        text = read_text(path)
        if path.suffix.lower() == ".csv":
            yield from csv.DictReader(io.StringIO(text, newline=""))
            continue
        try:
            values = json.loads(text)
        except ValueError as error:
            raise UserError(f"prompt file {path} is not valid JSON ({error})") from None
        if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
            raise UserError(f"prompt file {path}: expected a list of objects")
        yield from values


def _field(record: Mapping[str, Any], *names: str) -> str:
    """Return the first of some fields that a record has.

    Raises:
      UserError: it has none.
    """
    for name in names:
        if record.get(name) not in (None, ""):
            return str(record[name])
    raise UserError(f"a prompt has none of the fields {', '.join(names)}: {str(record)[:80]}")


def _plain_name(text: str, what: str, forbidden: str = "/\0") -> str:
    """Return a text that is to be part of a file's name.

    Raises:
      UserError: it cannot be.
    """
    if any(letter in text for letter in forbidden) or text in ("", ".", ".."):
        raise UserError(f"{what} {text!r} cannot be a file's name: it may not hold {forbidden!r}")
    return text


def geneval(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`00000/metadata.jsonl`, line N of the prompt file, and `00000/samples/0000.png` and on."""
    return [
        Piece(
            values["prompt"],
            tuple(f"{row:05d}/samples/{n:04d}.png" for n in range(count)),
            count,
            texts={f"{row:05d}/metadata.jsonl": line + "\n"},
        )
        for row, (line, values) in enumerate(_json_lines(paths))
    ]


def geneval2(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`images/00000.png` and on; `image_paths.json` says which is of which prompt."""
    prompts = dict.fromkeys(values["prompt"] for _, values in _json_lines(paths))
    return [Piece(p, (f"images/{row:05d}.png",), 1) for row, p in enumerate(prompts)]


def dpg_bench(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`NAME.png` for `NAME.txt`: a grid of two by two."""
    found = [f for p in paths for f in (sorted(p.glob("*.txt")) if p.is_dir() else [p])]
    for path in found:
        if "." in path.stem:
            raise UserError(f"{path} has a second dot: DPG-Bench takes what is before the first")
    return [
        Piece(read_text(path).strip(), (f"{path.stem}.png",), count, grid=True) for path in found
    ]


def t2i_compbench(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`samples/PROMPT_000000.png`, numbered through; a prompt ends at a tab."""
    pieces = []
    for row, line in enumerate(_lines(paths)):
        prompt = line.split("\t")[0]
        # The evaluation takes the prompt out of the name, up to the first underscore.
        _plain_name(prompt, "prompt", "/\0_")
        numbers = range(row * count, (row + 1) * count)
        names = tuple(f"samples/{prompt}_{n:06d}.png" for n in numbers)
        if len(names[-1].encode()) - len("samples/") > _LONGEST_NAME:
            raise UserError(f"prompt {prompt[:60]!r} is too long for a file's name")
        pieces.append(Piece(prompt, names, count))
    return pieces


# Folders by the categories of the prompt files, as the benchmark's own programs have them.
_ONEIG = {
    "Anime_Stylization": "anime",
    "Portrait": "human",
    "General_Object": "object",
    "Text_Rendering": "text",
    "Knowledge_Reasoning": "reasoning",
    "Multilingualism": "multilingualism",
}


def oneig(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`anime/MODEL/ID.webp` and the other classes: grids of two by two."""
    _plain_name(model, "--name")
    pieces = []
    for record in _records(paths):
        category = _field(record, "category")
        folder = _ONEIG.get(category)
        if folder is None:
            raise UserError(f"OneIG has no category {category!r}: expected {', '.join(_ONEIG)}")
        name = _plain_name(_field(record, "id"), "id")
        prompt = _field(record, "prompt_en", "prompt_cn", "prompt_zh", "prompt")
        pieces.append(Piece(prompt, (f"{folder}/{model}/{name}.webp",), count, grid=True))
    return pieces


def wise(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`1.png` and on, by the prompts' own numbers."""
    return [
        Piece(_field(record, "Prompt"), (f"{int(_field(record, 'prompt_id'))}.png",), 1)
        for record in _records(paths)
    ]


def unigenbench(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`en/MODEL/0_0.png` to `0_3.png` and on; the folder is what the file is called after."""
    _plain_name(model, "--name")
    pieces = []
    for path in paths:
        words = path.stem.split("prompts_")[-1]
        folder = words if words in ("en", "en_long", "zh", "zh_long") else "en"
        for record in _records([path]):
            row = int(_field(record, "index"))
            language = folder.split("_")[0]
            prompt = _field(record, f"prompt_{language}", "prompt")
            names = tuple(f"{folder}/{model}/{row}_{n}.png" for n in range(count))
            pieces.append(Piece(prompt, names, count))
    return pieces


def _numbered(paths: Sequence[Path], count: int, folder: str) -> list[Piece]:
    prompts = [prompt for prompt in _lines(paths) for _ in range(count)]
    return [Piece(p, (f"{folder}/{row:08d}.png",), 1) for row, p in enumerate(prompts)]


def hpsv3(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`images/00000000.png` and on; `hpsv3.json` has the lists that `reward` takes by keyword."""
    return _numbered(paths, count, "images")


def adm(paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """`00000000.png` and on, which become one file of numbers in the end."""
    return _numbered(paths, count, ".")


def _paths_by_prompt(pieces: Sequence[Piece], folder: Path) -> dict[str, Any]:
    paths = {piece.prompt: str((folder / piece.files[0]).resolve()) for piece in pieces}
    return {"image_paths.json": paths}


def _lists(pieces: Sequence[Piece], folder: Path) -> dict[str, Any]:
    paths = [str((folder / piece.files[0]).resolve()) for piece in pieces]
    prompts = [piece.prompt for piece in pieces]
    return {"hpsv3.json": {"prompts": prompts, "image_paths": paths}}


LAYOUTS = {
    "geneval": Layout(geneval, 4, "evaluation_metadata.jsonl"),
    "geneval2": Layout(geneval2, 1, "geneval2_data.jsonl", most=1, index=_paths_by_prompt),
    "dpg-bench": Layout(dpg_bench, 4, "the folder dpg_bench/prompts", most=4),
    "t2i-compbench": Layout(t2i_compbench, 10, "a list such as examples/dataset/color_val.txt"),
    "oneig": Layout(oneig, 4, "OneIG-Bench.json, or its CSV", most=4),
    "wise": Layout(wise, 1, "the JSON files of data/", most=1),
    "unigenbench": Layout(unigenbench, 4, "data/test_prompts_en.csv or another of them"),
    "hpsv3": Layout(hpsv3, 1, "a text file, a prompt a line", index=_lists),
    "adm": Layout(adm, 1, "a text file, a prompt a line"),
}


def read_pieces(benchmark: str, paths: Sequence[Path], count: int, model: str) -> list[Piece]:
    """Return what an export makes, checked.

    Raises:
      UserError: the prompt files cannot be used, or the number of pictures.
    """
    layout = LAYOUTS[benchmark]
    if not 1 <= count <= layout.most:
        raise UserError(
            f"{count} images a prompt: {benchmark} takes 1"
            + (f" to {layout.most}" if layout.most > 1 else "")
        )
    try:
        pieces = counted(layout.pieces(paths, count, model))
    except ValueError as error:
        raise UserError(f"a number in {paths[0]} cannot be read ({error})") from None
    if not pieces:
        raise UserError(f"{paths[0]} holds no prompt: expected {layout.prompts}")
    twice = [name for name, n in Counter(f for p in pieces for f in p.files).items() if n > 1]
    if twice:
        raise UserError(f"two prompts would be written to {twice[0]}: check the prompt files")
    return pieces
