"""Data sets: what `--data` takes, found, indexed and read. A `Source` knows classes, labels and how to read image i.

    shapes          the built-in data set
    FOLDER          with train/CLASS/... and val/CLASS/...
    FILE.tar        the same, or a tar of class tars (ImageNet's train archive, with --val-data); read in place
    NAME:FOLDER     a set of NAMED below, in torchvision's layout; inat2018 and inat2019 in the competition's; cog1 to
                    cog5, ImageNet-CoG's levels: ImageNet-21k's folders and the two split files
    ...@LEVEL       other labels: cifar100@coarse:FOLDER, inat2018@genus:FOLDER, shapes@coarse, or FOLDER@coarse with
                    --coarse-labels; @none: one class for all images
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils._pytree import tree_map
from torchvision import datasets

from common import images, shapes
from common.errors import RunError, UserError, one_line, watched

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
JUNK = re.compile(r"(^|/)(\.|(__MACOSX|@eaDir|lost\+found|Thumbs\.db|desktop\.ini)(/|\Z))")  # as a part of a path
MAX_FILE_BYTES = 1 << 30
TREE = "expected FOLDER/train/CLASS/IMAGE and FOLDER/val/CLASS/IMAGE, or a .tar holding the same"
DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
FLAT = ("an image without a class folder has no label; move each into one, or if they are ImageNet's validation images"
        f" put its {DEVKIT} beside them")
COG_LEVELS, COG_SPLITS = "cog_levels_mapping_file.pkl", "cog_concepts_split_file.pkl"
FORMAT = 5  # of an index in the cache; those of another one are made anew
CACHE_BYTES = 100e9  # that the cache may hold, or a tenth of its disk
Labels = tuple[list[str], np.ndarray]  # class names in label order, labels int64 (N,)


class Mapped(np.ndarray):
    """A whole array of the cache, in a file named by a hash of it, whose pages ranks and workers share: a process that
    is sent one maps it too, by `place`, the arguments of this class."""

    place = None  # what is made of one has none

    def __new__(cls, file: str):
        array = np.load(file, mmap_mode="c").view(cls)
        array.place = (file,)
        return array

    def __reduce__(self):
        return (Mapped, self.place) if self.place else super().__reduce__()


def _hash(array: np.ndarray) -> str:
    place = getattr(array, "place", None)
    return Path(*place).stem if place else hashlib.sha256(np.ascontiguousarray(array)).hexdigest()


class Source:
    """Labelled images: `classes`, `labels`, and both by name of label level in `levels`; for messages a `title` and
    `names`, bytes (N,), or None. Those of a plain one are in memory: `pixels`, uint8 (N, H, W, 3)."""

    title, names, sizes, pixels, key = "data", None, None, None, None

    def __init__(self, classes: list[str], labels: np.ndarray, levels: dict[str, Labels] | None = None):
        self.classes, self.labels = list(classes), np.asanyarray(labels, dtype=np.int64)
        self.levels = {"fine": (self.classes, self.labels)} | (levels or {})
        outside = [] if getattr(labels, "place", None) else (self.labels < 0) | (self.labels >= len(self.classes))
        if len(bad := np.flatnonzero(outside)):
            raise UserError(f"{self.name(bad[0])}: label {self.labels[bad[0]]} is outside 0..{len(self.classes) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """What a message calls image `index`."""
        return self.title + (f" image {index}" if self.names is None else os.fsdecode(bytes(self.names[index])))

    def stored(self, index: int) -> bytes | np.ndarray:
        """An image file's bytes, or pixels, uint8 (H, W, 3)."""
        return np.ascontiguousarray(self.pixels[index])

    def read(self, index: int) -> torch.Tensor:
        """Image `index` as uint8 (3, H, W)."""
        stored = self.stored(index)
        return images.decode(stored) if isinstance(stored, bytes) else images.from_numpy(stored)

    def named(self, action: Callable, index: int):
        """action(index), say read(index); RunError with the image's name and the reason if it cannot be done."""
        try:
            return action(index)
        except Exception as error:  # of any kind: it is a decoder's
            raise RunError(f"{self.name(index)}: {one_line(error, 1000) or type(error).__name__}") from None

    def mark(self, index: int) -> bytes | np.ndarray:
        """Changes when image `index` does: by the `key` that all images follow from, or if there is none by its bytes,
        of files by place, name, size and time of change."""
        return self.stored(index) if self.key is None else repr((self.key, index)).encode()

    def content(self, every_byte: bool) -> str:
        """Changes when an image changes, or their order, as far as mark() tells, or by every byte of all of them."""
        sha = hashlib.sha256()
        for index in watched(range(len(self)), f"reading {self.title}", "images", print, len(self)):
            mark = self.named(self.stored if every_byte else self.mark, index)
            sha.update(hashlib.sha256(mark).digest())
        return sha.hexdigest()

    def digest(self) -> str:
        """Changes when an image is added, removed, renamed or relabelled."""
        arrays = [_hash(array) for array in (self.labels, self.names, self.sizes) if array is not None]
        return hashlib.sha256("/".join(arrays + self.classes).encode(errors="surrogateescape")).hexdigest()[:16]


