"""One rank's file of a checkpoint, from Python: what other tools read, what goes wrong, a writer that is killed."""
import gc
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

from deepspeed_c import CheckpointError, _core

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
          "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}


def tensors_of(n):
    """One tensor of each element type, n elements, and one with none."""
    made = {f"model/{name}": (name, torch.arange(n).remainder(127).to(dtype)) for name, dtype in DTYPES.items()}
    return {**made, "model/none": ("F32", torch.empty(0, 4))}


def writer_of(path, tensors):
    writer = _core.ShardWriter(path)
    for key, (dtype, tensor) in tensors.items():
        writer.add(key, dtype, tuple(tensor.shape), tensor)
    return writer


def header_of(path):
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        return 8 + length, json.loads(file.read(length))


def read(path, tensors):
    """Reads by the layout's own definition, without any code of the project."""
    begin, header = header_of(path)
    data = path.read_bytes()[begin:]
    assert header.pop("__metadata__") == {"format": "deepspeed_c", "version": "1"}
    assert set(header) == set(tensors)
    for key, (dtype, tensor) in tensors.items():
        entry = header[key]
        first, last = entry["data_offsets"]
        assert (entry["dtype"], entry["shape"]) == (dtype, list(tensor.shape))
        assert data[first:last] == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    assert sum(e["data_offsets"][1] - e["data_offsets"][0] for e in header.values()) == len(data)


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_file_is_what_the_layout_says(tmp_path, snapshot):
    path, tensors = tmp_path / "x.safetensors", tensors_of(1001)
    writer = writer_of(path, tensors)
    writer.write(snapshot)
    writer.wait()
    assert writer.done() and sorted(os.listdir(tmp_path)) == ["x.safetensors"]
    read(path, tensors)
    begin, header = header_of(path)
    assert begin % 4096 == 0 and writer.n_bytes == path.stat().st_size
    data = path.read_bytes()
    assert writer.header_crc == _core.crc32c(data[:begin])
    pieces = writer.pieces()
    assert [piece[0] for piece in pieces] == [key for key in header if key != "__metadata__"]
    for key, offset, n_bytes, crcs in pieces:
        assert [offset - begin, offset - begin + n_bytes] == header[key]["data_offsets"]
        assert crcs == ([_core.crc32c(data[offset:offset + n_bytes])] if n_bytes else [])
        assert offset % tensors[key][1].element_size() == 0


def test_the_safetensors_package_reads_it(tmp_path):
    path, tensors = tmp_path / "x.safetensors", tensors_of(77)
    writer_of(path, tensors).write(False)
    found = safetensors.torch.load_file(path)
    assert set(found) == set(tensors)
    assert all(torch.equal(found[key], tensor) for key, (_, tensor) in tensors.items())


def test_checksums_are_kept_for_each_mib(tmp_path):
    big = torch.arange(700_000, dtype=torch.float32)
    writer = writer_of(tmp_path / "x", {"big": ("F32", big)})
    writer.write(True)
    (_, _, n_bytes, crcs), = writer.pieces()
    data = big.numpy().tobytes()
    assert n_bytes == 2_800_000
    assert crcs == [_core.crc32c(data[at:at + (1 << 20)]) for at in range(0, n_bytes, 1 << 20)]
    assert _core.crc32c(data) == _core.crc32c(data[1000:], _core.crc32c(data[:1000]))
    writer.wait()


def test_a_snapshot_is_taken_when_write_returns(tmp_path):
    tensor = torch.ones(3_000_000)
    writer = writer_of(tmp_path / "x", {"x": ("F32", tensor)})
    writer.write(snapshot=True)
    tensor.zero_()
    writer.wait()
    assert (torch.frombuffer(bytearray((tmp_path / "x").read_bytes()), dtype=torch.float32, offset=4096) == 1).all()


def test_tensors_are_read_where_they_lie_until_they_are_detached(tmp_path):
    tensor = torch.ones(30_000_000)
    count = sys.getrefcount(tensor)
    writer = writer_of(tmp_path / "x", {"x": ("F32", tensor)})
    with pytest.raises(RuntimeError, match="start"):
        writer.detach()
    writer.start()
    assert sys.getrefcount(tensor) == count + 1
    with pytest.raises(RuntimeError, match="written already"):
        writer.start()
    writer.detach()
    assert sys.getrefcount(tensor) == count
    pieces = writer.pieces()
    tensor.zero_()
    writer.wait()
    assert writer.pieces() == pieces
    assert (torch.frombuffer(bytearray((tmp_path / "x").read_bytes()), dtype=torch.float32, offset=4096) == 1).all()
    writer = writer_of(tmp_path / "y", {"y": ("F32", tensor)})
    writer.start()
    del writer  # which waits
    assert sys.getrefcount(tensor) == count and (tmp_path / "y").exists()


