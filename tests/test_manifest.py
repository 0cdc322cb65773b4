"""_core.Manifest, Reader and checkpoint_folder: what Python sees of a checkpoint's table and folder."""
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from deepspeed_c import _core

HERE = (0, 0)


def write_file(path, tensors):
    """A rank's file of {key: (dtype, tensor)}; (bytes, checksum of its head, {key: (offset, checksums)})."""
    writer = _core.ShardWriter(str(path))
    for key, (dtype, tensor) in tensors.items():
        writer.add(key, dtype, tuple(tensor.shape), tensor)
    writer.write(False)
    writer.wait()
    return writer.n_bytes, writer.header_crc, {key: (offset, crcs) for key, offset, _, crcs in writer.pieces()}


def checkpoint(folder):
    """A manifest of two files: "w" is 0 .. 999999 as a column-major matrix, in two parts, "b" a bool, "e" is empty."""
    w, b = torch.arange(1_000_000, dtype=torch.float32), torch.tensor([True, False, True])
    first = write_file(folder / "rank_00000.safetensors", {"model/w@0": ("F32", w[:400_000])})
    rest = {"model/w@400000": ("F32", w[400_000:]), "buffer/b": ("BOOL", b)}
    second = write_file(folder / "rank_00001.safetensors", rest)
    (folder / "objects.pt").write_bytes(b"objects")
    manifest = _core.Manifest()
    files = [manifest.add_file(f"rank_0000{i}.safetensors", *what[:2]) for i, what in enumerate((first, second))]
    assert manifest.add_file("objects.pt", 7, _core.crc32c(b"objects")) == 2
    (offset, crcs), (later, more) = first[2]["model/w@0"], second[2]["model/w@400000"]
    manifest.add_tensor("model", "w", HERE, "F32", (1000, 1000), (1, 1000), 0,
                        [(files[0], offset, 0, 400_000, crcs), (files[1], later, 400_000, 600_000, more)])
    offset, crcs = second[2]["buffer/b"]
    manifest.add_tensor("buffer", "b", HERE, "BOOL", [3], [1], -1, [(files[1], offset, 0, 3, crcs)])
    manifest.add_tensor("model", "e", (1, 2), "BF16", (0, 4), (4, 1), 1, [])
    manifest.set("counters", '{"global_steps": 9007199254740993, "x": 1.0}')
    return manifest


def test_a_manifest_keeps_what_it_was_given(tmp_path):
    text = checkpoint(tmp_path).text()
    manifest = _core.Manifest.parse(text, "manifest.json")
    assert manifest.text() == text and json.loads(text)["version"] == 1
    assert manifest.tensors() == [("model", "w", HERE, "F32", (1000, 1000), (1, 1000), 0),
                                  ("buffer", "b", HERE, "BOOL", (3,), (1,), -1),
                                  ("model", "e", (1, 2), "BF16", (0, 4), (4, 1), 1)]
    assert manifest.sections() == ["counters"] and manifest.section("none") is None
    assert manifest.section("counters") == '{"global_steps": 9007199254740993, "x": 1.0}'
    assert [name for name, *_ in manifest.files()] == [f"rank_0000{i}.safetensors" for i in range(2)] + ["objects.pt"]
    assert manifest.n_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert [piece[0::2] for piece in manifest.pieces("model", "w", HERE)] == [(0, 0), (1, 400_000)]
    with pytest.raises(KeyError, match=r"model/e of place \(0, 0\)"):
        manifest.pieces("model", "e", HERE)
    with pytest.raises(RuntimeError, match="closed"):
        manifest.set("more", "1")


