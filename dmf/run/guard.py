"""The guard: it notices a run that diverges, goes back to a healthy step, and goes on otherwise.

Discrete MeanFlow has a ceiling. With d too small its residual is rounding and noise: a one-step
FID of 14.5 became 294 (arXiv 2604.08837). The probes of `dmf.run.probe` and the scores show it.
Each of these is an alarm:

    a value that is not finite           of a step, a probe or a score
    residual_border, residual_median     more than `factor` times the first probe's of the stage
    change_ulps                          below `ulps` in a discrete stage: u and u' are then equal
                                         to the compute dtype
    the main score                       more than `factor` times the best one to compare with

A stage that an intervention has cut counts as two stages. The main score is taken at the first
number of sampling steps. The best one is looked for since the last stage of plain flow matching,
which takes the one-step generator apart. Only the scores show a residual that grows by less than
`factor` in each of several stages.

An intervention is a row of guard.json. The stages are a function of the config and of these rows.
What is on disk beyond the step to go back to is deleted. So an intervention is one more start of
the run, and a start that was killed meanwhile is simply done again.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dmf.config import GuardConfig
from dmf.errors import DmfError, printable
from dmf.method.curriculum import Stage, rho_at, stage_at
from dmf.method.objectives import FORMER, KINDS, LAST
from dmf.storage import paths, records
from dmf.storage.manifest import MANIFEST, steps_in, verify

FILE = "guard.json"
# Not the mean over pairs: the few rows that end near t = 1 decide it.
WORSE = ("residual_border", "residual_median")
DONE = {
    "stop": "where the run ends",
    LAST: "the discrete stages left are jvp stages now",
    "halve": "d falls half as far from the last good one in the discrete stages left",
    "floor": "d falls no further in the discrete stages left",
    "rate": "the learning rate is half of what it was",
}

KIND = records.Is("a kind of stage", lambda x: type(x) is str and (x in KINDS or x in FORMER))
ROW = {  # an intervention
    **dict.fromkeys(("stage", "reason"), str),
    "step": records.POSITIVE,
    "kind": KIND,
    "back_to": records.COUNT,
    "action": records.Is(f"one of {', '.join(DONE)}", lambda x: type(x) is str and x in DONE),
    "rules": dict,
    "settled": bool,
}


class Diverged(DmfError):
    """The run is no longer healthy: after `step` steps, for `reason`. text: the whole message."""

    def __init__(self, step: int, reason: str, text: str = ""):
        super().__init__(text or f"step {step}: {reason}")
        self.step, self.reason = step, reason


def alarm(
    probe: Mapping[str, Any], start: Mapping[str, Any], config: GuardConfig, factor: float = 0.0
) -> str:
    """Why a probe is an alarm, "" where it is none.

    start: the stage's first probe. factor: takes the place of the config's, unless it is 0.
    """
    factor = factor or config.factor
    for name, value in probe.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} = {value}, expected a finite value"
    for name in WORSE:
        if probe[name] > factor * start[name]:
            first = f"{factor:g} x the stage's first, {start[name]:.4g}"
            return f"{name} = {probe[name]:.4g}, above {first}"
    ulps = probe.get("change_ulps", math.inf)
    if ulps < config.ulps:
        return f"|u - u'| / |u| = {ulps:.3g} ulps of the compute dtype, below {config.ulps:g}"
    return ""


def remedy(action: str, failing: Stage) -> str:
    """The action that can help this stage.

    It is "rate" where no finite difference is to blame, or where d is 1 already.
    """
    if action in (LAST, "halve", "floor") and not KINDS[failing.kind].steps_back:
        return "rate"
    return "rate" if action in ("halve", "floor") and failing.rho >= 1 else action


def applied(stages: tuple[Stage, ...], row: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages after one intervention, a row of guard.json.

    From row["back_to"] on they are changed by row["action"]. A stage is cut in two parts there.
    """
    back, action, failing = row["back_to"], row["action"], stage_at(stages, row["step"] - 1)
    done = [replace(s, steps=min(s.last, back) - s.first) for s in stages if s.first < back]
    good = _good_rho(stages, failing, back)
    return (*done, *(_changed(_rest(s, back), action, good) for s in stages if s.last > back))


def _rest(stage: Stage, back: int) -> Stage:
    """The part of a stage from step `back` on."""
    first = max(stage.first, back)
    return replace(stage, first=first, steps=stage.last - first, rho=rho_at(stage, first))


def _good_rho(stages: tuple[Stage, ...], failing: Stage, back: int) -> float:
    """The rho that was still good.

    In a smooth schedule it is the rho of the step to go back to. Otherwise it is the next larger
    rho of the stages before, or 1.
    """
    if failing.fall != 1:
        return rho_at(failing, max(failing.first, back))
    before = [s.rho for s in stages if s.first < failing.first and KINDS[s.kind].steps_back]
    return min((rho for rho in before if rho > failing.rho), default=1.0)


