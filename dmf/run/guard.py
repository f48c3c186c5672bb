"""The guard: notices a run that diverges, goes back to where it was healthy and goes on in the way that the config names.

Discrete MeanFlow has a ceiling: with d too small its residual is rounding and noise, and a one-step FID of 14.5 became 294
(arXiv 2604.08837). Whether a run has met it is seen in the probes of `dmf.run.probe` and in its scores:

    a value that is not finite                  of a step, a probe or a score
    residual_border, residual_median            more than `factor` times that of the first probe of the stage, or of the part of
                                                it that an intervention has left
    change_ulps                                 below `ulps`, in a discrete stage: u and u' are one number to the compute dtype
    the main score at the first number of steps more than `factor` times the best since the last stage of plain flow matching,
                                                which takes a generator of one step apart

A residual that grows by less than `factor` in each of several stages is seen by the scores alone.

An intervention is a row of guard.json. Stages are a function of the config and of these rows, and what is on disk beyond the
step to go back to is deleted; so it is one more start of the run, and one that was killed in the midst of it does the rest.
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
from dmf.errors import DmfError, short
from dmf.method.curriculum import Stage, rho_at, stage_at
from dmf.method.objectives import KINDS, LAST
from dmf.storage import paths
from dmf.storage.manifest import MANIFEST, verify

FILE = "guard.json"
WORSE = (
    "residual_border",
    "residual_median",
)  # a mean over pairs is that of the few that end near t = 1
DONE = {
    "stop": "where the run ends",
    LAST: "the discrete stages left are jvp stages now",
    "halve": "d falls half as far from the last good one in the discrete stages left",
    "floor": "d falls no further in the discrete stages left",
    "rate": "the learning rate is half of what it was",
}


class Diverged(DmfError):
    """Training is no longer that of a healthy run: after `step` steps, for `reason`."""

    def __init__(self, step: int, reason: str, text: str = ""):
        super().__init__(text or f"step {step}: {reason}")
        self.step, self.reason = step, reason


def alarm(
    probe: Mapping[str, Any], start: Mapping[str, Any], config: GuardConfig, factor: float = 0.0
) -> str:
    """Why a probe of a stage is not that of a healthy run, "" where it is. start: the stage's first probe.

    factor: another one than the config's.
    """
    factor = factor or config.factor
    for name, value in probe.items():
        if isinstance(value, float) and not math.isfinite(value):
            return f"{name} = {value}, expected a finite value"
    for name in WORSE:
        if probe[name] > factor * start[name]:
            return f"{name} = {probe[name]:.4g}, above {factor:g} x the stage's first, {start[name]:.4g}"
    if "change_ulps" in probe and probe["change_ulps"] < config.ulps:
        return f"|u - u'| / |u| = {probe['change_ulps']:.3g} ulps of the compute dtype, below {config.ulps:g}"
    return ""


def remedy(action: str, failing: Stage) -> str:
    """What can be done about this stage: where no finite difference is to blame, or d is 1 already, the rate is lowered."""
    if action in (LAST, "halve", "floor") and not KINDS[failing.kind].steps_back:
        return "rate"
    return "rate" if action in ("halve", "floor") and failing.rho >= 1 else action


def applied(stages: tuple[Stage, ...], row: Mapping[str, Any]) -> tuple[Stage, ...]:
    """The stages after one intervention: from row["back_to"] on as row["action"] says, which begins a part of a stage there."""
    back, action, failing = row["back_to"], row["action"], stage_at(stages, row["step"] - 1)
    done = [replace(s, steps=min(s.last, back) - s.first) for s in stages if s.first < back]
    good = _good_rho(stages, failing, back)
    return (*done, *(_changed(_rest(s, back), action, good) for s in stages if s.last > back))


def _rest(stage: Stage, back: int) -> Stage:
    """The part of a stage from step `back` on."""
    first = max(stage.first, back)
    return replace(stage, first=first, steps=stage.last - first, rho=rho_at(stage, first))


def _good_rho(stages: tuple[Stage, ...], failing: Stage, back: int) -> float:
    """The rho that was still good: of the step to go back to in a smooth schedule, else the next larger one before, or 1."""
    if failing.fall != 1:
        return rho_at(failing, max(failing.first, back))
    before = [s.rho for s in stages if s.first < failing.first and KINDS[s.kind].steps_back]
    return min((rho for rho in before if rho > failing.rho), default=1.0)


def _changed(stage: Stage, action: str, good: float) -> Stage:
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
    """Raises Diverged where a metric of the step that led to `step` is not finite. leaves: gives the names of all weights."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        leaf = int(values["nonfinite_leaf"])
        where = f", first in the gradient of {leaves()[leaf]}" if leaf >= 0 else ""
        reason = f"{bad[0]} = {values[bad[0]]}{where}"
        text = f"step {step} ({stage.name}, {stage.kind}): {reason}; expected finite values. That state is not saved"
        raise Diverged(step, reason, text)


