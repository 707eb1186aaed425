"""The rules of naming, read off every public signature: what a name means in one place it means everywhere."""

import collections
import dataclasses
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable

import jax
import pytest

from tests.library_modules import is_public, module_names

GREEK = set(
    [
        "alpha",
        "beta",
        "gamma",
        "delta",
        "epsilon",
        "zeta",
        "eta",
        "theta",
        "iota",
        "kappa",
        "lam",
        "lambda_",
        "mu",
        "nu",
        "xi",
        "pi",
        "rho",
        "sigma",
        "tau",
        "phi",
        "chi",
        "psi",
        "omega",
    ]
)
PREPOSITIONS = set(["at", "by", "for", "from", "in", "of", "on", "per", "to", "under", "with"])
# What goes by another name elsewhere, and that name.
SYNONYMS = {
    "apply": "apply_fn",
    "backend": "implementation",
    "loss": "loss_fn",
    "microbatches": "num_microbatches",
    "rng": "key",
    "seed": "key",
    "tol": "tolerance",
}
# Strings that are free: names, paths, types. Every other string is an option, and its annotation lists the values.
FREE_STRINGS = re.compile(r"name|path|pattern|source|axis_name|(\w+_)?dtype")
# What another library or a command fixes.
INITIALIZERS = {"haar_orthogonal"}  # (key, shape, dtype), as JAX calls an initializer
OPTAX_NAMES = {"b1", "b2", "eps", "mu_dtype"}
FLAX_NAMES = {"channels", "features", "groups"}  # sizes of layers
COMMAND_NAMES = {"GPTConfig", "UNet3D"}  # their sizes are options of the experiments' commands: --layers, --stages


@dataclasses.dataclass(frozen=True)
class Signature:
    where: str
    name: str
    kind: str  # function, config (a class that users construct), record (a named tuple: state or result)
    parameters: tuple[inspect.Parameter, ...]

    def options(self):
        return [p for p in self.parameters if p.kind is not p.VAR_POSITIONAL and not p.name.startswith("_")]


def signatures():
    seen = set()
    for module_name, _ in module_names():
        if not is_public(module_name) or module_name == "jaxlib_methods.typing":
            continue
        module = importlib.import_module(module_name)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if not callable(value) or id(value) in seen:
                continue
            seen.add(id(value))
            where = f"{module_name.removeprefix('jaxlib_methods.')}.{name}"
            if not inspect.isclass(value):
                yield Signature(where, name, "function", _parameters(value))
                continue
            record = issubclass(value, tuple | Exception) or name.endswith(("State", "Result"))
            yield Signature(where, name, "record" if record else "config", _parameters(value))
            for method, function in vars(value).items():
                if inspect.isfunction(function) and (not method.startswith("_") or method == "__call__"):
                    yield Signature(f"{where}.{method}", method, "function", _parameters(function))


def _parameters(function):
    own = vars(function).get("__init__") if inspect.isclass(function) else None  # a metaclass would hide it
    parameters = inspect.signature(own or function).parameters.values()
    return tuple(p for p in parameters if p.name != "self")


SIGNATURES = list(signatures())
FUNCTIONS = [s for s in SIGNATURES if s.kind == "function"]
ARGUMENTS = [s for s in SIGNATURES if s.kind != "record"]


