"""Grafit: Learning fine-grained image representations with coarse labels (Touvron, Sablayrolles, Douze, Cord, Jegou;
arXiv:2011.12982; thesis chapter 2).

New: trained on coarse labels only, the embedding tells finer classes apart. The sum of two losses: a kNN loss, by which
an image's neighbours among all training images should share its label, and an instance loss, by which two augmentations
of an image should agree. ResNet-50 on ImageNet with 127 coarse labels, tested on the 1000 fine ones (Table 2.4): kNN
69.1 top-1 and mAP 42.9 (Grafit), 69.1 and 44.4 (Grafit FC), against 54.7 and 22.7 for cross-entropy.

    torchrun --nproc_per_node 8 grafit.py --model resnet50 --data /imagenet@coarse --coarse-labels coarse127.json
    torchrun --nproc_per_node 8 grafit.py --model resnet50_cifar --data cifar100@coarse:/data --recipe cifar
    python grafit.py --model regnet_nano --data shapes@coarse --recipe shapes           # minutes on two CPU cores
    python grafit.py --model resnet50 --data inat2018:/data --eval --weights genus/last.pt --also family/last.pt

Checked here: Equations 2.1 to 2.6 with their gradients, memory updates, conditional ranking and average precision
against reference numbers; two epochs of Grafit and SNCA+, in double precision, against a second implementation in the
tests; three methods on a part of CIFAR-100 (README). Not run here: CIFAR-100, ImageNet. There is no official code.

Axes: B images, T views (augmentations) of each, D embedding, M training images, K classes, H x W pixels.

Where the thesis is silent or contradicts itself:
- tau of the target network: 0.996, where BYOL (arXiv:2006.07733) starts; BYOL raises it to 1, the thesis does not;
- projector and predictor: BYOL's MLP, its hidden layer twice as wide as the trunk's features (4096 for ResNet-50). This
  gives the 32.9 M parameters of Table 2.7; its 23.8 M for Grafit FC would need a projection to 128, the text says 256;
- RandAugment and erasing: as in the thesis' next chapter (Table 3.9); weight decay 1e-4 and 5 epochs of warm-up: Goyal
  et al. (arXiv:1706.02677), whose learning rate the thesis follows;
- transfer: the trunk "remains fixed" (2.4.6), yet the same paragraph and 2.5.4 fine-tune it, and 92.5 on Cars is out of
  reach of frozen features: all of it is trained (--trainable classifier: it is not);
- p_c of Eq. 2.5: with a classifier (ce, ...) its softmax (2.2.1), with the others, instance too, Eq. 2.3's sum (2.3.1);
- the triplet loss of section 2.2: of the trunk's normalised features of two views of an image and of a random other
  one, with a margin of 0.2 between the distances (FaceNet's, arXiv:1503.03832, is one between their squares).
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
from PIL import Image, ImageColor, ImageEnhance, ImageOps
from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

# ---- Recipe: thesis sections 2.4.3 and 2.5.1 -------------------------------------------------------------------------

METHODS = {  # Tables 2.2, 2.7: supervised loss, instance loss, projector; tested is the projection if L_knn trains it
    "ce": ("ce", None, None), "triplet": (None, "triplet", None), "ce_triplet": ("ce", "triplet", None),
    "instance": (None, "byol", "mlp"), "ce_instance": ("ce", "byol", "mlp"), "snca_fc": ("knn", None, "linear"),
    "snca": ("knn", None, "mlp"), "grafit_fc": ("knn", "byol", "linear"), "grafit": ("knn", "byol", "mlp"),
}


@dataclass(frozen=True)
class Recipe:
    """The training of all methods and models; the defaults are Grafit on ImageNet."""

    epochs: Annotated[int, "passes over the data set", "1 or more"] = 600
    batch_size: Annotated[int, "images (not views) per optimizer step, over all GPUs", "1 or more"] = 1024
    optimizer: Annotated[str, "nesterov (SGD with Nesterov momentum 0.9)", ("nesterov",)] = "nesterov"
    lr: Annotated[float, "peak learning rate; unset: 0.1 x batch size / 256", "above 0"] = 0.4
    min_lr: Annotated[float, "learning rate at the end of the cosine", "0 or more"] = 0.0
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 0.0
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 5
    weight_decay: Annotated[float, "not on biases and BatchNorm", "0 or more"] = 1e-4
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping", "above 0"] = None
    method: Annotated[str, f"row of Tables 2.2, 2.7: {', '.join(METHODS)}", tuple(METHODS)] = "grafit"
    views: Annotated[int, "augmentations T of an image in the instance loss; the other sees the first", "2 or more"] = 4
    sigma: Annotated[float, "temperature of the kNN loss and of the kNN classifier (Eq. 2.2, 2.6)", "above 0"] = 0.05
    instance_weight: Annotated[float, "weight lambda of the instance loss (Table 2.11; Eq. 2.4: 1)", "0 or more"] = 1.0
    target_decay: Annotated[float, "tau of the target network's moving average", "in [0, 1]"] = 0.996
    proj_dim: Annotated[int, "width of the projection", "1 or more"] = 256
    memory_dtype: Annotated[str, "precision of the memory: fp32 or fp16", ("fp32", "fp16")] = "fp32"
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW", "1 or more"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 1
    augment: Annotated[str, "rand (RandAugment), crop (and flip) or test (FixRes)", ("rand", "crop", "test")] = "rand"
    erasing: Annotated[float, "probability of random erasing", "in [0, 1]"] = 0.25
    cutmix: Annotated[float, "alpha of cutmix's Beta law, with the method ce; 0: off", "0 or more"] = 0.0
    mix_group: Annotated[int, "images that share a cutmix draw, or among which triplets are made", "1 or more"] = 64
    classifier: Annotated[str, "linear or mlp (Tables 2.15, 2.16), with ce, ce_instance", ("linear", "mlp")] = "linear"
    trainable: Annotated[str, "all, or trunk frozen (but its norms)", ("all", "classifier", "classifier+norm")] = "all"
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps", "in (0, 1]"] = 0.875


TUNING = dict(batch_size=512, warmup_epochs=0, method="ce", classifier="mlp")  # on another data set
RECIPES = {
    "grafit": Recipe(),
    "cifar": Recipe(views=8, img_size=(32, 32), eval_crop_ratio=1.0),
    "transfer": Recipe(epochs=240, lr=0.01, **TUNING),  # sections 2.4.6, 2.5.4
    "own": Recipe(epochs=30, lr=0.05, augment="crop", erasing=0.0, **TUNING),  # of no paper: common.script.fit_own
    # Table 2.10: full fine-tuning with CutMix, longer; then FixRes (arXiv:1906.06423) at the test resolution, 384:
    # classifier and BatchNorm on test images. The thesis gives no numbers for the latter.
    "transfer_full": Recipe(epochs=300, lr=0.01, cutmix=1.0, **TUNING),
    "fixres": Recipe(
        epochs=30, lr=1e-3, img_size=(384, 384), augment="test", erasing=0.0, trainable="classifier+norm", **TUNING,
    ),
    # Not of the thesis: the built-in data set in minutes on two CPU cores. The instance loss alone is satisfied by one
    # embedding per coarse class, too; in so few steps it takes a larger weight to get away from there.
    "shapes": Recipe(
        epochs=4, batch_size=64, lr=0.1, warmup_epochs=1, views=2, instance_weight=10.0, img_size=(32, 32),
        augment="crop", erasing=0.0, mix_group=8, eval_crop_ratio=1.0,
    ),
}


def paper_recipe(name: str, data: str = "") -> Recipe:
    """The recipe's row; on Flowers and Cars `transfer_full` takes 1000 epochs."""
    longer = name == "transfer_full" and data.split(":")[0].split("@")[0] in ("flowers102", "cars")
    return dataclasses.replace(RECIPES[name], epochs=1000) if longer else RECIPES[name]


