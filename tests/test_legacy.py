"""
Files of older versions: model configurations. (The .pt checkpoints are read in test_checkpoint_manager.py, pickled
tokenizers in test_tokenizer.py.)

    python -m pytest tests/test_legacy.py
"""

from dataclasses import asdict

import pytest

from nanochat import legacy
from nanochat.common import UserError
from nanochat.gpt import GPTConfig

SIZES = {"sequence_len": 512, "vocab_size": 1000, "n_layer": 4, "n_head": 2, "n_kv_head": 2, "n_embd": 64}


def config_of(saved, parameter_names=None):
    return GPTConfig(**legacy.upgrade_config(saved, parameter_names))


def test_config_that_names_the_modern_vintage_equals_todays_default():
    saved = SIZES | {"window_pattern": "SSL", "vintage": "modern"}
    assert config_of(saved) == GPTConfig(**SIZES, window_pattern="SSL")


def test_config_that_names_the_classic_vintage_has_full_windows_and_no_extras():
    config = config_of(SIZES | {"window_pattern": "SSSL", "vintage": "classic"})
    assert config.windows == [512] * 4 and config.layers_with_value_embeds == []
    assert not (config.smear or config.backout or config.residual_scalars)
    assert (config.qk_gain, config.rope_base, config.logit_softcap) == (1.0, 10_000.0, 15.0)


def test_config_without_a_vintage_is_recognised_by_parameter_names():
    modern = config_of(SIZES | {"window_pattern": "SL"}, {"lm_head.weight", "resid_lambdas"})
    assert modern == GPTConfig(**SIZES, window_pattern="SL")
    classic = config_of(SIZES, {"lm_head.weight"})
    assert classic == config_of(SIZES | {"vintage": "classic"})


def test_config_with_todays_fields_is_unchanged():
    config = GPTConfig(**SIZES, smear=False, qk_gain=1.1)
    assert config_of(asdict(config)) == config
    assert config_of(asdict(config), {"resid_lambdas"}) == config


def test_unknown_vintage_is_a_user_error():
    with pytest.raises(UserError, match="baroque"):
        config_of(SIZES | {"vintage": "baroque"})
