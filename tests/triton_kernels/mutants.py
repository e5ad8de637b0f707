"""Mutants of the Triton kernels: their source with one mistake each, made by rules, so that new kernels have theirs.

Every rule takes a node of a kernel's or device function's syntax tree and yields changes of the text. A mutant's name
holds its function, its rule and what it replaces, and no line numbers.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from efficientvit_kernels._build import ROOT

FOLDER = ROOT / "efficientvit_kernels" / "triton_kernels"
FILES = (
    "tile.py",
    "attention_state.py",
    "aggregation.py",
    "relu_linear_attention.py",
    "multiscale_aggregate.py",
    "lite_mla_kernels.py",
    "pointwise.py",
)
Change = list[tuple[ast.AST, str]]  # nodes and what stands in their place
NARROW = ".to(tl.float16).to(tl.float32)"


@dataclass(frozen=True)
class Mutant:
    file: str
    name: str
    source: str


def mutants_of(file: str, folder: Path = FOLDER) -> list[Mutant]:
    source = (folder / file).read_text()
    lines = [0]
    for line in source.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    found: list[Mutant] = []
    counts: dict[str, int] = {}
    for function in ast.parse(source).body:
        if isinstance(function, ast.FunctionDef) and _is_compiled(function):
            for rule, change in _changes(function):
                old = " ... ".join(_text(node) for node, _ in change)
                name = f"{function.name}: {rule}: {old[:100]}"
                counts[name] = counts.get(name, 0) + 1
                suffix = f" #{counts[name]}" if counts[name] > 1 else ""
                found.append(Mutant(file, name + suffix, _applied(source, lines, change)))
    return found


def _is_compiled(function: ast.FunctionDef) -> bool:
    return any(_text(decorator) in ("kernel", "triton.jit") for decorator in function.decorator_list)


def _text(node: ast.AST) -> str:
    return node.arg if isinstance(node, ast.arg) else ast.unparse(node).replace("\n", " ")


def _applied(source: str, lines: list[int], change: Change) -> str:
    data = source.encode()
    spans = sorted(
        ((lines[n.lineno - 1] + n.col_offset, lines[n.end_lineno - 1] + n.end_col_offset, text) for n, text in change),  # type: ignore
        reverse=True,
    )
    for start, end, text in spans:
        data = data[:start] + text.encode() + data[end:]
    return data.decode()


def _changes(function: ast.FunctionDef) -> Iterator[tuple[str, Change]]:
    yield from (("strides", change) for change in _swapped_strides(function))
    static = {
        id(inner)
        for node in ast.walk(function)
        if isinstance(node, ast.If | ast.IfExp)
        for inner in ast.walk(node.test)
    }
    for node in ast.walk(function):
        if id(node) not in static:
            for rule, changes in RULES.items():
                yield from ((rule, change) for change in changes(node))


def _swapped_strides(function: ast.FunctionDef) -> Iterator[Change]:
    """Neighbours among the parameters."""
    for a, b in pairwise(function.args.args):
        if a.arg.startswith("stride") and b.arg.startswith("stride"):
            yield [(a, b.arg), (b, a.arg)]


def _is_call(node: ast.AST, *names: str) -> bool:
    return isinstance(node, ast.Call) and _text(node.func) in names


def _operands(node: ast.expr) -> list[ast.expr]:
    """a, b and c of a & b & c."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitAnd):
        return [*_operands(node.left), *_operands(node.right)]
    return [node]


def _is_mask(node: ast.expr) -> bool:
    root = node
    while isinstance(root, ast.Subscript | ast.Attribute):
        root = root.value
    return isinstance(root, ast.Compare) or (isinstance(root, ast.Name) and root.id.startswith(("m_", "mask")))


def _masks(node: ast.AST) -> Iterator[Change]:
    """A load, a store or a choice whose mask, or a part of it, is not there."""
    if isinstance(node, ast.Call) and _text(node.func) not in ("tl.minimum", "tl.sum"):
        for argument in [*node.args, *(keyword.value for keyword in node.keywords if keyword.arg == "mask")]:
            for operand in _operands(argument):
                if _is_mask(operand) and not _is_relu(node):
                    yield [(operand, f"(({_text(operand)}) | True)")]
    if isinstance(node, ast.Assign) and _text(node.targets[0]).startswith("m_"):
        for operand in _operands(node.value):
            yield [(operand, f"(({_text(operand)}) | True)")]


def _is_relu(node: ast.AST) -> bool:
    return (
        _is_call(node, "tl.where")
        and isinstance(test := node.args[0], ast.Compare)  # type: ignore[attr-defined]
        and _text(test.comparators[0]) == "0"
        and isinstance(test.ops[0], ast.Lt | ast.LtE)
    )


