"""What the C core may not do: print, end the process, call what cannot be used safely, keep hidden state."""
import re

import pytest
from tree import c_files, code, functions, read

# name -> why. snprintf, vsnprintf and strtol and their like are the allowed ways.
BANNED = {
    "exit": "the core never ends the process", "_exit": "the core never ends the process",
    "abort": "the core never ends the process", "assert_perror": "the core never ends the process",
    "printf": "the core never prints", "fprintf": "the core never prints", "vprintf": "the core never prints",
    "vfprintf": "the core never prints", "puts": "the core never prints", "fputs": "the core never prints",
    "putchar": "the core never prints", "perror": "the core never prints", "dprintf": "the core never prints",
    "atoi": "cannot report an error", "atol": "cannot report an error", "atof": "cannot report an error",
    "strcpy": "knows no bound", "strcat": "knows no bound", "sprintf": "knows no bound", "vsprintf": "knows no bound",
    "gets": "knows no bound", "scanf": "knows no bound", "sscanf": "cannot report overflow",
    "strncpy": "may leave no terminator", "strtok": "keeps hidden state", "rand": "keeps hidden state",
    "srand": "keeps hidden state",
    "system": "reaches a shell", "popen": "reaches a shell", "alloca": "cannot report failure",
    "setenv": "changes the user's process", "putenv": "changes the user's process",
    "usleep": "waits without a reason", "sleep": "waits without a reason",
}
ALLOCATORS = ["malloc", "calloc", "realloc", "free", "aligned_alloc", "posix_memalign", "strdup", "strndup", "asprintf"]
# (file, function): who may call an allocator all the same, and why.
ALLOCATOR_EXCEPTIONS = {
    "csrc/alloc.c": "the one place",
}
# Mutable file-scope state, by name: everything else belongs to an object.
STATE = {
    "csrc/alloc.c": {"n_calls", "n_live", "n_live_bytes"},
    "csrc/status.c": {"last_text", "last_place", "last_errno"},  # per thread
    "csrc/log.c": {"current_sink"},
    "csrc/kernels/dispatch.c": {"table_filled", "table"},  # filled once
    "csrc/comm/fork.c": {"lock", "live", "once", "register_error"},  # fork itself is process-wide
}
# Functions over 60 lines, with the reason. The list only shrinks.
LONG = {}


def calls(name, words):
    text = code(read(name))
    pattern = r"(?<![\w.>])(" + "|".join(map(re.escape, words)) + r")\s*\("
    return [(text.count("\n", 0, m.start()) + 1, m.group(1)) for m in re.finditer(pattern, text)]


@pytest.mark.parametrize("name", c_files())
def test_no_banned_call(name):
    assert not [f"{name}:{line}: {call}: {BANNED[call]}" for line, call in calls(name, BANNED)]


@pytest.mark.parametrize("name", c_files())
def test_allocators_are_called_in_alloc_c_only(name):
    if name not in ALLOCATOR_EXCEPTIONS:
        assert not [f"{name}:{line}: {call}" for line, call in calls(name, ALLOCATORS)]


@pytest.mark.parametrize("name", c_files())
def test_no_function_is_longer_than_60_lines(name):
    long = {f.name: f.n_lines for f in functions(name) if f.n_lines > 60}
    assert set(long) == set(LONG.get(name, {})), f"{name}: {long}"


@pytest.mark.parametrize("name", c_files())
def test_a_file_says_first_what_it_is(name):
    head = re.match(r"/\*.*?\*/", read(name), flags=re.S)
    assert head, f"{name} does not start with a comment"
    assert 1 <= head.group().count("\n") + 1 <= 24, f"{name}: a head comment of {head.group().count(chr(10)) + 1} lines"


@pytest.mark.parametrize("name", [n for n in c_files() if n.endswith(".h")])
def test_every_public_function_of_a_header_is_commented(name):
    """A comment above it, on its line, or above the run of declarations (no empty line between) it stands in."""
    bare = []
    for block in re.split(r"\n\s*\n", read(name)):
        for found in re.finditer(r"^[A-Za-z_][^\n;{}#]*?\b(dsc_(?!_)\w+)\(", code(block), flags=re.M):
            if re.search(r"[;{]", code(block)[found.end():] + ";").group() == "{":
                continue  # an inline body speaks for itself
            before = block[:found.start()]
            after = block[found.start():].split(";")[1].split("\n")[0] if ";" in block[found.start():] else ""
            if "*/" not in before and "/*" not in after:
                bare.append(found.group(1))
    assert not bare, f"{name}: no comment says what these do: {bare}"


@pytest.mark.parametrize("name", [n for n in c_files() if n.endswith(".c")])
def test_file_scope_state_is_on_the_list(name):
    declared = state_of(code(read(name)))
    assert set(declared) <= STATE.get(name, set()), f"{name}: {declared}"


def state_of(text):
    """Names of mutable variables at file scope."""
    text = re.sub(r"_Atomic\((\w+)\)", r"_Atomic \1", text)
    variable = (r"^(?:static |_Thread_local )+(?!.*\b(?:const|inline)\b)[^(){};=\n]*?(\w+)"
                r"(?:\[[^\n]*\])?(?: = [^\n]*)?;$")
    plain = re.findall(variable, text, flags=re.M)
    structs = re.findall(r"^static struct \w* ?\{.*?^\} (\w+)", text, flags=re.M | re.S)
    return plain + structs


def test_the_rules_see_what_they_forbid():
    text = code('/* exit(1) */ int f(void) { puts("abort()"); p->free(x); dsc_free(x); exit (1); }')
    found = re.findall(r"(?<![\w.>])(exit|abort|free|puts)\s*\(", text)
    assert found == ["puts", "exit"]
    state = ("static int a;\nstatic const int b = 1;\nstatic _Atomic(sink) c;\nstatic struct {\n    int x;\n} d;\n"
             "static int f(int);\n")
    assert state_of(state + "static _Thread_local char e[8];\nstatic char *const g[] = {0};") == ["a", "c", "e", "d"]
