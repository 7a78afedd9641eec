"""PatchConvNet: Augmenting convolutional networks with attention-based aggregation (Touvron, Cord, El-Nouby,
Bojanowski, Joulin, Synnaeve, Jegou; arXiv:2112.13692; thesis chapter 5).

New: a convnet of one resolution, made of patches from a convolutional stem and a column of identical blocks, topped by
one attention layer with one head: its single softmax says how much each patch counts, as one map or as one map per
class. PatchConvNet-S60 reaches 82.1 top-1 on ImageNet at 224 pixels, B120 84.1 (Table 5.1).

    torchrun --nproc_per_node 8 patchconvnet.py --model patchconvnet_s60 --data /imagenet    # the paper's run
    python patchconvnet.py --model patchconvnet_nano --recipe shapes --out runs/nano         # minutes on two CPU cores
    python patchconvnet.py --model patchconvnet_nano --weights runs/nano/last.pt --attention-maps a.jpg --out maps

Checked here: state-dict keys and logits of the official models, other resolutions, the pooling against its definition,
the augmentation by DeiT's numbers (tests/). Not run here: ImageNet.

Axes: B images, H x W patches, N = H W, C channels, K classes, T class tokens (1 or K).

Where the official code differs from what stands here:
- it keeps tokens (B, N, C) and transposes them around every block; here (B, H, W, C) goes through the whole column,
  1 x 1 convolutions are linear layers on it and the depth-wise ones see it as channels-last: nothing is copied;
- its maps must be square; here any size will do;
- its classifiers of one token per class are K layers, run one after the other; the keys are kept, the work is one
  product, in pieces of 128 classes;
- its keys' bias gets a gradient that is rounding noise (softmax cancels that bias); here it gets none;
- stochastic depth masks a binomial number of samples there; here a fixed number is drawn, only these are computed;
- its starting values of LayerScale are 1e-4 for S60 and 1e-6 for S120, B120 and L60; the thesis gives none. Here: 1e-4
  for S up to 60 blocks, else 1e-6;
- Apex's LAMB clips the gradient (section 6.2.1); section 5.2.3 says that nothing is clipped: nothing is, but in `a2`;
- the command's default is RandAugment of magnitude 9; section 5.2.3 names the variant of Wightman et al. [215]: 7
  (Table 6.1), which stands here;
- learning rate and mixup draw: as said in deit.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import stochastic_depth
from torchvision.transforms import v2

# ---- Recipe: thesis section 5.2.3 ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Section 5.2.3, training on ImageNet-1k; what depends on the model stands in MODELS."""

    epochs: Annotated[int, "passes over as many images as the data set has", "1 or more"] = 400
    batch_size: Annotated[int, "images per optimizer step, over all GPUs", "1 or more"] = 2048
    optimizer: Annotated[str, "lamb, adamw or sgd", ("lamb", "adamw", "sgd")] = "lamb"
    lr: Annotated[float, "peak learning rate; unset: in proportion to the batch", "above 0"] = 3e-3
    min_lr: Annotated[float, "learning rate at the end of the cosine", "0 or more"] = 1e-5  # official code, as the next
    warmup_lr: Annotated[float, "learning rate at step 0", "0 or more"] = 1e-6  # the thesis gives none
    warmup_epochs: Annotated[int, "epochs of linear warm-up", "0 or more"] = 5  # chapter 3
    weight_decay: Annotated[float, "not on biases, norms, LayerScale, class token; above S: 0.05", "0 or more"] = 0.01
    clip_grad: Annotated[float | None, "largest norm of the whole gradient; none: no clipping", "above 0"] = None
    img_size: Annotated[tuple[int, int], "training and test resolution in pixels, S or HxW", "1 or more"] = (224, 224)
    repeats: Annotated[int, "repeated augmentation: times an image is taken in a row", "1 or more"] = 3
    augment: Annotated[str, "rand (RandAugment), auto (AutoAugment) or none", ("rand", "auto", "none")] = "rand"
    magnitude: Annotated[float, "RandAugment's, of at most 10: that of [215] (Table 6.1)", "0 or more"] = 7.0
    mixup: Annotated[float, "alpha of mixup's Beta law; 0: off", "0 or more"] = 0.8
    cutmix: Annotated[float, "alpha of cutmix's Beta law; 0: off", "0 or more"] = 1.0
    mix_group: Annotated[int, "images that share one mixup or cutmix draw (officially: a GPU's)", "1 or more"] = 64
    loss: Annotated[str, "ce or bce (on binarised mixed labels)", ("ce", "bce")] = "ce"
    smoothing: Annotated[float, "label smoothing, with ce only", "in [0, 1)"] = 0.1
    drop_path: Annotated[float | None, "stochastic depth, one rate in all blocks; unset: Table 5.8", "in [0, 1)"] = None
    stem: Annotated[str, "conv, or linear projection of patches (Table 5.7)", ("conv", "linear")] = "conv"
    norm: Annotated[str, "of the blocks: layernorm or batchnorm (Table 5.8)", ("layernorm", "batchnorm")] = "layernorm"
    pooling: Annotated[
        str, "attention (one head), multi-head or average (Table 5.7)", ("attention", "multi-head", "average")
    ] = "attention"
    class_tokens: Annotated[str, "single, or per_class: a token and map per class", ("single", "per_class")] = "single"
    eval_crop_ratio: Annotated[float, "share of the resized image that the test crop keeps", "in (0, 1]"] = 1.0


