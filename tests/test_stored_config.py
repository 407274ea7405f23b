"""Workdirs of version 0.1.0 go on: their configs are read as this version has the keys.

`tests/data/old_configs` are the configs of the demo as that version wrote them into workdirs.
"""

import json
import logging
import shutil

import pytest
from flax.traverse_util import flatten_dict

from configs import t2i_ar, t2i_diffusion, tokenizer
from instella_jax import stored_config
from instella_jax.commands import own_config
from instella_jax.config_keys import check_values
from instella_jax.errors import UserError
from instella_jax.stages import make_stage
from instella_jax.training.workdir import changes, check_config, read_config
from tests.paths import ROOT

CONFIGS = {"tokenizer": tokenizer, "t2i_diffusion": t2i_diffusion, "t2i_ar": t2i_ar}
OLD = ROOT / "tests/data/old_configs"


def flat(config):
    return flatten_dict(json.loads(config.to_json()), sep=".")


@pytest.fixture(params=list(CONFIGS))
def name(request):
    return request.param


@pytest.fixture
def workdir(name, tmp_path):
    """A workdir with nothing but the config of its run."""
    shutil.copy(OLD / f"{name}.json", tmp_path / "config.json")
    stored_config._tell.cache_clear()
    return tmp_path


def own(workdir):
    """What --workdir alone runs."""
    return own_config.get_config(json.dumps({"workdir": str(workdir), "config": None}))


def test_an_old_run_has_each_key_of_this_version_and_no_other(name, workdir):
    found = flat(own(workdir))
    assert set(found) == set(flat(CONFIGS[name].get_config()))
    check_values(own(workdir))


def test_an_old_run_means_what_it_meant(name, workdir):
    old, found = json.loads((OLD / f"{name}.json").read_text()), flat(own(workdir))
    kept = {key: value for key, value in flatten_dict(old, sep=".").items() if key in found}
    assert len(kept) > 60 and kept == {key: found[key] for key in kept}
    assert found["optimizer.kind"] == "adamw"  # there was no other
    assert (found["optimizer.muon.ns_steps"], found["optimizer.muon.exclude"]) == (5, [])
    if name != "tokenizer":
        assert found["data.scenes.codes"] == ""  # each step encoded its scenes
    if name == "tokenizer":
        # huber(1) + code_weight * p (1 - p), and no other term.
        weights = {key: value for key, value in found.items() if key.endswith(".weight")}
        assert weights == {
            "loss.pixel.weight": 1.0, "loss.code.weight": 0.0, "loss.entropy.weight": 0.0,
            "loss.balance.weight": 0.0, "loss.perceptual.weight": 0.0,
            "loss.adversarial.weight": 0.0, "loss.features.weight": 0.0,
            "loss.alignment.weight": 0.0,
        }  # fmt: skip
        assert found["loss.pixel.kind"] == "smooth_l1" and found["loss.quantizer"] == "bernoulli"
    else:
        assert found["pos_emb_std"] == 0.0 and found["lora.rank"] == 0
    if name == "t2i_diffusion":
        assert (found["loss.target"], found["loss.draws"], found["loss.time_shift"]) == (
            "epsilon", 1, 1.0,
        )  # fmt: skip


def test_a_renamed_key_keeps_its_value_and_is_told_of_once(tmp_path, caplog):
    values = json.loads((OLD / "tokenizer.json").read_text())
    values["loss"]["code_weight"] = 0.25
    (tmp_path / "config.json").write_text(json.dumps(values))
    with caplog.at_level(logging.WARNING):
        config = read_config(tmp_path)
        read_config(tmp_path)
    assert config.loss.code.weight == 0.25 and "code_weight" not in config.loss
    assert caplog.messages == [
        f"{tmp_path / 'config.json'} is of an older version: loss.code_weight is loss.code.weight "
        "now"
    ]


def test_an_old_run_goes_on_with_its_own_config_and_not_with_another(name, workdir):
    config = own(workdir)
    assert changes(workdir, config) == {}
    check_config(workdir, config)
    make_stage(config)
    config.optimizer.kind = "muon"
    with pytest.raises(UserError, match="belongs to a run with optimizer.kind='adamw'"):
        check_config(workdir, config)


def test_what_muon_trains_stays_the_same(tmp_path):
    config = t2i_diffusion.get_config()
    for kind in ("adamw", "muon"):
        config.optimizer.kind = kind
        (tmp_path / "config.json").write_text(config.to_json())
        other = own(tmp_path)
        other.optimizer.muon.update(exclude=(), ns_steps=4)
        if kind == "adamw":
            check_config(tmp_path, other)
            continue
        with pytest.raises(UserError, match=r"run with optimizer.muon.exclude=\['modulation'\], "):
            check_config(tmp_path, other)


def test_new_terms_of_the_loss_are_another_run(tmp_path):
    shutil.copy(OLD / "t2i_diffusion.json", tmp_path / "config.json")
    config = own(tmp_path)
    config.loss.draws = 2
    with pytest.raises(UserError, match=r"belongs to a run with loss.draws=1, this one has 2"):
        check_config(tmp_path, config)


def test_a_config_of_this_version_stays_as_it_is(name, tmp_path, caplog):
    config = CONFIGS[name].get_config()
    (tmp_path / "config.json").write_text(config.to_json())
    assert flat(read_config(tmp_path)) == flat(config)
    assert not caplog.messages
