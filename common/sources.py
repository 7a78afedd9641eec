"""Data sets: what `--data` takes, found, indexed and read.

A `Source` knows its classes, labels and how to read image i. `--data` takes:
    shapes          the built-in data set
    FOLDER          with train/CLASS/... and val/CLASS/...
    FILE.tar        one archive holding train/CLASS/... and val/CLASS/..., or a tar of class tars (ImageNet's train
                    archive; give the validation set with --val-data); read in place
    NAME:FOLDER     cifar10, cifar100, flowers102, cars, food101, aircraft, dtd, pets, eurosat, sun397: the files as
                    torchvision lays them out; inat2018, inat2019: the competition's files; cog1 to cog5: ImageNet-CoG's
                    levels, ImageNet-21k's folders and the two split files
    ...@LEVEL       labels of another level: cifar100@coarse:FOLDER, inat2018@genus:FOLDER, shapes@coarse, or
                    FOLDER@coarse with --coarse-labels
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import stat
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from pickle import PickleError

import numpy as np
import torch
from torchvision import datasets
from tqdm import tqdm

from common import images, shapes
from common.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
JUNK = re.compile(r"(^|/)(\.|(__MACOSX|@eaDir|lost\+found|Thumbs\.db|desktop\.ini)(/|\Z))")  # as a part of a path
MAX_FILE_BYTES = 1 << 30
TREE = "expected FOLDER/train/CLASS/IMAGE and FOLDER/val/CLASS/IMAGE, or a .tar holding the same"
Labels = tuple[list[str], np.ndarray]  # class names in label order, labels int64 (N,)
Say = Callable[[str], None]


class Source:
    """A labelled set of images: `classes` and `labels`, and in `levels` those of every label level by its name.

    For messages images have `names`, bytes (N,), behind the `title`, or None and only their number.
    """

    title, names, sizes = "data", None, None

    def __init__(self, classes: list[str], labels: np.ndarray, levels: dict[str, Labels] | None = None):
        self.classes, self.labels = list(classes), np.asarray(labels, dtype=np.int64)
        self.levels = {"fine": (self.classes, self.labels)} | (levels or {})
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(bad):
            raise UserError(f"{self.name(bad[0])}: label {self.labels[bad[0]]} is outside 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def at_level(self, level: str | None) -> Source:
        """The same images with the labels of `level` (None: as they are)."""
        if level is not None:
            if level not in self.levels:
                hint = "; give --coarse-labels FILE" if level == "coarse" else ""
                raise UserError(f"--data: no label level {level!r} here, there is: {', '.join(self.levels)}{hint}")
            self.classes, self.labels = self.levels[level]
        return self

    def name(self, index: int) -> str:
        """What a message calls image `index`."""
        if self.names is None:
            return f"{self.title} image {index}"
        return self.title + os.fsdecode(bytes(self.names[index]))

    def read(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 (3, H, W)."""
        stored = self.stored(index)
        return images.decode(stored) if isinstance(stored, bytes) else images.from_numpy(stored)

    def stored(self, index: int) -> bytes | np.ndarray:
        """Image `index` as it is stored: a file's bytes, or pixels, uint8 (H, W, 3)."""
        raise NotImplementedError

    def content(self) -> str:
        """Changes when a pixel of any image changes, or their order; reads them all, without decoding."""
        digests = (hashlib.sha256(self.stored(i)).digest() for i in range(len(self)))
        return hashlib.sha256(b"".join(digests)).hexdigest()

    def digest(self) -> str:
        """Changes when an image is added, removed, renamed or relabelled."""
        files = b"".join(array.tobytes() for array in (self.names, self.sizes) if array is not None)
        classes = "".join(self.classes).encode(errors="surrogateescape")
        return hashlib.sha256(self.labels.tobytes() + (files or str(len(self)).encode()) + classes).hexdigest()[:16]


class Arrays(Source):
    """Images held in memory: uint8 (N, H, W, 3), as CIFAR's."""

    def __init__(self, title: str, pixels: np.ndarray, classes: list[str], labels: np.ndarray, levels=None):
        self.title, self.pixels = title, pixels
        super().__init__(classes, labels, levels)

    def stored(self, index: int) -> np.ndarray:
        return np.ascontiguousarray(self.pixels[index])


