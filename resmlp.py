"""ResMLP: Feedforward networks for image classification with data-efficient training (Touvron, Bojanowski, Caron, Cord,
El-Nouby, Grave, Izacard, Joulin, Synnaeve, Verbeek, Jegou; arXiv:2105.03404; thesis chapter 4).

New: no attention and no statistics: a linear layer across patches, a two-layer MLP across channels, affine maps instead
of normalisation. With chapter 3's training ResMLP-S24 reaches 79.4 top-1 on ImageNet, 80.8 with a RegNetY-16GF as
teacher (Table 4.3).

    torchrun --nproc_per_node 8 resmlp.py --model resmlp_s24 --data /imagenet                        # the paper's run
    torchrun --nproc_per_node 8 resmlp.py --model resmlp_s24 --data /imagenet --distillation hard    # with a teacher
    python resmlp.py --model resmlp_nano --recipe shapes                         # minutes on two CPU cores, no download
    python resmlp.py --model resmlp_s24 --weights runs/s24/best.pt --filters filters            # Figures 4.2 and 4.3

Checked here: state-dict keys and logits of the official models, parameters and GMACs of every row of Table 4.3, its
equations against the layer, the augmentation by DeiT's numbers (tests/). Not run here: ImageNet.

Axes: B images, N patches, C channels, K classes, H x W pixels, p patch side.

Where the official code differs from what stands here:
- Eq. 4.2 and 4.3 end in an affine map; the official models (whose keys are kept) have its diagonal, gamma, without an
  offset;
- its B24 starts gamma at 1e-6; the thesis follows CaiT, by depth: 1e-5 for 24 layers;
- it has none of the ablations of Table 4.3 but the patch size, and no Class-MLP: here these are written from the text,
  and have the table's numbers of parameters;
- the cross-patch layer is there a Linear on the transposed maps; here one batched matrix product, 1.3 times as fast;
- stochastic depth masks a binomial number of samples there; here a fixed number is drawn, only these are computed; its
  rate is the command's default for every size, 0.1 (chapter 3's too, Table 3.9), the same in all blocks, as here;
- it is tested at crop ratio 0.9, as here; the thesis says nothing (Table 6.1 prints 0.875 for DeiT);
- learning rate and mixup draw: as said in deit.py.
"""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torchvision.transforms import v2

# ---- Recipe: thesis section 4.3.1 ("the rest follows the default of chapter 3": Table 3.9) ---------------------------

COMMUNICATION = ("linear", "none", "mlp", "conv", "depthwise", "separable")


