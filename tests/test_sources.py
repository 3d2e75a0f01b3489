"""What a record's source hash covers, and what it does not."""

import importlib.util
import sys
from inspect import ismodule

import pytest

from nlhelpers import experiments, records, sources
from nlhelpers.methods import METHODS
from nlhelpers.specs import Spec
from tasks import task

# ---------------------------------------------------------------- the text of code

SOURCE = '''"""Module."""

import math  # for pi


def area(radius):
    """Area of a circle.

    # not a comment
    """
    # A comment.
    return math.pi * radius**2  # πr²
'''


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"""Module."""', '"""A much better sentence."""'),
        ("# A comment.", "# Another,\n\n    # longer."),
        ("  # πr²", ""),
        ("Area of a circle.", "The area."),
        ("import math  # for pi\n", "import math\n\n"),
    ],
)
def test_comments_and_docstrings_do_not_count(old, new):
    assert old in SOURCE
    assert sources.code(SOURCE.replace(old, new)) == sources.code(SOURCE)


@pytest.mark.parametrize(
    ("commented", "bare"),
    [
        ('x = ("a"\n    # why\n    "b")', 'x = ("a"\n    "b")'),
        ('x = ("a"  # why\n    f"b"  # why\n)', 'x = ("a"\n    f"b"\n)'),
        ('x = ("a"\n\n    "b")', 'x = ("a"\n    "b")'),
        ('x = """a\nb"""  # why', 'x = """a\nb"""'),
        ('x = f"""a\n{b}\nc"""  # why', 'x = f"""a\n{b}\nc"""'),
    ],
)
def test_what_stands_between_or_behind_strings_does_not_count(commented, bare):
    assert sources.code(commented) == sources.code(bare) == bare


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**2", "radius**3"),
        ("math.pi", "math.tau"),
        ("def area(radius):", "def area(radius, /):"),
        ("    return", "    if radius:\n        return"),
    ],
)
def test_code_counts(old, new):
    assert old in SOURCE
    assert sources.code(SOURCE.replace(old, new)) != sources.code(SOURCE)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ('x = "a  # b"', 'x = "a  # c"'),
        ('x = """\n# one\n"""', 'x = """\n# two\n"""'),
        ('x = """\na\n\nb"""', 'x = """\na\nb"""'),
        ('x = """a \nb"""', 'x = """a\nb"""'),
        ('x = f"""{\na} \nb"""', 'x = f"""{\na}\nb"""'),
        ('x = """\na \nb"""', 'x = """\na\nb"""'),
        ('x = f"""\na\n\n{b}"""', 'x = f"""\na\n{b}"""'),
        ('def f(): "text"; return 1', 'def f(): "text"; return 2'),
    ],
)
def test_text_that_only_looks_like_a_comment_counts(first, second):
    assert sources.code(first) != sources.code(second)


# ---------------------------------------------------------------- what it depends on

EXAMPLE = """
import math

from nlhelpers import noise
from nlhelpers.losses import cross_entropy as loss

FACTOR = {"a": [1, 2], "b": {3}}
UNUSED = 7
ALIAS = int | None


def start(x):
    return Middle().last(x) + FACTOR["a"][0] + noise.check_rate(0.5)


class Middle:
    def last(self, x: ALIAS):
        return KINDS["one"](x), math.pi


def one(x):
    return x


def two(x):
    return loss(x)


KINDS = {"one": one, "two": two}
"""


def example(tmp_path, source):
    """Definitions behind `start`, in a module of the package with this source."""
    path = tmp_path / f"example{len(list(tmp_path.iterdir()))}.py"
    path.write_text(source)
    name = f"nlhelpers.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        found = sources.definitions(module.start)
    finally:
        del sys.modules[name]
    return {key.replace(path.stem, "example"): text for key, text in found.items()}


def test_what_is_named_counts_and_nothing_else(tmp_path):
    found = example(tmp_path, EXAMPLE)
    own = {"start", "Middle"}
    assert set(found) == {
        *(f"nlhelpers.example.{name}" for name in own),
        "nlhelpers.noise.check_rate",
    }


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return KINDS", "return 2, KINDS"),
        ('FACTOR["a"]', 'FACTOR["b"]'),
        ("noise.check_rate(0.5)", "noise.check_labels(x, 2)"),
        ("math.pi", "two(x)"),
    ],
)
def test_a_change_of_what_is_named_counts(tmp_path, old, new):
    assert old in EXAMPLE
    assert example(tmp_path, EXAMPLE.replace(old, new)) != example(tmp_path, EXAMPLE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("UNUSED = 7", "UNUSED = 8"),
        ("    return loss(x)", "    return loss(x) + 1"),
        ('"two": two}', '"two": two, "three": two}'),
        ("def start(x):", "def start(x):\n    # Why.\n"),
    ],
)
def test_a_change_elsewhere_does_not(tmp_path, old, new):
    assert old in EXAMPLE
    assert example(tmp_path, EXAMPLE.replace(old, new)) == example(tmp_path, EXAMPLE)


def test_constants_count_with_their_value(tmp_path):
    source = EXAMPLE.replace('{"a": [1, 2], "b": {3}}', '{"a": [1, 2]}')
    found = example(tmp_path, source)
    assert found["nlhelpers.example: FACTOR"] == '{"a": [1, 2]}'
    assert example(tmp_path, source.replace("[1, 2]", "[1, 3]")) != found


def shortest(name):
    """The shortest run of a method."""
    method = METHODS[name]
    clean = 100 * (method.clean_set == "needed")
    binary = task("3 vs 5", (0.8, 0.7), 40) if method.two_classes else {}
    known = {"pi_P": 0.8, "pi_N": 0.7} if name == "nl-gan" else {}
    return Spec(name, profile="smoke", num_clean=clean, settings=known, **binary)


