"""Timings of our pieces against the straightforward ones, interleaved in one run on one thread.

    python tests/benchmarks.py [loader FOLDER_OF_JPEGS] [optimizers] [drop_path] [talking_heads] [cross_patch] [column]
        [memory] [index] [neighbours] [retrieval] [growth]

A ratio (above 1: ours is faster) is the median over rounds in which both are run in turn, of the CPU time, which the
machine's other work disturbs least; `memory`, the second part of `index` and `growth` print sizes and seconds.
FOLDER_OF_JPEGS holds photographs at any depth, about ImageNet's size. The baselines are the official pipelines, built
here from torchvision, PIL and plain torch.
"""

import collections
import contextlib
import functools
import importlib
import io
import itertools
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torch.nn.functional as F
from conftest import PeakMemory
from PIL import Image, ImageFilter
from torch import nn
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

import cait
import deit
import deit3
import grafit
import patchconvnet
import resmlp
import trex
from common import data, evaluate, images, sources
from common.optim import EMA, Lamb, param_groups

torch.set_num_threads(1)


def compare(title: str, baseline, ours, *, rounds: int = 7) -> None:
    """Prints baseline's and our time and their ratio."""
    baseline(), ours()
    pairs = []
    for _ in range(rounds):
        times = []
        for run in (baseline, ours):
            start = time.process_time()
            run()
            times.append(time.process_time() - start)
        pairs.append(times)
    ratio = statistics.median(a / b for a, b in pairs)
    one, two = (statistics.median(p[i] for p in pairs) * 1e3 for i in (0, 1))
    print(f"{title:64s} {one:9.2f} ms {two:9.2f} ms   ratio {ratio:5.2f}", flush=True)


class Memory(sources.Source):
    """Files in memory."""

    def __init__(self, files: list[bytes]):
        super().__init__(["x"], np.zeros(len(files)))
        self.files = files

    def read(self, index):
        return images.decode(self.files[index])


def in_full(batch: tuple) -> torch.Tensor:
    """What the loop of DeiT makes of a loader's batch."""
    return deit.erase(evaluate.normalize(batch[0]), batch[1])


def stages(files: list[bytes], pieces: dict) -> None:
    """Prints where DeiT's pipeline spends its CPU time: the official pieces, ours, and the least that the same pixels
    leave, per stage what cannot be left out. decoding: the decoder alone, which must read every bit; crop: ours,
    torch's resize, the fastest known within 50 dB; RandAugment: ours, Pillow's operations, whose bytes the tests want;
    torch and PIL: three quarters of ours, for a quarter of the images draws no operation; batch: fresh memory for the
    float images, touched once and freed; erasing: ours, its noise; flip and rest, what lies between the stages: none.
    Both pipelines draw the same operations."""
    times, count, rounds, rng, augment = collections.Counter(), len(files), 15, random.Random(), deit.rand_augment
    mine = {(images, "decode"): "decoding", (images, "resize"): "crop", (torch.Tensor, "flip"): "flip",
            (deit, "rand_augment"): "RandAugment", (images, "to_pil"): "torch and PIL",
            (images, "from_pil"): "torch and PIL", (torch, "stack"): "batch", (evaluate, "normalize"): "batch",
            (deit, "erase"): "erasing"}

    def timed(column: str, stage: str, action):
        def run(*args):
            start = time.process_time()
            result = action(*args)
            times[column, stage] += time.process_time() - start
            return result

        return run

    pieces["RandAugment"] = lambda image, _=None: augment(image, rng)
    steps = T.Compose([timed("official", stage, piece) for stage, piece in pieces.items()])
    samples = data.Samples(Memory(files), deit.TrainTransform(deit.Recipe()), 0)
    encoded = [torch.frombuffer(bytearray(f), dtype=torch.uint8) for f in files]
    decoder = images.jpeg_decoder() or (lambda file: images.decode(file.numpy().tobytes()))

    def official() -> None:  # as `ours`, frees its batch within the time that is measured
        timed("official", "batch", torch.stack)([steps(f) for f in files])

    def ours() -> None:
        in_full(samples.__getitems__([(number, i, 0) for i in range(count)]))

    for number in range(rounds + 1):
        if number == 1:  # the first round warms up
            times.clear()
        rng.seed(number)
        timed("official", "all", official)()
        with contextlib.ExitStack() as patches:
            for (owner, name), stage in mine.items():
                action = pieces["RandAugment"] if stage == "RandAugment" else getattr(owner, name)
                patches.enter_context(mock.patch.object(owner, name, timed("ours", stage, action)))
            rng.seed(number)
            timed("ours", "all", ours)()
        for file in encoded:
            timed("least", "decoding", decoder)(file)
        timed("least", "batch", lambda: torch.ones(count, 3, 224, 224).shape)()
    for stage, share in {"crop": 1, "RandAugment": 1, "torch and PIL": 3 / 4, "erasing": 1}.items():
        times["least", stage] = times["ours", stage] * share
    columns = ("official", "ours", "least")
    rows = {stage: np.array([times[c, stage] for c in columns]) * 1e3 / rounds / count for stage in (*pieces, "all")}
    rows["all"][2] = sum(row[2] for row in rows.values())
    rows["rest"] = 2 * rows["all"] - sum(rows.values())
    rows["all, three repeats share a decode"] = rows["all"] - rows["decoding"] * (0, 2 / 3, 2 / 3)
    print(f"{'DeiT, ms of CPU time per photograph':40s}" + "".join(f"{column:>9s}" for column in columns))
    for stage in (*pieces, "rest", "all", "all, three repeats share a decode"):
        row = rows[stage]
        ratios = f"   ratio {row[0] / row[1]:5.2f}, at most {row[0] / row[2]:5.2f}" if stage.startswith("all") else ""
        print(f"{stage:40s}" + "".join(f"{value:9.3f}" for value in row) + ratios, flush=True)


