"""`instella-jax eval fid`, `rfid` and `clip`: numbers about sets of pictures."""

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

from instella_jax.commands.json_report import add_json
from instella_jax.commands.report_arguments import (
    add_report_arguments,
    add_tokenizer_arguments,
    check_report_arguments,
)
from instella_jax.commands.sampled_model import add_distributed, joined
from instella_jax.errors import UserError
from instella_jax.user_paths import path_argument

_NAMES = {
    "fid": "FID",
    "rfid": "rFID",
    "vgg_frechet_distance": "Frechet distance of VGG16 features (no FID)",
}
_NOTE = "a set of fewer than 10,000 pictures makes the distance larger"


def add_fid(kinds: Any) -> None:
    """Add `fid`."""
    fid = kinds.add_parser(
        "fid",
        help="FID of a set of pictures, precision and recall",
        description="Compares two sets of pictures. Each is a folder, at any depth, or an .npz "
        "file with uint8 [n, h, w, 3] in arr_0.",
    )
    fid.add_argument("generated", type=path_argument, metavar="GENERATED")
    fid.add_argument("reference", type=path_argument, metavar="REFERENCE")
    fid.add_argument(
        "--crop", type=int, default=0, metavar="PIXELS",
        help="cut the largest square from the centre of the reference pictures and resize it, as "
        "the model saw them",
    )  # fmt: skip
    fid.add_argument(
        "--kernel", default="bicubic", choices=("bicubic", "lanczos"),
        help="of --crop: bicubic is what training takes, lanczos that of COCO-30k "
        "(default: %(default)s)",
    )  # fmt: skip
    _add_features(fid)
    fid.set_defaults(run=_fid)


def add_rfid(kinds: Any) -> None:
    """Add `rfid`."""
    rfid = kinds.add_parser(
        "rfid",
        help="FID of pictures that have gone through a tokenizer",
        description="Crops pictures as in training, sends them through their codes, and compares "
        "the two sets.",
    )
    add_tokenizer_arguments(rfid)
    rfid.add_argument("reference", type=path_argument, metavar="PICTURES")
    _add_features(rfid)
    rfid.set_defaults(run=_rfid)


def add_inception(kinds: Any) -> None:
    """Add `inception`."""
    take = kinds.add_parser(
        "inception",
        help="torch's file of FID's Inception weights -> safetensors, once, by torch",
    )
    take.add_argument("source", type=path_argument, metavar="FILE.pth")
    take.add_argument("out", type=path_argument, metavar="FILE.safetensors")
    add_json(take)
    take.set_defaults(run=_inception)


def add_clip(kinds: Any) -> None:
    """Add `clip`."""
    clip = kinds.add_parser(
        "clip",
        help="CLIP score of pictures and their captions",
        description="Returns the mean cosine of pictures and their captions, which are those of "
        "the metadata.jsonl in their folder, as sampling writes it.",
    )
    clip.add_argument("pictures", type=path_argument, metavar="FOLDER")
    clip.add_argument(
        "--clip", type=path_argument, required=True, metavar="DIR",
        help="folder of transformers' CLIPModel, as of openai/clip-vit-base-patch32",
    )  # fmt: skip
    _add_common(clip)
    clip.set_defaults(run=_clip)


def _add_features(parser: argparse.ArgumentParser) -> None:
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--inception", type=path_argument, metavar="FILE",
        help="Inception weights of FID: torch's file, or what `eval inception` has made of it",
    )  # fmt: skip
    which.add_argument(
        "--vgg", nargs="?", const="", metavar="FILES",
        help="a Frechet distance of VGG16 features in the place of FID, to be compared with "
        "itself only, by the weights of the extra [perceptual], or of files as LPIPS takes them",
    )  # fmt: skip
    parser.add_argument(
        "--resize", default="tf1", choices=("tf1", "clean"),
        help="to Inception's size: tf1 is the protocol of FID and rFID, clean that of clean-fid "
        "(default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--precision-recall", action="store_true", help="these two as well")
    parser.add_argument(
        "--no-cache", action="store_true", help="neither read nor keep statistics of the pictures"
    )
    _add_common(parser)


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_report_arguments(parser)
    add_distributed(parser)


def _fid(options: argparse.Namespace) -> dict[str, Any] | None:
    from instella_jax.evaluation.picture_sets import center_crop, open_pictures

    check_report_arguments(options)
    generated, reference = open_pictures(options.generated), open_pictures(options.reference)
    if options.crop:
        reference = center_crop(reference, options.crop, options.kernel)
    with joined(options):
        about = {
            "generated": os.fspath(options.generated),
            "reference": os.fspath(options.reference),
            "crop": options.crop,
            "kernel": options.kernel,
        }
        return _compare(options, generated, reference, about, "fid")


