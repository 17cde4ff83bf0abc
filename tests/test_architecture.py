"""Which module may import which, and how long files and functions may be: read from the source, nothing is run."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("data_models", "train_models", "drllm", "extensions", "experiments", "eval_tasks", "miniature", "benchmarks")
STEPS = ("drllm.search", "drllm.training", "drllm.evaluation")

MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_PARAMETERS = 450, 80, 7
# What breaks a rule, and why it stays so. The aim is that these are empty.
IMPORTED_PROGRAMS: dict[str, str] = {}
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {
    "train_models.following.FollowsPaths.forward": "one forward pass, read from top to bottom",
}
OVERRIDES = "overrides a method of transformers, whose parameters it repeats"
MANY_PARAMETERS: dict[str, str] = {
    "train_models.following.CausalLMOverPaths.forward": OVERRIDES,
    "train_models.following.FollowsPaths.forward": OVERRIDES,
}
NOT_NEEDED = "remove this exception: it is not needed any more"


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, for every source file outside tests/."""
    paths = [*ROOT.glob("*.py")]
    for folder in FOLDERS:
        paths += (ROOT / folder).rglob("*.py")
    modules = {}
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


@cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(sources()[module].read_text())


@cache
def imports_of(module: str) -> frozenset[str]:
    """The modules that `module` imports anywhere in its file, by full name."""
    package = module if sources()[module].name == "__init__.py" else module.rpartition(".")[0]
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            submodules = [f"{base}.{alias.name}" for alias in node.names if f"{base}.{alias.name}" in sources()]
            names.update(submodules)
            # `from drllm import errors` needs the package only for its submodule.
            if len(submodules) < len(node.names):
                names.add(base)
    return frozenset(names)


def reachable(module: str) -> Iterator[tuple[str, str]]:
    """(module, its importer) for all that `module` imports, directly or through modules of the repository."""
    seen, waiting = {module}, [module]
    while waiting:
        importer = waiting.pop()
        for name in imports_of(importer) - seen:
            seen.add(name)
            yield name, importer
            if name in sources():
                waiting.append(name)


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def is_program(module: str) -> bool:
    return any(
        isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" for node in tree_of(module).body
    )


def test_the_reader_of_imports_sees_what_is_there():
    assert is_program("train")
    assert is_program("experiments.ablations")
    assert not is_program("drllm.errors")
    assert "drllm.errors" in imports_of("train")
    assert "train_models.routing" in imports_of("train_models.routed"), "relative imports"
    assert "torch" in dict(reachable("drllm.questions.prompts")) or "torch" in dict(reachable("drllm.provenance"))


@pytest.mark.parametrize("step", STEPS)
def test_search_training_and_evaluation_do_not_import_each_other(step):
    others = [other for other in STEPS if other != step]
    wrong = [
        f"{importer} imports {name}"
        for module in sources()
        if is_within(module, step)
        for name, importer in reachable(module)
        if any(is_within(name, other) for other in others)
    ]
    assert wrong == []


def test_no_module_imports_a_program():
    programs = {module for module in sources() if is_program(module)}
    imported = {name for module in sources() for name in imports_of(module) & programs}
    assert imported - IMPORTED_PROGRAMS.keys() == set()
    assert IMPORTED_PROGRAMS.keys() <= imported, NOT_NEEDED


def test_a_checkpoints_code_imports_torch_transformers_and_itself():
    allowed = {"torch", "transformers", "train_models", *sys.stdlib_module_names}
    wrong = [
        f"{module} imports {name}"
        for module in sources()
        if is_within(module, "train_models")
        for name in imports_of(module)
        if name.split(".")[0] not in allowed
    ]
    assert wrong == []


def test_the_tree_of_the_search_knows_no_torch():
    assert [f"{importer} imports {name}" for name, importer in reachable("drllm.search.tree") if name == "torch"] == []


@pytest.mark.parametrize("package", ["extensions", "experiments", "benchmarks", "miniature"])
def test_the_library_imports_no_programs_folder(package):
    libraries = ("drllm", "data_models") if package == "extensions" else ("drllm", "data_models", "extensions")
    importing = {
        (module, name)
        for module in sources()
        if any(is_within(module, library) for library in libraries)
        for name in imports_of(module)
        if is_within(name, package)
    }
    assert importing == set()


def functions(module: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """(qualified name, definition) of each function and method of a module, without functions inside functions."""

    def within(node: ast.AST, name: str) -> Iterator[tuple[str, ast.FunctionDef]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{name}.{child.name}", child
            elif isinstance(child, ast.ClassDef):
                yield from within(child, f"{name}.{child.name}")

    return within(tree_of(module), module)


def test_files_are_short():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources().values()}
    too_long = {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}
    assert {path: lines for path, lines in too_long.items() if path not in LONG_FILES} == {}
    assert LONG_FILES.keys() <= too_long.keys(), NOT_NEEDED


def test_functions_are_short():
    lengths = {name: node.end_lineno - node.lineno + 1 for module in sources() for name, node in functions(module)}
    too_long = {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES}
    assert {name: lines for name, lines in too_long.items() if name not in LONG_FUNCTIONS} == {}
    assert LONG_FUNCTIONS.keys() <= too_long.keys(), NOT_NEEDED


def test_public_functions_have_few_parameters():
    many = {}
    for module in sources():
        for name, node in functions(module):
            if any(part.startswith("_") and part != "__init__" for part in name.split(".")):
                continue
            names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([argument for argument in names if argument not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                many[name] = count
    assert {name: count for name, count in many.items() if name not in MANY_PARAMETERS} == {}
    assert MANY_PARAMETERS.keys() <= many.keys(), NOT_NEEDED


def test_per_is_written_out():
    """ "one path per row": an "a" in place of "per" has to be read twice."""
    per = re.compile(r"\b(a|one) (path|label|layer|block|question|process) a (row|query|question|block|GPU)")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    paths = listed.stdout.split("\0")[:-1] or [str(path.relative_to(ROOT)) for path in sources().values()]
    texts = [path for path in paths if Path(path).suffix in (".py", ".md", ".sh", ".yaml", ".txt", "")]
    lines = [
        f"{path}:{number}: {line.strip()}"
        for path in texts
        if (ROOT / path).is_file()
        for number, line in enumerate((ROOT / path).read_text(errors="replace").splitlines(), start=1)
        if per.search(line)
    ]
    assert lines == []