def loader(folder: str) -> None:
    """Per photograph: the official 3-Augment and validation pipelines against what our loader processes do."""
    files = [p.read_bytes() for p in sorted(Path(folder).rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")][:100]
    normalize = T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    bicubic = T.InterpolationMode.BICUBIC

    def blur(image):
        return image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))

    choice = T.RandomChoice([T.Grayscale(3), T.RandomSolarize(128, p=1.0), T.Lambda(blur)])
    three = T.Compose(
        [
            T.RandomResizedCrop(224, interpolation=bicubic),
            T.RandomHorizontalFlip(),
            choice,
            T.ColorJitter(0.3, 0.3, 0.3),
            T.ToTensor(),
            normalize,
        ]
    )
    src = T.Compose([
        T.Resize(224, interpolation=bicubic), T.RandomCrop(224, padding=4, padding_mode="reflect"),
        T.RandomHorizontalFlip(), choice, T.ColorJitter(0.3, 0.3, 0.3), T.ToTensor(), normalize
    ])
    validation = T.Compose([T.Resize(256, interpolation=bicubic), T.CenterCrop(224), T.ToTensor(), normalize])

    def official(transform):
        return lambda: torch.stack([transform(Image.open(io.BytesIO(f)).convert("RGB")) for f in files])

    source = Memory(files)

    def ours(transform, repeats=1):
        samples, epochs = data.Samples(source, transform, 0), itertools.count()  # new draws each time, as officially
        places = [(i, r) for i in range(len(files)) for r in range(repeats)][: len(files)]
        return lambda: samples.__getitems__([(epoch, *place) for epoch in (next(epochs),) for place in places])

    def rand(image):
        return deit.rand_augment(image, random)  # PIL throughout, as timm's

    def erasing(x):
        if random.random() < 0.25:
            top, left, height, width = deit.erasing_box(224, 224, random)
            x[:, top : top + height, left : left + width] = torch.empty(3, height, width).normal_()
        return x

    crop = T.RandomResizedCrop(224, interpolation=bicubic)
    randaugment = T.Compose(
        [crop, T.RandomHorizontalFlip(), T.Lambda(rand), T.ToTensor(), normalize, T.Lambda(erasing)]
    )

    def finished(batches):
        return lambda: in_full(batches())

    nine = deit.TrainTransform(deit.Recipe())
    compare("RandAugment, erasing: official / worker's side", official(randaugment), ours(nine))
    compare("RandAugment, erasing: official / finished float batch", official(randaugment), finished(ours(nine)))
    compare("RandAugment, erasing: three repeats, finished float batch", official(randaugment), finished(ours(nine, 3)))
    stages(files, {"decoding": lambda f: Image.open(io.BytesIO(f)).convert("RGB"), "crop": crop,
                   "flip": T.RandomHorizontalFlip(), "RandAugment": None, "torch and PIL": T.ToTensor(),
                   "batch": normalize, "erasing": erasing})

    def nine_times(file):
        crops = []
        for i in range(9):
            size, scale, blur, solarize = (224, (0.25, 1.0), 0.2, 0.2) if i == 0 else (96, (0.05, 0.25), 0.5, 0.0)
            image = Image.open(io.BytesIO(file)).convert("RGB")
            image = T.RandomHorizontalFlip()(T.RandomResizedCrop(size, scale, interpolation=bicubic)(image))
            crops.append(normalize(T.ToTensor()(trex.colours(image, random, blur, solarize))))
        return crops

    some = files[:25]
    multi = data.Samples(source, trex.TrainTransform(trex.Recipe()), 0)
    keys = [(0, i, 0) for i in range(len(some))]
    compare(
        "t-ReX's nine crops: decoded nine times / ours, once", lambda: [nine_times(f) for f in some],
        lambda: multi.__getitems__(keys)
    )

    in1k = deit3.TrainTransform(deit3.Recipe())

    def validate(image, _rng):
        return images.eval_transform(image, (224, 224), 0.875), ()

    for module in ("torchcodec.decoders", "torchvision.io"):  # each in place of the one that jpeg_decoder chooses
        try:
            found = importlib.import_module(module)
            chosen = functools.partial(found.decode_jpeg, mode=found.ImageReadMode.RGB)
        except Exception as error:
            print(f"{module}: no decoder here ({error})")
            continue

        def decoded_by(decoder, batches):
            with mock.patch.object(images, "jpeg_decoder", lambda: decoder):
                return batches()

        parts = {"3-Augment, RRC": ours(in1k), "validation": ours(validate)}
        for title, part in {"decoding": lambda: [images.decode(f) for f in files], **parts}.items():
            compare(f"{title}: Pillow / {module}", lambda p=part: decoded_by(None, p),
                    lambda p=part, c=chosen: decoded_by(c, p))
    compare("3-Augment, RRC: official / worker's side", official(three), ours(in1k))
    compare("3-Augment, RRC, three repeats share a decode", official(three), ours(in1k, 3))
    compare(
        "3-Augment, SRC: official / worker's side", official(src), ours(deit3.TrainTransform(deit3.RECIPES["in21k"]))
    )
    whole = ours(in1k)

    def with_device_part():
        batch = whole()
        return deit3.augment(batch[0], batch[1])

    compare("3-Augment, RRC: official / worker's and device's part, one core", official(three), with_device_part)
    compare(
        "validation: official / worker's side",
        official(validation),
        ours(validate),
    )


