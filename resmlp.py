"""ResMLP: Feedforward networks for image classification with data-efficient training (Touvron, Bojanowski, Caron, Cord,
El-Nouby, Grave, Izacard, Joulin, Synnaeve, Verbeek, Jegou; arXiv:2105.03404; thesis chapter 4).

New: no attention and no statistics: a linear layer across patches, a two-layer MLP across channels, affine maps instead of
normalisation. With chapter 3's training ResMLP-S24 reaches 79.4 top-1 on ImageNet, 80.8 with a RegNetY-16GF as teacher
(Table 4.3).

    torchrun --nproc_per_node 8 resmlp.py --model resmlp_s24 --data /imagenet                        # the paper's run
    torchrun --nproc_per_node 8 resmlp.py --model resmlp_s24 --data /imagenet --distillation hard    # with a teacher
    python resmlp.py --model resmlp_nano --recipe shapes                                             # minutes on two CPU cores
    python resmlp.py --model resmlp_s24 --weights runs/s24/best.pt --filters filters                 # Figures 4.2 and 4.3

Checked here: state-dict keys and logits of the official models, parameters and GMACs of every row of Table 4.3, the fused
network against the one it replaces, the augmentation by DeiT's numbers (tests/). Not run here: ImageNet.

Axes: B images, N patches, C channels, K classes, H x W pixels, p patch side.

Where the official code differs from what stands here:
- Eq. 4.2 and 4.3 end in an affine map; the official models (whose keys are kept) have its diagonal, gamma, without an offset;
- its B24 starts gamma at 1e-6; the thesis follows CaiT, by depth: 1e-5 for 24 layers;
- it has none of the ablations of Table 4.3 but the patch size, and no Class-MLP: here these are written from the text, and
  have the table's numbers of parameters;
- the cross-patch layer is there a Linear on the transposed maps; here one batched matrix product, 1.3 times as fast;
- its kept branches under stochastic depth are computed for all samples and masked; here for the kept ones only;
- learning rate and mixup draw: as said in deit.py.
"""

from __future__ import annotations

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
from torchvision.transforms import v2

# ---- Recipe: thesis section 4.3.1 ("the rest follows the default of chapter 3": Table 3.9) -----------------------------

COMMUNICATION = ("linear", "none", "mlp", "conv", "depthwise", "separable")


