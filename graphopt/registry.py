"""Passes by name: registration, lookup, and what a pass declares about itself."""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, runtime_checkable

from graphopt.errors import PassError
from graphopt.ir import Graph

if TYPE_CHECKING:
    from graphopt.pipeline import Context

# "exact": the numbers stay what they are within float rounding. A number: results may differ by
# at most that, relative to the largest magnitude. "lossy": no promise.
Accuracy = Literal["exact", "lossy"] | float


@runtime_checkable
class Pass(Protocol):
    """Changes a graph in place and says whether it did. Its attributes are its options."""

    def run(self, graph: Graph, ctx: Context, /) -> bool: ...


PassFunction = Callable[[Graph, Any], bool]
Registrable = TypeVar("Registrable", bound="type[Any] | Callable[..., Any]")


@dataclass(frozen=True)
class Registration:
    """A registered pass: a frozen dataclass with ``run(graph, ctx)``, or a function."""

    name: str
    definition: Any
    accuracy: Accuracy

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.definition) or "").partition("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Its options with their defaults; ``dataclasses.MISSING`` for one that must be given."""
        if not isinstance(self.definition, type):
            return {}
        return {f.name: _default(f) for f in dataclasses.fields(self.definition) if f.init}

    def make(self, options: Mapping[str, Any] | None = None) -> BoundPass:
        """The pass with its options. Raises PassError if they do not fit."""
        if not isinstance(self.definition, type):
            if options:
                raise PassError(f"the pass '{self.name}' is a function and takes no options")
            return BoundPass(self.name, self.definition, self.accuracy, self.definition)
        try:
            instance = self.definition(**(options or {}))
        except TypeError as error:
            raise PassError(f"the pass '{self.name}' cannot be made: {error}") from error
        return BoundPass(self.name, instance.run, self.accuracy, instance)


@dataclass(frozen=True)
class BoundPass:
    """A pass that is ready to run."""

    name: str
    function: PassFunction
    accuracy: Accuracy
    source: Any

    @property
    def options(self) -> dict[str, Any]:
        """The options it was made with."""
        if not dataclasses.is_dataclass(self.source) or isinstance(self.source, type):
            return {}
        return {f.name: getattr(self.source, f.name) for f in dataclasses.fields(self.source)}


PassLike = str | type[Any] | Pass | PassFunction | BoundPass

_registered: dict[str, Registration] = {}


def register_pass(
    name: str, *, accuracy: Accuracy = "exact"
) -> Callable[[Registrable], Registrable]:
    """Decorator: register a pass under a name.

    Args:
        name: what users call it, such as ``fold-batch-norm``.
        accuracy: ``"exact"`` (the same numbers within float rounding), the largest error relative
            to the largest magnitude of an output, or ``"lossy"``.

    Raises:
        PassError: the name is taken, the definition is neither a frozen dataclass with
            ``run(graph, ctx)`` nor a function of ``(graph, ctx)``, or its module was imported
            under a wrong name.
    """
    valid = accuracy in ("exact", "lossy") if isinstance(accuracy, str) else accuracy > 0
    if not valid:
        raise PassError(
            f"the pass '{name}' declares the accuracy {accuracy!r}; it must be 'exact', 'lossy' "
            "or a positive number"
        )

    def register(definition: Registrable) -> Registrable:
        _check_definition(name, definition)
        _check_module(name, definition)
        known = _registered.get(name)
        if known is not None and not _is_redefinition(known.definition, definition):
            raise PassError(
                f"a pass named '{name}' is registered already, by {_where(known.definition)}; "
                "choose another name"
            )
        _registered[name] = Registration(name, definition, accuracy)
        return definition

    return register


def registered_passes() -> dict[str, Registration]:
    """All registered passes by name, sorted."""
    return dict(sorted(_registered.items()))


def find_pass(name: str) -> Registration:
    """The registered pass of a name. Raises PassError, suggesting the closest known name."""
    if name not in _registered:
        close = difflib.get_close_matches(name, _registered, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else "no registered name is close to it;"
        known = "" if close else f" registered are: {', '.join(sorted(_registered)) or 'none'}"
        raise PassError(f"unknown pass '{name}': {hint}{known}")
    return _registered[name]


def as_pass(given: PassLike) -> BoundPass:
    """A pass ready to run, from a registered name, an instance, a class or a function.

    Instances and functions need not be registered; without a registration they count as exact.

    Raises:
        PassError: the name is unknown, or the object is no pass.
    """
    if isinstance(given, BoundPass):
        return given
    if isinstance(given, str):
        return find_pass(given).make()
    if isinstance(given, type):
        registration = _registration_of(given)
        _check_definition(registration.name, given)
        return registration.make()
    if isinstance(given, Pass):
        registration = _registration_of(type(given))
        return BoundPass(registration.name, given.run, registration.accuracy, given)
    if callable(given):
        registration = _registration_of(given)
        return BoundPass(registration.name, given, registration.accuracy, given)
    raise PassError(
        f"{given!r} is no pass: expected a registered name, an object with run(graph, ctx), or a "
        "function of (graph, ctx)"
    )


def _registration_of(definition: Any) -> Registration:
    for registration in _registered.values():
        if registration.definition is definition:
            return registration
    name = getattr(definition, "__name__", type(definition).__name__)
    return Registration(name, definition, "exact")


def _check_definition(name: str, definition: Any) -> None:
    if isinstance(definition, type):
        parameters = getattr(definition, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen:
            raise PassError(
                f"the pass '{name}' must be a frozen dataclass; put @dataclass(frozen=True) "
                f"below @register_pass on {definition.__name__}"
            )
        function, expected = getattr(definition, "run", None), 3
    else:
        function, expected = definition, 2
    what = "run(self, graph, ctx)" if expected == 3 else "the arguments (graph, ctx)"
    if not callable(function) or not _takes(function, expected):
        raise PassError(f"the pass '{name}' must have {what}")


def _takes(function: Callable[..., Any], count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    return True


def _check_module(name: str, definition: Any) -> None:
    """A built-in pass that is imported as ``passes.x`` would exist twice."""
    module = definition.__module__
    folder = importlib.util.find_spec("graphopt.passes")
    assert folder is not None
    assert folder.submodule_search_locations is not None
    file = getattr(sys.modules.get(module), "__file__", None)
    locations = [Path(place).resolve() for place in folder.submodule_search_locations]
    inside = file is not None and Path(file).resolve().parent in locations
    proper = module == "graphopt.passes" or module.startswith("graphopt.passes.")
    borrowed = module == "passes" or module.startswith("passes.")
    if (inside or borrowed) and not proper:
        own = f"graphopt.passes.{Path(file).stem}" if file else f"graphopt.{module}"
        raise PassError(
            f"the pass '{name}' comes from the module '{module}', which is a second copy of "
            f"'{own}' under a wrong name; import that one instead"
        )


def _is_redefinition(old: Any, new: Any) -> bool:
    """Whether a definition is run again, as when a notebook's cell or a module is reloaded."""
    return (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _where(definition: Any) -> str:
    return f"{definition.__module__}.{definition.__qualname__}"


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default
