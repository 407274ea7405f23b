import pytest

from instella_jax.models.text import TextTokenizer
from tools import train_bpe


def test_every_word_is_one_token():
    texts = train_bpe.corpus(("cat", "fire engine"), scenes=300)
    tokenizer = TextTokenizer(train_bpe.train(texts, vocab_size=512))
    ids, mask = tokenizer.encode(["two fire engines", "a cat, a cat"])
    assert mask.sum(1).tolist() == [3, 5]
    assert tokenizer.decode(ids, mask) == ["two fire engines", "a cat, a cat"]
    assert tokenizer.unknown_words("a fire truck") == ["truck"]
    assert tokenizer.pad_id == 0


def test_too_small_a_vocabulary_is_refused():
    with pytest.raises(SystemExit, match="vocab-size"):
        train_bpe.train(train_bpe.corpus(("cat",), scenes=50), vocab_size=40)