RECIPES = {
    "in1k": Recipe(),
    # Section 5.2.3: batch 1024, rate "fixed" to 1e-5, weight decay 0.01, 10 epochs, drop-path less 0.1 (section 5.3.4).
    # Also for one token per class (Figure 5.6): --class-tokens per_class --img-size 224.
    "finetune": Recipe(epochs=10, batch_size=1024, lr=1e-5, min_lr=1e-5, warmup_epochs=0, img_size=(384, 384)),
    # Section 5.2.3: 90 epochs (4096 images per step: rate 4e-3); repeated augmentation on ImageNet-1k only.
    "in21k": Recipe(epochs=90, repeats=1),
    # At 384, then `finetune` for what is larger (section 5.3.2).
    "in21k_to_in1k": Recipe(epochs=100, batch_size=1024, lr=5e-4),
    # Table 5.5, "the procedure used in chapter 3": CaiT's rule (section 3.7.1.3), learning rates, peak and last, / 10
    # (Cars, Flowers, iNaturalist) or / 100 (CIFAR), 1000 epochs (360 on iNaturalist). At 320: --img-size 320.
    "transfer": Recipe(epochs=1000, lr=3e-4, min_lr=1e-6, repeats=1),
    # Sections 5.3.4 (resnet50_attention) and 6.3.4 (torchvision/resnet50): procedure A2 of Wightman et al. [215], 300
    # epochs, by their column of Table 6.1, which mixes A2 (weight decay 0.02, no smoothing) with A1's mixup, 0.2 (A2's:
    # 0.1, arXiv:2110.00476). Of the stochastic depth that it ticks it gives no rate (there 0.05): no branch is dropped.
    "a2": Recipe(
        epochs=300, lr=5e-3, weight_decay=0.02, clip_grad=1.0, mixup=0.2, loss="bce", smoothing=0.0,
        eval_crop_ratio=0.95,
    ),
    # Not of the thesis: images of your own (common.script.fit_own); the built-in data set, minutes on two CPU cores.
    "own": Recipe(epochs=30, lr=1e-2, warmup_epochs=0, repeats=1, augment="none", mixup=0.0, cutmix=0.0),
    "shapes": Recipe(
        epochs=6, batch_size=64, lr=1e-2, warmup_epochs=1, img_size=(48, 48), repeats=1, augment="none", mixup=0.0,
        cutmix=0.0, mix_group=8,
    ),
}
TRANSFER = {  # data set: what `transfer` changes for it
    **dict.fromkeys(("cifar10", "cifar100"), dict(lr=3e-5, min_lr=1e-7)),
    **dict.fromkeys(("inat2018", "inat2019"), dict(epochs=360)),
    "flowers102": dict(batch_size=512, lr=7.5e-5, min_lr=2.5e-7, warmup_lr=2.5e-7),  # 2040 images
}


