"""A plan of runs: starting policies that methods share, arms, seeds and a budget, read from a YAML file.

    name: starting_point
    question: Who is above more SFT, and from which skill on?
    prediction: written down before the first run
    seeds: [1, 2, 3]
    hours: 6                       # no run is started after that many hours of runs
    set: [tasks.max_eval=96]       # settings of every run
    starts:                        # made once, with start_seed, and used by model.path
      sft12: {method: sft, set: [warmup.steps=12]}
    arms:
      pact: {method: pact}
      pact_slow: {method: pact, set: [optimizer.lr=3e-5]}
    grid:
      - {starts: [sft12], arms: [pact, pact_slow]}

Of an agent of your own, ``benchmark: own``, and ``set`` names tools, tasks and traces: examples/shop/plan.yaml.
``published`` is a start that every plan has: the preset's own model as it came, with the preset's warm-up.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from pact_nemo.config.load import load_config
from pact_nemo.config.schema import Config
from pact_nemo.errors import ConfigError
from tools.comparisons.results import Result, read_result
from tools.comparisons.runner import Settings, check_words, config_of

PUBLISHED = "published"
#: what each run of a plan is told by the plan: an arm's name is its label
OWN_WORDS = ("run.seed", "run.root", "run.label")


@dataclass
class Arm:
    """A method and what differs from its settings file."""

    method: str = "pact"
    set: list[str] = field(default_factory=list)


@dataclass
class Block:
    """Every arm from every start."""

    starts: list[str] = field(default_factory=lambda: [PUBLISHED])
    arms: list[str] = field(default_factory=list)
    seeds: list[int] | None = None  #: None = the plan's


@dataclass
class Plan:
    """See the head of this file."""

    name: str = ""
    question: str = ""
    prediction: str = ""
    benchmark: str = "bfcl"
    preset: str = "smollm2_135m-cpu"
    baseline: str = ""  #: the arm that the others are compared with
    seeds: list[int] = field(default_factory=lambda: [1, 2, 3])
    hours: float | None = None
    set: list[str] = field(default_factory=list)
    starts: dict[str, Arm] = field(default_factory=dict)
    start_seed: int = 0  #: of the starts: none of the arms', so that no arm meets a start's batches again
    arms: dict[str, Arm] = field(default_factory=dict)
    grid: list[Block] = field(default_factory=list)


@dataclass(frozen=True)
class Cell:
    """One run of a plan; ``start`` and ``arm`` are names."""

    start: str
    arm: str
    seed: int

    @property
    def id(self) -> str:
        return f"{self.start}-{self.arm}-seed{self.seed}"


def load_plan(path: str | Path) -> Plan:
    """Read a plan and check every run's settings, so that none is refused after hours of others.

    Raises:
        ConfigError: the file, a name or a setting in it is wrong; names file and key.
    """
    try:
        plan = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Plan), OmegaConf.load(path)))
    except (OSError, YAMLError, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path}: {str(error).splitlines()[0]} (key '{getattr(error, 'full_key', None) or ''}')"
        ) from error
    assert isinstance(plan, Plan)
    for key, names in (("name", [plan.name]), ("starts", [*plan.starts]), ("arms", [*plan.arms])):
        for name in names:
            if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
                raise ConfigError(
                    f"{path}: {key}: {name!r} must be letters, digits, '_' and '.', for folders are named by it"
                )
    if PUBLISHED in plan.starts:
        raise ConfigError(f"{path}: starts.{PUBLISHED} is the model as it came; give that start another name")
    if both := sorted(plan.starts.keys() & plan.arms.keys()):
        raise ConfigError(f"{path}: {', '.join(both)}: a start and an arm have this name; give one of them another")
    if not plan.grid or not plan.seeds:
        raise ConfigError(f"{path}: grid and seeds must say at least one run")
    for index, block in enumerate(plan.grid):
        for kind, names, known in (
            ("start", block.starts, [PUBLISHED, *plan.starts]),
            ("arm", block.arms, [*plan.arms]),
        ):
            unknown = [name for name in names if name not in known]
            if unknown or not names:
                raise ConfigError(f"{path}: grid[{index}].{kind}s: {unknown or names}; known: {', '.join(known)}")
        if block.seeds == []:
            raise ConfigError(f"{path}: grid[{index}].seeds is empty; leave it out for the plan's, or name some")
    if plan.baseline and plan.baseline not in plan.arms:
        raise ConfigError(f"{path}: baseline={plan.baseline} is no arm; arms: {', '.join(plan.arms)}")
    from_weights = {arm for block in plan.grid if block.starts != [PUBLISHED] for arm in block.arms}
    for name, arm in [*plan.starts.items(), *plan.arms.items()]:
        try:
            check_words([*plan.set, *arm.set], OWN_WORDS)
            check_words([*plan.set, *arm.set] if name in from_weights else [], ["model.path"])
            _check_files(load_config([config_of(arm.method, plan.benchmark, plan.preset)], [*plan.set, *arm.set]))
        except ConfigError as error:
            raise ConfigError(f"{path}: {name}: {error}") from error
    return plan


def _check_files(config: Config) -> None:
    """Raises ConfigError where a file of tasks or traces isn't there: an arm's turn may come hours later."""
    files = {
        "tasks.path": config.tasks.path,
        "tasks.eval_path": config.tasks.eval_path,
        "traces.path": config.traces.path,
    }
    for key, path in files.items():
        if path is not None and not Path(path).exists():
            raise ConfigError(f"{key}={path}: no such file in {Path.cwd()}; give its path from there, or the whole one")


def cells(plan: Plan) -> Iterator[Cell]:
    """Every run once, seed by seed: a plan that is cut off is still paired."""
    seen = set()
    for seed in sorted(
        {seed for block in plan.grid for seed in block.seeds or plan.seeds}, key=[*plan.seeds, *_extra(plan)].index
    ):
        for block in plan.grid:
            for start in block.starts:
                for arm in block.arms:
                    cell = Cell(start, arm, seed)
                    if seed in (block.seeds or plan.seeds) and cell not in seen:
                        seen.add(cell)
                        yield cell


def start_cells(plan: Plan) -> list[Cell]:
    """The runs that make a plan's starts."""
    return [Cell(PUBLISHED, name, plan.start_seed) for name in plan.starts]


