"""Dependencies of the C core point one way: a file includes only from its own layer or an earlier one."""
import posixpath
import re

import pytest
from tree import c_files, read

# From the bottom up. A name with a slash is a folder; others are the files <name>.c, .h and .def. A new file is
# named here by whoever adds it: that is the moment to decide where it stands.
LAYERS = [
    ("base", ["dsc", "status", "alloc", "log", "json"]),
    ("kernels and pure arithmetic", [
        "kernels/", "fpenv", "pool", "arena", "lr", "scaler", "clip", "shuffle", "partition", "space", "source", "wire",
        "file_io", "file_io_*", "memory_limit", "crc32c",
        "topo", "tensor", "optim", "lamb", "stepping", "config", "config_*",
    ]),
    ("communication", ["comm/"]),
    ("what the engine is made of", [
        "bucket", "bucket_*", "fetch", "spread", "store", "swap", "update", "moe", "moe_*", "shard", "shard_*",
        "save", "manifest", "manifest_*", "reader", "publish",
    ]),
    ("engine", ["engine", "engine_*", "plan"]),
    ("binding", ["bind/"]),
]
# Headers that only some files may include: what one module's files share among themselves.
PRIVATE = {
    "csrc/bucket_impl.h": r"csrc/bucket",
    "csrc/config_parts.h": r"csrc/config",
    "csrc/comm/backend.h": r"csrc/comm/",
    "csrc/comm/shm.h": r"csrc/comm/shm",
    "csrc/comm/delegate_impl.h": r"csrc/comm/delegate",
    "csrc/comm/tcp_impl.h": r"csrc/comm/tcp_",
    "csrc/file_io_impl.h": r"csrc/file_io",
    "csrc/manifest_impl.h": r"csrc/manifest",
    "csrc/kernels/tier.h": r"csrc/kernels/",
    "csrc/kernels/loops.h": r"csrc/kernels/isa_",
    "csrc/bind/bind.h": r"csrc/bind/",
}
# Outside headers with one place each.
OUTSIDE = {
    r"Python\.h|numpy/|dlpack/": r"csrc/bind/",
    r"cJSON\.h": r"csrc/(config|json)|csrc/bind/(bind\.h|config(_source)?\.[ch])",
    r"liburing\.h": r"csrc/file_io_ring\.c",
    r"\w*intrin\.h|arm_(?:neon|acle)\.h|cpuid\.h": r"csrc/(kernels|comm)/(isa_\w+|dispatch)\.c|csrc/fpenv\.h",
}


def layer_of(name):
    path = name.removeprefix("csrc/")
    for number, (_, members) in enumerate(LAYERS):
        for member in members:
            if member.endswith("/"):
                hit = path.startswith(member)
            else:
                hit = re.fullmatch(member.replace("*", r"\w+") + r"\.(c|h|def)", path)
            if hit:
                return number
    return None


def includes(name):
    """(path in the tree or None, text) of every #include of a file."""
    for quote, text in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', read(name), flags=re.M):
        yield (posixpath.normpath(posixpath.join(posixpath.dirname(name), text)) if quote == '"' else None), text


@pytest.mark.parametrize("name", c_files())
def test_a_file_has_a_layer_and_includes_only_what_is_not_above_it(name):
    own = layer_of(name)
    assert own is not None, f"{name} stands in no layer: name it in LAYERS"
    for path, text in includes(name):
        if path is not None:
            other = layer_of(path)
            assert other is not None, f"{name} includes {text}, which is not in the tree's layers"
            assert other <= own, f"{name} ({LAYERS[own][0]}) includes {text} ({LAYERS[other][0]})"


def test_private_headers_stay_private():
    wrong = [f"{name} includes {path}" for name in c_files() for path, _ in includes(name)
             if path in PRIVATE and not re.match(PRIVATE[path], name)]
    assert not wrong


def test_outside_headers_have_one_place():
    wrong = [f"{name} includes <{text}>" for name in c_files() for _, text in includes(name)
             for header, place in OUTSIDE.items() if re.match(header, text) and not re.match(place, name)]
    assert not wrong


def test_the_rule_sees_a_wrong_include():
    assert layer_of("csrc/kernels/adam.h") < layer_of("csrc/comm/shm.c") < layer_of("csrc/bucket_early.c")
    assert layer_of("csrc/bucket.h") < layer_of("csrc/engine.c") < layer_of("csrc/bind/engine.c")
    assert layer_of("csrc/surprise.c") is None
