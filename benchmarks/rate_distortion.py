"""Rate and distortion of a tokenizer beside JPEG, WebP, AVIF and JPEG XL.

Each codec at every quality, on pictures as they are and made smaller first (to 1/2, 1/4, 1/8 of
their side, and enlarged again), which is what reaches down to the fewest bytes. A codec's curve is
the best of these at each size. LPIPS, which costs most, is measured only of the points that lead in
PSNR or SSIM, up to the bytes that the plot shows. Bytes are those of whole files; of JPEG also
without its header, as a program would keep it that stores the tables once.

JPEG XL needs pillow-jxl-plugin, the plot matplotlib: pip install 'instella-jax[benchmarks]'.
"""

import argparse
import io
import json
import time
from pathlib import Path

import numpy as np
from PIL import Image, features

from benchmarks.plotting import load_pyplot
from instella_jax import BinaryTokenizer
from instella_jax.data.transforms import resize
from instella_jax.errors import UserError, command_line
from instella_jax.evaluation.heldout_pictures import open_pictures
from instella_jax.evaluation.reconstruction import figures
from instella_jax.losses.perceptual import load_lpips

SCALES = (1, 2, 4, 8)
MOST_BYTES = 3_000  # of the plot
QUALITIES = (0, 1, 2, 3, 5, 7, 10, 15, 20, 30, 40, 50, 60, 70, 80, 90, 95)


def codecs() -> dict[str, dict]:
    """Return Pillow's format and options of each codec that is here."""
    found = {"JPEG": dict(format="JPEG", optimize=True, subsampling=2)}
    if features.check("webp"):
        found["WebP"] = dict(format="WEBP", method=6)
    if features.check("avif"):
        found["AVIF"] = dict(format="AVIF", speed=2, subsampling="4:2:0")
    try:
        import pillow_jxl  # noqa: F401
    except ImportError:
        print("JPEG XL is left out: pip install 'instella-jax[benchmarks]'")
    else:
        found["JPEG XL"] = dict(format="JXL", effort=7)
    return found


