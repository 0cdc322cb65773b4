"""Labelled images for the CIFAR-10 example, read without torchvision.

Sources, in this order: the folder, archive or parent folder that --data-dir names; an archive that an earlier run
downloaded; a download (CIFAR-10's own site, checked against its published MD5); scikit-learn's bundled digits,
enlarged to the shape of CIFAR's images, so that a machine without a network trains on real images too.
Nothing from a pickle is executed: the Python archives are read by an unpickler that knows NumPy arrays only.
"""
import hashlib
import io
import os
import pickle
import tarfile
import urllib.error
import urllib.request

import numpy as np
import torch

CIFAR_CLASSES = ("plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
URL = "https://www.cs.toronto.edu/~kriz/"
# Archive -> MD5, as the site publishes it: it guards against a broken transfer.
ARCHIVES = {
    "cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
    "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
}
RECORD = 1 + 3 * 32 * 32  # bytes of an image in the binary layout: label, then the red, green and blue planes
TIMEOUT_S = 8  # of connecting, and of each read


class Images(torch.utils.data.Dataset):
    """Images as bytes [n, 3, 32, 32] with labels [n]. A batch is one indexing operation, not n."""

    def __init__(self, pixels, labels, classes, source):
        self.pixels, self.labels = torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64))
        self.classes, self.source = classes, source

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return self.pixels[index], self.labels[index]

    def __getitems__(self, indices):
        return self.pixels[indices], self.labels[indices]

    def first(self, n):
        """The first n images; all of them if n is None or there are fewer."""
        return Images(self.pixels[:n].numpy(), self.labels[:n].numpy(), self.classes, self.source)


def whole_batch(batch):
    """collate_fn for Images: __getitems__ has put the batch together already."""
    return batch


def to_input(pixels, device, dtype):
    """Bytes 0..255 to numbers in [-1, 1]."""
    return (pixels.to(device, torch.float32) / 127.5 - 1).to(dtype)


# ---- finding ----


def load(data_dir, cache, may_download, say):
    """(training images, test images). `say` gets a sentence about where they come from.

    Where ranks share `cache`, one of them calls fetch() first; the others then find what it found.
    """
    if data_dir:
        return read(data_dir)
    if may_download:
        fetch(cache, say)
    if cached(cache):
        return read(cached(cache))
    say("No CIFAR-10 here and no network: training on scikit-learn's handwritten digits, enlarged to 3x32x32. "
        "--data-dir takes a folder with CIFAR-10's binary or Python files.")
    return digits()


def cached(cache):
    paths = (os.path.join(cache, name) for name in ARCHIVES)
    return next((path for path in paths if os.path.exists(path)), None)


def fetch(cache, say):
    """Download the binary archive into `cache` unless an archive is there; say so where that fails."""
    name = next(iter(ARCHIVES))
    if cached(cache):
        return
    os.makedirs(cache, exist_ok=True)
    partial = os.path.join(cache, f"{name}.{os.getpid()}.partial")
    try:
        digest = hashlib.md5(usedforsecurity=False)
        with urllib.request.urlopen(URL + name, timeout=TIMEOUT_S) as answer, open(partial, "wb") as out:
            say(f"Downloading {URL + name} (170 MB)")
            while block := answer.read(1 << 20):
                digest.update(block)
                out.write(block)
        if digest.hexdigest() != ARCHIVES[name]:
            say(f"{URL + name} came with MD5 {digest.hexdigest()}, not {ARCHIVES[name]}: not used")
        else:
            os.rename(partial, os.path.join(cache, name))
    except (OSError, urllib.error.URLError) as error:
        say(f"{URL + name} could not be downloaded: {error}")
    finally:
        if os.path.exists(partial):
            os.remove(partial)


# ---- reading ----


