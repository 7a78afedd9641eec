"""Grafit: Learning fine-grained image representations with coarse labels (Touvron, Sablayrolles, Douze, Cord, Jegou;
arXiv:2011.12982; thesis chapter 2).

New: trained on coarse labels only, the embedding tells finer classes apart. The sum of two losses: a kNN loss, by which an
image's neighbours among all training images should share its label, and an instance loss, by which two augmentations of
an image should agree. ResNet-50 on ImageNet with 127 coarse labels, tested on the 1000 fine ones (Table 2.4): kNN 69.1 top-1
and mAP 42.9 (Grafit), 69.1 and 44.4 (Grafit FC), against 54.7 and 22.7 for cross-entropy.

    torchrun --nproc_per_node 8 grafit.py --model resnet50 --data /imagenet@coarse --coarse-labels coarse127.json
    torchrun --nproc_per_node 8 grafit.py --model resnet50_cifar --data cifar100@coarse:/data --recipe cifar
    python grafit.py --model regnet_nano --data shapes@coarse --recipe shapes           # minutes on two CPU cores
    python grafit.py --model resnet50 --data inat2018:/data --eval --weights runs/genus/last.pt --also runs/family/last.pt

Checked here: Equations 2.1 to 2.6 with their gradients, memory updates, conditional ranking and average precision against
reference numbers; three methods on a part of CIFAR-100 (README). Not run here: the whole of CIFAR-100, ImageNet,
iNaturalist. There is no official code.

Axes: B images, T views (augmentations) of each, D embedding, M training images, K classes, H x W pixels.

Where the thesis is silent:
- tau of the target network: 0.996, where BYOL (arXiv:2006.07733) starts; BYOL raises it to 1 in the course of training,
  the thesis writes a constant;
- projector and predictor: BYOL's MLP, Linear, BatchNorm, ReLU, Linear, with a hidden layer twice as wide as the trunk's
  features (4096 for ResNet-50). This gives the 32.9 M parameters of Table 2.7; its 23.8 M for Grafit FC would need a
  projection to 128, the text says 256;
- RandAugment and erasing: as in the thesis' next chapter (Table 3.9); weight decay 1e-4 and 5 epochs of warm-up: Goyal et
  al. (arXiv:1706.02677), whose learning rate the thesis follows;
- the memory starts at 0, so that its first update stores the direction of the image's first embedding;
- CIFAR's ResNet: torchvision's with a 3 x 3 stem of stride 1 and no pooling after it.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

# ---- Recipe: thesis sections 2.4.3 and 2.5.1 ---------------------------------------------------------------------------

METHODS = {  # rows of Table 2.7: supervised loss, instance loss, projector; tested is the projection where L_knn trains it
    "ce": ("ce", False, None),
    "instance": (None, True, "mlp"),
    "ce_instance": ("ce", True, "mlp"),
    "snca_fc": ("knn", False, "linear"),
    "snca": ("knn", False, "mlp"),
    "grafit_fc": ("knn", True, "linear"),
    "grafit": ("knn", True, "mlp"),
}


@dataclass(frozen=True)
class Recipe:
    """The training of all methods and models; the defaults are Grafit on ImageNet."""

    epochs: Annotated[int, "passes over the data set"] = 600
    batch_size: Annotated[int, "images (not views) per optimizer step, over all GPUs"] = 1024
    optimizer: Annotated[str, "nesterov (SGD with Nesterov momentum 0.9)", ("nesterov",)] = "nesterov"
    lr: Annotated[float, "peak learning rate; unset: 0.1 x batch size / 256"] = 0.4
    min_lr: Annotated[float, "learning rate at the end of the cosine"] = 0.0
    warmup_lr: Annotated[float, "learning rate at step 0"] = 0.0
    warmup_epochs: Annotated[int, "epochs of linear warm-up"] = 5
    weight_decay: Annotated[float, "not on biases and BatchNorm"] = 1e-4
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping"] = None
    method: Annotated[str, f"row of Table 2.7: {', '.join(METHODS)}", tuple(METHODS)] = "grafit"
    views: Annotated[int, "augmentations T of each image in the instance loss; the supervised loss sees the first"] = 4
    sigma: Annotated[float, "temperature of the kNN loss and of the kNN classifier (Eq. 2.2, 2.6)"] = 0.05
    instance_weight: Annotated[float, "weight lambda of the instance loss (Table 2.11; Eq. 2.4: 1)"] = 1.0
    target_decay: Annotated[float, "tau of the target network's moving average"] = 0.996
    proj_dim: Annotated[int, "width of the projection"] = 256
    memory_dtype: Annotated[str, "precision of the memory: fp32 or fp16", ("fp32", "fp16")] = "fp32"
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row"] = 1
    augment: Annotated[str, "rand (random crop, flip, RandAugment), crop (crop and flip) or test (the test image: FixRes)", ("rand", "crop", "test")] = "rand"  # fmt: skip
    erasing: Annotated[float, "probability of random erasing"] = 0.25
    cutmix: Annotated[float, "alpha of cutmix's Beta law, with the method ce; 0: off"] = 0.0
    mix_group: Annotated[int, "images that share one cutmix draw"] = 64
    classifier: Annotated[str, "linear or mlp (Tables 2.15, 2.16), with ce and ce_instance", ("linear", "mlp")] = "linear"
    trainable: Annotated[str, "all, classifier (frozen trunk) or classifier+norm", ("all", "classifier", "classifier+norm")] = "all"
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps"] = 0.875


RECIPES = {
    "grafit": Recipe(),
    "cifar": Recipe(views=8, img_size=(32, 32), eval_crop_ratio=1.0),
    # Sections 2.4.6, 2.5.4: 240 epochs, cosine from 0.01, batch 512, trunk frozen, an MLP as classifier. The baseline's
    # trunk is tuned too: --trainable all.
    "transfer": Recipe(epochs=240, batch_size=512, lr=0.01, warmup_epochs=0, method="ce", classifier="mlp", trainable="classifier"),
    # Table 2.10: full fine-tuning with CutMix, longer; then FixRes (arXiv:1906.06423) at the test resolution, 384: classifier
    # and BatchNorm on test images. The thesis gives no numbers for the latter.
    "transfer_full": Recipe(epochs=300, batch_size=512, lr=0.01, warmup_epochs=0, method="ce", classifier="mlp", cutmix=1.0),
    "fixres": Recipe(
        epochs=30,
        batch_size=512,
        lr=1e-3,
        warmup_epochs=0,
        method="ce",
        img_size=(384, 384),
        augment="test",
        erasing=0.0,
        classifier="mlp",
        trainable="classifier+norm",
    ),
    # Not of the thesis: the built-in data set in minutes on two CPU cores. The instance loss alone is satisfied by one embedding
    # per coarse class, too; in so few steps it takes a larger weight to get away from there.
    "shapes": Recipe(
        epochs=4,
        batch_size=64,
        lr=0.1,
        warmup_epochs=1,
        views=2,
        instance_weight=10.0,
        img_size=(32, 32),
        augment="crop",
        erasing=0.0,
        mix_group=8,
        eval_crop_ratio=1.0,
    ),
}
TRANSFER = {  # data set: what `transfer_full` changes for it
    "flowers102": dict(epochs=1000),
    "cars": dict(epochs=1000),
}


def paper_recipe(name: str, data: str = "") -> Recipe:
    """The recipe's row, completed for a data set."""
    changes = TRANSFER.get(data.split(":")[0].split("@")[0], {}) if name == "transfer_full" else {}
    return dataclasses.replace(RECIPES[name], **changes)