def _changed(stage: Stage, action: str, good: float) -> Stage:
    """A stage, or its part, after the action. good: the rho that was still good."""
    if action == "rate":
        return replace(stage, rate=stage.rate / 2)
    if not KINDS[stage.kind].steps_back:
        return stage
    if action == LAST:
        return replace(stage, kind=KINDS[stage.kind].limit, rho=1.0, fall=1.0)
    if action == "halve":
        return replace(
            stage, rho=max(stage.rho, math.sqrt(stage.rho * good)), fall=math.sqrt(stage.fall)
        )
    return replace(stage, rho=max(stage.rho, good), fall=1.0) if action == "floor" else stage


def check_finite(
    step: int, stage: Stage, values: Mapping[str, float], leaves: Callable[[], Sequence[str]]
) -> None:
    """Raises Diverged where a metric of the step that led to `step` is not finite.

    leaves: gives the names of all weights, in the order that values["nonfinite_leaf"] counts in.
    """
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        leaf = int(values["nonfinite_leaf"])
        where = f", first in the gradient of {leaves()[leaf]}" if leaf >= 0 else ""
        reason = f"{bad[0]} = {values[bad[0]]}{where}"
        where = f"step {step} ({stage.name}, {stage.kind})"
        raise Diverged(
            step, reason, f"{where}: {reason}; expected finite values. That state is not saved"
        )


def read(path: Path) -> list[dict[str, Any]]:
    """The interventions on disk, none without a file. Raises DmfError where it holds others."""
    rows = records.read(path, [ROW]) if path.exists() else []
    return [records.unsealed(row, f"{path}: [{i}]") for i, row in enumerate(rows)]


def begins_again(path: Path) -> bool:
    """Whether the last intervention went back to the fresh weights of step 0.

    These are not on disk: the run draws them again.
    """
    rows = read(path)
    return bool(rows) and rows[-1]["back_to"] == 0