RUNS = [
    *map(shortest, METHODS),
    Spec("two-stage", profile="smoke", num_clean=50, noise="pair-flip"),
    Spec("two-stage", profile="smoke", settings={"consistency": "pi"}),
    Spec(profile="smoke", model="resnet14", noise="asymmetric-swap", noise_rate=0.6),
]
# What runs around a run, or stands in its record by value.
AROUND = ("specs", "experiments", "records", "profiles", "sources", "methods")
BY_VALUE = {"nlhelpers.training.Recipe"}
# Of two loops, that which runs counts.
CHOOSES = {"nlhelpers.training.on_its_device", "nlhelpers.graphs.used_on"}
# What refuses a run makes no number.
REFUSES = {"nlhelpers.methods.clean_only.check_clean_set"}


@pytest.mark.parametrize("spec", RUNS, ids=str)
def test_every_function_that_runs_counts(spec, cpu, monkeypatch):
    monkeypatch.setattr(records, "source_hash", lambda *made_by, **k: (made_by, k))
    made_by, besides = experiments.source(spec)
    covered = set(sources.definitions(*made_by, **besides))
    ran = set()

    def note(frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        name = frame.f_code.co_qualname.split(".")[0]
        own = sources.in_package(module) and not name.startswith(("<", "__"))
        if event == "call" and own:
            ran.add(f"{module}.{name}")

    sys.setprofile(note)
    try:
        experiments.run(spec, cpu)
    finally:
        sys.setprofile(None)
    around = tuple(f"nlhelpers.{name}." for name in AROUND)
    makers = {name for name in ran if not name.startswith(around)}
    makers |= {name for name in ran if name.startswith("nlhelpers.methods.")}
    assert len(makers) > 20
    assert makers - BY_VALUE - CHOOSES - REFUSES <= covered


def test_what_only_a_gpu_runs_counts_for_its_records(monkeypatch):
    monkeypatch.setattr(records, "source_hash", lambda *made_by, **k: (made_by, k))
    of_cpu, of_gpu = (
        set(sources.definitions(*made_by, **besides))
        for made_by, besides in (
            experiments.source(Spec(profile="smoke"), device)
            for device in ("cpu", "cuda")
        )
    )
    only = {name for name in of_gpu - of_cpu if ":" not in name}
    graphs = {f"nlhelpers.graphs.{n}" for n in ("Recorded", "record", "Room")}
    assert graphs < only
    assert "nlhelpers.training.fit_by_graphs" in only
    assert of_cpu < of_gpu


@pytest.mark.parametrize(("T", "counts"), [("known", True), ("estimated", False)])
def test_where_a_known_t_comes_from_counts(T, counts, monkeypatch):
    monkeypatch.setattr(records, "source_hash", lambda *made_by, **k: (made_by, k))
    made_by, _ = experiments.source(Spec("forward", settings={"T": T}))
    assert (experiments.transition_of in made_by) == counts


@pytest.mark.parametrize("method", METHODS)
def test_every_constant_in_reach_is_understood(method, monkeypatch):
    """What is neither code, data nor a type would change unseen."""
    monkeypatch.setattr(records, "source_hash", lambda *made_by, **k: (made_by, k))
    made_by, besides = experiments.source(shortest(method))
    covered = sources.definitions(*made_by, **besides)
    modules = {name.rpartition(".")[0] for name in covered if ":" not in name}
    assert {f"nlhelpers.{name}" for name in ("data", "training")} <= modules
    # The recipes of `profiles` stand in the record of a run.
    for name in modules - {"nlhelpers.experiments", "nlhelpers.profiles"}:
        constants = vars(sys.modules[name]).items()
        for constant, value in constants:
            if not constant.startswith("__"):
                data = sources.as_json(value) is not None
                assert data or understood(value), f"{name}.{constant} = {value!r}"


def understood(value):
    """Whether a value is code, a type, a registry, or made of types."""
    if isinstance(value, dict):
        return all(map(understood, value.values()))
    if isinstance(value, tuple):
        return all(map(understood, value))
    aliases = ("types", "typing", "collections.abc")
    return callable(value) or type(value).__module__ in aliases or ismodule(value)


# ---------------------------------------------------------------- the hash


def test_the_hash_follows_method_model_data_and_noise():
    base = Spec(profile="smoke")
    others = [
        Spec("two-stage", profile="smoke"),
        Spec(profile="smoke", model="resnet14"),
        Spec(profile="smoke", dataset="mnist"),
        Spec(profile="smoke", noise="pair-flip"),
    ]
    assert len({experiments.source(spec) for spec in [base, *others]}) == 5


def test_the_hash_does_not_repeat_what_the_record_holds():
    base = experiments.source(Spec("two-stage"))
    for change in (
        {"seed": 1},
        {"profile": "paper"},
        {"noise_rate": 0.4},
        {"settings": {"threshold": 0.8}},
    ):
        assert experiments.source(Spec("two-stage", **change)) == base


def test_a_local_name_is_no_reference():
    """A parameter may be called like a function of its module."""
    found = sources.looked_up(
        "@decorated(limit=most)\n"
        "def user(recipe: Kind, items=default):\n"
        "    inner = items\n"
        "    def nested(x):\n"
        "        return helper(x, recipe, inner)\n"
        "    return nested\n"
    )
    assert found - {"user"} == {"decorated", "most", "Kind", "default", "helper"}
    assert "recipe" in sources.looked_up("def f(x):\n    return recipe(x)\n")
    inside = sources.looked_up("class A:\n    def f(self):\n        return A, B\n")
    assert {"A", "B"} <= inside