# ---- Architecture: thesis section 2.3.1 ------------------------------------------------------------------------------

MODELS = {  # torchvision's, with the width of their features; NAME_cifar (ours): 3 x 3 stem of stride 1, no pooling
    "resnet18": 512, "resnet34": 512, "resnet50": 2048, "resnet101": 2048, "resnext50_32x4d": 2048,
    "regnet_y_4gf": 1088, "regnet_y_8gf": 2016, "resnet18_cifar": 512, "resnet50_cifar": 2048,
    "regnet_nano": 128,  # not in the thesis: three blocks, for small images, the built-in data set and tests
}


def make_trunk(name: str) -> nn.Module:
    """f: images (B, 3, H, W) -> features (B, MODELS[name]), a network of torchvision's without its classifier."""
    if name == "regnet_nano":
        trunk = RegNet(BlockParams([1, 1, 1], [32, 64, 128], [32, 64, 128], [1.0, 1.0, 1.0], [2, 2, 2]), stem_width=16)
    elif name == "regnet_y_4gf":  # torchvision has 3.2 and 8 GF; numbers: arXiv:2003.13678, RegNetY-4.0GF
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
    view, its embedding g (B, D), T predictions q(g) (B, D), or features for triplets); what it has not is None."""

    def __init__(self, name: str, method: str, num_classes: int = 0, proj_dim: int = 256, classifier: str = "linear"):
        super().__init__()
        (supervised, instance, projector), dim = METHODS[method], MODELS[name]
        self.embeds = "projection" if supervised == "knn" else "features"
        self.trunk = make_trunk(name)
        if projector is not None:
            self.projector = mlp(dim, 2 * dim, proj_dim) if projector == "mlp" else nn.Linear(dim, proj_dim)
        if instance:
            self.predictor = mlp(proj_dim, 2 * dim, proj_dim) if projector else nn.Identity()
        if instance == "byol":
            averaged = nn.ModuleDict({"trunk": self.trunk, "projector": self.projector})
            self.target = copy.deepcopy(averaged).requires_grad_(False)
        if supervised == "ce":
            self.fc = nn.Linear(dim, num_classes) if classifier == "linear" else mlp(dim, dim, num_classes)

    def transfer_features(self, images: torch.Tensor) -> torch.Tensor:
        """(B, D) of the trunk, which linear classifiers on other data sets get; the projector is discarded (2.4.6)."""
        return self.trunk(images)

    def targets(self, views: list[torch.Tensor]) -> list[torch.Tensor]:
        """g_xi of every view, by the target network, without gradient."""
        with torch.no_grad():
            return list(self.target["projector"](self.target["trunk"](torch.cat(views))).chunk(len(views)))

    def forward(self, views):
        if not self.training:
            features = self.trunk(views)
            return F.normalize((self.projector(features) if self.embeds == "projection" else features).float(), dim=1)
        features, B = self.trunk(torch.cat(views)), len(views[0])
        logits = self.fc(features[:B]) if hasattr(self, "fc") else None
        projections = self.projector(features) if hasattr(self, "projector") else features
        predictions = list(self.predictor(projections).chunk(len(views))) if hasattr(self, "predictor") else None
        return logits, projections[:B] if self.embeds == "projection" else None, predictions

    @torch.no_grad()
    def average(self, tau: float) -> None:
        """xi <- tau xi + (1 - tau) theta, parameters only; the target's BatchNorm follows its own batches."""
        own = [*self.trunk.parameters(), *self.projector.parameters()]
        torch._foreach_lerp_(list(self.target.parameters()), [p.detach() for p in own], 1 - tau)