def read(path: Path) -> list[dict[str, Any]]:
    """The interventions on disk. Raises DmfError where the file is none of them."""
    try:
        rows = json.loads(path.read_text())
        if not isinstance(rows, list) or not all(
            isinstance(row.get("back_to"), int) for row in rows
        ):
            raise ValueError("no list of interventions")
        return rows
    except FileNotFoundError:
        return []
    except (OSError, ValueError, AttributeError) as error:
        raise DmfError(
            f"{path} cannot be read: {short(error)}; expected what dmf wrote there"
        ) from error


def begins_again(path: Path) -> bool:
    """Whether the last intervention went back to the fresh weights of step 0: these are drawn again, and on disk nowhere."""
    rows = read(path)
    return bool(rows) and rows[-1]["back_to"] == 0


class Guard:
    """The interventions of one run, and what calls for the next."""

    def __init__(
        self, path: Path, checkpoints: Path, config: GuardConfig, fresh: bool, drawn: bool = True
    ):
        """path: the file of the interventions; checkpoints: the folder of the step folders; fresh: there is no run yet.

        drawn: the run starts from fresh weights, so that it may begin again without a checkpoint of step 0.
        """
        self._path, self._folder, self._config, self._drawn = path, checkpoints, config, drawn
        self.rows: list[dict[str, Any]] = [] if fresh else read(path)
        self.active = config.action != "off"

    def stages(self, stages: tuple[Stage, ...]) -> tuple[Stage, ...]:
        """The stages of the config as the interventions have left them."""
        return functools.reduce(applied, self.rows, stages)

    def told(self) -> str:
        """The interventions, as all processes of a run have to see them."""
        return json.dumps([row | {"settled": True} for row in self.rows])

    def settle(self) -> None:
        """Does the rest of the last intervention: what is beyond the step to go back to is deleted."""
        if not self.rows or self.rows[-1]["settled"]:
            return
        for folder in self._folder.glob("[0-9]*"):
            if folder.name.isdecimal() and int(folder.name) > self.rows[-1]["back_to"]:
                try:
                    (folder / MANIFEST).unlink(
                        missing_ok=True
                    )  # first: from now on it is not a checkpoint
                    paths.remove_tree(folder)
                except OSError as error:
                    raise DmfError(
                        f"{folder} cannot be deleted: {error.strerror}; expected to, to go back"
                    ) from error
        self.rows[-1]["settled"] = True
        self._write()

    def stopped(self, step: int) -> str:
        """Why a run that starts from this step may not go on, "" where it may: it was stopped there by these very rules."""
        last = self.rows[-1] if self.rows else None
        if (
            not last
            or last["action"] != "stop"
            or step > last["back_to"]
            or _rules(last["rules"]) != _rules(asdict(self._config))
        ):
            return ""
        return (
            f"the guard has stopped this run: {describe(last)}; expected --allow_change with another config.guard, such as "
            f"action = 'jvp' or a limit above {self._config.limit}, or another curriculum in another directory"
        )

    def probe_alarm(self, probes: Sequence[Mapping[str, Any]], stage: Stage) -> str:
        """What is wrong with the last of the run's probes, "" if nothing is."""
        seen = _of_stage(probes, stage)
        return alarm(seen[-1], seen[0], self._config)

    def score_alarm(
        self, scores: Sequence[tuple[int, float]], name: str, stages: tuple[Stage, ...]
    ) -> str:
        """What is wrong with the last of the run's scores, (step, value), "" if nothing is. Lower is better."""
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
        """Decides what to do, and writes it down; `settle` of the next start does it. found.step: above 0.

        kept: steps of checkpoints that are kept for good, which is as far as it goes back. scheduled: whether a checkpoint
        is due after a step; a run that was asked to stop has others, and goes back no less far than one that was not.
        """
        failing = stage_at(stages, found.step - 1)
        calm = self._calm_until(found, failing, stages, probes, scores)
        until = min(
            max([calm, *(n for n in kept if n < found.step)]), found.step - 1
        )  # what has failed fails again
        back = self._newest_good(until, lambda n: n in kept or scheduled(n))
        if back == 0:
            self._check_start(found)
        action = remedy(self._next(), failing)
        what = {
            "step": found.step,
            "stage": failing.name,
            "kind": failing.kind,
            "reason": found.reason,
        }
        self.rows.append(
            {
                **what,
                "back_to": back,
                "action": action,
                "rules": asdict(self._config),
                "settled": False,
            }
        )
        self._write()

    def _check_start(self, found: Diverged) -> None:
        """Raises DmfError where there is no way back to step 0: then no later checkpoint may be deleted."""
        start = self._folder / "0"
        try:
            if start.exists() or not self._drawn:
                verify(start)
        except DmfError as error:
            raise DmfError(f"{found}; the guard would go back to step 0, but {error}") from error

    def _newest_good(self, until: int, wanted: Callable[[int], bool]) -> int:
        """The newest wanted step up to `until` whose checkpoint can be read, 0 where there is none."""
        steps = [
            int(p.name)
            for p in self._folder.glob("[0-9]*")
            if p.name.isdecimal() and int(p.name) <= until
        ]
        for step in sorted(filter(wanted, steps), reverse=True):
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
        """The last step by which no value was worse than half way, as a ratio, to the alarm; at least the stage's start."""
        half, seen = math.sqrt(self._config.factor), _of_stage(probes, failing)
        calm = list(itertools.takewhile(lambda p: not alarm(p, seen[0], self._config, half), seen))
        until = calm[-1]["step"] if calm else failing.first
        fine = [
            (step, _is_fine(scores[: i + 1], stages, half)) for i, (step, _) in enumerate(scores)
        ]  # the best by then
        within = [(step, good) for step, good in fine if failing.first <= step <= found.step]
        bad = [step for step, good in within if not good and step > failing.first]
        if bad:
            until = min(
                until, max((step for step, _ in within if step < bad[0]), default=failing.first)
            )
        return until

    def _next(self) -> str:
        """The action of the next intervention."""
        done = sum(row["action"] != "stop" for row in self.rows)
        return "stop" if done >= self._config.limit else self._config.action

    def _write(self) -> None:
        with paths.writing(self._path):
            paths.write(self._path, json.dumps(self.rows, indent=1) + "\n", ".json.tmp")


