"""Running calls on BFCL's own backends and judging with its own checkers.

``bfcl-eval`` keeps backend instances in the globals of one of its modules, keyed by (run name, entry id, class), and
evaluates call text there. So each :class:`Backend` has a run name that no other has, holds one process-wide lock while
it is in there, and purges its keys. Call text comes from :func:`pact_nemo.environments.calls.call_text` or from the
ground truth only: a name and literals.
"""

from __future__ import annotations

import itertools
import math
import os
import re
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from pact_nemo.environments.base import Outcome, ToolCall
from pact_nemo.environments.bfcl.data import Entry
from pact_nemo.errors import EnvironmentFailure

LOCK = threading.RLock()
_COUNTER = itertools.count()
_MAX_POWER_BITS = 100_000
_MAX_PRECISION = 10_000
_CALL_LIKE = re.compile(r"(?<=\w)(\s*)\(")


def protect_strings(text: str) -> str:
    """Hide ``word(`` inside string literals of a call from BFCL's textual rewriting of method names; the values stay
    the same.

    BFCL prefixes every ``method(`` in the text with an instance name, also within quotes: ``echo(content='run ls()')``
    would write another text.
    """
    pieces = re.split(r"('(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\")", text)
    for index in range(1, len(pieces), 2):
        pieces[index] = _CALL_LIKE.sub(r"\1\\x28", pieces[index])
    return "".join(pieces)


def too_heavy(call: ToolCall) -> bool:
    """Whether a call would keep the arithmetic backend busy without end: a huge power or precision."""
    values = {
        key: value
        for key, value in call.arguments.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if abs(values.get("precision", 0)) > _MAX_PRECISION:
        return True
    if call.name == "power" and {"base", "exponent"} <= values.keys():
        base, exponent = values["base"], values["exponent"]
        bits = base.bit_length() if isinstance(base, int) else abs(math.log2(abs(base) or 1.0))
        return abs(exponent) * max(1.0, bits) > _MAX_POWER_BITS
    return False


class Instances:
    """BFCL's own backend instances of one episode, made at the first call.

    Args:
        record: the benchmark's record: ``id``, ``involved_classes``, ``initial_config``.
        long_context: whether they load their long-context variants.

    Raises:
        EnvironmentFailure: (from its methods) BFCL itself broke.
    """

    def __init__(self, record: Mapping[str, Any], long_context: bool = False):
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_utils

        self._utils = multi_turn_utils
        self._record, self._long_context = record, long_context
        with LOCK:
            self._run_name = f"pact{os.getpid()}n{next(_COUNTER)}"

    def execute(self, calls: Sequence[str]) -> list[str]:
        """Run call texts in order; one result string each, BFCL's own error texts included."""
        with LOCK:
            results, _ = self._run(calls)
        return [str(result).encode("utf-8", "replace").decode("utf-8") for result in results]

    def instance(self, class_name: str) -> Any:
        """The instance of an involved class, its initial state loaded."""
        with LOCK:
            return self._run(())[1][class_name]

    def place(self, class_name: str, instance: Any) -> None:
        """Use ``instance`` in place of the one that BFCL would make of a class."""
        name = f"{self._run_name}_{self._record['id']}_{class_name}_instance"
        vars(self._utils)[re.sub(r"[-./:]", "_", name)] = instance  # BFCL's own naming

    def _run(self, calls: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
        record = self._record
        try:
            results, instances = self._utils.execute_multi_turn_func_call(
                func_call_list=list(calls),
                initial_config=record["initial_config"],
                involved_classes=record["involved_classes"],
                model_name=self._run_name,
                test_entry_id=record["id"],
                long_context=self._long_context,
            )
        except Exception as error:
            raise EnvironmentFailure(f"{record['id']}: BFCL failed while executing: {error!r}") from error
        return results, instances

    def _purge(self, suffix: str) -> None:
        namespace: dict[str, Any] = vars(self._utils)
        prefix = self._run_name + suffix
        for key in [key for key in namespace if key.startswith(prefix)]:
            del namespace[key]

    def close(self) -> None:
        """Drop every instance of this run from BFCL's globals; safe to call twice."""
        with LOCK:
            self._purge("_")


class Backend(Instances):
    """The backends of one multi-turn entry in one episode, and the official verdict on them.

    Args:
        entry: the entry whose initial state is loaded.
    """

    def __init__(self, entry: Entry):
        from bfcl_eval.eval_checker.multi_turn_eval import multi_turn_checker

        super().__init__(entry.record, entry.long_context)
        self._checker = multi_turn_checker
        self.entry = entry

    def judge(self, steps: Sequence[Sequence[Sequence[str]]], turns: int, irrelevance: bool) -> Outcome:
        """The official verdict on the first ``turns`` user turns; everything is executed anew in instances of its own.

        Args:
            steps: executed call texts: user turns, assistant turns within, calls within.
            turns: number of user turns of the ground truth to check against; ``len(steps)`` must equal it.
            irrelevance: also require that no call was made in a user turn whose ground truth is empty.
        """
        truth = [list(turn) for turn in self.entry.ground_truth[:turns]]
        decoded = [[list(step) for step in turn] for turn in steps]
        with LOCK:
            try:
                verdict = self._checker.multi_turn_checker(
                    decoded, truth, self.entry.record, self.entry.category, self._run_name
                )
                if verdict["valid"] and irrelevance:
                    verdict = self._checker.multi_turn_irrelevance_checker(decoded, truth)
            except (
                Exception
            ) as error:  # state that the policy made so odd that it can't be compared: its failure, not the benchmark's
                return Outcome(False, 0.0, f"checker_exception:{type(error).__name__}")
            finally:
                self._purge("_eval_")
                self._purge("_ground_truth_")
        if verdict["valid"]:
            return Outcome(True, 1.0)
        return Outcome(False, 0.0, str(verdict["error_type"]))