def build_model(
    name: str, num_classes: int = 0, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None, *,
    proj_dim: int = 256, projector: str = "mlp",
) -> nn.Module:
    """A fresh Grafit (projector "mlp") or Grafit FC ("linear") on a trunk of MODELS; KeyError for another name of
    either. num_classes, img_size and drop_path are not used: no classifier, any size, no stochastic depth."""
    return Grafit(name, {"mlp": "grafit", "linear": "grafit_fc"}[projector], proj_dim=proj_dim)


# ---- Losses: thesis section 2.3.1 ------------------------------------------------------------------------------------


def unit(x: torch.Tensor) -> torch.Tensor:
    """(..., D) L2-normalised, in single precision or wider."""
    return F.normalize(x if x.dtype == torch.float64 else x.float(), dim=-1)


def instance_loss(predictions: list[torch.Tensor], targets: list[torch.Tensor]) -> torch.Tensor:
    """Eq. 2.1, mean over the batch: minus the mean cosine of q(g(t_i x)) and g_xi(t_j x) over all ordered pairs i != j.
    predictions, targets: T tensors (B, D) each, T at least 2 (ValueError). No gradient reaches the targets."""
    T = len(predictions)
    if T < 2 or len(targets) != T:
        raise ValueError(f"{T} predictions and {len(targets)} targets: as many of both are needed, at least 2")
    q, z = unit(torch.stack(predictions)), unit(torch.stack(targets).detach())  # (T, B, D)
    pairs = (q.sum(0) * z.sum(0)).sum(1) - (q * z).sum((0, 2))  # all pairs less those with i = j
    return -pairs.mean() / (T * (T - 1))


class _NeighbourLoss(torch.autograd.Function):
    """Loss and gradient of Eq. 2.3 in one pass over the memory, a chunk of which at a time meets the batch."""

    @staticmethod
    def forward(ctx, z, labels, memory, memory_labels, own_index, sigma, chunk):
        # |cos| <= 1: relative to exp(1 / sigma) the smallest term is exp(-2 / sigma), and sums need no running maximum
        # as long as the number format holds that: single precision down to a sigma of 0.025.
        work = torch.float64 if z.dtype == torch.float64 or sigma < 0.025 else torch.float32
        rows, queries = torch.arange(len(z), device=z.device), z.to(work) / sigma
        all_sum, same_sum = queries.new_zeros(2, len(z), 1)
        all_pull, same_pull = queries.new_zeros(2, *z.shape)
        for start in range(0, len(memory), chunk):
            part = slice(start, start + chunk)
            keys = memory[part].to(work, copy=True)
            F.normalize(keys, dim=1, out=keys)  # in place: it is a copy
            weights = (queries @ keys.T).sub_(1 / sigma).exp_()  # (B, chunk)
            column = own_index - start
            inside = (column >= 0) & (column < len(keys))
            weights[rows, column.clamp(0, len(keys) - 1)] *= ~inside  # j != i
            all_sum += weights.sum(1, keepdim=True)
            all_pull.addmm_(weights, keys)
            same = weights.mul_(labels[:, None] == memory_labels[None, part])
            same_sum += same.sum(1, keepdim=True)
            same_pull.addmm_(same, keys)
        has = same_sum > 0
        all_sum, same_sum = (torch.where(has, s, 1.0) for s in (all_sum, same_sum))
        ctx.save_for_backward((has * (all_pull / all_sum - same_pull / same_sum) / (sigma * len(z))).to(z.dtype))
        return (all_sum.log() - same_sum.log()).mean().to(z.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0], *[None] * 6