def _extra(plan: Plan) -> list[int]:
    return [seed for block in plan.grid for seed in block.seeds or () if seed not in plan.seeds]


def start_words(start: str, folder: Path | None) -> list[str]:
    """What a run is told to begin from a start, whose warm-up it had; ``folder`` None: the rest without its place."""
    place = [f"model.path={folder}"] if folder is not None else []
    return [] if start == PUBLISHED else [*place, "warmup.steps=0", "evaluation.before=false"]


def arm_of(plan: Plan, cell: Cell) -> Arm:
    return plan.starts[cell.arm] if cell.start == PUBLISHED and cell.arm in plan.starts else plan.arms[cell.arm]


def config_for(plan: Plan, cell: Cell) -> Path:
    return config_of(arm_of(plan, cell).method, plan.benchmark, plan.preset)


def words_for(plan: Plan, cell: Cell, folder: Path | None = None) -> list[str]:
    """What a cell's run is told besides its method's settings file; ``folder``: the weights of its start."""
    return [*plan.set, *start_words(cell.start, folder), *arm_of(plan, cell).set]


def settings_for(plan: Plan, cell: Cell) -> str:
    return Settings.of(config_for(plan, cell), cell.seed, words_for(plan, cell)).digest


def check_kept(plan: Plan, results: Path) -> None:
    """Raises ConfigError where a result was made with other settings than the plan has now."""
    starts = start_cells(plan)
    for cell in [*starts, *cells(plan)]:
        file = results / f"{cell.id}.json"
        if not file.is_file():
            continue
        kept = read_result(file)
        same = kept.settings == settings_for(plan, cell) if kept.settings else kept.words == words_for(plan, cell)
        if not same or kept.method != arm_of(plan, cell).method:
            arms = " and those of its arms" if cell in starts else ""
            raise ConfigError(
                f"{file} was made with other settings ({' '.join(kept.words)}); delete it{arms}, or name another"
                " folder with --results"
            )


def results_of(plan: Plan, folder: Path) -> tuple[list[Result], list[str]]:
    """(The results that are there of the plan's runs and starts, names of other files).

    Raises:
        ConfigError: see :func:`check_kept`.
        DataError: a file is no result.
    """
    check_kept(plan, folder)
    own = {cell.id for cell in [*start_cells(plan), *cells(plan)]}
    files = sorted(folder.glob("*.json"))
    return [read_result(file) for file in files if file.stem in own], [f.name for f in files if f.stem not in own]
