"""Mutants: small changes of a source file, each of which some test should notice.

    python -m tests.mutants hf_longlora/rope/scale.py[:FIRST-LAST][%3] tests/test_rope.py [-k ramp]

With lines only what stands in them is changed, with `%3` every third of it. The tests are collected once. Each mutant
is a fork in which the code of one function is another. There the tests run that run the changed statement, the
quickest of them first, until one fails; what none has noticed is printed, with how many there were. Code outside of
functions, defaults of arguments, and texts (of errors) are left out. What a test does in other threads and processes
is not seen to run a statement. `tests/mutants.md` says what was found.
"""

import ast
import copy
import gc
import os
import pickle
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

PATIENCE = 60
"""Seconds for a mutant, beside three times what the tests took without one: some never end."""
SWAPPED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.FloorDiv, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult, ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr,
}  # fmt: skip
Change = Callable[[ast.AST], ast.AST]


def changes(node: ast.AST) -> Iterator[tuple[str, Change]]:
    """What may be changed of a node: a name, and a function that makes the new one of a copy of it."""

    def with_field(name: str, value: Callable[[ast.AST], object]) -> Change:
        def change(node: ast.AST) -> ast.AST:
            setattr(node, name, value(node))
            return node

        return change

    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            other = SWAPPED[type(operator)]
            yield other.__name__, with_field("ops", lambda n, i=i, o=other: [*n.ops[:i], o(), *n.ops[i + 1 :]])
    if isinstance(node, (ast.BoolOp, ast.BinOp, ast.AugAssign)) and type(node.op) in SWAPPED:
        other = SWAPPED[type(node.op)]
        yield other.__name__, with_field("op", lambda n, o=other: o())
    if isinstance(node, ast.BoolOp):
        for i in range(len(node.values)):
            yield f"without operand {i + 1}", with_field("values", lambda n, i=i: [*n.values[:i], *n.values[i + 1 :]])
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
        yield f"without {type(node.op).__name__}", lambda n: n.operand
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield repr(value), with_field("value", lambda n, value=value: value)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield "if not", with_field("test", lambda n: ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.comprehension) and node.ifs:
        yield "without filter", with_field("ifs", lambda n: [])
    if isinstance(node, ast.Return) and not (node.value is None or ast.unparse(node.value) == "None"):
        yield "returns None", with_field("value", lambda n: ast.Constant(None))
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
    kept = isinstance(node, ast.Assign) and isinstance(node.targets[0], (ast.Attribute, ast.Subscript))
    if call or kept or isinstance(node, ast.Raise):
        yield "nothing", lambda n: ast.Pass()
    if isinstance(node, (ast.Break, ast.Continue)):
        other = ast.Continue if isinstance(node, ast.Break) else ast.Break
        yield other.__name__, lambda n: other()


def mutants(source: str) -> Iterator[tuple[int, str, tuple[str, int], ast.Module]]:
    """Line, change, the name and first line of the function that it is in, and the changed module."""
    tree = ast.parse(source)
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    inner = {f for function in functions for f in ast.walk(function) if f is not function}
    for function in (f for f in functions if f not in inner):
        first = min([function.lineno, *(d.lineno for d in function.decorator_list)])
        nodes = [node for statement in function.body for node in outside_texts(statement)]
        for node in nodes:
            for name, change in changes(node):
                memo: dict[int, object] = {}
                changed = copy.deepcopy(tree, memo)
                old = memo[id(node)]
                new = ast.copy_location(change(copy.deepcopy(node)), node) if hasattr(node, "lineno") else change(old)
                Replace(old, new).visit(changed)
                line = getattr(node, "lineno", None) or node.iter.lineno
                yield line, name, (function.name, first), ast.fix_missing_locations(changed)


def statements(source: str) -> dict[int, range]:
    """For each line the lines of its statement; without those of the statements within it."""
    found: dict[int, range] = {}
    for node in ast.walk(ast.parse(source)):  # outer ones first
        if isinstance(node, ast.stmt):
            body = getattr(node, "body", None)
            own = range(node.lineno, max(node.lineno, body[0].lineno - 1 if body else node.end_lineno) + 1)
            found |= dict.fromkeys(range(node.lineno, node.end_lineno + 1), own)
    return found


