import json
import logging
import pickle

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.source import EmojiScenes, heldout_prompts
from instella_jax.errors import UserError
from instella_jax.models.text import DEMO_FOLDER, TextTokenizer


@pytest.fixture(scope="module")
def demo() -> TextTokenizer:
    return TextTokenizer.from_folder(DEMO_FOLDER)


@pytest.fixture
def neox(tmp_path):
    """A small byte-level tokenizer built like GPT-NeoX's, which OLMo uses."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        show_progress=False,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(["a cat on a mat"], trainer)
    tokenizer.enable_padding(length=50)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def test_rows_are_padded_on_the_left(demo: TextTokenizer):
    ids, mask = demo.encode(["a cat", "two red hearts on a blue background", ""])
    assert ids.dtype == np.int32
    assert mask.dtype == bool
    assert ids.shape == mask.shape == (3, 7)
    np.testing.assert_array_equal(mask.sum(1), [2, 7, 0])
    assert mask[0].tolist() == [False] * 5 + [True] * 2
    assert (ids[~mask] == demo.pad_id).all()
    assert not (ids[mask] == demo.pad_id).any()


def test_the_empty_prompt_has_one_masked_token(demo: TextTokenizer):
    ids, mask = demo.encode(["", ""])
    assert ids.shape == (2, 1)
    assert not mask.any()


def test_padding_to_a_fixed_length(demo: TextTokenizer):
    ids, mask = demo.encode(["a cat", ""], pad_to=12)
    assert ids.shape == (2, 12)
    assert demo.decode(ids, mask) == ["a cat", ""]


def test_long_prompts_lose_their_end_and_say_so_once(demo: TextTokenizer, caplog):
    prompt = "a cat on a black background"
    with caplog.at_level(logging.WARNING):
        ids, mask = demo.encode([prompt, prompt], max_length=2)
        demo.encode([prompt], max_length=2)
    assert demo.decode(ids, mask) == ["a cat", "a cat"]
    assert len(caplog.records) == 1
    assert "6 tokens" in caplog.text
    assert prompt in caplog.text


def test_captions_survive_the_round_trip(demo: TextTokenizer, caplog):
    source = EmojiScenes(styles=sprites.styles())
    texts = [source.caption(index) for index in range(3000)]
    texts += [text for text, _ in heldout_prompts(100)]
    with caplog.at_level(logging.WARNING):
        ids, mask = demo.encode(texts)
    assert demo.decode(ids, mask) == texts
    assert not caplog.records
    # One token for each word and comma, and ids that fit an embedding of vocab_size.
    np.testing.assert_array_equal(mask.sum(1), [len(t.replace(",", " ,").split()) for t in texts])
    assert ids.max() < demo.vocab_size <= 512
    assert ids.shape[1] <= 32


def test_every_name_is_known(demo: TextTokenizer):
    for name in sprites.CORE:
        concept = sprites.catalogue()[name]
        for phrase in (concept.singular, f"two {concept.plural}", f"three {concept.plural}"):
            assert demo.unknown_words(phrase) == []


def test_unknown_words_are_named_in_one_warning(demo: TextTokenizer, caplog):
    tokenizer = TextTokenizer.from_folder(DEMO_FOLDER)
    with caplog.at_level(logging.WARNING):
        tokenizer.encode(["a zebra and a burgr on x", "a zebra", "two Cats, a DOG."])
        tokenizer.encode(["a zebra"])
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "'zebra'" in message
    assert "'burgr' (nearest known: 'burger')" in message
    assert "'x'" in message
    assert "ats" not in message


def test_capitals_and_full_stops_do_not_matter(demo: TextTokenizer):
    plain, _ = demo.encode(["a cat, a dog on blue"])
    fancy, _ = demo.encode(["A Cat ,a  dog on BLUE."])
    np.testing.assert_array_equal(plain, fancy)


def test_a_language_models_tokenizer(neox, caplog):
    (neox / "config.json").write_text(json.dumps({"pad_token_id": 1}))
    tokenizer = TextTokenizer.from_folder(neox)
    assert tokenizer.pad_id == 1
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode(["a cat on a mat", "a Zebra, été"])
    assert not caplog.records
    assert tokenizer.words == ()
    # Neither its own padding nor its truncation is used, and no begin token is put in front.
    assert tokenizer.decode(ids, mask) == ["a cat on a mat", "a Zebra, été"]
    expected = Tokenizer.from_file(str(neox / "tokenizer.json"))
    expected.no_padding()
    expected.no_truncation()
    assert ids[1][mask[1]].tolist() == expected.encode("a Zebra, été").ids


def test_pad_id_of_our_config_comes_first(neox):
    config = {"text": {"pad_token_id": 7}, "pad_token_id": 1}
    (neox / "config.json").write_text(json.dumps(config))
    assert TextTokenizer.from_folder(neox).pad_id == 7


def test_pad_id_is_found_in_the_vocabulary(neox):
    assert TextTokenizer.from_folder(neox).pad_id == 1


def test_missing_and_broken_files_are_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        TextTokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        TextTokenizer.from_folder(tmp_path)


def test_data_workers_can_receive_it(demo: TextTokenizer):
    copy = pickle.loads(pickle.dumps(demo))
    np.testing.assert_array_equal(copy.encode(["a cat"])[0], demo.encode(["a cat"])[0])