def test_a_view_of_another_type_is_written_as_it_is_described(tmp_path):
    flat = torch.arange(6, dtype=torch.bfloat16)
    writer = _core.ShardWriter(str(tmp_path / "x"))
    writer.add("x", "BF16", [2, 3], flat)
    writer.add("y", "BF16", (6,), flat.view(torch.uint8))
    writer.write(False)
    _, header = header_of(tmp_path / "x")
    assert header["x"]["shape"] == [2, 3] and header["y"]["shape"] == [6]


def test_arguments_that_do_not_fit_are_errors_that_name_them(tmp_path):
    writer = _core.ShardWriter(tmp_path / "x")
    x = torch.zeros(4, 4)
    for error, says, args in [
            (ValueError, "dtype 'F31'", ("k", "F31", (4, 4), x)),
            (ValueError, "k: dtype and shape have 32 bytes, the tensor's memory has 64", ("k", "F16", (4, 4), x)),
            (ValueError, "contiguous", ("k", "F32", (4, 4), x.t()[:, :2].expand(4, 2))),
            (ValueError, "shape", ("k", "F32", (1,) * 65, x)),
            (OverflowError, None, ("k", "F32", (-4, 4), x)),
            (ValueError, "2\\^63", ("k", "F32", (1 << 62, 4), x)),
            (TypeError, None, ("k", "F32", (4.0, 4), x)),
            (TypeError, None, ("k", "F32", 4, x)),
            (TypeError, "tensor", ("k", "F32", (4, 4), None))]:
        with pytest.raises(error, match=says):
            writer.add(*args)
    writer.add("k", "F32", (4, 4), x)
    writer.add("k", "F32", (4, 4), x)
    with pytest.raises(ValueError, match="two tensors have the key k"):
        writer.write(False)
    assert not os.listdir(tmp_path)
    for what in (writer.wait, writer.pieces, lambda: writer.header_crc, lambda: writer.n_bytes):
        with pytest.raises(RuntimeError, match="write"):
            what()
    assert issubclass(CheckpointError, RuntimeError)


def test_a_writer_writes_once_and_lets_go_of_its_tensors(tmp_path):
    tensor = torch.zeros(10)
    count = sys.getrefcount(tensor)
    writer = writer_of(tmp_path / "x", {"x": ("F32", tensor)})
    assert sys.getrefcount(tensor) == count + 1
    writer.write(True)
    assert sys.getrefcount(tensor) == count
    with pytest.raises(RuntimeError, match="written already"):
        writer.write(False)
    with pytest.raises(RuntimeError, match="written already"):
        writer.add("y", "F32", (10,), tensor)
    writer.wait()


def test_progress_is_reported_and_its_error_ends_the_write(tmp_path):
    tensors = {"x": ("U8", torch.zeros(100 << 20, dtype=torch.uint8))}
    told = []
    writer_of(tmp_path / "x", tensors).write(False, told.append)
    assert told == sorted(told) and 2 <= len(told) <= 4 and told[-1] <= (100 << 20) + 4096

    def fail(n_bytes):
        raise KeyError(n_bytes)

    writer = writer_of(tmp_path / "y", tensors)
    with pytest.raises(KeyError):
        writer.write(False, fail)
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("snapshot", [False, True])
def test_what_the_system_refuses_is_an_oserror_with_path_and_errno(tmp_path, snapshot):
    tensors = {"x": ("F32", torch.zeros(1 << 20))}
    before = _core.alloc_counters()["n_bytes"]
    writer = writer_of(tmp_path / "none" / "x", tensors)
    with pytest.raises(FileNotFoundError, match="none/x"):
        writer.write(snapshot)
        writer.wait()
    with pytest.raises(FileNotFoundError):
        writer.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        writer = writer_of(tmp_path / "x", tensors)
        with pytest.raises(OSError, match="File too large") as caught:
            writer.write(snapshot)
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(tmp_path / "x") in str(caught.value)
    assert not os.listdir(tmp_path)
    del writer, caught
    gc.collect()
    assert _core.alloc_counters()["n_bytes"] <= before


WRITER = """
import sys, torch
from deepspeed_c import _core
x = torch.arange(8 << 20, dtype=torch.int32)
for i in range(1000):
    writer = _core.ShardWriter(f"{sys.argv[1]}/{i}")
    writer.add("x", "I32", x.shape, x)
    writer.write(i % 2 == 1)
    writer.wait()
    print(i, flush=True)
"""


def test_a_killed_writer_leaves_whole_files_and_parts(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, tmp_path], stdout=subprocess.PIPE, text=True)
    for _ in range(3):
        last = int(process.stdout.readline())
    time.sleep(0.013)  # anywhere in the next ones
    process.send_signal(signal.SIGKILL)
    last = max([last, *map(int, process.stdout.read().split())])
    process.wait()
    whole = torch.arange(8 << 20, dtype=torch.int32).numpy().tobytes()
    named = sorted(int(name) for name in os.listdir(tmp_path) if not name.endswith(".part"))
    assert named in ([*range(last + 1)], [*range(last + 2)])
    for i in named[-2:]:
        begin, _ = header_of(tmp_path / str(i))
        assert (tmp_path / str(i)).read_bytes()[begin:] == whole
