"""Two public small benchmarks in the plane, with this house's objectives, networks and step.

    python launch/tables/toy.py --out=docs/toy.json --plot=docs/toy.png --docs=docs/family.md
    python launch/tables/toy.py thin --seeds=1,2,3
    python launch/tables/toy.py checkerboard --methods=meanflow,meanflow+own_velocity --seeds=0
    python launch/tables/toy.py --table --out=docs/toy.json      runs nothing, prints the tables

checkerboard  KL of generated to true points in 60 x 60 bins, at 1, 2, 4, 8 and 16 steps.
              Protocol and public figures: NathanVanier/flow-map-self-distillation.
thin          mean square of x1 -> x0 on test pairs, where x1 is x0 squeezed by s.
              Protocol and public figures: Adit-Mugdha-das/meanflow-thin-endpoint.

A method is one or more names of configs/methods.py, or of RECIPES here, joined by +. A row is one
method and seed. It is stored as it ends, and its state every 2,000 steps. A stopped command goes
on from there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import jax
import jax.numpy as jnp
import numpy as np

from configs import methods
from dmf import networks, optim, sharding, state, step
from dmf.config import Config, complete, parse
from dmf.errors import DmfError
from dmf.logging import Progress
from dmf.method import curriculum, guidance, velocity
from dmf.method.samplers import few_step
from launch.tables.family import paste

Row = dict[str, Any]
CHUNK, SAVED = 500, 2000  # steps in one program's call; steps between two saved states
BINS, EDGE, POINTS, FLOOR = 60, 2.5, 100_000, 1e-8
CENTRES, SPREAD = 4, 0.5  # blobs on a circle of radius 3, and their standard deviation
COMMAND = (
    "python launch/tables/toy.py --out=docs/toy.json --plot=docs/toy.png --docs=docs/family.md"
)
METHODS = (
    *("meanflow", "meanflow+own_velocity", "linear", "dagger", "dagger+own_velocity"),
    *("central", "alpha_flow"),
)
# What both protocols share: plain squares, raw weights, no warm-up. "unit" keeps the share of the
# r < t rows in the loss as a discrete stage gets fine, which p = 0 would not do. It is ours.
BASE: dict[str, Any] = dict(
    data=dict(flip=False),
    loss=dict(p=0.0, residual_scale="unit"),
    ema=dict(halflife_images=(1e4,), evaluate=0.0),
)

# Besides the names of configs/methods.py: one-field changes of a method, ours.
RECIPES: dict[str, dict[str, Any]] = {
    "p1": dict(loss=dict(p=1.0)),  # the adaptive weight in the place of plain squares
    "p.5": dict(loss=dict(p=0.5)),
    "zero": dict(network=dict(interval_init="zero")),  # starts from u(z, r, t) = u(z, t, t)
    # flow matching for every pair of times alone: right where u = v, as in the thin benchmark
    "all_pairs": dict(curriculum=dict(stages=1, kinds=("all_pairs",))),
    "decay": dict(optimizer=dict(decay_fraction=0.4)),  # of the rate, over the last 40 %
}


class Bench(NamedTuple):
    """One benchmark.

    fields    the config, besides `BASE`
    settings  what a row varies besides method and seed: the squeezes s, or nothing
    data      setting -> arrays that a step draws from
    draw      (data, key) -> a batch
    score     (setting, sample, seed) -> scores by number of steps; sample: (noise, steps) -> data
    public    setting -> scores by number of steps, of MeanFlow or of LSD
    seeds     of the protocol
    """

    fields: dict[str, Any]
    settings: tuple[float, ...]
    data: Callable[[float], Any]
    draw: Callable[[Any, jax.Array], dict[str, jax.Array]]
    score: Callable[[float, Any, int], dict[str, float]]
    public: dict[str, dict[str, float]]
    seeds: tuple[int, ...]


# ---- checkerboard


def checkerboard(key: jax.Array, count: int) -> jax.Array:
    """(count, 2): uniform points of the 8 of 16 unit cells of [-2, 2]^2 with i + j even."""
    of_i, of_j, inside = jax.random.split(key, 3)
    i = jax.random.randint(of_i, (count,), 0, 4)
    j = 2 * jax.random.randint(of_j, (count,), 0, 2) + i % 2
    return jnp.stack([i, j], 1) - 2 + jax.random.uniform(inside, (count, 2))


def histogram(points: Any) -> np.ndarray:
    """Shares of the points per bin of [-2.5, 2.5]^2, plus 1e-8."""
    edges = np.linspace(-EDGE, EDGE, BINS + 1)
    found, _, _ = np.histogram2d(points[:, 0], points[:, 1], bins=(edges, edges))
    return found / found.sum() + FLOOR


def divergence(true: Any, made: Any) -> float:
    """KL(true | made) of two sets of points, by their histograms."""
    p, q = histogram(np.asarray(true)), histogram(np.asarray(made))
    return float(np.sum(p * np.log(p / q)))


def board_batch(_: Any, key: jax.Array) -> dict[str, jax.Array]:
    """Fresh points for every step; the noise is the step's own."""
    return batch_of(checkerboard(key, 2048))


