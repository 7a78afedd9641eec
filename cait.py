"""CaiT: Going deeper with image transformers (Touvron, Cord, Sablayrolles, Synnaeve, Jegou; arXiv:2103.17239; thesis
sections 3.5 to 3.7).

New: LayerScale (each residual branch is multiplied, channel by channel, by learned weights that start near 0: deep
networks train) and class attention (the class embedding enters late, in layers that update nothing else). CaiT-S-36
reaches 83.3 top-1 at 224 pixels, 85.4 at 384 with a RegNetY-16GF as teacher (Table 3.15).

    torchrun --nproc_per_node 8 cait.py --model cait_s24 --data /imagenet                        # the paper's run
    torchrun --nproc_per_node 8 cait.py --model cait_s24 --data /imagenet --distillation hard    # with a teacher
    python cait.py --model cait_nano --recipe shapes                             # minutes on two CPU cores, no download
    python cait.py --model cait_nano --weights runs/cait_cait_nano/last.pt --attention-maps a.jpg b.jpg --out maps

Checked here: state-dict keys and logits of the official models, parameters and GMACs of Table 3.15, talking heads and
class attention against their definitions, augmentation and schedule by DeiT's numbers (tests/). Not run here: ImageNet.

Axes: B images, N patches, T class or distillation tokens, C channels, K classes, H x W pixels, p patch side, h heads.

Where the official code differs from what stands here:
- its XXS-36 starts LayerScale at 1e-5, Table 3.16 says 1e-6;
- it permutes the attention maps for a Linear over heads; here one matrix product mixes them, about twice as fast;
- biases that softmax cancels (of the keys, of the mixing before it) get there rounding noise for a gradient, here none;
- stochastic depth masks a binomial number of samples there; here a fixed number is drawn, only these are computed;
- it has no distillation token (Table 3.14), and evaluates M-48 in float32, as --eval does here for all models;
- learning rate, mixup draw, dropped label on the distillation head: as said in deit.py.
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
from torch.utils.checkpoint import checkpoint
from torchvision.transforms import v2

# ---- Recipe: thesis section 3.7 ("identical to DeiT except mentioned otherwise": Table 3.9) --------------------------

BRANCHES = ("layerscale", "layerscale-zero", "layerscale-uniform", "layerscale-fixed", "scalar", "scalar-zero", "none")


@dataclass(frozen=True)
class Recipe:
    """Section 3.7, for all models; what depends on the model (Table 3.16) stands in MODELS."""

    epochs: Annotated[int, "passes over as many images as the data set has", "1 or more"] = 400
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 1024
    optimizer: Annotated[str, "adamw or sgd", ("adamw", "sgd")] = "adamw"
    lr: Annotated[float, "peak learning rate; unset: in proportion to the batch", "above 0"] = 1e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine", "0 or more"] = 1e-5  # official code, as the next
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 1e-6  # the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 5
    weight_decay: Annotated[float, "not on biases, norms, LayerScale, class token, positions", "0 or more"] = 0.05
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping", "above 0"] = None
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW", "1 or more"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 3
    augment: Annotated[str, "rand (RandAugment 9/0.5), auto (AutoAugment) or none", ("rand", "auto", "none")] = "rand"
    erasing: Annotated[float, "probability of random erasing", "in [0, 1]"] = 0.25
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off", "0 or more"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off", "0 or more"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (officially: a GPU's)", "1 or more"] = 64
    smoothing: Annotated[float, "label smoothing", "in [0, 1)"] = 0.1
    branches: Annotated[str, "branch weights (Tables 3.11, 3.12): " + ", ".join(BRANCHES), BRANCHES] = "layerscale"
    epsilon: Annotated[float | None, "what these weights start at; unset: by the depth (T. 3.16)", "0 or more"] = None
    depth: Annotated[int | None, "blocks of self-attention; unset: Table 3.15", "1 or more"] = None
    heads: Annotated[int | None, "attention heads (Table 3.21); unset: a head per 48 channels", "1 or more"] = None
    talking_heads: Annotated[bool, "self-attention mixes its heads' maps (section 3.7)"] = True
    class_layers: Annotated[int, "blocks of class attention (Table 3.13)", "0 or more"] = 2
    insert_class: Annotated[int | None, "blocks before the class token (Table 3.13); none: all", "0 or more"] = None
    class_in_keys: Annotated[bool, "class attention sees the class embedding: Eq. 3.13; false: section 3.6.3"] = True
    class_scale: Annotated[bool, "branch weights in class attention too; false: section 3.6.3"] = True
    drop_path: Annotated[float | None, "stochastic depth: rate of every block; unset: Table 3.16", "in [0, 1)"] = None
    ema: Annotated[float, "decay of the averaged weights; 0: none", "in [0, 1)"] = 0.0
    distillation: Annotated[str, "none or hard (Eq. 3.3)", ("none", "hard")] = "none"
    eval_crop_ratio: Annotated[float, "share of the resized image in the test crop (Table 3.22)", "in (0, 1]"] = 1.0


RECIPES = {
    "in1k": Recipe(),
    # Table 3.15's 384, 448 with --img-size 448. The thesis gives no numbers: DeiT's (section 3.4.5, official command);
    # the rates of stochastic depth stay.
    "finetune": Recipe(
        epochs=25, batch_size=512, lr=5e-6, min_lr=5e-6, weight_decay=1e-8, img_size=(384, 384), mix_group=32
    ),
    # Section 3.7.1.3: learning rates, peak and last, / 10 (CIFAR: / 100), 1000 epochs (iNaturalist: 360); crop ratio:
    # Table 3.19.
    "transfer": Recipe(epochs=1000, lr=1e-4, min_lr=1e-6, eval_crop_ratio=0.875),
    # Not of the thesis: images of your own (common.script.fit_own); the built-in data set, minutes on two CPU cores.
    "own": Recipe(epochs=30, lr=3e-4, warmup_epochs=0, repeats=1, augment="none", mixup=0.0, cutmix=0.0),
    "shapes": Recipe(
        epochs=6, batch_size=64, lr=2e-3, warmup_epochs=1, img_size=(48, 48), repeats=1, augment="none", erasing=0.0,
        mixup=0.0, cutmix=0.0, mix_group=8,
    ),
}
TEACHER = "regnet_y_16gf"  # section 3.7; 82.9 top-1, as have torchvision's weights
TRANSFER = {  # data set: what `transfer` changes for it
    **dict.fromkeys(("cifar10", "cifar100"), dict(lr=1e-5, min_lr=1e-7)),
    **dict.fromkeys(("inat2018", "inat2019"), dict(epochs=360)),
}


def paper_recipe(name: str, model: str, *, data: str = "") -> Recipe:
    """The recipe's row completed for a model and, for `transfer`, a data set."""
    recipe = RECIPES[name]
    if name == "transfer":
        recipe = dataclasses.replace(recipe, **TRANSFER.get(data.split(":")[0].split("@")[0], {}))
    elif model.endswith("_distilled") and name not in ("own", "shapes"):
        recipe = dataclasses.replace(recipe, distillation="hard")
    elif model == "deit_s" and name == "in1k":  # "DeiT-S [300 epochs]", crop ratio 0.875: Table 3.20
        recipe = dataclasses.replace(recipe, epochs=300, eval_crop_ratio=0.875)
    return dataclasses.replace(recipe, **{k: v for k, v in MODELS[model].items() if hasattr(recipe, k)})


