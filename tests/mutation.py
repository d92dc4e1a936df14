"""Mutation testing: one small error at a time is put into a module, and the tests that run it should notice.

``python tests/mutation.py MODULE… [--sample N [--seed K]]`` prints the mutants that survive and how many were killed,
for modules such as ``metrics`` or ``formats/*``: all mutants, or N of them. Each runs in a fork of a process that has
imported everything but the package, with the tests that call the mutated function, fastest first. Annotations,
docstrings and what is said in errors are not mutated. ``--only FILE`` runs those that survived by an earlier output.
"""

from __future__ import annotations

import argparse
import ast
import importlib.machinery
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "napari_calvae"
#: Without the plugins of the environment, and whatever the settings of the project say about parallel tests.
PYTEST = ["-x", "-q", "-p", "no:cacheprovider", "-o", "addopts=", "-m", "not slow and not gpu"]
PYTEST += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
#: Tests by module; those of formats are told apart by what they call.
TESTS = {
    "preprocess": ("test_preprocess", "test_properties", "test_doubts", "test_metrics"),
    "metrics": ("test_metrics", "test_expectation"),
    "objectives": ("test_objectives",),
    "formats": ("test_formats*", "test_movies", "test_growing", "test_pulses", "test_recording"),
}
OPERATORS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Add: ast.Sub, ast.Sub: ast.Add,
    ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div, ast.Mod: ast.Mult, ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
PAIRS = [
    "min max",
    "minimum maximum",
    "floor ceil",
    "any all",
    "argmin argmax",
    "amin amax",
    "nanmin nanmax",
    "zeros ones",
]
NAMES = {a: b for pair in PAIRS for a, b in (pair.split(), pair.split()[::-1])}
SYMMETRIC = {*NAMES, "isinstance", "getattr", "hasattr"}  # or refuse the other order by themselves


def name_of(call: ast.AST) -> str:
    return getattr(call, "attr", getattr(call, "id", ""))


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What the node could be instead."""
    match node:
        case ast.Compare(left, ops, comparators):
            for k, op in enumerate(ops):
                yield ast.Compare(left, [*ops[:k], OPERATORS[type(op)](), *ops[k + 1 :]], comparators)
        case ast.BinOp(left, op, right) if type(op) in OPERATORS:
            yield ast.BinOp(left, OPERATORS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(OPERATORS[type(op)](), values)
        case ast.UnaryOp(_, operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield from (ast.Constant(value + 1), ast.Constant(value - 1))
        case ast.Constant(str() as value):
            yield ast.Constant(value + "X")
        case ast.Call(function, [first, second, *rest], keywords) if name_of(function) not in SYMMETRIC:
            if not isinstance(first, ast.Starred) and not isinstance(second, ast.Starred):
                yield ast.Call(function, [second, first, *rest], keywords)
        case ast.Name(name) if name in NAMES:
            yield ast.Name(NAMES[name])
        case ast.Attribute(value, name) if name in NAMES:
            yield ast.Attribute(value, NAMES[name])
        case ast.Expr(ast.Call()) | ast.Raise() | ast.AugAssign() | ast.Delete():
            yield ast.Pass()
        case ast.Assign([ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()
        case ast.Return(value) if value is not None and getattr(value, "value", 0) is not None:
            yield ast.Return(None)
        case ast.Continue() | ast.Break():
            yield ast.Break() if isinstance(node, ast.Continue) else ast.Continue()
    test = getattr(node, "test", None)
    if test and not (isinstance(test, ast.UnaryOp) or (isinstance(test, ast.Compare) and len(test.ops) == 1)):
        fields = {name: value for name, value in ast.iter_fields(node) if name != "test"}
        yield type(node)(test=ast.UnaryOp(ast.Not(), test), **fields)


def sites(node: ast.AST, function: ast.AST | None = None) -> Iterator[tuple[ast.AST, str, int | None, ast.AST | None]]:
    """Every place that may be mutated: its parent, field, index in it, and outermost function."""
    said = isinstance(node, ast.Raise | ast.JoinedStr) or name_of(getattr(node, "func", None)) in (
        "warn",
        "RecordingError",
    )
    named = isinstance(node, ast.Assign) and name_of(node.targets[0]) == "__all__"
    for field, value in ast.iter_fields(node):
        if said or named or field in ("annotation", "returns", "decorator_list", "type_comment", "op", "ops", "ctx"):
            continue
        for index, child in enumerate(value if isinstance(value, list) else [value]):
            text = isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant)
            typing = name_of(getattr(child, "test", None)) == "TYPE_CHECKING"
            if not isinstance(child, ast.AST) or text or typing:
                continue
            inside = function or (child if isinstance(child, ast.FunctionDef) else None)
            yield node, field, index if isinstance(value, list) else None, inside
            yield from sites(child, inside)


def mutants(path: Path) -> Iterator[tuple[str, str, tuple[int, int] | None]]:
    """Line that names it, source, and first and last line of the function it is in."""
    tree = ast.parse(path.read_text())
    for parent, field, index, function in list(sites(tree)):
        holder = getattr(parent, field)
        old = holder if index is None else holder[index]
        for new in variants(old):
            ast.copy_location(new, old)
            setattr(parent, field, new if index is None else [*holder[:index], new, *holder[index + 1 :]])
            around = (
                parent if isinstance(old, ast.Constant | ast.Name) and not isinstance(parent, ast.FunctionDef) else None
            )
            source = ast.unparse(ast.fix_missing_locations(tree))
            after = ast.unparse(around or new).split("\n")[0]
            setattr(parent, field, holder)
            before = ast.unparse(around or old).split("\n")[0]
            lines = function and (min(d.lineno for d in [*function.decorator_list, function]), function.end_lineno)
            yield f"{path.relative_to(PACKAGE)}:{old.lineno}: {before}  →  {after}", source, lines


class Watch:
    """Which functions each test calls, and how long it takes; calls of a fixture count for all tests of its file."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, int]] = set()
        self.tests: dict[str, tuple[float, list]] = {}
        self.shared: dict[str, set] = {}

    def trace(self, frame, event, argument):
        if frame.f_code.co_filename.startswith(str(PACKAGE)):
            self.seen.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item):
        self.shared.setdefault(item.nodeid.split("::")[0], set()).update(self.seen)
        self.seen.clear()
        start = time.perf_counter()
        try:
            return (yield)
        finally:
            self.tests[item.nodeid] = (time.perf_counter() - start, [*self.seen])
            self.seen.clear()


