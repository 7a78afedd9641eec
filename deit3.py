"""DeiT III: Revenge of the ViT (Touvron, Cord, Jegou; arXiv:2204.07118; thesis chapter 6).

New: 3-Augment (one of greyscale, solarisation, blur), binary cross-entropy on mixed labels, LAMB, LayerScale for every
size, simple random crop for ImageNet-21k. A plain ViT trained so on ImageNet-1k alone reaches 83.1 (ViT-B) and 84.2
(ViT-L) top-1 at 224 pixels after 400 epochs (Table 6.4), 85.2 (ViT-H) with low-resolution training (Table 6.6).

    torchrun --nproc_per_node 8 deit3.py --model vit_b --data /imagenet        # the paper's run
    python deit3.py --model vit_nano --recipe shapes                           # minutes on two CPU cores, no download

Checked here: state-dict keys and logits of the official models, the augmentation pixel by pixel, mixup and cutmix,
LAMB, schedule and weight-decay groups against the official components' numbers (tests/). Not run here: ImageNet.

Axes: B images, N tokens, C channels, K classes, H x W pixels, p patch side, h heads.

Where the official code differs from what stands here:
- learning rate, mixup draw, the keys' bias: as said in deit.py;
- its learning rate on ImageNet-21k is 1e-3; Table 6.1 says 3e-3, as here;
- stochastic depth masks a binomial number of samples there; here a fixed number is drawn, only these are computed;
- simple random crop: the thesis says the crop is random along the x-axis, the code (followed here) draws both offsets:
  the short side moves too, by the 8 pixels of the padding.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

# ---- Recipe: thesis Table 6.1, drop rates Table 6.14 -----------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """One column of Table 6.1. The defaults are the column ImageNet-1k."""

    epochs: Annotated[int, "passes over as many images as the data set has", "1 or more"] = 400
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 2048
    optimizer: Annotated[str, "lamb, adamw or sgd", ("lamb", "adamw", "sgd")] = "lamb"
    lr: Annotated[float, "peak learning rate; unset: in proportion to the batch", "above 0"] = 3e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine", "0 or more"] = 1e-5  # official code, as the next
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 1e-6  # the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 5
    weight_decay: Annotated[float, "not on biases, norms, LayerScale, class token, position", "0 or more"] = 0.02
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping", "above 0"] = 1.0
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW", "1 or more"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 3
    crop: Annotated[str, "rrc (random resized crop) or src (simple random crop)", ("rrc", "src")] = "rrc"
    augment: Annotated[str, "3-augment, some of gray+solarize+blur, rand, auto, trivial or none"] = "3-augment"
    color_jitter: Annotated[float, "strength of brightness, contrast and saturation jitter; 0: off", "in [0, 1]"] = 0.3
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off", "0 or more"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off", "0 or more"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (officially: a GPU's)", "1 or more"] = 64
    loss: Annotated[str, "bce (on binarised mixed labels) or ce", ("bce", "ce")] = "bce"
    smoothing: Annotated[float, "label smoothing, with ce only", "in [0, 1)"] = 0.0
    layer_scale: Annotated[float | None, "LayerScale's initial value; none: no LayerScale", "0 or more"] = 1e-4
    drop_path: Annotated[float | None, "stochastic depth, one rate for all; unset: DROP_PATH", "in [0, 1)"] = None
    trainable: Annotated[str, "all, or attention with head and positions (6.3.5.1)", ("all", "attention")] = "all"
    ema: Annotated[float, "decay of the averaged weights; 0: none", "in [0, 1)"] = 0.0
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps", "in (0, 1]"] = 1.0


RECIPES = {
    # Table 6.1, column ImNet-1k. Low-resolution pre-training (Table 6.6) is this with --img-size 128, 160 or 192
    # (126, 154, 182 for ViT-H), then `finetune` at 224.
    "in1k": Recipe(),
    # Table 6.1, ImNet-21k pretrain; 90 epochs: section 6.3.1.
    "in21k": Recipe(epochs=90, repeats=1, crop="src", mixup=0.0, loss="ce", smoothing=0.1),
    # Table 6.1, ImNet-21k finetune; 50 epochs: section 6.3.1. At 384: --img-size 384.
    "in21k_to_in1k": Recipe(epochs=50, lr=3e-4, repeats=1, crop="src", mixup=0.0, loss="ce", smoothing=0.1),
    # Section 6.3.6; the rest is chapter 3's (RandAugment, mixup, cutmix, smoothing: Table 3.9), but never erasing.
    "finetune": Recipe(
        epochs=20, batch_size=512, optimizer="adamw", lr=1e-5, weight_decay=0.1, clip_grad=None, repeats=1,
        augment="rand", loss="ce", smoothing=0.1,
    ),
    # Section 6.3.5 gives no numbers; CaiT's rule (section 3.7.1.3): the training recipe, learning rates, peak and last,
    # / 10 (Cars, Flowers, iNaturalist) or / 100 (CIFAR), 1000 epochs (360 on iNaturalist).
    "transfer": Recipe(epochs=1000, lr=3e-4, min_lr=1e-6),
    # Not of the thesis: images of your own (common.script.fit_own); the built-in data set, minutes on two CPU cores.
    "own": Recipe(epochs=30, lr=1e-2, warmup_epochs=0, repeats=1, augment="none", mixup=0.0, cutmix=0.0),
    "shapes": Recipe(
        epochs=6, batch_size=64, lr=1e-2, warmup_epochs=1, img_size=(48, 48), repeats=1, crop="src", mixup=0.0,
        cutmix=0.0, mix_group=8, loss="ce", smoothing=0.1, layer_scale=1.0,
    ),
}
TRANSFER = {  # data set: what `transfer` changes for it
    **dict.fromkeys(("cifar10", "cifar100"), dict(lr=3e-5, min_lr=1e-7)),
    **dict.fromkeys(("inat2018", "inat2019"), dict(epochs=360)),
    "flowers102": dict(batch_size=512, lr=7.5e-5, min_lr=2.5e-7, warmup_lr=2.5e-7),  # and --trainable attention
}
# Drop rates: Table 6.14 (400 epochs of ImageNet-1k, 90 of ImageNet-21k); of fine-tuning, by the official commands (from
# ImageNet-21k; to 224 after 800 epochs; to more than 224). What neither has repeats the first one, or ViT-H's row.
DROP_PATH = {
    "vit_ti": (0.0,) * 5, "vit_s": (0.0, 0.0, 0.05, 0.0, 0.0), "vit_m": (0.0,) * 5, "vit_nano": (0.0,) * 5,
    "vit_b": (0.1, 0.1, 0.15, 0.2, 0.15), "vit_l": (0.4, 0.3, 0.4, 0.45, 0.4),
    **dict.fromkeys(("vit_h", "vit_h52", "vit_h26x2"), (0.5, 0.5, 0.45, 0.55, 0.5)),
}


def paper_recipe(name: str, model: str, *, epochs: int = 0, data: str = "", size: int = 224, before: int = 0) -> Recipe:
    """The recipe's row completed for a model (torchvision's keep their own drop rates), `epochs` that are asked for, a
    data set (`transfer`), pixels of the longer side and epochs `before` (`finetune`). For longer schedules (section
    6.4) weight decay is 0.05 beyond 400 epochs of ImageNet-1k and the drop rate rises by 0.05 for every 200 of them;
    for the 240 epochs of ImageNet-21k (Table 6.5) by 0.05."""
    changes = TRANSFER.get(data.split(":")[0].split("@")[0], {}) if name == "transfer" else {}
    if name == "in1k" and epochs > 400:
        changes = dict(weight_decay=0.05)
    if model in DROP_PATH:
        tuned = 4 if size > 224 else 3 if before >= 800 else 0
        column = {"in21k": 1, "in21k_to_in1k": 2, "finetune": tuned}.get(name, 0)
        longer = max(0, epochs - 400) // 200 if name == "in1k" else int(name == "in21k" and epochs >= 240)
        changes = {**changes, "drop_path": round(DROP_PATH[model][column] + 0.05 * longer, 4)}
    return dataclasses.replace(RECIPES[name], **changes)


def epochs_of(weights: str | None) -> int:
    """How long the run was that wrote a checkpoint; 0 of one that does not say. Reads no tensor."""
    try:
        return torch.load(weights, map_location="cpu", mmap=True, weights_only=True)["recipe"]["epochs"]
    except Exception:  # an official file, or none: who loads it says what is wrong
        return 0


# ---- Architecture: thesis section 6.2; sizes: Tables 6.14 and 6.6 ----------------------------------------------------

MODELS = {
    "vit_ti": dict(dim=192, depth=12, heads=3, patch=16),
    "vit_s": dict(dim=384, depth=12, heads=6, patch=16),
    "vit_m": dict(dim=512, depth=12, heads=8, patch=16),  # not in the thesis: the official repository's medium model
    "vit_b": dict(dim=768, depth=12, heads=12, patch=16),
    "vit_l": dict(dim=1024, depth=24, heads=16, patch=16),
    "vit_h": dict(dim=1280, depth=32, heads=16, patch=14),
    "vit_h52": dict(dim=1280, depth=52, heads=16, patch=14),
    "vit_h26x2": dict(dim=1280, depth=26, heads=16, patch=14, branches=2),
    "vit_nano": dict(dim=96, depth=3, heads=3, patch=8),  # not in the thesis: for the built-in data set and for tests
}


# Copied from deit.py
class PatchEmbed(nn.Module):
    """Images (B, 3, h p, w p) -> tokens (B, h w, C) of the grid (h, w): a p x p convolution of stride p, as one matrix
    product. AssertionError for images of another size, whose patches would get the places of others."""

    def __init__(self, dim: int, patch: int, grid: tuple[int, int]):
        super().__init__()
        self.patch, self.grid = patch, grid
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        B, (h, w), p = images.shape[0], self.grid, self.patch
        torch._assert(images.shape[1:] == (3, h * p, w * p), f"this model takes (B, 3, {h * p}, {w * p})")
        x = images.reshape(B, 3, h, p, w, p).permute(0, 2, 4, 1, 3, 5)  # (B, h, w, 3, p, p)
        return F.linear(x.reshape(B, h * w, 3 * p * p), self.proj.weight.flatten(1), self.proj.bias)


# Copied from deit.py
class Attention(nn.Module):
    """Multi-head self-attention, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        # Softmax cancels the keys' bias: its gradient is rounding noise, which Adam and LAMB would blow up to full
        # steps (and make the result depend on how the batch is cut). It keeps its value and gets no gradient.
        bias = torch.cat([self.qkv.bias[:C], self.qkv.bias[C : 2 * C].detach(), self.qkv.bias[2 * C :]])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, C/h)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