# ---- Architecture: sections 3.5 and 3.6; sizes: Table 3.15, drop rates: Table 3.16 -----------------------------------

MODELS = {
    "cait_xxs24": dict(dim=192, depth=24, heads=4, patch=16, drop_path=0.05),
    "cait_xxs36": dict(dim=192, depth=36, heads=4, patch=16, drop_path=0.1),
    "cait_xs24": dict(dim=288, depth=24, heads=6, patch=16, drop_path=0.05),
    "cait_xs36": dict(dim=288, depth=36, heads=6, patch=16, drop_path=0.1),
    "cait_s24": dict(dim=384, depth=24, heads=8, patch=16, drop_path=0.1),
    "cait_s36": dict(dim=384, depth=36, heads=8, patch=16, drop_path=0.2),
    "cait_s48": dict(dim=384, depth=48, heads=8, patch=16, drop_path=0.3),
    # 100.0 M but for the classifier and 18.2 GMACs (Table 6.13, on deit3.py); its drop rate is not given, here ViT-B's.
    "cait_b12": dict(dim=768, depth=12, heads=16, patch=16, drop_path=0.1),
    "cait_m24": dict(dim=768, depth=24, heads=16, patch=16, drop_path=0.2),
    "cait_m36": dict(dim=768, depth=36, heads=16, patch=16, drop_path=0.3),
    "cait_m48": dict(dim=768, depth=48, heads=16, patch=16, drop_path=0.4),
    "cait_nano": dict(dim=96, depth=3, heads=2, patch=8, drop_path=0.0),  # not in the thesis
}
MODELS |= {f"{name}_distilled": {**config, "distilled": True} for name, config in MODELS.items()}
# DeiT-S, on which depth, heads and class token were studied; the rate of every block: Table 3.11.
MODELS["deit_s"] = dict(dim=384, depth=12, heads=6, patch=16, drop_path=0.05, branches="none", talking_heads=False,
                        class_layers=0, insert_class=0)


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


