"""What a freeze schedule means for every single parameter: patterns, phases, and their checks (spec section 10).

Plain torch. `freeze_schedule.py` carries a plan out during training.
"""

from __future__ import annotations

import difflib
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from spear_lightning.errors import ConfigError

_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")
"""Name parts that torch.compile and activation checkpointing insert; patterns never mention them."""


@dataclass
class Phase:
    """One phase of a freeze schedule.

    A pattern is a dotted prefix of parameter names relative to the module's `components`, in which `*` stands
    for anything (fnmatch): `expert`, `vlm.encoders.moge`, `vlm.encoders.*`, `*.bias`. Each parameter obeys the
    most specific pattern that matches it: the one with the most characters besides wildcards.

    Attributes:
        name: Name of the phase, unique in its schedule.
        train: Pattern -> peak learning rate of what trains; `null` takes the optimizer recipe's.
        freeze: Patterns of what is frozen.
        start: Optimizer step (`trainer.global_step`) at which the phase begins; 0 for the first.
    """

    name: str
    train: dict[str, float | None]
    freeze: list[str] = field(default_factory=list)
    start: int = 0


@dataclass(frozen=True)
class Component:
    """Parameters that train together.

    Attributes:
        name: Unique name; the pattern that chose them, with `@STEP` added where they began to train later.
        peak_lr: Peak learning rate; None takes the optimizer recipe's.
        start_step: Optimizer step from which they have been training without a break.
        parameters: Their names, relative to the network, and themselves.
    """

    name: str
    peak_lr: float | None
    start_step: int
    parameters: dict[str, nn.Parameter]


@dataclass(frozen=True)
class _Rule:
    pattern: str
    trains: bool
    peak_lr: float | None = None

    @property
    def specificity(self) -> int:
        return len(self.pattern) - sum(self.pattern.count(wildcard) for wildcard in "*?")

    def matches(self, names: Sequence[str]) -> bool:
        return any(fnmatchcase(prefix, self.pattern) for name in names for prefix in prefixes(name))


class FreezePlan:
    """The decisions of all phases about all parameters, checked when it is built.

    Args:
        phases: The schedule.
        network: The network whose parameters the patterns name.
        unused: Names of parameters that no loss reaches: never trained, and no pattern needs to cover them.

    Raises:
        ConfigError: If the schedule contradicts itself or does not fit the network.
    """

    def __init__(self, phases: Sequence[Phase], network: nn.Module, unused: Sequence[str] = ()) -> None:
        self.phases = list(phases)
        _check_phases(self.phases)
        aliases = parameter_aliases(network)
        self._unused = frozenset(check_unused(network, unused))
        self._rules = [_decide(phase, aliases, self._unused) for phase in self.phases]
        self._starts = self._training_starts()

    def _training_starts(self) -> list[dict[str, int]]:
        """Per phase: parameter name -> start of the first of the phases up to this in which it trains unbroken."""
        starts: list[dict[str, int]] = []
        for phase, rules in zip(self.phases, self._rules, strict=True):
            before = starts[-1] if starts else {}
            starts.append({name: before.get(name, phase.start) for name, rule in rules.items() if rule.trains})
        return starts

    def phase_at(self, step: int) -> int:
        """Return the index of the phase in force when the optimizer has taken `step` steps."""
        return max(index for index, phase in enumerate(self.phases) if phase.start <= step)

    def index_of(self, name: str) -> int | None:
        """Return the index of the phase with this name, None if there is none."""
        return next((index for index, phase in enumerate(self.phases) if phase.name == name), None)

    def apply(self, network: nn.Module, index: int) -> None:
        """Set `requires_grad` of all parameters as phase `index` wants it; frozen ones lose their gradient."""
        trained = self._starts[index]
        for name, parameter in named_parameters(network):
            parameter.requires_grad_(name in trained)
            if name not in trained:
                parameter.grad = None

    def components(self, network: nn.Module, index: int) -> list[Component]:
        """Return what trains in phase `index`, in an order that depends on the plan and the network alone."""
        rules, starts = self._rules[index], self._starts[index]
        order = list(self.phases[index].train)
        members: dict[tuple[int, int], dict[str, nn.Parameter]] = {}
        for name, parameter in named_parameters(network):
            if name in starts:
                key = (starts[name], order.index(rules[name].pattern))
                members.setdefault(key, {})[name] = parameter
        return [
            Component(
                name=order[position] if start == 0 else f"{order[position]}@{start}",
                peak_lr=self.phases[index].train[order[position]],
                start_step=start,
                parameters=parameters,
            )
            for (start, position), parameters in sorted(members.items(), key=lambda item: item[0])
        ]


