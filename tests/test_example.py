"""The CIFAR-10 example: its sources of images, its layers of settings, and whole runs on one and two ranks."""
import argparse
import functools
import hashlib
import http.server
import importlib
import io
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "examples" / "cifar10"
SCRIPT = FOLDER / "cifar10_deepspeed.py"


@pytest.fixture(scope="module")
def images():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("images")
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def script(images):
    return importlib.import_module("cifar10_deepspeed")


def pixels_of(n, shift=0):
    """Formula images: byte = (image * 7 + position + shift) mod 251, label = (image + shift) mod 10."""
    pixels = (np.arange(n)[:, None] * 7 + np.arange(3072)[None] + shift) % 251
    return pixels.astype(np.uint8), ((np.arange(n) + shift) % 10).astype(np.uint8)


def binary(n, shift=0):
    pixels, labels = pixels_of(n, shift)
    return np.concatenate([labels[:, None], pixels], axis=1).tobytes()


def old_pickle(n, shift=0):
    """What Python 2 wrote into the Python archive: protocol 2, byte strings, an ndarray's parts."""
    pixels, labels = pixels_of(n, shift)

    def text(value):
        return b"U" + bytes([len(value)]) + value

    array = (b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R("
             b"K\x01K" + bytes([n]) + b"M" + struct.pack("<H", 3072) + b"\x86cnumpy\ndtype\n" + text(b"u1")
             + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T"
             + struct.pack("<i", pixels.nbytes) + pixels.tobytes() + b"tb")
    numbers = b"](" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    return b"\x80\x02}(" + text(b"data") + array + text(b"labels") + numbers + b"u."


def write(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


LAYOUTS = {
    "binary": ("cifar-10-batches-bin", {"data_batch_1.bin": binary(5), "data_batch_2.bin": binary(3, 50),
                                        "test_batch.bin": binary(2, 90), "batches.meta.txt": b"names"}),
    "python": ("cifar-10-batches-py", {"data_batch_1": old_pickle(5), "data_batch_2": old_pickle(3, 50),
                                       "test_batch": old_pickle(2, 90), "batches.meta": b"not read"}),
}


def check_sets(train, test):
    expected = [np.concatenate(parts) for parts in zip(pixels_of(5), pixels_of(3, 50))]
    assert train.pixels.numpy().reshape(8, 3072).tolist() == expected[0].tolist()
    assert train.labels.tolist() == expected[1].tolist() and train.labels.dtype.itemsize == 8
    assert test.pixels.shape == (2, 3, 32, 32) and test.labels.tolist() == [0, 1]


# ---- sources of images ----


def test_a_place_without_images_is_named(images, tmp_path):
    with pytest.raises(SystemExit, match="nowhere: there is no such folder"):
        images.read(str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="holds neither"):
        images.read(str(tmp_path))
    (tmp_path / "x.tar.gz").write_bytes(b"no archive at all")
    with pytest.raises(SystemExit, match="not a readable .tar.gz"):
        images.read(str(tmp_path / "x.tar.gz"))


def test_a_file_that_is_cut_off_is_named(images, tmp_path):
    write(tmp_path, {"data_batch_1.bin": binary(4)[:-1], "test_batch.bin": binary(2)})
    with pytest.raises(SystemExit, match="data_batch_1.bin has 12291 bytes"):
        images.read(str(tmp_path))


def test_a_label_above_nine_is_refused(images, tmp_path):
    write(tmp_path, {"data_batch_1.bin": b"\x0a" + binary(1)[1:], "test_batch.bin": binary(2)})
    with pytest.raises(SystemExit, match="data_batch_1.bin is not CIFAR-10"):
        images.read(str(tmp_path))


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_a_pickle_that_calls_something_is_refused_and_not_executed(images, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, {"data_batch_1": pickle.dumps({"data": Evil(), "labels": [0]}), "test_batch": old_pickle(2)})
    with pytest.raises(SystemExit, match="it wants to call posix.mkdir"):
        images.read(str(tmp_path))
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_reads_the_same_from_its_folder_its_parent_and_its_archive(images, tmp_path, layout):
    name, files = LAYOUTS[layout]
    folder = write(tmp_path / name, files)
    archive = tmp_path / "elsewhere" / f"cifar-10-{layout}.tar.gz"
    archive.parent.mkdir()
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, name)
    for place in (folder, tmp_path, archive, archive.parent):
        check_sets(*images.read(str(place)))


def test_digits_are_real_images_of_ten_classes_in_cifar_s_shape(images):
    train, test = images.digits()
    assert (len(train), len(test)) == (1438, 359) and train.pixels.shape[1:] == (3, 32, 32)
    assert set(train.labels.tolist()) == set(test.labels.tolist()) == set(range(10))
    assert train.pixels.max() == 255 and train.pixels.min() == 0
    assert (train.pixels[:, 0] == train.pixels[:, 2]).all()


def test_first_gives_at_most_what_is_there(images):
    train, _ = images.digits()
    assert len(train.first(7)) == 7 and len(train.first(10**6)) == len(train.first(None)) == 1438


def test_input_spans_minus_one_to_one(images):
    import torch

    x = images.to_input(torch.tensor([0, 255], dtype=torch.uint8), "cpu", torch.float16)
    assert x.tolist() == [-1.0, 1.0] and x.dtype == torch.float16


# ---- the download ----


@pytest.fixture
def site(tmp_path_factory, images, monkeypatch):
    """A server on this machine that stands in for CIFAR-10's own site; gives the folder that it serves."""
    folder = tmp_path_factory.mktemp("site")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(images, "URL", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    thread.join()
    server.server_close()


def archive_bytes():
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for name, content in LAYOUTS["binary"][1].items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return data.getvalue()


def test_a_download_with_another_checksum_is_not_used_and_leaves_nothing(images, site, tmp_path):
    (site / "cifar-10-binary.tar.gz").write_bytes(archive_bytes())
    said = []
    train, _ = images.load(None, str(tmp_path / "cache"), True, said.append)
    assert "not c32a1d4ab5d03f1284b67883e8d87530: not used" in " ".join(said)
    assert "digits" in said[-1] and train.source == "scikit-learn's digits"
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_download_with_the_right_checksum_is_kept_and_not_fetched_again(images, site, tmp_path, monkeypatch):
    data = archive_bytes()
    (site / "cifar-10-binary.tar.gz").write_bytes(data)
    md5 = hashlib.md5(data, usedforsecurity=False).hexdigest()
    monkeypatch.setitem(images.ARCHIVES, "cifar-10-binary.tar.gz", md5)
    check_sets(*images.load(None, str(tmp_path / "cache"), True, [].append))
    (site / "cifar-10-binary.tar.gz").unlink()
    said = []
    check_sets(*images.load(None, str(tmp_path / "cache"), True, said.append))
    assert said == []


def test_no_network_means_digits_and_says_so(images, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "URL", "http://127.0.0.1:9/")  # the discard port: nobody listens
    said = []
    train, _ = images.load(None, str(tmp_path), True, said.append)
    assert len(train) == 1438 and "could not be downloaded" in said[0] and "digits" in said[1]


# ---- layers of settings ----


def options(**given):
    return argparse.Namespace(**{"deepspeed_config": None, "dtype": None, "stage": None, "seed": 0, **given})


@pytest.mark.parametrize("sections, dtype, expected", [
    ({}, None, "fp16"), ({}, "bf16", "bf16"), ({"bf16": {"enabled": True}}, None, "bf16"),
    ({"bf16": {"enabled": True}}, "fp32", "fp32"), ({"fp16": {"enabled": False}}, None, "fp32"),
])
def test_command_line_goes_over_file_and_file_over_defaults(script, tmp_path, sections, dtype, expected):
    in_file = {"gradient_clipping": 0.5, "optimizer": {"params": {"lr": 0.1}}, **sections}
    (tmp_path / "c.json").write_text(json.dumps(in_file))
    config, name = script.settings(options(deepspeed_config=str(tmp_path / "c.json"), dtype=dtype, stage=2))
    assert name == expected and config["zero_optimization"]["stage"] == 2 and config["gradient_clipping"] == 0.5
    assert config["optimizer"]["params"] == {"lr": 0.1, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}
    assert [config[n]["enabled"] for n in ("fp16", "bf16")] == [expected == "fp16", expected == "bf16"]
    assert script.DEFAULTS["gradient_clipping"] == 1.0  # merging changes no layer


def test_the_json_file_and_the_defaults_differ_in_the_stage_only(script):
    """run_ds.sh with the file trains as the script alone does, but for memory."""
    in_file = json.loads((FOLDER / "ds_config.json").read_text())
    assert in_file == {**script.DEFAULTS, "zero_optimization": {"stage": 1}}


# ---- whole runs ----


def run(command, **extra):
    environment = {**os.environ, "PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", **extra}
    return subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, timeout=240)


def figures(output):
    """What a run printed: (overall accuracy, images tested, accuracy by class, loss, samples per second)."""
    overall = re.search(r"Accuracy on (\d+) test images: ([\d.]+) %", output)
    classes = dict(re.findall(r"Accuracy of +(\S+): +([\d.]+) %", output))
    loss = re.search(r"mean of the last \d+ steps: ([\d.]+)", output)
    speed = re.search(r"(\d+) samples per second", output)
    return float(overall[2]), int(overall[1]), classes, float(loss[1]), float(speed[1])


def check_run(result, out, n_test, least):
    assert result.returncode == 0, result.stdout + result.stderr
    accuracy, n, classes, loss, speed = figures(result.stdout)
    assert n == n_test and len(classes) == 10 and loss > 0 and speed > 0
    assert accuracy >= least, result.stdout
    assert (out / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "curve.png" in result.stdout and "step" in result.stderr  # the bar goes to stderr


def test_a_wrong_option_is_refused(tmp_path):
    result = run([sys.executable, SCRIPT, "--epochs", 0])
    assert result.returncode == 2 and "--epochs is 0; at least 1 is needed" in result.stderr


def test_plain_pytorch_trains_on_cifar(cifar, tmp_path):
    result = run([sys.executable, SCRIPT, "-e", 3, "--train-samples", 2000, "--test-samples", 500, "--dtype", "fp32",
                  "--data-dir", cifar, "--out", tmp_path], OMP_NUM_THREADS="1")
    check_run(result, tmp_path, 500, least=18)
    assert "plain PyTorch, fp32, 1 rank;" in result.stdout


@pytest.mark.parametrize("dtype, stage", [
    ("fp16", 1), pytest.param("bf16", 2, marks=pytest.mark.long), ("fp32", 0),
    pytest.param("fp16", 3, marks=pytest.mark.long)])
def test_two_ranks_learn_digits_in_every_type(images, tmp_path, dtype, stage):
    result = run([FOLDER / "run_ds.sh", "--dtype", dtype, "--stage", stage, "-e", 5, "--out", tmp_path / "a b",
                  "--data-dir", digits_as_cifar(images, tmp_path)])
    check_run(result, tmp_path / "a b", 359, least=60)
    assert f"ZeRO stage {stage}, {dtype}, 2 ranks; 1438 images to train, 359 to test" in result.stdout


def digits_as_cifar(images, folder):
    """The digits in CIFAR's binary layout, so that no run of a test looks for a network."""
    for part, name in zip(images.digits(), ("data_batch_1.bin", "test_batch.bin")):
        labels, pixels = part.labels.numpy().astype(np.uint8)[:, None], part.pixels.numpy().reshape(len(part), -1)
        (folder / name).write_bytes(np.concatenate([labels, pixels], axis=1).tobytes())
    return folder


# ---- mixture of experts ----


def moe_run(name, images, folder, *arguments):
    """A short run on two ranks; 51 test images, so that one rank has one image again."""
    sharded = folder / "all_sharded.json"  # at stage 3 small parameters too
    sharded.write_text('{"zero_optimization": {"stage3_param_persistence_threshold": 0}}')
    command = [FOLDER / name, "--data-dir", digits_as_cifar(images, folder), "--train-samples", 320, "--test-samples",
               51, "-e", 1, "--log-interval", 10, "--out", folder, "--deepspeed_config", sharded, *arguments]
    result = run(command)
    assert result.returncode == 0, result.stdout + result.stderr
    accuracy, n, _, loss, speed = figures(result.stdout)
    assert n == 51 and 0 < loss < 3 and (folder / "curve.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    loads = re.findall(r"(\d+) images, load of the experts: (.*)", result.stdout)
    assert len(loads) == 2  # rank 0 alone says them
    return result.stdout, {int(n_seen): load_of(text) for n_seen, text in loads}


def load_of(text):
    """[[percent of each expert] of each layer] of a line."""
    return [[int(share) for share in re.findall(r"(\d+) %", layer)] for layer in text.split("; ")]


def test_experts_on_two_ranks_train_in_fp16_and_their_load_is_shown(images, tmp_path):
    said, loads = moe_run("run_ds_moe.sh", images, tmp_path, "--stage", 2)
    assert "ZeRO stage 2, layers of 2 experts, top-1, fp16, 2 ranks; 320 images" in said
    assert list(loads) == [160, 320]
    assert all(len(layer) == 2 and 99 <= sum(layer) <= 101 for load in loads.values() for layer in load)


@pytest.mark.long
def test_residual_layers_of_two_and_four_experts_train_in_bf16(images, tmp_path):
    said, loads = moe_run("run_ds_prmoe.sh", images, tmp_path, "--stage", 3, "--dtype", "bf16", "--top-k", 2)
    assert "ZeRO stage 3, residual layers of 2 and 4 experts, top-2, bf16, 2 ranks" in said
    assert [[len(layer) for layer in load] for load in loads.values()] == [[2, 4], [2, 4]]


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("script_name", ["run_ds_moe.sh", "run_ds_prmoe.sh"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_every_stage_choice_kind_and_type_of_experts_trains(images, tmp_path, stage, top_k, script_name, dtype):
    said, loads = moe_run(script_name, images, tmp_path, "--stage", stage, "--top-k", top_k, "--dtype", dtype)
    assert f"ZeRO stage {stage}, " in said and f"top-{top_k}, {dtype}, 2 ranks" in said and len(loads) == 2


def test_experts_on_two_ranks_without_deepspeed_are_refused(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--moe", "--num-experts", "4", "--ep-world-size", "2"])
    with pytest.raises(SystemExit):
        script.parse_arguments()
    assert "--ep-world-size is 2; the one process without --deepspeed needs 1" in capsys.readouterr().err


@pytest.mark.long
@pytest.mark.parametrize("interval, n_seen", [(5, 80), (100, 160)])
def test_experts_without_deepspeed_train_in_one_process(images, tmp_path, interval, n_seen):
    data = digits_as_cifar(images, tmp_path)
    result = run([sys.executable, SCRIPT, "--moe", "--num-experts", 4, "--top-k", 3, "--train-samples", 160, "-e", 1,
                  "--log-interval", interval, "--dtype", "bf16", "--data-dir", data, "--out", tmp_path],
                 OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert "layers of 4 experts, top-3, bf16, 1 rank" in result.stdout and f"{n_seen} images, load" in result.stdout


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_ten_epochs_reach_the_readme_s_floor(cifar, images, tmp_path, dtype):
    floors = [int(floor) for floor in re.findall(r"\| (\d+) % \|$", (FOLDER / "README.md").read_text(), flags=re.M)]
    for place, n_test, floor in ((cifar, 2000, floors[0]), (digits_as_cifar(images, tmp_path), 359, floors[1])):
        result = run([FOLDER / "run_ds.sh", "--dtype", dtype, "--data-dir", place, "--out", tmp_path])
        check_run(result, tmp_path, n_test, least=floor)
