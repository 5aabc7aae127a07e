"""The house rules that a machine can check: what imports what, and how long things are.

The files directly in minarena/ are the method; each folder in it is a wing, the machinery around the method.
Compared with: Python's own parser and tokenizer, and the list of imports that Python itself prints.
"""

import ast
import graphlib
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import REPOSITORY

# What the files of each wing may import: the method always, beside these wings and their own
MAY_IMPORT = {
    "runtime": set(),
    "fast": {"runtime"},
    "files": {"runtime"},
    "ensemble": {"runtime", "files", "fast"},
    "quantization": {"runtime", "files"},
    "report": {"runtime", "files"},
}
WINGS = list(MAY_IMPORT)
LIFTED_OUT = ["lora", "int8", "metrics", "data"]  # works pasted into another project
SCRIPTS = ["train", "infer", "quantize"]
PACKAGE = REPOSITORY / "minarena"
# by name: a script that somebody wrote beside them keeps no rule of ours
FILES = sorted([*(REPOSITORY / f"{name}.py" for name in SCRIPTS), *PACKAGE.rglob("*.py")])
NAMES = [str(path.relative_to(REPOSITORY)) for path in FILES]


def imports(node: ast.AST, inside_functions: bool = True) -> list[str]:
    """`a.b.c` of every `import a.b.c` and `from a.b import c` at or below the node."""
    names = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            names += [alias.name for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "relative import"
            names += [f"{child.module}.{alias.name}" for alias in child.names]
        elif inside_functions or not isinstance(child, ast.FunctionDef | ast.ClassDef):
            names += imports(child, inside_functions)
    return names


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def code_lines(text: str) -> int:
    """Lines that are neither blank nor only comment nor docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and ast.get_docstring(node) is not None
        ):
            docstrings |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    lines = set()
    layout = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in layout | {tokenize.ENDMARKER}:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - docstrings)


def test_the_counter_of_code_lines_counts_a_hand_counted_example():
    text = '"""A docstring\nof two lines."""\n\n# why\nx = 1  # counts\ny = """not a\ndocstring"""\n\n\n'
    text += 'def f():\n    """One."""\n\n    # no\n    return (\n        x\n    )\n'
    assert code_lines(text) == 1 + 2 + 1 + 3


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_of_the_product_imports_peft_or_a_trainer(path):
    for name in imports(parsed(path)):
        parts = set(name.split("."))
        assert not parts & {"peft", "Trainer", "TrainingArguments", "trl", "pytorch_lightning"}, name
    assert "importlib.import_module" not in path.read_text(encoding="utf-8")


OPENED = [*FILES, *(REPOSITORY / "tests" / f"{name}.py" for name in ("conftest", "helpers", "children"))]


@pytest.mark.parametrize("path", OPENED, ids=[path.name for path in OPENED])
def test_every_text_file_is_opened_with_its_encoding(path):
    """Else a locale decides: under ISO-8859-1, cp1252 or C a good file is another, or an error."""
    for node in ast.walk(parsed(path)):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        words = [word.value for word in [*node.args, *keywords.values()] if isinstance(word, ast.Constant)]
        binary = any(isinstance(word, str) and re.fullmatch(r"[rwax+]*b[rwax+]*", word) for word in words)
        of_os = ast.unparse(node.func) in ("os.open", "gzip.open", "Run.open")
        opens = name in ("open", "fdopen", "TemporaryFile") and not of_os and not binary
        if opens or name in ("read_text", "write_text") or "text" in keywords:
            ours = ast.unparse(node.func) == "write_text"  # files/durable.py's, which says UTF-8
            assert ours or "encoding" in keywords, f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_no_file_is_longer_than_300_lines_and_no_function_than_60(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.FunctionDef):  # main as well: the story from top to bottom fits a screen
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_the_method_has_at_most_1000_lines_of_code_and_all_that_is_shipped_6500():
    """5,000 was the plan for all. Three things took more than they were given, and should give some back:
    reading any layout (580), --matmul int8 (450), bases and adapters of other tools (400). Raised from 6,100
    for a judge from Python, of one pair and of stdin (160), the folder that servers of classifiers load (150)
    and blocks for smaller cards (40)."""
    counts = {path: code_lines(path.read_text(encoding="utf-8")) for path in FILES}
    method = {path.name: count for path, count in counts.items() if path.parent == PACKAGE}
    assert sum(method.values()) <= 1000, method
    assert sum(counts.values()) <= 6500


def wing_of(name: str) -> str:
    """`minarena.fast.path.compiled` -> fast; of the method and of other libraries: nothing."""
    parts = name.split(".")
    return parts[1] if parts[0] == "minarena" and len(parts) > 1 and parts[1] in WINGS else ""


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_walls_hold(path):
    """The method imports the method, a wing what MAY_IMPORT says; only scripts join wings together."""
    names = imports(parsed(path))  # also those inside functions
    assert not {name.split(".")[0] for name in names} & set(SCRIPTS)
    if path.parent == REPOSITORY:
        return  # a script
    own = "" if path.parent == PACKAGE else path.parent.name
    allowed = {"", own} | MAY_IMPORT.get(own, set())
    for name in names:
        assert wing_of(name) in allowed, f"{path.relative_to(REPOSITORY)} imports {name}"


def test_every_folder_is_a_wing_and_its_init_is_a_docstring_alone_that_names_its_files():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(WINGS)
    for path in PACKAGE.rglob("__init__.py"):
        (docstring,) = parsed(path).body  # no import, no name handed on
        assert isinstance(docstring, ast.Expr)
        if path.parent != PACKAGE:
            files = {file.name for file in path.parent.glob("*.py")} - {"__init__.py"}
            assert {name for name in files if name not in docstring.value.value} == set(), path


@pytest.mark.parametrize("name", LIFTED_OUT)
def test_files_that_are_lifted_out_need_torch_numpy_pandas_and_the_standard_library(name):
    names = imports(parsed(PACKAGE / f"{name}.py"), inside_functions=False)
    roots = {name.split(".")[0] for name in names}
    assert roots <= {"torch", "numpy", "pandas", *sys.stdlib_module_names}


def test_imports_have_no_circle():
    """Each file's imports of ours, at its top or inside functions, can be put into an order."""
    modules = {str(path.relative_to(REPOSITORY).with_suffix("")).replace("/", "."): path for path in FILES}
    needs = {}
    for module, path in modules.items():
        found = [name for name in imports(parsed(path)) if name.startswith("minarena.")]
        needs[module] = {name if name in modules else name.rpartition(".")[0] for name in found}
        assert needs[module] <= modules.keys(), f"{module}: {needs[module] - modules.keys()}"
    tuple(graphlib.TopologicalSorter(needs).static_order())  # CycleError names the circle


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_the_only_classes_are_modules_dataclasses_and_autograd_functions(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            assert decorators & {"dataclass", "dataclass(frozen=True)"} or bases & {
                "nn.Module",
                "torch.autograd.Function",
            }, node.name


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_says_its_idea_first(path):
    assert len(ast.get_docstring(parsed(path)) or "") > 40


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_nothing_is_swallowed_and_the_environment_is_read_in_one_place(path):
    for node in ast.walk(parsed(path)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "a bare except"
    text = path.read_text(encoding="utf-8")
    assert "simplefilter" not in text and "filterwarnings" not in text
    assert path.stem == "dist" or ("os.environ" not in text and "getenv" not in text)
    assert not re.search(r"\b(pickle|torch\.load)\b\s*[.(]", text)