@dataclass(frozen=True)
class Recipe:
    """Section 4.3.1, for all models."""

    epochs: Annotated[int, "passes over as many images as the data set has (400: Table 4.3)"] = 400
    batch_size: Annotated[int, "images per optimizer step, over all GPUs"] = 1024
    optimizer: Annotated[str, "lamb, adamw or sgd", ("lamb", "adamw", "sgd")] = "lamb"
    lr: Annotated[float, "peak learning rate, at that batch size"] = 5e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine"] = 1e-5  # official code; the thesis gives none
    warmup_lr: Annotated[float, "learning rate at step 0"] = 1e-6  # official code; the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up"] = 5
    schedule: Annotated[str, "cosine, or waterfall: a tenth after each third of the epochs", ("cosine", "waterfall")] = "cosine"
    weight_decay: Annotated[float, "not on biases, affine maps and gammas"] = 0.2
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping"] = 1.0  # LAMB's own, in Apex
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row"] = 3
    augment: Annotated[str, "rand (RandAugment 9/0.5), auto (AutoAugment) or none", ("rand", "auto", "none")] = "rand"
    erasing: Annotated[float, "probability of random erasing"] = 0.25
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (a GPU's batch in the official runs)"] = 64
    smoothing: Annotated[float, "label smoothing"] = 0.1
    patch_size: Annotated[int | None, "side of a patch in pixels: 16, 14 or 8 (Table 4.3); unset: the model's"] = None
    norm: Annotated[str, "affine (Eq. 4.1) or layernorm", ("affine", "layernorm")] = "affine"
    pooling: Annotated[str, "average or class-mlp (section 4.2)", ("average", "class-mlp")] = "average"
    communication: Annotated[str, "across patches (Table 4.3): " + ", ".join(COMMUNICATION), COMMUNICATION] = "linear"
    drop_path: Annotated[float, "stochastic depth, the same rate in every layer"] = 0.1
    ema: Annotated[float, "decay of the averaged weights; 0: none"] = 0.0
    distillation: Annotated[str, "none or hard (Eq. 3.3)", ("none", "hard")] = "none"
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps"] = 0.875


RECIPES = {
    "in1k": Recipe(),
    # Table 4.3, block Training: "similar to what was employed for ResNet: SGD, 90-epochs waterfall schedule, same
    # augmentations"; ResNet's numbers (arXiv:1512.03385): rate 0.1 at batch 256, weight decay 1e-4, crops and flips.
    "old_fashioned": Recipe(
        epochs=90,
        batch_size=256,
        optimizer="sgd",
        lr=0.1,
        warmup_epochs=0,
        schedule="waterfall",
        weight_decay=1e-4,
        clip_grad=None,
        repeats=1,
        augment="none",
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        smoothing=0.0,
        drop_path=0.0,
    ),
    # Table 4.3, last row: 60 epochs of ImageNet-21k. Chapter 4 gives no numbers for what follows on ImageNet-1k; chapter
    # 5's for the same step (section 5.2.3).
    "in21k": Recipe(epochs=60),
    "in21k_to_in1k": Recipe(epochs=100, lr=5e-4),
    # Table 4.4; chapter 4 gives no numbers; CaiT's rule (section 3.7.1.3): learning rate / 10 (Cars, Flowers,
    # iNaturalist) or / 100 (CIFAR), 1000 epochs (360 on iNaturalist).
    "transfer": Recipe(epochs=1000, lr=5e-4, min_lr=1e-6),
    # Not of the thesis: the built-in data set in minutes on two CPU cores.
    "shapes": Recipe(
        epochs=6,
        batch_size=64,
        lr=1e-2,
        warmup_epochs=1,
        weight_decay=0.02,
        img_size=(48, 48),
        repeats=1,
        augment="none",
        erasing=0.0,
        mixup=0.0,
        cutmix=0.0,
        mix_group=8,
        drop_path=0.0,
    ),
}
TEACHER = "regnet_y_16gf"  # section 4.3.1; 82.9 top-1, as have torchvision's weights
TRANSFER = {  # data set: what `transfer` changes for it
    "cifar10": dict(lr=5e-5),
    "cifar100": dict(lr=5e-5),
    "inat2018": dict(epochs=360),
    "inat2019": dict(epochs=360),
}


def paper_recipe(name: str, *, data: str = "") -> Recipe:
    """The recipe's row, for `transfer` completed for a data set."""
    if name == "transfer":
        return dataclasses.replace(RECIPES[name], **TRANSFER.get(data.split(":")[0].split("@")[0], {}))
    return RECIPES[name]


# ---- Architecture: section 4.2; sizes: Table 4.3 -----------------------------------------------------------------------

MODELS = {
    "resmlp_s12": dict(dim=384, depth=12, patch=16),
    "resmlp_s24": dict(dim=384, depth=24, patch=16),
    "resmlp_s36": dict(dim=384, depth=36, patch=16),
    "resmlp_b24": dict(dim=768, depth=24, patch=16),
    "resmlp_nano": dict(dim=96, depth=4, patch=8),  # not in the thesis: for the built-in data set and for tests
}


def initial_scale(depth: int) -> float:
    """What the post-normalisation starts at, "as a function of the depth by following CaiT" (section 3.5.1)."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


# Copied from deit.py
class PatchEmbed(nn.Module):
    """Images (B, 3, H, W) -> tokens (B, H/p * W/p, C): a p x p convolution of stride p, computed as one matrix product."""

    def __init__(self, dim: int, patch: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(3, dim, kernel_size=patch, stride=patch)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        B, _, H, W = images.shape
        p = self.patch
        x = images.reshape(B, 3, H // p, p, W // p, p).permute(0, 2, 4, 1, 3, 5)  # (B, H/p, W/p, 3, p, p)
        return F.linear(x.reshape(B, (H // p) * (W // p), 3 * p * p), self.proj.weight.flatten(1), self.proj.bias)


# Copied from deit.py
class MLP(nn.Module):
    """Two linear layers with a GELU between them, hidden width 4 C, (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Affine(nn.Module):
    """Eq. 4.1 on the last axis: Diag(alpha) x + beta, from the identity."""

    def __init__(self, dim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(dim))
        self.beta = nn.Parameter(torch.zeros(dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(self.beta, self.alpha, x)


def make_norm(norm: str, dim: int) -> nn.Module:
    return Affine(dim) if norm == "affine" else nn.LayerNorm(dim, eps=1e-6)


class CrossPatch(nn.Linear):
    """The matrix A of Eq. 4.2 and a bias, applied across patches: (B, N, C) -> (B, N, C)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias[:, None], self.weight.expand(len(x), -1, -1), x)


class CrossPatchMLP(MLP):
    """Table 4.3, linear -> MLP: the MLP of the channels, across patches."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


class CrossPatchConv(nn.Sequential):
    """Table 4.3, 3 x 3 convolutions of the patches' grid: full, depth-wise, or depth-wise and then 1 x 1."""

    def __init__(self, kind: str, dim: int, grid: tuple[int, int]):
        super().__init__(nn.Conv2d(dim, dim, 3, padding=1, groups=1 if kind == "conv" else dim))
        if kind == "separable":
            self.append(nn.Conv2d(dim, dim, 1))
        self.grid = grid

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.transpose(1, 2).unflatten(2, self.grid)).flatten(2).transpose(1, 2)


# Copied from cait.py
@torch.compiler.disable
def kept_samples(batch: int, drop_rate: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """Stochastic depth's draw: (indices of the samples that keep the branch, factor on their branch).

    Drawn on the CPU generator: the count is then known to the host and a GPU never has to be waited for.
    If no sample keeps it, sample 0 is returned with factor 0, so that every parameter still gets its (zero) gradient.
    """
    kept = (torch.rand(batch) >= drop_rate).nonzero().flatten()
    if len(kept) == 0:
        return torch.zeros(1, dtype=torch.long, device=device), 0.0
    if device.type == "cuda":
        kept = kept.pin_memory().to(device, non_blocking=True)
    return kept, 1 / (1 - drop_rate)


# Adapted from deit.py: linear across patches instead of attention, post-normalisation, kept-only stochastic depth
class Block(nn.Module):
    """Residual multi-perceptron layer (Eq. 4.2 and 4.3), (B, N, C) -> (B, N, C).

    Names are the official checkpoints': `attn` is the layer across patches, gamma_1 and gamma_2 the post-normalisations.
    Without communication across patches only Eq. 4.3 remains.
    """

    def __init__(self, dim: int, grid: tuple[int, int], communication: str, norm: str, scale: float, drop_path: float):
        super().__init__()
        self.drop_path, N = drop_path, grid[0] * grid[1]
        if communication != "none":
            self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))
        if communication != "none":
            self.norm1 = make_norm(norm, dim)
            if communication == "linear":
                self.attn = CrossPatch(N, N)
            else:
                self.attn = CrossPatchMLP(N) if communication == "mlp" else CrossPatchConv(communication, dim, grid)
        self.norm2 = make_norm(norm, dim)
        self.mlp = MLP(dim)

    def across_patches(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma_1 * self.attn(self.norm1(x))

    def across_channels(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma_2 * self.mlp(self.norm2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in (self.across_patches, self.across_channels) if hasattr(self, "attn") else (self.across_channels,):
            if self.training and self.drop_path:
                kept, factor = kept_samples(len(x), self.drop_path, x.device)
                x = x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=factor)
            else:
                x = x + branch(x)
        return x


class ClassMLP(nn.Module):
    """Layer of the class-MLP pooling (section 4.2): class token (B, 1, C), patches (B, N, C) -> class token.

    CaiT's class attention with a linear layer, one weight per token, instead of the attention; the patches stay as they are.
    """

    def __init__(self, dim: int, tokens: int, norm: str, scale: float):
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))
        self.norm1 = make_norm(norm, dim)
        self.attn = nn.Linear(tokens, 1)
        self.norm2 = make_norm(norm, dim)
        self.mlp = MLP(dim)

    def forward(self, token: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        z = self.norm1(torch.cat([token, patches], dim=1))  # (B, 1 + N, C)
        token = token + self.gamma_1 * self.attn(z.transpose(1, 2)).transpose(1, 2)
        return token + self.gamma_2 * self.mlp(self.norm2(token))


class ResMLP(nn.Module):
    """Images (B, 3, H, W) of the one size it was built for -> logits (B, K)."""

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        patch: int,
        num_classes: int,
        img_size: tuple[int, int],
        drop_path: float,
        norm: str,
        pooling: str,
        communication: str,
    ):
        super().__init__()
        self.grid = grid = (img_size[0] // patch, img_size[1] // patch)
        scale = initial_scale(depth)
        if pooling == "class-mlp":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.patch_embed = PatchEmbed(dim, patch)
        self.blocks = nn.ModuleList(Block(dim, grid, communication, norm, scale, drop_path) for _ in range(depth))
        if pooling == "class-mlp":
            self.blocks_token_only = nn.ModuleList(ClassMLP(dim, 1 + grid[0] * grid[1], norm, scale) for _ in range(2))
        self.norm = make_norm(norm, dim)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():  # the patch projection keeps the convolution's default, as the official code does
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed all the same."""
        return {"cls_token"}

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        for block in self.blocks:
            x = block(x)
        if not hasattr(self, "cls_token"):
            return self.head(self.norm(x).mean(dim=1))
        token = self.cls_token.repeat(len(x), 1, 1)
        for block in self.blocks_token_only:
            token = block(token, x)
        return self.head(self.norm(token)[:, 0])


def build_model(
    name: str,
    num_classes: int = 1000,
    img_size: int | tuple[int, int] | None = None,
    drop_path: float | None = None,
    *,
    patch_size: int | None = None,
    norm: str = "affine",
    pooling: str = "average",
    communication: str = "linear",
) -> nn.Module:
    """A fresh model: a row of MODELS, or "torchvision/NAME" (then only num_classes is used).

    img_size: pixels, S or (H, W), multiples of the patch; None: 224. drop_path None: 0.1. patch_size None: the row's.
    norm, pooling, communication: the ablations of Table 4.3, see Recipe. Raises KeyError for an unknown name, ValueError
    for a size that does not fit.
    """
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, num_classes=num_classes)
    config = {**MODELS[name], **({"patch": patch_size} if patch_size else {})}
    size = whole_patches(img_size or 224, config["patch"], name)
    rate = 0.1 if drop_path is None else drop_path
    return ResMLP(**config, num_classes=num_classes, img_size=size, drop_path=rate, norm=norm, pooling=pooling, communication=communication)


# Copied from deit.py
def whole_patches(img_size: int | tuple[int, int], patch: int, name: str) -> tuple[int, int]:
    """(H, W) of an image size S or (H, W); ValueError with the nearest good ones unless it is a multiple of the patch."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if any(s < patch or s % patch for s in size):
        near = " or ".join("x".join(str(max(patch, (s // patch + up) * patch)) for s in size) for up in (0, 1))
        raise ValueError(f"image size {size[0]}x{size[1]} is not a multiple of {name}'s patch of {patch}; the nearest are {near}")
    return size


# Adapted from deit.py: the matrices across patches, there is no position embedding
def fit_resolution(model: nn.Module, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Interpolates the cross-patch layers in `state`, of the checkpoint `content`, to the model's resolution (section 4.3.6)."""
    from common.errors import UserError

    first = state.get("blocks.0.attn.weight", state.get("blocks.0.attn.fc2.weight"))
    if not isinstance(model, ResMLP) or first is None or first.ndim != 2:  # convolutions fit any resolution
        return
    N, side = model.grid[0] * model.grid[1], math.isqrt(len(first))
    try:
        height, width = content["recipe"]["img_size"]
        old_grid = (height // model.patch_embed.patch, width // model.patch_embed.patch)
    except (KeyError, TypeError, ValueError):  # an official checkpoint
        old_grid = (side, side)
    if old_grid == model.grid or old_grid[0] * old_grid[1] != len(first):
        return  # nothing to do, or not a question of the resolution: loading says what does not fit
    if "blocks.0.attn.fc1.weight" in state:
        raise UserError("--img-size: an MLP across patches cannot be interpolated to another resolution; train at this one")
    say(
        f"warning: cross-patch layers interpolated from {old_grid[0]} x {old_grid[1]} to {model.grid[0]} x {model.grid[1]} patches;"
        " this is lossy (section 4.3.6): expect to need fine-tuning"
    )
    for key in list(state):
        if ".attn.weight" in key and state[key].shape[0] > 1:
            state[key] = resize_across(resize_across(state[key], 0, old_grid, model.grid), 1, old_grid, model.grid) * (len(first) / N)
        elif ".attn.weight" in key:  # class-MLP: (1, 1 + N)
            patches = resize_across(state[key][:, 1:], 1, old_grid, model.grid) * (len(first) / N)
            state[key] = torch.cat([state[key][:, :1], patches], dim=1)
        elif ".attn.bias" in key and len(state[key]) > 1:
            state[key] = resize_across(state[key], 0, old_grid, model.grid)


def resize_across(tensor: torch.Tensor, axis: int, old_grid: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Bicubic interpolation of the axis that runs over an old grid's patches to another grid's."""
    x = tensor.movedim(axis, -1)
    maps = x.reshape(1, -1, *old_grid).to(torch.promote_types(x.dtype, torch.float32))
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return maps.reshape(*x.shape[:-1], -1).movedim(-1, axis).to(tensor.dtype)


# ---- Inference without affine maps: section 4.2, "it can be absorbed in the adjacent linear layer" ---------------------


class FusedBlock(nn.Module):
    """Block without affine maps, (B, N, C) -> (B, N, C), on the stream less a constant per channel: x + shift is the block's input.

    Eq. 4.3: both maps go into B and C, and C's bias goes on, as the next block's shift. Eq. 4.2: A is shared by all
    channels, so that a factor per channel cannot go into it; but it commutes with it:
    X + gamma (A (alpha X + beta) + b) = (X + offset) + A (scale X). Both residual sums are part of a matrix product.
    """

    def __init__(self, block: Block, shift: torch.Tensor):
        super().__init__()
        alpha, beta, gamma, A = block.norm1.alpha, block.norm1.beta, block.gamma_1, block.attn.weight
        row_sums, b = A.sum(dim=1)[:, None], block.attn.bias[:, None]
        fc1, fc2, norm = block.mlp.fc1, block.mlp.fc2, block.norm2
        self.register_buffer("A", A.detach())
        self.register_buffer("scale", gamma * alpha)
        self.register_buffer("offset", shift + gamma * (row_sums * (alpha * shift + beta) + b))  # (N, C)
        self.register_buffer("B", fc1.weight * norm.alpha)
        self.register_buffer("bias", fc1.bias + fc1.weight @ norm.beta)
        self.register_buffer("C", (block.gamma_2[:, None] * fc2.weight).T.contiguous())
        self.next_shift = block.gamma_2 * fc2.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.baddbmm(x + self.offset, self.A.expand(len(x), -1, -1), x * self.scale).flatten(0, 1)  # (B N, C)
        return torch.addmm(x, F.gelu(F.linear(x, self.B, self.bias)), self.C).unflatten(0, (-1, len(self.A)))


class FusedResMLP(nn.Module):
    """What `fuse` returns: patches, fused blocks, mean, classifier."""

    def __init__(self, model: ResMLP):
        super().__init__()
        self.patch_embed = model.patch_embed
        self.blocks, shift = nn.ModuleList(), torch.zeros_like(model.norm.beta)
        for block in model.blocks:
            self.blocks.append(FusedBlock(block, shift))
            shift = self.blocks[-1].next_shift
        head, norm = model.head, model.norm
        self.head = nn.Linear(head.in_features, head.out_features)
        self.head.load_state_dict({"weight": head.weight * norm.alpha, "bias": head.bias + head.weight @ (norm.alpha * shift + norm.beta)})

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(images)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=1))


@torch.no_grad()
def fuse(model: ResMLP) -> FusedResMLP:
    """An equivalent network for inference without affine maps; shares the patch embedding and the cross-patch matrices.

    Raises ValueError for the ablations of Table 4.3 that it does not hold for.
    """
    block = model.blocks[0]
    if not isinstance(block.norm2, Affine) or not isinstance(getattr(block, "attn", None), CrossPatch) or hasattr(model, "cls_token"):
        raise ValueError("fuse: only for affine maps, a linear cross-patch layer and average pooling")
    return FusedResMLP(model).eval()


# ---- Analysis: Figures 4.2 and 4.3 -------------------------------------------------------------------------------------


def filters(model: ResMLP, layer: int) -> torch.Tensor:
    """Figure 4.2: the rows of layer's A that belong to the 6 x 6 central patches, as maps (6, 6, H/p, W/p)."""
    (height, width), A = model.grid, model.blocks[layer].attn.weight.detach()
    top, left = (max(0, (side - 6) // 2) for side in (height, width))
    rows = A.view(height, width, height, width)
    return rows[top : top + 6, left : left + 6]


def sparsity(model: ResMLP, threshold: float = 0.05) -> dict[str, list[float]]:
    """Figure 4.3: per layer, the share of components of A, B and C smaller in size than 5% of the matrix' largest."""

    def share(matrix: torch.Tensor) -> float:
        size = matrix.detach().abs()
        return (size < threshold * size.max()).float().mean().item()

    return {
        "A": [share(block.attn.weight) for block in model.blocks],
        "B": [share(block.mlp.fc1.weight) for block in model.blocks],
        "C": [share(block.mlp.fc2.weight) for block in model.blocks],
    }


# ---- Augmentation: Table 3.9 -------------------------------------------------------------------------------------------
#
# A loader process decodes, crops, flips and applies RandAugment; normalisation, erasing and mixing run on the device, a
# batch at a time.


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


# Copied from deit.py
class TrainTransform:
    """The loader's part of the augmentation.

    (uint8 image (3, H, W), rng) -> (uint8 (3, *img_size), parameters for `erase`: top, left, height, width of the box,
    seed of its noise; height 0: nothing is erased).
    """

    def __init__(self, recipe: Recipe):
        self.size, self.policy, self.erasing = recipe.img_size, recipe.augment, recipe.erasing
        self.auto = v2.AutoAugment()

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, tuple[float, ...]]:
        from common.images import from_pil, resize, to_pil

        top, left, height, width = random_resized_crop(*image.shape[1:], rng)
        image = resize(image[:, top : top + height, left : left + width], self.size)
        if rng.random() < 0.5:
            image = image.flip(-1)
        if self.policy == "rand":
            image = from_pil(rand_augment(to_pil(image), rng))
        elif self.policy == "auto":  # torchvision's policy draws from torch's global generator: seed it for this image
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                image = self.auto(image)
        box = erasing_box(*self.size, rng) if rng.random() < self.erasing else (0, 0, 0, 0)
        return image, (*box, rng.getrandbits(24))  # whole numbers up to 2^24 are exact in float32


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


# ---- Loss: section 3.3, distillation with one head ---------------------------------------------------------------------


# Copied from cait.py
def hard_distillation(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """Eq. 3.3: half cross-entropy with soft targets (B, K), half with the teacher's decision, on the only head or on the pair."""
    class_logits, student = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
    return 0.5 * F.cross_entropy(class_logits, targets) + 0.5 * F.cross_entropy(student, teacher_logits.argmax(dim=1))


# ---- Training: the only user of common ---------------------------------------------------------------------------------


def parse_args(argv: list[str] | None = None):
    """(arguments, the recipe with the flags given, the paper's recipe)."""
    from common import cli

    parser = cli.make_parser("resmlp", __doc__, Recipe, RECIPES, model="resmlp_s24", recipe="in1k")
    cli.add_teacher_flags(parser, TEACHER)
    parser.add_argument("--filters", metavar="FOLDER", help="write the cross-patch filters (Figure 4.2) and the sparsity (4.3) and stop")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N", help="of --filters: these layers, the first is 0; default: all")
    args = parser.parse_args(argv)
    cli.check_names(args, MODELS, RECIPES)
    paper = paper_recipe(args.recipe, data=args.data or "")
    recipe = cli.override(paper, args)
    cli.check_recipe(recipe)
    cli.check_teacher(args, recipe.distillation)
    if args.model not in MODELS:
        cli.refuse(args, ("drop_path", "patch_size", "norm", "pooling", "communication"), "not for torchvision's models; leave it out")
    if args.filters is None:
        cli.refuse(args, ("layers",), "has no effect without --filters")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """build_model for a command line; a size that does not fit is the user's mistake."""
    from common.errors import UserError

    options = dict(patch_size=recipe.patch_size, norm=recipe.norm, pooling=recipe.pooling, communication=recipe.communication)
    try:
        return build_model(args.model, num_classes, recipe.img_size, recipe.drop_path, **options)
    except ValueError as error:
        raise UserError(f"--img-size: {error}") from None


def train(args, recipe: Recipe, paper: Recipe) -> None:
    """The whole run: data, model, teacher, loop, evaluation after every epoch."""
    from common.checkpoint import load_pretrained
    from common.data import TrainingData
    from common.evaluate import eval_loader, evaluate, normalize
    from common.models import load_teacher, on_meta
    from common.optim import EMA, cosine_lr, make_optimizer
    from common.precision import Precision, check_amp
    from common.report import describe, save_curves, show_batch
    from common.run import Run

    run = Run("resmlp", args, recipe, paper)
    check_amp(run.amp, run.device)
    on_meta(lambda: make_model(args, recipe, 2))  # a size that does not fit is told before the data is scanned
    teacher = None
    if recipe.distillation != "none" and not args.show_batch:
        teacher = run.first(lambda: load_teacher(args.teacher, args.teacher_weights, TEACHER, recipe.img_size, run.say))
    data = TrainingData(run, recipe, TrainTransform(recipe))
    num_classes = len(data.classes)
    if teacher:
        teacher.check(data.classes)
        teacher.to(run.device)

    torch.manual_seed(args.seed)
    model = make_model(args, recipe, num_classes)
    if args.weights:
        load_pretrained(model, args, run.method, new_head=True, say=run.say, adapt=fit_resolution)
    model.to(run.device)
    optimizer = make_optimizer(recipe.optimizer, model, recipe.lr, recipe.weight_decay)
    precision = Precision(run.amp, run.device, accumulation=data.accumulation, clip_grad=recipe.clip_grad)
    ema = EMA(model, recipe.ema) if recipe.ema else None

    def lr_at(epochs: float) -> float:
        if recipe.schedule == "waterfall" and epochs >= recipe.warmup_epochs:
            return recipe.lr * 0.1 ** min(2, int(3 * epochs / recipe.epochs))
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    def prepare(batch, groups) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        images, parameters, labels, _ = batch
        mixes = [draw_mix(recipe, random.Random(f"mix-{args.seed}-{run.epoch}-{run.step}-{g}")) for g in groups]
        images = erase(normalize(images), parameters)
        return images, mix_images(images, mixes), mix_targets(labels, mixes, num_classes, recipe.smoothing)

    if args.show_batch:
        if run.rank == 0:
            show_batch(args.show_batch, data, prepare)
        return run.say(f"wrote {args.show_batch}")

    run.open_folder()
    run.say(describe(run, lambda: make_model(args, recipe, num_classes), data))
    if teacher:
        run.say(f"teacher  {teacher.identity}")
    wrapped = run.prepare(model, data.micro_batch)
    identity = data.identity() | {"teacher": teacher.identity if teacher else None}
    run.start(model=model, optimizer=optimizer, precision=precision, ema=ema, data=identity)
    if run.rank == 0 and run.epoch == run.step == 0:
        show_batch(run.out / "batch.png", data, prepare)
    run.check_stop()
    val_loader = data.val and eval_loader(data.val, recipe.img_size, recipe.eval_crop_ratio, data.micro_batch, run)

    for epoch in range(run.epoch, recipe.epochs):
        stream = data.epoch(epoch, run.step)
        wrapped.train()
        for step in run.steps(data.steps, recipe.batch_size):
            seen = []
            for micro in range(data.accumulation):
                batch = run.wait_for(stream)
                _, images, targets = prepare(batch, data.batches.groups(micro))
                run.seed_step(micro)
                with precision.forward(wrapped):
                    outputs = wrapped(images)
                    if teacher:
                        loss = hard_distillation(outputs, targets, teacher(images))
                    else:
                        loss = F.cross_entropy(outputs, targets)
                precision.backward(loss)
                seen.append(batch[3])
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if ema:
                ema.update(model, skip=skipped)
            run.after_step(stats, lr, lambda seen=seen: data.names(torch.cat(seen)))
        record, score = run.end_of_training_epoch() | {"lr": lr_at(epoch + 1)}, None
        if val_loader is not None:
            metrics = evaluate(model, val_loader, run.device, precision.autocast, between=run.check_stop)
            score = metrics["top1"]
            record |= {f"val_{k}": v for k, v in metrics.items()}
            if ema:
                averaged = evaluate(ema.model, val_loader, run.device, precision.autocast, between=run.check_stop)
                record |= {f"val_ema_{k}": v for k, v in averaged.items()}
        run.end_of_epoch(record, score)
    run.finish()
    if run.rank == 0 and val_loader is not None:
        save_curves(run.out / "curves.png", run.out / "log.jsonl", [["train_loss", "val_loss"], ["val_top1", "val_top5"]])


SAVED = ("img_size", "eval_crop_ratio", "patch_size", "norm", "pooling", "communication")  # what an evaluation takes from the checkpoint


def evaluate_only(args, recipe: Recipe, paper: Recipe) -> None:
    """--eval: accuracy on the validation images, on ImageNet-Real's labels and on other test sets."""
    from common.evaluate import evaluate_weights
    from common.run import Run

    evaluate_weights(Run("resmlp", args, recipe, paper), make_model, saved=SAVED, adapt=fit_resolution)


def benchmark(args, recipe: Recipe, paper: Recipe) -> None:
    """--benchmark: images/s and peak memory of training steps (without a teacher) and of inference."""
    from common import report
    from common.run import Run

    run = Run("resmlp", args, recipe, paper)
    report.benchmark(run, lambda: make_model(args, recipe, 1000), lambda model, images, labels: F.cross_entropy(model(images), labels))


def write_filters(args, recipe: Recipe, paper: Recipe) -> None:
    """--filters: per layer a picture of 6 x 6 filters; sparsity.json and its plot."""
    from common.errors import UserError
    from common.evaluate import trained_model
    from common.report import cividis, save_json, save_plot, save_sheet
    from common.run import Run

    run = Run("resmlp", args, recipe, paper)
    model, recipe, _ = trained_model(run, make_model, saved=SAVED, adapt=fit_resolution)
    if not isinstance(model, ResMLP) or recipe.communication != "linear":
        raise UserError("--filters: this model has no linear layer across patches")
    folder, layers = Path(args.filters), args.layers or range(len(model.blocks))
    for layer in layers:
        if not 0 <= layer < len(model.blocks):
            raise UserError(f"--layers {layer}: this model has the layers 0 to {len(model.blocks) - 1}")
    for layer in layers:
        rows = []
        for row in filters(model, layer).cpu():
            maps = [m.repeat_interleave(4, 0).repeat_interleave(4, 1) for m in row]  # 4 x 4 pixels per weight
            rows.append(("", [cividis(0.5 + m / (2 * m.abs().max().clamp(min=1e-12))) for m in maps]))
        rows[0] = (f"layer {layer}: 0 is mid-colour", rows[0][1])
        save_sheet(folder / f"layer_{layer:02d}.png", rows)
    shares = sparsity(model)
    save_json(folder / "sparsity.json", shares)
    save_plot(folder / "sparsity.png", [{name: list(enumerate(values)) for name, values in shares.items()}], "layer")
    run.say(f"wrote {len(layers)} pictures of filters, sparsity.json and sparsity.png to {folder}")


def main() -> None:
    args, recipe, paper = parse_args()
    if args.list_models:
        for name, config in MODELS.items():
            print(f"{name:12s} " + "  ".join(f"{k} {v}" for k, v in config.items()))
    elif args.filters:
        write_filters(args, recipe, paper)
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
        print("error: another package named common hides the one that lies beside resmlp.py; run in the folder of both", file=sys.stderr)
        sys.exit(2)
    launch(main)
