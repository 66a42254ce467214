"""A library's interface, read from its Python sources without importing it."""

import ast
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.support.library_uses import CALL, Arguments, Target, Use

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Found:
    """A definition, and the module in which its names are looked up. ``instance``: an object of a class.

    The node ``ast.Pass`` stands for anything of another library, which is not checked.
    """

    module: str
    node: ast.AST | None
    instance: bool = False
    owner: ast.ClassDef | None = None


OTHER = Found("", ast.Pass())


class Absent(LookupError):
    """A name, attribute or argument that the sources do not have."""


class Sources:
    """The Python files of ``libraries`` below ``root``, a folder of packages like site-packages.

    ``forwards`` says where a function that takes ``**kwargs`` passes them on: the keys and values are
    written module:Class or module:Class.method.
    """

    def __init__(
        self, root: Path, libraries: Sequence[str], forwards: Mapping[str, Sequence[str]]
    ) -> None:
        self._root = root
        self._libraries = libraries
        self._forwards = forwards
        self._trees: dict[str, ast.Module | None] = {}

    def problem(self, use: Use) -> str | None:
        """What of a use the library does not have, in one sentence; None where everything is there.

        A use of an object whose class cannot be seen is a problem too.
        """
        try:
            found = self._walk(use.target)
            if use.arguments is not None:
                if found is None:
                    raise Absent("the class of this cannot be seen: add it to KNOWN")
                self._require_arguments(found, use.arguments)
        except Absent as error:
            return f"opd/{use.where} uses {use.target}: {error}"
        return None

    def strings(self, module: str) -> set[str]:
        """All string constants of a module."""
        tree = self._tree(module)
        if tree is None:
            raise Absent(f"there is no module {module}")
        return {
            n.value
            for n in ast.walk(tree)
            if isinstance(n, ast.Constant) and isinstance(n.value, str)
        }

    def function(self, path: str) -> Function:
        """The definition at module:Class.method or module:function."""
        module, _, names = path.partition(":")
        first, *rest = names.split(".")
        found = self._named(module, first)
        for name in rest:
            found = self._member(found, name)
        if not isinstance(found.node, Function):
            raise Absent(f"{path} is no function")
        return found.node

    def _walk(self, target: Target) -> Found | None:
        """The definition of a target; None where no annotation says of what class the last value is."""
        if target.name is None:
            found: Found | None = Found(target.module, None)
            self._require_module(target.module)
        else:
            found = self._named(target.module, target.name)
        for step in target.steps:
            if found is None:
                raise Absent(f"the class of what has {step} cannot be seen: add it to KNOWN")
            found = self._result(found) if step == CALL else self._attribute(found, step)
        return found

    def _attribute(self, found: Found, name: str) -> Found | None:
        if found.node is None:
            return self._named(found.module, name)
        if not isinstance(found.node, ast.ClassDef):
            return found if isinstance(found.node, ast.Pass) else None
        member = self._member(found, name)
        match member.node:
            case ast.FunctionDef(decorator_list=decorators, returns=returns) if any(
                ast.unparse(d).endswith("property") for d in decorators
            ):
                return self._instance(member.module, returns)
            case ast.AnnAssign(annotation=annotation):
                return self._instance(member.module, annotation)
            case ast.Assign():
                return None
        return member

    def _result(self, found: Found) -> Found | None:
        match found.node:
            case ast.ClassDef():
                return None if found.instance else Found(found.module, found.node, instance=True)
            case ast.FunctionDef(returns=returns) | ast.AsyncFunctionDef(returns=returns):
                return self._instance(found.module, returns)
            case ast.Pass():
                return found
        return None

    def _instance(self, module: str, annotation: ast.expr | None) -> Found | None:
        """An object of the class that an annotation names; None without an annotation."""
        match annotation:
            case None:
                return None
            case ast.Constant(value=str(text)):
                return self._instance(module, ast.parse(text, mode="eval").body)
            case ast.BinOp(left=left, op=ast.BitOr(), right=ast.Constant(value=None)):
                return self._instance(module, left)
            case ast.Name(id=name):
                try:
                    found = self._named(module, name)
                except Absent:
                    return OTHER
                if isinstance(found.node, ast.ClassDef):
                    return Found(found.module, found.node, instance=True)
        return OTHER

    def _require_arguments(self, found: Found, arguments: Arguments) -> None:
        if not isinstance(found.node, ast.ClassDef | Function):
            return
        key = found.module + ":" + self._title(found)
        signature = self._signature(found)
        if arguments.positional > len(signature.positional) and not signature.takes_any:
            raise Absent(
                f"it takes {len(signature.positional)} arguments by position, not {arguments.positional}"
            )
        for name, strings in arguments.keywords.items():
            if name in signature.annotations:
                self._require_allowed(found.module, signature, name, strings)
            elif not signature.takes_keywords:
                raise Absent(f"there is no parameter {name}")
            else:
                self._require_forwarded(key, name, strings)
        given = {*signature.positional[: arguments.positional], *arguments.keywords}
        missing = [name for name in signature.required if name not in given]
        if missing:
            raise Absent(f"it needs {', '.join(missing)}")

    def _require_allowed(
        self, module: str, signature: "_Signature", name: str, strings: frozenset[str]
    ) -> None:
        allowed = self._literals(module, signature.annotations[name])
        if allowed and not strings <= allowed:
            raise Absent(f"{name} may be {sorted(allowed)}, not {sorted(strings - allowed)}")

    def _require_forwarded(self, key: str, name: str, strings: frozenset[str]) -> None:
        if key not in self._forwards:
            raise Absent(f"{name} goes into **kwargs: add to FORWARDS where {key} passes them on")
        for path in self._forwards[key]:
            module, _, names = path.partition(":")
            first, *rest = names.split(".")
            found = self._named(module, first)
            for each in rest:
                found = self._member(found, each)
            signature = self._signature(found)
            if name not in signature.annotations:
                raise Absent(f"{path}, which gets it, has no parameter {name}")
            self._require_allowed(found.module, signature, name, strings)

    def _title(self, found: Found) -> str:
        assert isinstance(found.node, ast.ClassDef | Function)
        return found.node.name if found.owner is None else f"{found.owner.name}.{found.node.name}"

    def _signature(self, found: Found) -> "_Signature":
        if isinstance(found.node, Function):
            return _function_signature(found.node, method=found.owner is not None)
        assert isinstance(found.node, ast.ClassDef)
        constructor = self._lookup(found, "__init__")
        if constructor is not None and isinstance(constructor.node, Function):
            return _function_signature(constructor.node, method=True)
        fields: dict[str, ast.AnnAssign] = {}
        for each in reversed(list(self._with_bases(found))):
            assert isinstance(each.node, ast.ClassDef)
            for statement in each.node.body:
                match statement:
                    case ast.AnnAssign(target=ast.Name(id=name), annotation=annotation) if (
                        "ClassVar" not in ast.unparse(annotation)
                    ):
                        fields[name] = statement
        is_dictionary = any(
            "TypedDict" in ast.unparse(base)
            for each in self._with_bases(found)
            if isinstance(each.node, ast.ClassDef)
            for base in each.node.bases
        )
        return _Signature(
            positional=list(fields),
            annotations={name: each.annotation for name, each in fields.items()},
            required=[n for n, each in fields.items() if each.value is None and not is_dictionary],
        )

    def _literals(self, module: str, annotation: ast.expr | None, depth: int = 0) -> set[str]:
        """The strings that an annotation allows; none where it allows any, or is not made of Literal."""
        if annotation is None or depth > 5:
            return set()
        allowed: set[str] = set()
        for part in _union(annotation):
            match part:
                case ast.Subscript(value=ast.Name(id="Literal"), slice=values):
                    elements = values.elts if isinstance(values, ast.Tuple) else [values]
                    allowed |= {str(e.value) for e in elements if isinstance(e, ast.Constant)}
                    for alias in elements:
                        if isinstance(alias, ast.Name):
                            allowed |= self._literals(module, alias, depth + 1)
                case ast.Name(id="str"):
                    return set()
                case ast.Name(id=name):
                    try:
                        alias = self._named(module, name)
                    except Absent:
                        continue
                    if isinstance(alias.node, ast.Assign | ast.AnnAssign):
                        allowed |= self._literals(alias.module, alias.node.value, depth + 1)
        return allowed

    def _member(self, found: Found, name: str) -> Found:
        member = self._lookup(found, name)
        if member is None:
            assert isinstance(found.node, ast.ClassDef)
            raise Absent(f"{found.module}.{found.node.name} has no {name}")
        return member

    def _lookup(self, found: Found, name: str) -> Found | None:
        for each in self._with_bases(found):
            assert isinstance(each.node, ast.ClassDef)
            for node in reversed(list(_members(each.node))):
                if name in _defined(node):
                    return Found(each.module, node, owner=each.node)
        return None

    def _with_bases(self, found: Found) -> Iterator[Found]:
        """A class and the bases that the library defines."""
        yield found
        assert isinstance(found.node, ast.ClassDef)
        for base in found.node.bases:
            if isinstance(base, ast.Name):
                try:
                    resolved = self._named(found.module, base.id)
                except Absent:
                    continue
                if isinstance(resolved.node, ast.ClassDef):
                    yield from self._with_bases(resolved)

    def _named(self, module: str, name: str, seen: frozenset[str] = frozenset()) -> Found:
        """What a module calls ``name``, through its imports."""
        self._require_module(module)
        here = f"{module}:{name}"
        if here in seen:
            raise Absent(f"{module} imports {name} from itself")
        seen |= {here}
        tree = self._tree(module)
        assert tree is not None
        statements = list(_statements(tree.body))
        for node in reversed(statements):
            match node:
                case ast.ImportFrom(names=names):
                    for alias in names:
                        if (alias.asname or alias.name) == name:
                            return self._imported(module, node, alias.name, seen)
                case ast.Import(names=names):
                    for alias in names:
                        if alias.asname == name and self._is_module(alias.name):
                            return Found(alias.name, None)
                case _ if name in _defined(node):
                    return Found(module, node)
        if self._is_module(f"{module}.{name}"):
            return Found(f"{module}.{name}", None)
        for node in statements:
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                try:
                    return self._imported(module, node, name, seen)
                except Absent:
                    continue
        raise Absent(f"{module} has no {name}")

    def _imported(
        self, module: str, node: ast.ImportFrom, name: str, seen: frozenset[str]
    ) -> Found:
        source = node.module or ""
        if node.level:
            parts = module.split(".")
            package = parts if self._path(module).name == "__init__.py" else parts[:-1]
            package = package[: len(package) - (node.level - 1)]
            source = ".".join([*package, *([node.module] if node.module else [])])
        if not self._is_module(source):
            return OTHER
        return self._named(source, name, seen)

    def _require_module(self, module: str) -> None:
        if not self._is_module(module):
            raise Absent(f"there is no module {module}")

    def _is_module(self, module: str) -> bool:
        return self._tree(module) is not None

    def _path(self, module: str) -> Path:
        folder = self._root.joinpath(*module.split("."))
        package = folder / "__init__.py"
        return package if package.is_file() else folder.with_suffix(".py")

    def _tree(self, module: str) -> ast.Module | None:
        if module.split(".")[0] not in self._libraries:
            return None
        if module not in self._trees:
            path = self._path(module)
            self._trees[module] = ast.parse(path.read_text()) if path.is_file() else None
        return self._trees[module]