def test_wrong_calls_say_what_is_allowed(tmp_path):
    manifest = _core.Manifest()
    with pytest.raises(ValueError, match='section "s": not JSON at byte 1'):
        manifest.set("s", "{")
    with pytest.raises(ValueError, match=r'"\.\./x" is no name of a file'):
        manifest.add_file("../x", 10, 0)
    with pytest.raises(OverflowError):
        manifest.add_file("x", -1, 0)
    manifest.add_file("x", 4, 0)
    call = {"kind": "model", "name": "w", "place": HERE, "dtype": "F32", "shape": [1], "stride": [1], "group": 0,
            "pieces": [(0, 0, 0, 1, [5])]}
    for change, says in (({"dtype": "F33"}, 'dtype is "F33"'), ({"stride": [1, 1]}, "1 dimensions and 2 strides"),
                         ({"pieces": []}, "end at element 0 of 1"), ({"pieces": [(1, 0, 0, 1, [5])]}, "file 1 of 1"),
                         ({"pieces": [(0, 0, 0, 1, [1 << 32])]}, "32 bits"), ({"shape": [1] * 65}, "at most 64")):
        with pytest.raises(ValueError, match=re.escape(says)):
            manifest.add_tensor(**{**call, **change})
    with pytest.raises(TypeError, match="place must be a tuple"):
        manifest.add_tensor(**{**call, "place": 0})
    assert manifest.tensors() == []
    manifest.add_tensor(**call)
    with pytest.raises(ValueError, match="stands twice"):
        manifest.add_tensor(**call)


def test_damage_is_a_checkpoint_error_with_the_path(tmp_path):
    text = bytearray(checkpoint(tmp_path).text())
    for i in range(0, len(text), 37):
        text[i] ^= 1
        with pytest.raises(_core.CheckpointError, match="^some/manifest.json: "):
            _core.Manifest.parse(bytes(text), "some/manifest.json")
        text[i] ^= 1
    with pytest.raises(TypeError):
        _core.Manifest.parse(str(text), "m")


def test_ranges_come_into_tensors_and_only_their_files_are_needed(tmp_path):
    manifest = checkpoint(tmp_path)
    reader = manifest.open(tmp_path)
    out = torch.empty(300_001)
    reader.read("model", "w", HERE, 399_999, 300_001, out)
    assert torch.equal(out, torch.arange(399_999, 700_000, dtype=torch.float32))
    raw = torch.empty(8, dtype=torch.uint8)
    reader.read("model", "w", HERE, 5, 2, raw)
    assert raw.view(torch.float32).tolist() == [5.0, 6.0]
    flags = torch.empty(3, dtype=torch.bool)
    reader.read("buffer", "b", HERE, 0, 3, flags)
    assert flags.tolist() == [True, False, True]
    reader.read("model", "e", (1, 2), 0, 0, torch.empty(0, dtype=torch.bfloat16))
    for wrong in (torch.empty(2, dtype=torch.int32), torch.empty(3), torch.empty(4)[::2]):
        with pytest.raises(ValueError, match="2 elements of model/w need 8 contiguous bytes"):
            reader.read("model", "w", HERE, 0, 2, wrong)
    with pytest.raises(ValueError, match="it has 1000000"):
        reader.check("model", "w", HERE, 999_999, 2)
    with pytest.raises(KeyError, match="model/v"):
        reader.check("model", "v", HERE, 0, 1)
    os.unlink(tmp_path / "rank_00000.safetensors")
    reader = manifest.open(tmp_path)
    reader.check("model", "w", HERE, 400_000, 600_000)
    with pytest.raises(FileNotFoundError, match="model/w.*rank_00000"):
        reader.check("model", "w", HERE, 399_999, 1)


def test_verify_reports_progress_and_names_what_is_damaged(tmp_path):
    manifest, seen = checkpoint(tmp_path), []
    manifest.open(tmp_path).verify(seen.append)
    assert seen == sorted(seen) and seen[-1] == manifest.n_bytes
    with pytest.raises(ZeroDivisionError):
        manifest.open(tmp_path).verify(lambda done: 1 / 0)
    for name, offset, says in (("rank_00001.safetensors", 2_000_000, "model/w"), ("objects.pt", 3, "objects.pt"),
                               ("rank_00000.safetensors", 100, "header")):
        with open(tmp_path / name, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)
            file.seek(offset)
            file.write(bytes([byte[0] ^ 8]))
        with pytest.raises(_core.CheckpointError) as raised:
            manifest.open(tmp_path).verify()
        assert name in str(raised.value) and says in str(raised.value)
        with open(tmp_path / name, "r+b") as file:
            file.seek(offset)
            file.write(byte)
    reader = manifest.open(tmp_path)
    reader.check_file("objects.pt")
    with pytest.raises(KeyError, match="no file other"):
        reader.check_file("other")


