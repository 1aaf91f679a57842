"""`python -m czm_fused.migrate script.py`: a script for BatchNorm and SGD becomes one for CZM."""

from __future__ import annotations

import argparse
import ast
import difflib
import io
import os
import sys
import tokenize
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeAlias

IMPORT = "from czm_fused import FusedCZMSGD, convert, czm_param_groups"
_IMPORTED = ("FusedCZMSGD", "convert", "czm_param_groups")
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "compile")
_KEYWORDS = ("params", "lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
_ACCEPTED = {"fused": (None, True), "foreach": (None, False), "differentiable": (False,)}
_WEIGHT_DECAY_POSITION = 4

_Scope: TypeAlias = ast.Module | ast.FunctionDef | ast.AsyncFunctionDef


class MigrationError(ValueError):
    """The script has a form that the tool does not understand; the message says which."""


def migrate(source: str, *, model: str | None = None, from_pretrained: bool | None = None) -> str:
    """Return a training script with `convert(model)` and `FusedCZMSGD` for `torch.optim.SGD`.

    The optimizer's parameters become `czm_param_groups(model)` and its weight decay goes, as LUMA
    replaces it (paper section 3.4). `convert(model)` follows the statement that makes the model.
    Everything else stays as it is, character by character.

    Args:
        source: the text of a script with one call of `torch.optim.SGD`.
        model: the variable that holds the network; by default, the one whose `parameters()` the
            optimizer gets.
        from_pretrained: whether the network keeps the weights that it was made with. None refuses
            to decide for a network that seems to be made with weights.

    Raises:
        MigrationError: the script has no such call or several, or a form that is not understood.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise MigrationError(f"line {error.lineno}: not Python: {error.msg}") from error
    _check_names(tree)
    call = _sgd_call(tree)
    scope = _scope_of(tree, call)
    parameters = _parameters_argument(call)
    name = model or _model_of(parameters, scope)
    constructions = _constructions(name, scope, call)
    convert = f"convert({name})"
    if _is_pretrained(constructions, from_pretrained):
        convert = f"convert({name}, from_pretrained=True)"

    text = _Text(source)
    text.replace(call.func, "FusedCZMSGD")
    text.replace(parameters, f"czm_param_groups({name})")
    _drop_weight_decay(call, text)
    after = _common_statement(scope.body, constructions)
    if (after.end_lineno or 0) >= call.lineno:
        raise MigrationError(f"line {call.lineno}: the optimizer is made among several {name}")
    text.insert_line_after(after, convert)
    text.insert_line_after(_last_import(tree), IMPORT)
    edited = text.edited()
    if not _is_python(edited) or _comments(edited) != _comments(source):
        raise MigrationError(
            f"line {call.lineno}: comments stand among the optimizer's arguments; move them above"
        )
    return edited


def _is_python(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def main(arguments: Sequence[str] | None = None) -> int:
    """Migrate the script that the command line names; return the exit status.

    Args:
        arguments: of the command line, `sys.argv`'s by default.

    Returns:
        0, or 2 when the script is not understood or cannot be read.
    """
    parser = argparse.ArgumentParser(
        prog="python -m czm_fused.migrate",
        description="Take a training script from BatchNorm and torch.optim.SGD to czm_fused. "
        "Prints the change as a unified diff.",
    )
    parser.add_argument("script", type=Path)
    parser.add_argument("--write", action="store_true", help="change the script as well")
    parser.add_argument("--model", metavar="NAME", help="the variable that holds the network")
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--from-pretrained",
        action="store_true",
        default=None,
        help="keep the weights that the network is made with, BatchNorm folded into them",
    )
    start.add_argument(
        "--from-scratch",
        action="store_false",
        dest="from_pretrained",
        help="initialise the network anew, whatever weights it is made with",
    )
    given = parser.parse_args(arguments)
    try:
        # Bytes, as reading text would change the ends of the lines.
        before = given.script.read_bytes().decode()
        after = migrate(before, model=given.model, from_pretrained=given.from_pretrained)
    except (OSError, UnicodeDecodeError, MigrationError) as error:
        print(f"{given.script}: {error}", file=sys.stderr)
        return 2
    name = str(given.script)
    sys.stdout.writelines(
        difflib.unified_diff(
            before.splitlines(keepends=True), after.splitlines(keepends=True), name, name
        )
    )
    if given.write:
        _replace_file(given.script, after)
    print(
        "a learning rate for BatchNorm does not carry over: tune lr; LUMA replaces weight decay",
        file=sys.stderr,
    )
    return 0


def _replace_file(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".czm")
    beside.write_bytes(text.encode())
    beside.chmod(path.stat().st_mode)
    os.replace(beside, path)


class _Text:
    """A source whose edits are given by the places of its syntax tree, which count UTF-8 bytes."""

    def __init__(self, source: str) -> None:
        self.data = source.encode()
        self.newline = "\r\n" if "\r\n" in source else "\n"
        self.starts = [0]
        for line in self.data.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.edits: list[tuple[int, int, str]] = []

    def span(self, node: ast.expr | ast.stmt | ast.keyword) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def replace(self, node: ast.expr, text: str) -> None:
        self.edits.append((*self.span(node), text))

    def remove_argument(self, node: ast.keyword) -> None:
        """Take out a keyword with its comma, and its line if nothing else stands there."""
        start, end = self.span(node)
        data = self.data
        comma = end
        while data[comma : comma + 1].isspace():
            comma += 1
        if data[comma : comma + 1] == b",":
            end = comma + 1
            while data[end : end + 1] in (b" ", b"\t"):
                end += 1
            line_start = data.rfind(b"\n", 0, start) + 1
            alone = not data[line_start:start].strip()
            if alone and data[end : end + 2].startswith((b"\n", b"\r\n")):
                start, end = line_start, data.index(b"\n", end) + 1
        else:
            # The last argument goes with the comma before it.
            start = data.rindex(b",", 0, start)
        self.edits.append((start, end, ""))

    def insert_line_after(self, statement: ast.stmt, line: str) -> None:
        end = self.span(statement)[1]
        first = self.span(statement)[0]
        indent = self.data[self.data.rfind(b"\n", 0, first) + 1 : first].decode()
        if indent.strip():
            raise MigrationError(
                f"line {statement.lineno}: several statements on a line; put each on its own"
            )
        line_end = self.data.find(b"\n", end)
        rest = self.data[end : None if line_end < 0 else line_end].strip()
        if rest and not rest.startswith(b"#"):
            raise MigrationError(
                f"line {statement.end_lineno}: several statements on a line; put each on its own"
            )
        if line_end < 0:
            self.edits.append((len(self.data), len(self.data), f"{self.newline}{indent}{line}"))
        else:
            self.edits.append((line_end + 1, line_end + 1, f"{indent}{line}{self.newline}"))

    def edited(self) -> str:
        data = self.data
        for start, end, text in sorted(self.edits, reverse=True):
            data = data[:start] + text.encode() + data[end:]
        return data.decode()


def _check_names(tree: ast.Module) -> None:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "czm_fused":
            raise MigrationError(f"line {node.lineno}: the script imports czm_fused already")
        names: list[str | None] = []
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names = [node.id]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.asname or alias.name for alias in node.names]
        for name in names:
            if name in _IMPORTED:
                line = getattr(node, "lineno", 0)
                raise MigrationError(
                    f"line {line}: {name} is a name of the script's own; rename it"
                )


def _sgd_call(tree: ast.Module) -> ast.Call:
    names = {"torch.optim.SGD"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.asname and alias.name in ("torch", "torch.optim"):
                    names.add(alias.asname + "torch.optim.SGD"[len(alias.name) :])
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if full in ("torch.optim", "torch.optim.SGD", "torch.optim.sgd.SGD"):
                    rest = "" if full.endswith("SGD") else ".SGD"
                    names.add((alias.asname or alias.name) + rest)
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in names
    ]
    if len(calls) != 1:
        lines = ", ".join(str(call.lineno) for call in calls)
        found = f"{len(calls)}, on lines {lines}" if calls else "none"
        raise MigrationError(f"the script must call torch.optim.SGD once, but has {found}")
    return calls[0]


def _scope_of(tree: ast.Module, call: ast.Call) -> _Scope:
    """Return the innermost function that holds the call, or the module."""
    functions = [
        node
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and any(child is call for child in ast.walk(node))
    ]
    return functions[-1] if functions else tree


def _parameters_argument(call: ast.Call) -> ast.expr:
    line = f"line {call.lineno}"
    if any(isinstance(argument, ast.Starred) for argument in call.args) or any(
        keyword.arg is None for keyword in call.keywords
    ):
        raise MigrationError(f"{line}: SGD's arguments must be written out, without * and **")
    for keyword in call.keywords:
        value = keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
        if keyword.arg not in _KEYWORDS and value not in _ACCEPTED.get(str(keyword.arg), ()):
            raise MigrationError(
                f"{line}: FusedCZMSGD does not take {ast.unparse(keyword)}; remove it"
            )
    for keyword in call.keywords:
        if keyword.arg == "params":
            return keyword.value
    if not call.args:
        raise MigrationError(f"{line}: SGD is called without parameters")
    return call.args[0]


def _model_of(parameters: ast.expr, scope: _Scope) -> str:
    """Return the variable whose `parameters()` an expression, or what it names, holds."""
    line = f"line {parameters.lineno}"
    hint = "name the network with --model; its groups are then czm_param_groups's"
    expressions = [parameters]
    if isinstance(parameters, ast.Name):
        expressions = [value for value, _ in _assignments(parameters.id, scope)]
    models = set()
    for expression in expressions:
        for node in ast.walk(expression):
            if isinstance(node, ast.Dict):
                raise MigrationError(f"{line}: SGD gets parameter groups of the script's; {hint}")
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr in ("parameters", "named_parameters")
            ):
                models.add(ast.unparse(node.func.value))
    if len(models) != 1:
        found = ", ".join(sorted(models)) or "none"
        raise MigrationError(
            f"{line}: SGD must get the parameters of one network, but gets those of {found}; {hint}"
        )
    return models.pop()


def _assignments(name: str, scope: _Scope) -> Iterator[tuple[ast.expr, ast.stmt]]:
    """Yield what a variable is assigned in a scope, and the statements that do it."""
    for node in _nodes(scope):
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            targets = [node.target]
        else:
            continue
        parts = [
            part
            for target in targets
            for part in (target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target])
        ]
        if any(ast.unparse(part) == name for part in parts):
            assert node.value is not None
            yield node.value, node


def _nodes(scope: _Scope) -> Iterator[ast.AST]:
    """Walk a scope without the functions and classes that it defines."""
    waiting: list[ast.AST] = list(scope.body)
    while waiting:
        node = waiting.pop(0)
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            waiting.extend(ast.iter_child_nodes(node))


def _constructions(name: str, scope: _Scope, call: ast.Call) -> list[ast.stmt]:
    """Return the statements that make the network; those that only wrap it mention it."""
    made = [
        (value, statement)
        for value, statement in _assignments(name, scope)
        if not any(
            isinstance(node, (ast.Name, ast.Attribute)) and ast.unparse(node) == name
            for node in ast.walk(value)
        )
    ]
    if not made:
        where = scope.name if not isinstance(scope, ast.Module) else "the script"
        raise MigrationError(
            f"line {call.lineno}: {where} makes no {name}; write convert({name}) where it is "
            "made, or name the network with --model"
        )
    for value, statement in made:
        wrappers = {
            ast.unparse(node.func).split(".")[-1]
            for node in ast.walk(value)
            if isinstance(node, ast.Call)
        } & set(_WRAPPERS)
        if isinstance(value, (ast.Name, ast.Attribute)):
            raise MigrationError(
                f"line {statement.lineno}: {name} is {ast.unparse(value)} by another name; "
                "name the network with --model"
            )
        if wrappers:
            raise MigrationError(
                f"line {statement.lineno}: {name} is made and wrapped in {wrappers.pop()} in one "
                "statement; convert comes before that, so make two of it"
            )
        if statement.lineno > call.lineno:
            raise MigrationError(
                f"line {statement.lineno}: {name} is made after its optimizer of line {call.lineno}"
            )
    return [statement for _, statement in made]


def _is_pretrained(constructions: list[ast.stmt], decided: bool | None) -> bool:
    if decided is not None:
        return decided
    for statement in constructions:
        for node in ast.walk(statement):
            if isinstance(node, ast.keyword) and node.arg in ("weights", "pretrained"):
                if not (isinstance(node.value, ast.Constant) and not node.value.value):
                    raise MigrationError(
                        f"line {statement.lineno}: the network may be made with weights "
                        f"({ast.unparse(node)}); say --from-pretrained to keep them, or "
                        "--from-scratch"
                    )
    return False


def _common_statement(body: list[ast.stmt], statements: list[ast.stmt]) -> ast.stmt:
    """Return the innermost statement after which all of `statements` have run."""
    holders = [
        statement
        for statement in body
        if any(node is each for each in statements for node in ast.walk(statement))
    ]
    last = holders[-1]
    if len(holders) > 1 or last in statements:
        return last
    if isinstance(last, (ast.For, ast.AsyncFor, ast.While)):
        raise MigrationError(f"line {last.lineno}: the network is made in a loop")
    for name in ("body", "orelse", "finalbody"):
        block: list[ast.stmt] = getattr(last, name, [])
        inside = {id(node) for statement in block for node in ast.walk(statement)}
        if all(id(each) in inside for each in statements):
            return _common_statement(block, statements)
    return last


def _drop_weight_decay(call: ast.Call, text: _Text) -> None:
    for keyword in call.keywords:
        if keyword.arg == "weight_decay":
            text.remove_argument(keyword)
    if len(call.args) > _WEIGHT_DECAY_POSITION:
        text.replace(call.args[_WEIGHT_DECAY_POSITION], "0.0")


def _last_import(tree: ast.Module) -> ast.stmt:
    imports = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    if not imports:
        raise MigrationError("the script must import at its top level, but does not")
    return imports[-1]


if __name__ == "__main__":
    sys.exit(main())
