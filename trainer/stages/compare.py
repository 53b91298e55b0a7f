"""`python -m trainer compare RECIPE`: which way of training is worth it, on the same budget?

What the tables that all arms share hold decides what is compared:

- with a `[probe]`, arms are encoders, kept as they are or trained by a method; the caption probe
  decides (see `trainer.stages._encoder_arms`);
- with a `[decoder]`, arms are captioners, each made by steps: finetuning, and other stages between;
  their captions of `[dev]` decide (see `trainer.stages._captioner_arms`).

Every arm runs once a seed. Beside `compare.html` and `compare.json` the folder gets
`<arm>/<seed>/`, the runs: a comparison that was killed goes on where it was.
"""

import shlex
import sys
from pathlib import Path

import numpy as np

from trainer.comparison import ArmFigures, Comparison, RunFigures, write_comparison
from trainer.config import validate, write_resolved
from trainer.loop import device_of
from trainer.stages import _captioner_arms, _encoder_arms
from trainer.stages._arms import Bench, Config
from trainer.stages._captioner_arms import CaptionerBench
from trainer.stages._encoder_arms import EncoderBench
from trainer.verdict import judge

__all__ = ["Config", "run"]


def run(config: Config, out_dir: Path) -> None:
    """Trains what is not trained yet, and writes the page and its numbers.

    Raises:
        ConfigError: there is nothing to compare, or an arm cannot be built.
        DataError: the images of dev have been seen, or say nothing.
        CheckpointError: a run in `out_dir` is of another recipe or of other images.
    """
    bench = _bench(config, out_dir)
    bench.prepare()
    out_dir.mkdir(parents=True, exist_ok=True)
    write_resolved(bench.config, out_dir / "recipe.json")
    runs = _run_all(bench)
    scores = {name: np.stack([run.cider_d for run in found]) for name, found in runs.items()}
    comparison = Comparison(
        kind=bench.kind,
        arms={name: ArmFigures(bench.about(name), found) for name, found in runs.items()},
        judgement=judge(scores, bench.baseline),
        seen=bench.seen,
        subject=bench.subject,
        command=shlex.join(["python", *sys.orig_argv[1:]]),
        place=str(device_of(bench.config.loop)),
        samples=bench.samples(),
    )
    write_comparison(out_dir, comparison)
    print(f"\n{comparison.verdict}\nwrote {out_dir}/compare.html and compare.json")


def _bench(config: Config, out_dir: Path) -> Bench:
    tables = config.model_dump()
    if "decoder" in tables:
        return CaptionerBench(validate(_captioner_arms.Config, tables, "recipe"), out_dir)
    return EncoderBench(validate(_encoder_arms.Config, tables, "recipe"), out_dir)


def _run_all(bench: Bench) -> dict[str, list[RunFigures]]:
    """Returns every arm's runs, in the order of the seeds; each arm runs once before any twice."""
    runs: dict[str, list[RunFigures]] = {name: [] for name in bench.config.arms}
    order = [(name, seed) for seed in bench.config.seeds for name in runs]
    for place, (name, seed) in enumerate(order):
        to_come = [other for other in order[place:] if not bench.is_done(*other)]
        left = _time_left(runs, len(to_come))
        print(f"\nrun {place + 1} of {len(order)}: {name}, seed {seed}{left}", flush=True)
        runs[name].append(bench.run_of(name, seed))
    return runs


def _time_left(runs: dict[str, list[RunFigures]], to_come: int) -> str:
    """Returns how long so many runs will take, as far as the ones that are done tell."""
    times = [run.seconds for found in runs.values() for run in found if run.budgets]
    known = [seconds for seconds in times if seconds is not None]
    if not known or not to_come:
        return ""
    seconds = to_come * sum(known) / len(known)
    return f", about {seconds / 60:.0f} min left" if seconds > 90 else f", {seconds:.0f} s left"
