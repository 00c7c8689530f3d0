"""Policy settings: typed, validated, with errors that say what to set; and the learning-rate schedule."""

from __future__ import annotations

import math
from typing import Any

import pytest
from omegaconf import OmegaConf

from pact_nemo.errors import ConfigError
from pact_nemo.policy.config import OptimizerConfig, PolicyConfig
from pact_nemo.policy.megatron_import import prepare_megatron

prepare_megatron()
from pact_nemo.policy.optimizer import learning_rate  # noqa: E402


def test_both_are_omegaconf_structured_configs() -> None:
    merged = OmegaConf.merge(OmegaConf.structured(PolicyConfig), {"tensor_parallel": 2, "virtual_pipeline": None})
    assert OmegaConf.to_object(merged) == PolicyConfig(tensor_parallel=2)
    assert OmegaConf.to_object(
        OmegaConf.merge(OmegaConf.structured(OptimizerConfig), {"betas": [0.8, 0.9]})
    ) == OptimizerConfig(betas=[0.8, 0.9])


def test_every_field_is_documented() -> None:
    for config in (PolicyConfig, OptimizerConfig):
        for name in config.__dataclass_fields__:
            assert f"{name}:" in (config.__doc__ or ""), name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensor_parallel": 0}, "tensor_parallel"),
        ({"precision": "fp16"}, "fp32, bf16"),
        ({"recompute": "some"}, "selective"),
        ({"attention": "flash"}, "tree_sdpa"),
        ({"sequence_parallel": True}, "tensor_parallel > 1"),
        ({"virtual_pipeline": 2}, "pipeline_parallel > 1"),
        ({"tensor_parallel": 3}, "multiple of 3"),
        ({"pipeline_parallel": 2, "expert_parallel": 4}, "multiple of 8"),
        ({"attention": "te", "share_prefix": False}, "transformer-engine"),
        ({"fp8": "delayed"}, "fp8_bf16_layers=0"),
        ({"fp8": "tensorwise", "fp8_emulate": True, "recompute": "full"}, "recompute=none"),
        ({"fp8_bf16_layers": -1}, "policy.fp8_bf16_layers=-1: must be >= 0"),
        ({"fp8": "nonsense"}, "mxfp8"),
    ],
)
def test_contradictions_are_refused_with_a_remedy(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PolicyConfig(**fields).validate(cuda=False, world_size=4)


@pytest.mark.parametrize(
    "fields",
    [{"lr_schedule": "step"}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"lr": -1.0}, {"lr": 1e-6, "min_lr": 1e-5}],
)
def test_optimizer_settings_out_of_range_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        OptimizerConfig(**fields).validate()


def test_transformer_engine_attention_knows_neither_trees_nor_our_context_parallelism(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="share_prefix=false"):
        PolicyConfig(attention="te").validate(cuda=True)
    with pytest.raises(ConfigError, match="context-parallel"):
        PolicyConfig(attention="te", share_prefix=False, context_parallel=2).validate(cuda=True, world_size=2)
    PolicyConfig(attention="te", share_prefix=False, fp8="mxfp8").validate(cuda=True)
    with pytest.raises(ConfigError, match="bf16"):
        PolicyConfig(fp8="mxfp8", precision="fp32").validate(cuda=True)


def test_precision_auto_follows_the_device() -> None:
    assert PolicyConfig().resolved_precision(cuda=True) == "bf16"
    assert PolicyConfig().resolved_precision(cuda=False) == "fp32"


def test_learning_rate_schedules() -> None:
    def rates(**fields: Any) -> list[float]:
        return [learning_rate(OptimizerConfig(lr=1.0, **fields), step, 6) for step in range(1, 8)]

    assert rates() == [1.0] * 7
    assert rates(warmup_steps=2) == [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert rates(warmup_steps=2, lr_schedule="linear") == [0.5, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0]
    cosine = rates(lr_schedule="cosine", min_lr=0.1)
    assert cosine[2] == pytest.approx(0.55) and cosine[5] == cosine[6] == pytest.approx(0.1)
    assert cosine[0] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 6)))
