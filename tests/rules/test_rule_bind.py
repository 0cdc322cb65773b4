"""String checks of the CPython binding: slips that compile, pass most tests, and crash a user later."""
import re

import pytest
from tree import c_files, code, read

BIND = [name for name in c_files("csrc/bind") if name.endswith(".c")]
RELEASE = r"\b(?:Py_BEGIN_ALLOW_THREADS|PyEval_SaveThread\s*\()"
TAKE = r"\b(?:Py_END_ALLOW_THREADS|PyEval_RestoreThread\s*\()"
# Calls that give a new reference or NULL; the result is looked at before it is used.
NEW = (r"Py(?:List|Tuple|Dict|Set|Capsule|Type|Module|Long|Float|Unicode|Bytes|Array|Object)"
       r"_(?:New\w*|From\w+|Call\w*|GetAttr\w*|Str|Repr)")


def line_of(text, position):
    return text.count("\n", 0, position) + 1


@pytest.mark.parametrize("name", BIND)
def test_nothing_leaves_between_giving_up_the_gil_and_taking_it(name):
    text = code(read(name))
    for start in re.finditer(RELEASE, text):
        end = re.search(TAKE, text[start.end():])
        assert end, f"{name}:{line_of(text, start.start())}: the GIL is given up and never taken"
        inside = text[start.end():start.end() + end.start()]
        wrong = re.search(r"\b(return|goto|DSC_TRY|break|continue)\b", inside)
        assert not wrong, f"{name}:{line_of(text, start.end() + wrong.start())}: {wrong.group()} without the GIL"


@pytest.mark.parametrize("name", BIND)
def test_no_python_object_is_touched_without_the_gil(name):
    text = code(read(name))
    for start in re.finditer(RELEASE, text):
        end = re.search(TAKE, text[start.end():])
        inside = text[start.end():start.end() + end.start()] if end else ""
        wrong = re.search(r"\bPy(?!_BEGIN|_END)[A-Za-z]*_\w+\s*\(", inside)
        assert not wrong, f"{name}:{line_of(text, start.end() + wrong.start())}: {wrong.group()} without the GIL"


@pytest.mark.parametrize("name", BIND)
def test_an_error_is_dropped_only_with_a_comment(name):
    lines = read(name).split("\n")
    for number, line in enumerate(lines):
        if "PyErr_Clear" in code(line):
            assert "/*" in line or "*/" in lines[number - 1], f"{name}:{number + 1}: PyErr_Clear without a reason"


@pytest.mark.parametrize("name", BIND)
def test_a_new_object_is_tested_before_it_is_used(name):
    text = code(read(name))
    for made in re.finditer(r"\b(\w+) = (?:\(\w[\w ]*\*+\))?" + NEW + r"\s*\(", text):
        variable, rest = made.group(1), text[made.end():]
        statement, _, after = rest.partition(";")
        if re.search(r"\)\s*(==|!=)\s*NULL", statement) or re.search(r"!\s*\($", text[:made.start()]):
            continue  # tested where it is made: if ((x = ...) == NULL
        use = re.search(rf"(?<![\w.>]){variable}\b(?! = )", after)
        if use:
            around = after[max(0, use.start() - 12):use.end() + 12]
            where = f"{name}:{line_of(text, made.start())}"
            assert is_tested(variable, around), f"{where}: {variable} is used before it is tested"


def is_tested(variable, text):
    """Whether the first use of a variable is a test, a return, or a call that takes NULL."""
    ways = (rf"!\s*{variable}\b", rf"\b{variable}\s*(==|!=)\s*NULL", rf"\b{variable}\s*(\?|&&)", rf"\({variable}\)",
            rf"return {variable};", rf"Py_XDECREF\({variable}")
    return re.search("|".join(ways), text)


@pytest.mark.parametrize("name", BIND)
def test_no_python_object_is_static(name):
    wrong = re.findall(r"^static (?:PyObject|PyTypeObject) ?\*?\s*(\w+)(?: = [^;(]*)?;", code(read(name)), flags=re.M)
    assert not wrong, f"{name}: {wrong} outlive the module: keep them in its state"