def outside_texts(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all within it, but for texts, docstrings, what an error says, and a function's own annotations."""
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)):
        return
    yield node
    if isinstance(node, ast.AnnAssign):
        if node.value is not None:
            yield from outside_texts(node.value)
    elif not isinstance(node, ast.Raise):
        for child in ast.iter_child_nodes(node):
            yield from outside_texts(child)


class Replace(ast.NodeTransformer):
    def __init__(self, old: object, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        if node is self.old:
            # What is left of `a and b` without one of them.
            alone = isinstance(self.new, ast.BoolOp) and len(self.new.values) == 1
            return self.new.values[0] if alone else self.new
        return super().generic_visit(node)


def codes(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from codes(constant)


class Mutants:
    """A plugin of pytest in the place of its run of the tests.

    Args:
        file: What is changed.
        lines: Those in which it is.
        every: Of the changes there, each so many-th.
    """

    def __init__(self, file: Path, lines: range, every: int) -> None:
        self.file, self.lines, self.every, self.failed = file.resolve(), lines, every, False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def fork(self, run: Callable[[], None], limit: float) -> bool:
        """Whether a test fails in what is run by a process of its own, or that takes longer than `limit`, in s."""
        child = os.fork()
        if child == 0:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            run()
            os._exit(self.failed)
        end = time.monotonic() + limit
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return status != 0
            time.sleep(0.01)
        os.kill(child, 9)
        os.waitpid(child, 0)
        return True

    def run(self, items: Iterable[pytest.Item]) -> None:
        for item in items:
            item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
            if self.failed:
                break

    def look(self, items: list[pytest.Item], written: Path) -> None:
        """Run tests, and write the time that each takes, in s, and the lines that it runs."""
        seen: set[int] = set()

        def line(frame: FrameType, event: str, arg: Any) -> Any:
            seen.add(frame.f_lineno)
            return line

        def call(frame: FrameType, event: str, arg: Any) -> Any:
            return line if frame.f_code.co_filename == str(self.file) else None

        found = []
        for item in items:
            seen.clear()
            began = time.monotonic()
            sys.settrace(call)
            self.run([item])
            sys.settrace(None)
            found.append((time.monotonic() - began, set(seen)))
        written.write_bytes(pickle.dumps(found))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            written = Path(folder, "tests")
            if self.fork(lambda: self.look(session.items, written), 3600):
                raise pytest.UsageError("the tests fail without a mutant, too")
            times = pickle.loads(written.read_bytes())
        tests = sorted(zip(times, session.items, strict=True), key=lambda test: test[0][0])
        gc.unfreeze()  # what conftest.py has put out of the collector's sight
        living = [f for f in gc.get_objects() if type(f) is FunctionType and f.__code__.co_filename == str(self.file)]
        source, total, missed = self.file.read_text(), 0, 0
        statement = statements(source)
        inside = (mutant for mutant in mutants(source) if mutant[0] in self.lines)
        for line, name, (function, first), tree in islice(inside, 0, None, self.every):
            targets = [f for f in living if (f.__code__.co_name, f.__code__.co_firstlineno) == (function, first)]
            found = [c for c in codes(compile(tree, str(self.file), "exec")) if c.co_name == function]
            code = next(c for c in found if c.co_firstlineno == first)
            if not targets or len(targets[0].__code__.co_freevars) != len(code.co_freevars):
                continue
            total += 1
            concerned = [(spent, item) for (spent, ran), item in tests if not ran.isdisjoint(statement[line])]

            def mutant(functions: list[FunctionType], code: CodeType, items: list[pytest.Item]) -> None:
                for each in functions:
                    each.__code__ = code
                self.run(items)

            run = partial(mutant, targets, code, [item for _, item in concerned])
            if not self.fork(run, PATIENCE + 3 * sum(spent for spent, _ in concerned)):
                missed += 1
                text = source.splitlines()[line - 1].strip()
                print(f"{self.file.name}:{line}: {name} | {text} ({len(concerned)} tests)", flush=True)
        print(f"{missed} of {total} were not noticed", flush=True)
        return True


if __name__ == "__main__":
    name, _, every = sys.argv[1].partition("%")
    name, _, span = name.partition(":")
    first, last = map(int, span.split("-")) if span else (1, 10**6)
    plugin = Mutants(Path(name), range(first, last + 1), int(every or 1))
    sys.exit(pytest.main(["-q", "-s", "-p", "no:cacheprovider", *sys.argv[2:]], [plugin]))