def board_score(_: float, sample: Any, seed: int) -> dict[str, float]:
    """KL at every number of steps."""
    of_true, of_noise = jax.random.split(jax.random.key(10_000 + seed))
    true, e = checkerboard(of_true, POINTS), jax.random.normal(of_noise, (POINTS, 2))
    return {str(n): divergence(true, sample(e, n)) for n in (1, 2, 4, 8, 16)}


# ---- thin end point


def thin_pairs(squeeze: float, per_blob: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(x0, x1), each (4 per_blob, 2): points of four blobs, and the same squeezed."""
    rng = np.random.default_rng(seed)
    angle = 2 * np.pi * np.arange(CENTRES) / CENTRES
    centre = np.repeat(3 * np.stack([np.cos(angle), np.sin(angle)], 1), per_blob, 0)
    x0 = centre + SPREAD * rng.normal(size=centre.shape)
    return x0.astype(np.float32), (centre + squeeze * (x0 - centre)).astype(np.float32)


def thin_data(squeeze: float) -> tuple[np.ndarray, np.ndarray]:
    """The 4,000 training pairs."""
    return thin_pairs(squeeze, 1000, 0)


def thin_batch(pairs: Any, key: jax.Array) -> dict[str, jax.Array]:
    """512 of the pairs, drawn anew for every step."""
    x0, x1 = pairs
    at = jax.random.randint(key, (512,), 0, len(x0))
    return batch_of(x0[at]) | {"noise": x1[at]}


def thin_score(squeeze: float, sample: Any, _: int) -> dict[str, float]:
    """Mean square of the map x1 -> x0 on the test pairs, at 1 and 4 steps."""
    x0, x1 = thin_pairs(squeeze, 300, 123)
    return {str(n): float(np.mean((np.asarray(sample(x1, n)) - x0) ** 2)) for n in (1, 4)}


def batch_of(x: jax.Array) -> dict[str, jax.Array]:
    """A batch of unlabelled points."""
    return {"x": x, "label": jnp.zeros(len(x), jnp.int32)}


def by_steps(steps: tuple[int, ...], values: tuple[float, ...]) -> dict[str, float]:
    """{"1": ...}: scores by number of steps."""
    return {str(n): value for n, value in zip(steps, values, strict=True)}


BENCHES = {
    "checkerboard": Bench(
        fields=dict(
            batch_size=2048,
            network=dict(
                kind="mlp",
                width=256,
                depth=4,
                time_input="raw",
                init="torch",
                interval_init="random",
            ),
            # Theirs has t = 1 at the data: its end time t is our 1 - r, its start s our 1 - t.
            times=dict(base="uniform", pairing="above", border="own", r_neq_t_fraction=0.25),
            curriculum=dict(length=20_000.0),
            optimizer=dict(learning_rate=2e-4, warmup_steps=0, weight_decay=1e-4),
        ),
        settings=(0.0,),
        data=lambda _: (),
        draw=board_batch,
        score=board_score,
        public={"0.0": by_steps((1, 2, 4, 8, 16), (0.4050, 0.3688, 0.2798, 0.2074, 0.1940))},
        seeds=(0, 1, 2, 3, 4),
    ),
    "thin": Bench(
        fields=dict(
            batch_size=512,
            network=dict(
                kind="mlp",
                width=128,
                depth=3,
                time_input="raw",
                init="torch",
                interval_init="random",
            ),
            times=dict(base="uniform", pairing="sorted", r_neq_t_fraction=0.25),
            curriculum=dict(length=3000.0),
            optimizer=dict(learning_rate=1e-3, warmup_steps=0),
        ),
        settings=(0.10, 0.05, 0.02, 0.01),
        data=thin_data,
        draw=thin_batch,
        score=thin_score,
        public={
            "0.1": by_steps((1, 4), (0.0052, 0.0047)),
            "0.05": by_steps((1, 4), (0.0305, 0.0368)),
            "0.02": by_steps((1, 4), (0.2138, 0.2134)),
            "0.01": by_steps((1, 4), (0.3661, 0.3116)),
        },
        seeds=(1, 2, 3, 4, 5),
    ),
}


# ---- training


def config_of(bench: str, method: str, seed: int) -> Config:
    """The config of a row. Raises DmfError for an unknown method."""
    merged: dict[str, Any] = {"seed": seed}
    recipes, names = split_names(method)
    for part in (BASE, BENCHES[bench].fields, *map(RECIPES.__getitem__, recipes)):
        for key, value in part.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return parse(methods.apply(complete(merged), names, "methods.py"))


def split_names(method: str) -> tuple[list[str], list[str]]:
    """The recipes and the names of configs/methods.py in a method. Raises DmfError for others."""
    parts = methods.names_in(method.replace("+", ","), "methods.py", RECIPES)
    return [n for n in parts if n in RECIPES], [n for n in parts if n not in RECIPES]


class Trainer:
    """The programs of one benchmark's method; seeds and squeezes share them."""

    def __init__(self, bench: str, method: str):
        self.bench, self.config = BENCHES[bench], config_of(bench, method, 0)
        self.mesh = sharding.make_mesh(self.config.mesh, jax.devices()[:1])
        self.network = networks.build(self.config.network, (2,))
        self.optimizer = optim.build(self.config.optimizer)
        extra = guidance.passes(self.config.guidance), velocity.passes(self.config.loss.tangent)
        rules, size = self.config.curriculum, self.config.batch_size
        self.stages = curriculum.build_stages(rules, size, size, *extra)
        self.total = self.stages[-1].last

    def fresh(self, seed: int) -> Any:
        """The state before the first step."""
        params = self.network.init(jax.random.key(seed))
        rules = self.config.curriculum
        return state.create(params, self.optimizer, self.config.ema, rules)

    @cache  # noqa: B019 (a trainer lives as long as the command)
    def steps(self, kind: str) -> Callable[..., tuple[Any, jax.Array]]:
        """(state, scalars of many steps, data, key) -> (state, mean loss), in one program."""
        place = sharding.placed(self.mesh, jax.eval_shape(partial(self.fresh, 0)))
        how = step.network_for(kind, self.config, (2,), self.mesh)
        made = step.make_train_step(
            kind, how, self.optimizer, self.config, self.mesh, place
        ).__wrapped__  # compiler options belong to the outer program

        def many(
            now: Any, numbers: step.Scalars, data: Any, key: jax.Array
        ) -> tuple[Any, jax.Array]:
            def one(now: Any, scalars: step.Scalars) -> tuple[Any, jax.Array]:
                now, metrics = made(
                    now, self.bench.draw(data, jax.random.fold_in(key, now.step)), scalars
                )
                return now, metrics["loss"]

            now, losses = jax.lax.scan(one, now, numbers)
            return now, jnp.mean(losses)

        options = sharding.compiler_options(self.mesh)
        return jax.jit(many, donate_argnums=0, compiler_options=options)

    @cache  # noqa: B019
    def sample(self) -> Callable[..., jax.Array]:
        """(params, noise, number of steps) -> data, one program for all numbers of steps."""
        apply = self.network.apply
        return jax.jit(lambda params, e, n: few_step(partial(apply, params), e, n))

    def scalars(self, stage: Any, first: int, last: int, seed: int) -> step.Scalars:
        """The numbers of the steps first .. last - 1, stacked."""
        made = [step.step_scalars(n, stage, self.stages, self.config) for n in range(first, last)]
        found = jax.tree.map(lambda *x: np.stack(x), *made)
        return found._replace(seed=np.full(last - first, seed, np.uint32))

    def passes(self) -> float:
        """Forward passes per row, of all steps together."""
        share = self.config.times.r_neq_t_fraction
        return sum(s.steps * curriculum.passes(s, share) for s in self.stages) / self.total

    def train(self, setting: float, seed: int, kept: Path) -> tuple[Any, float]:
        """(the last state, seconds). The state in the file `kept` is gone on from."""
        now, seconds = restored(kept, self.fresh(seed))
        data, key = self.bench.data(setting), jax.random.fold_in(jax.random.key(seed), 7)
        n, progress = int(now.step), Progress(self.total, int(now.step))
        while n < self.total:
            began, stage = time.monotonic(), curriculum.stage_at(self.stages, n)
            last = min(stage.last, n + CHUNK)
            given = self.scalars(stage, n, last, seed)
            now, loss = self.steps(stage.kind)(now, given, data, key)
            loss, n = float(loss), last
            seconds += time.monotonic() - began
            if not np.isfinite(loss):
                raise DmfError(f"step {n}: the loss is {loss}; expected finite values")
            progress.show(n, stage.name, loss)
            if n // SAVED > (n - CHUNK) // SAVED and n < self.total:
                save(kept, now, seconds)
        progress.pause()
        return now, seconds


def save(path: Path, now: Any, seconds: float) -> None:
    """Writes a state, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_ = path.with_name(f".{os.getpid()}.npz")
    np.savez(partial_, *(np.asarray(x) for x in jax.tree.leaves(now)), np.float64(seconds))
    partial_.replace(path)


def restored(path: Path, fresh: Any) -> tuple[Any, float]:
    """(state, seconds so far) of the file, or the fresh state."""
    if not path.is_file():
        return fresh, 0.0
    with np.load(path) as found:
        *leaves, seconds = (found[name] for name in found.files)
    return jax.tree.unflatten(jax.tree.structure(fresh), map(jnp.asarray, leaves)), float(seconds)


def run(bench: str, trainer: Trainer, case: tuple[int, str, float], folder: Path) -> Row:
    """Trains and scores one row."""
    seed, method, setting = case
    kept = folder / kept_name(bench, case)
    row = {"bench": bench, "method": method, "setting": setting, "seed": seed}
    try:
        now, seconds = trainer.train(setting, seed, kept)
    except DmfError as error:
        return row | {"failed": str(error)}
    kept.unlink(missing_ok=True)
    return row | scored(trainer, setting, seed, now) | {"seconds": round(seconds, 1)}


def scored(trainer: Trainer, setting: float, seed: int, now: Any) -> Row:
    """The scores of a state, its steps, and what they cost in forward passes of a row."""
    scores = trainer.bench.score(setting, partial(trainer.sample(), now.params), seed)
    size, passes, steps = trainer.config.batch_size, trainer.passes(), int(now.step)
    return {
        "scores": {n: round(x, 6) for n, x in scores.items()},
        "steps": steps,
        "passes": round(passes, 4),
        "row_passes": round(steps * size * passes),
    }


def kept_name(bench: str, case: tuple[int, str, float]) -> str:
    """The file of a row's state while it trains."""
    seed, method, setting = case
    return f"{bench}_{method}_{setting}_{seed}.npz"


def run_all(bench: str, names: list[str], seeds: list[int], out: Path, folder: Path) -> None:
    """Runs what is missing, the seeds in turn, and stores each row as it comes."""
    settings = BENCHES[bench].settings
    cases = itertools.product(seeds, names, settings)
    kept = stored(out)
    done = {case_of(row) for row in kept if row["bench"] == bench and "unfinished" not in row}
    todo = [case for case in cases if case not in done]
    trainers, began = {name: Trainer(bench, name) for name in {n for _, n, _ in todo}}, time.time()
    for i, case in enumerate(todo):
        row = run(bench, trainers[case[1]], case, folder)
        add(out, row)
        left = (time.time() - began) / (i + 1) * (len(todo) - i - 1)
        said = row.get("failed") or "  ".join(f"{x:.4f}" for x in row["scores"].values())
        seed, name, setting = case
        label = f"{bench} {name} seed {seed}" + (f" s = {setting}" if setting else "")
        print(f"[{i + 1}/{len(todo)}] {label}: {said}, about {left / 60:.0f} min left", flush=True)


def score_unfinished(bench: str, names: list[str], out: Path, folder: Path) -> None:
    """Scores the states of rows that still train, and stores them as unfinished rows."""
    about = BENCHES[bench]
    for case in itertools.product(about.seeds, names, about.settings):
        seed, method, setting = case
        path = folder / kept_name(bench, case)
        if path.is_file():
            trainer = Trainer(bench, method)
            now, _ = restored(path, trainer.fresh(seed))
            row = {"bench": bench, "method": method, "setting": setting, "seed": seed}
            add(out, row | scored(trainer, setting, seed, now) | {"unfinished": True})


def case_of(row: Row) -> tuple[int, str, float]:
    """(seed, method, setting) of a row."""
    return row["seed"], row["method"], row["setting"]


def add(path: Path, row: Row) -> None:
    """Stores a row in the place of an unfinished one of the same case."""
    same = row["bench"], *case_of(row)
    keep(path, [*(r for r in stored(path) if (r["bench"], *case_of(r)) != same), row])


# ---- rows, tables and plot


def stored(path: Path) -> list[Row]:
    """The rows of the file, [] where there is none."""
    return json.loads(path.read_text())["rows"] if path.is_file() else []


def keep(path: Path, rows: list[Row]) -> None:
    """Writes the rows, whole or not at all."""
    rows = sorted(rows, key=lambda r: (r["bench"], r["method"], -r["setting"], r["seed"]))
    public = {name: bench.public for name, bench in BENCHES.items()}
    partial_ = path.with_name(f".{path.name}.{os.getpid()}")
    text = json.dumps({"command": COMMAND, "public": public, "rows": rows}, indent=1)
    partial_.write_text(text + "\n")
    partial_.replace(path)


def spread(values: list[float]) -> str:
    """Mean and, of several seeds, population standard deviation, as the public tables have it."""
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}"


