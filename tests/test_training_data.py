"""What a dataset refuses before anything heavy starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from pact_nemo.chat.template import ChatFormat
from pact_nemo.checkpoints.embedded import EMBEDDED_CONFIG, materialise_embedded_model
from pact_nemo.errors import ConfigError
from pact_nemo.training.config import Config, load_config
from pact_nemo.training.data import Dataset, build_dataset, build_environment, check_positions

REPO = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def data() -> tuple[Config, Dataset, ChatFormat]:
    words = ["tasks.max_train=12", "tasks.max_eval=2", "rollout.server.max_model_len=480"]
    config = load_config(REPO / "conf" / "pact_bfcl-smollm2_135m-cpu.yaml", words)
    chat = ChatFormat.from_pretrained(materialise_embedded_model(REPO / ".cache" / "pact_nemo"), config.model.tool_format)
    return config, build_dataset(config, build_environment(config), chat), chat


def test_sequences_within_the_models_positions_pass(data: tuple[Config, Dataset, ChatFormat]) -> None:
    config, dataset, chat = data
    check_positions(config, dataset, chat, int(EMBEDDED_CONFIG["max_position_embeddings"]))


def test_a_server_longer_than_the_model_is_refused_by_name(data: tuple[Config, Dataset, ChatFormat]) -> None:
    config, dataset, chat = data
    with pytest.raises(ConfigError, match=r"max_model_len=480 exceeds the model's 256 positions"):
        check_positions(config, dataset, chat, 256)


def test_prompt_trace_and_response_together_are_held_against_the_positions(data: tuple[Config, Dataset, ChatFormat]) -> None:
    config, dataset, chat = data
    sampling, server = config.rollout.sampling, config.rollout.server
    longest = max(
        min(len(chat.prompt_ids(list(t.user_turns[0]), list(t.tools))) + sampling.max_response_tokens, server.max_model_len)
        + len(dataset.trace_tokens[t.id])
        for t in dataset.train
        if t.id in dataset.trace_tokens
    )
    assert longest > server.max_model_len
    check_positions(config, dataset, chat, longest)
    with pytest.raises(ConfigError, match=rf"{longest} tokens together.*traces\.max_tokens"):
        check_positions(config, dataset, chat, longest - 1)