class PlainLamb(torch.optim.Optimizer):
    """LAMB as it is usually written: a loop over tensors."""

    def __init__(self, params, lr):
        super().__init__(params, dict(lr=lr, weight_decay=0.0))
        self.t = 0

    @torch.no_grad()
    def step(self):
        self.t += 1
        norm = torch.stack([p.grad.norm() for g in self.param_groups for p in g["params"]]).norm().clamp(min=1.0)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["m"], state["v"] = torch.zeros_like(p), torch.zeros_like(p)
                grad = p.grad / norm
                state["m"].mul_(0.9).add_(grad, alpha=0.1)
                state["v"].mul_(0.999).addcmul_(grad, grad, value=0.001)
                update = (state["m"] / (1 - 0.9**self.t)).div_(
                    (state["v"].sqrt() / (1 - 0.999**self.t) ** 0.5).add_(1e-6)
                )
                if group["weight_decay"]:
                    update.add_(p, alpha=group["weight_decay"])
                    w, u = p.norm(2.0), update.norm(2.0)
                    update.mul_(torch.where((w > 0) & (u > 0), w / u, torch.ones_like(w)))
                p.add_(update, alpha=-group["lr"])


def optimizers() -> None:
    """One step on ViT-B's parameters."""
    model = deit3.build_model("vit_b")
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    plain, ours = PlainLamb(param_groups(model, 0.02), lr=1e-6), Lamb(param_groups(model, 0.02), lr=1e-6)
    compare("LAMB, ViT-B: loop / ours", plain.step, ours.step)
    ema, average = EMA(model, 0.9999), {k: v.clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def plain_ema():
        for k, v in model.state_dict().items():
            average[k].copy_(average[k] * 0.9999 + (1 - 0.9999) * v)

    compare("EMA, ViT-B: loop over the state dict / ours", plain_ema, lambda: ema.update(model, skip=torch.zeros(())))


class MaskedBlock(deit3.Block):
    """Stochastic depth as usually written: every branch computed, dropped ones multiplied by zero."""

    def add(self, total, x, norm, layer, gamma):
        mask = (torch.rand(len(x), 1, 1) >= self.drop_path).float() / (1 - self.drop_path)
        return total + mask * gamma * layer(norm(x))


def drop_path() -> None:
    """Forward and backward of two ViT-S blocks, batch 32, 197 tokens."""
    x = torch.randn(32, 197, 384)
    for rate in (0.1, 0.3, 0.5):
        stacks = [
            nn.Sequential(*[c(384, 6, scale=1e-4, drop_path=rate) for _ in range(2)]).train()
            for c in (MaskedBlock, deit3.Block)
        ]
        compare(
            f"ViT-S blocks, drop rate {rate}: masked / kept only", *[lambda s=s: s(x).sum().backward() for s in stacks],
            rounds=9
        )


class PermutedHeads(cait.Attention):
    """Talking heads as they are usually written: the maps are permuted for a Linear over the heads, and back."""

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        maps = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)
        maps = self.proj_l(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2).softmax(dim=-1)
        maps = self.proj_w(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.proj((maps @ v).transpose(1, 2).reshape(B, N, C))


def talking_heads() -> None:
    """Forward and backward pass of the attention and of a whole model."""

    def step(module, x):
        return lambda: module(x).sum().backward()

    for name, batch, size in (("cait_xxs24", 8, 224), ("cait_s24", 4, 224), ("cait_xxs24", 2, 384)):
        dim, heads = cait.MODELS[name]["dim"], cait.MODELS[name]["heads"]
        x = torch.randn(batch, (size // 16) ** 2, dim)
        title = f"talking heads, {name} at {size}: permute and Linear / ours"
        compare(title, step(PermutedHeads(dim, heads), x), step(cait.Attention(dim, heads), x))
    ours, permuted = cait.build_model("cait_xxs24", drop_path=0.0), cait.build_model("cait_xxs24", drop_path=0.0)
    for block in permuted.blocks:
        block.attn.__class__ = PermutedHeads
    images = torch.randn(4, 3, 224, 224)
    compare(
        "cait_xxs24, whole training step: permute and Linear / ours", step(permuted, images), step(ours, images),
        rounds=5
    )


class TransposedCrossPatch(resmlp.CrossPatch):
    """The layer across patches as a Linear on the transposed maps."""

    def forward(self, x):
        return nn.functional.linear(x.transpose(1, 2), self.weight, self.bias).transpose(1, 2)


def cross_patch() -> None:
    """ResMLP's layer across patches."""
    x = torch.randn(16, 196, 384, requires_grad=True)
    ours, usual = resmlp.CrossPatch(196, 196), TransposedCrossPatch(196, 196)
    compare(
        "cross-patch layer, S: transposed Linear / ours", lambda: usual(x).sum().backward(),
        lambda: ours(x).sum().backward()
    )


class TransposedBlock(patchconvnet.Block):
    """The column's block on tokens (B, N, C), transposed to (B, C, H, W) and back around its convolutions."""

    def forward(self, x):
        B, H, W, C = x.shape
        y = self.norm1(x.reshape(B, H * W, C)).transpose(1, 2).reshape(B, C, H, W).contiguous()
        first, gelu, depthwise, _, se, last = self.attn.qkv_pos
        y = gelu(depthwise(gelu(first(y))))
        y = y * torch.sigmoid(se.conv_expand(torch.relu(se.conv_reduce(y.mean((2, 3), keepdim=True)))))
        return x + self.gamma_1 * last(y).flatten(2).transpose(1, 2).contiguous().view(B, H, W, C)


def column() -> None:
    """PatchConvNet's column in its layout and with transposes around every block."""
    for size in (14, 24):
        x = torch.randn(8, size, size, 384)
        ours, usual = patchconvnet.Block(384, "layernorm", 1e-4, 0.0), TransposedBlock(384, "layernorm", 1e-4, 0.0)
        title = f"PatchConvNet-S block at {16 * size}: with transposes / ours"
        compare(title, lambda x=x, b=usual: b(x).sum().backward(), lambda x=x, b=ours: b(x).sum().backward())
        with torch.inference_mode():
            compare(f"{title}, inference", lambda x=x, b=usual: b(x), lambda x=x, b=ours: b(x))


def memory() -> None:
    """Peak memory of one image's inference against resolution (Figure 5.3), weights not counted; the ViT writes its
    attention maps out. On meta tensors: nothing is computed."""
    for size in (224, 384, 512, 768, 1024):
        row = []
        for build in (
            lambda: patchconvnet.build_model("patchconvnet_s60"),
            lambda size=size: deit.build_model("deit_s", img_size=size)
        ):
            with torch.device("meta"), torch.no_grad():
                model = build().eval()
                with PeakMemory(model) as peak:
                    model(torch.empty(1, 3, size, size))
            row.append(peak.peak / 2**20)
        print(f"peak memory at {size:4d}: PatchConvNet-S60 {row[0]:7.1f} MiB, DeiT-S {row[1]:7.1f} MiB")


def index() -> None:
    """Listing 60,000 files: torchvision's ImageFolder against our cached index; members of a tar against files; what
    opening sets of ImageNet's and of ImageNet-21k's size again takes."""
    with tempfile.TemporaryDirectory() as root:
        os.environ["XDG_CACHE_HOME"] = root + "/cache"
        out = io.BytesIO()
        Image.new("RGB", (32, 32)).save(out, "JPEG")
        for c in range(100):
            os.makedirs(f"{root}/d/train/c{c:03d}")
            for i in range(600):
                Path(f"{root}/d/train/c{c:03d}/{i}.jpg").write_bytes(out.getvalue())
        with tarfile.open(root + "/d.tar", "w") as tar:
            tar.add(root + "/d/train", "train")
        compare(
            "listing 60,000 files: ImageFolder / cached index",
            lambda: ImageFolder(root + "/d/train"),
            lambda: sources.open_images(root + "/d/train", ""),
        )
        source = sources.open_data(root + "/d.tar", splits=("train",))["train"]
        files = [source.name(i).split(": ")[1] for i in range(2000)]
        fd = os.open(root + "/d.tar", os.O_RDONLY)
        compare(
            "reading 2,000 files of 0.6 kB: open().read() / from the tar",
            lambda: [open(f"{root}/d/{f}", "rb").read() for f in files],
            lambda: [os.pread(fd, int(source.sizes[i]), int(source.offsets[i])) for i in range(2000)],
        )


    with tempfile.TemporaryDirectory() as root:
        for count, classes in ((1_281_167, 1000), (14_197_122, 21_841)):
            for kind, spec in make_large(root, count, classes).items():
                found = opened(root, spec)
                print(f"opening {count:,} images again, {kind:32s} {found['open']:6.3f} s, with the digest "
                      f"{found['digest']:6.3f} s, private memory {found['private']:6.1f} MiB", flush=True)


def fake_index(count: int, classes: int) -> dict:
    """What sources._by_class would say of so many images, their names as long as ImageNet's."""
    labels = np.arange(count) * classes // count
    digits = (np.arange(count)[:, None] // 10 ** np.arange(8)[::-1] % 10 + 48).astype(np.uint8)
    folder = (labels[:, None] // 10 ** np.arange(8)[::-1] % 10 + 48).astype(np.uint8)
    letters = [np.broadcast_to(np.frombuffer(text, np.uint8), (count, len(text))) for text in (b"n", b"/n", b".JPEG")]
    names = np.concatenate([letters[0], folder, letters[1], digits, letters[2]], axis=1)
    names = np.ascontiguousarray(names).view(f"S{names.shape[1]}")[:, 0]
    columns = {"labels": labels, "names": names, "offsets": np.arange(count) * 110_592, "sizes": labels + 109_000}
    return {"classes": [f"n{c:08d}" for c in range(classes)], **columns, "ignored": 0, "flat": 0}


def make_large(root: str, count: int, classes: int) -> dict[str, tuple]:
    """{kind: arguments of open_data} of sets of so many images, whose index is in the cache below `root`: there are no
    images, for opening a set again looks at the archive's size and time, or at those of the class folders, alone."""
    base = Path(root, str(count))
    coarse, folder, tar = base / "coarse.json", base / "folder", base / "train.tar"
    for split in ("train", "val"):
        for c in range(classes):
            (folder / split / f"n{c:08d}").mkdir(parents=True)
    coarse.write_text(json.dumps({f"n{c:08d}": str(c % 127) for c in range(classes)}))
    with tarfile.open(tar, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))
    kinds = {"a tar with train/ and val/": (str(tar), None), "a folder": (str(folder), None),
             "a folder, its coarse labels": (f"{folder}@coarse", str(coarse))}
    rows = [(b"train/x", 0, 0)]

    def parts(_rows, split: str) -> dict:
        return fake_index(50_000 if split == "val" else count, classes)

    names = ("_scan_tar", "scan_folder")
    with contextlib.ExitStack() as stack, mock.patch.object(sources, "_by_class", parts):
        stack.enter_context(mock.patch.dict(os.environ, XDG_CACHE_HOME=f"{root}/cache"))
        [stack.enter_context(mock.patch.object(sources, name, lambda path: iter(rows))) for name in names]
        for spec, labels in kinds.values():
            sources.open_data(spec, coarse_labels=labels)
    return kinds


OPEN = """
import sys, time
from common import sources
def private():
    sizes = [line.split() for line in open("/proc/self/smaps_rollup")]
    return sum(int(size[1]) for size in sizes if size[0] == "Private_Dirty:") / 1024
sources.open_data("shapes")
before, start = private(), time.perf_counter()
found = sources.open_data(sys.argv[1], coarse_labels=sys.argv[2] or None)
opened = time.perf_counter()
found["train"].digest()
print(dict(open=opened - start, digest=time.perf_counter() - start, private=private() - before))
"""


def opened(root: str, spec: tuple) -> dict[str, float]:
    """Seconds that open_data takes in a new process, those with the digest that a run asks for, and the memory (MiB) it
    then has for itself. Pages of the mapped index belong to the file, whoever else reads it."""
    environment = {**os.environ, "XDG_CACHE_HOME": f"{root}/cache", "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, "-c", OPEN, spec[0], spec[1] or ""]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return eval(done.stdout.splitlines()[-1])


def growth() -> None:
    """What a run does once or once per epoch, against the number of images: seconds (the best of three) or MiB, and the
    slope of its logarithm between the last two sizes: 1 is linear."""
    sizes, rows = [10**4, 10**5, 10**6, 10**7], {}

    def measure(title: str, action) -> None:
        times = []
        for _ in range(3):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
        rows.setdefault(f"{title}, s", []).append(min(times))

    for count in sizes:
        with tempfile.TemporaryDirectory() as root:
            for kind, spec in make_large(root, count, max(10, count // 650)).items():
                found = opened(root, spec)
                rows.setdefault(f"opening {kind} again, s", []).append(found["digest"])
                rows.setdefault(f"opening {kind} again, MiB", []).append(found["private"])
        measure("epoch order, every rank", lambda count=count: data.epoch_order(count, 0, 0, 1))
        ranks = dict(batch_size=2048, micro_batch=256, group=32, world_size=8, rank=0, repeats=1, seed=0)
        measure("sampler, a whole epoch of one rank of 8", lambda n=count, r=ranks: list(data.GlobalBatches(n, **r)))
        measure("keys of an evaluation, one rank of 8", lambda count=count: data.eval_batches(count, 256, 8, 0))
        generator = torch.Generator().manual_seed(0)
        keys, labels = torch.randn(count, 32, generator=generator), torch.arange(count) % 1000
        queries = torch.randn(16, 32, generator=generator)
        measure("kNN, 16 queries, D 32", lambda k=keys, q=queries: evaluate.nearest(q, k, 30))
        task = queries, labels[:16], keys, labels
        measure("mAP, 16 queries, D 32", lambda t=task: evaluate.mean_average_precision(*t))
    print(f"{'':52s}" + "".join(f"{size:>12,}" for size in sizes) + "   slope")
    for title, values in rows.items():
        slope = math.log10(values[-1] / values[-2])
        print(f"{title:52s}" + "".join(f"{value:12.4f}" for value in values) + f"{slope:8.2f}", flush=True)


def neighbours() -> None:
    """Grafit's kNN loss and its gradient against the materialised one (batch 128, memory 40,000 x 256, 100 labels)."""
    labels = torch.arange(40_000) % 100
    bank, own = torch.randn(40_000, 256), torch.randperm(40_000)[:128]
    z, rows = (bank[own] + torch.randn(128, 256)).requires_grad_(), torch.arange(128)

    def materialised() -> None:
        scores = F.normalize(z, dim=1) @ F.normalize(bank, dim=1).T / 0.05
        scores = scores.index_put((rows, own), torch.tensor(-torch.inf))
        log_p = scores.log_softmax(1).masked_fill(labels[own][:, None] != labels, -torch.inf)
        (-log_p.logsumexp(1).mean()).backward()

    compare(
        "kNN loss: materialised log_softmax / in chunks",
        materialised,
        lambda: grafit.knn_loss(z, labels[own], bank, labels, own).backward(),
    )


def retrieval() -> None:
    """Exact mean average precision of 100 queries among 50,000 (D 128, 100 labels): argsort against ours."""
    for title, spread in (("good features", 1.0), ("random features", 100.0)):
        centres, labels, asked = torch.randn(100, 128), torch.arange(50_000) % 100, torch.arange(100)
        gallery = F.normalize(centres[labels] + spread * torch.randn(50_000, 128), dim=1)
        queries = F.normalize(centres[asked] + spread * torch.randn(100, 128), dim=1)

        def argsort(queries=queries, gallery=gallery, labels=labels, asked=asked) -> float:
            order = (queries @ gallery.T).argsort(dim=1, descending=True)
            hits = (labels[order] == asked[:, None]).double()
            return ((hits.cumsum(1) / torch.arange(1, 50_001)) * hits).sum(1).div(hits.sum(1)).mean().item()

        def ours(queries=queries, gallery=gallery, labels=labels, asked=asked) -> float:
            return evaluate.mean_average_precision(queries, asked, gallery, labels)

        assert abs(argsort() - ours()) < 1e-6
        compare(f"mAP, {title}: argsort / ours", argsort, ours)


if __name__ == "__main__":
    wanted = sys.argv[1:]
    if "loader" in wanted:
        loader(wanted[wanted.index("loader") + 1])
    for part in (optimizers, drop_path, talking_heads, cross_patch, column, memory, index, neighbours, retrieval,
                 growth):
        if not wanted or part.__name__ in wanted:
            part()
