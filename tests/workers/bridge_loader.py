"""Megatron-Bridge's own loader and writer, in a process of their own.

    bridge_loader.py logits CHECKPOINT HF     largest difference of the logits of both, and the largest logit
    bridge_loader.py tokenizer CHECKPOINT T   the tokens of a text by the checkpoint's own tokenizer
    bridge_loader.py write HF CHECKPOINT      the HF folder as Megatron-Bridge's own checkpoint

Its training package imports ``modelopt``, ``six`` and, from 0.6 on, ``megatron.energon``. Where they are not installed,
empty modules stand in: a model without quantisation and without data has nothing for them to do.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import sys
import types
from typing import Any

import torch

from pact_nemo.policy.distributed import init_distributed
from pact_nemo.policy.megatron_import import prepare_megatron

VOCABULARY, LENGTH = 131, 33


def stand_in(name: str, **content: Any) -> None:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    module.__path__ = []
    vars(module).update(content)
    sys.modules[name] = module


def stand_in_where_absent() -> None:
    if importlib.util.find_spec("modelopt") is None:
        for name in ("modelopt", "modelopt.torch", "modelopt.torch.opt"):
            stand_in(name)
        calls = ("restore_modelopt_state", "save_modelopt_state", "save_sharded_modelopt_state")
        nothing = dict.fromkeys((*calls, "restore_sharded_modelopt_state"), lambda *_, **__: None)
        stand_in("modelopt.torch.opt.plugins", **nothing)
        extra = {"_load_extra_state_from_sharded_checkpoint": None}
        stand_in("modelopt.torch.opt.plugins.mcore_dist_checkpointing", **extra)
        for name in ("modelopt.torch.distill", "modelopt.torch.distill.plugins"):
            stand_in(name)
        stand_in("modelopt.torch.distill.plugins.megatron", get_tensor_shapes_adjust_fn_for_distillation=None)
    if importlib.util.find_spec("six") is None:
        stand_in("six", text_type=str, binary_type=bytes, PY2=False, PY3=True)
    if importlib.util.find_spec("megatron.energon") is None:
        stand_in("megatron.bridge.data.energon.base_energon_datamodule", EnergonMultiModalDataModule=object)


def without_transformer_engine(provider: Any) -> Any:
    """Its settings, but for the layers, which are megatron's own where there is no Transformer Engine."""
    from megatron.bridge.models.gpt_provider import local_layer_spec

    provider.transformer_layer_spec, provider.moe_grouped_gemm = local_layer_spec, False
    provider.gradient_accumulation_fusion = provider.perform_initialization = provider.moe_permute_fusion = False
    return provider


@torch.no_grad()
def logits(checkpoint: str, hf: str) -> dict[str, Any]:
    from megatron.bridge.training.model_load_save import build_and_load_model, load_model_config
    from transformers import AutoModelForCausalLM

    settings, _ = load_model_config(checkpoint)
    [model] = build_and_load_model(checkpoint, without_transformer_engine(settings), use_cpu_init=True)
    tokens = torch.randint(0, VOCABULARY, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    later = torch.triu(torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool), 1)
    found = model.eval()(tokens, torch.arange(LENGTH)[None], later)[..., :VOCABULARY]
    expected = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()(tokens).logits
    return {
        "difference": float((found.float() - expected).abs().max()),
        "largest": float(expected.abs().max()),
    }


def tokenizer(checkpoint: str, text: str) -> dict[str, Any]:
    from megatron.bridge.training.model_load_save import load_tokenizer

    return {"tokens": load_tokenizer(checkpoint).tokenize(text)}


def write(hf: str, checkpoint: str) -> dict[str, Any]:
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(hf)
    provider = without_transformer_engine(bridge.to_megatron_provider(load_weights=True))
    for name in ("params_dtype", "pipeline_dtype", "autocast_dtype"):
        setattr(provider, name, torch.float32)
    provider.bf16 = provider.apply_rope_fusion = False
    provider.finalize()
    model = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    bridge.save_megatron_model(model, checkpoint)
    return {}


if __name__ == "__main__":
    prepare_megatron()
    stand_in_where_absent()
    init_distributed(60)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)
    calls: dict[str, Any] = {"logits": logits, "tokenizer": tokenizer, "write": write}
    print(json.dumps(calls[sys.argv[1]](*sys.argv[2:])))