class Shapes(Source):
    """The built-in data set, `split` "train" or "val"."""

    def __init__(self, split: str):
        self.split, self.title = split, f"shapes {split}"
        fine = np.arange(shapes.TRAIN_IMAGES if split == "train" else shapes.VAL_IMAGES) % len(shapes.CLASSES)
        super().__init__(shapes.CLASSES, fine, {"coarse": (list(shapes.SHAPES), fine // len(shapes.TEXTURES))})

    def stored(self, index: int) -> np.ndarray:
        return shapes.draw(self.split, int(index))[0]


class Files(Source):
    """Image files below `root`; names: paths relative to it, bytes (N,) or a list."""

    def __init__(self, root: str | Path, names: np.ndarray | list[str], classes: list[str], labels, levels=None):
        self.title = os.path.join(root, "")
        self.names = np.array([os.fsencode(n) for n in names], dtype="S") if isinstance(names, list) else names
        super().__init__(classes, labels, levels)

    def stored(self, index: int) -> bytes:
        flags = os.O_RDONLY | os.O_NONBLOCK  # without O_NONBLOCK opening a pipe would wait for ever for a writer
        with open(os.open(self.name(index), flags), "rb", buffering=0) as file:
            state = os.fstat(file.fileno())
            if not stat.S_ISREG(state.st_mode):
                raise OSError("not a regular file")
            return _pread(file.fileno(), state.st_size, 0)


class TarMembers(Source):
    """Members of one tar, read in place: names bytes (N,), offsets and sizes int64 (N,)."""

    def __init__(self, path: str, names: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, classes, labels):
        self.path, self.title, self.pid = path, f"{path}: ", None
        self.names, self.offsets, self.sizes = names, offsets, sizes
        super().__init__(classes, labels)

    def stored(self, index: int) -> bytes:
        if self.pid != os.getpid():  # each worker opens its own
            self.fd, self.pid = os.open(self.path, os.O_RDONLY), os.getpid()
        return _pread(self.fd, int(self.sizes[index]), int(self.offsets[index]))


def _pread(fd: int, size: int, offset: int) -> bytes:
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size} bytes is more than the {MAX_FILE_BYTES} that one image may have")
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise OSError(f"file ends after {len(data)} of {size} bytes")
    return data


def open_data(
    spec: str, *, val_data: str | None = None, coarse_labels: str | None = None, classes: list[str] | None = None,
    splits: tuple[str, ...] = ("train", "val"), say: Say = print,
) -> dict[str, Source]:
    """The splits of a `--data` value (see the module docstring), labels of every split in the order of train's classes.

    classes: class names that fix the label order where train is not opened (a checkpoint's).
    Raises UserError, before anything is read, for whatever is missing or does not fit.
    """
    level, match = None, re.fullmatch(r"(.+?)@([a-z]+)(:.+)?", spec)  # NAME@LEVEL:FOLDER, shapes@LEVEL or FOLDER@LEVEL
    if match and (match[1] in NAMED or not match[3]) and not Path(spec).exists():
        spec, level = match[1] + (match[3] or ""), match[2]
    name, _, folder = spec.partition(":")
    path, found = Path(spec), {}
    for split in splits:
        order = classes or (found["train"].classes if "train" in found else None)
        if spec == "shapes":
            found[split] = Shapes(split)
        elif folder and name in NAMED:
            found[split] = _open_named(name, folder, split)
        elif not path.exists():
            known = f"; known data sets: shapes, {', '.join(f'{n}:FOLDER' for n in NAMED)}" if "/" not in spec else ""
            raise UserError(f"--data {spec}: no such file or folder ({TREE}){known}")
        elif split == "val" and val_data:
            found[split] = open_images(val_data, "--val-data", order, say)
        elif not path.is_dir():
            found[split] = _open_tar(str(path), split, order, say)
        elif (path / split).is_dir():
            if split != "train" and order is None and (path / "train").is_dir():
                order = _class_folders(path / "train")  # ids always come from train's folder names
            found[split] = open_images(str(path / split), f"--data {spec}", order, say)
        else:
            hint = " (or give --val-data PATH, or train without validation by --val-data none)"
            raise UserError(f"--data {spec}: no folder {split}/ in it; {TREE}{hint if split == 'val' else ''}")
    if coarse_labels:
        for source in found.values():
            source.levels["coarse"] = _coarse_level(coarse_labels, source)
    return {split: source.at_level(level) for split, source in found.items()}


def _coarse_level(file: str, source: Source) -> Labels:
    """Coarse classes and labels from a JSON object {class name: coarse class name}."""
    try:
        mapping = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--coarse-labels {file}: {error}") from None
    lost = [c for c in source.classes if not isinstance(mapping, dict) or c not in mapping]
    if lost:
        raise UserError(f"--coarse-labels {file}: no coarse class for {len(lost)} classes, e.g. {', '.join(lost[:5])}")
    coarse, to_coarse = np.unique([str(mapping[c]) for c in source.classes], return_inverse=True)
    return coarse.tolist(), to_coarse[source.labels]


# ---- Folders and tar archives; the cache of what they hold -----------------------------------------------------------


def open_images(path: str, flag: str, classes: list[str] | None = None, say: Say = print) -> Source:
    """One folder of class folders, or one tar of class folders or class tars, as a Source.

    classes fixes the labels. Folders named 0, 1, 2, ... that are not among them are label numbers (ImageNet-V2's).
    """
    if not Path(path).exists():
        raise UserError(f"{flag}: {path} does not exist")
    if not Path(path).is_dir():
        return _open_tar(path, None, classes, say)
    folders = _class_folders(path)
    if not folders:
        flat = sum(name.lower().endswith(EXTENSIONS) and not JUNK.search(name) for name in os.listdir(path))
        hint = "move each image into a folder of its class (ImageNet's validation set comes unsorted)"
        why = f"{flat} images but no class folders; {hint}" if flat else f"no class folders; {TREE}"
        raise UserError(f"{flag}: {path} holds {why}")
    # What changes when a file is added to or removed from the two top levels.
    times = [(folder, os.stat(os.path.join(path, folder)).st_mtime_ns) for folder in ["", *folders]]
    index = cached_index([os.path.realpath(path), times], path, lambda: _scan_folder(path), say)
    labels, names = index or (np.zeros(0, dtype=np.int64), np.zeros(0, dtype="S"))
    ignored = int(np.count_nonzero(labels < 0))
    labels, names = labels[ignored:], names[ignored:]
    counts = np.bincount(labels, minlength=len(folders))
    if not counts.all():
        raise UserError(f"{flag}: the class folder {os.path.join(path, folders[counts.argmin()])} holds no images")
    if ignored:
        say(f"{path}: {ignored} files ignored, their extension is not one of {' '.join(EXTENSIONS)}")
    return Files(path, names, *_fit_classes(folders, labels, classes, path, say))


def _fit_classes(folders: list[str], labels: np.ndarray, classes: list[str] | None, where: str, say: Say) -> Labels:
    """Classes and labels in the order of `classes` (None: the folder names' own order)."""
    numbers = bool(folders) and all(f.isdigit() for f in folders)
    if classes is None:
        if numbers and folders != sorted(folders, key=int):
            some = ", ".join(folders[:4])
            say(f"{where}: class folders are numbers; labels follow the order of their names: {some}, ...")
        return folders, labels
    extra, missing = sorted(set(folders) - set(classes)), sorted(set(classes) - set(folders))
    if numbers and extra == sorted(folders) and max(map(int, folders)) < len(classes):
        say(f"{where}: class folders are numbers and taken as labels 0..{len(classes) - 1}")
        return classes, np.array([int(f) for f in folders])[labels]
    if extra or missing:
        lists = (("only in train", missing), ("only here", extra))
        parts = [f"{title}: {', '.join(names[:5])} ({len(names)})" for title, names in lists if names]
        raise UserError(f"{where}: its classes are not those of the training set; {'; '.join(parts)}")
    place = {c: i for i, c in enumerate(classes)}
    return classes, np.array([place[f] for f in folders])[labels]


def _class_folders(path: str | Path) -> list[str]:
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not JUNK.search(e.name))


def _scan_folder(path: str) -> Iterator[tuple[int, bytes]]:
    """(label, name below `path`) of every image in a class folder, (-1, b"") for every other file there."""
    root = os.path.join(path, "")
    for label, folder in enumerate(_class_folders(path)):
        pending, seen = [root + folder], set()
        while pending:
            here = pending.pop()
            if (real := os.path.realpath(here)) in seen:  # a loop of links
                continue
            seen.add(real)
            for entry in os.scandir(here):
                if JUNK.search(entry.name):
                    continue
                if entry.is_dir():
                    pending.append(entry.path)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    raise UserError(f"{entry.path} is a link to nothing; repair or remove it")
                elif entry.name.lower().endswith(EXTENSIONS):
                    yield label, os.fsencode(entry.path[len(root) :])
                else:
                    yield -1, b""


def _open_tar(path: str, split: str | None, classes: list[str] | None, say: Say) -> Source:
    """`split`/CLASS/IMAGE of a tar (split None: CLASS/IMAGE, or CLASS.tar holding IMAGE)."""
    key = [os.path.realpath(path), os.stat(path).st_size, os.stat(path).st_mtime_ns]
    index = cached_index(key, path, lambda: _scan_tar(path), say)
    if not index:
        raise UserError(f"{path} holds no files")
    stored, offsets, sizes = index
    names = [os.fsdecode(name) for name in stored.tolist()]
    both = split is not None and any(name.startswith(("train/", "val/")) for name in names)
    if split == "val" and not both:
        hint = "give the validation set by --val-data PATH (none: train without)"
        raise UserError(f"--data {path}: the archive has no val/; {hint}")
    above = f"{split}/" if both else ""  # the class folder
    inside = [i for i, name in enumerate(names) if name.startswith(above) and "/" in name[len(above) :]]
    if both and not inside:
        raise UserError(f"--data {path}: no {split}/CLASS/IMAGE in this archive")
    if not inside:
        flat = sum(name.lower().endswith(EXTENSIONS) for name in names)
        raise UserError(f"{path}: {flat} images without a class folder; repack the archive as CLASS/IMAGE")
    inside = [i for i in inside if not JUNK.search(names[i])]
    chosen = np.array([i for i in inside if names[i].lower().endswith(EXTENSIONS)], dtype=np.int64)
    if len(chosen) < len(inside):
        ignored = len(inside) - len(chosen)
        say(f"{path}: {ignored} members ignored, their extension is not one of {' '.join(EXTENSIONS)}")
    folders, labels = np.unique([names[i][len(above) :].partition("/")[0] for i in chosen], return_inverse=True)
    order = np.argsort(labels, kind="stable")
    chosen, (classes, labels) = chosen[order], _fit_classes(folders.tolist(), labels[order], classes, path, say)
    return TarMembers(path, stored[chosen], offsets[chosen], sizes[chosen], classes, labels)


def _scan_tar(path: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of every member, those of inner .tar files as INNER/NAME; nothing is unpacked. Raises
    UserError for what is not a plain archive of regular files."""
    with open(path, "rb", buffering=512) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
        except tarfile.ReadError:
            hint = "compressed ones are not read: unpack it to a plain .tar"
            raise UserError(f"{path} is not a tar archive ({hint})") from None
        pending = [(0, os.fstat(file.fileno()).st_size, "")]
        while pending:
            at, stop, folder = pending.pop()
            while at + 512 <= stop:
                file.seek(at)
                try:
                    member = tarfile.TarInfo.fromtarfile(tar)
                except tarfile.EOFHeaderError:  # a block of zeros
                    break
                except (tarfile.HeaderError, ValueError):
                    raise UserError(f"{path} is damaged at byte {file.tell() - 512}") from None
                name = folder + re.sub(r"^(\./)+", "", member.name)
                at, end = member.offset_data, member.offset_data + member.size
                if name[len(folder) :].startswith("/") or ".." in name.split("/"):
                    raise UserError(f"{path}: member {name} points outside the archive; repack it with relative names")
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    hint = "repack it with regular files only (tar --hard-dereference -h)"
                    raise UserError(f"{path}: member {name} is a link or device; {hint}")
                if not at <= end <= stop:
                    raise UserError(f"{path} is truncated: member {name} ends at byte {end}, the archive at {stop}")
                if name.endswith(".tar"):
                    pending.append((at, end, f"{name[:-4]}/"))
                elif member.size > MAX_FILE_BYTES:
                    limit = f"more than the {MAX_FILE_BYTES} that one image may have"
                    raise UserError(f"{path}: member {name} has {member.size} bytes, {limit}")
                else:
                    yield name.encode(errors="surrogateescape"), at, member.size
                at = -(-end // 512) * 512


def cache_folder() -> Path:
    """Where what can be computed again is kept: touvron-methods in $XDG_CACHE_HOME (~/.cache)."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder == "~/.cache":  # a user without a home
        hint = "set HOME or XDG_CACHE_HOME to a writable folder"
        raise UserError(f"there is no home folder to keep a cache in; {hint}")
    return Path(folder) / "touvron-methods"


def cache_file(key: list, suffix: str, folder: str = "") -> Path:
    """The file of the cache for what follows from `key`, by a hash of it."""
    return cache_folder() / folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + suffix)


def keep(file: Path, write: Callable) -> str:
    """Has `write(open file)` fill a file of the cache, all of it or none; returns "", or why it cannot be kept."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as out:
            write(out)
        os.replace(out.name, file)
        return ""
    except OSError as error:  # costs time only
        return f"nothing can be kept in {file.parent} ({error.strerror}): set XDG_CACHE_HOME to a writable folder"


def cached_index(key: list, path: str, scan: Callable[[], Iterator[tuple]], say: Say) -> list[np.ndarray]:
    """Columns of the sorted rows that a scan of `path` yields; from the cache where it holds them under `key`."""
    file = cache_file(key, ".npz")
    try:
        with np.load(file, allow_pickle=False) as stored:
            return list(stored.values())
    except Exception:  # absent, or cut short by a crash: either way it is built
        rows, said, terminal = [], time.monotonic(), sys.stderr.isatty()
    hidden = not terminal or os.environ.get("RANK", "0") != "0"
    for row in tqdm(scan(), f"listing {path}", unit=" files", leave=False, disable=hidden):
        rows.append(row)
        if not terminal and time.monotonic() > said + 10:
            say(f"listing {path}: {len(rows)} files so far")
            said = time.monotonic()
    columns = [np.array(column) for column in zip(*sorted(rows))]
    problem = keep(file, lambda out: np.savez(out, *columns))
    if problem:
        say(f"warning: {problem}; the images will be listed again at the next start")
    return columns


# ---- Data sets with a layout of their own ----------------------------------------------------------------------------


def _open_named(name: str, folder: str, split: str) -> Source:
    """A data set of NAMED; UserError saying what is expected where a file is missing or of another form."""
    where, (read, *options) = f"--data {name}:{folder}", NAMED[name]
    if not Path(folder).is_dir():
        raise UserError(f"{where}: there is no folder {folder}")
    try:
        return read(name, Path(folder), split, *options)
    except ImportError as e:
        raise UserError(f"{where}: torchvision needs {e.name} to read its labels; pip install {e.name}") from None
    except (OSError, EOFError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, PickleError) as error:
        said, expected = f"{type(error).__name__}: {error}".splitlines()[0], " ".join(read.__doc__.split())
        raise UserError(f"{where} has not the expected form ({said}); expected: {expected}") from None


def _cifar(name: str, folder: Path, split: str, make: type) -> Source:
    """torchvision's cifar-10-batches-py/ or cifar-100-python/."""
    data, levels = make(folder, train=split == "train"), None
    if name == "cifar100":  # its files are pickles; torchvision has just checked their MD5 sums
        paths = [folder / data.base_folder / file for file in ("train" if split == "train" else "test", "meta")]
        labels, names = (pickle.loads(path.read_bytes(), encoding="latin1") for path in paths)
        levels = {"coarse": (names["coarse_label_names"], np.array(labels["coarse_labels"]))}
    return Arrays(f"{name} {split}", data.data, data.classes, data.targets, levels)


def _torchvision(name: str, folder: Path, split: str, make: type, train: list[str], test: list[str]) -> Source:
    """torchvision's flowers-102/, stanford_cars/, food-101/, fgvc-aircraft-2013b/, dtd/ or oxford-iiit-pet/."""
    files, labels = [], []
    for part in train if split == "train" else test:
        data = make(folder, split=part)
        if hasattr(data, "_samples"):  # StanfordCars keeps pairs, the others two lists
            data._images, data._labels = zip(*data._samples)
        files += getattr(data, "_image_files", None) or data._images
        labels += data._labels
    classes = [str(c) for c in getattr(data, "classes", None) or range(max(labels) + 1)]
    return Files(folder, [os.path.relpath(f, folder) for f in files], classes, labels)


def _inaturalist(name: str, folder: Path, split: str, year: int) -> Source:
    """iNaturalist 2018/2019 by the competition's files: train_val{year}/, {train,val}{year}.json, categories.json."""
    listing = json.loads((folder / f"{split}{year}.json").read_text())
    categories = sorted(json.loads((folder / "categories.json").read_text()), key=lambda c: c["id"])
    file_of = {image["id"]: image["file_name"] for image in listing["images"]}
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    files = [file_of[a["image_id"]] for a in listing["annotations"]]
    labels = np.array([label_of[a["category_id"]] for a in listing["annotations"]])
    levels = {}
    for level in ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name"):
        if all(level in c for c in categories):
            values, to_level = np.unique([str(c[level]) for c in categories], return_inverse=True)
            levels["species" if level == "name" else level] = (values.tolist(), to_level[labels])
    return Files(folder, files, [str(c.get("name", c["id"])) for c in categories], labels, levels)


def _eurosat(name: str, folder: Path, split: str) -> Source:
    """EuroSAT (arXiv:1709.00029) as torchvision lays it out: eurosat/2750/CLASS/*.jpg."""
    # There is no official split. 30% of each class, drawn once and for all, are the test images: of the 27,000 images
    # 8,100, as many as in the transfer benchmarks.
    root, chosen = folder / "eurosat" / "2750", []
    whole = open_images(str(root), f"--data {name}:{folder}")
    for label in range(len(whole.classes)):
        mine = np.random.RandomState(label).permutation(np.flatnonzero(whole.labels == label))  # the same for ever
        test = int(round(0.3 * len(mine)))
        chosen += sorted(mine[test:] if split == "train" else mine[:test])
    return Files(root, whole.names[chosen], whole.classes, whole.labels[chosen])


def _sun397(name: str, folder: Path, split: str) -> Source:
    """SUN397 as torchvision lays it out, SUN397/ClassName.txt and SUN397/a/abbey/*.jpg, with the first of the ten
    official partitions, Training_01.txt and Testing_01.txt, in Partitions/, SUN397/ or the folder itself."""
    root, part = folder / "SUN397", "Training_01.txt" if split == "train" else "Testing_01.txt"
    classes = (root / "ClassName.txt").read_text().split()
    places = [place / part for place in (folder / "Partitions", root, folder)]
    names = next((place for place in places if place.is_file()), places[0]).read_text().split()
    label_of = {c: i for i, c in enumerate(classes)}
    labels = [label_of[n.rpartition("/")[0]] for n in names]
    return Files(root, [n.lstrip("/") for n in names], [c[1:] for c in classes], labels)


COG_LEVELS, COG_SPLITS = "cog_levels_mapping_file.pkl", "cog_concepts_split_file.pkl"


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; anything that would run code is refused."""

    def find_class(self, module, name):
        raise PickleError(f"it asks for {module}.{name}")


def _cog(name: str, folder: Path, split: str, level: int) -> Source:
    """One level of ImageNet-CoG (arXiv:2012.05649): ImageNet-21k's folders nXXXXXXXX/*.JPEG and the two split files,
    the levels' concepts (five lists) and {concept: {"train": [file names], "test" or "val": [...]}}."""
    levels, splits = (_PlainUnpickler((folder / file).open("rb")).load() for file in (COG_LEVELS, COG_SPLITS))
    concepts = sorted((list(levels.values()) if isinstance(levels, dict) else levels)[level - 1])
    parts = [splits[concept] for concept in concepts]
    files = [part["train"] if split == "train" else part.get("test", part.get("val")) for part in parts]
    names = [f"{c}/{str(name).rpartition('/')[2]}" for c, inside in zip(concepts, files) for name in inside]
    return Files(folder, names, concepts, np.repeat(np.arange(len(concepts)), [len(inside) for inside in files]))


NAMED: dict[str, tuple] = {  # reader and its options; torchvision's splits that the papers train on and test on
    "cifar10": (_cifar, datasets.CIFAR10), "cifar100": (_cifar, datasets.CIFAR100),
    "flowers102": (_torchvision, datasets.Flowers102, ["train", "val"], ["test"]),
    "cars": (_torchvision, datasets.StanfordCars, ["train"], ["test"]),
    "food101": (_torchvision, datasets.Food101, ["train"], ["test"]),
    "aircraft": (_torchvision, datasets.FGVCAircraft, ["trainval"], ["test"]),
    "dtd": (_torchvision, datasets.DTD, ["train", "val"], ["test"]),
    "pets": (_torchvision, datasets.OxfordIIITPet, ["trainval"], ["test"]),
    "inat2018": (_inaturalist, 2018), "inat2019": (_inaturalist, 2019), "eurosat": (_eurosat,), "sun397": (_sun397,),
    **{f"cog{level}": (_cog, level) for level in range(1, 6)},
}