# Adapted from deit.py: heads mixed before and after the softmax
class Attention(nn.Module):
    """Multi-head self-attention, with talking heads (section 3.7; arXiv:2003.02436) or without, (B, N, C) -> (B, N, C).

    Two h x h matrices mix the heads: proj_l their logits, proj_w their weights. The backward pass keeps three maps
    (B, h, N, N), 12 h bytes per pair of tokens in float32; with --grad-checkpoint one block's at a time instead of all.
    """

    def __init__(self, dim: int, heads: int, talking: bool = True):
        super().__init__()
        self.heads, self.talking = heads, talking
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        if talking:
            self.proj_l, self.proj_w = (nn.Linear(heads, heads) for _ in range(2))
            self.proj_l.bias.requires_grad_(False)  # the same for all keys: softmax cancels it, as the keys' bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        B, N, C = x.shape
        bias = torch.cat([self.qkv.bias[:C], self.qkv.bias[C : 2 * C].detach(), self.qkv.bias[2 * C :]])
        qkv = F.linear(x, self.qkv.weight, bias).reshape(B, N, 3, self.heads, C // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, h, N, C/h)
        if not self.talking:
            return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))
        logits = (q * (C // self.heads) ** -0.5) @ k.transpose(-2, -1)  # (B, h, N, N)
        logits = mix_heads(self.proj_l.weight, logits)
        weights = logits.softmax(dim=-1, dtype=logits.dtype)  # autocast would keep a map in float32, for nothing
        x = mix_heads(self.proj_w.weight, weights) @ v  # (B, h, N, C/h)
        x = x + self.proj_w.bias.view(-1, 1, 1) * v.sum(dim=2, keepdim=True)  # its bias: the same weight for all keys
        return self.proj(x.transpose(1, 2).reshape(B, N, C))


def mix_heads(matrix: torch.Tensor, maps: torch.Tensor) -> torch.Tensor:
    """(h, h), (B, h, N, N) -> (B, h, N, N): every head becomes a weighted sum of all heads."""
    B, h, N, _ = maps.shape
    return torch.bmm(matrix.expand(B, h, h), maps.reshape(B, h, N * N)).view(B, h, N, N)


@torch.fx.wrap  # not followed by torch.fx, to which the batch is no number
def kept_samples(batch: int, drop_rate: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """Stochastic depth's draw: (indices of the samples that keep the branch, factor on it). Always round(batch (1 -
    drop_rate)) of them and at least 1: static shapes, no host waits for a GPU. Each is kept with the same probability,
    whose inverse is the factor: the expectation is the usual law's."""
    kept = max(1, round(batch * (1 - drop_rate)))
    return torch.rand(batch, device=device).topk(kept).indices, batch / kept


def branch_weight(kind: str, dim: int, epsilon: float) -> nn.Parameter | None:
    """What multiplies a branch: LayerScale's diagonal (Eq. 3.7, Table 3.12), a scalar (Table 3.11) or nothing."""
    if kind == "none":
        return None
    weight = torch.full((dim if kind.startswith("layerscale") else 1,), epsilon)
    if kind.endswith("-zero"):  # with a scalar: ReZero, adapted
        weight.zero_()
    elif kind.endswith("-uniform"):
        weight.uniform_(0, 2 * epsilon)
    return nn.Parameter(weight, requires_grad=not kind.endswith("-fixed"))


def scaled(branch: torch.Tensor, weight: nn.Parameter | None) -> torch.Tensor:
    return branch if weight is None else weight * branch


# Adapted from deit.py: LayerScale, stochastic depth on the kept samples only
class Block(nn.Module):
    """Block of the self-attention stage (Eq. 3.7), (B, N, C) -> (B, N, C)."""

    def __init__(self, dim: int, attn: nn.Module, branches: str, epsilon: float, drop_path: float = 0.0):
        super().__init__()
        self.drop_path = drop_path
        self.gamma_1, self.gamma_2 = (branch_weight(branches, dim, epsilon) for _ in range(2))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def attention_branch(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.attn(self.norm1(x)), self.gamma_1)

    def mlp_branch(self, x: torch.Tensor) -> torch.Tensor:
        return scaled(self.mlp(self.norm2(x)), self.gamma_2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch in (self.attention_branch, self.mlp_branch):
            if self.training and self.drop_path:
                kept, factor = kept_samples(x.shape[0], self.drop_path, x.device)
                x = x.index_add(0, kept, branch(x[kept]).to(x.dtype), alpha=factor)
            else:
                x = x + branch(x)
        return x


class ClassAttention(nn.Module):
    """Multi-head attention of the T class tokens alone (Eq. 3.8-3.12): z (B, T + N, C), T of them tokens -> (B, T, C).

    Only T query rows are computed. Keys and values are tokens and patches (Eq. 3.13) or the patches (section 3.6.3).
    """

    def __init__(self, dim: int, heads: int, class_in_keys: bool):
        super().__init__()
        self.heads, self.class_in_keys = heads, class_in_keys
        self.q, self.k, self.v, self.proj = (nn.Linear(dim, dim) for _ in range(4))
        self.k.bias.requires_grad_(False)  # softmax cancels it

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, h, L, C/h)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def weights(self, z: torch.Tensor, T: int) -> torch.Tensor:
        """Attention of each token (Eq. 3.11): (B, h, T, keys), keys = T + N or N."""
        q = self.split(self.q(z[:, :T]))
        k = self.split(F.linear(z if self.class_in_keys else z[:, T:], self.k.weight))
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, z: torch.Tensor, T: int) -> torch.Tensor:
        v = self.split(self.v(z if self.class_in_keys else z[:, T:]))
        return self.proj((self.weights(z, T).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class ClassBlock(Block):
    """Block of the class-attention stage: tokens (B, T, C), patches (B, N, C) -> tokens; the patches stay."""

    def forward(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        z = self.norm1(torch.cat([tokens, patches], dim=1))  # (B, T + N, C)
        tokens = tokens + scaled(self.attn(z, tokens.shape[1]), self.gamma_1)
        return tokens + self.mlp_branch(tokens)


class CaiT(nn.Module):
    """Images (B, 3, H, W) -> logits (B, K): patches through the self-attention stage, then the class-attention blocks.

    With the distillation token (Table 3.14), which enters beside the class token: in training mode the pair (class
    head, distillation head), in eval mode the mean of the two; `heads` gives the pair in either mode. The tokens enter
    after insert_class blocks (Table 3.13), with positions if that is 0, as in DeiT; None: after all, to class attention
    or, if that has no layers, not at all: the head is given the patches' mean. ValueError for what does not fit.
    """

    def __init__(
        self, dim: int, *, depth: int, heads: int, patch: int, distilled: bool = False, num_classes: int,
        img_size: tuple[int, int], drop_path: float, branches: str = "layerscale", epsilon: float | None = None,
        talking_heads: bool = True, class_layers: int = 2, insert_class: int | None = None, class_in_keys: bool = True,
        class_scale: bool = True,
    ):
        super().__init__()
        averages = insert_class is None and class_layers == 0
        insert_class = depth if insert_class is None else insert_class
        if dim % heads or (distilled if averages else insert_class >= depth + bool(class_layers)):
            wrong = f"depth {depth}, heads {heads}, class layers {class_layers}, a class token after {insert_class}"
            raise ValueError(f"{wrong}: do not fit together in {dim} channels")
        epsilon = (0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6) if epsilon is None else epsilon
        self.distilled, self.grad_checkpoint, self.insert_class = distilled, False, insert_class
        self.tokens = 0 if averages else 1 + distilled
        self.grid = (img_size[0] // patch, img_size[1] // patch)
        self.cls_token = None if averages else nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, math.prod(self.grid) + (0 if insert_class else self.tokens), dim))
        if distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, dim))
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        self.patch_embed = PatchEmbed(dim, patch, self.grid)
        blocks = (Block(dim, Attention(dim, heads, talking_heads), branches, epsilon, drop_path) for _ in range(depth))
        self.blocks = nn.ModuleList(blocks)
        kind = branches if class_scale else "none"
        last = [ClassBlock(dim, ClassAttention(dim, heads, class_in_keys), kind, epsilon) for _ in range(class_layers)]
        self.blocks_token_only = nn.ModuleList(last) if last else None
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.head = nn.Linear(dim, num_classes)
        if distilled:
            self.head_dist = nn.Linear(dim, num_classes)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if self.tokens:
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():  # the patch projection keeps the convolution's default, as the official code does
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed all the same."""
        return {"pos_embed", "cls_token"}

    def with_tokens(self, x: torch.Tensor, blocks: int) -> torch.Tensor:
        """x (B, N, C) after so many blocks, with the T tokens in front if it is there that they enter."""
        if blocks != self.insert_class or not self.tokens:
            return x
        tokens = [self.cls_token, self.dist_token] if self.distilled else [self.cls_token]
        return torch.cat([torch.cat(tokens, dim=1).expand(x.shape[0], -1, -1), x], dim=1)

    def stages(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(tokens (B, T, C) before the class-attention stage, patches (B, N, C) after the self-attention stage)."""
        x = self.with_tokens(self.patch_embed(images), 0) + self.pos_embed
        for number, block in enumerate(self.blocks, 1):
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpoint and self.training else block(x)
            x = self.with_tokens(x, number)
        return x[:, : self.tokens], x[:, self.tokens :]

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Class token, distillation token if there is one, and patches as the heads are given the tokens: (B, T, C)."""
        tokens, patches = self.stages(images)
        for block in self.blocks_token_only or ():
            tokens = block(tokens, patches)
        return self.norm(torch.cat([tokens, patches], dim=1))

    def heads(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits of the class head and, with the distillation token, of the distillation head, each (B, K)."""
        x = self.forward_features(images)
        first = self.head(x[:, 0] if self.tokens else x.mean(dim=1))
        return (first, self.head_dist(x[:, 1])) if self.distilled else (first,)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        logits = self.heads(images)
        return logits if self.distilled and self.training else sum(logits) / len(logits)


def build_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None,
    **options,
) -> CaiT:
    """A fresh model, a row of MODELS; KeyError for an unknown name, ValueError for what does not fit. img_size: pixels,
    S or (H, W), multiples of the patch (None: 224); drop_path None: Table 3.16's; options: CaiT's, by the names of
    Recipe's fields; left out, or None (but for insert_class): the row's."""
    options = {k: v for k, v in {**options, "drop_path": drop_path}.items() if v is not None or k == "insert_class"}
    size = whole_patches(img_size or 224, MODELS[name]["patch"], name)
    return CaiT(**{**MODELS[name], **options}, num_classes=num_classes, img_size=size)


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


# ---- Loss: section 3.6.3 ---------------------------------------------------------------------------------------------


def hard_distillation(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor, teacher_logits: torch.Tensor
) -> torch.Tensor:
    """Eq. 3.3: half cross-entropy with soft targets (B, K), half with the teacher's decision; outputs: logits (B, K) of
    the only head, which takes both terms, or of the class and the distillation head."""
    class_logits, student = (outputs, outputs) if isinstance(outputs, torch.Tensor) else outputs
    return 0.5 * F.cross_entropy(class_logits, targets) + 0.5 * F.cross_entropy(student, teacher_logits.argmax(dim=1))


# Copied from deit.py
def label_loss(outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the true label, without a teacher: of the only head, or the mean over both heads."""
    heads = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
    return sum(F.cross_entropy(logits, targets) for logits in heads) / len(heads)


# Copied from deit.py
def predict(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits (B, K) for evaluation; of a distilled model (section 3.3, rows of Table 3.3) "class" and "distillation":
    those of its heads, and "": the late fusion, the log of the mean of their softmax outputs."""
    if not getattr(model, "distilled", False):
        return {"": model(images)}
    class_logits, dist_logits = model.heads(images)
    fusion = torch.logaddexp(F.log_softmax(class_logits, dim=1), F.log_softmax(dist_logits, dim=1)) - math.log(2)
    return {"": fusion, "class": class_logits, "distillation": dist_logits}


# ---- Figures 3.6, 3.9 and 3.10 of a trained model --------------------------------------------------------------------


def norms_images(source, recipe: Recipe, device: torch.device) -> torch.Tensor:
    """64 of the images of `source`, spread over it, as the network sees them (B, 3, H, W)."""
    from common import evaluate, images

    chosen = [source.named(source.read, i) for i in range(0, len(source), -(-len(source) // 64))]
    batch = [images.eval_transform(image, recipe.img_size, recipe.eval_crop_ratio) for image in chosen]
    return evaluate.normalize(torch.stack(batch).to(device))


@torch.no_grad()
def branch_norms(model: CaiT, images: torch.Tensor) -> dict[str, list[float]]:
    """Figure 3.6, on normalised images (B, 3, H, W): {"attention": [...], "mlp": [...]}, one number per block of the
    self-attention stage: norm of the residual branch / norm of what it is added to, mean over the images."""
    x, ratios = model.with_tokens(model.patch_embed(images), 0) + model.pos_embed, {"attention": [], "mlp": []}
    for number, block in enumerate(model.blocks, 1):
        for name, branch in (("attention", block.attention_branch), ("mlp", block.mlp_branch)):
            change = branch(x)
            ratios[name].append((change.flatten(1).norm(dim=1) / x.flatten(1).norm(dim=1)).mean().item())
            x = x + change
        x = model.with_tokens(x, number)
    return ratios


@torch.no_grad()
def attention_maps(model: CaiT, images: torch.Tensor) -> list[torch.Tensor]:
    """Figure 3.9: the class token's attention to the patches, (B, h, H/p, W/p) for each class-attention block."""
    tokens, patches = model.stages(images)
    maps, N = [], patches.shape[1]
    for block in model.blocks_token_only or ():
        weights = block.attn.weights(block.norm1(torch.cat([tokens, patches], dim=1)), tokens.shape[1])
        maps.append(weights[:, :, 0, -N:].unflatten(2, model.grid))  # of (B, h, T, keys)
        tokens = block(tokens, patches)
    return maps


def saliency(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Figure 3.10: the first block's maps (B, h, H/p, W/p) -> (B, *size) in 0..1: head mean, upsampled, (x - min) /
    (max - min)."""
    x = F.interpolate(maps.mean(dim=1, keepdim=True).float(), size=size, mode="bicubic", align_corners=False)[:, 0]
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)


def write_figures(run) -> None:
    """--branch-norms, --attention-maps: figures of the trained model --weights, in the folder --out."""
    from common import cli, evaluate, images, report
    from common.sources import open_data

    args = run.args
    model, recipe, classes = evaluate.trained_model(run, make_model, fit_resolution)
    size, crop_ratio = recipe.img_size, recipe.eval_crop_ratio
    if model.blocks_token_only is None:
        cli.refuse(args, ("attention_maps",), "this network has no class attention")
    if args.branch_norms:
        source = open_data(args.data, val_data=args.val_data, splits=("val",), say=run.say)["val"]
        ratios, log = branch_norms(model, norms_images(source, recipe, run.device)), run.out / "log.jsonl"
        evaluate.save_json(run.out / "branch_norms.json", ratios)
        logged = [r for r in (report.read_log(log) if log.exists() else []) if "branch_norms" in r]
        curves = {f"epoch {r['epoch']}": r["branch_norms"] for r in logged} | {"now": ratios}
        panels = [{when: list(enumerate(norms[kind])) for when, norms in curves.items()} for kind in ratios]
        drawn = report.save_plot(run.out / "branch_norms.png", panels, "block", [f"{k}/input" for k in ratios], run.say)
        run.say(f"wrote {run.out / 'branch_norms.json'}{' and .png' if drawn else ''}")
    for file in args.attention_maps or []:
        image = images.eval_transform(evaluate.read_file(file, "--attention-maps"), size, crop_ratio)
        batch, picture, rows = evaluate.normalize(image[None].to(run.device)), images.to_pil(image), []
        maps = attention_maps(model, batch)
        for i, of_heads in enumerate(maps):
            tiles = [report.cividis(saliency(of_heads[:, h : h + 1], size)[0]) for h in range(of_heads.shape[1])]
            rows.append((f"class attention {i + 1}: its heads", [picture, *tiles]))
        with torch.no_grad():
            shares = predict(model, batch)[""][0].float().softmax(dim=0)
        likely = [f"{classes[c]} {shares[c]:.0%}" for c in shares.argsort(descending=True).tolist() if shares[c] > 0.1]
        title = "; ".join(likely) or "no class above 10%"
        grey = torch.tensor([0.299, 0.587, 0.114]) @ image.float().flatten(1) / 255  # what the saliency lights up
        rows.append((title, [picture, report.cividis(grey.view(size) * saliency(maps[0], size)[0].cpu())]))
        target = run.out / f"{Path(file).stem}_attention.png"
        report.save_sheet(target, rows)
        run.say(f"wrote {target}: {title}")


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

    parser = cli.make_parser("cait", __doc__, Recipe, RECIPES, model="cait_s24", recipe="in1k", teacher=TEACHER,
                             grad_checkpoint=True)
    flag, norms = parser.add_argument, "the branches' norms (Figure 3.6) on 64 validation images"
    maps = "write class attention (Figure 3.9) and saliency (3.10) to --out and stop"
    flag("--attention-maps", nargs="+", metavar="IMAGE", help=maps)
    flag("--branch-norms", action="store_true", help=f"write {norms}, with those logged there, to --out and stop")
    flag("--log-branch-norms", action="store_true", default=None, help=f"log {norms} at 8 times of the training")
    args = cli.parse(parser, argv, MODELS, RECIPES)
    paper = paper_recipe(args.recipe, args.model, data=args.data or "")
    recipe = cli.override(paper, args)
    if recipe.branches.endswith(("none", "-zero", "-fixed")):
        cli.refuse(args, ("epsilon",), f"has no effect with --branches {recipe.branches}")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> CaiT:
    """build_model for a command line."""
    model = build_model(
        args.model, num_classes, recipe.img_size, recipe.drop_path, branches=recipe.branches, epsilon=recipe.epsilon,
        depth=recipe.depth, heads=recipe.heads, talking_heads=recipe.talking_heads, class_layers=recipe.class_layers,
        insert_class=recipe.insert_class, class_in_keys=recipe.class_in_keys, class_scale=recipe.class_scale,
    )
    model.grad_checkpoint = args.grad_checkpoint
    return model


def branch_weights_only(model: nn.Module, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Of a trained network's `state` the branch weights, which stay; all else anew: section 3.5.3, "Re-training"."""
    say("of --weights only the branch weights are taken, and kept; all else starts anew")
    state |= {k: v for k, v in model.state_dict().items() if ".gamma_" not in k}


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint, ours or official: see common.models.load."""
    from common.models import load
    return load("cait", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, teacher, what was saved) is common.script.set_up's."""
    from common import cli, evaluate, script
    from common.optim import cosine_lr

    recipe = run.recipe

    def prepare(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        mixes = [draw_mix(recipe, run.rng("mix", group)) for group in batch.groups]
        images = erase(evaluate.normalize(batch.images), batch.parameters)
        targets = mix_targets(batch.labels, mixes, run.num_classes, recipe.smoothing)
        return images, mix_images(images, mixes), targets

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    adapt = branch_weights_only if recipe.branches == "layerscale-fixed" else fit_resolution
    if adapt is branch_weights_only and not (run.args.weights or run.args.resume):
        cli.refuse(run.args, ("branches",), "needs --weights FILE, of a network trained with --branches layerscale")
    data, model, wrapped, optimizer, precision, ema, teacher = script.set_up(
        run, TrainTransform(recipe), make_model, prepare, adapt=adapt, teacher=TEACHER
    )
    if data.val is None:
        cli.refuse(run.args, ("log_branch_norms",), "needs validation images")
    shown = norms_images(data.val, recipe, run.device) if run.args.log_branch_norms else None
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
                        loss = label_loss(outputs, targets)
                precision.backward(loss)
            lr = lr_at(epoch + step / data.steps)
            stats, skipped = precision.step(optimizer, lr, asked=run.asked())
            if ema:
                ema.update(model, skip=skipped)
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at(epoch + 1)) | evaluate.validate(run, predict)
        if shown is not None and (epoch + 1) * 8 // recipe.epochs > epoch * 8 // recipe.epochs:
            run.log({"epoch": epoch, "branch_norms": branch_norms(model, shown)})
        run.end_of_epoch(record, record.get("val_top1"))
    script.finish(run, ["train_loss", "val_loss"], ["val_top1", "val_top5"])


def main() -> None:
    from common import script
    from common.run import Run

    args, recipe, paper = parse_args()
    if args.branch_norms or args.attention_maps:
        return write_figures(Run("cait", args, recipe, paper))
    script.run_script(
        "cait", args, recipe, paper, MODELS, train=train, make_model=make_model, adapt=fit_resolution,
        predict=predict, loss=lambda model, images, labels: label_loss(model(images), labels),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