def paper_recipe(name: str, model: str, *, data: str = "") -> Recipe:
    """The recipe's row completed for a model and, for `transfer`, a data set."""
    recipe = RECIPES[name]
    if name == "transfer":
        recipe = dataclasses.replace(recipe, **TRANSFER.get(data.split(":")[0].split("@")[0], {}))
    row = MODELS.get(model, {})
    drop_path = row.get("drop_path")
    if drop_path and name in ("finetune", "in21k_to_in1k"):  # section 5.3.4
        drop_path = round(max(0.0, drop_path - 0.1), 4)
    if name in ("in1k", "transfer") and "depth" in row and row["dim"] > 384:
        recipe = dataclasses.replace(recipe, weight_decay=0.05)
    return dataclasses.replace(recipe, drop_path=drop_path)


# ---- Architecture: section 5.2.1; drop rates: Table 5.8 --------------------------------------------------------------

MODELS = {
    "patchconvnet_s20": dict(dim=384, depth=20, drop_path=0.0, layer_scale=1e-4),
    "patchconvnet_s36": dict(dim=384, depth=36, drop_path=0.05, layer_scale=1e-4),
    "patchconvnet_s60": dict(dim=384, depth=60, drop_path=0.15, layer_scale=1e-4),
    "patchconvnet_s120": dict(dim=384, depth=120, drop_path=0.2, layer_scale=1e-6),
    "patchconvnet_b36": dict(dim=768, depth=36, drop_path=0.2, layer_scale=1e-6),
    "patchconvnet_b60": dict(dim=768, depth=60, drop_path=0.3, layer_scale=1e-6),
    "patchconvnet_b120": dict(dim=768, depth=120, drop_path=0.4, layer_scale=1e-6),
    "patchconvnet_l60": dict(dim=1024, depth=60, drop_path=0.3, layer_scale=1e-6),  # not in Table 5.8: B60's rate
    "patchconvnet_l120": dict(dim=1024, depth=120, drop_path=0.4, layer_scale=1e-6),  # not in Table 5.8: B120's rate
    "resnet50_attention": dict(dim=2048, layer_scale=1e-4),  # section 5.3.4: this pooling on torchvision's ResNet-50
    "patchconvnet_nano": dict(dim=64, depth=4, drop_path=0.0, layer_scale=0.1, stride=8),  # not in the thesis
}


class ConvStem(nn.Module):
    """Images (B, 3, H', W') -> patches (B, H, W, C): 3 x 3 convolutions of stride 2, each doubling the channels up to
    C, with a GELU between them; four of them: H = H'/16."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        widths = [3, *(dim >> i for i in reversed(range(stride.bit_length() - 1)))]
        layers: list[nn.Module] = []
        for a, b in zip(widths, widths[1:]):
            layers += [nn.Sequential(nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False)), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images.contiguous(memory_format=torch.channels_last)).permute(0, 2, 3, 1)


class LinearStem(nn.Module):
    """Images -> patches (B, H, W, C) by one linear projection, as in a ViT (Table 5.7)."""

    def __init__(self, dim: int, stride: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=stride, stride=stride)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.proj(images).permute(0, 2, 3, 1).contiguous()


class SqueezeExcitation(nn.Module):
    """Channels rescaled by a gate made of their means (arXiv:1709.01507), x (B, H, W, C) -> same."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv_reduce = nn.Conv2d(dim, dim // 4, 1)
        self.conv_expand = nn.Conv2d(dim // 4, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate = F.relu(pointwise(self.conv_reduce, x.mean(dim=(1, 2), keepdim=True)))
        return x * torch.sigmoid(pointwise(self.conv_expand, gate))


def pointwise(conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A 1 x 1 convolution of (..., C) as the linear layer that it is."""
    return F.linear(x, conv.weight.flatten(1), conv.bias)


class ConvBranch(nn.Module):
    """1 x 1, GELU, depth-wise 3 x 3, GELU, squeeze-and-excitation, 1 x 1 (Figure 5.1), (B, H, W, C) -> same.

    The attribute's name is the official checkpoints': there is neither query nor position in it.
    """

    def __init__(self, dim: int):
        super().__init__()
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.qkv_pos = nn.Sequential(
            nn.Conv2d(dim, dim, 1), nn.GELU(), depthwise, nn.GELU(), SqueezeExcitation(dim), nn.Conv2d(dim, dim, 1)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, gelu, depthwise, _, squeeze, last = self.qkv_pos
        x = gelu(pointwise(first, x))
        x = depthwise(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)  # channels-last both ways: views
        return pointwise(last, squeeze(gelu(x)))


# Copied from cait.py
@torch.fx.wrap  # not followed by torch.fx, to which the batch is no number
def kept_samples(batch: int, drop_rate: float, device: torch.device) -> tuple[torch.Tensor, float]:
    """Stochastic depth's draw: (indices of the samples that keep the branch, factor on it). Always round(batch (1 -
    drop_rate)) of them and at least 1: static shapes, no host waits for a GPU. Each is kept with the same probability,
    whose inverse is the factor: the expectation is the usual law's."""
    kept = max(1, round(batch * (1 - drop_rate)))
    return torch.rand(batch, device=device).topk(kept).indices, batch / kept


