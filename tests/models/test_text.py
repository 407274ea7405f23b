import json
import logging
import pickle
import socket
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from instella_jax.data.scenes import sprites
from instella_jax.data.scenes.source import EmojiScenes, heldout_prompts
from instella_jax.errors import UserError
from instella_jax.models.text import DEMO_FOLDER, TextTokenizer, tokenizer_files


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


def test_unknown_words_are_named_in_one_warning(caplog):
    tokenizer = TextTokenizer.from_folder(DEMO_FOLDER)
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode(["a zebra and a burgr on x", "a zebra", "two Cats, a DOG."])
        tokenizer.encode(["a zebra"])
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert message.startswith("3 words are not in this model's vocabulary and spelled in pieces: ")
    assert "'zebra'," in message
    assert "'burgr' (nearest known: 'burger')" in message
    assert "'x'" in message
    assert "ats" not in message and "lacks" not in message
    # It is true: nothing of them is lost.
    assert tokenizer.decode(ids, mask)[0] == "a zebra and a burgr on x"


def test_characters_that_are_lost_are_told_apart(caplog):
    tokenizer = TextTokenizer.from_folder(DEMO_FOLDER)
    with caplog.at_level(logging.WARNING):
        ids, mask = tokenizer.encode(["a кот"])
    assert tokenizer.decode(ids, mask) != ["a кот"]
    assert "1 word is not" in caplog.text and "'кот' (without the characters" in caplog.text


def test_warnings_of_a_foreign_data_set_are_few(caplog):
    tokenizer = TextTokenizer.from_folder(DEMO_FOLDER)
    letters = "qxzjkvwyfp"
    words = ["zz" + "".join(letters[int(d)] for d in str(n)) for n in range(4096)]
    with caplog.at_level(logging.WARNING):
        for start in range(0, len(words), 64):  # 64 texts of 64 words a batch, of 65 words each
            tokenizer.encode([f"a {' '.join(words[start : start + 64])}"] * 64, max_length=28)
    messages = [record.getMessage() for record in caplog.records]
    of_words = [message for message in messages if "vocabulary" in message]
    of_length = [message for message in messages if "lose their end" in message]
    assert len(of_words) + len(of_length) == len(messages) <= 20
    assert sum(map(len, messages)) < 4000
    # The first tells of its own 64, the last of as many as there were by then.
    assert of_words[0].startswith("64 words are not") and of_words[0].endswith("and 54 more")
    assert of_words[-1].startswith("640 words are not")
    assert of_length[0].startswith("64 of 64 texts have more than 28 tokens and lose their end")
    assert of_length[-1].split()[0] == of_length[-1].split()[2] != "64"


def test_a_new_long_prompt_is_told_each_time(demo: TextTokenizer, caplog):
    prompts = [f"a cat on a {colour} background" for colour in ("black", "blue", "red")]
    tokenizer = TextTokenizer.from_folder(DEMO_FOLDER)
    for prompt in prompts:
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            tokenizer.encode([prompt], max_length=3)
        assert repr(prompt) in caplog.text


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


TEXTS = ["a cat on a mat", "a Zebra, été  <|endoftext|> on\n", "", "\u212b a\u0301", " a", "A"]


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a text tokenizer asks the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def pretrained(folder, **settings):
    """A GPT-NeoX tokenizer with its settings, written by transformers."""
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<|endoftext|>",
        eos_token="<|endoftext|>", unk_token="<|endoftext|>", **settings,
    )  # fmt: skip
    tokenizer.save_pretrained(folder)
    return tokenizer


