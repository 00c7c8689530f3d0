"""Nothing of ours runs what it reads: a walk over every source file for the calls that do."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted(path for folder in ("pact_nemo", "tools", "recipes") for path in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
UNSAFE_YAML = {"load", "load_all", "full_load", "full_load_all", "unsafe_load", "unsafe_load_all"}
#: (file, finding) -> why it may be there
ALLOWED = {
    (
        "pact_nemo/sandbox/worker.py",
        "exec",
    ): "the sandbox's whole purpose: untrusted tool source, inside the confined child",
    ("pact_nemo/sandbox/worker.py", "compile"): "of the same source, in the same child",
    ("tools/bench_sandbox.py", "exec"): "runs its own constant source, to time the sandbox against it",
    ("tools/bench_sandbox.py", "compile"): "of the same constant source",
    (
        "pact_nemo/checkpoints/pickles.py",
        "import pickle",
    ): "a reader that resolves known names only, and takes members of enumerations for getattr",
}


def findings(source: str) -> Iterator[tuple[str, int]]:
    """(what, line) of every call or import that could run data."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (
                (f"import {alias.name}", node.lineno) for alias in node.names if alias.name.split(".")[0] in MODULES
            )
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            yield f"import {node.module}", node.lineno
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            last = name.rsplit(".", 1)[-1]
            keywords = {item.arg: item.value for item in node.keywords}
            if name in ("eval", "exec", "compile", "__import__", "builtins.eval", "builtins.exec"):
                yield name, node.lineno
            if name.startswith("yaml.") and last in UNSAFE_YAML and "Safe" not in ast.unparse(node):
                yield name, node.lineno
            if name in ("torch.load", "torch.serialization.load") and not _is(keywords.get("weights_only"), True):
                yield name, node.lineno
            if (
                name in ("np.load", "numpy.load")
                and keywords.get("allow_pickle") is not None
                and not _is(keywords["allow_pickle"], False)
            ):
                yield name, node.lineno
            if (
                "shell" in keywords
                and not _is(keywords["shell"], False)
                or name in ("os.system", "os.popen", "subprocess.getoutput")
            ):
                yield "shell", node.lineno
            if "trust_remote_code" in keywords and not _is(keywords["trust_remote_code"], False):
                yield "trust_remote_code", node.lineno
            if last == "add_safe_globals" or last in ("from_string",) and "unsafe" in name:
                yield name, node.lineno


def _is(node: ast.expr | None, value: bool) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def test_no_source_file_runs_data() -> None:
    assert len(SOURCES) > 100
    found = {
        (path.relative_to(ROOT).as_posix(), what): line
        for path in SOURCES
        for what, line in findings(path.read_text(encoding="utf-8"))
    }
    assert {key: line for key, line in found.items() if key not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "eval(text)",
        "exec(text, {})",
        "import yaml\nyaml.load(text)",
        "yaml.unsafe_load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "numpy.load(path, allow_pickle=True)",
        "subprocess.run(text, shell=True)",
        "os.system(text)",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
        "__import__(name)",
    ],
)
def test_the_walk_finds(source: str) -> None:
    assert list(findings(source))


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path, weights_only=True)",
        "yaml.safe_load(text)",
        "model.eval()",
        "subprocess.run(['ls'])",
        "re.compile(x)",
    ],
)
def test_the_walk_passes(source: str) -> None:
    assert not list(findings(source))