# Adapted from deit.py: one convolutional branch, LayerScale, stochastic depth on the kept samples only
class Block(nn.Module):
    """Block of the column, (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, norm: str, layer_scale: float, drop_path: float):
        super().__init__()
        self.drop_path, self.batchnorm = drop_path, norm == "batchnorm"
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = nn.BatchNorm2d(dim) if self.batchnorm else nn.LayerNorm(dim, eps=1e-6)
        self.attn = ConvBranch(dim)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        normed = self.norm1(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if self.batchnorm else self.norm1(x)
        return self.gamma_1 * self.attn(normed)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.drop_path == 0:
            return x + self.branch(x)
        if self.batchnorm:  # its statistics are those of all images
            return x + stochastic_depth(self.branch(x), self.drop_path, "row")
        kept, factor = kept_samples(x.shape[0], self.drop_path, x.device)
        return x.index_add(0, kept, self.branch(x[kept]).to(x.dtype), alpha=factor)


# Adapted from deit.py: hidden width 3 C
class MLP(nn.Module):
    """Two linear layers with a GELU between them, hidden width 3 C, (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 3 * dim)
        self.fc2 = nn.Linear(3 * dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class LearnedAggregation(nn.Module):
    """Cross-attention of class tokens (B, T, C) to keys and values: (B, T, C)."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim)
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.k.bias.requires_grad_(False)  # softmax cancels it

    def split(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, C) -> (B, h, L, C/h)"""
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def keys_and_values(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of z (B, L, C), each (B, h, L, C/h)."""
        return self.split(F.linear(z, self.k.weight)), self.split(self.v(z))

    def weights(self, tokens: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """How much each of L counts for each token: (B, h, T, L)."""
        q = self.split(self.q(tokens))
        return (q * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1)

    def forward(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return self.proj((self.weights(tokens, k).to(v.dtype) @ v).transpose(1, 2).flatten(2))


class AggregationBlock(nn.Module):
    """Attention-based pooling (section 5.2.1): class tokens (B, T, C), keys and values -> class tokens, then an FFN.

    A single token is among the keys, as in CaiT; tokens of classes see the patches only, hence do not see each other
    and can be worked on in pieces.
    """

    def __init__(self, dim: int, heads: int, layer_scale: float, per_class: bool):
        super().__init__()
        self.per_class = per_class
        self.gamma_1 = nn.Parameter(torch.full((dim,), layer_scale))
        self.gamma_2 = nn.Parameter(torch.full((dim,), layer_scale))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = LearnedAggregation(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim)

    def keys_and_values(self, tokens: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of what tokens (B, T, C) attend to, among it the patches (B, N, C)."""
        attended = patches if self.per_class else torch.cat([tokens, patches], dim=1)
        return self.attn.keys_and_values(self.norm1(attended))

    def weights(self, tokens: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
        """The share of each patch in the weighted sum, (B, h, T, N)."""
        k, _ = self.keys_and_values(tokens, patches)
        return self.attn.weights(self.norm1(tokens), k)[..., -patches.shape[1] :]

    def forward(self, tokens: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        tokens = tokens + self.gamma_1 * self.attn(self.norm1(tokens), k, v)
        return tokens + self.gamma_2 * self.mlp(self.norm2(tokens))


@contextlib.contextmanager
def without_counting(block: nn.Module):
    """Inside, BatchNorm's running statistics stay as they are: its images have been counted already."""
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum, momentum = 0.0, norm.momentum
    try:
        yield  # left by an exception as soon as all that is needed has been computed
    finally:
        for norm in norms:
            norm.momentum = momentum
            norm.num_batches_tracked -= 1


def recomputing(block: nn.Module):
    """Contexts of a checkpoint's forward pass and of its recomputation, which must not count the images again."""
    return contextlib.nullcontext(), without_counting(block)


class PatchConvNet(nn.Module):
    """Images (B, 3, H', W') of any size -> logits (B, K).

    trunk None: the column of `depth` blocks; else a convnet, (B, 3, H', W') -> (B, C, H, W), in its place.
    """

    CLASSES_AT_ONCE = 128  # of per-class tokens: without gradients the memory is that of B x 128 x 3 C, whatever K

    def __init__(
        self, dim: int, *, depth: int = 0, stride: int = 16, trunk: nn.Module | None = None, num_classes: int,
        drop_path: float = 0.0, layer_scale: float, stem: str, norm: str, pooling: str, class_tokens: str,
    ):
        super().__init__()
        self.grad_checkpoint, self.per_class, self.trunk = False, class_tokens == "per_class", trunk
        self.cls_token = None
        if pooling != "average":
            self.cls_token = nn.Parameter(torch.zeros(1, num_classes if self.per_class else 1, dim))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        if trunk is None:
            self.patch_embed = ConvStem(dim, stride) if stem == "conv" else LinearStem(dim, stride)
            self.blocks = nn.ModuleList(Block(dim, norm, layer_scale, drop_path) for _ in range(depth))
        if pooling != "average":
            heads = dim // 48 if pooling == "multi-head" else 1  # CaiT's 48 channels per head
            self.blocks_token_only = nn.ModuleList([AggregationBlock(dim, heads, layer_scale, self.per_class)])
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        if self.per_class:
            self.head = nn.ModuleList(nn.Linear(dim, 1) for _ in range(num_classes))
        else:
            self.head = nn.Linear(dim, num_classes)
        for module in self.modules():  # convolutions keep their default, as in the official code
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def no_weight_decay(self) -> set[str]:
        """Parameters of two or more dimensions that are not decayed all the same."""
        return {"cls_token"}

    def forward_features(self, images: torch.Tensor) -> torch.Tensor:
        """Patches before the pooling, (B, H, W, C)."""
        if self.trunk is not None:
            return self.trunk(images).permute(0, 2, 3, 1)
        x = self.patch_embed(images).to(self.norm.weight.dtype)  # under autocast too the stream is not of 16 bits
        for block in self.blocks:
            if self.grad_checkpoint and self.training:
                contexts = functools.partial(recomputing, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return x

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        patches = self.forward_features(images).flatten(1, 2)  # (B, N, C)
        if self.cls_token is None:
            return self.head(self.norm(patches.mean(dim=1)))
        pool = self.blocks_token_only[0]
        if not self.per_class:
            tokens = self.cls_token.repeat(patches.shape[0], 1, 1)
            return self.head(self.norm(pool(tokens, *pool.keys_and_values(tokens, patches)))[:, 0])
        k, v = pool.keys_and_values(self.cls_token, patches)  # of the patches alone: the same for all classes

        def class_logits(tokens: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            """Logits (B, T) of T classes by their tokens (1, T, C) and classifiers (T, C), (T,)."""
            x = self.norm(pool(tokens.repeat(k.shape[0], 1, 1), k, v))
            return torch.einsum("btc,tc->bt", x, weight.to(x.dtype)) + bias

        weight, bias = torch.cat([h.weight for h in self.head]), torch.cat([h.bias for h in self.head])  # (K, C), (K,)
        size = self.CLASSES_AT_ONCE
        pieces = zip(self.cls_token.split(size, dim=1), weight.split(size), bias.split(size))
        return torch.cat([class_logits(*piece) for piece in pieces], dim=1)


def build_model(
    name: str, num_classes: int = 1000, img_size: int | tuple[int, int] | None = None, drop_path: float | None = None,
    *, class_tokens: str = "single", stem: str = "conv", norm: str = "layernorm", pooling: str = "attention",
) -> nn.Module:
    """A fresh model: a row of MODELS, or "torchvision/NAME" (then only num_classes is used).

    img_size: any will do, but stem "linear" needs multiples of the patch; drop_path None: Table 5.8's; the rest: Table
    5.7, see Recipe. Raises KeyError for an unknown name, ValueError for options that do not go together.
    """
    if name.startswith("torchvision/"):
        return torchvision.models.get_model(name.removeprefix("torchvision/"), weights=None, num_classes=num_classes)
    config = dict(MODELS[name])
    if class_tokens == "per_class" and pooling == "average":
        raise ValueError("class_tokens per_class: average pooling has no class tokens")
    if name == "resnet50_attention":
        if (stem, norm) != ("conv", "layernorm"):
            raise ValueError("resnet50_attention: stem and norm are ResNet's own")
        config["trunk"] = nn.Sequential(*list(torchvision.models.resnet50().children())[:-2])  # without pooling and fc
    else:
        config["drop_path"] = config["drop_path"] if drop_path is None else drop_path
        if stem == "linear":
            whole_patches(img_size or 224, config.get("stride", 16), name)
    options = dict(stem=stem, norm=norm, pooling=pooling, class_tokens=class_tokens)
    return PatchConvNet(**config, num_classes=num_classes, **options)


# Copied from deit.py
def whole_patches(img_size: int | tuple[int, int], patch: int, name: str) -> tuple[int, int]:
    """(H, W) of an image size S or (H, W); ValueError with the nearest good ones if patches do not fill it."""
    size = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if any(s < patch or s % patch for s in size):
        near = " or ".join("x".join(str(max(patch, (s // patch + up) * patch)) for s in size) for up in (0, 1))
        given = f"image size {size[0]}x{size[1]} is not a multiple of {name}'s patch of {patch}"
        raise ValueError(f"{given}; the nearest are {near}")
    return size


def carry_over(model: nn.Module, state: dict[str, torch.Tensor], content: dict, say) -> None:
    """Weights of a single-token model for one with a token per class (section 5.2.1, in a fine-tuning stage): every
    class starts from the single token, which is no longer among the keys, and from its row of the classifier."""
    from common.errors import UserError

    if not getattr(model, "per_class", False) or "head.weight" not in state:
        return
    K, found = model.cls_token.shape[1], len(state["head.weight"])
    if found != K:
        numbers = f"the weights have {found} classes, the data {K}"
        raise UserError(f"--class-tokens per_class: {numbers}; train a single token on them first")
    state["cls_token"] = state["cls_token"].repeat(1, K, 1)
    for name in ("weight", "bias"):
        rows = state.pop(f"head.{name}").split(1)
        state.update({f"head.{i}.{name}": row for i, row in enumerate(rows)})
    say(f"class token and classifier carried over to {K} tokens, one per class")


# ---- Loss ------------------------------------------------------------------------------------------------------------


def bce_loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy, mean over B and K; every class with a share in the mixed image counts fully. The other loss
    is F.cross_entropy, which takes soft targets (B, K) too."""
    return F.binary_cross_entropy_with_logits(logits, (targets > 0).to(logits.dtype))


# ---- Analysis: Figures 5.5 and 5.6 -----------------------------------------------------------------------------------


# Adapted from cait.py: one block, its share of every patch, per class where there are such tokens
@torch.no_grad()
def attention_maps(model: PatchConvNet, images: torch.Tensor, classes: list[int] | None = None) -> torch.Tensor:
    """Each patch's share in the pooling, mean over heads: (B, T, H, W), T = 1 or, per class, len(classes)."""
    features = model.forward_features(images)
    tokens = model.cls_token if classes is None or not model.per_class else model.cls_token[:, classes]
    weights = model.blocks_token_only[0].weights(tokens.expand(len(images), -1, -1), features.flatten(1, 2))
    return weights.mean(dim=1).unflatten(2, features.shape[1:3])


@torch.no_grad()
def vit_attention_map(vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """A ViT's class token in its last block (of deit.py or deit3.py), mean over heads: (B, H, W)."""
    seen, attn = [], vit.blocks[-1].attn
    hook = attn.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    vit(images)
    hook.remove()
    q, k, _ = attn.qkv(seen[0]).unflatten(2, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, h, L, C/h)
    weights = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.transpose(-2, -1)).softmax(dim=-1).mean(dim=1)[:, 0]
    return weights[:, -vit.grid[0] * vit.grid[1] :].unflatten(1, vit.grid)


# Copied from cait.py
def saliency(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Figure 3.10: the first block's maps (B, h, H/p, W/p) -> (B, *size) in 0..1: head mean, upsampled, (x - min) /
    (max - min)."""
    x = F.interpolate(maps.mean(dim=1, keepdim=True).float(), size=size, mode="bicubic", align_corners=False)[:, 0]
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    return (x - low) / (high - low).clamp(min=1e-12)


def write_maps(run) -> None:
    """--attention-maps: per image the map of the pooling, or those of the three likeliest classes, and a ViT's."""
    from common import checkpoint, evaluate, images, models, report
    from common.errors import UserError

    model, recipe, classes = evaluate.trained_model(run, make_model, carry_over)
    args, size, vit = run.args, recipe.img_size, None
    if not isinstance(model, PatchConvNet) or model.cls_token is None:
        raise UserError("--attention-maps: this model has no attention in its pooling")
    if args.vit:
        content = checkpoint.load(args.vit, "--vit")
        if content.get("method") not in ("deit", "deit3"):
            raise UserError(f"--vit {args.vit}: is no checkpoint of deit.py or deit3.py")
        vit = models.from_checkpoint(content, f"--vit {args.vit}", size, run.say).to(run.device).eval()
    for file in args.attention_maps:
        image = images.eval_transform(evaluate.read_file(file, "--attention-maps"), size, recipe.eval_crop_ratio)
        x = evaluate.normalize(image[None].to(run.device))
        with torch.no_grad():
            shares = model(x)[0].float().softmax(dim=0)
        best = shares.argsort(descending=True)[:3].tolist()
        likely = [f"{classes[c]} {shares[c]:.0%}" for c in best]
        titles = [f"map of {name}" for name in likely] if model.per_class else ["pooling: " + "; ".join(likely)]
        maps = list(zip(titles, attention_maps(model, x, best).split(1, dim=1)))
        if vit is not None:
            x = evaluate.normalize(image[None].to(run.device), images.pixels_of(content))  # as it was trained
            maps.append(("a ViT's class token, last block", vit_attention_map(vit, x)[:, None]))
        grey, rows = (torch.tensor([0.299, 0.587, 0.114]) @ image.float().flatten(1) / 255).view(size), []
        for title, of_patches in maps:
            shown = saliency(of_patches, size)[0].cpu()
            rows.append((title, [images.to_pil(image), report.cividis(shown), report.cividis(grey * shown)]))
        target = run.out / f"{Path(file).stem}_attention.png"
        report.save_sheet(target, rows)
        run.say(f"wrote {target}: {'; '.join(likely)}")


# ---- Augmentation: section 5.2.3 -------------------------------------------------------------------------------------


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


# Adapted from deit.py: no erasing
class TrainTransform:
    """A loader process' part, all but mixing: (uint8 image (3, H, W), rng) -> (uint8 (3, *img_size), no parameters)."""

    def __init__(self, recipe: Recipe):
        self.size, self.policy, self.magnitude = recipe.img_size, recipe.augment, recipe.magnitude
        self.auto = v2.AutoAugment(interpolation=v2.InterpolationMode.BICUBIC, fill=FILL)  # as officially

    def __call__(self, image: torch.Tensor, rng: random.Random) -> tuple[torch.Tensor, tuple[float, ...]]:
        from common import images

        top, left, height, width = random_resized_crop(*image.shape[1:], rng)
        image = images.resize(image[:, top : top + height, left : left + width], self.size)
        if rng.random() < 0.5:
            image = image.flip(-1)
        if self.policy == "rand":
            image = images.from_pil(rand_augment(images.to_pil(image), rng, self.magnitude))
        elif self.policy == "auto":  # torchvision's policy draws from torch's global generator: seed it for this image
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(rng.getrandbits(63))
                image = images.from_pil(self.auto(images.to_pil(image)))
        return image, ()


# Copied from deit.py
FILL = (124, 116, 104)  # round(255 * ImageNet mean)


# Adapted from deit.py: any magnitude
def rand_augment(image: Image.Image, rng: random.Random, magnitude: float) -> Image.Image:
    """RandAugment (timm's rand-mM-mstd0.5-inc1): two draws from 15 operations, each applied with probability 0.5 at
    magnitude N(M, 0.5) clipped to 0..10."""
    for _ in range(2):
        operation = rng.choice(OPERATIONS)
        if rng.random() <= 0.5:
            level = min(10.0, max(0.0, rng.gauss(magnitude, 0.5))) / 10
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

    options = dict(model="patchconvnet_s60", recipe="in1k", grad_checkpoint=True)
    parser = cli.make_parser("patchconvnet", __doc__, Recipe, RECIPES, **options)
    parser.add_argument("--attention-maps", nargs="+", metavar="IMAGE",
                        help="write the pooling's maps (Figures 5.5, 5.6) to --out and stop")
    parser.add_argument("--vit", metavar="FILE",
                        help="of --attention-maps: also the map of this checkpoint of deit.py or deit3.py")
    args = cli.parse(parser, argv, [*MODELS, "torchvision/NAME"], RECIPES)
    paper = paper_recipe(args.recipe, args.model, data=args.data or "")
    recipe = cli.override(paper, args)
    if recipe.loss == "bce" and recipe.smoothing:
        raise cli.UserError("--smoothing: would switch on every class of --loss bce; use --smoothing 0 or --loss ce")
    if args.model not in MODELS:
        cli.refuse(args, ("stem", "norm", "pooling", "class_tokens"), "not for torchvision's models; leave it out")
    if "drop_path" not in MODELS.get(args.model, {}):
        cli.refuse(args, ("drop_path",), f"{args.model} has no stochastic depth; leave it out")
    if args.attention_maps is None:
        cli.refuse(args, ("vit",), "has no effect without --attention-maps")
    return args, recipe, paper


def make_model(args, recipe: Recipe, num_classes: int) -> nn.Module:
    """build_model for a command line."""
    options = dict(class_tokens=recipe.class_tokens, stem=recipe.stem, norm=recipe.norm, pooling=recipe.pooling)
    model = build_model(args.model, num_classes, recipe.img_size, recipe.drop_path, **options)
    if args.grad_checkpoint and "depth" not in MODELS.get(args.model, {}):
        raise ValueError("--grad-checkpoint is not for it")
    model.grad_checkpoint = args.grad_checkpoint
    return model


def load_model(source: str, device: str = "cpu") -> tuple:
    """(model in eval mode, class names, transform) of a checkpoint, ours or official: see common.models.load."""
    from common.models import load
    return load("patchconvnet", source, device)


def train(run) -> None:
    """The loop; what it starts from (data, network, what was saved) is common.script.set_up's."""
    from common import evaluate, script
    from common.optim import cosine_lr

    recipe = run.recipe
    criterion = bce_loss if recipe.loss == "bce" else F.cross_entropy

    def prepare(batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(images before mixing, images as the network sees them, soft targets) on the device."""
        mixes = [draw_mix(recipe, run.rng("mix", group)) for group in batch.groups]
        images = evaluate.normalize(batch.images)
        targets = mix_targets(batch.labels, mixes, run.num_classes, recipe.smoothing)
        return images, mix_images(images, mixes), targets

    def lr_at(epochs: float) -> float:
        return cosine_lr(epochs, recipe.epochs, recipe.warmup_epochs, recipe.lr, recipe.min_lr, recipe.warmup_lr)

    data, _, wrapped, optimizer, precision, *_ = script.set_up(
        run, TrainTransform(recipe), make_model, prepare, adapt=carry_over
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
            stats, _ = precision.step(optimizer, lr, asked=run.asked())
            run.after_step(stats, lr)
        record = run.end_of_training_epoch(lr_at(epoch + 1)) | evaluate.validate(run)
        run.end_of_epoch(record, record.get("val_top1"))
    script.finish(run, ["train_loss", "val_loss"], ["val_top1", "val_top5"])


def main() -> None:
    from common import script
    from common.run import Run

    args, recipe, paper = parse_args()
    if args.attention_maps:
        return write_maps(Run("patchconvnet", args, recipe, paper))
    criterion = bce_loss if recipe.loss == "bce" else F.cross_entropy
    script.run_script(
        "patchconvnet", args, recipe, paper, MODELS, train=train, make_model=make_model, adapt=carry_over,
        loss=lambda model, images, labels: criterion(model(images), mix_targets(labels, [Mix(1.0)], 1000, 0.0)),
    )


if __name__ == "__main__":
    try:
        from common.script import launch
    except Exception as error:  # another common may raise anything
        print(f"error: {error}; needs torch 2.6, tqdm, our common/ (got {sys.modules.get('common')})", file=sys.stderr)
        sys.exit(2)
    launch(main)
