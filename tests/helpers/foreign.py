"""Models that were not written for us: MindSpore's own transformers, and MindCV's vision models. Small; dropout is off."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any, Callable

import numpy as np
from mindspore import Tensor, nn, ops

SEQUENCE, FEATURES, CLASSES = 6, 32, 5


@dataclass(frozen=True)
class Foreign:
    """How to build it, a rank's batch, its loss, the classes and the number of the Blocks that are expected, the learning rate."""

    build: Callable[[], nn.Cell]
    batch: Callable[[int], tuple]
    loss: Callable[..., Tensor]
    blocks: dict[str, int]
    lr: float = 1e-3


def normal(seed: int, *shape: int) -> Tensor:
    return Tensor(np.random.RandomState(seed).randn(*shape).astype(np.float32))


# MindSpore #


def encoder(layers: int = 3) -> nn.Cell:
    layer = nn.TransformerEncoderLayer(FEATURES, 4, dim_feedforward=64, dropout=0.0, batch_first=True, norm_first=True)
    return nn.TransformerEncoder(layer, layers, nn.LayerNorm((FEATURES,)))


def translator() -> nn.Cell:
    return nn.Transformer(
        d_model=FEATURES, nhead=4, num_encoder_layers=2, num_decoder_layers=2, dim_feedforward=64, dropout=0.0, batch_first=True
    )


def causal() -> Tensor:
    return Tensor(np.triu(np.ones((SEQUENCE, SEQUENCE)), 1).astype(bool))


def encoder_batch(seed: int) -> tuple:
    padding = np.arange(SEQUENCE) >= np.array([SEQUENCE, SEQUENCE - 2])[:, None]
    return normal(seed, 2, SEQUENCE, FEATURES), Tensor(padding), normal(seed + 500, 2, SEQUENCE, FEATURES)


def encoder_loss(model: nn.Cell, x: Tensor, padding: Tensor, y: Tensor) -> Tensor:
    return ((model(x, src_mask=causal(), src_key_padding_mask=padding) - y) ** 2).mean()


def translator_loss(model: nn.Cell, x: Tensor, padding: Tensor, y: Tensor) -> Tensor:
    out = model(x, y, tgt_mask=causal(), src_key_padding_mask=padding, memory_key_padding_mask=padding)
    return ((out - x) ** 2).mean()


# MindCV #


def mindcv(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of MindCV itself
        import mindcv.models

    return getattr(mindcv.models, name)


def vit() -> nn.Cell:
    make = mindcv("vit").VisionTransformer
    return make(image_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=4, num_classes=CLASSES)


def resnet() -> nn.Cell:
    return mindcv("ResNet")(mindcv("resnet").BasicBlock, [2, 2, 1, 1], num_classes=CLASSES)


def convnext() -> nn.Cell:
    return mindcv("ConvNeXt")(3, CLASSES, depths=[1, 1, 2, 1], dims=[16, 32, 32, 64])


def swin() -> nn.Cell:
    return mindcv("SwinTransformer")(
        image_size=32,
        patch_size=4,
        num_classes=CLASSES,
        embed_dim=32,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        drop_path_rate=0.0,
    )


def images(size: int, count: int = 2) -> Callable[[int], tuple]:
    def batch(seed: int) -> tuple:
        labels = np.random.RandomState(seed).randint(0, CLASSES, count).astype(np.int32)
        return normal(seed, count, 3, size, size), Tensor(labels)

    return batch


def classify(model: nn.Cell, x: Tensor, y: Tensor) -> Tensor:
    return ops.cross_entropy(model(x), y)


MODELS = {
    "encoder": Foreign(encoder, encoder_batch, encoder_loss, {"TransformerEncoderLayer": 3}),
    "transformer": Foreign(
        translator, encoder_batch, translator_loss, {"TransformerEncoderLayer": 2, "TransformerDecoderLayer": 2}
    ),
    "vit": Foreign(vit, images(32), classify, {"Block": 3}),
    "resnet": Foreign(resnet, images(32, 4), classify, {"BasicBlock": 6}, lr=1e-4),
    "convnext": Foreign(convnext, images(64), classify, {"Block": 5}),
    "swin": Foreign(swin, images(32), classify, {"BasicLayer": 2}),
}