def read(place):
    """CIFAR-10 from a folder, its parent, or a .tar.gz, in the binary or the Python layout."""
    names = files_of(place)
    binary = sorted(name for name in names if name.startswith("data_batch_") and name.endswith(".bin"))
    pickled = sorted(name for name in names if name.startswith("data_batch_") and name[11:].isdigit())
    for train, test, decode in ((binary, "test_batch.bin", decode_binary), (pickled, "test_batch", decode_python)):
        if train and test in names:
            parts = [decode(names[name](), name) for name in train]
            train_set = tuple(np.concatenate(arrays) for arrays in zip(*parts))
            return tuple(Images(*arrays, CIFAR_CLASSES, f"CIFAR-10 from {place}")
                         for arrays in (train_set, decode(names[test](), test)))
    raise SystemExit(f"{place} holds neither CIFAR-10's binary files (data_batch_1.bin ..., test_batch.bin) nor its "
                     "Python files (data_batch_1 ..., test_batch), nor one of its .tar.gz archives")


def files_of(place):
    """{file name: function that gives its bytes}."""
    if os.path.isfile(place):
        return files_of_archive(place)
    if not os.path.isdir(place):
        raise SystemExit(f"--data-dir {place}: there is no such folder or archive")
    inner = [os.path.join(place, name) for name in ("cifar-10-batches-bin", "cifar-10-batches-py")]
    folder = next((path for path in inner if os.path.isdir(path)), place)
    archive = cached(place)
    if folder == place and archive:
        return files_of_archive(archive)

    def reader(path):
        def whole():
            with open(path, "rb") as data:
                return data.read()
        return whole

    return {name: reader(os.path.join(folder, name)) for name in os.listdir(folder)}


def files_of_archive(path):
    """The same for a .tar.gz, which is read once, front to back, and unpacked in memory only."""
    held = {}
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                name = os.path.basename(member.name)
                if member.isfile() and name.startswith(("data_batch_", "test_batch")):
                    held[name] = archive.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise SystemExit(f"{path} is not a readable .tar.gz: {error}") from error
    return {name: (lambda data=data: data) for name, data in held.items()}


def decode_binary(data, name):
    if not data or len(data) % RECORD:
        raise SystemExit(f"{name} has {len(data)} bytes, no multiple of {RECORD}: it is cut off or not CIFAR-10")
    records = np.frombuffer(data, np.uint8).reshape(-1, RECORD)
    return checked(records[:, 1:], records[:, 0], name)


def decode_python(data, name):
    try:
        batch = ArraysOnly(io.BytesIO(data), encoding="latin1").load()
        return checked(np.asarray(batch["data"], np.uint8), np.asarray(batch["labels"], np.uint8), name)
    except (pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
        raise SystemExit(f"{name} is not a batch of CIFAR-10's Python archive: {error}") from error


def checked(pixels, labels, name):
    if not len(labels) or pixels.shape != (len(labels), RECORD - 1) or labels.max() > 9:
        raise SystemExit(f"{name} is not CIFAR-10: pixels {pixels.shape}, labels {labels.shape} of 0 to 9 expected")
    return pixels.reshape(-1, 3, 32, 32).copy(), labels.copy()


class ArraysOnly(pickle.Unpickler):
    """An unpickler for NumPy arrays in plain containers; anything else in the stream is refused."""

    ALLOWED = {("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}

    def find_class(self, module, name):
        if (module, name) in self.ALLOWED:
            return self.ALLOWED[module, name]
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np.empty(0).__reduce__()[0]  # wherever this NumPy keeps it
        raise pickle.UnpicklingError(f"it wants to call {module}.{name}")


def digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 grey, each pixel as a 4x4 square: 1,438 to train, 359 to test."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    grey = np.kron(data.images[order] * (255 / 16), np.ones((1, 4, 4))).round().astype(np.uint8)
    pixels, labels = np.repeat(grey[:, None], 3, axis=1), data.target[order]
    n_test = len(labels) // 5
    parts = ((pixels[n_test:], labels[n_test:]), (pixels[:n_test], labels[:n_test]))
    return tuple(Images(*part, tuple("0123456789"), "scikit-learn's digits") for part in parts)