# ---- Architecture: thesis section 2.3.1 --------------------------------------------------------------------------------

MODELS = {  # trunks of torchvision's, with the width of their features; NAME_cifar: 3 x 3 stem of stride 1, no pooling
    "resnet18": 512,
    "resnet34": 512,
    "resnet50": 2048,
    "resnet101": 2048,
    "resnext50_32x4d": 2048,
    "regnet_y_4gf": 1088,
    "regnet_y_8gf": 2016,
    "resnet18_cifar": 512,
    "resnet50_cifar": 2048,
    "regnet_nano": 128,  # not in the thesis: three blocks, for small images, the built-in data set and tests
}


def make_trunk(name: str) -> nn.Module:
    """f: images (B, 3, H, W) -> features (B, MODELS[name]), a network of torchvision's without its classifier."""
    if name == "regnet_nano":
        trunk = RegNet(BlockParams([1, 1, 1], [32, 64, 128], [32, 64, 128], [1.0, 1.0, 1.0], [2, 2, 2]), stem_width=16)
    elif name == "regnet_y_4gf":  # torchvision has 3.2 and 8 GF; the numbers are those of arXiv:2003.13678, RegNetY-4.0GF
        trunk = RegNet(BlockParams([2, 6, 12, 2], [128, 192, 512, 1088], [64] * 4, [1.0] * 4, [2] * 4, se_ratio=0.25))
    else:
        trunk = torchvision.models.get_model(name.removesuffix("_cifar"), weights=None)
    if name.endswith("_cifar"):
        trunk.conv1 = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
        nn.init.kaiming_normal_(trunk.conv1.weight, mode="fan_out", nonlinearity="relu")
        trunk.maxpool = nn.Identity()
    trunk.fc = nn.Identity()
    return trunk


def mlp(dim: int, hidden: int, out: int) -> nn.Sequential:
    """Linear, BatchNorm, ReLU, Linear: (B, dim) -> (B, out); projector, predictor and classifier."""
    return nn.Sequential(nn.Linear(dim, hidden), nn.BatchNorm1d(hidden), nn.ReLU(inplace=True), nn.Linear(hidden, out))


class Grafit(nn.Module):
    """Trunk f, projector P, predictor q and the target network, an average of trunk and projector (Figure 2.2).

    In eval mode images (B, 3, H, W) -> embeddings (B, D), L2-normalised: g = P(f) after training with the kNN loss, the
    trunk's features otherwise. In training mode a list of T views (B, 3, H, W) -> (class logits (B, K) of the first
    view, its embedding g (B, D), T predictions q(g) (B, D)); what the method does not have is None.
    """

    def __init__(self, name: str, method: str, num_classes: int = 0, proj_dim: int = 256, classifier: str = "linear"):
        super().__init__()
        supervised, instance, projector = METHODS[method]
        dim = MODELS[name]
        self.embeds = "projection" if supervised == "knn" else "features"
        self.trunk = make_trunk(name)
        if projector is not None:
            self.projector = mlp(dim, 2 * dim, proj_dim) if projector == "mlp" else nn.Linear(dim, proj_dim)
        if instance:
            self.predictor = mlp(proj_dim, 2 * dim, proj_dim)
            self.target = copy.deepcopy(nn.ModuleDict({"trunk": self.trunk, "projector": self.projector})).requires_grad_(False)
        if supervised == "ce":
            self.fc = nn.Linear(dim, num_classes) if classifier == "linear" else mlp(dim, dim, num_classes)

    def transfer_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) of the trunk: what linear classifiers on other data sets are given; the projector is discarded (2.4.6)."""
        return self.trunk(images)

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """(B, K) of the classifier, with the methods that have one."""
        return self.fc(self.trunk(images))

    def targets(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """g_xi of every view, by the target network, without gradient."""
        with torch.no_grad():
            return list(self.target["projector"](self.target["trunk"](torch.cat(views))).chunk(len(views)))

    def forward(self, views):
        if not self.training:
            features = self.trunk(views)
            return F.normalize((self.projector(features) if self.embeds == "projection" else features).float(), dim=1)
        features = self.trunk(torch.cat(views))
        B = len(views[0])
        logits = self.fc(features[:B]) if hasattr(self, "fc") else None
        projections = self.projector(features) if hasattr(self, "projector") else None
        predictions = list(self.predictor(projections).chunk(len(views))) if hasattr(self, "predictor") else None
        return logits, projections[:B] if self.embeds == "projection" else None, predictions

    @torch.no_grad()
    def average(self, tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta, parameters only; the target's BatchNorm follows its own batches."""
        own = [*self.trunk.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), [p.detach() for p in own], 1 - tau)


