"""Trains the demo's text tokenizer on the caption grammar: `assets/demo_text/tokenizer.json`.

    python tools/train_bpe.py

A byte-pair encoding whose merges end in whole words, so that every word of the grammar is one token
and any other word is seen to be none. For models of other scenes give the same concepts and styles
as in their config, a vocabulary that holds their words, and another folder:

    python tools/train_bpe.py --concepts all --vocab-size 6000 --out my_text

The library numbers equally frequent letters differently from run to run: a trained model belongs to
the very file it was trained with.
"""

import argparse
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from instella_jax.data.scenes import captions, sprites
from instella_jax.data.scenes.source import EmojiScenes
from instella_jax.models.text import DEMO_FOLDER, WORD_END, WORD_START, TextTokenizer


def corpus(concepts: str | tuple[str, ...], scenes: int) -> list[str]:
    """Return captions of training scenes in all styles, and every name by itself."""
    source = EmojiScenes(concepts=concepts, styles=sprites.styles(), places="free")
    names = [sprites.catalogue()[name] for name in sprites.select(concepts)]
    texts = [source.caption(index) for index in range(scenes)]
    texts += [concept.singular for concept in names]
    texts += [f"{number} {c.plural}" for c in names for number in captions.NUMBERS.values()]
    texts += [f"on a {background} background" for background in sprites.BACKGROUNDS]
    return texts


def train(texts: list[str], vocab_size: int) -> Tokenizer:
    """Train on texts; raises SystemExit if some of their words are not one token in the end."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix=WORD_END))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.Lowercase(),
            normalizers.Replace(",", " , "),
            normalizers.Replace(Regex(r"[.!?:;\"]"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Fuse(),
            decoders.Replace(WORD_END, ""),
            decoders.Replace(f"{WORD_START},", ","),
            decoders.Replace(WORD_START, " "),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=1,
            special_tokens=["[PAD]", "[UNK]"],
            end_of_word_suffix=WORD_END,
            show_progress=False,
        ),
    )
    text_tokenizer = TextTokenizer(tokenizer)
    split = sorted({word for text in texts for word in text_tokenizer.unknown_words(text)})
    if split:
        raise SystemExit(f"--vocab-size {vocab_size} is too small to hold {split[:10]}")
    return tokenizer


def main() -> None:
    """Parse the command line and write tokenizer.json."""
    parser = argparse.ArgumentParser(description="Trains the text tokenizer of the demo.")
    parser.add_argument("--concepts", default="core", help="core or all")
    parser.add_argument("--scenes", type=int, default=20_000, help="how many captions to read")
    parser.add_argument("--vocab-size", type=int, default=512, help="the most tokens allowed")
    parser.add_argument("--out", type=Path, default=DEMO_FOLDER, help="folder to write into")
    args = parser.parse_args()
    tokenizer = train(corpus(args.concepts, args.scenes), args.vocab_size)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "tokenizer.json"
    tokenizer.save(str(path))
    print(f"{tokenizer.get_vocab_size()} tokens, {path.stat().st_size / 1e3:.0f} kB: {path}")


if __name__ == "__main__":
    main()
