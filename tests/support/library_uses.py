"""How opd uses vLLM, DeepSpeed and accelerate, read from its syntax trees: names, attributes, calls."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from pathlib import Path

CALL = "()"


@dataclass(frozen=True, slots=True)
class Target:
    """``name`` of ``module`` (or the module itself), then attributes and calls (``()``) on it.

    ``one_of`` names the expression that may be of this class or of others.
    """

    module: str
    name: str | None
    steps: tuple[str, ...] = ()
    one_of: str = ""

    def then(self, step: str) -> "Target":
        return replace(self, steps=(*self.steps, step))

    @property
    def library(self) -> str:
        return self.module.split(".")[0]

    def __str__(self) -> str:
        path = self.module + (f".{self.name}" if self.name else "")
        return path + "".join(step if step == CALL else f".{step}" for step in self.steps)


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a call passes: how many by position, and by keyword with the strings it may be."""

    positional: int
    keywords: Mapping[str, frozenset[str]]


@dataclass(frozen=True, slots=True)
class Use:
    """One place where opd relies on a library; ``arguments`` for calls."""

    where: str
    target: Target
    arguments: Arguments | None = None


@dataclass(frozen=True, slots=True)
class Known:
    """What an expression is where no annotation says so: instances of these classes.

    ``file`` has patterns of paths below the package, comma separated. ``classes`` are written module:Class;
    every one of them must have what is used, or one of them where the object is of one at a time
    (``one_of``). Without classes it is no object of these libraries.
    """

    file: str
    expression: str
    classes: tuple[str, ...] = ()
    one_of: bool = False

    def is_in(self, file: str) -> bool:
        return any(fnmatch(file, pattern) for pattern in self.file.split(","))


class UnseenKeywords(ValueError):
    """A call passes ``**x``, and the keys of x are not literal."""


def library_uses(
    package: Path, libraries: Sequence[str], known: Sequence[Known]
) -> tuple[list[Use], list[Known]]:
    """Every use in the modules of ``package``, and the entries of ``known`` that no longer occur."""
    uses: list[Use] = []
    occurring: set[Known] = set()
    for path in sorted(package.rglob("*.py")):
        file = path.relative_to(package).as_posix()
        tree = ast.parse(path.read_text())
        expressions = {
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Name | ast.Attribute)
        }
        here = [k for k in known if k.is_in(file) and k.expression in expressions]
        occurring |= set(here)
        uses += _Module(file, tree, libraries, here).uses()
    return uses, [entry for entry in known if entry not in occurring]


@dataclass(slots=True)
class _Scope:
    """The names of a function whose library class is known, and the keys of its dictionaries."""

    types: dict[str, list[Target]] = field(default_factory=dict)
    keys: dict[str, dict[str, ast.expr]] = field(default_factory=dict)


