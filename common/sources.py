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
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import numpy as np
import torch

from common import images, shapes
from common.errors import UserError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
JUNK = {"__MACOSX", "@eaDir", "lost+found", "Thumbs.db", "desktop.ini"}  # and every name that starts with a dot
MAX_FILE_BYTES = 1 << 30
TREE = "expected FOLDER/train/CLASS/IMAGE and FOLDER/val/CLASS/IMAGE, or a .tar holding the same"


class Source:
    """A labelled set of images.

    classes: class names, in label order; labels: int64 (N,); level names other than "fine" are in `levels`, each a pair
    (classes, labels) of the same form.
    """

    def __init__(self, classes: list[str], labels: np.ndarray, levels: dict[str, tuple[list[str], np.ndarray]] | None = None):
        self.classes, self.labels, self.levels = list(classes), np.asarray(labels, dtype=np.int64), levels or {}
        bad = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if len(bad):
            raise UserError(f"{self.name(bad[0])}: label {self.labels[bad[0]]} is outside 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def at_level(self, level: str | None) -> Source:
        """The same images with the labels of `level` (None: as they are)."""
        if level is None or (level == "fine" and not self.levels):
            return self
        self.levels = {"fine": (self.classes, self.labels)} | self.levels  # the first only the first time
        if level not in self.levels:
            hint = "; give --coarse-labels FILE" if level == "coarse" else ""
            raise UserError(f"--data: no label level {level!r} here, there is: {', '.join(self.levels)}{hint}")
        self.classes, self.labels = self.levels[level]
        return self

    def name(self, index: int) -> str:
        """What a message calls image `index`."""
        return f"image {index}"

    def read(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 (3, H, W)."""
        return images.decode(self.stored(index))

    def stored(self, index: int) -> bytes:
        """Image `index` as it is stored."""
        raise NotImplementedError

    def content(self) -> str:
        """Changes when a pixel of any image changes, or their order; reads them all, without decoding."""
        sha = hashlib.sha256()
        for i in range(len(self)):
            sha.update(hashlib.sha256(self.stored(i)).digest())
        return sha.hexdigest()

    def digest(self) -> str:
        """Changes when an image is added, removed, renamed or relabelled."""
        sha = hashlib.sha256(self.labels.tobytes())
        for part in self._identity():
            sha.update(part if isinstance(part, bytes) else str(part).encode())
        return sha.hexdigest()[:16]

    def _identity(self) -> list:
        return [len(self), *self.classes]


class Shapes(Source):
    """The built-in data set, `split` "train" or "val"."""

    def __init__(self, split: str):
        count = shapes.TRAIN_IMAGES if split == "train" else shapes.VAL_IMAGES
        self.split = split
        fine = np.arange(count) % len(shapes.CLASSES)
        super().__init__(shapes.CLASSES, fine, {"coarse": (list(shapes.SHAPES), fine // len(shapes.TEXTURES))})

    def name(self, index: int) -> str:
        return f"shapes {self.split} image {index}"

    def read(self, index: int) -> torch.Tensor:
        return images.from_numpy(shapes.draw(self.split, int(index))[0])

    def stored(self, index: int) -> bytes:
        return shapes.draw(self.split, int(index))[0].tobytes()


class Files(Source):
    """Image files below `root`; names: bytes array (N,) of paths relative to it."""

    def __init__(self, root: str | Path, names: np.ndarray, classes: list[str], labels: np.ndarray, levels=None):
        self.root, self.names = str(root), names
        super().__init__(classes, labels, levels)

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.names[index])))

    def stored(self, index: int) -> bytes:
        # Without O_NONBLOCK opening a pipe would wait for ever for somebody to write into it.
        fd = os.open(os.path.join(os.fsencode(self.root), bytes(self.names[index])), os.O_RDONLY | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError("not a regular file")
            return _pread(fd, os.fstat(fd).st_size, 0)
        finally:
            os.close(fd)

    def _identity(self) -> list:
        return [self.names.tobytes(), *self.classes]


class TarMembers(Source):
    """Members of one tar, read in place: names bytes (N,), offsets and sizes int64 (N,)."""

    def __init__(self, path: str, names: np.ndarray, offsets: np.ndarray, sizes: np.ndarray, classes, labels, levels=None):
        self.path, self.names, self.offsets, self.sizes, self.fd, self.pid = path, names, offsets, sizes, None, None
        super().__init__(classes, labels, levels)

    def name(self, index: int) -> str:
        return f"{self.path}: {os.fsdecode(bytes(self.names[index]))}"

    def stored(self, index: int) -> bytes:
        if self.pid != os.getpid():  # each worker opens its own
            self.fd, self.pid = os.open(self.path, os.O_RDONLY), os.getpid()
        return _pread(self.fd, int(self.sizes[index]), int(self.offsets[index]))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "fd": None, "pid": None}

    def _identity(self) -> list:
        return [self.names.tobytes(), self.sizes.tobytes(), *self.classes]


class Arrays(Source):
    """Images held in memory: uint8 (N, H, W, 3), as CIFAR's."""

    def __init__(self, title: str, pixels: np.ndarray, classes: list[str], labels: np.ndarray, levels=None):
        self.title, self.pixels = title, pixels
        super().__init__(classes, labels, levels)

    def name(self, index: int) -> str:
        return f"{self.title} image {index}"

    def read(self, index: int) -> torch.Tensor:
        return images.from_numpy(self.pixels[index])

    def stored(self, index: int) -> bytes:
        return self.pixels[index].tobytes()


def _pread(fd: int, size: int, offset: int) -> bytes:
    if size > MAX_FILE_BYTES:
        raise OSError(f"{size} bytes is more than the {MAX_FILE_BYTES} that one image may have")
    data = os.pread(fd, size, offset)
    if len(data) != size:
        raise OSError(f"file ends after {len(data)} of {size} bytes")
    return data


def open_data(
    spec: str,
    *,
    val_data: str | None = None,
    coarse_labels: str | None = None,
    classes: list[str] | None = None,
    splits: tuple[str, ...] = ("train", "val"),
    say: Callable[[str], None] = print,
) -> dict[str, Source]:
    """The splits of a `--data` value (see the module docstring), labels of every split in the order of train's classes.

    classes: class names that fix the label order where train is not opened (a checkpoint's).
    Raises UserError, before anything is read, for whatever is missing or does not fit.
    """
    spec, level = _split_level(spec)
    name, _, folder = spec.partition(":")
    if spec == "shapes":
        found = {split: Shapes(split) for split in splits}
    elif folder and name in NAMED:
        if not Path(folder).is_dir():
            raise UserError(f"--data {spec}: there is no folder {folder}")
        found = {split: NAMED[name](folder, split) for split in splits}
    else:
        found = _open_path(spec, val_data, classes, splits, say)
    if coarse_labels:
        for source in found.values():
            source.levels["coarse"] = _coarse_level(coarse_labels, source)
    return {split: source.at_level(level) for split, source in found.items()}


def _split_level(spec: str) -> tuple[str, str | None]:
    """("cifar100:/data", "coarse") from "cifar100@coarse:/data", ("FOLDER", "coarse") from "FOLDER@coarse"."""
    match = re.fullmatch(r"([a-z0-9]+)@([a-z]+)(:.+)?", spec)
    if match and (match[1] in NAMED or match[1] == "shapes"):
        return match[1] + (match[3] or ""), match[2]
    match = re.fullmatch(r"(.+)@([a-z]+)", spec)
    return (match[1], match[2]) if match and not Path(spec).exists() else (spec, None)


def _coarse_level(file: str, source: Source) -> tuple[list[str], np.ndarray]:
    """Coarse classes and labels from a JSON object {class name: coarse class name}."""
    try:
        mapping = json.loads(Path(file).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--coarse-labels {file}: {error}") from None
    missing = [c for c in source.classes if not isinstance(mapping, dict) or c not in mapping]
    if missing:
        raise UserError(f"--coarse-labels {file}: no coarse class for {len(missing)} classes, e.g. {', '.join(missing[:5])}")
    coarse = sorted({str(mapping[c]) for c in source.classes})
    to_coarse = np.array([coarse.index(str(mapping[c])) for c in source.classes])
    return coarse, to_coarse[source.labels]


# ---- Folders and tar archives ------------------------------------------------------------------------------------------


def _open_path(spec: str, val_data: str | None, classes: list[str] | None, splits, say) -> dict[str, Source]:
    path = Path(spec)
    if not path.exists():
        known = f"; known data sets: shapes, {', '.join(f'{n}:FOLDER' for n in NAMED)}" if "/" not in spec else ""
        raise UserError(f"--data {spec}: no such file or folder ({TREE}){known}")
    found: dict[str, Source] = {}
    for split in splits:
        order = classes or (found["train"].classes if "train" in found else None)
        if split == "val" and val_data:
            found[split] = open_images(val_data, "--val-data", order, say)
        elif path.is_dir():
            if not (path / split).is_dir():
                extra = " (or give --val-data PATH, or train without validation by --val-data none)" if split == "val" else ""
                raise UserError(f"--data {spec}: no folder {split}/ in it; {TREE}{extra}")
            if split != "train" and order is None and (path / "train").is_dir():  # ids always come from train's folder names
                order = sorted(e.name for e in os.scandir(path / "train") if e.is_dir() and not _is_junk(e.name))
            found[split] = open_images(str(path / split), f"--data {spec}", order, say)
        else:
            found[split] = _open_tar(str(path), split, order, say)
    return found


def open_images(path: str, flag: str, classes: list[str] | None = None, say: Callable[[str], None] = print) -> Source:
    """One folder of class folders, or one tar of class folders or class tars, as a Source.

    classes fixes the labels. Folders named 0, 1, 2, ... that are not among them are taken as label numbers (ImageNet-V2).
    """
    if not Path(path).exists():
        raise UserError(f"{flag}: {path} does not exist")
    if not Path(path).is_dir():
        return _open_tar(path, None, classes, say)
    folders, names, labels, ignored, flat = cached_index(_folder_state(path), lambda: _scan_folder(path), say)
    folders = [os.fsdecode(bytes(f)) for f in folders]
    if not folders:
        if flat:
            raise UserError(
                f"{flag}: {path} holds {int(flat)} images but no class folders; move each image into a folder of its class"
                " (ImageNet's validation set comes unsorted)"
            )
        raise UserError(f"{flag}: {path} holds no class folders; {TREE}")
    counts = np.bincount(labels, minlength=len(folders))
    if (counts == 0).any():
        raise UserError(f"{flag}: the class folder {os.path.join(path, folders[int(np.argmin(counts))])} holds no images")
    if int(ignored):
        say(f"{path}: {int(ignored)} files ignored, their extension is not one of {' '.join(EXTENSIONS)}")
    classes, labels = _fit_classes(folders, labels, classes, path, say)
    return Files(path, names, classes, labels)


def _fit_classes(folders: list[str], labels: np.ndarray, classes: list[str] | None, where: str, say) -> tuple[list[str], np.ndarray]:
    """Labels in the order of `classes` (None: the folder names' own order)."""
    if classes is None:
        if all(f.isdigit() for f in folders) and folders != sorted(folders, key=int):
            say(f"{where}: class folders are numbers; labels follow the order of their names: {', '.join(folders[:4])}, ...")
        return folders, labels
    if folders == classes:
        return classes, labels
    if all(f.isdigit() for f in folders) and not set(folders) & set(classes) and max(map(int, folders)) < len(classes):
        say(f"{where}: class folders are numbers and taken as labels 0..{len(classes) - 1}")
        return classes, np.array([int(f) for f in folders])[labels]
    extra, missing = sorted(set(folders) - set(classes)), sorted(set(classes) - set(folders))
    if extra or missing:
        parts = [f"only in train: {', '.join(missing[:5])} ({len(missing)})"] * bool(missing)
        parts += [f"only here: {', '.join(extra[:5])} ({len(extra)})"] * bool(extra)
        raise UserError(f"{where}: its classes are not those of the training set; {'; '.join(parts)}")
    position = {c: i for i, c in enumerate(classes)}
    return classes, np.array([position[f] for f in folders])[labels]


def _is_junk(name: str) -> bool:
    return name.startswith(".") or name in JUNK


def _folder_state(path: str) -> list:
    """What changes when a file is added to or removed from the two top levels of a folder tree."""
    state = [os.path.realpath(path), os.stat(path).st_mtime_ns]
    for entry in sorted(os.scandir(path), key=lambda e: e.name):
        if not _is_junk(entry.name) and entry.is_dir():
            state += [entry.name, entry.stat().st_mtime_ns]
    return state


def _scan_folder(path: str) -> list[np.ndarray]:
    """[class folders, image names, labels, number of ignored files, number of images outside class folders]."""
    root, folders, names, labels, ignored = os.fsencode(path), [], [], [], 0
    flat = sum(e.name.lower().endswith(EXTENSIONS) and not _is_junk(e.name) for e in os.scandir(path) if e.is_file())
    for folder in sorted(e.name for e in os.scandir(path) if e.is_dir() and not _is_junk(e.name)):
        folders.append(os.fsencode(folder))
        pending, seen, inside = [os.path.join(root, os.fsencode(folder))], set(), []
        while pending:
            here = pending.pop()
            real = os.path.realpath(here)
            if real in seen:  # a loop of links
                continue
            seen.add(real)
            for entry in os.scandir(here):
                name = os.fsdecode(entry.name)
                if _is_junk(name):
                    continue
                if entry.is_dir():
                    pending.append(entry.path)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    raise UserError(f"{os.fsdecode(entry.path)} is a link to nothing; repair or remove it")
                elif name.lower().endswith(EXTENSIONS):
                    inside.append(os.path.relpath(entry.path, root))
                else:
                    ignored += 1
        names += sorted(inside)
        labels += [len(folders) - 1] * len(inside)
    return [np.array(folders, dtype="S"), np.array(names, dtype="S"), np.array(labels, dtype=np.int64), np.array(ignored), np.array(flat)]


def _open_tar(path: str, split: str | None, classes: list[str] | None, say) -> Source:
    """`split`/CLASS/IMAGE of a tar (split None: CLASS/IMAGE, or CLASS.tar holding IMAGE)."""
    state = os.stat(path)
    names, offsets, sizes = cached_index([os.path.realpath(path), state.st_size, state.st_mtime_ns], lambda: _scan_tar(path), say)
    parts = [n.split(b"/") for n in names]
    tops = {p[0] for p in parts if len(p) > 1}
    if split is not None:
        if b"train" in tops or b"val" in tops:
            wanted = [len(p) > 2 and p[0] == split.encode() for p in parts]
            class_at = 1
            if not any(wanted):
                raise UserError(f"--data {path}: no {split}/CLASS/IMAGE in this archive")
        elif split == "val":
            raise UserError(f"--data {path}: the archive has no val/; give the validation set by --val-data PATH (none: train without)")
        else:
            wanted, class_at = [len(p) > 1 for p in parts], 0
    else:
        wanted, class_at = [len(p) > 1 for p in parts], 0
    image = [n.lower().endswith(tuple(e.encode() for e in EXTENSIONS)) for n in names]
    unsorted = sum(i and len(p) == 1 for i, p in zip(image, parts))
    if not any(wanted):
        raise UserError(f"{path}: {unsorted} images without a class folder; repack the archive as CLASS/IMAGE")
    junk = [any(_is_junk(os.fsdecode(x)) for x in p) for p in parts]
    ignored = sum(w and not i and not j for w, i, j in zip(wanted, image, junk))
    if ignored:
        say(f"{path}: {ignored} members ignored, their extension is not one of {' '.join(EXTENSIONS)}")
    keep = np.flatnonzero(np.array(wanted) & np.array(image) & ~np.array(junk))
    member_class = [os.fsdecode(parts[i][class_at]) for i in keep]
    folders = sorted(set(member_class))
    position = {c: i for i, c in enumerate(folders)}
    labels = np.array([position[c] for c in member_class], dtype=np.int64)
    order = np.argsort(labels, kind="stable")
    classes, labels = _fit_classes(folders, labels[order], classes, path, say)
    keep = keep[order]
    return TarMembers(path, names[keep], offsets[keep], sizes[keep], classes, labels)


def _scan_tar(path: str) -> list[np.ndarray]:
    """[names, offsets, sizes] of every regular member, members of inner .tar files included as INNER/NAME.

    Walks the 512-byte headers with pread; nothing is ever extracted. Raises UserError for what is not a plain archive.
    """
    names, offsets, sizes = [], [], []
    fd = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(fd).st_size
        pending = [(0, end, b"")]
        while pending:
            at, stop, prefix = pending.pop()
            long_name = long_size = None
            while at + 512 <= stop:
                header = os.pread(fd, 512, at)
                if header.count(0) == 512:  # the archive's end
                    break
                try:
                    total = sum(header) - sum(header[148:156]) + 8 * 32
                    if total != int(header[148:156].strip(b"\0 "), 8):
                        raise ValueError
                    size = int.from_bytes(header[125:136], "big") if header[124] & 0x80 else int(header[124:136].strip(b"\0 ") or b"0", 8)
                except ValueError:
                    what = (
                        "is not a tar archive (compressed ones are not read: unpack it to a plain .tar)"
                        if at == 0
                        else f"is damaged at byte {at}"
                    )
                    raise UserError(f"{path} {what}") from None
                kind, name = header[156:157], header[:100].rstrip(b"\0")
                if header[257:262] == b"ustar" and header[345] and header[263:265] == b"00":
                    name = header[345:500].rstrip(b"\0") + b"/" + name
                data, at = at + 512, at + 512 + (size + 511) // 512 * 512
                if kind == b"L":  # GNU: the next member's long name
                    long_name = os.pread(fd, size, data).rstrip(b"\0")
                    continue
                if kind in b"xg":  # pax: "length key=value\n" records for the next member
                    if kind == b"x":
                        records = os.pread(fd, size, data)
                        found = re.search(rb"\d+ path=([^\n]*)\n", records)
                        long_name = found[1] if found else long_name
                        found = re.search(rb"\d+ size=(\d+)\n", records)
                        long_size = int(found[1]) if found else long_size
                    continue
                name = long_name or name
                if long_size is not None:
                    size, at = long_size, data + (long_size + 511) // 512 * 512
                long_name = long_size = None
                while name.startswith(b"./"):
                    name = name[2:]
                shown = os.fsdecode(prefix + name)
                if name.startswith(b"/") or b".." in name.split(b"/"):
                    raise UserError(f"{path}: member {shown} points outside the archive; repack it with relative names")
                if kind == b"5":
                    continue
                if kind not in (b"0", b"\0", b"7"):
                    raise UserError(
                        f"{path}: member {shown} is a link or device; repack it with regular files only (tar --hard-dereference -h)"
                    )
                if data + size > stop:
                    raise UserError(f"{path} is truncated: member {shown} ends at byte {data + size}, the archive at {stop}")
                if name.endswith(b".tar"):
                    pending.append((data, data + size, prefix + name[:-4] + b"/"))
                    continue
                if size > MAX_FILE_BYTES:
                    raise UserError(f"{path}: member {shown} has {size} bytes, more than the {MAX_FILE_BYTES} that one image may have")
                names.append(prefix + name)
                offsets.append(data)
                sizes.append(size)
    finally:
        os.close(fd)
    if not names:
        raise UserError(f"{path} holds no files")
    order = np.argsort(np.array(names, dtype="S"), kind="stable")
    return [np.array(names, dtype="S")[order], np.array(offsets, dtype=np.int64)[order], np.array(sizes, dtype=np.int64)[order]]


def cache_folder() -> Path:
    """Where what can be computed again is kept: touvron-methods in $XDG_CACHE_HOME (~/.cache)."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "touvron-methods"
    except RuntimeError:  # a user without a home
        raise UserError("there is no home folder to keep a cache in; set HOME or XDG_CACHE_HOME to a writable folder") from None


def cache_file(key: list, suffix: str, folder: str = "") -> Path:
    """The file of the cache for what follows from `key`, by a hash of it."""
    return cache_folder() / folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + suffix)


def keep(file: Path, write: Callable[[IO[bytes]], None]) -> str:
    """Has `write` fill a file of the cache, all of it or none; returns "", or why it cannot be kept, for a warning."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as out:
            write(out)
        os.replace(out.name, file)
    except OSError as error:  # costs time only
        return no_cache(file.parent, error)
    return ""


def no_cache(folder: Path, error: OSError) -> str:
    return f"nothing can be kept in {folder} ({error.strerror}): set XDG_CACHE_HOME to a writable folder"


def cached_index(key: list, build: Callable[[], list[np.ndarray]], say: Callable[[str], None]) -> list[np.ndarray]:
    """build(), kept in the cache; where that cannot be written it is said, and built again next time."""
    file = cache_file(key, ".npz")
    try:
        with np.load(file, allow_pickle=False) as stored:
            return [stored[f"arr_{i}"] for i in range(len(stored.files))]
    except Exception:  # absent, or cut short by a crash: either way it is built
        arrays = build()
    problem = keep(file, lambda out: np.savez(out, *arrays))
    if problem:
        say(f"warning: {problem}; the images will be listed again at the next start")
    return arrays


# ---- Data sets with a layout of their own --------------------------------------------------------------------------------


def _cifar(folder: str, split: str, name: str) -> Source:
    from torchvision import datasets

    cls = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        data = cls(folder, train=split == "train", download=False)
    except (RuntimeError, OSError) as error:
        raise UserError(f"--data {name}:{folder}: {str(error).splitlines()[0]} Put torchvision's {cls.base_folder}/ there.") from None
    levels = None
    if name == "cifar100":
        # The official files are pickles; torchvision has just checked their MD5 sums.
        with open(Path(folder) / cls.base_folder / split.replace("val", "test"), "rb") as f:
            coarse = pickle.load(f, encoding="latin1")["coarse_labels"]
        with open(Path(folder) / cls.base_folder / "meta", "rb") as f:
            levels = {"coarse": (pickle.load(f, encoding="latin1")["coarse_label_names"], np.array(coarse))}
    return Arrays(f"{name} {split}", data.data, data.classes, data.targets, levels)


def _torchvision(folder: str, split: str, name: str) -> Source:
    """Data sets whose torchvision class lists files and labels; the training split is all that the papers train on."""
    from torchvision import datasets

    make, train, test = {
        "flowers102": (datasets.Flowers102, ("train", "val"), ("test",)),
        "cars": (datasets.StanfordCars, ("train",), ("test",)),
        "food101": (datasets.Food101, ("train",), ("test",)),
        "aircraft": (datasets.FGVCAircraft, ("trainval",), ("test",)),
        "dtd": (datasets.DTD, ("train", "val"), ("test",)),
        "pets": (datasets.OxfordIIITPet, ("trainval",), ("test",)),
    }[name]
    files, labels = [], []
    for part in train if split == "train" else test:
        try:
            data = make(folder, split=part, download=False)
        except ImportError as error:
            raise UserError(
                f"--data {name}:{folder}: torchvision needs {error.name} to read its labels; pip install {error.name}"
            ) from None
        except (RuntimeError, OSError) as error:
            raise UserError(f"--data {name}:{folder}: {str(error).splitlines()[0]} ({make.__name__}'s layout is expected)") from None
        samples = getattr(data, "_samples", None)  # StanfordCars keeps pairs, the others two lists
        files += [s[0] for s in samples] if samples else (getattr(data, "_image_files", None) or data._images)
        labels += [s[1] for s in samples] if samples else data._labels
    classes = [str(c) for c in getattr(data, "classes", None) or range(max(labels) + 1)]
    return Files(folder, np.array([os.fsencode(os.path.relpath(f, folder)) for f in files], dtype="S"), classes, labels)


INAT_LEVELS = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")  # "name": the species


def _inaturalist(folder: str, split: str, name: str) -> Source:
    """iNaturalist 2018/2019 by the competition's files: train_val{year}/, {train,val}{year}.json, categories.json."""
    year = name[-4:]
    try:
        annotations = json.loads((Path(folder) / f"{split}{year}.json").read_text())
        categories = {c["id"]: c for c in json.loads((Path(folder) / "categories.json").read_text())}
    except (OSError, ValueError) as error:
        raise UserError(f"--data {name}:{folder}: {error} (the competition's files are expected: {_inaturalist.__doc__})") from None
    file_of = {image["id"]: image["file_name"] for image in annotations["images"]}
    ids = sorted(categories)
    category = np.array([ids.index(a["category_id"]) for a in annotations["annotations"]])
    names = np.array([os.fsencode(file_of[a["image_id"]]) for a in annotations["annotations"]], dtype="S")
    levels = {}
    for level in INAT_LEVELS:
        if all(level in c for c in categories.values()):
            values = sorted({str(c[level]) for c in categories.values()})
            to_level = np.array([values.index(str(categories[i][level])) for i in ids])
            levels["species" if level == "name" else level] = (values, to_level[category])
    return Files(folder, names, [str(categories[i].get("name", i)) for i in ids], category, levels)


def _eurosat(folder: str, split: str, name: str) -> Source:
    """EuroSAT (arXiv:1709.00029) as torchvision lays it out: eurosat/2750/CLASS/*.jpg.

    There is no official split. Here 30% of each class, drawn once and for all, are the test images: of the 27,000 images
    8,100, as many as in the transfer benchmarks.
    """
    root = Path(folder) / "eurosat" / "2750"
    if not root.is_dir():
        raise UserError(f"--data {name}:{folder}: there is no folder {root} (EuroSAT's layout in torchvision is expected)")
    whole, kept = open_images(str(root), f"--data {name}:{folder}"), []
    for label in range(len(whole.classes)):
        mine = np.flatnonzero(whole.labels == label)
        order = np.random.RandomState(label).permutation(len(mine))  # RandomState: the same for ever
        test = int(round(0.3 * len(mine)))
        kept.append(np.sort(mine[order[test:] if split == "train" else order[:test]]))
    kept = np.concatenate(kept)
    return Files(root, whole.names[kept], whole.classes, whole.labels[kept])


def _sun397(folder: str, split: str, name: str) -> Source:
    """SUN397 as torchvision lays it out, SUN397/ClassName.txt and SUN397/a/abbey/*.jpg, with the first of the ten official
    partitions, Training_01.txt and Testing_01.txt, in Partitions/, SUN397/ or the folder itself."""
    root, file = Path(folder) / "SUN397", f"{'Training' if split == 'train' else 'Testing'}_01.txt"
    lists = [p / file for p in (Path(folder) / "Partitions", root, Path(folder)) if (p / file).is_file()]
    if not (root / "ClassName.txt").is_file() or not lists:
        raise UserError(f"--data {name}:{folder}: SUN397/ClassName.txt and Partitions/{file} are expected there")
    classes = (root / "ClassName.txt").read_text().split()
    number = {c: i for i, c in enumerate(classes)}
    names = lists[0].read_text().split()
    unknown = [n for n in names if n.rpartition("/")[0] not in number]
    if unknown:
        raise UserError(f"{lists[0]}: {unknown[0]} is of no class of ClassName.txt")
    labels = [number[n.rpartition("/")[0]] for n in names]
    return Files(root, np.array([n.lstrip("/").encode() for n in names], dtype="S"), [c[1:] for c in classes], labels)


COG_LEVELS, COG_SPLITS = "cog_levels_mapping_file.pkl", "cog_concepts_split_file.pkl"


class _PlainUnpickler(pickle.Unpickler):
    """Reads containers, strings and numbers; anything that would run code is refused."""

    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _cog(folder: str, split: str, name: str) -> Source:
    """One level of ImageNet-CoG (arXiv:2012.05649): ImageNet-21k's folders nXXXXXXXX/*.JPEG and the two split files, the levels'
    concepts (five lists) and {concept: {"train": [file names], "test" or "val": [...]}}."""
    tables = []
    for file in (COG_LEVELS, COG_SPLITS):
        try:
            with open(Path(folder) / file, "rb") as f:
                tables.append(_PlainUnpickler(f).load())
        except (OSError, EOFError, pickle.UnpicklingError, ValueError, IndexError, KeyError) as error:
            raise UserError(f"--data {name}:{folder}: {file} cannot be read ({error}); the official split file is expected there") from None
    try:
        by_level = list(tables[0].values()) if isinstance(tables[0], dict) else tables[0]
        concepts, names, labels = sorted(by_level[int(name[-1]) - 1]), [], []
        for label, concept in enumerate(concepts):
            parts = tables[1][concept]
            for image in parts["train"] if split == "train" else parts.get("test", parts.get("val")):
                names.append(f"{concept}/{str(image).rpartition('/')[2]}".encode())
                labels.append(label)
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise UserError(f"--data {name}:{folder}: {COG_LEVELS} and {COG_SPLITS} have not the expected form ({error!r})") from None
    return Files(folder, np.array(names, dtype="S"), concepts, labels)


NAMED: dict[str, Callable[[str, str], Source]] = {
    name: (lambda folder, split, make=make, name=name: make(folder, split, name))
    for make, names in {
        _cifar: ("cifar10", "cifar100"),
        _torchvision: ("flowers102", "cars", "food101", "aircraft", "dtd", "pets"),
        _inaturalist: ("inat2018", "inat2019"),
        _eurosat: ("eurosat",),
        _sun397: ("sun397",),
        _cog: ("cog1", "cog2", "cog3", "cog4", "cog5"),
    }.items()
    for name in names
}