def through(
    picture: np.ndarray, options: dict, quality: int, scale: int
) -> tuple[bytes, np.ndarray]:
    """Return the file of a picture, and the picture that it holds."""
    height, width = (max(8, side // scale) for side in picture.shape[:2])
    file = io.BytesIO()
    small = Image.fromarray(resize(picture, height, width))
    small.save(file, quality=max(quality, 1) if options["format"] == "JPEG" else quality, **options)
    file.seek(0)
    copy = np.asarray(Image.open(file).convert("RGB"))
    return file.getvalue(), resize(copy, *picture.shape[:2])


def scan_bytes(data: bytes) -> int:
    """Return the bytes of a JPEG file after its tables."""
    return len(data) - data.index(b"\xff\xda")


def mean_figures(pictures: np.ndarray, copies: np.ndarray, params) -> dict[str, float]:
    """Return the mean of each figure over pictures."""
    parts = [
        figures(pictures[i : i + 64], copies[i : i + 64], params)
        for i in range(0, len(pictures), 64)
    ]
    return {name: float(np.concatenate([p[name] for p in parts]).mean()) for name in parts[0]}


def coded(
    options: dict, pictures: np.ndarray, quality: int, scale: int
) -> tuple[list[bytes], np.ndarray]:
    """Return the files of pictures, and the pictures that they hold."""
    made = [through(picture, options, quality, scale) for picture in pictures]
    return [data for data, _ in made], np.stack([copy for _, copy in made])


def measure_codec(name: str, options: dict, pictures: np.ndarray, params) -> list[dict]:
    """Return a point for each quality and scale, of JPEG one more without its header."""
    points = []
    for scale in SCALES:
        for quality in QUALITIES:
            files, copies = coded(options, pictures, quality, scale)
            point = {
                "codec": name,
                "scale": scale,
                "quality": quality,
                "bytes": float(np.mean([len(data) for data in files])),
                **mean_figures(pictures, copies, None),
            }
            if name == "JPEG":
                point["scan_bytes"] = float(np.mean([scan_bytes(data) for data in files]))
            points.append(point)
    if params is not None:
        shown = [point for point in points if point["bytes"] <= MOST_BYTES]
        leading = [*best(shown, "psnr"), *best(shown, "ssim")]
        for point in {id(point): point for point in leading}.values():
            _, copies = coded(options, pictures, point["quality"], point["scale"])
            point["lpips"] = mean_figures(pictures, copies, params)["lpips"]
    scans = [point for point in points if "scan_bytes" in point]
    return points + [
        {**point, "codec": "JPEG without header", "bytes": point["scan_bytes"]} for point in scans
    ]


def best(points: list[dict], figure: str) -> list[dict]:
    """Return the points that no other beats in both bytes and a figure that they have, by bytes."""
    sign = -1 if figure == "lpips" else 1
    front: list[dict] = []
    points = [point for point in points if figure in point]
    for point in sorted(points, key=lambda p: (p["bytes"], -sign * p[figure])):
        if not front or sign * point[figure] > sign * front[-1][figure]:
            front.append(point)
    return front


def at_bytes(front: list[dict], size: float, figure: str) -> float | None:
    """Return a figure at a size, between two points by the logarithm of bytes; None below all."""
    if size < front[0]["bytes"]:
        return None
    places = np.log([p["bytes"] for p in front])
    return float(np.interp(np.log(size), places, [p[figure] for p in front]))


def bytes_for(front: list[dict], value: float, figure: str) -> float | None:
    """Return the bytes at which a front reaches a figure, None where it does not."""
    sign = -1 if figure == "lpips" else 1
    values = [sign * p[figure] for p in front]
    if sign * value > values[-1]:
        return None
    return float(np.exp(np.interp(sign * value, values, np.log([p["bytes"] for p in front]))))


def table(points: list[dict], ours: dict, names: list[str]) -> str:
    """Return the table in Markdown."""
    shown = [name for name in ("psnr", "ssim", "lpips") if name in ours]
    head = ["codec", "fewest bytes", "their PSNR", f"PSNR at {ours['bytes']:.0f} bytes"]
    head += [f"{name.upper()} there" for name in shown[1:]]
    head += [f"bytes for {ours['psnr']:.1f} dB"]
    lines = [head, ["---"] * len(head)]
    for name in names:
        own = [p for p in points if p["codec"] == name]
        smallest = min(own, key=lambda p: p["bytes"])
        fronts = {figure: best(own, figure) for figure in shown}
        cells = [name, f"{smallest['bytes']:.0f}", f"{smallest['psnr']:.1f} dB"]
        for figure in shown:
            value = at_bytes(fronts[figure], ours["bytes"], figure)
            digits, unit = (1, " dB") if figure == "psnr" else (3, "")
            cells.append("-" if value is None else f"{value:.{digits}f}{unit}")
        needed = bytes_for(fronts["psnr"], ours["psnr"], "psnr")
        cells.append("-" if needed is None else f"{needed:.0f}")
        lines.append(cells)
    mine = [f"tokenizer ({ours['code_bytes']} bytes of bits)", f"{ours['bytes']:.0f}"]
    mine += [f"{ours['psnr']:.1f} dB"] * 2 + [f"{ours[name]:.3f}" for name in shown[1:]]
    lines.append([*mine, f"{ours['bytes']:.0f}"])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(points: list[dict], ours: dict, names: list[str], path: Path) -> None:
    """Draw a curve for each codec."""
    pyplot = load_pyplot()
    shown = [name for name in ("psnr", "ssim", "lpips") if name in ours]
    labels = {"psnr": "PSNR (dB)", "ssim": "SSIM", "lpips": "LPIPS (less is better)"}
    figure, axes = pyplot.subplots(1, len(shown), figsize=(5 * len(shown), 4.2))
    for axis, name in zip(np.atleast_1d(axes), shown, strict=True):
        for codec in names:
            front = best([p for p in points if p["codec"] == codec], name)
            style = "--" if "without" in codec else "-"
            axis.plot([p["bytes"] for p in front], [p[name] for p in front], style, label=codec)
        axis.plot([ours["bytes"]], [ours[name]], "k*", markersize=14, label="tokenizer")
        axis.set(xscale="log", xlabel="bytes a picture", ylabel=labels[name], xlim=(40, MOST_BYTES))
        axis.grid(alpha=0.3)
    np.atleast_1d(axes)[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print the table, and write the plot and all points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="tokenizer (default: %(default)s)")
    parser.add_argument(
        "--pictures", default="scenes", help="a folder, or scenes, the held-out ones of the demo"
    )
    parser.add_argument("--count", type=int, default=128, help="pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("rate_distortion"), help="a folder")
    arguments = parser.parse_args()
    with command_line():
        run(arguments)


def run(arguments: argparse.Namespace) -> None:
    """Measure as the arguments say.

    Raises:
      UserError: the model or the pictures cannot be read, or matplotlib is missing.
    """
    start = time.perf_counter()
    tokenizer = BinaryTokenizer.from_pretrained(arguments.model)
    side = tokenizer.shapes[0][0]
    found = np.concatenate(list(open_pictures(arguments.pictures, side, 64, arguments.count)))
    try:
        params = load_lpips()
    except UserError as error:
        params = None
        print(f"LPIPS is left out: {error}")
    codes = tokenizer.encode(found)
    copies = tokenizer.decode(codes, side, side)
    ours = {
        "bytes": float(np.mean([len(tokenizer.to_bytes(picture)) for picture in found[:4]])),
        "code_bytes": -(-tokenizer.num_tokens * tokenizer.bits // 8),
        **mean_figures(found, copies, params),
    }
    points: list[dict] = []
    for name, options in codecs().items():
        points += measure_codec(name, options, found, params)
    names = list(dict.fromkeys(point["codec"] for point in points))
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = table(points, ours, names)
    (arguments.out / "rate_distortion.md").write_text(lines)
    whole = {"pictures": len(found), "side": side, "tokenizer": ours, "points": points}
    (arguments.out / "rate_distortion.json").write_text(json.dumps(whole, indent=1))
    plot(points, ours, names, arguments.out / "rate_distortion.png")
    print(lines, end="")
    print(f"{len(found)} pictures, {time.perf_counter() - start:.0f} s: {arguments.out}")


if __name__ == "__main__":
    main()