class Chosen:
    """Runs only these tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.order = {test: k for k, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def in_child(task, limit: float) -> int | None:
    """What the task returns in a fork, None if it takes longer than that (s)."""
    if not (child := os.fork()):
        os.setsid()
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1), os.dup2(quiet, 2)
        sys.dont_write_bytecode = True
        os._exit(int(task()))
    begun = time.monotonic()
    while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() - begun < limit:
        time.sleep(0.01)
    if done[0]:
        return os.waitstatus_to_exitcode(done[1])
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def watch(files: list[str], record: Path) -> int:
    plugin = Watch()
    sys.settrace(plugin.trace), threading.settrace(plugin.trace)
    result = pytest.main([*PYTEST, *files], [plugin])
    sys.settrace(None)
    names = [name for name in sys.modules if name.split(".")[0] not in ("napari_calvae", "conftest", "__main__")]
    shared = {name: [*calls] for name, calls in plugin.shared.items()}
    record.write_text(json.dumps([plugin.tests, shared, [n for n in names if not n.startswith("test")]]))
    return result


def run(path: Path, source: str, tests: list[str]) -> int:
    """Exit status of pytest with the source in place of the file."""
    loader = importlib.machinery.SourceFileLoader
    get_data, path_stats = loader.get_data, loader.path_stats
    loader.get_data = lambda self, p: source.encode() if p == str(path) else get_data(self, p)
    loader.path_stats = lambda self, p: {"mtime": 0, "size": 0} if p == str(path) else path_stats(self, p)
    return pytest.main([*PYTEST, *dict.fromkeys(test.split("::")[0] for test in tests)], [Chosen(tests)])


def survey(module: str, chosen: list[tuple[Path, str, str, tuple[int, int] | None]]) -> Iterator[tuple[str, str]]:
    """Line of each mutant of files that share their tests, and what became of it."""
    files = [str(f) for name in TESTS[module] for f in sorted(ROOT.glob(f"tests/{name}.py"))]
    record = Path(tempfile.mkdtemp()) / "watched.json"
    if in_child(lambda: watch(files, record), 900) != 0:
        raise SystemExit("mutation: expected tests that pass before anything is mutated, got a failure.")
    tests, shared, names = json.loads(record.read_text())
    for name in names:
        try:
            __import__(name)
        except Exception:  # noqa: BLE001 - what cannot be imported beforehand is imported by each
            continue
    whole = chosen[0][0]
    if in_child(lambda: run(whole, ast.unparse(ast.parse(whole.read_text())), [*tests]), 900) != 0:
        raise SystemExit("mutation: expected tests that pass in a fork, without a mutation, got a failure.")
    for path, line, source, lines in chosen:
        found = []
        for test, (seconds, called) in tests.items():
            at = [k for file, k in [*called, *shared[test.split("::")[0]]] if file == str(path)]
            if any(lines is None or lines[0] <= k <= lines[1] for k in at):
                found.append((seconds, test))
        found.sort()
        order = [test for _, test in found]
        limit = 20 + 10 * sum(seconds for seconds, _ in found)
        result = in_child(lambda: run(path, source, order), limit) if order else 0  # noqa: B023
        yield line, "survives" if result == 0 else "too slow" if result is None else "killed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--sample", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=Path)
    asked = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    os.chdir(ROOT)
    by_tests: dict[str, list] = {}
    for path in sorted({p for module in asked.modules for p in PACKAGE.glob(f"{module}.py")}):
        module = path.parent.name if path.parent != PACKAGE else path.stem
        by_tests.setdefault(module, []).extend((path, *mutant) for mutant in mutants(path))
    for module, found in by_tests.items():
        if asked.sample and asked.sample < len(found):
            found = sorted(random.Random(asked.seed).sample(found, asked.sample), key=lambda m: found.index(m))
        if asked.only:
            before = {line.partition(": ")[2] for line in asked.only.read_text().splitlines()}
            found = [m for m in found if m[1] in before]
        counts = {"killed": 0, "too slow": 0, "survives": 0}
        for line, result in survey(module, found):
            counts[result] += 1
            if result != "killed":
                print(f"{result}: {line}", flush=True)  # noqa: T201
        killed = len(found) - counts["survives"]
        print(f"{module}: {killed} of {len(found)} mutants killed ({killed / max(len(found), 1):.1%})", flush=True)  # noqa: T201


if __name__ == "__main__":
    main()
