"""Names and shapes of the weights that an architecture has in a Hugging Face folder.

Written down from the model classes of transformers, so that a folder can be checked by its file headers alone. The
tests compare the list with the state dicts of those classes.
"""

from __future__ import annotations

from pact_nemo.policy.architectures import Architecture

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
Shapes = dict[str, tuple[int, ...]]


def expected_weights(model: Architecture) -> Shapes:
    """Weight -> shape, layer by layer. A head tied to the embeddings is no weight of its own."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    expected: Shapes = {EMBEDDING: (model.vocab, model.hidden)}
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}"
        for name, rows in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
            expected |= _linear(f"{prefix}.self_attn.{name}", rows, model.hidden, bias=model.qkv_bias)
        expected |= _linear(f"{prefix}.self_attn.o_proj", model.hidden, queries, bias=model.output_bias)
        if model.qk_norm:
            expected |= {f"{prefix}.self_attn.{name}.weight": (model.head_dim,) for name in ("q_norm", "k_norm")}
        if model.experts:
            expected[f"{prefix}.mlp.gate.weight"] = (model.experts, model.hidden)
            for expert in range(model.experts):
                expected |= _mlp(f"{prefix}.mlp.experts.{expert}", model.hidden, model.expert_intermediate, bias=False)
        else:
            expected |= _mlp(f"{prefix}.mlp", model.hidden, model.intermediate, bias=model.mlp_bias)
        expected |= {
            f"{prefix}.{name}.weight": (model.hidden,) for name in ("input_layernorm", "post_attention_layernorm")
        }
    expected["model.norm.weight"] = (model.hidden,)
    if not model.tied:
        expected[HEAD] = (model.vocab, model.hidden)
    return expected


def _linear(name: str, rows: int, columns: int, *, bias: bool) -> Shapes:
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def _mlp(prefix: str, hidden: int, inner: int, *, bias: bool) -> Shapes:
    return (
        _linear(f"{prefix}.gate_proj", inner, hidden, bias=bias)
        | _linear(f"{prefix}.up_proj", inner, hidden, bias=bias)
        | _linear(f"{prefix}.down_proj", hidden, inner, bias=bias)
    )
