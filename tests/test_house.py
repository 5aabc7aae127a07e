"""The house rules that a machine can check: what imports what, and how long things are.

Floors: an import points down, or along a floor to a file that stands before it in FLOORS. Ground-floor files
import torch, numpy, pandas and the standard library only, so that each works pasted into another project.
Compared with: Python's own parser and tokenizer, and the list of imports that Python itself prints.
"""

import ast
import io
import re
import sys
import tokenize
from pathlib import Path

import pytest
from conftest import REPOSITORY

FLOORS = [
    ["config", "metrics", "reliability", "data", "snip", "int8", "lora", "attention", "ranks"],
    [
        "dist",
        "shards",
        "sources",
        "files",
        "folders",
        "text",
        "batching",
        "packing",
        "kernels",
        "tiny",
        "adapter",
        "step",
        "memory",
        "signals",
    ],
    [
        "checkpoint",
        "resume",
        "parts",
        "merge",
        "convert",
        "joined",
        "graphs",
        "fast",
        "model",
        "console",
        "track",
    ],
    ["predict", "pseudo", "runs", "page", "report"],
]
GROUND = FLOORS[0]
ORDER = [name for floor in FLOORS for name in floor]
SCRIPTS = ["train", "infer", "quantize"]
FILES = sorted([*REPOSITORY.glob("*.py"), *(REPOSITORY / "minarena").glob("*.py")])


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
    return ast.parse(path.read_text())


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


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_of_the_product_imports_peft_or_a_trainer(path):
    for name in imports(parsed(path)):
        parts = set(name.split("."))
        assert not parts & {"peft", "Trainer", "TrainingArguments", "trl", "pytorch_lightning"}, name
    assert "importlib.import_module" not in path.read_text()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_is_longer_than_300_lines_and_no_function_than_60(path):
    assert len(path.read_text().splitlines()) <= 300
    for node in ast.walk(parsed(path)):
        # main is the story, from top to bottom; everything it calls is short
        if isinstance(node, ast.FunctionDef) and node.name != "main":
            assert node.end_lineno - node.lineno + 1 <= 60, node.name


def test_package_and_scripts_have_about_3420_lines_of_code_and_the_report_apart_from_them_400():
    leaf = {"report", "page", "runs"}  # nothing imports it, and deleting it breaks nothing
    counts = {path.stem: code_lines(path.read_text()) for path in FILES}
    assert sum(count for name, count in counts.items() if name not in leaf) <= 3420
    assert sum(counts[name] for name in leaf) <= 400
    for path in FILES:
        ours = {name.split(".")[1] for name in imports(parsed(path)) if name.startswith("minarena.")}
        assert path.stem in leaf or not ours & leaf, path.stem


def test_what_the_demo_walks_through_has_at_most_1400_lines_of_code(demo):
    """The files of ours that Python itself says `python train.py --swap` imported."""
    listed = set(re.findall(r"^import time:.*\|\s+(minarena\S*)$", demo[1]["ba"][1], re.MULTILINE))
    assert {"minarena.step", "minarena.model", "minarena.tiny"} <= listed
    files = [REPOSITORY / "train.py", *(REPOSITORY / (name.replace(".", "/") + ".py") for name in listed)]
    files = [path if path.exists() else path.with_suffix("") / "__init__.py" for path in files]
    counts = {path.name: code_lines(path.read_text()) for path in files}
    assert sum(counts.values()) <= 1400, counts


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "minarena"], ids=lambda p: p.name)
def test_an_import_points_down(path):
    ours = [name.split(".")[1] for name in imports(parsed(path)) if name.startswith("minarena.")]
    if path.name == "__init__.py":
        assert not ours  # `import minarena` runs nothing
        return
    assert path.stem in ORDER, f"{path.name} has no place in FLOORS"
    for name in ours:
        assert ORDER.index(name) < ORDER.index(path.stem), f"{path.stem} imports {name}"
        assert path.stem not in GROUND, f"{path.stem} is a ground-floor file, and imports {name}"
    assert not {name.split(".")[0] for name in imports(parsed(path))} & set(SCRIPTS)


@pytest.mark.parametrize("name", [path.stem for path in FILES if path.stem in GROUND])
def test_ground_floor_files_need_torch_numpy_pandas_and_the_standard_library(name):
    path = REPOSITORY / "minarena" / f"{name}.py"
    roots = {name.split(".")[0] for name in imports(parsed(path), inside_functions=False)}
    assert roots <= {"torch", "numpy", "pandas", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_only_classes_are_modules_dataclasses_and_autograd_functions(path):
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.ClassDef):
            bases = {ast.unparse(base) for base in node.bases}
            decorators = {ast.unparse(decorator) for decorator in node.decorator_list}
            assert decorators & {"dataclass", "dataclass(frozen=True)"} or bases & {
                "nn.Module",
                "torch.autograd.Function",
            }, node.name


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_says_its_idea_first(path):
    assert len(ast.get_docstring(parsed(path)) or "") > 40


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_is_swallowed_and_the_environment_is_read_in_one_place(path):
    for node in ast.walk(parsed(path)):
        assert not (isinstance(node, ast.ExceptHandler) and node.type is None), "a bare except"
    text = path.read_text()
    assert "simplefilter" not in text and "filterwarnings" not in text
    assert path.stem == "dist" or ("os.environ" not in text and "getenv" not in text)
    assert not re.search(r"\b(pickle|torch\.load)\b\s*[.(]", text)
