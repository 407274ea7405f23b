"""Builds `instella_jax/assets/sprites/sprites.zip` from three npm packages.

The art is drawn once, by this script, and shipped; nobody needs it to use the package. To rebuild:

    npm install @twemoji/svg@15.0.0 @iconify-json/fluent-emoji-flat@1.2.6 emojibase-data@17.0.0
    pip install resvg-py pillow
    python tools/build_sprites.py --modules node_modules

Concepts are joined by code points; one is kept if it exists in every style, has a plain name, and
looks different from those kept before it (see `_plain_name` and `_distinct`).
"""

import argparse
import io
import json
import re
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from instella_jax.data.scenes.english import is_countable, plural
from instella_jax.data.scenes.sprites import ASSET, BACKGROUNDS, CORE, SPRITE_SIDE

RENAMED = {
    "deciduous tree": "tree",
    "red apple": "apple",
    "hamburger": "burger",
    "automobile": "car",
    "sailboat": "boat",
    "crescent moon": "moon",
    "wrapped gift": "gift",
    "grey heart": "gray heart",
    "black large square": "black square",
    "white large square": "white square",
}
# Their words would be confused with those for places, relations, numbers and sizes, or with states.
UNWANTED = re.compile(
    r"\b(left|right|leftwards|rightwards|up|down|upwards|downwards|top|above|below|middle"
    r"|button|arrow|arrows|japanese|keycap|input|clock|thirty|small|medium|large|medium-small"
    r"|background|corner|center|centre|two|three|one|no|not|and|index|mark|sign|symbol"
    r"|away|done|off|mode|locked|unlocked|muted|volume|voltage|foggy|dizzy|savoring|exhaling"
    r"|vomiting|gesturing|increasing|decreasing|struck|zzz|ok|oncoming|showing|departure|arrival"
    r"|high|low|poo|bowling|bikini|briefs|kaaba|suit|fleur-de-lis)\b"
)
# Activities are not things; these words are things all the same.
ACTIVITY = re.compile(r"(?<!\bw)(?<!\br)(?<!l)ing$")
BUILDINGS = ("building",)
# Of people only those that need no "man", "woman" or "person" in front.
PEOPLE = re.compile(
    r"^(man|woman|men|women|people|person|mx|mrs|deaf|old|older|pregnant) "
    r"|\b(feeding|holding|boy|girl|women|merman|merperson)\b"
)
SYMBOL_NOUNS = ("circle", "square", "star", "asterisk", "loop", "menorah", "cross", "yang", "badge")
# In units of 255: mean difference of two sprites on gray below which they count as the same.
SAME_PICTURE = 9.0
# A sprite is hidden where under this share of it differs from the background by this distance.
VISIBLE_SHARE, VISIBLE_DISTANCE = 0.6, 85.0
# Twemoji fills its square to the edge: a margin keeps neighbours apart. Fluent has one of its own.
INK_SIDE = {"twemoji": 58, "fluent": 64}


def _plain_name(label: str, group: str, labels: set[str]) -> str | None:
    """Return the word captions use for an emojibase label, None if there is none worth having."""
    name = label.lower()
    if group == "animals-nature" and f"{name} face" in labels:
        return None  # the whole animal; its face reads better when small and takes the name
    if group == "animals-nature" and name.endswith(" face"):
        return name.removesuffix(" face")
    name = RENAMED.get(name, name)
    if not re.fullmatch(r"[a-z]+(?:[ -][a-z]+)*", name) or len(name.split()) > 3:
        return None
    if UNWANTED.search(name) or (ACTIVITY.search(name) and not name.endswith(BUILDINGS)):
        return None
    if group == "people-body" and PEOPLE.search(name):
        return None
    if group == "symbols" and not name.endswith(SYMBOL_NOUNS):
        return None
    return name


def _render(svg: str, side: int) -> Image.Image:
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_string=svg, width=side, height=side)
    canvas = Image.new("RGBA", (SPRITE_SIDE, SPRITE_SIDE))
    margin = (SPRITE_SIDE - side) // 2
    canvas.paste(Image.open(io.BytesIO(bytes(png))).convert("RGBA"), (margin, margin))
    return canvas


class Twemoji:
    """SVG text by code points out of @twemoji/svg."""

    def __init__(self, modules: Path):
        """Remember where the package lies under node_modules."""
        self.folder = modules / "@twemoji" / "svg"

    def svg(self, code: str) -> str | None:
        """Return the drawing of a concept, None where the style has none."""
        for spelling in (code, code.replace("-fe0f", "")):
            path = self.folder / f"{spelling}.svg"
            if path.exists():
                return path.read_text()
        return None