def assert_as_transformers(folder, auto):
    """Ids are those of transformers without special tokens, in published rows."""
    tokenizer = TextTokenizer.from_folder(folder)
    ids, mask = tokenizer.encode(TEXTS)
    expected = auto(TEXTS, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    assert [row[keep].tolist() for row, keep in zip(ids, mask, strict=True)] == expected
    assert all(keep.tolist() == sorted(keep.tolist()) for keep in mask)  # padding on the left
    assert (ids[~mask] == tokenizer.pad_id).all()
    return tokenizer


@pytest.mark.parametrize("split", [False, True])
def test_a_folder_written_by_transformers(neox, no_network, split):
    from transformers import AutoTokenizer

    settings = dict(
        pad_token="<|padding|>", padding_side="right", truncation_side="left", model_max_length=3,
        add_bos_token=True, add_eos_token=True, split_special_tokens=split,
    )  # fmt: skip
    pretrained(neox, **settings)
    assert {"tokenizer_config.json", "tokenizer.json"} <= {p.name for p in neox.iterdir()}
    auto = AutoTokenizer.from_pretrained(neox, local_files_only=True)
    assert auto.padding_side == "right"
    tokenizer = assert_as_transformers(neox, auto)
    assert tokenizer.pad_id == auto.pad_token_id == 1
    # Split or not, the text of a special token is what its settings make of it.
    ids, mask = tokenizer.encode(["<|endoftext|>"])
    assert (mask.sum() == 1) != split
    # 128 tokens, whatever model_max_length says, and the beginning of the text.
    ids, mask = tokenizer.encode(["ab" * 200])
    assert mask.sum() == 128 and tokenizer.decode(ids, mask)[0] == "ab" * 64


def test_the_begin_token_of_a_pipeline_is_left_out(neox):
    from tokenizers import processors

    path = neox / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.save(str(path))
    auto = pretrained(neox)
    assert auto("a")["input_ids"][0] == 0
    assert_as_transformers(neox, auto)


def test_tokenizer_json_is_read_as_it_stands(neox):
    """Not as the class that its settings or the model's name would make of its vocabulary."""
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    path = neox / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.no_padding()
    tokenizer.save(str(path))
    pretrained(neox)
    settings = json.loads((neox / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "GPTNeoXTokenizer"
    (neox / "tokenizer_config.json").write_text(json.dumps(settings))
    (neox / "config.json").write_text(json.dumps({"model_type": "olmo"}))
    ids, mask = TextTokenizer.from_folder(neox).encode(["A CAT"])
    assert ids[mask].tolist() == tokenizer.encode("a cat").ids
    rebuilt = AutoTokenizer.from_pretrained(neox)("A CAT", add_special_tokens=False)["input_ids"]
    assert rebuilt != ids[mask].tolist()


def test_settings_name_the_padding(neox):
    pretrained(neox, pad_token="a")
    (neox / "config.json").write_text(json.dumps({"pad_token_id": 5}))
    number = Tokenizer.from_file(str(neox / "tokenizer.json")).token_to_id("a")
    assert number not in (0, 1, 5) and TextTokenizer.from_folder(neox).pad_id == number
    # A padding token of its own makes the vocabulary larger.
    size = TextTokenizer.from_folder(neox).vocab_size
    pretrained(neox, pad_token="[new]")
    tokenizer = TextTokenizer.from_folder(neox)
    assert (tokenizer.pad_id, tokenizer.vocab_size) == (size, size + 1)


def test_a_folder_from_before_tokenizer_json(neox, tmp_path, no_network):
    from transformers import AutoTokenizer, GPT2Tokenizer

    old, copy = tmp_path / "old", tmp_path / "copy"
    old.mkdir()
    copy.mkdir()
    Tokenizer.from_file(str(neox / "tokenizer.json")).model.save(str(old))
    settings = {"tokenizer_class": "GPT2Tokenizer", "pad_token": "<|padding|>"}
    (old / "tokenizer_config.json").write_text(json.dumps(settings))
    auto = AutoTokenizer.from_pretrained(old, local_files_only=True)
    assert isinstance(auto, GPT2Tokenizer)
    assert_as_transformers(old, auto)
    for name, content in tokenizer_files(old).items():
        (copy / name).write_bytes(content)
    assert "tokenizer.json" in [path.name for path in copy.iterdir()]
    assert assert_as_transformers(copy, auto).pad_id == 1


def test_code_of_a_folder_is_not_run(neox):
    (neox / "tokenizer.json").rename(neox / "vocab.json")
    settings = {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (neox / "tokenizer_config.json").write_text(json.dumps(settings))
    (neox / "evil.py").write_text("from pathlib import Path\nPath(__file__).with_name('x').touch()")
    with pytest.raises(UserError, match="has a text tokenizer that cannot be read"):
        TextTokenizer.from_folder(neox)
    assert not (neox / "x").exists()


def test_copies_keep_what_the_settings_say(neox):
    assert set(tokenizer_files(neox)) == {"tokenizer.json"}
    pretrained(neox, pad_token="a")
    (neox / "config.json").write_text("{}")
    files = tokenizer_files(neox)
    assert set(files) == {"tokenizer.json", "tokenizer_config.json"}
    assert all((neox / name).read_bytes() == content for name, content in files.items())


def test_the_demo_needs_no_transformers():
    """Which takes a second to import; its tokenizer.json says everything."""
    code = (
        "import sys; from instella_jax.models.text import DEMO_FOLDER, TextTokenizer;"
        "print(TextTokenizer.from_folder(DEMO_FOLDER).encode(['a cat'])[0].tolist());"
        "assert 'transformers' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[[50, 284]]\n" and not done.stderr


def test_reading_with_transformers_says_nothing(neox):
    pretrained(neox)
    code = (
        "import sys; from instella_jax.models.text import TextTokenizer;"
        "TextTokenizer.from_folder(sys.argv[1]).encode(['a ' * 600])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, neox], capture_output=True, text=True, check=True
    )
    assert done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "lose their end" in done.stderr


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