def knn_loss(
    z: torch.Tensor, labels: torch.Tensor, memory: torch.Tensor, memory_labels: torch.Tensor, own_index: torch.Tensor,
    sigma: float = 0.05, chunk: int | None = None,
) -> torch.Tensor:
    """Eq. 2.2 and 2.3, mean over the batch: -log of the share of an image's neighbours that have its label.
    z (B, D) with labels (B,); memory (M, D), in any precision, with labels (M,); own_index (B,): the images' own rows
    of the memory, which are left out. Nothing needs to be normalised. Gradient reaches z only. An image whose label no
    other row has counts 0. Memory beyond the arguments: a few times B x chunk and M numbers, never B x M."""
    chunk = chunk or max(256, 2 ** (26 if z.is_cuda else 18) // len(z))
    with torch.autocast(z.device.type, enabled=False):
        return _NeighbourLoss.apply(unit(z), labels, memory, memory_labels, own_index, sigma, chunk)


class Memory(nn.Module):
    """M: one embedding per training image (2.3.1); from 0 (ours): the first update stores the first one's direction."""

    def __init__(self, images: int, dim: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.register_buffer("embeddings", torch.zeros(images, dim, dtype=dtype))

    @torch.no_grad()
    def update(self, indices: torch.Tensor, embeddings: torch.Tensor, skip: torch.Tensor | None = None) -> None:
        """m_i <- (m_i + g_i) / 2 for image numbers (B,) and embeddings (B, D), which are normalised here. An image that
        occurs several times counts once, with the mean of its embeddings: the result depends neither on their order nor
        on the ranks they come from. skip (0-dim, 1 or 0): change nothing where it is 1."""
        g = unit(embeddings)
        equal = (indices[:, None] == indices[None]).to(g.dtype)
        g = equal @ g / equal.sum(1, keepdim=True)
        old = self.embeddings[indices]
        new = ((old.to(g.dtype) + g) / 2).to(old.dtype)
        self.embeddings[indices] = new if skip is None else torch.where(skip > 0, old, new)


def total_loss(recipe: Recipe, model: Grafit, views: list, outputs: tuple, labels, neighbours: tuple, groups: int):
    """Eq. 2.4, or those terms that the method has, of the model's training outputs for views. labels: (B,), mixed (B,
    K); neighbours: what knn_loss takes between labels and sigma; groups: the batch is cut into so many, in which the
    next image is a triplet's other one."""
    (logits, g, predictions), (supervised, instance, _) = outputs, METHODS[recipe.method]
    loss = F.cross_entropy(logits, labels) if supervised == "ce" else 0.0
    if supervised == "knn":
        loss = loss + knn_loss(g, labels, *neighbours, recipe.sigma)
    if instance == "byol":
        loss = loss + recipe.instance_weight * instance_loss(predictions, model.targets(views))
    if instance == "triplet":
        anchor, positive = (unit(view).unflatten(0, (groups, -1)) for view in predictions[:2])
        loss = loss + recipe.instance_weight * F.triplet_margin_loss(anchor, positive, positive.roll(1, 1), margin=0.2)
    return loss


# ---- Augmentation: thesis section 2.4.3 ------------------------------------------------------------------------------


# Copied from deit.py
def random_resized_crop(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, crop height, crop width): area 8-100% of the image, aspect 3/4..4/3 (log-uniform), ten attempts; if
    none fits, the central crop with the aspect ratio clamped to that range."""
    for _ in range(10):
        area = rng.uniform(0.08, 1.0) * height * width
        aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            return rng.randint(0, height - crop_height), rng.randint(0, width - crop_width), crop_height, crop_width
    crop_height, crop_width = min(height, round(width / (3 / 4))), min(width, round(height * (4 / 3)))
    return (height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width


# Copied from deit.py
def erasing_box(height: int, width: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Random erasing's (top, left, box height, box width): area 2-33% of the image, height/width 0.3..1/0.3
    (log-uniform); ten attempts at a box smaller than the image in both directions, else none: (0, 0, 0, 0)."""
    for _ in range(10):
        area = rng.uniform(0.02, 1 / 3) * height * width
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        box_height, box_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if box_height < height and box_width < width:
            return rng.randint(0, height - box_height), rng.randint(0, width - box_width), box_height, box_width
    return 0, 0, 0, 0


# Adapted from deit.py: several views of an image
class TrainTransform:
    """A loader process' part, which decodes an image once: (uint8 image (3, H, W), rng) -> ((views uint8 (T, 3,
    *img_size),), for each view in turn the parameters for `erase`: top, left, height, width of the box, seed of its
    noise; height 0: nothing is erased). Normalisation, erasing and CutMix run on the device."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.views = recipe, recipe.views if METHODS[recipe.method][1] else 1

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[tuple[torch.Tensor], tuple[float, ...]]:
        from common import images

        size, augment = self.recipe.img_size, self.recipe.augment
        views, parameters = [], []
        for _ in range(self.views):
            if augment == "test":
                view = images.eval_transform(image, size, self.recipe.eval_crop_ratio)
            else:
                top, left, height, width = random_resized_crop(*image.shape[1:], rng)
                view = images.resize(image[:, top : top + height, left : left + width], size)
                view = view.flip(-1) if rng.random() < 0.5 else view
                if augment == "rand":
                    view = images.from_pil(rand_augment(images.to_pil(view), rng))
            views.append(view)
            box = erasing_box(*size, rng) if rng.random() < self.recipe.erasing else (0, 0, 0, 0)
            parameters += [*box, rng.getrandbits(24)]  # whole numbers up to 2^24 are exact in float32
        return (torch.stack(views),), tuple(parameters)


# Copied from deit.py
def erase(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Random erasing of normalised images (B, 3, H, W), in place: boxes (B, 5) of TrainTransform, which stay on the
    host, get standard normal noise. Each has a generator of its own: the noise depends on the image alone."""
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
OPERATIONS = (
    "AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
    "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY",
)


# Copied from deit.py
def apply_operation(image: Image.Image, operation: str, level: float, sign: int) -> Image.Image:
    """One operation of RandAugment at level 0..1 ("increasing" variant: a higher level always changes more)."""

    def affine(*matrix: float) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL)

    if operation in ("AutoContrast", "Equalize", "Invert"):
        return getattr(ImageOps, operation.lower())(image)
    if operation in ("Color", "Contrast", "Brightness", "Sharpness"):
        return getattr(ImageEnhance, operation)(image).enhance(1 + sign * 0.9 * level)
    if operation == "Posterize":
        bits = 4 - int(4 * level)
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)  # recent Pillow refuses 0 bits
    if operation == "Solarize":
        return ImageOps.solarize(image, 256 - int(256 * level))
    if operation == "SolarizeAdd":
        add = int(110 * level)
        return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)
    if operation == "Rotate":
        return image.rotate(sign * 30 * level, Image.Resampling.BICUBIC, fillcolor=FILL)
    if operation == "ShearX":
        return affine(1, sign * 0.3 * level, 0, 0, 1, 0)
    if operation == "ShearY":
        return affine(1, 0, 0, sign * 0.3 * level, 1, 0)
    if operation == "TranslateX":
        return affine(1, 0, sign * 0.45 * level * image.width, 0, 1, 0)
    return affine(1, 0, 0, 0, 1, sign * 0.45 * level * image.height)