class FluentFlat:
    """SVG text by code points out of @iconify-json/fluent-emoji-flat."""

    def __init__(self, modules: Path):
        """Read the package's icons under node_modules."""
        folder = modules / "@iconify-json" / "fluent-emoji-flat"
        self.names = json.loads((folder / "chars.json").read_text())
        data = json.loads((folder / "icons.json").read_text())
        self.icons, self.aliases = data["icons"], data.get("aliases", {})

    def svg(self, code: str) -> str | None:
        """Return the drawing of a concept, None where the style has none or only mirrors
        another."""
        name = self.names.get(code) or self.names.get(code.replace("-fe0f", ""))
        if name in self.aliases and self.aliases[name].keys() == {"parent"}:
            name = self.aliases[name]["parent"]
        if name not in self.icons:
            return None
        body = self.icons[name]["body"]
        return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">{body}</svg>'


def _on(image: Image.Image, colour: tuple[int, int, int]) -> np.ndarray:
    canvas = Image.new("RGBA", image.size, (*colour, 255))
    return np.asarray(Image.alpha_composite(canvas, image).convert("RGB"), np.float32)


def _hidden(name: str, image: Image.Image) -> list[str]:
    """Return the backgrounds on which a sprite can hardly be seen, or whose colour it is named
    after."""
    pixels = np.asarray(image, np.float32)
    solid = pixels[..., :3][pixels[..., 3] > 127]
    hidden = []
    for background, colour in BACKGROUNDS.items():
        distance = np.linalg.norm(solid - np.asarray(colour, np.float32), axis=-1)
        seen = np.mean(distance > VISIBLE_DISTANCE)
        if seen < VISIBLE_SHARE or name.split()[0] == background:
            hidden.append(background)
    return hidden


def build(modules: Path, quality: int) -> tuple[dict, dict[str, bytes]]:
    """Render and select; return the index and the WebP files by their path in the archive."""
    makers = {"twemoji": Twemoji(modules), "fluent": FluentFlat(modules)}
    emoji = json.loads((modules / "emojibase-data" / "en" / "data.json").read_text())
    groups = json.loads((modules / "emojibase-data" / "meta" / "groups.json").read_text())["groups"]
    labels = {entry["label"].lower() for entry in emoji}
    concepts, files, seen, kept = [], {}, set(), []
    # The core first, so that nothing that looks alike can take its place.
    named = []
    for entry in emoji:
        group = groups.get(str(entry.get("group")), "")
        name = _plain_name(entry["label"], group, labels)
        if name:
            named.append((entry, group, name))
    # "houses" is also how captions call two of "house".
    plurals = {plural(name) for _, _, name in named if is_countable(name)}
    named = [n for n in named if n[2] not in plurals or n[2] in CORE]
    named.sort(key=lambda n: n[2] not in CORE)
    for entry, group, name in named:
        code = entry["hexcode"].lower()
        drawings = {style: maker.svg(code) for style, maker in makers.items()}
        if name in seen or not all(drawings.values()):
            continue
        images = {style: _render(svg, INK_SIDE[style]) for style, svg in drawings.items()}
        grey = {style: _on(image, (128, 128, 128)) for style, image in images.items()}
        if name not in CORE and not _distinct(grey, kept):
            continue
        seen.add(name)
        kept.append(grey)
        hidden = {style: _hidden(name, image) for style, image in images.items()}
        concepts.append(
            {
                "name": name,
                "code": code,
                "group": group,
                "hidden": hidden,
            }
        )
        for style, image in images.items():
            buffer = io.BytesIO()
            image.save(buffer, "WEBP", quality=quality, method=6, alpha_quality=90)
            files[f"{style}/{code}.webp"] = buffer.getvalue()
    missing = set(CORE) - seen
    if missing:
        raise SystemExit(f"core concepts without a drawing in every style: {sorted(missing)}")
    return {"styles": list(makers), "concepts": concepts}, files


def _distinct(grey: dict[str, np.ndarray], kept: list[dict[str, np.ndarray]]) -> bool:
    """Return whether a picture differs from all kept ones, in every style."""
    return all(
        np.abs(image - other[style]).mean() > SAME_PICTURE
        for other in kept
        for style, image in grey.items()
    )


def main() -> None:
    """Parse the command line and write the archive."""
    parser = argparse.ArgumentParser(description="Builds the sprite archive.")
    parser.add_argument("--modules", type=Path, required=True, help="npm's node_modules folder")
    parser.add_argument("--out", type=Path, default=ASSET, help="the archive to write")
    parser.add_argument("--quality", type=int, default=88, help="WebP quality, 0 to 100")
    args = parser.parse_args()
    index, files = build(args.modules, args.quality)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(args.out, "w") as archive:
        entries = {"index.json": json.dumps(index, separators=(",", ":")).encode(), **files}
        for path, data in entries.items():
            # A fixed date: the same input gives the same bytes.
            info = zipfile.ZipInfo(path, date_time=(2020, 1, 1, 0, 0, 0))
            kind = zipfile.ZIP_DEFLATED if path.endswith(".json") else zipfile.ZIP_STORED
            archive.writestr(info, data, compress_type=kind)
    print(f"{len(index['concepts'])} concepts, {args.out.stat().st_size / 1e6:.2f} MB: {args.out}")


if __name__ == "__main__":
    main()