def members(annotation):
    """The types of a union, one by one."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [m for part in typing.get_args(annotation) for m in members(part)]
    return [annotation]


def offenders(signatures, wrong):
    found = [f"{s.where}({p.name})" for s in signatures for p in s.options() if wrong(s, p)]
    assert not found, f"{len(found)}: " + ", ".join(found)


def positional(p):
    return p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)


def test_a_key_is_given_by_keyword():
    offenders(FUNCTIONS, lambda s, p: p.name == "key" and positional(p) and s.name not in INITIALIZERS)


def test_no_argument_is_a_greek_letter():
    offenders(ARGUMENTS, lambda s, p: bool(GREEK & set(p.name.split("_"))) and p.name not in OPTAX_NAMES)


def test_a_switch_is_given_by_keyword():
    offenders(FUNCTIONS, lambda s, p: p.annotation is bool and positional(p))


def test_no_argument_swallows_what_it_does_not_know():
    untyped = (inspect.Parameter.empty, typing.Any)
    passes_a_call_on = lambda s: any(p.kind is p.VAR_POSITIONAL for p in s.parameters)
    offenders(
        [s for s in ARGUMENTS if not passes_a_call_on(s)],
        lambda s, p: p.kind is p.VAR_KEYWORD and p.annotation in untyped,
    )


def test_an_axis_is_a_number_and_an_axis_name_is_a_string():
    offenders(ARGUMENTS, lambda s, p: p.name in ("axis", "axes") and str in members(p.annotation))
    offenders(ARGUMENTS, lambda s, p: p.name == "axis_name" and str not in members(p.annotation))


def test_a_count_is_num_something():
    # A span of time keeps optax's words, as in warmup_steps.
    plural = re.compile(r"(?!num_|max_)(?!.*_(steps|rounds|bytes)$)(?!bits$|radius$)\w+[^s]s$")
    whole = ({int}, {int, type(None)})
    own = [s for s in ARGUMENTS if s.where.split(".")[1] not in COMMAND_NAMES]
    offenders(
        own,
        lambda s, p: set(members(p.annotation)) in whole and bool(plural.match(p.name)) and p.name not in FLAX_NAMES,
    )


def test_no_function_is_named_by_a_preposition():
    found = [s.where for s in FUNCTIONS if s.name.split("_")[0] in PREPOSITIONS]
    assert not found, ", ".join(found)


def test_a_string_option_lists_its_values():
    # NumPy's ArrayLike has strings among its members, and does not hide them before Python 3.12.
    is_string = lambda annotation: str in members(annotation) and "numpy" not in str(annotation)
    offenders(ARGUMENTS, lambda s, p: is_string(p.annotation) and not FREE_STRINGS.fullmatch(p.name))


def test_one_thing_has_one_name():
    offenders(ARGUMENTS, lambda s, p: p.name in SYNONYMS)


def test_one_name_is_one_thing():
    """A name is a switch, a string, a function or a value, and no two places share nothing of it."""
    kinds = collections.defaultdict(dict)
    for s in ARGUMENTS:
        for p in s.options() if s.name not in COMMAND_NAMES else ():
            if found := _kinds(p.annotation):
                kinds[p.name].setdefault(found, s.where)
    found = [
        f"{name}: " + "; ".join(f"{' or '.join(sorted(kind))} in {place}" for kind, place in places.items())
        for name, places in sorted(kinds.items())
        if any(not a & b for a in places for b in places)
    ]
    assert not found, f"{len(found)}:\n" + "\n".join(found)


def _kinds(annotation):
    parts = members(annotation)
    if jax.Array in parts:  # ArrayLike, of which Python's bool is one
        parts = [part for part in parts if part is not bool]
    found = {_kind(part) for part in parts if part is not type(None)}
    return frozenset() if None in found else frozenset(found)


def _kind(annotation):
    if annotation is bool:
        return "switch"
    if annotation is str or typing.get_origin(annotation) is typing.Literal:
        return "string"
    if typing.get_origin(annotation) is Callable or annotation is Callable:
        return "function"
    return "value" if annotation in (int, float) or "Array" in str(annotation) else None


def test_every_argument_has_a_type():
    offenders(ARGUMENTS, lambda s, p: p.annotation is inspect.Parameter.empty)


@pytest.mark.parametrize("word", ["Options", "Params", "Settings"])
def test_options_are_configs(word):
    found = [s.where for s in SIGNATURES if s.kind == "config" and s.name.endswith(word)]
    assert not found, ", ".join(found)


def test_few_arguments_go_by_position():
    """Arrays first, the rest by keyword; constructors of optax's kind keep optax's order."""
    found = [
        f"{s.where} ({n})"
        for s in FUNCTIONS
        if (n := sum(positional(p) for p in s.parameters)) > 5 and s.parameters[0].name != "learning_rate"
    ]
    assert not found, f"{len(found)}: " + ", ".join(found)


def test_few_arguments_altogether():
    found = [f"{s.where} ({len(s.parameters)})" for s in FUNCTIONS if len(s.parameters) > 16]
    assert not found, ", ".join(found)