@dataclass(frozen=True, slots=True)
class _Signature:
    positional: list[str]
    annotations: Mapping[str, ast.expr | None]
    required: list[str]
    takes_any: bool = False
    takes_keywords: bool = False


def _function_signature(node: Function, *, method: bool) -> _Signature:
    static = any(ast.unparse(d) == "staticmethod" for d in node.decorator_list)
    positional = [*node.args.posonlyargs, *node.args.args][1 if method and not static else 0 :]
    keyword_only = node.args.kwonlyargs
    without_default = positional[: len(positional) - len(node.args.defaults)]
    needed = [
        argument
        for argument, default in zip(keyword_only, node.args.kw_defaults, strict=True)
        if default is None
    ]
    return _Signature(
        positional=[argument.arg for argument in positional],
        annotations={a.arg: a.annotation for a in [*positional, *keyword_only]},
        required=[argument.arg for argument in [*without_default, *needed]],
        takes_any=node.args.vararg is not None,
        takes_keywords=node.args.kwarg is not None,
    )


def _statements(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a module, with those under conditions and in try blocks."""
    for node in body:
        match node:
            case ast.If():
                yield from _statements([*node.orelse, *node.body])
            case ast.Try():
                handlers = [s for handler in node.handlers for s in handler.body]
                yield from _statements([*handlers, *node.orelse, *node.body])
            case ast.With():
                yield from _statements(node.body)
            case _:
                yield node


def _members(node: ast.ClassDef) -> Iterator[ast.AST]:
    """What sets attributes of a class's objects: its body, and ``self.x = ...`` in its methods."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assign | ast.AnnAssign) and any(
            ast.unparse(target).startswith("self.") for target in _assigned(inner)
        ):
            yield inner
    yield from _statements(node.body)


def _assigned(node: ast.Assign | ast.AnnAssign) -> list[ast.expr]:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [e for t in targets for e in (t.elts if isinstance(t, ast.Tuple) else [t])]


def _defined(node: ast.AST) -> set[str]:
    """The names that a statement gives: of a definition, variables, attributes, ``self.__dict__["x"]``."""
    names: set[str] = set()
    match node:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            names.add(name)
        case ast.Assign() | ast.AnnAssign():
            for target in _assigned(node):
                match target:
                    case ast.Name(id=name) | ast.Attribute(attr=name):
                        names.add(name)
                    case ast.Subscript(
                        value=ast.Attribute(attr="__dict__"), slice=ast.Constant(value=str(name))
                    ):
                        names.add(name)
    return names


def _union(annotation: ast.expr) -> Iterator[ast.expr]:
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        yield from _union(annotation.left)
        yield from _union(annotation.right)
    else:
        yield annotation