def build_model(
    name: str,
    num_classes: int = 0,
    img_size: int | tuple[int, int] | None = None,
    drop_path: float | None = None,
    *,
    proj_dim: int = 256,
    projector: str = "mlp",
) -> nn.Module:
    """A fresh Grafit (projector "mlp") or Grafit FC ("linear") on one of torchvision's trunks in MODELS.

    num_classes, img_size and drop_path are not used: the method has no classifier, the trunk takes any size and has no
    stochastic depth. Raises KeyError for an unknown name or projector.
    """
    return Grafit(name, {"mlp": "grafit", "linear": "grafit_fc"}[projector], proj_dim=proj_dim)


# ---- Augmentation: thesis section 2.4.3 --------------------------------------------------------------------------------
#
# A loader process decodes an image once and makes its T views: random resized crop, flip, RandAugment; normalisation, erasing
# and CutMix run on the device.


# Copied from deit.py
def random_resized_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, crop height, crop width): area 8-100% of the image, aspect 3/4..4/3 (log-uniform), ten attempts.

    If none fits: the central crop with the aspect ratio clamped to that range.
    """
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    crop_height, crop_width = height, width
    if width / height < 3 / 4:
        crop_height = min(height, max(1, round(width / (3 / 4))))
    elif width / height > 4 / 3:
        crop_width = min(width, max(1, round(height * (4 / 3))))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


# Copied from deit.py
def erasing_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Random erasing's (top, left, box height, box width): area 2-33% of the image, height/width 0.3..1/0.3 (log-uniform).

    Ten attempts at a box smaller than the image in both directions, else none, (0, 0, 0, 0): timm's customisation.
    """
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    return 0, 0, 0, 0


# Adapted from deit.py: several views of an image
class TrainTransform:
    """The loader's part of the augmentation.

    (uint8 image (3, H, W), rng) -> ((views uint8 (T, 3, *img_size),), for each view in turn the parameters for `erase`:
    top, left, height, width of the box, seed of its noise; height 0: nothing is erased).
    """

    def __init__(self, recipe: Recipe):
        self.size, self.augment, self.erasing, self.crop_ratio = recipe.img_size, recipe.augment, recipe.erasing, recipe.eval_crop_ratio
        self.views = recipe.views if METHODS[recipe.method][1] else 1

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[tuple[torch.Tensor], tuple[float, ...]]:
        from common.images import eval_transform, from_pil, resize, to_pil

        views, parameters = [], []
        for _ in range(self.views):
            if self.augment == "test":
                view = eval_transform(image, self.size, self.crop_ratio)
            else:
                top, left, height, width = random_resized_crop(*image.shape[1:], rng)
                view = resize(image[:, top : top + height, left : left + width], self.size)
                if rng.random() < 0.5:
                    view = view.flip(-1)
                if self.augment == "rand":
                    view = from_pil(rand_augment(to_pil(view), rng))
            views.append(view)
            box = erasing_box(*self.size, rng) if rng.random() < self.erasing else (0, 0, 0, 0)
            parameters += [*box, rng.getrandbits(24)]  # whole numbers up to 2^24 are exact in float32
        return (torch.stack(views),), tuple(parameters)