def _rfid(options: argparse.Namespace) -> dict[str, Any] | None:
    from instella_jax.evaluation.picture_sets import center_crop, open_pictures

    check_report_arguments(options)
    pictures = open_pictures(options.reference)
    with joined(options):
        from instella_jax.codec.tokenizer import BinaryTokenizer
        from instella_jax.evaluation.through_codes import reconstructed

        tokenizer = BinaryTokenizer.from_pretrained(options.model, batch_size=options.batch_size)
        side = options.image_size or tokenizer.shapes[0][0]
        tokenizer.network.config.grid(side, side)
        reference = center_crop(pictures, side)
        about = {
            "tokenizer": os.fspath(options.model),
            "weights": tokenizer.fingerprint,
            "reference": os.fspath(options.reference),
            "image_size": side,
        }
        return _compare(options, reconstructed(tokenizer, reference), reference, about, "rfid")


def _compare(
    options: argparse.Namespace, generated: Any, reference: Any, about: dict[str, Any], fid: str
) -> dict[str, Any] | None:
    """Print and publish the distance of two sets; return the report in the first process."""
    import jax

    from instella_jax.evaluation import feature_sets, frechet
    from instella_jax.evaluation.reports import publish
    from instella_jax.reporting.progress import Progress

    if options.inception is not None:
        extractor = feature_sets.inception_extractor(options.inception, options.resize)
    else:
        extractor = feature_sets.vgg_extractor(options.vgg)
    first = jax.process_index() == 0
    found = {}
    with contextlib.closing(Progress(enabled=first, interval=10.0)) as progress:
        for name, pictures in (("reference", reference), ("generated", generated)):
            found[name] = feature_sets.measure(
                pictures,
                extractor,
                keep=options.precision_recall,
                batch_size=options.batch_size,
                cache=None if options.no_cache else feature_sets.default_cache(),
                show=lambda done, total, name=name: progress.update(f"{name} {done}/{total}"),
            )
    if not first:
        return None
    a, b = found["generated"], found["reference"]
    distance = frechet.frechet_distance(a.statistics, b.statistics)
    name = fid if extractor.name == "fid" else extractor.name
    scores = {name: distance}
    if options.precision_recall:
        scores["precision"], scores["recall"] = frechet.precision_recall(b.features, a.features)
    counts = {name: one.statistics.count for name, one in found.items()}
    rows = [(_NAMES[name], distance)]
    rows += [(name, scores[name]) for name in ("precision", "recall") if name in scores]
    rows += [(f"{name} pictures", count) for name, count in counts.items()]
    report = {"scores": scores, "pictures": counts, "settings": extractor.settings, **about}
    publish(options.out, report, ("measure", "value"), rows)
    if min(counts.values()) < 10_000:
        print(_NOTE)
    return report


def _inception(options: argparse.Namespace) -> dict[str, str]:
    from instella_jax.evaluation.inception import load_inception, save_inception

    if options.out.exists():
        raise UserError(f"{options.out} is there already: give another name or move it away")
    if options.out.suffix != ".safetensors":
        raise UserError(f"{options.out}: expected a name with .safetensors")
    save_inception(load_inception(options.source), options.out)
    print(options.out)
    return {"out": str(options.out)}


def _captions(folder: Path) -> dict[str, str]:
    """Return captions by the names of files.

    Raises:
      UserError: there are none.
    """
    path = folder / "metadata.jsonl"
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        found = {str(row["file_name"]): str(row["text"]) for row in rows}
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): it says which caption is of which picture"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path} is not as sampling writes it: expected file_name and text in each line"
        ) from None
    if not found:
        raise UserError(f"{path} names no picture")
    return found


def _clip(options: argparse.Namespace) -> dict[str, Any] | None:
    check_report_arguments(options)
    captions = _captions(options.pictures)
    if missing := [name for name in captions if not (options.pictures / name).is_file()]:
        raise UserError(f"{options.pictures / missing[0]} is missing, its caption is not")
    with joined(options):
        import jax
        import numpy as np

        from instella_jax.evaluation.clip import clip_scores, load_clip
        from instella_jax.evaluation.picture_sets import listed
        from instella_jax.evaluation.reports import publish
        from instella_jax.reporting.progress import Progress
        from instella_jax.runtime.digest import digest

        clip, names = load_clip(options.clip), list(captions)
        first = jax.process_index() == 0
        with contextlib.closing(Progress(enabled=first, interval=10.0)) as progress:
            scores = clip_scores(
                clip,
                listed([options.pictures / name for name in names]),
                list(captions.values()),
                batch_size=options.batch_size,
                show=lambda done, total: progress.update(f"pictures {done}/{total}"),
            )
        if first:
            mean, error = np.mean(scores), np.std(scores) / np.sqrt(len(scores))
            report = {
                "scores": {"clip_score": float(mean), "error": float(error)},
                "pictures": dict(zip(names, map(float, scores), strict=True)),
                "weights": digest(options.clip / "model.safetensors"),
                "folder": os.fspath(options.pictures),
            }
            rows = [("CLIP score (cosine)", float(mean)), ("standard error", float(error))]
            rows.append(("pictures", len(scores)))
            publish(options.out, report, ("measure", "value"), rows)
            return report
    return None
