"""Signatures of Transformer Engine's Python files, read from its wheel (a zip of sources, which needs no GPU):

    pip download --no-deps transformer-engine==2.12.0
    python tests/workers/engine_signatures.py transformer_engine-2.12.0-py3-none-any.whl \\
        > tests/fixtures/transformer_engine_signatures.json
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile

ROOT = "transformer_engine/pytorch/"
#: file, class or None, function
WANTED = [
    ("module/linear.py", "Linear", "__init__"),
    ("module/linear.py", "Linear", "forward"),
    ("module/layernorm_linear.py", "LayerNormLinear", "__init__"),
    ("module/layernorm_linear.py", "LayerNormLinear", "forward"),
    ("module/grouped_linear.py", "GroupedLinear", "__init__"),
    ("module/grouped_linear.py", "GroupedLinear", "forward"),
    ("module/rmsnorm.py", "RMSNorm", "__init__"),
    ("module/fp8_padding.py", "Fp8Padding", "__init__"),
    ("module/fp8_padding.py", "Fp8Padding", "forward"),
    ("module/fp8_unpadding.py", "Fp8Unpadding", "forward"),
    ("optimizers/fused_adam.py", "FusedAdam", "__init__"),
    ("optimizers/fused_adam.py", "FusedAdam", "step"),
    ("optimizers/multi_tensor_apply.py", "MultiTensorApply", "__call__"),
    ("quantization.py", None, "fp8_autocast"),
    ("distributed.py", None, "checkpoint"),
    ("distributed.py", "activation_recompute_forward", "__init__"),
]


def signature(arguments: ast.arguments) -> list[list[str | None]]:
    """Name and default of each argument, as written; None without a default. ``*args`` and ``**kwargs`` by stars."""
    positional = arguments.posonlyargs + arguments.args
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    found: list[list[str | None]] = [
        [argument.arg, ast.unparse(default) if default else None]
        for argument, default in zip(positional, defaults, strict=True)
    ]
    found += [["*" + arguments.vararg.arg, None]] if arguments.vararg else []
    found += [
        [argument.arg, ast.unparse(default) if default else None]
        for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    found += [["**" + arguments.kwarg.arg, None]] if arguments.kwarg else []
    return [argument for argument in found if argument[0] != "self"]


def read(wheel: str) -> dict[str, list[list[str | None]]]:
    found = {}
    with zipfile.ZipFile(wheel) as files:
        for path, owner, name in WANTED:
            tree = ast.parse(files.read(ROOT + path))
            body = tree.body
            if owner is not None:
                body = next(node.body for node in body if isinstance(node, ast.ClassDef) and node.name == owner)
            function = next(node for node in body if isinstance(node, ast.FunctionDef) and node.name == name)
            found[f"{owner}.{name}" if owner else name] = signature(function.args)
    return found


if __name__ == "__main__":
    json.dump(read(sys.argv[1]), sys.stdout, indent=1)
    print()