def cutmix(images: torch.Tensor, targets: torch.Tensor, alpha: float, rngs: list) -> tuple[torch.Tensor, torch.Tensor]:
    """CutMix (arXiv:1905.04899) as DeiT uses it, of images (B, 3, H, W) and targets (B, K). The batch is cut into as
    many groups as there are generators; image i of a group gets a box of its image G-1-i, the same one in the whole
    group, of about 1 - lam of the area, lam from Beta(alpha, alpha)."""
    mixed, soft, n, (height, width) = images.clone(), targets.clone(), len(rngs), images.shape[2:]
    for x, own, y, rng in zip(mixed.chunk(n), images.chunk(n), soft.chunk(n), rngs):
        side = math.sqrt(1 - rng.betavariate(alpha, alpha))
        cy, cx = rng.randrange(height), rng.randrange(width)
        half_h, half_w = int(height * side) // 2, int(width * side) // 2
        top, bottom = max(cy - half_h, 0), min(cy + half_h, height)
        left, right = max(cx - half_w, 0), min(cx + half_w, width)
        x[:, :, top:bottom, left:right] = own.flip(0)[:, :, top:bottom, left:right]
        lam = 1 - (bottom - top) * (right - left) / (height * width)
        y.copy_(y * lam + y.flip(0) * (1 - lam))
    return mixed, soft


# ---- Evaluation: thesis sections 2.3.2 and 2.3.3 ---------------------------------------------------------------------


def conditional_scores(
    cosine: torch.Tensor, coarse_probabilities: torch.Tensor, coarse_labels: torch.Tensor
) -> torch.Tensor:
    """Eq. 2.5: cosines (B, M) of queries and collection, the queries' coarse probabilities (B, Kc), the collection's
    coarse labels (M,) -> psi (B, M) = cos + log(p / (1 - p)) with p the query's probability of the item's coarse label.
    p and 1 - p are at least 1e-12: psi is finite at p = 0 and 1, the oracle's."""
    p, other = coarse_probabilities.clamp(min=1e-12), (1 - coarse_probabilities).clamp(min=1e-12)
    return cosine + (p.log() - other.log())[:, coarse_labels]


def levels(source, device: torch.device | str = "cpu") -> dict[str, tuple[list[str], torch.Tensor]]:
    """Label levels of a data set, the coarsest first: name -> (classes, labels (N,))."""
    found = {"fine": (source.classes, source.labels)} | source.levels
    if any(len(classes) == len(found["fine"][0]) for name, (classes, _) in found.items() if name != "fine"):
        del found["fine"]  # iNaturalist's species
    ordered = sorted(found.items(), key=lambda item: len(item[1][0]))
    return {name: (classes, torch.as_tensor(labels, device=device)) for name, (classes, labels) in ordered}


def level_trained(source, classes: list[str]) -> str | None:
    """Name of the label level that has these classes, if any."""
    return next((name for name, (own, _) in levels(source).items() if sorted(own) == sorted(classes)), None)