def _bounds(node: ast.AST) -> Iterator[Change]:
    """One element more than there are, or one fewer; relu has rules of its own."""
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        left, right = _text(node.left), _text(node.comparators[0])
        if right in ("0", left) and not left.startswith("o_"):
            return
        other = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">"}.get(type(node.ops[0]))
        if other is not None:
            yield [(node, f"{left} {other} {right}" if right != "0" else f"{left} {other} 0")]


def _relus(node: ast.AST) -> Iterator[Change]:
    """NaN that is lost, or the wrong side of 0."""
    if _is_relu(node):
        test, yes, no = node.args  # type: ignore[attr-defined]
        value = _text(test.left)
        if _text(no) == value:
            yield [(node, f"tl.maximum({value}, 0.0)")]
            yield [(node, value)]
        else:
            yield [(node, f"tl.where({value} > 0, {_text(no)}, {_text(yes)})")]
            yield [(node, f"tl.where({value} < 0, {_text(yes)}, {_text(no)})")]
            yield [(node, _text(no))]
    if _is_call(node, "relu"):
        yield [(node, _text(node.args[0]))]  # type: ignore[attr-defined]


def _eps(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add) and _text(node.right) == "eps":
        yield [(node, f"({_text(node.left)})")]


def _narrowed(node: ast.AST) -> Iterator[Change]:
    """16 bits where there should be 32: what is cast, and sums at every step."""
    if _is_call(node, "tl.dot") and len(node.args) > 2:  # type: ignore[attr-defined]
        yield [(node, _text(node) + NARROW)]
    elif isinstance(node, ast.Call) and _text(node).endswith(".to(tl.float32)"):
        yield [(node, _text(node.func) + "(tl.float16).to(tl.float32)")]
    if isinstance(node, ast.AugAssign) and not _text(node.target).startswith("p"):
        operator = {ast.Add: "+", ast.Mult: "*"}[type(node.op)]
        yield [(node, f"{_text(node.target)} = ({_text(node.target)} {operator} {_text(node.value)}){NARROW}")]


def _flips(node: ast.AST) -> Iterator[Change]:
    """A weight that is not flipped: no negative strides, and no start at the last tap."""
    if isinstance(node, ast.Call):
        negative = [a for a in node.args if isinstance(a, ast.UnaryOp) and isinstance(a.op, ast.USub)]
        starts = [a for a in node.args if isinstance(a, ast.BinOp) and "(K - 1)" in _text(a)]
        if negative and starts:
            yield [*((a, _text(a.operand)) for a in negative), *((a, _text(a.left)) for a in starts)]  # type: ignore


def _windows(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.BinOp) and _text(node) == "K // 2":
        yield [(node, "(K // 2 + 1)")]
        yield [(node, "(K // 2 - 1)")]


def _loops(node: ast.AST) -> Iterator[Change]:
    """The first or the last step is not there: a tile, a split, a tap; or the steps of another program follow."""
    if _is_call(node, "range"):
        texts = [_text(argument) for argument in node.args]  # type: ignore[attr-defined]
        start, stop, step = ("0", *texts, "1") if len(texts) == 1 else (*texts, "1")[:3]
        yield [(node, f"range({start} + {step}, {stop}, {step})")]
        yield [(node, f"range({start}, {stop} - {step}, {step})")]
    if _is_call(node, "tl.minimum"):
        yield [(node, _text(node.args[0]))]  # type: ignore[attr-defined]


def _indices(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Call) and _text(node).endswith(".to(tl.int64)"):
        yield [(node, f"{_text(node.func)}(tl.int32)")]


def _precisions(node: ast.AST) -> Iterator[Change]:
    if isinstance(node, ast.Call):
        for keyword in node.keywords:
            if keyword.arg == "input_precision":
                others = [_text(part) for part in (*node.args, *node.keywords) if part is not keyword]
                yield [(node, f"{_text(node.func)}({', '.join(others)})")]


def _roundings(node: ast.AST) -> Iterator[Change]:
    if _is_call(node, "rounded", "operand", "stored_operand", "narrowed"):
        yield [(node, f"({_text(node.args[0])})")]  # type: ignore[attr-defined]
    if _is_call(node, "remainder"):
        yield [(node, f"(({_text(node.args[0])}) * 0)")]  # type: ignore[attr-defined]


def _statements(node: ast.AST) -> Iterator[Change]:
    """What is stored or added in place is not."""
    stores = ("tl.store", "store_rows", "store_state_rows")
    if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and _is_call(node.value, *stores)):
        yield [(node, "pass")]


RULES: dict[str, Callable[[ast.AST], Iterator[Change]]] = {
    "mask": _masks,
    "bound": _bounds,
    "relu": _relus,
    "eps": _eps,
    "narrow": _narrowed,
    "flip": _flips,
    "window": _windows,
    "loop": _loops,
    "index": _indices,
    "precision": _precisions,
    "rounding": _roundings,
    "statement": _statements,
}