class Shapes(Source):
    """The built-in data set, `split` "train" or "val"."""

    def __init__(self, split: str):
        self.split, self.key, self.title = split, split, f"shapes {split}"
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

    def mark(self, index: int) -> bytes:
        stat = os.stat(name := self.name(index))
        return repr((os.path.abspath(name), stat.st_size, stat.st_mtime_ns)).encode()

    def stored(self, index: int) -> bytes:
        fd = os.open(self.name(index), os.O_RDONLY | os.O_NONBLOCK)  # opening a pipe would wait for ever for a writer
        with open(fd, "rb", buffering=0) as file:
            if not os.path.isfile(fd):
                raise OSError("not a regular file")
            if (size := os.path.getsize(fd)) > MAX_FILE_BYTES:
                raise OSError(f"{size} bytes is more than the {MAX_FILE_BYTES} that one image may have")
            return file.read()


class TarMembers(Source):
    """Members of a tar, read in place: columns names bytes (N,), offsets and sizes int64 (N,); key: its path, ..."""

    def __init__(self, path: str, key: list, columns: list[np.ndarray], classes: list[str], labels: np.ndarray):
        self.key, self.title, self.pid = key, f"{path}: ", None
        self.names, self.offsets, self.sizes = columns
        super().__init__(classes, labels)

    def stored(self, index: int) -> bytes:
        if self.pid != os.getpid():  # each worker opens its own
            self.fd, self.pid = os.open(self.key[0], os.O_RDONLY), os.getpid()
        return os.pread(self.fd, int(self.sizes[index]), int(self.offsets[index]))


