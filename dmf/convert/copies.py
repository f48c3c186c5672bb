"""Where the weights stand in a file: the copies of a network, and which of them is taken.

Trainers keep the wanted names behind a prefix or in nested dicts, often more than once. A kind
knows one tensor that each of its networks has, its mark. The words before that name are a place,
and each place is a copy. An average is preferred. Some trainers keep it as a list in the order of
the parameters, so its names are those of another copy.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from dmf.errors import DmfError, printable
from dmf.storage.readers.tree import Inert, Tensor, flatten, strip_prefix

# Words that compiled, checkpointed and sharded modules put into names.
WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|_fpw_module)\."
)
AVERAGE = re.compile(r"(?i)(^|_)(ema|avg|averaged?|swa|shadow|teacher)\d*(_|$)")
RAW = {"online_model", "online", "collected_params", "student"}  # beside an average
# States of optimisers, and the branch of t - r that our own exports add to a layout.
NO_COPY = {"opt", "optim", "optimizer", "opt_state", "optimizer_state", "optimizer_states"}
NO_COPY |= {"interval"}


class Copies(NamedTuple):
    """How a kind's copies are found and named."""

    mark: str  # pattern of the name of a tensor that every network of the kind has
    names: tuple[tuple[str, str], ...]  # (copy, word of its place), the default first
    bare: str  # name of a copy without words before it
    fixed: tuple[str, ...] = ()  # tensors that are no parameters; a list of averages may lack them

    def select(
        self, tree: Any, which: str, unwrap: Callable[[Inert], dict[str, Tensor]] | None = None
    ) -> tuple[dict[str, Tensor], str]:
        """(tensors by name, name of the copy), and a line where there was a choice.

        which: the name of a copy or its place, a dotted path; "" takes the best one.
        unwrap: makes tensors of a pickled module, in the place of its state dict.
        Raises DmfError where `which` is not there, and where a list of averages does not fit.
        """
        tensors: dict[str, Tensor] = {}
        for name, tensor in flatten(tree).items():
            if tensors.setdefault(clean(name), tensor) is not tensor:
                raise DmfError(f"tensor {clean(name)} is there twice: expected each name once")
        places, lists = self._places(tensors)
        held = self._held(places, lists, tensors)
        copy = _picked(held, which)
        place = held[copy]
        within = _within(tensors, place, [*places, *lists])
        if place in lists:
            base = next(p for p in held.values() if p not in lists)
            within = _listed(self, _within(tensors, base, [*places, *lists]), within, place)
        elif unwrap and (module := _module_at(tree, place)):
            within = unwrap(module)
        _say(copy, place, held, within, tensors)
        return strip_prefix(within), copy

    def _places(self, names: Mapping[str, Any]) -> tuple[list[str], list[str]]:
        """(places of a copy, those of a list of averages), in the order of the file."""
        mark = re.compile(rf"(?:(.*?)\.)??(?:{self.mark})")
        found = dict.fromkeys(m[1] or "" for name in names if (m := mark.fullmatch(name)))
        places = [place for place in found if not NO_COPY & {*place.split(".")}]
        if not places:  # the kind will say what is missing
            keys = "|".join(map(re.escape, (word for _, word in self.names)))
            known = [m[1] for n in names if (m := re.match(rf"((?:.*?\.)?(?:{keys}))\.", n))]
            return list(dict.fromkeys(known if keys else [])) or [""], []
        rows = dict.fromkeys(n.rpartition(".")[0] for n in names if n.rpartition(".")[2].isdigit())
        inside = tuple(f"{place}." for place in places if place)
        lists = [row for row in rows if _average(row, names) and not row.startswith(inside)]
        return places, [row for row in lists if not NO_COPY & {*row.split(".")}]

    def _held(
        self, places: Sequence[str], lists: Sequence[str], names: Mapping[str, Any]
    ) -> dict[str, str]:
        """{name of a copy: its place}, the best first."""
        known, every = [name for name, _ in self.names], [*places, *lists]
        if len(every) == 1 and len(known) < 2:
            return {self.bare: every[0]}
        labels = [self._label(place) for place in every]
        count = Counter(labels)
        own = [x if count[x] == 1 else place for x, place in zip(labels, every, strict=True)]

        def rank(row: tuple[str, str]) -> tuple[bool, int, int]:
            order = known.index(row[0]) if row[0] in known else len(known)
            return not _average(row[1], names), order, row[1].count(".")

        return dict(sorted(zip(own, every, strict=True), key=rank))

    def _label(self, place: str) -> str:
        words = _words(place)
        hits = [name for name, word in self.names if word in words]
        return hits[0] if len(hits) == 1 else ".".join(words) if words else self.bare