# Copied from deit.py
class MLP(nn.Module):
    """Two linear layers with a GELU between them, hidden width 4 C, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


# Copied from cait.py
@torch.fx.wrap  # not followed by torch.fx, to which the batch is no number
def kept_samples(batch: int, drop_rate: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """Stochastic depth's draw: (indices of the samples that keep the branch, factor on it). Always round(batch (1 -
    drop_rate)) of them and at least 1: static shapes, no host waits for a GPU. Each is kept with the same probability,
    whose inverse is the factor: the expectation is the usual law's."""
    kept = max(1, round(batch * (1 - drop_rate)))
    return torch.rand(batch, device=device).topk(kept).indices, batch / kept


def layer_scale(dim: int, value: float | None) -> nn.Parameter | None:
    """LayerScale's diagonal (thesis Eq. 3.7) at its start; None: no LayerScale."""
    return None if value is None else nn.Parameter(torch.full((dim,), value))


# Adapted from deit.py: LayerScale, stochastic depth on the kept samples only; no dropout
class Block(nn.Module):
    """Pre-norm transformer block with LayerScale (gamma) and stochastic depth, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, heads: int, scale: float | None, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.gamma_1, self.gamma_2 = (layer_scale(dim, scale) for _ in range(2))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def add(self, total: torch.Tensor, x: torch.Tensor, norm: nn.Module, layer: nn.Module, gamma) -> torch.Tensor:
        """total + gamma * layer(norm(x)), the branch computed only for the samples that stochastic depth keeps."""
        dropping = self.training and self.drop_path > 0
        if dropping:
            kept, factor = kept_samples(x.shape[0], self.drop_path, x.device)
            x = x[kept]
        branch = layer(norm(x)) if gamma is None else gamma * layer(norm(x))
        return total.index_add(0, kept, branch.to(total.dtype), alpha=factor) if dropping else total + branch

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.add(x, x, self.norm1, self.attn, self.gamma_1)
        return self.add(x, x, self.norm2, self.mlp, self.gamma_2)


class ParallelBlock(Block):
    """Two attentions, then two MLPs, side by side (ViT-H-26x2 of Table 6.6); official names, in the official order."""

    def __init__(self, dim: int, heads: int, scale: float | None, drop_path: float):
        nn.Module.__init__(self)
        self.drop_path = drop_path
        self.gamma_1, self.gamma_1_1, self.gamma_2, self.gamma_2_1 = (layer_scale(dim, scale) for _ in range(4))
        self.norm1, self.norm11 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.attn1 = Attention(dim, heads), Attention(dim, heads)
        self.norm2, self.norm21 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.mlp, self.mlp1 = MLP(dim), MLP(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.add(x, x, self.norm1, self.attn, self.gamma_1)
        y = self.add(y, x, self.norm11, self.attn1, self.gamma_1_1)
        z = self.add(y, y, self.norm2, self.mlp, self.gamma_2)
        return self.add(z, y, self.norm21, self.mlp1, self.gamma_2_1)


# Adapted from deit.py: position embedding of the patches only, no distillation token
class ViT(nn.Module):
    """Vision transformer: images (B, 3, H, W) -> logits (B, K). The position embedding covers the patches only."""

    def __init__(
        self, dim: int, *, depth: int, heads: int, patch: int, branches: int = 1, num_classes: int,
        img_size: tuple[int, int], layer_scale: float | None, drop_path: float,
    ):
        super().__init__()
        self.grid, self.grad_checkpoint = (img_size[0] // patch, img_size[1] // patch), False
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.grid[0] * self.grid[1], dim))
        self.patch_embed = PatchEmbed(dim, patch, self.grid)
        block = ParallelBlock if branches == 2 else Block
        self.blocks = nn.ModuleList(block(dim, heads, layer_scale, drop_path) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():  # the patch projection keeps the convolution's default, as the official code does
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed all the same."""
        return {"pos_embed", "cls_token"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Class token and patches, as the head is given the token: (B, 1 + N, C)."""
        x = self.patch_embed(images) + self.pos_embed  # (B, N, C)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1)  # (B, 1 + N, C)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpoint and self.training else block(x)
        return self.norm(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.forward_features(images)[:, 0])


def build_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None,
    layer_scale: float | None = 1e-4,
) -> nn.Module:
    """A fresh model: a row of MODELS, or "torchvision/NAME" (then only num_classes is used; Swin-S and Swin-B bring
    stochastic depth of 0.3 and 0.5). img_size: pixels, S or (H, W), multiples of the patch; None: 224. drop_path None:
    Table 6.14's for ImageNet-1k. layer_scale None: without LayerScale. Raises KeyError for an unknown name, ValueError
    for a size that does not fit."""
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, num_classes=num_classes)
    size = whole_patches(img_size or 224, MODELS[name]["patch"], name)
    drop_path = DROP_PATH[name][0] if drop_path is None else drop_path
    return ViT(**MODELS[name], num_classes=num_classes, img_size=size, layer_scale=layer_scale, drop_path=drop_path)


# Copied from deit.py
def whole_patches(img_size: int | tuple[int, int], patch: int, name: str) -> tuple[int, int]:
    """(H, W) of an image size S or (H, W); ValueError with the nearest good ones if patches do not fill it."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if any(s < patch or s % patch for s in size):
        near = " or ".join("x".join(str(max(patch, (s // patch + up) * patch)) for s in size) for up in (0, 1))
        given = f"image size {size[0]}x{size[1]} is not a multiple of {name}'s patch of {patch}"
        raise ValueError(f"{given}; the nearest are {near}")
    return size


# Copied from deit.py
def resize_pos_embed(pos_embed: torch.Tensor, grid: tuple[int, int], *, old_grid: tuple[int, int]) -> torch.Tensor:
    """Position embedding (1, prefix + N, C) for another grid than the old one: bicubic (a = -0.75), which about keeps
    the vectors' norm (section 3.4.5), not antialiased, in float32 or wider; prefix tokens stay."""
    prefix = pos_embed.shape[1] - old_grid[0] * old_grid[1]
    if old_grid == tuple(grid):
        return pos_embed
    patches = pos_embed[:, prefix:].to(torch.promote_types(pos_embed.dtype, torch.float32))
    patches = patches.reshape(1, *old_grid, -1).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=tuple(grid), mode="bicubic", align_corners=False)
    patches = patches.permute(0, 2, 3, 1).flatten(1, 2).to(pos_embed.dtype)
    return torch.cat([pos_embed[:, :prefix], patches], dim=1)


# Copied from deit.py
def fit_resolution(model: nn.Module, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Resizes the position embedding in `state`, of the checkpoint `content`, to the model's resolution."""
    held = state.get("pos_embed")
    if held is None or held.ndim != 3 or not hasattr(model, "grid"):
        return
    prefix = model.pos_embed.shape[1] - math.prod(model.grid)
    try:
        old_grid = tuple(side // model.patch_embed.patch for side in content["recipe"]["img_size"])
    except (KeyError, TypeError):  # it does not say: the model's where that fits, else a square
        side = math.isqrt(max(0, held.shape[1] - prefix))
        old_grid = model.grid if held.shape == model.pos_embed.shape else (side, side)
    if old_grid != model.grid and held.shape[1] == prefix + math.prod(old_grid):  # else loading says what does not fit
        state["pos_embed"] = resize_pos_embed(held, model.grid, old_grid=old_grid)
        say(f"position embedding resized to {model.grid[0]} x {model.grid[1]} patches")


# ---- Loss: section 6.2.1 ---------------------------------------------------------------------------------------------


# Copied from patchconvnet.py
def bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, mean over B and K; every class with a share in the mixed image counts fully. The other loss
    is F.cross_entropy, which takes soft targets (B, K) too."""
    return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))


# ---- Augmentation: section 6.2.2, 6.2.3 ------------------------------------------------------------------------------

ORDERS = ((0, 1, 2), (0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))  # of brightness, contrast, saturation
CHOICES = ("gray", "solarize", "blur")


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


def simple_random_crop(image: torch.Tensor, size: tuple[int, int], rng: random.Random) -> torch.Tensor:
    """uint8 (3, H, W) -> (3, *size): resize to just cover `size`, reflect-pad 4 pixels, crop at random."""
    from common.images import resize_to_cover

    image, windows = resize_to_cover(image, size), []
    for length, side in zip(image.shape[1:], size):
        at = (torch.arange(side) + rng.randint(0, length + 8 - side) - 4).abs() % max(1, 2 * (length - 1))
        windows.append(torch.minimum(at, 2 * (length - 1) - at))  # mirrored at the edge pixels, which are not repeated
    return image.permute(1, 2, 0)[windows[0]][:, windows[1]].permute(2, 0, 1)


# Adapted from deit.py: simple random crop, 3-Augment; no erasing
class TrainTransform:
    """A loader process' part: cropping and all draws; the rest runs on the device, a batch at a time. (uint8 image (3,
    H, W), rng) -> (uint8 (3, *img_size), parameters for `augment`: flip, choice (0 none, 1 gray, 2 solarize, 3 blur),
    blur radius, factors of brightness, contrast and saturation, index into ORDERS)."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.jitter, policy = recipe, recipe.color_jitter, recipe.augment
        self.choices = [i for i, name in enumerate(CHOICES, 1) if policy == "3-augment" or name in policy.split("+")]
        how = dict(interpolation=v2.InterpolationMode.BICUBIC, fill=FILL)  # as officially
        self.learned = {"auto": v2.AutoAugment(**how), "trivial": v2.TrivialAugmentWide(**how)}.get(policy)

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, tuple[float, ...]]:
        from common import images

        if self.recipe.crop == "rrc":
            top, left, height, width = random_resized_crop(*image.shape[1:], rng)
            image = images.resize(image[:, top : top + height, left : left + width], self.recipe.img_size)
        else:
            image = simple_random_crop(image, self.recipe.img_size, rng)
        flip, choice, radius, factors, order = float(rng.random() < 0.5), 0, 0.0, (1.0, 1.0, 1.0), 0
        if self.recipe.augment == "rand":
            image = images.from_pil(rand_augment(images.to_pil(image), rng))
        elif self.learned:  # torchvision's policies draw from torch's global generator: seed it for this image
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                image = images.from_pil(self.learned(images.to_pil(image)))
        elif self.choices:
            choice, radius = rng.choice(self.choices), rng.uniform(0.1, 2.0)
        if self.jitter and not (self.learned or self.recipe.augment == "rand"):  # none on top of these, as officially
            factors = tuple(rng.uniform(1 - self.jitter, 1 + self.jitter) for _ in range(3))
            order = rng.randrange(len(ORDERS))
        return image, (flip, choice, radius, *factors, order)


def moved(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device, without waiting for the copy."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def augment(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """The device's part: uint8 (B, 3, H, W), parameters (B, 7) of TrainTransform -> float32 with whole values 0..255.
    Flip, one of the three augmentations, colour jitter, rounded at each step as PIL does: equal to the official
    pipeline on 8-bit images. `parameters` stays on the host, where the draws are known without waiting."""
    if not images.is_cuda and len(images) > (chunk := max(1, 2**18 // images[0].numel())):  # what fits a core's cache
        return torch.cat([augment(*piece) for piece in zip(images.split(chunk), parameters.split(chunk))])
    flip, choice, radius, device = parameters[:, 0], parameters[:, 1], parameters[:, 2], images.device
    on_device = moved(parameters, device)
    x = images.contiguous()  # planes: several times faster below than the loader's interleaved colours
    x = torch.where(on_device[:, 0].view(-1, 1, 1, 1) > 0, x.flip(-1), x).float() if flip.any() else x.float()
    for number, change in ((1, luma), (2, lambda x: torch.where(x < 128, x, 255 - x))):  # gray, solarize
        if (choice == number).any():
            x = torch.where(on_device[:, 1].view(-1, 1, 1, 1) == number, change(x), x)
    blurred = (choice == 3).nonzero().flatten()
    if len(blurred):
        where = moved(blurred, device)
        blur = gaussian_blur if images.is_cuda else gaussian_blur_by_pil
        x = x.index_copy(0, where, blur(x[where], radius[blurred]))
    if (parameters[:, 3:6] != 1).any():
        x = color_jitter(x, on_device[:, 3:6], moved(torch.tensor(ORDERS)[parameters[:, 6].long()], device))
    return x


def luma(x: torch.Tensor) -> torch.Tensor:
    """(B, 3, H, W) -> (B, 1, H, W): PIL's conversion to "L"; every sum below is a whole number exact in float32."""
    r, g, b = x.split(1, dim=1)
    return ((r * 19595 + g * 38470 + b * 7471 + 32768) * (1 / 65536)).floor()


def gaussian_blur(x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """PIL's GaussianBlur of each image with its own radius (host tensor (B,), at most 2 pixels): per axis three box
    blurs of fractional width, which together have that standard deviation."""
    variance = radius.double() ** 2 / 3
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    box = whole + (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    box, reach = box.float(), box.floor()
    inner = (2**24 / (2 * box + 1)).floor().double()  # units of 2^-24: PIL's integers, from its float32 division
    outer = ((2**24 - (2 * reach + 1) * inner) / 2).floor()
    # Weights of distance 0, 1 and 2: full inside the reach, `outer` just beyond it.
    weights = [torch.where(reach >= d, inner, torch.where(reach + 1 == d, outer, 0.0)) / 2**24 for d in (0, 1, 2)]
    w0, w1, w2 = moved(torch.stack(weights), x.device).view(3, -1, 1, 1, 1)
    x = x.double()  # float32 would round the products, and with them every tie, another way than PIL's integers
    for axis in (3, 2):
        n = x.shape[axis]
        for _ in range(3):
            padded = F.pad(x, (2, 2, 0, 0) if axis == 3 else (0, 0, 2, 2), mode="replicate")
            near = padded.narrow(axis, 1, n) + padded.narrow(axis, 3, n)
            far = padded.narrow(axis, 0, n) + padded.narrow(axis, 4, n)
            x = (w0 * x + w1 * near + w2 * far + 0.5).floor()
    return x.float()


def gaussian_blur_by_pil(x: torch.Tensor, radius: torch.Tensor) -> torch.Tensor:
    """The same by PIL itself, which a CPU does five times faster."""
    pixels = x.to(torch.uint8).permute(0, 2, 3, 1).numpy()
    images = [Image.fromarray(p).filter(ImageFilter.GaussianBlur(r)) for p, r in zip(pixels, radius.tolist())]
    return torch.stack([v2.functional.pil_to_tensor(image) for image in images]).float()


def color_jitter(x: torch.Tensor, factors: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast and saturation by `factors` (B, 3), each image in its own `order` (B, 3) of 0, 1, 2. Each is
    PIL's blend of the image with black, with its mean grey, or with its grey version, truncated to whole values."""
    for step in range(3):
        which = order[:, step].view(-1, 1, 1, 1)
        factor = factors.gather(1, order[:, step : step + 1]).view(-1, 1, 1, 1)
        grey = luma(x)
        mean = (grey.mean(dim=(1, 2, 3), keepdim=True) + 0.5).floor()
        base = torch.where(which == 0, 0.0, torch.where(which == 1, mean, grey))
        x = (base + factor * (x - base)).clamp(0, 255).floor()
    return x


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


# Copied from deit.py
class Mix(NamedTuple):
    """One draw: the image's own share `lam`, and cutmix's box (top, bottom, left, right) in pixels (None: mixup)."""

    lam: float
    box: tuple[int, int, int, int] | None = None


# Copied from deit.py
def draw_mix(recipe: Recipe, rng: random.Random) -> Mix:
    """Cutmix or mixup with equal chances (one of them alone if the other's alpha is 0); lam from Beta(alpha, alpha)."""
    if not recipe.mixup and not recipe.cutmix:
        return Mix(1.0)
    cut = rng.random() < 0.5 if recipe.mixup and recipe.cutmix else bool(recipe.cutmix)
    alpha = recipe.cutmix if cut else recipe.mixup
    lam = rng.betavariate(alpha, alpha)
    if not cut:
        return Mix(lam)
    height, width = recipe.img_size
    return cutmix_box(lam, height, width, rng.randrange(height), rng.randrange(width))


# Copied from deit.py
def cutmix_box(lam: float, height: int, width: int, cy: int, cx: int) -> Mix:
    """Box of about (1 - lam) of the area around (cy, cx), clipped to the image; lam becomes what the clipped box
    leaves. An odd side loses a pixel, as in the official code."""
    half_h, half_w = int(height * math.sqrt(1 - lam)) // 2, int(width * math.sqrt(1 - lam)) // 2
    top, bottom = max(cy - half_h, 0), min(cy + half_h, height)
    left, right = max(cx - half_w, 0), min(cx + half_w, width)
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


# ---- Training --------------------------------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("deit3", __doc__, Recipe, RECIPES, model="vit_b", recipe="in1k", grad_checkpoint=True)
    args = cli.parse(parser, argv, [*MODELS, "torchvision/NAME", "SCRIPT/NAME"], RECIPES)
    known = dict(data=args.data or "", size=max(args.img_size or (224,)), before=epochs_of(args.weights))
    paper = paper_recipe(args.recipe, args.model, epochs=args.epochs or 0, **known)
    recipe = cli.override(paper, args)
    if not set(recipe.augment.split("+")) <= set(CHOICES):
        cli.check_choice("--augment", recipe.augment, ("3-augment", "rand", "auto", "trivial", "none", *CHOICES))
    if recipe.loss == "bce" and recipe.smoothing:
        raise cli.UserError("--smoothing: would switch on every class of --loss bce; use --smoothing 0 or --loss ce")
    if args.model not in MODELS:
        cli.check_choice("--model", args.model.split("/")[0], ("torchvision", "deit", "cait", "resmlp", "patchconvnet"))
        cli.refuse(args, ("drop_path", "layer_scale", "trainable", "grad_checkpoint"), "not for others' models")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """build_model for a command line; SCRIPT/MODEL (Table 6.13) is built as by that script's."""
    if "/" in args.model and not args.model.startswith("torchvision/"):
        from common.models import from_checkpoint
        return from_checkpoint({}, "", recipe.img_size, print, name=args.model, classes=num_classes)
    model = build_model(args.model, num_classes, recipe.img_size, recipe.drop_path, recipe.layer_scale)
    model.grad_checkpoint = args.grad_checkpoint
    if recipe.trainable == "attention":
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".attn" in name or name.startswith("head.") or name == "pos_embed"
    return model


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint, ours or official: see common.models.load."""
    from common.models import load
    return load("deit3", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, what was saved) is common.script.set_up's."""
    from common import evaluate, script
    from common.optim import cosine_lr

    recipe = run.recipe
    criterion = bce_loss if recipe.loss == "bce" else F.cross_entropy

    def prepare(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        mixes = [draw_mix(recipe, run.rng("mix", group)) for group in batch.groups]
        images = evaluate.normalize(augment(batch.images, batch.parameters))
        targets = mix_targets(batch.labels, mixes, run.num_classes, recipe.smoothing)
        return images, mix_images(images, mixes), targets

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    data, model, wrapped, optimizer, precision, ema, _ = script.set_up(
        run, TrainTransform(recipe), make_model, prepare, adapt=fit_resolution
    )
    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        for step in run.steps(data):
            for batch in data.micro_batches():
                _, images, targets = prepare(batch)
                with precision.forward(wrapped):
                    loss = criterion(wrapped(images), targets)
                precision.backward(loss)
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if ema:
                ema.update(model, skip=skipped)
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at(epoch + 1)) | evaluate.validate(run)
        run.end_of_epoch(record, record.get("val_top1"))
    script.finish(run, ["train_loss", "val_loss"], ["val_top1", "val_top5"])


def main() -> None:
    from common import script

    args, recipe, paper = parse_args()
    criterion = bce_loss if recipe.loss == "bce" else F.cross_entropy
    script.run_script(
        "deit3", args, recipe, paper, MODELS, train=train, make_model=make_model, adapt=fit_resolution,
        loss=lambda model, images, labels: criterion(model(images), mix_targets(labels, [Mix(1.0)], 1000, 0.0)),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