def named_parameters(network: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield each parameter once with its name, without the name parts that wrappers insert."""
    for name, parameter in network.named_parameters():
        yield plain_name(name), parameter


def plain_name(name: str) -> str:
    """Return a parameter or module name without the name parts that wrappers insert."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def parameter_aliases(network: nn.Module) -> dict[str, list[str]]:
    """Return parameter name -> all names the parameter has (more than one where weights are tied)."""
    names = {id(parameter): name for name, parameter in named_parameters(network)}
    aliases: dict[str, list[str]] = {name: [] for name in names.values()}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        aliases[names[id(parameter)]].append(plain_name(name))
    return aliases


def check_unused(network: nn.Module, unused: Sequence[str]) -> set[str]:
    """Return the first names of parameters listed as unused, and of those that cannot train: integers.

    Raises:
        ConfigError: If one does not exist.
    """
    aliases = parameter_aliases(network)
    known = {alias: name for name, names in aliases.items() for alias in names}
    wrong = [name for name in unused if name not in known]
    if wrong:
        raise ConfigError("Parameters listed as unused do not exist", where="unused_parameters()", found=wrong[:5])
    integers = {name for name, parameter in named_parameters(network) if not parameter.is_floating_point()}
    return {known[name] for name in unused} | integers


def prefixes(name: str) -> list[str]:
    """Return the dotted prefixes of a name: `a.b.c` -> `a`, `a.b`, `a.b.c`."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _check_phases(phases: Sequence[Phase]) -> None:
    if not phases:
        raise ConfigError("The freeze schedule has no phase", where="phases", remedy="give at least one")
    doubled = [name for name, count in Counter(phase.name for phase in phases).items() if count > 1]
    if doubled:
        raise ConfigError("Two phases of the freeze schedule have the same name", where="phases", found=doubled)
    starts = [phase.start for phase in phases]
    if starts[0] != 0 or any(later <= earlier for earlier, later in itertools.pairwise(starts)):
        raise ConfigError(
            "The phases of the freeze schedule are not in order",
            where="phases: start",
            found=starts,
            expected="0 for the first phase, then strictly increasing steps",
        )
    for phase in phases:
        _check_phase(phase)


def _check_phase(phase: Phase) -> None:
    where = f"freeze schedule, phase `{phase.name}`"
    both = sorted(set(phase.train) & set(phase.freeze))
    if both:
        raise ConfigError("A pattern is both trained and frozen", where=where, found=both)
    doubled = [pattern for pattern, count in Counter(phase.freeze).items() if count > 1]
    if doubled:
        raise ConfigError("A pattern is listed twice", where=where, found=doubled)
    rates = {pattern: rate for pattern, rate in phase.train.items() if rate is not None and not rate > 0}
    if rates:
        raise ConfigError(
            "A learning rate is not positive",
            where=where,
            found=rates,
            remedy="to freeze a part, list it in `freeze`",
        )


def _decide(phase: Phase, aliases: dict[str, list[str]], unused: frozenset[str]) -> dict[str, _Rule]:
    """Return parameter name -> the rule it obeys, for all parameters but the unused."""
    where = f"freeze schedule, phase `{phase.name}`"
    rules = [_Rule(pattern, True, rate) for pattern, rate in phase.train.items()]
    rules += [_Rule(pattern, False) for pattern in phase.freeze]
    matching = {name: [rule for rule in rules if rule.matches(names)] for name, names in aliases.items()}
    used = {rule.pattern for found in matching.values() for rule in found}
    for rule in rules:
        if rule.pattern not in used:
            raise _no_match(rule.pattern, aliases, where)
    uncovered = [name for name, found in matching.items() if not found and name not in unused]
    if uncovered:
        raise ConfigError(
            "Parameters are neither trained nor frozen",
            where=where,
            found=f"{len(uncovered)} parameters: {_shortened(uncovered)}",
            expected="a pattern for every parameter",
            remedy="add the module to `train` or to `freeze`",
        )
    decided = {name: _most_specific(found, name, where) for name, found in matching.items() if name not in unused}
    if not any(rule.trains for rule in decided.values()):
        raise ConfigError("A phase trains nothing", where=where, remedy="add a module to `train`")
    return decided


def _most_specific(rules: list[_Rule], name: str, where: str) -> _Rule:
    most = max(rule.specificity for rule in rules)
    best = [rule for rule in rules if rule.specificity == most]
    if len(best) > 1:
        raise ConfigError(
            "Two equally specific patterns match the same parameter",
            where=where,
            found=f"{[rule.pattern for rule in best]} for {name}",
            remedy="make one of them longer",
        )
    return best[0]


def _no_match(pattern: str, aliases: dict[str, list[str]], where: str) -> ConfigError:
    modules = {prefix for names in aliases.values() for name in names for prefix in prefixes(name)}
    near = difflib.get_close_matches(pattern, sorted(modules), n=3, cutoff=0.5)
    top = sorted({name.split(".")[0] for name in modules})
    return ConfigError(
        f"The pattern `{pattern}` matches no parameter",
        where=where,
        expected=f"nearest names: {', '.join(near)}" if near else f"names that begin with {', '.join(top)}",
    )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