def describe(row: Mapping[str, Any]) -> str:
    """One intervention as a line."""
    where = f"{row['stage']} ({row['kind']}), step {row['step']}"
    return f"{where}: {row['reason']}; back to step {row['back_to']}, {DONE[row['action']]}"


def _rules(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What a stop follows from: how often a run is probed, and on how many images, may change at any time."""
    return {name: value for name, value in stored.items() if name not in ("every_steps", "rows")}


def _of_stage(probes: Sequence[Mapping[str, Any]], stage: Stage) -> list[Mapping[str, Any]]:
    """The stage's probes of the same images as the last of them."""
    seen = [
        p for p in probes if p["stage"] == stage.index and stage.first < p["step"] <= stage.last
    ]
    return [
        p for p in seen if all(p.get(name) == seen[-1].get(name) for name in ("rows", "source"))
    ]


def _is_fine(scores: Sequence[tuple[int, float]], stages: tuple[Stage, ...], factor: float) -> bool:
    """Whether the last score is finite and at most so many times the best that it can be held against."""
    value = scores[-1][1]
    return math.isfinite(value) and value <= factor * _best(_comparable(scores, stages))


def _comparable(
    scores: Sequence[tuple[int, float]], stages: tuple[Stage, ...]
) -> list[tuple[int, float]]:
    """The scores from the end on of the last stage of plain flow matching; within such a stage the last score alone."""
    step = scores[-1][0]
    ends = [min(s.last, step) for s in stages if KINDS[s.kind].flow_matching and s.first < step]
    return [score for score in scores if score[0] >= max(ends, default=0)]


def _best(scores: Sequence[tuple[int, float]]) -> float:
    return min((value for _, value in scores if math.isfinite(value)), default=math.inf)