def coarse_to_fine(
    queries: torch.Tensor, query_levels: dict, gallery: torch.Tensor, gallery_levels: dict, trained: str, sigma: float,
    logits: torch.Tensor | None = None, run=None,
) -> dict[str, dict[str, float]]:
    """At every label level: on-the-fly classification and category-level retrieval of queries (B, D) among the training
    images, gallery (M, D), by an embedding that was trained with the labels of level `trained`. logits (B, Kc) of
    a classifier: p_c of Eq. 2.5 is their softmax; None: L_knn "scores all classes with Equation 2.3", by all images.
    {level: {"k", "knn" (top-1, %), "map" (cosine), "map_conditional" (Eq. 2.5), "map_oracle" (all %)}}. k: the best of
    10, 15, 20, 25, 30 on a tenth (at most 10,000) of the training images, held out; of equally good ones the smallest.
    """
    from common import evaluate

    counts, (known, coarse) = evaluate.NEIGHBOURS, gallery_levels[trained]
    order = torch.randperm(len(gallery), generator=torch.Generator().manual_seed(0)).to(queries.device)
    held, rest = order.tensor_split([min(-(-len(gallery) // 10), 10_000)])
    held_cosines, held_nearest = evaluate.nearest(gallery[held], gallery[rest], max(counts), run=run)
    cosines, neighbours = evaluate.nearest(queries, gallery, max(counts), run=run)
    truth, count, result = query_levels[trained][1], len(known), {}

    def conditional(cosine: torch.Tensor, rows: slice) -> torch.Tensor:
        p = evaluate.vote(cosine, coarse.expand_as(cosine), sigma, count) if logits is None else logits[rows].softmax(1)
        return conditional_scores(cosine, p, coarse)

    def oracle(cosine: torch.Tensor, rows: slice) -> torch.Tensor:
        return conditional_scores(cosine, F.one_hot(truth[rows], count).to(cosine), coarse)

    asked = [(query_levels[level][1], labels) for level, (_, labels) in gallery_levels.items()]
    rankings = [lambda cosine, _: cosine, conditional, oracle]
    maps = 100 * evaluate.average_precisions(queries, gallery, asked, rankings, run=run).nanmean(0).nan_to_num()
    for (level, (classes, labels)), own in zip(gallery_levels.items(), maps.T.tolist()):
        validation = evaluate.knn_answers(held_cosines, labels[rest[held_nearest]], sigma, len(classes))
        k = max(counts, key=lambda k: ((validation[k] == labels[held]).sum().item(), -k))
        right = evaluate.knn_answers(cosines, labels[neighbours], sigma, len(classes))[k] == query_levels[level][1]
        result[level] = {"k": k} | dict(zip(METRICS, [100 * right.double().mean().item(), *own]))
    return result


METRICS = {"knn": "kNN, top-1 %", "map": "mAP %", "map_conditional": "mAP %, conditional (Eq. 2.5)",
           "map_oracle": "mAP %, oracle"}


def matrices(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Tables as 2.5, 2.6 and 2.14 of {column, a trained network: {row, a test level: metrics}}, one per metric."""
    lines, width = [], max(12, *(len(c) + 2 for c in results))
    for metric, title in METRICS.items():
        lines.append(f"{title:30s}" + "".join(f"{column:>{width}s}" for column in results))
        for level in next(iter(results.values())):
            lines.append(f"  test {level:23s}" + "".join(f"{r[level][metric]:{width}.2f}" for r in results.values()))
    return "\n".join(lines)


def embed(run, model: nn.Module, recipe: Recipe, source, title: str) -> torch.Tensor:
    """Embeddings (N, D) of a data set's images, or what else the model gives in eval mode, on all ranks."""
    from common import evaluate

    size, batch = recipe.img_size, run.args.micro_batch or 64
    return evaluate.extract(model.eval(), source, size, recipe.eval_crop_ratio, run, batch_size=batch, title=title)


def evaluate_levels(run, networks: list[tuple], source, val, file: str | None) -> None:
    """Says, and writes to a file of the run's folder, coarse_to_fine of validation among training images by networks
    (name, model, recipe, classes it was trained with); all embeddings are computed anew (section 2.3.1)."""
    from common import evaluate

    results = {}
    for name, model, recipe, classes in networks:
        level = level_trained(source, classes)
        gallery = embed(run, model, recipe, source, "training images")
        queries = embed(run, model, recipe, val, "validation images")
        data = queries, levels(val, run.device), gallery, levels(source, run.device)
        logits = None
        if hasattr(model, "fc"):  # the coarse classifier, whose softmax is used (2.2.1)
            logits = embed(run, nn.Sequential(model.trunk, model.fc), recipe, val, "validation classes")
            logits = logits[:, [classes.index(c) for c in data[3][level][0]]]
        results[name if level in results else level] = coarse_to_fine(*data, level, recipe.sigma, logits, run)
    if file and run.rank == 0:
        evaluate.save_json(run.out / file, results)
    run.say(matrices(results))


def validate_by_memory(run, model: nn.Module, memory: Memory, memory_labels: torch.Tensor, val) -> dict[str, float]:
    """{"val_knn": top-1 % of the kNN classifier on the memory as it is, which holds embeddings of the last epochs}."""
    from common import evaluate

    queries, keys = embed(run, model, run.recipe, val, "validation images"), memory.embeddings.float()
    votes = evaluate.knn_probabilities(queries, keys, memory_labels, 20, run.recipe.sigma, run.num_classes)
    right = votes.argmax(1).cpu() == torch.from_numpy(val.labels)
    return {"val_knn": 100 * right.double().mean().item()}


def class_logits(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits (B, K) for evaluation, with the methods that have a classifier; UserError without."""
    if not hasattr(model, "fc"):
        from common.errors import UserError
        raise UserError("--eval-data, --real-labels: this method has no classifier; --eval ranks by its embeddings")
    return {"": model.fc(model.trunk(images))}


def trained_models(run) -> tuple:
    """(training Source, validation Source, [(file, model, recipe, classes), ...] of --weights and --also)."""
    from common import cli, evaluate
    from common.sources import open_data

    args, found = run.args, []
    options = dict(val_data=args.val_data, coarse_labels=args.coarse_labels, say=run.say)
    sources = run.first(lambda: open_data(args.data or "shapes", **options))
    for file in [args.weights or str(run.out / "last.pt"), *(args.also or [])]:
        args.weights = file
        model, recipe, names = evaluate.trained_model(run, make_model)
        if level_trained(sources["train"], names) is None:
            raise cli.UserError(f"{file}: is of {len(names)} classes, which no label level of --data {args.data} has")
        found.append((file, model, recipe, names))
    return sources["train"], sources["val"], found


def compare(run) -> None:
    """--eval: kNN and retrieval of --weights and --also at every label level of --data; a classifier's top-1 too."""
    from common import evaluate

    source, val, found = trained_models(run)
    for file, model, recipe, classes in found:
        if hasattr(model, "fc") and classes == val.classes:
            metrics = evaluate.evaluate(run, model, recipe, val, class_logits)
            run.say(f"{file}: classifier  " + "  ".join(f"{k} {v:.5g}" for k, v in metrics.items()))
    evaluate_levels(run, found, source, val, "matrix.json" if run.args.out else None)


def predict_by_neighbours(run) -> None:
    """--predict: by the classifier if there is one, else by Eq. 2.6 (k 20) among --data's training images."""
    from common import evaluate

    source, _, ((_, model, recipe, classes),) = trained_models(run)
    names, labels = levels(source, run.device)[level_trained(source, classes)]
    gallery, order = embed(run, model, recipe, source, "training images"), [names.index(c) for c in classes]

    def predict(_, images: torch.Tensor) -> dict[str, torch.Tensor]:
        if hasattr(model, "fc"):
            return class_logits(model, images)
        p = evaluate.knn_probabilities(model(images).float(), gallery, labels, 20, recipe.sigma, len(names))
        return {"": p[:, order].clamp(min=1e-12).log()}

    evaluate.predict_images(run, make_model, None, predict)


def retrieve(run) -> None:
    """--retrieve: each query and its nearest training images by each network (Figures 2.6 to 2.9), framed in the colour
    of the finest level at which they have the query's label."""
    from common import cli, evaluate, images, report

    source, val, found = trained_models(run)
    files, queries = {str(Path(val.name(i)).resolve()): i for i in range(len(val))}, []
    for name in run.args.retrieve:
        number = int(name) if name.isdigit() else files.get(str(Path(name).resolve()))
        if number is not None and number >= len(val):
            raise cli.UserError(f"--retrieve {name}: there are {len(val)} validation images, numbered from 0")
        image = val.named(val.read, number) if name.isdigit() else evaluate.read_file(name, "--retrieve")
        queries.append((name, number, image))
    own_levels, val_levels, wrong, unknown = levels(source), levels(val), (200, 30, 30), (150, 150, 150)
    hues = [120 - 90 * i / max(1, len(own_levels) - 1) for i in range(len(own_levels))]  # green, the finest, to orange
    colours = {name: ImageColor.getrgb(f"hsv({hue:g}, 86%, 78%)") for name, hue in zip(reversed(own_levels), hues)}

    def picture(image: torch.Tensor, colour: tuple[int, int, int]) -> Image.Image:
        return ImageOps.expand(images.to_pil(images.eval_transform(image, (96, 96), 1.0)), border=4, fill=colour)

    rows = []
    for file, model, recipe, classes in found:
        gallery = embed(run, model, recipe, source, "training images")
        for title, number, image in queries:
            seen = images.eval_transform(image, recipe.img_size, recipe.eval_crop_ratio)
            with torch.no_grad():
                _, order = evaluate.nearest(model(evaluate.normalize(seen[None].to(run.device))), gallery, 10)
            labels = {} if number is None else {name: y[number] for name, (_, y) in val_levels.items()}
            framed = []
            for i in order[0].tolist():
                right = [colours[name] for name, label in labels.items() if own_levels[name][1][i] == label]
                framed.append(picture(source.named(source.read, i), [wrong if labels else unknown, *right][-1]))
            title = f"{title}: {recipe.method}, trained on {level_trained(source, classes)} labels ({file})"
            rows.append((title, [picture(image, (0, 0, 0)), *framed]))
    legend = {f"right at: {name}": colour for name, colour in colours.items()} | {"at none": wrong, "unknown": unknown}
    rows += [(title, [Image.new("RGB", (40, 10), colour)]) for title, colour in legend.items()]
    run.on_rank_0(lambda: report.save_sheet(run.out / "retrieved.png", rows))
    run.say(f"wrote {run.out / 'retrieved.png'}")


# ---- Training --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("grafit", __doc__, Recipe, RECIPES, model="resnet50", recipe="grafit")
    flag = parser.add_argument
    flag("--also", nargs="+", metavar="FILE", help="with --eval and --retrieve: further checkpoints, beside --weights")
    flag("--retrieve", nargs="+", metavar="IMAGE", help="files, or validation images' numbers: draw the 10 nearest")
    args = cli.parse(parser, argv, MODELS, RECIPES)
    paper = paper_recipe(args.recipe, args.data or "")
    recipe = cli.override(paper, args)
    supervised, instance, projector = METHODS[recipe.method]
    if not recipe.cutmix and instance != "triplet":  # what is alone does not bind the batch size
        recipe, paper = (dataclasses.replace(r, mix_group=1) for r in (recipe, paper))
    if recipe.method != "ce":
        cli.refuse(args, ("cutmix",), f"mixes labels, which only the method ce can take, not {recipe.method}")
    for part, has, flags in (
        ("classifier", supervised == "ce", ("classifier", "trainable")), ("projector", projector, ("proj_dim",)),
        ("instance loss", instance, ("views", "instance_weight")), ("memory", supervised == "knn", ("memory_dtype",)),
        ("target network", instance == "byol", ("target_decay",)),
        ("negative", instance != "triplet" or recipe.batch_size > 1 < recipe.mix_group, ("mix_group", "batch_size")),
    ):
        cli.refuse(args, () if has else flags, f"the method {recipe.method} has no {part}")
    cli.refuse(args, () if args.eval or args.retrieve else ("also",), "goes with --eval or --retrieve")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """The network for a command line; what is not `trainable` gets no gradient."""
    model = Grafit(args.model, recipe.method, num_classes, recipe.proj_dim, recipe.classifier)
    if recipe.trainable != "all":
        for module in model.trunk.modules():  # the whole before its parts
            module.requires_grad_(recipe.trainable == "classifier+norm" and isinstance(module, nn.BatchNorm2d))
    return model


def take_trunk(model: nn.Module, state: dict, content: dict, say) -> None:
    """Fits --weights to a network that is to be trained: the trunk is taken, of torchvision's weights too, and what
    else has the same name and shape; the rest starts afresh, a target network as a copy."""
    from common.checkpoint import take_part

    fresh = take_part(model, state, "trunk.")
    state.update({k: state[k.removeprefix("target.")] for k in fresh if k.startswith("target.")})
    if fresh:
        say(f"trunk taken from the checkpoint; new: {', '.join(sorted({k.split('.')[0] for k in fresh}))}")


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint: see common.models.load."""
    from common.models import load
    return load("grafit", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, what was saved) is common.script.set_up's."""
    from common import cli, evaluate, script
    from common.optim import cosine_lr

    recipe = run.recipe
    supervised, instance, _ = METHODS[recipe.method]

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    def make_memory(data) -> dict[str, Memory | None]:
        dtype = torch.float16 if recipe.memory_dtype == "fp16" else torch.float32
        memory = Memory(len(data.source), recipe.proj_dim, dtype) if supervised == "knn" else None
        return {"memory": memory and memory.to(run.device)}

    options = dict(adapt=take_trunk, extra=make_memory)
    data, model, wrapped, optimizer, precision, *_ = script.set_up(run, TrainTransform(recipe), make_model, **options)
    if recipe.trainable != "all" and not (run.args.weights or run.epoch or run.step):
        raise cli.UserError(f"--recipe {run.args.recipe}, --trainable {recipe.trainable}: needs a trunk (--weights)")
    memory, memory_labels = run.parts["memory"], torch.from_numpy(data.source.labels).to(run.device)
    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        if recipe.trainable == "classifier":
            model.trunk.eval()  # frozen, its statistics too
        for step in run.steps(data):
            embeddings = []
            for batch in data.micro_batches():
                views, boxes = batch.images[0].unbind(1), batch.parameters.unflatten(1, (-1, 5)).unbind(1)
                views, labels = [erase(evaluate.normalize(v), b) for v, b in zip(views, boxes)], batch.labels
                if recipe.cutmix:
                    rngs, labels = [run.rng("mix", g) for g in batch.groups], F.one_hot(labels, run.num_classes).float()
                    views[0], labels = cutmix(views[0], labels, recipe.cutmix, rngs)
                with precision.forward(wrapped):
                    known = (memory.embeddings, memory_labels, batch.indices) if memory else ()
                    outputs = wrapped(views)
                    loss = total_loss(recipe, model, views, outputs, labels, known, len(batch.groups))
                if memory:
                    embeddings.append(unit(outputs[1].detach()))
                precision.backward(loss)
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if instance == "byol":
                model.average(recipe.target_decay)
            if memory:  # all ranks' images, on every rank
                memory.update(run.gather(torch.cat(data.seen)), run.gather(torch.cat(embeddings)), skip=skipped)
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at(epoch + 1))
        if supervised == "ce":
            record |= evaluate.validate(run, class_logits)
        elif memory and data.val:
            record |= validate_by_memory(run, model, memory, memory_labels, data.val)
        run.end_of_epoch(record, record.get("val_top1", record.get("val_knn")))
    if data.val:
        evaluate_levels(run, [(run.method, model, recipe, data.classes)], data.source, data.val, "results.json")
    script.finish(run, ["train_loss"], ["val_top1", "val_knn"])


def benchmark_loss(recipe: Recipe, model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """What --benchmark trains by: the method's losses, all views alike, with a memory of 65,536 embeddings."""
    views = [images] * (recipe.views if METHODS[recipe.method][1] else 1)
    known = images.new_ones(2**16, recipe.proj_dim), torch.arange(2**16, device=images.device) % 127, labels
    return total_loss(recipe, getattr(model, "module", model), views, model(views), labels, known, 1)


def main() -> None:
    from common import script
    from common.run import Run

    args, recipe, paper = parse_args()
    levelled = args.eval and not (args.eval_data or args.real_labels)
    for asked, action in ((args.retrieve, retrieve), (args.predict, predict_by_neighbours), (levelled, compare)):
        if asked:
            return action(Run("grafit", args, recipe, paper))
    script.run_script(
        "grafit", args, recipe, paper, MODELS, train=train, make_model=make_model, predict=class_logits,
        loss=lambda model, images, labels: benchmark_loss(recipe, model, images, labels),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