def groups(rows: list[Row], bench: str) -> dict[str, dict[float, list[Row]]]:
    """The rows of a benchmark by method and setting, failed ones left out."""
    found: dict[str, dict[float, list[Row]]] = {}
    for row in rows:
        if row["bench"] == bench and "failed" not in row:
            found.setdefault(row["method"], {}).setdefault(row["setting"], []).append(row)
    return found


def table(rows: list[Row], bench: str) -> str:
    """One benchmark as Markdown: the public figures, then a row per method."""
    about = BENCHES[bench]
    steps = list(next(iter(about.public.values())))
    if about.settings == (0.0,):
        heads = [f"{n} step{'s' * (n != '1')}" for n in steps]
        cells = {"public": [f"{x:.4f}" for x in about.public["0.0"].values()]}
    else:
        heads = [f"s = {s}" for s in about.settings]
        cells = {"public MeanFlow": [f"{about.public[str(s)]['1']:.4f}" for s in about.settings]}
    lines = [f"| method | seeds | {' | '.join(heads)} | passes per row |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    lines += [f"| {name} | | {' | '.join(of)} | |" for name, of in cells.items()]
    for method, by in groups(rows, bench).items():
        if about.settings == (0.0,):
            of = [spread([r["scores"][n] for r in by[0.0]]) for n in steps]
        else:
            of = [
                spread([r["scores"]["1"] for r in by[s]]) if s in by else "" for s in about.settings
            ]
        some = next(iter(by.values()))
        if any("unfinished" in r for r in some):
            method += f", unfinished, {some[0]['steps']:,} steps"
        seeds = " to ".join(str(n) for n in sorted({len(v) for v in by.values()}))
        lines.append(f"| {method} | {seeds} | {' | '.join(of)} | {some[0]['passes']:.2f} |")
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """KL over the number of steps, and the one-step error over the squeeze."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(10, 4))
    board, thin = fig.subplots(1, 2)
    for axis, bench in ((board, "checkerboard"), (thin, "thin")):
        public = BENCHES[bench].public
        if bench == "checkerboard":
            curves = {"public": {int(n): x for n, x in public["0.0"].items()}}
            for method, by in groups(rows, bench).items():
                curves[method] = {
                    int(n): statistics.mean(r["scores"][n] for r in by[0.0]) for n in public["0.0"]
                }
        else:
            curves = {"public": {float(s): of["1"] for s, of in public.items()}}
            for method, by in groups(rows, bench).items():
                curves[method] = {
                    s: statistics.mean(r["scores"]["1"] for r in of) for s, of in by.items()
                }
        for name, curve in curves.items():
            style = "k--" if name == "public" else "o-"
            axis.loglog(*zip(*sorted(curve.items()), strict=True), style, ms=3, lw=1, label=name)
    board.set(xlabel="steps", ylabel="KL(true | generated)", title="checkerboard")
    thin.set(xlabel="squeeze s", ylabel="one-step mean square", title="thin end point")
    board.legend(fontsize=7)
    thin.legend(fontsize=7)
    fig.savefig(path, dpi=110, bbox_inches="tight")


# ---- the command


def arguments() -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    whole = lambda text: [int(n) for n in text.split(",")]  # noqa: E731
    parser.add_argument(
        "bench", nargs="?", choices=(*BENCHES, ""), default="", help="default: both"
    )
    parser.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    parser.add_argument("--seeds", type=whole, help="comma-separated; default: the protocol's five")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "toy", help="of states")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "toy" / "toy.json")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--docs", type=Path, help="page that takes the tables between its marks")
    parser.add_argument(
        "--unfinished", action="store_true", help="train nothing, score rows that still train"
    )
    parser.add_argument("--table", action="store_true", help="run nothing, print what is stored")
    return parser.parse_args()


def main() -> None:
    """The command."""
    given = arguments()
    names = given.methods.split(",")
    for name in names:
        split_names(name)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    if not given.table:
        for bench in [given.bench] if given.bench else ["thin", "checkerboard"]:
            if given.unfinished:
                score_unfinished(bench, names, given.out, given.folder)
                continue
            seeds = given.seeds or list(BENCHES[bench].seeds)
            run_all(bench, names, seeds, given.out, given.folder)
    rows = stored(given.out)
    for bench in BENCHES:
        print(f"\n{bench}\n{table(rows, bench)}")
        if given.docs:
            paste(given.docs, bench, table(rows, bench))
    if given.plot:
        plot(rows, given.plot)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from what is on disk")
    except DmfError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