# Copied from deit.py
def erase(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Random erasing of normalised images (B, 3, H, W), in place: boxes (B, 5) of TrainTransform get standard normal noise.

    `parameters` stays on the host. Each box has a generator of its own: the noise depends on the image alone.
    """
    generator = torch.Generator(images.device)
    for image, (top, left, height, width, seed) in zip(images, parameters.int().tolist()):
        if height:
            noise = torch.randn((3, height, width), generator=generator.manual_seed(seed), device=images.device)
            image[:, top : top + height, left : left + width] = noise
    return images


# Copied from deit.py
FILL = (124, 116, 104)  # round(255 * ImageNet mean)


# Copied from deit.py
def rand_augment(image: Image.Image, rng: random.Random) -> Image.Image:
    """RandAugment as DeiT uses it (timm's rand-m9-mstd0.5-inc1): two draws from 15 operations, each applied with
    probability 0.5 at magnitude N(9, 0.5) clipped to 0..10."""
    for _ in range(2):
        operation = rng.choice(OPERATIONS)
        if rng.random() <= 0.5:
            level = min(10.0, max(0.0, rng.gauss(9, 0.5))) / 10
            image = apply_operation(image, operation, level, -1 if rng.random() > 0.5 else 1)
    return image


# Copied from deit.py
OPERATIONS = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY")  # fmt: skip


# Copied from deit.py
def apply_operation(image: Image.Image, operation: str, level: float, sign: int) -> Image.Image:
    """One operation of RandAugment at level 0..1 ("increasing" variant: a higher level always changes more)."""

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)

    if operation == "AutoContrast":
        return ImageOps.autocontrast(image)
    if operation == "Equalize":
        return ImageOps.equalize(image)
    if operation == "Invert":
        return ImageOps.invert(image)
    if operation == "Rotate":
        return image.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)
    if operation == "Posterize":
        bits = 4 - int(4 * level)
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)  # recent Pillow refuses 0 bits
    if operation == "Solarize":
        return ImageOps.solarize(image, 256 - int(256 * level))
    if operation == "SolarizeAdd":
        add = int(110 * level)
        return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)
    if operation in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, operation)(image).enhance(1 + sign * 0.9 * level)
    if operation == "ShearX":
        return affine(1, sign * 0.3 * level, 0, 0, 1, 0)
    if operation == "ShearY":
        return affine(1, 0, 0, sign * 0.3 * level, 1, 0)
    if operation == "TranslateX":
        return affine(1, 0, sign * 0.45 * level * image.width, 0, 1, 0)
    return affine(1, 0, 0, 0, 1, sign * 0.45 * level * image.height)


# Copied from deit.py
@dataclass(frozen=True)
class Mix:
    """One draw: share `lam` of the image itself, and cutmix's box (None: mixup) as (top, bottom, left, right) pixels."""

    lam: float
    box: tuple[int, int, int, int] | None = None


# Adapted from deit.py: cutmix alone
def draw_mix(recipe: Recipe, rng: random.Random) -> Mix:
    """Cutmix with lam from Beta(alpha, alpha), or nothing."""
    if not recipe.cutmix:
        return Mix(1.0)
    height, width = recipe.img_size
    lam = rng.betavariate(recipe.cutmix, recipe.cutmix)
    return cutmix_box(lam, height, width, rng.randrange(height), rng.randrange(width))


# Copied from deit.py
def cutmix_box(lam: float, height: int, width: int, cy: int, cx: int) -> Mix:
    """Box of about (1 - lam) of the area around (cy, cx), clipped to the image; lam becomes what the clipped box leaves.

    An odd side loses a pixel, as in the official code.
    """
    half_h, half_w = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
    top, bottom, left, right = max(cy - half_h, 0), min(cy + half_h, height), max(cx - half_w, 0), min(cx + half_w, width)
    return Mix(1 - (bottom - top) * (right - left) / (height * width), (top, bottom, left, right))


# Copied from deit.py
def mix_images(images: torch.Tensor, mixes: list[Mix]) -> torch.Tensor:
    """(B, 3, H, W) cut into len(mixes) groups; image i of a group is mixed with its image G-1-i by the group's draw."""
    groups = []
    for x, mix in zip(images.chunk(len(mixes)), mixes):
        if mix.box is not None:
            top, bottom, left, right = mix.box
            mixed = x.clone()
            mixed[:, :, top:bottom, left:right] = x.flip(0)[:, :, top:bottom, left:right]
            x = mixed
        elif mix.lam != 1:
            x = x * mix.lam + x.flip(0) * (1 - mix.lam)
        groups.append(x)
    return torch.cat(groups)


# Copied from deit.py
def mix_targets(labels: torch.Tensor, mixes: list[Mix], num_classes: int, smoothing: float) -> torch.Tensor:
    """Labels (B,) -> soft targets (B, K): lam on the image's own label, 1 - lam on its partner's, both smoothed."""
    targets = torch.full((len(labels), num_classes), smoothing / num_classes, device=labels.device)
    targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / num_classes)
    return torch.cat([t * mix.lam + t.flip(0) * (1 - mix.lam) for t, mix in zip(targets.chunk(len(mixes)), mixes)])


# ---- Losses: thesis section 2.3.1 --------------------------------------------------------------------------------------


def instance_loss(predictions: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 2.1, mean over the batch: minus the mean cosine of q(g(t_i x)) and g_xi(t_j x) over all ordered pairs i != j.

    predictions and targets: T tensors (B, D) each, T at least 2 (ValueError). No gradient reaches the targets.
    """
    T = len(predictions)
    if T < 2 or len(targets) != T:
        raise ValueError(f"{T} predictions and {len(targets)} targets: as many of one as of the other are needed, at least 2")
    q = F.normalize(_wide(torch.stack(predictions)), dim=2)  # (T, B, D)
    z = F.normalize(_wide(torch.stack(targets)).detach(), dim=2)
    pairs = (q.sum(0) * z.sum(0)).sum(1) - (q * z).sum((0, 2))  # all pairs less those with i = j
    return -pairs.mean() / (T * (T - 1))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class _NeighbourLoss(torch.autograd.Function):
    """Loss and gradient of Eq. 2.3 in one pass over the memory, of which a chunk at a time is compared with the batch.

    Memory and batch are walked through in the order of their labels: only the rows lo:hi of the batch can have their label in
    a chunk. So of what the sums over all cost, those over equal labels cost the share of one chunk and one label.
    """

    @staticmethod
    def forward(ctx, z, labels, memory, memory_labels, own_index, sigma, chunk):
        # |cos| <= 1: relative to exp(1 / sigma) the smallest term is exp(-2 / sigma), and sums need no running maximum
        # as long as the number format holds that: single precision down to a sigma of 0.025.
        work = torch.float64 if z.dtype == torch.float64 or sigma < 0.025 else torch.float32
        labels, by_label = labels.long().sort(stable=True)
        memory_labels, order = memory_labels.long().sort(stable=True)
        own_column = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))[own_index[by_label]]
        starts = torch.arange(0, len(memory), chunk, device=z.device)
        first, last = memory_labels[starts], memory_labels[(starts + chunk - 1).clamp(max=len(memory) - 1)]
        ranges = torch.stack([torch.searchsorted(labels, first), torch.searchsorted(labels, last, right=True)], 1).tolist()

        queries, rows = z[by_label].to(work) / sigma, torch.arange(len(z), device=z.device)
        all_sum, same_sum = queries.new_zeros(2, len(z), 1)
        all_pull, same_pull = queries.new_zeros(2, *z.shape)
        for start, (lo, hi) in zip(range(0, len(memory), chunk), ranges):
            keys = memory[order[start : start + chunk]].to(work)  # a copy, normalized in place
            F.normalize(keys, dim=1, out=keys)
            weights = (queries @ keys.T).sub_(1 / sigma).exp_()  # (B, chunk)
            column = own_column - start
            inside = (column >= 0) & (column < len(keys))
            weights[rows, column.clamp(0, len(keys) - 1)] *= ~inside  # j != i
            all_sum += weights.sum(1, keepdim=True)
            all_pull.addmm_(weights, keys)
            same = weights[lo:hi].mul_(labels[lo:hi, None] == memory_labels[None, start : start + chunk])
            same_sum[lo:hi] += same.sum(1, keepdim=True)
            same_pull[lo:hi].addmm_(same, keys)
        has = same_sum > 0
        all_sum, same_sum = (torch.where(has, s, 1.0) for s in (all_sum, same_sum))
        gradient = has * (all_pull / all_sum - same_pull / same_sum) / (sigma * len(z))
        ctx.save_for_backward(torch.empty_like(z).index_copy_(0, by_label, gradient.to(z.dtype)))
        return (all_sum.log() - same_sum.log()).mean().to(z.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], None, None, None, None, None, None


def knn_loss(
    z: torch.Tensor,
    labels: torch.Tensor,
    memory: torch.Tensor,
    memory_labels: torch.Tensor,
    own_index: torch.Tensor,
    sigma: float = 0.05,
    chunk: int | None = None,
) -> torch.Tensor:
    """Eq. 2.2 and 2.3, mean over the batch: -log of the share of an image's neighbours that have its label.

    z (B, D) with labels (B,); memory (M, D), in any precision, with labels (M,); own_index (B,): the images' own rows of
    the memory, which are left out. Nothing needs to be normalised. Gradient reaches z only. An image whose label no other
    row has counts 0. Memory beyond the arguments: a few times B x chunk and M numbers, never B x M.
    """
    chunk = chunk or max(256, 2 ** (26 if z.is_cuda else 18) // len(z))
    with torch.autocast(z.device.type, enabled=False):
        return _NeighbourLoss.apply(F.normalize(_wide(z), dim=1), labels, memory, memory_labels, own_index, sigma, chunk)


class Memory(nn.Module):
    """M: one embedding per training image (section 2.3.1), 0 before the image is seen."""

    def __init__(self, images: int, dim: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(images, dim, dtype=dtype))

    @torch.no_grad()
    def update(self, indices: torch.Tensor, embeddings: torch.Tensor, skip: torch.Tensor | None = None) -> None:
        """m_i <- (m_i + g_i) / 2 for image numbers (B,) and embeddings (B, D), which are normalised here.

        An image that occurs several times counts once, with the mean of its embeddings: the result depends neither on
        their order nor on the ranks they come from. skip (0-dim, 1 or 0): change nothing where it is 1.
        """
        g = F.normalize(_wide(embeddings), dim=1)
        equal = (indices[:, None] == indices[None]).to(g.dtype)
        g = equal @ g / equal.sum(1, keepdim=True)
        old = self.embeddings[indices]
        new = ((old.to(g.dtype) + g) / 2).to(old.dtype)
        self.embeddings[indices] = new if skip is None else torch.where(skip > 0, old, new)


# ---- Evaluation: thesis sections 2.3.2 and 2.3.3 -----------------------------------------------------------------------


def log_odds_of(probabilities: torch.Tensor) -> torch.Tensor:
    """log(p / (1 - p)), with p and 1 - p at least 1e-12: finite at p = 0 and 1."""
    return probabilities.clamp(min=1e-12).log() - (1 - probabilities).clamp(min=1e-12).log()


def conditional_scores(cosine: torch.Tensor, coarse_probabilities: torch.Tensor, coarse_labels: torch.Tensor) -> torch.Tensor:
    """Eq. 2.5: cosines (B, M) of queries and collection, the queries' coarse probabilities (B, Kc), the collection's coarse
    labels (M,) -> psi (B, M) = cos + log(p / (1 - p)) with p the query's probability of the item's coarse label."""
    return cosine + log_odds_of(coarse_probabilities)[:, coarse_labels]


def levels(source) -> dict[str, tuple[list[str], torch.Tensor]]:
    """Label levels of a data set, the coarsest first: name -> (classes, labels (N,))."""
    found = {"fine": (source.classes, source.labels)} | source.levels
    if any(len(classes) == len(found["fine"][0]) for name, (classes, _) in found.items() if name != "fine"):
        del found["fine"]  # iNaturalist's species
    ordered = sorted(found.items(), key=lambda item: len(item[1][0]))
    return {name: (classes, torch.as_tensor(labels)) for name, (classes, labels) in ordered}


def coarse_to_fine(
    queries: torch.Tensor, query_levels: dict, gallery: torch.Tensor, gallery_levels: dict, trained: str, sigma: float
) -> dict[str, dict[str, float]]:
    """At every label level: on-the-fly classification and category-level retrieval of queries (B, D) among the training
    images, gallery (M, D), by an embedding that was trained with the labels of level `trained`.

    {level: {"k", "knn" (top-1, %), "map" (cosine), "map_conditional" (Eq. 2.5), "map_oracle" (all %)}}. k is the best of 10, 15,
    20, 25 and 30 on a tenth (at most 10,000) of the training images, held out; the smallest of equally good ones.
    """
    from common.evaluate import NEIGHBOURS, knn_answers, mean_average_precision, nearest, vote

    device = queries.device
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0)).to(device)
    count = min(-(-len(gallery) // 10), 10_000)
    held, rest = order[:count], order[count:]
    held_cosines, held_nearest = nearest(gallery[held], gallery[rest], max(NEIGHBOURS))
    cosines, neighbours = nearest(queries, gallery, max(NEIGHBOURS))
    result, classes_of = {}, {level: len(classes) for level, (classes, _) in gallery_levels.items()}
    for level, (_, labels) in gallery_levels.items():
        labels, truth = labels.to(device), query_levels[level][1].to(device)
        validation = knn_answers(held_cosines, labels[rest[held_nearest]], sigma, classes_of[level])
        k = max(NEIGHBOURS, key=lambda k: ((validation[k] == labels[held]).sum().item(), -k))
        right = knn_answers(cosines, labels[neighbours], sigma, classes_of[level])[k] == truth
        result[level] = {"k": k, "knn": 100 * right.double().mean().item()}

    k, coarse, truth = result[trained]["k"], gallery_levels[trained][1].to(device), query_levels[trained][1].to(device)
    offsets = log_odds_of(vote(cosines[:, :k], coarse[neighbours[:, :k]], sigma, classes_of[trained]))
    oracle = -4.0 * F.one_hot(truth, classes_of[trained]).logical_not()  # cosines span 2: the right coarse class comes first
    for level in result:
        labels = query_levels[level][1].to(device), gallery, gallery_levels[level][1].to(device)
        for name, added in (("map", None), ("map_conditional", offsets), ("map_oracle", oracle)):
            extra = {} if added is None else {"offsets": added, "groups": coarse}
            result[level][name] = 100 * mean_average_precision(queries, *labels, **extra)
    return result


METRICS = {"knn": "kNN, top-1 %", "map": "mAP %", "map_conditional": "mAP %, conditional (Eq. 2.5)", "map_oracle": "mAP %, oracle"}


def matrices(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Tables as 2.5, 2.6 and 2.14, one per metric: a row per test level, a column per trained network. results: {column: {level:
    metrics}}."""
    lines, tests = [], list(next(iter(results.values())))
    width = max(12, *(len(c) + 2 for c in results))
    for metric, title in METRICS.items():
        lines.append(f"{title:30s}" + "".join(f"{column:>{width}s}" for column in results))
        lines += [f"  test {level:23s}" + "".join(f"{results[c][level][metric]:{width}.2f}" for c in results) for level in tests]
    return "\n".join(lines)


# ---- Training: the only user of common ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("grafit", __doc__, Recipe, RECIPES, model="resnet50", recipe="grafit")
    parser.add_argument(
        "--also", nargs="+", metavar="FILE", help="with --eval and --retrieve: further checkpoints of the model, beside --weights"
    )
    parser.add_argument("--retrieve", nargs="+", metavar="IMAGE", help="write OUT/retrieved.png, the 10 nearest training images of each, and stop; IMAGE: a file, or a number: that validation image")  # fmt: skip
    args = parser.parse_args(argv)
    cli.check_choice("--model", args.model, MODELS)
    cli.check_names(args, MODELS, RECIPES)
    paper = paper_recipe(args.recipe, args.data or "")
    recipe = cli.override(paper, args)
    if args.lr is None:
        recipe = dataclasses.replace(recipe, lr=paper.lr * recipe.batch_size / paper.batch_size)
    cli.check_recipe(recipe)
    supervised, instance, projector = METHODS[recipe.method]
    if recipe.method != "ce":
        cli.refuse(args, ("cutmix",), f"mixes labels, which only the method ce can take, not {recipe.method}")
    if supervised != "ce":
        cli.refuse(args, ("classifier", "trainable"), f"the method {recipe.method} has no classifier")
    if supervised != "knn":
        cli.refuse(args, ("memory_dtype",), f"the method {recipe.method} has no memory")
    if not instance:
        cli.refuse(args, ("views", "instance_weight", "target_decay"), f"the method {recipe.method} has no instance loss")
    if not projector:
        cli.refuse(args, ("proj_dim",), f"the method {recipe.method} has no projector")
    if args.also and not (args.eval or args.retrieve):
        cli.refuse(args, ("also",), "goes with --eval or --retrieve")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for a command line."""
    return Grafit(args.model, recipe.method, num_classes, recipe.proj_dim, recipe.classifier)


def take_trunk(model: nn.Module, state: dict, content: dict, say) -> None:
    """Fits --weights to a network that is to be trained: the trunk is taken, of torchvision's weights too, and what else has
    the same name and shape; the rest starts afresh."""
    from common.checkpoint import take_part

    fresh = take_part(model, state, "trunk.")
    if fresh:
        say(f"trunk taken from the checkpoint; new: {', '.join(sorted({k.split('.')[0] for k in fresh}))}")


def freeze(model: nn.Module, trainable: str) -> None:
    """Parameters that are not `trainable` get no gradient."""
    if trainable != "all":
        norms = {id(p) for m in model.trunk.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) for p in m.parameters()}
        for parameter in model.trunk.parameters():
            parameter.requires_grad_(trainable == "classifier+norm" and id(parameter) in norms)


def train(args, recipe: Recipe, paper: Recipe) -> None:
    """The whole run: data, model, memory, loop; at the end kNN and retrieval at every label level."""
    from common.checkpoint import load_pretrained
    from common.data import TrainingData
    from common.evaluate import eval_loader, evaluate, extract, knn_probabilities, normalize
    from common.optim import cosine_lr, make_optimizer
    from common.precision import Precision, check_amp
    from common.report import describe, save_curves, save_json, show_crops
    from common.run import Run

    run = Run("grafit", args, recipe, paper)
    check_amp(run.amp, run.device)
    supervised, instance, _ = METHODS[recipe.method]
    data = TrainingData(run, recipe, TrainTransform(recipe))
    num_classes = len(data.classes)
    torch.manual_seed(args.seed)
    model = make_model(args, recipe, num_classes)
    if args.weights:
        load_pretrained(model, args, run.method, new_head=True, say=run.say, adapt=take_trunk)
    freeze(model, recipe.trainable)
    model.to(run.device)
    memory = memory_labels = None
    if supervised == "knn":
        dtype = {"fp32": torch.float32, "fp16": torch.float16}[recipe.memory_dtype]
        memory = Memory(len(data.source), recipe.proj_dim, dtype).to(run.device)
        memory_labels = torch.from_numpy(data.source.labels).to(run.device)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=data.accumulation, clip_grad=recipe.clip_grad)

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    def prepare(batch) -> list[torch.Tensor]:
        """T views (B, 3, H, W), normalised and erased."""
        (views,), parameters = batch[:2]
        boxes = parameters.unflatten(1, (views.shape[1], 5))
        return [erase(normalize(view), box) for view, box in zip(views.unbind(1), boxes.unbind(1))]

    if args.show_batch:
        if run.rank == 0:
            show_crops(args.show_batch, data)
        return run.say(f"wrote {args.show_batch}")

    run.open_folder()
    run.say(describe(run, lambda: make_model(args, recipe, num_classes), data))
    wrapped = run.prepare(model, data.micro_batch)
    run.start(model=model, optimizer=optimizer, precision=precision, data=data.identity(), extra={"memory": memory})
    if run.rank == 0 and run.epoch == run.step == 0:
        show_crops(run.out / "batch.png", data)
    run.check_stop()
    val_loader = data.val and eval_loader(data.val, recipe.img_size, recipe.eval_crop_ratio, data.micro_batch, run)

    for epoch in range(run.epoch, recipe.epochs):
        stream = data.epoch(epoch, run.step)
        wrapped.train()
        if recipe.trainable == "classifier":
            model.trunk.eval()  # frozen, its statistics too
        for step in run.steps(data.steps, recipe.batch_size):
            embeddings, seen = [], []
            for micro in range(data.accumulation):
                batch = run.wait_for(stream)
                views, labels, indices = prepare(batch), batch[2], batch[3].to(run.device)
                if recipe.cutmix:
                    mixes = [draw_mix(recipe, random.Random(f"mix-{args.seed}-{epoch}-{step}-{g}")) for g in data.batches.groups(micro)]
                    views, labels = [mix_images(views[0], mixes)], mix_targets(labels, mixes, num_classes, smoothing=0.0)
                with precision.forward(wrapped):
                    logits, g, predictions = wrapped(views)
                    loss = 0.0
                    if supervised == "ce":
                        loss = loss + F.cross_entropy(logits, labels)
                    if supervised == "knn":
                        loss = loss + knn_loss(g, labels, memory.embeddings, memory_labels, indices, recipe.sigma)
                        embeddings.append(g.detach().float())
                    if instance:
                        loss = loss + recipe.instance_weight * instance_loss(predictions, model.targets(views))
                precision.backward(loss)
                seen.append(indices)
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if instance:
                model.average(recipe.target_decay)
            if memory is not None:  # all ranks' images, on every rank
                memory.update(run.gather(torch.cat(seen)), run.gather(torch.cat(embeddings)), skip=skipped)
            run.after_step(stats, lr, lambda seen=seen: data.names(torch.cat(seen)))
        record, score = run.end_of_training_epoch() | {"lr": lr_at(epoch + 1)}, None
        if val_loader is not None and supervised == "ce":
            metrics = evaluate(model, val_loader, run.device, precision.autocast, predict=class_logits, between=run.check_stop)
            score = metrics["top1"]
            record |= {f"val_{k}": v for k, v in metrics.items()}
        elif val_loader is not None and memory is not None:  # as it is: embeddings of the last epochs
            embedded = extract(model.eval(), data.val, recipe.img_size, recipe.eval_crop_ratio, run, batch_size=data.micro_batch)
            found = knn_probabilities(embedded, memory.embeddings.float(), memory_labels, 20, recipe.sigma, num_classes).argmax(1).cpu()
            record["val_knn"] = score = 100 * (found == torch.from_numpy(data.val.labels)).double().mean().item()
        run.end_of_epoch(record, score)
    if data.val is not None:
        trained = level_trained(data.source, data.classes)
        found = {trained: evaluate_levels(run, model, recipe, data.source, data.val, trained)}
        if run.rank == 0:
            save_json(run.out / "results.json", found)
        run.say(matrices(found))
    run.finish()
    if run.rank == 0 and val_loader is not None:
        save_curves(run.out / "curves.png", run.out / "log.jsonl", [["train_loss"], ["val_top1", "val_knn"]])


def level_trained(source, classes: list[str]) -> str | None:
    """Name of the label level that has these classes, if any."""
    return next((name for name, (own, _) in levels(source).items() if sorted(own) == sorted(classes)), None)


def evaluate_levels(run, model: nn.Module, recipe: Recipe, source, val, trained: str) -> dict[str, dict[str, float]]:
    """coarse_to_fine of validation images among training images, whose embeddings are all computed anew (section 2.3.1)."""
    from common.evaluate import extract

    model.eval()
    gallery, queries = (
        extract(model, s, recipe.img_size, recipe.eval_crop_ratio, run, batch_size=run.args.micro_batch or 64, title=title)
        for s, title in ((source, "training images"), (val, "validation images"))
    )
    return coarse_to_fine(queries, levels(val), gallery, levels(source), trained, recipe.sigma)


SAVED = ("method", "proj_dim", "classifier", "sigma", "img_size", "eval_crop_ratio")  # what an evaluation takes from the checkpoint


def trained_models(run) -> tuple[dict, list[tuple]]:
    """({"train" and "val": Source}, [(name of the level trained at, file, model, recipe, classes), ...]) of --weights and --also."""
    from common.errors import UserError
    from common.evaluate import trained_model
    from common.sources import open_data

    args, found = run.args, []
    options = dict(val_data=args.val_data, coarse_labels=args.coarse_labels, say=run.say)
    sources = run.first(lambda: open_data(args.data, **options))
    for file in [args.weights or str(run.out / "last.pt"), *(args.also or [])]:
        args.weights = file
        model, recipe, classes = trained_model(run, make_model, saved=SAVED, adapt=None)
        level = level_trained(sources["train"], classes)
        if level is None:
            raise UserError(f"{file}: trained on {len(classes)} classes, which no label level of --data {args.data} has")
        found.append((level, file, model, recipe, classes))
    return sources, found


def class_logits(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """The classifier's logits, for evaluation."""
    return {"": model.logits(images)}


def evaluate_only(args, recipe: Recipe, paper: Recipe) -> None:
    """--eval: kNN and retrieval of --weights and --also at every label level of --data, as a matrix; a classifier's top-1 too.

    With --eval-data or --real-labels: accuracy of the classifier on those alone.
    """
    from common.evaluate import eval_loader, evaluate, evaluate_weights
    from common.precision import Precision, check_amp
    from common.report import save_json
    from common.run import Run

    run = Run("grafit", args, recipe, paper)
    check_amp(run.amp, run.device)
    if args.eval_data or args.real_labels:
        return evaluate_weights(run, make_model, saved=SAVED, adapt=None, predict=class_logits)
    sources, found = trained_models(run)
    results = {}
    for level, file, model, own, classes in found:
        column = level if level not in results else file
        results[column] = evaluate_levels(run, model, own, sources["train"], sources["val"], level)
        if hasattr(model, "fc") and classes == sources["val"].classes:
            loader = eval_loader(sources["val"], own.img_size, own.eval_crop_ratio, args.micro_batch or 64, run)
            metrics = evaluate(model, loader, run.device, Precision(run.amp, run.device).autocast, predict=class_logits)
            run.say(f"{file}: classifier  " + "  ".join(f"{k} {v:.5g}" for k, v in metrics.items()))
    run.say(matrices(results))
    if args.out and run.rank == 0:
        save_json(run.out / "matrix.json", results)


def retrieve(args, recipe: Recipe, paper: Recipe) -> None:
    """--retrieve: each query and its nearest training images by each network (Figures 2.6 to 2.9), framed in the colour of the
    finest level at which they have the query's label."""
    from common.errors import UserError
    from common.evaluate import extract, nearest, normalize, read_file
    from common.images import eval_transform, to_pil
    from common.report import save_sheet
    from common.run import Run

    run = Run("grafit", args, recipe, paper)
    sources, found = trained_models(run)
    source, val = sources["train"], sources["val"]
    own_levels, val_levels = levels(source), levels(val)
    names = list(own_levels)[::-1]  # the finest first
    hues = [int(round(85 - 64 * i / max(1, len(names) - 1))) for i in range(len(names))]  # green to orange, of 255
    colours = [Image.new("HSV", (1, 1), (hue, 220, 200)).convert("RGB").getpixel((0, 0)) for hue in hues]
    wrong, unknown = (200, 30, 30), (150, 150, 150)
    paths = {str(Path(val.name(i)).resolve()): i for i in range(len(val))}
    queries = []  # (title, number of the validation image or None, image)
    for image in args.retrieve:
        number = int(image) if image.isdigit() else paths.get(str(Path(image).resolve()))
        if number is not None and number >= len(val):
            raise UserError(f"--retrieve {image}: there are {len(val)} validation images, numbered from 0")
        queries.append((image, number, val.read(number) if image.isdigit() else read_file(image, "--retrieve")))

    def picture(image: torch.Tensor, colour: tuple[int, int, int]) -> Image.Image:
        return ImageOps.expand(to_pil(eval_transform(image, (96, 96), 1.0)), border=4, fill=colour)

    rows = []
    for level, file, model, own, _ in found:
        gallery = extract(model, source, own.img_size, own.eval_crop_ratio, run, title="training images")
        for title, number, image in queries:
            seen = eval_transform(image, own.img_size, own.eval_crop_ratio)
            with torch.no_grad():
                _, order = nearest(model(normalize(seen[None].to(run.device))), gallery, 10)
            framed = []
            for index in order[0].tolist():
                colour = unknown
                if number is not None:
                    same = [val_levels[n][1][number] == own_levels[n][1][index] for n in names]
                    colour = next((c for c, right in zip(colours, same) if right), wrong)
                framed.append(picture(source.read(index), colour))
            rows.append((f"{title}: {own.method}, trained on {level} labels ({file})", [picture(image, (0, 0, 0)), *framed]))
    legend = [*zip(names, colours), ("no level", wrong), ("label of the query not known", unknown)]
    rows += [(f"right at: {name}" if name in names else name, [Image.new("RGB", (40, 10), colour)]) for name, colour in legend]
    if run.rank == 0:
        save_sheet(run.out / "retrieved.png", rows)
    run.say(f"wrote {run.out / 'retrieved.png'}")


def benchmark(args, recipe: Recipe, paper: Recipe) -> None:
    """--benchmark: images/s and peak memory of training steps (a memory of 65,536 embeddings, all views alike) and of inference."""
    from common import report
    from common.run import Run

    run = Run("grafit", args, recipe, paper)
    supervised, instance, _ = METHODS[recipe.method]
    memory = torch.randn(2**16, recipe.proj_dim, device=run.device)
    memory_labels = torch.arange(2**16, device=run.device) % 127

    def loss(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        views, total = [images] * (recipe.views if instance else 1), 0.0
        logits, g, predictions = model(views)
        if supervised == "ce":
            total = total + F.cross_entropy(logits, labels)
        if supervised == "knn":
            total = total + knn_loss(g, labels, memory, memory_labels, labels, recipe.sigma)
        if instance:
            total = total + instance_loss(predictions, getattr(model, "module", model).targets(views))
        return total

    report.benchmark(run, lambda: make_model(args, recipe, 1000), loss)


def main() -> None:
    args, recipe, paper = parse_args()
    if args.list_models:
        for name, width in MODELS.items():
            print(f"{name:16s} features {width}")
    elif args.retrieve:
        retrieve(args, recipe, paper)
    elif args.eval or args.eval_data:
        evaluate_only(args, recipe, paper)
    elif args.benchmark:
        benchmark(args, recipe, paper)
    else:
        train(args, recipe, paper)


if __name__ == "__main__":
    try:
        from common.run import launch
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("common"):
            raise
        print("error: another package named common hides the one that lies beside grafit.py; run in the folder of both", file=sys.stderr)
        sys.exit(2)
    launch(main)