@contextlib.contextmanager
def opening() -> Iterator[None]:
    """What cannot be listed or read for want of permission, or of a working disk, is one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or 'the images'}: cannot be read ({error.strerror})") from None


@opening()
def open_data(spec: str, *, val_data: str | None = None, coarse_labels: str | None = None, say: Callable = print,
              classes: list[str] | None = None, splits: tuple[str, ...] = ("train", "val")) -> dict[str, Source]:
    """The splits of a `--data` value (see the module docstring), labels of every split in the order of train's classes,
    or of `classes` where train is not opened. Raises UserError for whatever is missing or does not fit."""
    level, match = "fine", re.fullmatch(r"(.+?)@([a-z]+)(:.+)?", spec)  # NAME@LEVEL:FOLDER, shapes@LEVEL, FOLDER@LEVEL
    if match and (match[1] in NAMED or not match[3]) and not Path(spec).exists():
        spec, level = match[1] + (match[3] or ""), match[2]
    (name, _, folder), path, order, found = spec.partition(":"), Path(spec), classes, {}
    for split in splits:
        if val_data and split == "val" and (spec == "shapes" or folder and name in NAMED):
            raise UserError(f"--val-data: {spec} has validation images of its own; leave it out")
        elif spec == "shapes":
            source = Shapes(split)
        elif folder and name in NAMED:
            source = _open_named(name, folder, split)
        elif not path.exists():
            known = f"; known data sets: shapes, {', '.join(f'{n}:FOLDER' for n in NAMED)}" if "/" not in spec else ""
            raise UserError(f"--data {spec}: no such file or folder ({TREE}){known}")
        elif split == "val" and val_data:
            source = open_images(val_data, "--val-data", order, say)
        elif path.is_dir() and not (path / split).is_dir():
            hint = " (or give --val-data PATH, or train without validation by --val-data none)"
            raise UserError(f"--data {spec}: no folder {split}/ in it; {TREE}{hint if split == 'val' else ''}")
        else:
            if split != "train" and order is None and (path / "train").is_dir():
                order = class_folders(path / "train")  # ids always come from train's folder names
            source = open_images(spec, f"--data {spec}", order, say, split)
        order = order or source.classes
        if coarse_labels:
            source.levels["coarse"] = _coarse_level(coarse_labels, source)
        source.levels |= {"none": (["any"], 0 * source.labels)} if level == "none" else {}  # thesis Table 2.5
        if level not in source.levels:
            hint = "; give --coarse-labels FILE" if level == "coarse" else ""
            raise UserError(f"--data: no label level {level!r} here, there is: {', '.join(source.levels)}{hint}")
        source.classes, source.labels = source.levels[level]
        found[split] = source
    return found


def _coarse_level(file: str, source: Source) -> Labels:
    """Coarse classes and labels from a JSON object {class name: coarse class name}."""
    try:
        mapping = json.loads(Path(file).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--coarse-labels {file}: {error}") from None
    if lost := [c for c in source.classes if not isinstance(mapping, dict) or c not in mapping]:
        raise UserError(f"--coarse-labels {file}: no coarse class for {len(lost)} classes, e.g. {', '.join(lost[:5])}")
    coarse, to_coarse = np.unique([str(mapping[c]) for c in source.classes], return_inverse=True)
    return coarse.tolist(), _relabelled(source.labels, to_coarse)


@opening()
def open_images(path: str, flag: str, classes: list[str] | None = None, say: Callable = print, split="") -> Source:
    """A folder of class folders, or a tar of class folders or class tars, or `split`/ in one. `classes` fixes the
    labels; folders named 0, 1, 2, ... that are not among them are label numbers (ImageNet-V2's)."""
    where, tar = os.path.join(path, split) if split else path, not Path(path).is_dir()
    if not Path(path).exists():
        raise UserError(f"{flag}: {path} does not exist")
    folders, listed = ([], path) if tar else (class_folders(where), where)
    stats = [os.stat(place) for place in [listed, *(os.path.join(where, folder) for folder in folders)]]
    key = [os.path.realpath(listed), *(value for stat in stats for value in (stat.st_size, stat.st_mtime_ns))]
    scan, splits = (_scan_tar if tar else scan_folder), tar and bool(split)
    index = _kept([splits, folders, *key], lambda: _index(listed, scan, splits, say), say)
    if split == "val" and splits and "" in index:
        raise UserError(f"{flag}: the archive has no val/; give --val-data PATH (none: train without)")
    found = index.get("") or index[split]
    if found["classes"] == [""]:
        devkit = Path(listed).with_name(DEVKIT)
        found |= _by_devkit(found["names"], devkit) if devkit.is_file() else {"classes": []}
    folders = folders or found["classes"]
    if not folders:
        why = f"{found['flat']} images but no class folders; {FLAT}" if found["flat"] else f"no class folders; {TREE}"
        raise UserError(f"{flag}: {where} holds {why}")
    if empty := sorted(set(folders) - set(found["classes"])):
        if split == "train" or not found["classes"]:
            raise UserError(f"{flag}: the class folder {os.path.join(where, empty[0])} holds no images")
        say(f"{where}: {len(empty)} class folders hold no images: {', '.join(empty[:5])}")
    classes, labels = _fit_classes(found, folders, classes, where, say)
    if tar:
        return TarMembers(path, [*key, split], [found[name] for name in ("names", "offsets", "sizes")], classes, labels)
    return Files(where, found["names"], classes, labels)


def _by_devkit(names: np.ndarray, devkit: Path) -> dict:
    """Classes and labels of ImageNet's validation images, by the numbers in their names, from the devkit's archive."""
    numbers = [re.search(r"ILSVRC2012_val_(\d{8})\.", os.fsdecode(name)) for name in names.tolist()]
    try:
        with tempfile.TemporaryDirectory() as place:  # torchvision writes what it reads
            datasets.imagenet.parse_devkit_archive(place, os.path.abspath(devkit))
            _, of_number = datasets.imagenet.load_meta_file(place)
        classes, labels = np.unique([of_number[int(n[1]) - 1] for n in numbers], return_inverse=True)
    except ImportError as error:
        raise UserError(f"{devkit}: to read it torchvision needs {error.name}; pip install {error.name}") from None
    except (LookupError, RuntimeError, TypeError, ValueError) as error:  # TypeError: a name without a number
        raise UserError(f"{devkit}: does not give the labels of these images ({one_line(error, 300)})") from None
    return {"classes": classes.tolist(), "labels": labels}


def _fit_classes(found: dict, folders: list[str], classes: list[str] | None, where: str, say: Callable) -> Labels:
    """Classes and labels of a part of an index in the order of `classes`, or of `folders` (None), which are all that
    there are, though some may be empty."""
    own, wanted = found["classes"], folders if classes is None else classes
    if found["ignored"]:
        say(f"{where}: {found['ignored']} files ignored, their extension is not one of {' '.join(EXTENSIONS)}")
    numbers = all(f.isdigit() for f in folders)
    if classes is None and numbers and folders != sorted(folders, key=int):
        say(f"{where}: class folders are numbers; labels follow their names: {', '.join(folders[:4])}, ...")
    if own == wanted:
        return wanted, found["labels"]
    extra, missing = sorted(set(own) - set(wanted)), sorted(set(wanted) - set(folders))
    place = {c: i for i, c in enumerate(wanted)}
    if numbers and len(extra) == len(own) and max(map(int, folders)) < len(wanted):
        say(f"{where}: class folders are numbers and taken as labels 0..{len(wanted) - 1}")
        place = {f: int(f) for f in folders}
    elif extra or missing:
        lists = (("only in train", missing), ("only here", extra))
        parts = [f"{title}: {', '.join(names[:5])} ({len(names)})" for title, names in lists if names]
        raise UserError(f"{where}: its classes are not those of the training set; {'; '.join(parts)}")
    return wanted, _relabelled(found["labels"], np.array([place[f] for f in own]))


def class_folders(path: str | Path) -> list[str]:
    """The names of its folders, sorted, which are those of the classes."""
    return sorted(e.name for e in os.scandir(path) if e.is_dir() and not JUNK.search(e.name))


def scan_folder(path: str) -> Iterator[tuple]:
    """(name below `path`,) of every file there; (path/, time of change) of folders in class folders."""
    root, seen, pending = os.path.join(path, ""), set(), [path]
    while pending:
        here = pending.pop()
        place = here[len(root) :].partition("/")[0], os.path.realpath(here)
        if place in seen:  # a loop of links
            continue
        seen.add(place)
        if "/" in here[len(root) :]:
            yield os.fsencode(os.path.join(here, "")), os.stat(here).st_mtime_ns
        for entry in os.scandir(here):
            if JUNK.search(entry.name):
                continue
            if entry.is_dir():
                pending.append(entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                raise UserError(f"{entry.path} is a link to nothing; repair or remove it")
            else:
                yield (os.fsencode(entry.path[len(root) :]),)


def _scan_tar(path: str) -> Iterator[tuple[bytes, int, int]]:
    """(name, offset, size) of every member, those of inner .tar files as INNER/NAME; nothing is unpacked."""
    with open(path, "rb", buffering=512) as file:
        try:
            tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8", errors="surrogateescape")
        except tarfile.ReadError:
            raise UserError(f"{path} is not a tar archive; unpack a compressed one; {TREE}") from None
        pending = [(0, os.fstat(file.fileno()).st_size, "")]  # what is left of each archive: from, to, its folder
        while pending:
            at, stop, folder = pending.pop()
            if at + 512 > stop:
                hint = "fetch or pack it again, or if you know it to be whole: truncate -s +1024 FILE"
                raise UserError(f"{path} is truncated: {folder or 'it'} ends at byte {stop} without a mark; {hint}")
            file.seek(at)
            try:
                member = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.EOFHeaderError:  # a block of zeros
                continue
            except (tarfile.HeaderError, ValueError):
                raise UserError(f"{path} is damaged at byte {file.tell() - 512}") from None
            inner = re.sub(r"^(\./)+", "", member.name)
            name, at, size = folder + inner, member.offset_data, 0 if member.isdir() else member.size
            pending.append((at + -(-size // 512) * 512, stop, folder))
            if inner.startswith("/") or ".." in name.split("/"):
                raise UserError(f"{path}: member {name} points outside the archive; repack it with relative names")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise UserError(f"{path}: member {name} is a link or device; repack it with tar --hard-dereference -h")
            if not 0 <= size <= stop - at:
                raise UserError(f"{path} is truncated: member {name} ends at byte {at + size}, the archive at {stop}")
            if name.endswith(".tar"):
                pending.append((at, at + size, f"{name[:-4]}/"))
            elif size > MAX_FILE_BYTES:
                raise UserError(f"{path}: member {name} has {size} bytes, an image at most {MAX_FILE_BYTES}")
            else:
                yield name.encode(errors="surrogateescape"), at, size


def cache_folder() -> Path:
    """Where what can be computed again is kept: touvron-methods in $XDG_CACHE_HOME (~/.cache)."""
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if folder == "~/.cache":  # a user without a home
        raise UserError("there is no home folder to keep a cache in; set HOME or XDG_CACHE_HOME to a writable folder")
    return Path(folder) / "touvron-methods"


def cache_file(key: list, suffix: str, folder: str = "") -> Path:
    """The file of the cache for what follows from `key`, by a hash of it."""
    return cache_folder() / folder / (hashlib.sha256(repr(key).encode()).hexdigest()[:32] + suffix)


def keep(file: Path, write: Callable) -> str | None:
    """Has `write(open file)` fill a file of the cache, all of it or none; returns why it cannot be kept, if so."""
    temporary = file.with_name(f"{file.name}.{os.uname().nodename}-{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as out:
            write(out)
        os.replace(temporary, file)
    except (OSError, RuntimeError) as error:  # costs time only; RuntimeError: torch.save's, of a full disk
        why = getattr(error, "strerror", None) or one_line(error)
        return f"nothing can be kept in {file.parent} ({why}): set XDG_CACHE_HOME to a writable folder"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
    with contextlib.suppress(OSError):  # another job is at it
        _forget(cache_folder())


def _forget(folder: Path) -> None:
    """Removes from the cache, where it holds more than it may, what was used longest ago: features, and indexes after
    30 days, for a run may have mapped them."""
    files = [(max(stat.st_atime, stat.st_mtime), stat.st_size, path) for path in folder.rglob("*.*")
             for stat in [path.stat()]]
    room = min(CACHE_BYTES, shutil.disk_usage(folder).total / 10)
    for used, size, path in sorted(files, reverse=True):
        room -= size
        if room < 0 and (path.parent != folder or used < time.time() - 30 * 24 * 3600):
            path.unlink()


def _kept(key: list, make: Callable[[], dict], say: Callable = print) -> dict:
    """make()'s dictionary, whose arrays are mapped, from the cache where it holds that under `key` and the folders in
    class folders, "inner", are as they were."""
    file, problems = cache_file([FORMAT, *key], ".pt"), []

    def kept(value):
        if not isinstance(value, np.ndarray):
            return value
        place = cache_folder() / f"{_hash(value)}.npy"
        with contextlib.suppress(Exception):  # another job was faster: it needs its file to stay, on a network's disk
            return Mapped(str(place))
        problems.append(keep(place, lambda out: np.save(out, value)))
        return value if problems[-1] else Mapped(str(place))

    # What is absent, was cut short by a crash or has lost a folder is made.
    with contextlib.suppress(Exception), torch.serialization.safe_globals([Mapped]):
        index = torch.load(file, weights_only=True)
        if all(os.stat(folder).st_mtime_ns == time for folder, time in index.get("inner", ())):
            return index
    index = tree_map(kept, make())
    problems.append(keep(file, lambda out: torch.save(index, out)))
    if problem := next(filter(None, problems), None):
        say(f"warning: {problem}; the images will be listed again at the next start")
    return index


def _relabelled(labels: np.ndarray, table: np.ndarray) -> np.ndarray:
    """table[labels], mapped if they are."""
    if getattr(labels, "place", None) is None:
        return table[labels]
    return _kept([_hash(labels), table.tolist()], lambda: {"labels": table[labels]})["labels"]


def _index(path: str, scan: Callable[[str], Iterator], splits: bool, say: Callable) -> dict:
    """{split: what _by_class says of the files of scan(path)} and "inner", the folders in class folders with their
    times of change. The splits are "train" and "val" if asked for and there, else "", all files."""
    rows = list(watched(scan(path), f"listing {path}", "files", say))
    if len(rows) > 10**6:
        say(f"{path}: sorting {len(rows)} files")
    inner = [[os.fsdecode(row[0]), row[1]] for row in rows if row[0].endswith(b"/")]
    both = splits and any(row[0].startswith((b"train/", b"val/")) for row in rows)
    return {"inner": inner} | {split: _by_class(rows, split) for split in (("train", "val") if both else [""])}


def _by_class(rows: list[tuple], split: str) -> dict:
    """Of rows (name, ...) the images in class folders (of `split`, if it is named), by class and name: "classes",
    "labels", "names" and, in an archive, "offsets" and "sizes"; how many other files there are "ignored", and how many
    images in no class folder, "flat": where there are no others, all of class ""."""
    deep, found, flat, counts = len(split) > 0, [], [], {"ignored": 0, "flat": 0}
    for row in rows:
        folders, name = row[0].split(b"/")[:-1], os.fsdecode(row[0])
        inside, image = len(folders) > deep, name.lower().endswith(EXTENSIONS)
        if JUNK.search(name) or name.endswith("/") or (deep and folders[:1] != [split.encode()]):
            continue
        if inside and image:
            found.append((folders[deep], *row))
        else:
            counts["flat" if image else "ignored"] += inside or image
            flat += [(b"", *row)] * image
    found = sorted(found or flat)
    columns = dict(zip(("labels", "names", "offsets", "sizes"), map(np.array, zip(*found))))
    classes, columns["labels"] = np.unique(columns.get("labels", []), return_inverse=True)
    return {"classes": [os.fsdecode(c) for c in classes.tolist()], **columns, **counts}


def _open_named(name: str, folder: str, split: str) -> Source:
    """A data set of NAMED; the reader's docstring becomes the message where a file is missing or of another form."""
    where, (read, *options) = f"--data {name}:{folder}", NAMED[name]
    if not Path(folder).is_dir():
        raise UserError(f"{where}: there is no folder {folder}")
    try:
        return read(name, Path(folder), split, *options)
    except UserError:
        raise
    except ImportError as e:
        raise UserError(f"{where}: torchvision needs {e.name} to read its labels; pip install {e.name}") from None
    except Exception as error:
        said, expected = f"{type(error).__name__}: {error}".splitlines()[0], " ".join(read.__doc__.split())
        raise UserError(f"{where} has not the expected form ({said}); expected: {expected}") from None


def _cifar(name: str, folder: Path, split: str, make: type) -> Source:
    """torchvision's cifar-10-batches-py/ or cifar-100-python/."""
    data, levels = make(folder, train=split == "train"), None
    if name == "cifar100":  # its files are pickles; torchvision has just checked their MD5 sums
        paths = [folder / data.base_folder / file for file in ("train" if split == "train" else "test", "meta")]
        labels, names = (pickle.loads(path.read_bytes(), encoding="latin1") for path in paths)
        levels = {"coarse": (names["coarse_label_names"], np.array(labels["coarse_labels"]))}
    source = Source(data.classes, data.targets, levels)
    source.title, source.pixels = f"{name} {split}", data.data
    return source


def _torchvision(name: str, folder: Path, split: str, make: type, *train: str) -> Source:
    """torchvision's flowers-102/, stanford_cars/, food-101/, fgvc-aircraft-2013b/, dtd/ or oxford-iiit-pet/."""
    samples = []
    for part in train if split == "train" else ["test"]:
        data = make(folder, split=part)
        pairs = getattr(data, "_samples", None)  # StanfordCars; the others keep two lists
        samples += pairs or zip(getattr(data, "_image_files", None) or data._images, data._labels)
    files, labels = zip(*samples)
    classes = [str(c) for c in getattr(data, "classes", None) or range(max(labels) + 1)]
    return Files(folder, [os.path.relpath(f, folder) for f in files], classes, labels)


def _inaturalist(name: str, folder: Path, split: str, year: int) -> Source:
    """iNaturalist 2018/2019 by the competition's files: train_val{year}/, {train,val}{year}.json, categories.json."""
    listing = json.loads((folder / f"{split}{year}.json").read_text())
    categories = sorted(json.loads((folder / "categories.json").read_text()), key=lambda c: c["id"])
    file_of = {image["id"]: image["file_name"] for image in listing["images"]}
    label_of = {category["id"]: label for label, category in enumerate(categories)}
    files = [file_of[a["image_id"]] for a in listing["annotations"]]
    labels, levels = np.array([label_of[a["category_id"]] for a in listing["annotations"]]), {}
    for level in ("kingdom", "phylum", "class", "order", "family", "genus", "name"):  # thesis section 2.4.1
        if all(level in c for c in categories):
            values, to_level = np.unique([str(c[level]) for c in categories], return_inverse=True)
            levels["species" if level == "name" else level] = (values.tolist(), to_level[labels])
    return Files(folder, files, [str(c.get("name", c["id"])) for c in categories], labels, levels)


def _drawn(name: str, folder: Path, split: str, place: str, tested: int) -> Source:
    """torchvision's eurosat/2750/CLASS/*.jpg or caltech101/101_ObjectCategories/CLASS/*.jpg."""
    # No official split: so many test images of each class, or all but so many, drawn for good; of a smaller copy 30%.
    whole, chosen = open_images(str(folder / place), f"--data {name}:{folder}"), []
    for label in range(len(whole.classes)):
        mine = np.random.RandomState(label).permutation(np.flatnonzero(whole.labels == label))  # the same for ever
        test = tested if len(mine) > abs(tested) else round(0.3 * len(mine))
        chosen += sorted(mine[test:] if split == "train" else mine[:test])
    return Files(whole.title, whole.names[chosen], whole.classes, whole.labels[chosen])


def _sun397(name: str, folder: Path, split: str) -> Source:
    """SUN397 as torchvision lays it out, SUN397/ClassName.txt and SUN397/a/abbey/*.jpg, with the first of the ten
    official partitions, Training_01.txt and Testing_01.txt, in Partitions/, SUN397/ or the folder itself."""
    root, part = folder / "SUN397", "Training_01.txt" if split == "train" else "Testing_01.txt"
    classes = (root / "ClassName.txt").read_text().split()
    places = [place / part for place in (folder / "Partitions", root, folder)]
    names = next((place for place in places if place.is_file()), places[0]).read_text().split()
    labels = [classes.index(n.rpartition("/")[0]) for n in names]
    return Files(root, [n.lstrip("/") for n in names], [c[1:] for c in classes], labels)


class _Plain(pickle.Unpickler):
    """Containers, strings, numbers and numpy's arrays, by old and new module names; what would run code is refused."""

    known = {f.__name__: f for f in (np.ndarray, np.dtype, *(np.zeros(1).__reduce_ex__(p)[0] for p in (4, 5)))}
    known["encode"] = lambda text, _: text.encode("latin1")  # in place of _codecs': how protocol 2 writes bytes

    def find_class(self, module: str, name: str):
        if module.partition(".")[0] not in ("numpy", "_codecs") or name not in self.known:
            raise pickle.PickleError(f"it asks for {module}.{name}")
        return self.known[name]


def _cog(name: str, folder: Path, split: str, level: int) -> Source:
    """One level of ImageNet-CoG (arXiv:2012.05649): ImageNet-21k's folders nXXXXXXXX/*.JPEG and the two split files,
    the levels' concepts (five lists) and {concept: {"train": file names, "test" or "val": ...}}, lists or arrays."""
    levels, splits = (_Plain((folder / file).open("rb")).load() for file in (COG_LEVELS, COG_SPLITS))
    concepts = sorted(map(str, (list(levels.values()) if isinstance(levels, dict) else levels)[level - 1]))
    files = [splits[c]["train"] if split == "train" else splits[c].get("test", splits[c].get("val")) for c in concepts]
    names = [f"{c}/{os.fsdecode(name).rpartition('/')[2]}" for c, inside in zip(concepts, files) for name in inside]
    return Files(folder, names, concepts, np.repeat(np.arange(len(concepts)), [len(inside) for inside in files]))


NAMED: dict[str, tuple] = {  # reader and its options, of torchvision's sets the splits that the papers train on
    "cifar10": (_cifar, datasets.CIFAR10), "cifar100": (_cifar, datasets.CIFAR100),
    "flowers102": (_torchvision, datasets.Flowers102, "train", "val"),
    "cars": (_torchvision, datasets.StanfordCars, "train"), "food101": (_torchvision, datasets.Food101, "train"),
    "aircraft": (_torchvision, datasets.FGVCAircraft, "trainval"),
    "dtd": (_torchvision, datasets.DTD, "train", "val"), "pets": (_torchvision, datasets.OxfordIIITPet, "trainval"),
    "inat2018": (_inaturalist, 2018), "inat2019": (_inaturalist, 2019), "sun397": (_sun397,),
    "eurosat": (_drawn, "eurosat/2750", 810), "caltech101": (_drawn, "caltech101/101_ObjectCategories", -30),
    **{f"cog{level}": (_cog, level) for level in range(1, 6)},
}