def test_a_manifest_of_other_files_is_seen(tmp_path):
    n_bytes, crc, table = write_file(tmp_path / "r.safetensors", {"model/w": ("F32", torch.arange(8.0))})
    offset = table["model/w"][0]
    for size, head, first, says in ((n_bytes + 4, crc, offset, f"{n_bytes + 4} were written"),
                                    (n_bytes, crc ^ 1, offset, "header"), (n_bytes, crc, offset + 4, f"{offset + 4}")):
        manifest = _core.Manifest()
        manifest.add_file("r.safetensors", size, head)
        n = (size - first) // 4
        manifest.add_tensor("model", "w", HERE, "F32", (n,), (1,), 0, [(0, first, 0, n, [0])])
        with pytest.raises(_core.CheckpointError) as raised:
            manifest.open(tmp_path).check("model", "w", HERE, 0, 1)
        assert "model/w" in str(raised.value) and "r.safetensors" in str(raised.value) and says in str(raised.value)


def test_the_documented_reader_reads_it(tmp_path, root):
    page = (root / "docs" / "checkpoint.md").read_text()
    code = re.search(r"```python\n(.*?)```", page, flags=re.S).group(1)
    names = {}
    exec(code, names)
    assert names["crc32c"](b"123456789") == 0xE3069283 == _core.crc32c(b"123456789")
    data = torch.arange(2000, dtype=torch.float32)
    n_bytes, crc, table = write_file(tmp_path / "r.safetensors", {"model/w": ("F32", data)})
    manifest = _core.Manifest()
    manifest.add_file("r.safetensors", n_bytes, crc)
    offset, crcs = table["model/w"]
    manifest.add_tensor("model", "w", HERE, "F32", (40, 50), (1, 40), 0, [(0, offset, 0, 2000, crcs)])
    (tmp_path / "manifest.json").write_bytes(manifest.text())
    expected = np.arange(2000, dtype=np.float32).reshape(50, 40).T
    assert np.array_equal(names["read_tensor"](tmp_path, "model", "w"), expected)


# ---- folders ----


def test_a_folder_is_there_when_it_is_published(tmp_path):
    folder = _core.checkpoint_folder(tmp_path / "new" / "dir", "step 1")
    assert os.path.isabs(folder.path) and os.listdir(folder.path) == []
    folder.write("manifest.json", b"{}")
    with open(os.path.join(folder.path, "more"), "w") as file:
        file.write("x")
    folder.publish(latest=True, beside={"zero_to_fp32.py": b"#!/usr/bin/env python"})
    directory = tmp_path / "new" / "dir"
    assert sorted(os.listdir(directory)) == ["latest", "step 1", "zero_to_fp32.py"]
    assert (directory / "latest").read_text() == "step 1" and os.access(directory / "zero_to_fp32.py", os.X_OK)
    assert sorted(os.listdir(directory / "step 1")) == ["manifest.json", "more"]
    with pytest.raises(RuntimeError, match="published or abandoned"):
        folder.publish(True)
    folder.abandon()
    second = _core.checkpoint_folder(directory, "two")
    with pytest.raises(RuntimeError, match='another save of tag "two"'):
        _core.checkpoint_folder(directory, "two")
    second.write("manifest.json", b"{}")
    second.publish(False)
    assert (directory / "latest").read_text() == "step 1" and (directory / "two").is_dir()


def test_what_is_abandoned_or_dropped_is_gone(tmp_path):
    for drop in ("abandon", None):
        folder = _core.checkpoint_folder(tmp_path, "t")
        folder.write("manifest.json", b"{}")
        if drop:
            folder.abandon()
        del folder
        assert os.listdir(tmp_path) == []
    with pytest.raises(ValueError, match='tag is "a/b"'):
        _core.checkpoint_folder(tmp_path, "a/b")
    (tmp_path / "file").write_text("x")
    with pytest.raises(NotADirectoryError, match="file"):
        _core.checkpoint_folder(tmp_path / "file" / "below", "t")


def test_debris_of_a_killed_process_goes_with_the_next_save(tmp_path, caplog):
    script = ("import os, signal\nfrom deepspeed_c import _core\n"
              f"folder = _core.checkpoint_folder({str(tmp_path)!r}, 'dead')\n"
              "folder.write('rank_00000.safetensors', b'x')\nos.kill(os.getpid(), signal.SIGKILL)\n")
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    assert os.listdir(tmp_path) == [".saving-dead"]
    folder = _core.checkpoint_folder(tmp_path, "t")
    assert os.listdir(tmp_path) == [".saving-t"]
    folder.abandon()