class _Module:
    def __init__(
        self, file: str, tree: ast.Module, libraries: Sequence[str], known: Sequence[Known]
    ) -> None:
        self._file = file
        self._tree = tree
        self._libraries = libraries
        self._known = {entry.expression: entry for entry in known}
        self._imports = dict(self._imported())

    def uses(self) -> list[Use]:
        found = [Use(f"{self._file}", target) for target in self._imports.values()]
        found += self._visit(self._tree, _Scope())
        return found

    def _imported(self) -> Iterator[tuple[str, Target]]:
        for node in ast.walk(self._tree):
            match node:
                case ast.Import(names=names):
                    for alias in names:
                        if alias.name.split(".")[0] in self._libraries:
                            yield alias.asname or alias.name.split(".")[0], Target(alias.name, None)
                case ast.ImportFrom(module=str(module), names=names, level=0):
                    if module.split(".")[0] in self._libraries:
                        for alias in names:
                            yield alias.asname or alias.name, Target(module, alias.name)

    def _visit(self, node: ast.AST, scope: _Scope) -> Iterator[Use]:
        """Uses in a node; functions see the names around them, methods those of their class."""
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                scope = _Scope(dict(scope.types), dict(scope.keys))
                self._learn_function(node, scope)
            case ast.ClassDef():
                scope = _Scope(dict(scope.types), dict(scope.keys))
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        own = _Scope(dict(scope.types))
                        self._learn_function(inner, own)
                        attributes = {k: v for k, v in own.types.items() if k.startswith("self.")}
                        scope.types.update(attributes)
            case ast.Call():
                yield from self._called(node, scope)
            case ast.Attribute(value=value, attr=attr):
                for target in self._targets(value, scope):
                    yield Use(f"{self._file}:{node.lineno}", target.then(attr))
        for child in ast.iter_child_nodes(node):
            yield from self._visit(child, scope)

    def _called(self, node: ast.Call, scope: _Scope) -> Iterator[Use]:
        targets = self._targets(node.func, scope)
        if not targets:
            return
        keywords: dict[str, ast.expr] = {}
        for keyword in node.keywords:
            if keyword.arg is not None:
                keywords[keyword.arg] = keyword.value
            else:
                where = f"{self._file}:{node.lineno}"
                keywords |= _literal_keys(keyword.value, scope.keys, where)
        arguments = Arguments(
            len(node.args), {name: _strings(value) for name, value in keywords.items()}
        )
        for target in targets:
            yield Use(f"{self._file}:{node.lineno}", target, arguments)

    def _targets(self, node: ast.expr, scope: _Scope) -> list[Target]:
        """What an expression is; several where ``known`` lists several classes."""
        text = ast.unparse(node)
        if text in self._known:
            entry = self._known[text]
            paths = [path.split(":") for path in entry.classes]
            one_of = text if entry.one_of else ""
            return [Target(module, name, (CALL,), one_of) for module, name in paths]
        if text in scope.types:
            return scope.types[text]
        match node:
            case ast.Name(id=name) if name in self._imports:
                return [self._imports[name]]
            case ast.Attribute(value=value, attr=attr):
                return [target.then(attr) for target in self._targets(value, scope)]
            case ast.Call(func=function):
                return [target.then(CALL) for target in self._targets(function, scope)]
        return []

    def _learn_function(self, node: ast.FunctionDef | ast.AsyncFunctionDef, scope: _Scope) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        for argument in arguments:
            scope.types.pop(argument.arg, None)
            self._annotate(argument.arg, argument.annotation, scope)
        for statement in ast.walk(node):
            match statement:
                case ast.AnnAssign(target=target, annotation=annotation, value=value):
                    self._annotate(ast.unparse(target), annotation, scope)
                    if value is not None:
                        self._assign(target, value, scope)
                case ast.Assign(targets=[target], value=value):
                    self._assign(target, value, scope)

    def _annotate(self, name: str, annotation: ast.expr | None, scope: _Scope) -> None:
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.Name) and annotation.id in self._imports:
            scope.types[name] = [self._imports[annotation.id].then(CALL)]

    def _assign(self, target: ast.expr, value: ast.expr, scope: _Scope) -> None:
        match target:
            case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))):
                scope.keys.setdefault(name, {})[key] = value
            case ast.Name() | ast.Attribute():
                text = ast.unparse(target)
                keys = _known_keys(value, scope.keys)
                if keys is not None:
                    scope.keys[text] = {**scope.keys.get(text, {}), **keys}
                if targets := self._targets(value, scope):
                    scope.types.setdefault(text, targets)


def _literal_keys(
    node: ast.expr, keys: Mapping[str, dict[str, ast.expr]], where: str
) -> dict[str, ast.expr]:
    found = _known_keys(node, keys)
    if found is None:
        raise UnseenKeywords(
            f"{where} passes **{ast.unparse(node)} to a library: write its keys as a literal in the same "
            "function, so that they can be checked"
        )
    return found


def _known_keys(
    node: ast.expr, keys: Mapping[str, dict[str, ast.expr]]
) -> dict[str, ast.expr] | None:
    """The keys of a dictionary expression; None where they are not literal."""
    match node:
        case ast.Dict(keys=names, values=values):
            found: dict[str, ast.expr] = {}
            for name, value in zip(names, values, strict=True):
                match name:
                    case ast.Constant(value=str(key)):
                        found[key] = value
                    case None:
                        inner = _known_keys(value, keys)
                        if inner is None:
                            return None
                        found |= inner
                    case _:
                        return None
            return found
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            one, other = _known_keys(left, keys), _known_keys(right, keys)
            return None if one is None or other is None else one | other
        case ast.IfExp(body=body, orelse=orelse):
            one, other = _known_keys(body, keys), _known_keys(orelse, keys)
            return None if one is None or other is None else one | other
        case ast.Name(id=name):
            return keys.get(name)
    return None


def _strings(node: ast.expr) -> frozenset[str]:
    """The string constants that an expression may be (both branches of a conditional one)."""
    match node:
        case ast.Constant(value=str(value)):
            return frozenset({value})
        case ast.IfExp(body=body, orelse=orelse):
            return _strings(body) | _strings(orelse)
    return frozenset()


def string_constants(package: Path, prefix: str) -> dict[str, str]:
    """Every string constant of a package that starts with ``prefix``, with a place where it stands."""
    return {
        node.value: f"{path.relative_to(package).as_posix()}:{node.lineno}"
        for path in sorted(package.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and node.value.startswith(prefix)
    }