class Guard:
    """The interventions of one run, and what calls for the next."""

    def __init__(
        self, path: Path, checkpoints: Path, config: GuardConfig, fresh: bool, drawn: bool = True
    ):
        """path: the file of the interventions. checkpoints: the folder of the step folders.

        fresh: there is no run yet. drawn: the run starts from fresh weights, so that it can go back
        to step 0 without a checkpoint. Raises DmfError where the file cannot be read.
        """
        self._path, self._folder, self._config, self._drawn = path, checkpoints, config, drawn
        self.rows: list[dict[str, Any]] = [] if fresh else read(path)
        self.active = config.action != "off"

    def stages(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """The stages after the interventions. Raises DmfError for a step that they do not have."""
        for row in self.rows:
            if not row["back_to"] < row["step"] <= stages[-1].last:
                what = f"{self._path}: step is {row['step']}, back_to is {row['back_to']}"
                raise DmfError(f"{what}; expected a later step, and at most {stages[-1].last}")
        return functools.reduce(applied, self.rows, stages)

    def told(self) -> str:
        """The interventions as text, which must be the same on all processes."""
        return json.dumps([row | {"settled": True} for row in self.rows])

    def settle(self) -> None:
        """Does the rest of the last intervention: deletes what is beyond the step to go back to."""
        if not self.rows or self.rows[-1]["settled"]:
            return
        for step in steps_in(self._folder):
            if step > self.rows[-1]["back_to"]:
                folder = self._folder / str(step)
                try:
                    # The manifest goes first: without it this is no checkpoint any more.
                    (folder / MANIFEST).unlink(missing_ok=True)
                    paths.remove_tree(folder)
                except OSError as error:
                    raise DmfError(
                        f"{folder} cannot be deleted: {error.strerror}; the guard goes back and "
                        "expected to delete it"
                    ) from error
        self.rows[-1]["settled"] = True
        self._write()

    def stopped(self, step: int) -> str:
        """Why a run that starts from this step may not go on, "" where it may.

        It may not where the same rules have stopped it there before.
        """
        last = self.rows[-1] if self.rows else None
        if not last or last["action"] != "stop" or step > last["back_to"]:
            return ""
        if _rules(last["rules"]) != _rules(asdict(self._config)):
            return ""
        return (
            f"the guard has stopped this run: {describe(last)}; expected --allow_change with "
            f"another config.guard, such as action = {LAST!r} or a limit above "
            f"{self._config.limit}, or another curriculum in another directory"
        )

    def probe_alarm(self, probes: Sequence[Mapping[str, Any]], stage: Stage) -> str:
        """What is wrong with the last of the run's probes, "" if nothing is."""
        seen = _of_stage(probes, stage)
        return alarm(seen[-1], seen[0], self._config)

    def score_alarm(
        self, scores: Sequence[tuple[int, float]], name: str, stages: tuple[Stage, ...]
    ) -> str:
        """What is wrong with the last of the run's scores, "" if nothing is.

        scores: (step, value), lower is better. name: of the score.
        """
        if not scores or _is_fine(scores, stages, self._config.factor):
            return ""
        best = _best(_comparable(scores, stages))
        return f"{name} = {scores[-1][1]:.4g}, above {self._config.factor:g} x the best, {best:.4g}"

    def intervene(
        self,
        found: Diverged,
        stages: tuple[Stage, ...],
        probes: Sequence[Mapping[str, Any]],
        scores: Sequence[tuple[int, float]],
        kept: Collection[int],
        scheduled: Callable[[int], bool],
    ) -> None:
        """Decides what to do and writes it down; `settle` of the next start does it.

        A run that was asked to stop has checkpoints that are not scheduled. It does not go back
        to them, so that it goes on as it would have without the stop.

        Args:
            found: with a step above 0.
            probes, scores: of the whole run.
            kept: steps of checkpoints that are kept for good; it goes back no further than these.
            scheduled: whether a checkpoint is due after a step.
        """
        failing = stage_at(stages, found.step - 1)
        calm = self._calm_until(found, failing, stages, probes, scores)
        until = max([calm, *(n for n in kept if n < found.step)])
        until = min(until, found.step - 1)  # the state that has failed would fail again
        back = self._newest_good(until, lambda n: n in kept or scheduled(n))
        if back == 0:
            self._check_start(found)
        action = remedy(self._next(), failing)
        row = {
            "step": found.step,
            "stage": failing.name,
            "kind": failing.kind,
            "reason": found.reason,
            "back_to": back,
            "action": action,
            "rules": asdict(self._config),
            "settled": False,
        }
        self.rows.append(row)
        self._write()

    def _check_start(self, found: Diverged) -> None:
        """Raises DmfError where there is no way back to step 0, so that nothing is deleted."""
        start = self._folder / "0"
        try:
            if start.exists() or not self._drawn:
                verify(start)
        except DmfError as error:
            raise DmfError(f"{found}; the guard would go back to step 0, but {error}") from error

    def _newest_good(self, until: int, wanted: Callable[[int], bool]) -> int:
        """The newest wanted step up to `until` with a readable checkpoint, 0 without any."""
        for step in steps_in(self._folder):
            if step > until or not wanted(step):
                continue
            with suppress(DmfError):
                verify(self._folder / str(step))
                return step
        return 0

    def _calm_until(
        self,
        found: Diverged,
        failing: Stage,
        stages: tuple[Stage, ...],
        probes: Sequence[Mapping[str, Any]],
        scores: Sequence[tuple[int, float]],
    ) -> int:
        """The last step up to which the run was calm; at least the start of the failing stage.

        Calm: no value was above the square root of `factor`, half way to the alarm as a ratio.
        """
        half, seen = math.sqrt(self._config.factor), _of_stage(probes, failing)
        calm = list(itertools.takewhile(lambda p: not alarm(p, seen[0], self._config, half), seen))
        until = calm[-1]["step"] if calm else failing.first
        # Each score is compared with the best one up to it.
        fine = [
            (step, _is_fine(scores[: i + 1], stages, half)) for i, (step, _) in enumerate(scores)
        ]
        within = [(step, good) for step, good in fine if failing.first <= step <= found.step]
        bad = [step for step, good in within if not good and step > failing.first]
        if bad:
            before = max((step for step, _ in within if step < bad[0]), default=failing.first)
            until = min(until, before)
        return until

    def _next(self) -> str:
        """The action of the next intervention."""
        done = sum(row["action"] != "stop" for row in self.rows)
        return "stop" if done >= self._config.limit else self._config.action

    def _write(self) -> None:
        with paths.writing(self._path):
            rows = [records.sealed(row) for row in self.rows]
            paths.write(self._path, json.dumps(rows, indent=1) + "\n")


def describe(row: Mapping[str, Any]) -> str:
    """One intervention as a line."""
    kind = FORMER.get(row["kind"], row["kind"])
    where = f"{row['stage']} ({kind}), step {row['step']}"
    then = f"back to step {row['back_to']}, {DONE[row['action']]}"
    return printable(f"{where}: {row['reason']}; {then}")


def _rules(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a GuardConfig that a stop follows from; those of the probe may change."""
    return {name: value for name, value in stored.items() if name not in ("every_steps", "rows")}


def _of_stage(probes: Sequence[Mapping[str, Any]], stage: Stage) -> list[Mapping[str, Any]]:
    """The stage's probes on the same images as its last probe."""
    seen = [
        p for p in probes if p["stage"] == stage.index and stage.first < p["step"] <= stage.last
    ]
    return [
        p for p in seen if all(p.get(name) == seen[-1].get(name) for name in ("rows", "source"))
    ]


def _is_fine(scores: Sequence[tuple[int, float]], stages: tuple[Stage, ...], factor: float) -> bool:
    """Whether the last score is finite and at most `factor` times the best one to compare with."""
    value = scores[-1][1]
    return math.isfinite(value) and value <= factor * _best(_comparable(scores, stages))


def _comparable(
    scores: Sequence[tuple[int, float]], stages: tuple[Stage, ...]
) -> list[tuple[int, float]]:
    """The scores since the end of the last stage of plain flow matching.

    Within such a stage it is the last score alone.
    """
    step = scores[-1][0]
    ends = [min(s.last, step) for s in stages if KINDS[s.kind].flow_matching and s.first < step]
    return [score for score in scores if score[0] >= max(ends, default=0)]


def _best(scores: Sequence[tuple[int, float]]) -> float:
    return min((value for _, value in scores if math.isfinite(value)), default=math.inf)
