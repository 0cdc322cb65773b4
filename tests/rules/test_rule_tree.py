"""Rules for every file of the tree: no machine's paths, no large file, links that lead somewhere, documented Python."""
import ast
import os
import posixpath
import re

import pytest
from tree import ROOT, files, read

TEXT = [name for name in files() if not name.endswith((".png", ".jpg", ".gz"))]
# Folders of one machine: a user's home, a workplace, a package mirror. Written so that this file passes itself.
FOLDERS = ["wor" + "k", "ho" + r"me/\w+", "roo" + "t", "opt/py" + "pi", "tm" + "p/w"]
MACHINE = re.compile(r"(?<![\w.])/(?:" + "|".join(FOLDERS) + r")/")


@pytest.mark.parametrize("name", TEXT)
def test_no_path_of_a_machine(name):
    found = [f"{name}:{number}" for number, line in enumerate(read(name).split("\n"), 1) if MACHINE.search(line)]
    assert not found


def test_no_file_is_over_1_mib():
    assert not [name for name in files() if os.path.getsize(ROOT / name) > 1 << 20]


def test_no_built_file_is_tracked():
    assert not [name for name in files() if name.endswith((".so", ".o", ".a", ".pyc", ".bin", ".pkl"))]


@pytest.mark.parametrize("name", [name for name in files() if name.endswith(".md")])
def test_local_links_lead_somewhere(name):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", read(name), flags=re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        resolved = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
        if not (ROOT / resolved).exists() or (anchor and anchor not in anchors(resolved)):
            broken.append(target)
    assert not broken, f"{name}: {broken}"


def test_the_documented_exceptions_are_those_of_the_status_table():
    rows = re.findall(r"X\((DSC_E\w+), -?\d+, \"[^\"]*\", (\w+)\)", read("csrc/dsc.h").replace("\\\n", ""))
    table = [line for line in read("docs/binding.md").split("\n") if line.startswith("|")]
    documented = {(code, kind) for row in table for code in re.findall(r"`(DSC_\w+)`", row)
                  for kind in re.findall(r"[A-Z]+", row.split("|")[1])}
    assert rows and not set(rows) - documented


def anchors(name):
    """The anchors that a Markdown file's headings make on the usual hosts."""
    headings = re.findall(r"^#+ +(.+)$", read(name), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PYTHON = [name for name in files() if name.endswith(".py")]


@pytest.mark.parametrize("name", PYTHON)
def test_a_python_file_says_first_what_it_is(name):
    assert ast.get_docstring(ast.parse(read(name))), f"{name} has no docstring"


@pytest.mark.parametrize("name", [name for name in PYTHON if name.startswith("deepspeed_c/")])
def test_public_python_is_documented(name):
    """Public functions and classes at a module's top level, in modules that users import."""
    tree = ast.parse(read(name))
    bare = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))
            and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not bare, f"{name}: no docstring: {bare}"