def clean(name: str) -> str:
    """A name without the words of wrappers."""
    return WRAPPED.sub("", name)


def dropped(
    tensors: Mapping[str, Tensor], patterns: Sequence[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """(the tensors that stay, names of those that match a pattern).

    Raises DmfError for a pattern that matches no name.
    """
    gone: dict[str, None] = {}
    for pattern in patterns:
        matched = [name for name in tensors if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            some = ", ".join(list(tensors)[:3])
            raise DmfError(
                f"--drop={pattern} matches none of {len(tensors)} tensors (the first are {some}): "
                "expected a name or a pattern such as 'loss.*'"
            )
        gone |= dict.fromkeys(matched)
    if gone:
        print(printable(f"dropped   {len(gone)} tensors by --drop={','.join(patterns)}"))
    return {name: x for name, x in tensors.items() if name not in gone}, list(gone)


def _words(place: str) -> list[str]:
    return [word for word in place.split(".") if word not in ("", "module")]


def _average(place: str, names: Mapping[str, Any]) -> bool:
    """Whether a place says that it is an average. PyTorch's AveragedModel has a counter beside."""
    words, outer = _words(place), place.rpartition(".")[0]
    counter = f"{outer}.n_averaged" if outer else "n_averaged"
    return not RAW & {*words} and (any(map(AVERAGE.search, words)) or counter in names)


def _picked(held: Mapping[str, str], which: str) -> str:
    """The name of the copy that `which` means: its name, or its place."""
    if not which:
        return next(iter(held))
    path = _words(clean(f"{which}."))
    for name, place in held.items():
        if which == name or path and path == _words(place):
            return name
    raise DmfError(f"--copy={which} is not in this file: expected {' or '.join(held)}")


def _within(tensors: Mapping[str, Tensor], place: str, places: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a place by what follows it, without those of a place inside it."""
    start = f"{place}." if place else ""
    inside = tuple(f"{p}." for p in places if p != place and p.startswith(start))
    return {
        name.removeprefix(start): x
        for name, x in tensors.items()
        if name.startswith(start) and not name.startswith(inside)
    }


def _listed(
    kind: Copies, base: Mapping[str, Tensor], row: Mapping[str, Tensor], place: str
) -> dict[str, Tensor]:
    """A copy with its parameters from a list, matched by their order. Raises DmfError."""
    found = [row[key] for i in range(len(row)) if (key := str(i)) in row]
    names = list(base) if len(found) == len(base) else [n for n in base if n not in kind.fixed]
    if len(found) != len(names):
        raise DmfError(
            f"{place} holds {len(found)} tensors: "
            f"expected {len(names)}, one for each parameter of the model"
        )
    for i, (name, tensor) in enumerate(zip(names, found, strict=True)):
        if tuple(tensor.shape) != tuple(base[name].shape):
            raise DmfError(
                f"{place}[{i}] has shape {list(tensor.shape)}: "
                f"expected {list(base[name].shape)}, the shape of {name}"
            )
    return {**base, **dict(zip(names, found, strict=True))}


def _module_at(tree: Any, place: str) -> Inert | None:
    """The outermost pickled module on the way to a place."""
    for word in [*place.split("."), ""]:
        if isinstance(tree, Inert):
            return tree
        tree = tree.get(word) if isinstance(tree, Mapping) else None
    return None


def _say(
    copy: str,
    place: str,
    held: Mapping[str, str],
    taken: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
) -> None:
    """One line on what was taken and left, where a file holds more than one flat dictionary."""
    starts = tuple(f"{p}." if p else "" for p in held.values())
    rest = [name for name in tensors if not name.startswith(starts)]
    others = [name for name in held if name != copy]
    if place or others or rest:
        line = f"source    copy {copy!r}, {len(taken)} tensors" + (f" at {place}" if place else "")
        line += f"; other copies: {', '.join(others)}" if others else ""
        line += f"; {len(rest)} tensors elsewhere, such as {rest[0]}" if rest else ""
        print(printable(line))