@dataclass(frozen=True)
class Recipe:
    """Section 4.3.1, for all models."""

    epochs: Annotated[int, "passes over as many images as the data set has (400: Table 4.3)", "1 or more"] = 400
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 1024
    optimizer: Annotated[str, "lamb, adamw or sgd", ("lamb", "adamw", "sgd")] = "lamb"
    lr: Annotated[float, "peak learning rate; unset: in proportion to the batch", "above 0"] = 5e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine", "0 or more"] = 1e-5  # official code, as the next
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 1e-6  # the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 5
    schedule: Annotated[str, "cosine, or waterfall: / 10 at each third of epochs", ("cosine", "waterfall")] = "cosine"
    weight_decay: Annotated[float, "not on biases, affine maps and gammas", "0 or more"] = 0.2
    clip_grad: Annotated[float | None, "largest gradient norm; none: any", "above 0"] = 1.0  # LAMB's own, in Apex
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW", "1 or more"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 3
    augment: Annotated[str, "rand (RandAugment 9/0.5), auto (AutoAugment) or none", ("rand", "auto", "none")] = "rand"
    erasing: Annotated[float, "probability of random erasing", "in [0, 1]"] = 0.25
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off", "0 or more"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off", "0 or more"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (officially: a GPU's)", "1 or more"] = 64
    smoothing: Annotated[float, "label smoothing", "in [0, 1)"] = 0.1
    patch_size: Annotated[int | None, "side in pixels: 16, 14 or 8 (Table 4.3); unset: the model's", "1 or more"] = None
    norm: Annotated[str, "affine (Eq. 4.1) or layernorm", ("affine", "layernorm")] = "affine"
    pooling: Annotated[str, "average or class-mlp (section 4.2)", ("average", "class-mlp")] = "average"
    communication: Annotated[str, "across patches (Table 4.3): " + ", ".join(COMMUNICATION), COMMUNICATION] = "linear"
    drop_path: Annotated[float, "stochastic depth: one rate, in all blocks of every model", "in [0, 1)"] = 0.1
    ema: Annotated[float, "decay of the averaged weights; 0: none", "in [0, 1)"] = 0.0
    distillation: Annotated[str, "none or hard (Eq. 3.3)", ("none", "hard")] = "none"
    eval_crop_ratio: Annotated[float, "share of the image in the test crop (official README)", "in (0, 1]"] = 0.9


RECIPES = {
    "in1k": Recipe(),
    # Table 4.3, block Training: "similar to what was employed for ResNet: SGD, 90-epochs waterfall schedule, same
    # augmentations"; ResNet's numbers (arXiv:1512.03385): rate 0.1 at batch 256, weight decay 1e-4, crops and flips.
    "old_fashioned": Recipe(
        epochs=90, batch_size=256, optimizer="sgd", lr=0.1, warmup_epochs=0, schedule="waterfall", weight_decay=1e-4,
        clip_grad=None, repeats=1, augment="none", erasing=0.0, mixup=0.0, cutmix=0.0, smoothing=0.0, drop_path=0.0,
    ),
    # Table 4.3, last row: 60 epochs of ImageNet-21k. Chapter 4 gives no numbers for what follows on ImageNet-1k;
    # chapter 5's for the same step (section 5.2.3).
    "in21k": Recipe(epochs=60),
    "in21k_to_in1k": Recipe(epochs=100, lr=5e-4),
    # Table 4.4; chapter 4 gives no numbers; CaiT's rule (section 3.7.1.3): the learning rates, peak and last, / 10
    # (Cars, Flowers, iNaturalist) or / 100 (CIFAR), 1000 epochs (360 on iNaturalist).
    "transfer": Recipe(epochs=1000, lr=5e-4, min_lr=1e-6),
    # Not of the thesis: images of your own (common.script.fit_own); the built-in data set, minutes on two CPU cores.
    "own": Recipe(epochs=30, lr=1e-2, warmup_epochs=0, repeats=1, augment="none", mixup=0.0, cutmix=0.0),
    "shapes": Recipe(
        epochs=6, batch_size=64, lr=1e-2, warmup_epochs=1, weight_decay=0.02, img_size=(48, 48), repeats=1,
        augment="none", erasing=0.0, mixup=0.0, cutmix=0.0, mix_group=8, drop_path=0.0,
    ),
}
TEACHER = "regnet_y_16gf"  # section 4.3.1; 82.9 top-1, as have torchvision's weights
TRANSFER = {  # data set: what `transfer` changes for it
    **dict.fromkeys(("cifar10", "cifar100"), dict(lr=5e-5, min_lr=1e-7)),
    **dict.fromkeys(("inat2018", "inat2019"), dict(epochs=360)),
}


def paper_recipe(name: str, *, data: str = "") -> Recipe:
    """The recipe's row, for `transfer` completed for a data set."""
    if name == "transfer":
        return dataclasses.replace(RECIPES[name], **TRANSFER.get(data.split(":")[0].split("@")[0], {}))
    return RECIPES[name]


# ---- Architecture: section 4.2; sizes: Table 4.3 ---------------------------------------------------------------------

MODELS = {
    "resmlp_s12": dict(dim=384, depth=12, patch=16),
    "resmlp_s24": dict(dim=384, depth=24, patch=16),
    "resmlp_s36": dict(dim=384, depth=36, patch=16),
    "resmlp_b24": dict(dim=768, depth=24, patch=16),
    "resmlp_nano": dict(dim=96, depth=4, patch=8),  # not in the thesis: for the built-in data set and for tests
}


def initial_scale(depth: int) -> float:
    """What the post-normalisation starts at, "as a function of the depth by following CaiT" (section 3.5.1)."""
    if depth <= 18:
        return 0.1
    return 1e-5 if depth <= 24 else 1e-6


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
        A, device = self.weight, x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            A = A.to(torch.get_autocast_dtype(device))  # after the expansion it would be one dense copy per image
        return torch.baddbmm(self.bias[:, None], A.expand(x.shape[0], -1, -1), x)


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
@torch.fx.wrap  # not followed by torch.fx, to which the batch is no number
def kept_samples(batch: int, drop_rate: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """Stochastic depth's draw: (indices of the samples that keep the branch, factor on it). Always round(batch (1 -
    drop_rate)) of them and at least 1: static shapes, no host waits for a GPU. Each is kept with the same probability,
    whose inverse is the factor: the expectation is the usual law's."""
    kept = max(1, round(batch * (1 - drop_rate)))
    return torch.rand(batch, device=device).topk(kept).indices, batch / kept


# Adapted from deit.py: linear across patches instead of attention, post-normalisation, kept-only stochastic depth
class Block(nn.Module):
    """Residual multi-perceptron layer (Eq. 4.2 and 4.3), (B, N, C) -> (B, N, C).

    Names are the official checkpoints': `attn` is the layer across patches, gamma_1 and gamma_2 the
    post-normalisations. Without communication across patches only Eq. 4.3 remains.
    """

    def __init__(self, dim: int, grid: tuple[int, int], communication: str, norm: str, scale: float, drop_path: float):
        super().__init__()
        self.communication, self.drop_path, N = communication, drop_path, grid[0] * grid[1]
        if communication != "none":
            self.gamma_1 = nn.Parameter(torch.full((dim,), scale))
            self.norm1 = make_norm(norm, dim)
        if communication == "linear":
            self.attn = CrossPatch(N, N)
        elif communication == "mlp":
            self.attn = CrossPatchMLP(N)
        elif communication != "none":
            self.attn = CrossPatchConv(communication, dim, grid)
        self.gamma_2 = nn.Parameter(torch.full((dim,), scale))
        self.norm2 = make_norm(norm, dim)
        self.mlp = MLP(dim)

    def across_patches(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma_1 * self.attn(self.norm1(x))

    def across_channels(self, x: torch.Tensor) -> torch.Tensor:
        return self.gamma_2 * self.mlp(self.norm2(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branches = (self.across_patches, self.across_channels)
        for branch in branches[1:] if self.communication == "none" else branches:
            if self.training and self.drop_path:
                kept, factor = kept_samples(x.shape[0], self.drop_path, x.device)
                x = x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=factor)
            else:
                x = x + branch(x)
        return x


class ClassMLP(nn.Module):
    """Layer of the class-MLP pooling (section 4.2): class token (B, 1, C), patches (B, N, C) -> class token.

    CaiT's class attention with a linear layer, one weight per token, instead of the attention; the patches stay.
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
        self, dim: int, *, depth: int, patch: int, num_classes: int, img_size: tuple[int, int], drop_path: float,
        norm: str, pooling: str, communication: str,
    ):
        super().__init__()
        self.pooling, self.grid = pooling, (img_size[0] // patch, img_size[1] // patch)
        scale = initial_scale(depth)
        if pooling == "class-mlp":
            self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.patch_embed = PatchEmbed(dim, patch, self.grid)
        self.blocks = nn.ModuleList(Block(dim, self.grid, communication, norm, scale, drop_path) for _ in range(depth))
        if pooling == "class-mlp":
            N = self.grid[0] * self.grid[1]
            self.blocks_token_only = nn.ModuleList(ClassMLP(dim, 1 + N, norm, scale) for _ in range(2))
        self.norm = make_norm(norm, dim)
        self.head = nn.Linear(dim, num_classes)
        for module in self.modules():  # the patch projection keeps the convolution's default, as the official code does
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed all the same."""
        return {"cls_token"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Patches before they are averaged, (B, N, C), or with class-MLP pooling (B, 1 + N, C), its token first."""
        x = self.patch_embed(images).to(self.head.weight.dtype)  # under autocast too the stream is not of 16 bits
        for block in self.blocks:
            x = block(x)
        if self.pooling == "class-mlp":
            token = self.cls_token.repeat(x.shape[0], 1, 1)
            for block in self.blocks_token_only:
                token = block(token, x)
            x = torch.cat([token, x], dim=1)
        return self.norm(x)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(images)
        return self.head(x.mean(dim=1) if self.pooling == "average" else x[:, 0])


def build_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None,
    *, patch_size: int | None = None, norm: str = "affine", pooling: str = "average", communication: str = "linear",
) -> ResMLP:
    """A fresh model, a row of MODELS; KeyError for an unknown name, ValueError for a size that does not fit.

    img_size: pixels, S or (H, W), multiples of the patch; None: 224. drop_path None: 0.1. patch_size None: the row's.
    norm, pooling, communication: the ablations of Table 4.3, see Recipe.
    """
    config = {**MODELS[name], **({"patch": patch_size} if patch_size else {})}
    size = whole_patches(img_size or 224, config["patch"], name)
    ablations = dict(norm=norm, pooling=pooling, communication=communication)
    drop_path = 0.1 if drop_path is None else drop_path
    return ResMLP(**config, num_classes=num_classes, img_size=size, drop_path=drop_path, **ablations)


# Copied from deit.py
def whole_patches(img_size: int | tuple[int, int], patch: int, name: str) -> tuple[int, int]:
    """(H, W) of an image size S or (H, W); ValueError with the nearest good ones if patches do not fill it."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if any(s < patch or s % patch for s in size):
        near = " or ".join("x".join(str(max(patch, (s // patch + up) * patch)) for s in size) for up in (0, 1))
        given = f"image size {size[0]}x{size[1]} is not a multiple of {name}'s patch of {patch}"
        raise ValueError(f"{given}; the nearest are {near}")
    return size


# Adapted from deit.py: the matrices across patches, there is no position embedding
def fit_resolution(model: ResMLP, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Interpolates the cross-patch layers in `state`, of the checkpoint `content`, to the model's resolution
    (4.3.6)."""
    from common.errors import UserError

    sizes = [v.shape[1] - 1 if k.startswith("blocks_token_only.") else len(v) for k, v in state.items()
             if k.endswith((".attn.weight", ".attn.fc2.weight")) and v.ndim == 2]
    patches, grid = next(iter(sizes), 0), model.grid  # 0: convolutions fit any resolution
    try:
        old_grid = tuple(side // model.patch_embed.patch for side in content["recipe"]["img_size"])
    except (KeyError, TypeError):  # it does not say: the model's where that fits, else a square
        old_grid = grid if patches == math.prod(grid) else (math.isqrt(patches), math.isqrt(patches))
    if not patches or old_grid == grid or math.prod(old_grid) != patches:
        return  # nothing to do, or not a question of the resolution: loading says what does not fit
    if "blocks.0.attn.fc1.weight" in state:
        reason = "an MLP across patches cannot be interpolated to another resolution; train at this one"
        raise UserError(f"--img-size: {reason}")
    change = f"from {old_grid[0]} x {old_grid[1]} to {grid[0]} x {grid[1]} patches"
    hint = "this is lossy (section 4.3.6): expect to need fine-tuning"
    say(f"warning: cross-patch layers interpolated {change}; {hint}")
    share = patches / math.prod(grid)  # more patches, smaller weights: the sums stay
    for key, tensor in list(state.items()):
        if ".attn.weight" in key and len(tensor) > 1:
            state[key] = resize_across(resize_across(tensor, 0, old_grid, grid), 1, old_grid, grid) * share
        elif ".attn.weight" in key:  # class-MLP: (1, 1 + N)
            state[key] = torch.cat([tensor[:, :1], resize_across(tensor[:, 1:], 1, old_grid, grid) * share], dim=1)
        elif ".attn.bias" in key and len(tensor) > 1:
            state[key] = resize_across(tensor, 0, old_grid, grid)


def resize_across(tensor: torch.Tensor, axis: int, old_grid: tuple[int, int], grid: tuple[int, int]) -> torch.Tensor:
    """Bicubic interpolation of the axis that runs over an old grid's patches to another grid's."""
    x = tensor.movedim(axis, -1)
    maps = x.reshape(1, -1, *old_grid).to(torch.promote_types(x.dtype, torch.float32))
    maps = F.interpolate(maps, size=grid, mode="bicubic", align_corners=False)
    return maps.reshape(*x.shape[:-1], -1).movedim(-1, axis).to(tensor.dtype)


# ---- Loss: section 3.3, distillation with one head -------------------------------------------------------------------


# Copied from cait.py
def hard_distillation(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """Eq. 3.3: half cross-entropy with soft targets (B, K), half with the teacher's decision; outputs: logits (B, K) of
    the only head, which takes both terms, or of the class and the distillation head."""
    class_logits, student = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
    return 0.5 * F.cross_entropy(class_logits, targets) + 0.5 * F.cross_entropy(student, teacher_logits.argmax(dim=1))


# ---- Figures 4.2 and 4.3 of a trained model --------------------------------------------------------------------------


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


def write_filters(run) -> None:
    """--filters: per layer a picture of 6 x 6 filters; sparsity.json and its plot."""
    from common import evaluate, report
    from common.errors import UserError

    model, recipe, _ = evaluate.trained_model(run, make_model, fit_resolution)
    if recipe.communication != "linear":
        raise UserError("--filters: this model has no linear layer across patches")
    folder, layers = Path(run.args.filters), run.args.layers or range(len(model.blocks))
    for layer in layers:
        if not 0 <= layer < len(model.blocks):
            raise UserError(f"--layers {layer}: this model has the layers 0 to {len(model.blocks) - 1}")
    for layer in layers:
        rows = []
        for row in filters(model, layer).cpu():
            maps = [m.repeat_interleave(4, 0).repeat_interleave(4, 1) for m in row]  # 4 x 4 pixels per weight
            rows.append(("", [report.cividis(0.5 + m / (2 * m.abs().max().clamp(min=1e-12))) for m in maps]))
        rows[0] = (f"layer {layer}: 0 is mid-colour", rows[0][1])
        report.save_sheet(folder / f"layer_{layer:02d}.png", rows)
    shares = sparsity(model)
    evaluate.save_json(folder / "sparsity.json", shares)
    curves = {name: list(enumerate(values)) for name, values in shares.items()}
    drawn = report.save_plot(folder / "sparsity.png", [curves], "layer", ["share of small weights"], run.say)
    run.say(f"wrote {len(layers)} pictures of filters, sparsity.json{' and .png' if drawn else ''} to {folder}")


# ---- Augmentation: Table 3.9 -----------------------------------------------------------------------------------------


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


# Copied from deit.py
class TrainTransform:
    """A loader process' part; normalisation, erasing and mixing run on the device, a batch at a time.

    (uint8 image (3, H, W), rng) -> (uint8 (3, *img_size), parameters for `erase`: top, left, height, width of the box,
    seed of its noise; height 0: nothing is erased).
    """

    def __init__(self, recipe: Recipe):
        self.size, self.policy, self.erasing = recipe.img_size, recipe.augment, recipe.erasing
        self.auto = v2.AutoAugment(interpolation=v2.InterpolationMode.BICUBIC, fill=FILL)  # as officially

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, tuple[float, ...]]:
        from common import images

        top, left, height, width = random_resized_crop(*image.shape[1:], rng)
        image = images.resize(image[:, top : top + height, left : left + width], self.size)
        if rng.random() < 0.5:
            image = image.flip(-1)
        if self.policy == "rand":
            image = images.from_pil(rand_augment(images.to_pil(image), rng))
        elif self.policy == "auto":  # torchvision's policy draws from torch's global generator: seed it for this image
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                image = images.from_pil(self.auto(images.to_pil(image)))
        box = erasing_box(*self.size, rng) if rng.random() < self.erasing else (0, 0, 0, 0)
        return image, (*box, rng.getrandbits(24))  # whole numbers up to 2^24 are exact in float32


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

    parser = cli.make_parser("resmlp", __doc__, Recipe, RECIPES, model="resmlp_s24", recipe="in1k", teacher=TEACHER)
    parser.add_argument("--filters", metavar="FOLDER",
                        help="write the cross-patch filters (Figure 4.2) and the sparsity (4.3) and stop")
    parser.add_argument("--layers", nargs="+", type=int, metavar="N",
                        help="of --filters: these layers, the first is 0; default: all")
    args = cli.parse(parser, argv, MODELS, RECIPES)
    paper = paper_recipe(args.recipe, data=args.data or "")
    if args.filters is None:
        cli.refuse(args, ("layers",), "has no effect without --filters")
    return args, cli.override(paper, args), paper


def make_model(args, recipe: Recipe, num_classes: int) -> ResMLP:
    """build_model for a command line."""
    ablations = dict(norm=recipe.norm, pooling=recipe.pooling, communication=recipe.communication)
    options = dict(drop_path=recipe.drop_path, patch_size=recipe.patch_size, **ablations)
    return build_model(args.model, num_classes, recipe.img_size, **options)


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint, ours or official: see common.models.load."""
    from common.models import load
    return load("resmlp", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, teacher, what was saved) is common.script.set_up's."""
    from common import evaluate, script
    from common.optim import cosine_lr

    recipe = run.recipe

    def prepare(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        mixes = [draw_mix(recipe, run.rng("mix", group)) for group in batch.groups]
        images = erase(evaluate.normalize(batch.images), batch.parameters)
        targets = mix_targets(batch.labels, mixes, run.num_classes, recipe.smoothing)
        return images, mix_images(images, mixes), targets

    def lr_at(epochs: float) -> float:
        if recipe.schedule == "waterfall" and epochs >= recipe.warmup_epochs:
            return recipe.lr * 0.1 ** min(2, int(3 * epochs / recipe.epochs))
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    data, model, wrapped, optimizer, precision, ema, teacher = script.set_up(
        run, TrainTransform(recipe), make_model, prepare, adapt=fit_resolution, teacher=TEACHER
    )
    for epoch in range(run.epoch, recipe.epochs):
        wrapped.train()
        for step in run.steps(data):
            for batch in data.micro_batches():
                _, images, targets = prepare(batch)
                with precision.forward(wrapped):
                    outputs = wrapped(images)
                    if teacher:
                        loss = hard_distillation(outputs, targets, teacher(images))
                    else:
                        loss = F.cross_entropy(outputs, targets)
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
    from common.run import Run

    args, recipe, paper = parse_args()
    if args.filters:
        return write_filters(Run("resmlp", args, recipe, paper))
    script.run_script(
        "resmlp", args, recipe, paper, MODELS, train=train, make_model=make_model, adapt=fit_resolution,
        loss=lambda model, images, labels: F.cross_entropy(model(images), labels),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
