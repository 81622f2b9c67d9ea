"""G-GhostNet: RegNetX stages in which half of the channels skip the inner blocks.

"GhostNets on Heterogeneous Devices via Cheap Operations", arXiv:2201.03297 (IJCV 2022). The maps of one stage resemble
each other, so only ``raw`` of its C channels go through the inner bottlenecks; the other ``cheap = C - raw`` come from
the first bottleneck's map by one dense 1x1 convolution, corrected by a mix of all maps on the way:

    x0  = base(x)                                                (B, C, H/2, W/2)
    e_0 = x0[:, :raw];  e_k = layer_k(e_{k-1}), k = 1 .. N-2     (B, raw, H/2, W/2)
    m   = merge(mean([x0, e_1, .., e_{N-2}]))                    (B, cheap, 1, 1), mean over positions
    c   = ReLU(BN(conv1x1(x0[:, raw:])) + m)                     (B, cheap, H/2, W/2)
    out = end([e_{N-2}, c])                                      (B, C, H/2, W/2)

``base`` and ``end`` are bottlenecks of the full width and count among the N blocks. The names are those of the
published code, so that its checkpoints load as they are.

Batches of one image cannot train: ``merge`` normalises maps of one position, and BatchNorm needs two values. With the
norms frozen in eval mode (as :func:`torchgraft.attach` freezes a backbone's), or synchronised over devices, they can.

Parameters (ImageNet-1K head): 002 1,825,440; 032 10,511,000; 040 15,726,268; 080 24,586,928; 160 32,381,704; all twelve
in ``PUBLISHED``. Published for the last four: 10.5, 15.7, 24.6 and 32.4 million.
"""

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, calculate_drop_path_rates, create_classifier, get_device_dtype
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs
from torch import Tensor, fx, nn

from ..errors import GraftError
from .published import Published
from .timm_api import feature_take_indices, register_backbone, untrained_cfg, unwrapped

__all__ = ["PUBLISHED", "GGhostRegNet", "checkpoint_filter_fn", "official_name"]


class Bottleneck(nn.Module):
    """RegNetX bottleneck: 1x1, grouped 3x3 and 1x1 convolution of one width, and a residual sum.

    Shapes: (B, in_chs, H, W) -> (B, width, ceil(H / stride), ceil(W / stride)).

    Args:
        in_chs: Channels of the input.
        width: Channels of the output, and in between.
        stride: Stride of the 3x3 convolution.
        group_width: Channels of a group of the 3x3 convolution.
        drop_path: Rate of stochastic depth.
        device: Where the parameters are made.
        dtype: Their type.
    """

    def __init__(
        self,
        in_chs: int,
        width: int,
        stride: int,
        group_width: int,
        drop_path: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        groups = width // min(width, group_width)
        self.grad_checkpointing = False
        self.conv1 = nn.Conv2d(in_chs, width, 1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(width, **dd)
        self.act1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, groups=groups, bias=False, **dd)
        self.bn2 = nn.BatchNorm2d(width, **dd)
        self.act2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, width, 1, bias=False, **dd)
        self.bn3 = nn.BatchNorm2d(width, **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_chs, width, 1, stride=stride, bias=False, **dd), nn.BatchNorm2d(width, **dd))
            if stride != 1 or in_chs != width
            else nn.Identity()
        )
        self.act3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """The map behind the block."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint(self._residual_sum, x)
        return self._residual_sum(x)

    def _residual_sum(self, x: Tensor) -> Tensor:
        y = self.act1(self.bn1(self.conv1(x)))
        y = self.act2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.act3(self.drop_path(y) + self.downsample(x))


class GhostStage(nn.ModuleDict):
    """A stage whose inner bottlenecks see only some of the channels; the equation is at the top of this file.

    A dict of its parts, so that its bottlenecks are found as one list of blocks in the order of the forward pass.

    Shapes: (B, in_chs, H, W) -> (B, width, ceil(H / 2), ceil(W / 2)).

    Args:
        in_chs: Channels of the input.
        width: Channels C of the output.
        group_width: Channels of a group of the 3x3 convolutions; the inner ones have three quarters of it.
        cheap_ratio: About how many of C are computed cheaply; ``raw`` is rounded down to whole groups.
        drop_paths: Rate of stochastic depth of every bottleneck; as many as there are bottlenecks, at least two.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: There are fewer than two bottlenecks, or no channels are left for one of the two paths.
    """

    def __init__(
        self,
        in_chs: int,
        width: int,
        group_width: int,
        cheap_ratio: float,
        drop_paths: list[float],
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        dd = {"device": device, "dtype": dtype}
        depth, inner_group = len(drop_paths), int(0.75 * group_width)
        self.raw = int(width * (1 - cheap_ratio) / inner_group) * inner_group if inner_group else 0
        cheap = width - self.raw
        if depth < 2 or not 0 < self.raw < width:
            raise GraftError(
                f"g_ghost_regnet: a ghost stage of depth {depth}, width {width}, group_width {group_width} and "
                f"cheap_ratio {cheap_ratio} has {self.raw} raw and {cheap} cheap channels; it needs a depth of at "
                "least 2 and channels of both kinds"
            )
        self.base = Bottleneck(in_chs, width, 2, group_width, drop_paths[0], **dd)
        self.layers = nn.Sequential(
            *[Bottleneck(self.raw, self.raw, 1, inner_group, rate, **dd) for rate in drop_paths[1:-1]]
        )
        self.merge = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(width + self.raw * (depth - 2), cheap, 1, bias=False, **dd),
            nn.BatchNorm2d(cheap, **dd),
            nn.ReLU(),
            nn.Conv2d(cheap, cheap, 1, bias=False, **dd),
            nn.BatchNorm2d(cheap, **dd),
        )
        self.cheap = nn.Sequential(nn.Conv2d(cheap, cheap, 1, bias=False, **dd), nn.BatchNorm2d(cheap, **dd))
        self.act = nn.ReLU()
        self.end = Bottleneck(width, width, 1, group_width, drop_paths[-1], **dd)

    def forward(self, x: Tensor) -> Tensor:
        """The map behind the stage."""
        full = self.base(x)
        raw = full[:, : self.raw]
        # The mean of every map as soon as it is there: the maps are neither kept for it nor joined into a large one.
        means = [self.merge[0](full)]
        for block in self.layers:
            raw = block(raw)
            means.append(self.merge[0](raw))
        joined = torch.cat(means, 1)
        if not torch.jit.is_scripting() and self.merge[2].training and isinstance(self.merge[2], nn.BatchNorm2d):
            joined = _of_several_images(joined)
        mix = self.merge(joined)  # its pooling leaves a map of one position as it is
        cheap = self.act(self.cheap(full[:, self.raw :]) + mix)
        return self.end(torch.cat((raw, cheap), 1))


def _of_several_images(means: Tensor) -> Tensor:
    if means.shape[0] == 1:
        raise GraftError(
            "g_ghost_regnet: a batch of one image cannot train, because the mix normalises one value per channel; "
            "give two images or more, put the BatchNorm layers in eval mode, or use SyncBatchNorm"
        )
    return means


fx.wrap("_of_several_images")  # a branch on a size has no place in a graph


class GGhostRegNet(nn.Module):
    """G-GhostNet with the stages of a RegNetX.

    Shapes: (B, in_chans, H, W) -> (B, num_classes), for any H and W. Maps have strides 2 (the stem), 4, 8, 16 and 32,
    sizes rounded up.

    Args:
        in_chans: Channels of the image.
        num_classes: Classes; 0: no classifier.
        global_pool: Pooling ahead of it; empty: none.
        output_stride: 32; the network has no dilated form.
        depths: Bottlenecks of the four stages. The first stage is plain; the third is a ghost stage, as are the
            second and fourth with more than two bottlenecks.
        widths: Channels of the stages.
        group_width: Channels of a group of the 3x3 convolutions.
        cheap_ratio: Part of a ghost stage's channels that skip its inner bottlenecks.
        stem_width: Channels of the stem.
        drop_rate: Dropout ahead of the classifier.
        drop_path_rate: Stochastic depth of the last bottleneck, growing linearly from 0.
        device: Where the parameters are made.
        dtype: Their type.

    Raises:
        GraftError: There are not four depths and widths, or a ghost stage cannot be split as asked for.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        output_stride: int = 32,
        depths: tuple[int, ...] = (2, 6, 15, 2),
        widths: tuple[int, ...] = (96, 192, 432, 1008),
        group_width: int = 48,
        cheap_ratio: float = 0.5,
        stem_width: int = 32,
        drop_rate: float = 0.2,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        assert output_stride == 32, "G-GhostNet has no dilated form: output_stride must be 32."
        if len(depths) != 4 or len(widths) != 4:
            raise GraftError(f"g_ghost_regnet: depths={tuple(depths)} and widths={tuple(widths)} must be four each")
        dd = {"device": device, "dtype": dtype}
        self.num_classes, self.in_chans, self.drop_rate = num_classes, in_chans, drop_rate

        self.conv1 = nn.Conv2d(in_chans, stem_width, 3, stride=2, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(stem_width, **dd)
        self.act1 = nn.ReLU()
        stages: list[nn.Module] = []
        rates: Any = calculate_drop_path_rates(drop_path_rate, list(depths), stagewise=True)
        in_chs = stem_width
        for number, (width, drop_paths) in enumerate(zip(widths, rates, strict=True), start=1):
            if number == 3 or (number != 1 and len(drop_paths) > 2):
                stages.append(GhostStage(in_chs, width, group_width, cheap_ratio, drop_paths, **dd))
            else:
                first = Bottleneck(in_chs, width, 2, group_width, drop_paths[0], **dd)
                more = [Bottleneck(width, width, 1, group_width, rate, **dd) for rate in drop_paths[1:]]
                stages.append(nn.Sequential(first, *more))
            in_chs = width
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.feature_info = [{"num_chs": stem_width, "reduction": 2, "module": "act1"}] + [
            {"num_chs": width, "reduction": 2 ** (i + 2), "module": f"layer{i + 1}"} for i, width in enumerate(widths)
        ]
        self.num_features = in_chs
        self.global_pool, self.head_drop, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool, drop_rate=drop_rate, **dd
        )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.apply(_init_weights)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameter groups from the input to the output, per stage or per block; the mix stands ahead of ``end``."""
        by_block = [
            (r"^layer(\d+)\.base", (-1,)),
            (r"^layer(\d+)\.layers\.(\d+)", None),
            (r"^layer(\d+)\.(?:merge|cheap)", (998,)),
            (r"^layer(\d+)\.end", (999,)),
            (r"^layer(\d+)\.(\d+)", None),
        ]
        return {"stem": r"^(?:conv1|bn1)", "blocks": r"^layer(\d+)" if coarse else by_block}

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the bottlenecks in the backward pass instead of keeping what they save."""
        for module in self.modules():
            if isinstance(module, Bottleneck):
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        """The linear layer (``nn.Identity`` without classes)."""
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Make a new classifier; ``global_pool=None`` keeps the pooling."""
        self.num_classes = num_classes
        pooling = self.global_pool.pool_type if global_pool is None else global_pool
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=pooling, **get_device_dtype(self)
        )
        self.global_pool.train(self.training)
        self.fc.train(self.training)
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps behind the stem and the stages.

        Args:
            x: Images (B, in_chans, H, W).
            indices: Which maps: the last so many, a list, or all.
            norm: Of no effect: the network has no final norm.
            stop_early: Leave out the stages behind the last map that is asked for.
            output_fmt: ``"NCHW"``.
            intermediates_only: Return the maps alone.

        Returns:
            The maps, or the output of :meth:`forward_features` and the maps.
        """
        assert output_fmt == "NCHW", "Output shape must be NCHW."
        take_indices, max_index = feature_take_indices(5, indices)
        end = max_index if stop_early else 4
        x = self.act1(self.bn1(self.conv1(x)))
        maps = [x]
        # Spelled out, because TorchScript knows no loop over modules of these names.
        if end >= 1:
            x = self.layer1(x)
            maps.append(x)
        if end >= 2:
            x = self.layer2(x)
            maps.append(x)
        if end >= 3:
            x = self.layer3(x)
            maps.append(x)
        if end >= 4:
            x = self.layer4(x)
            maps.append(x)
        intermediates = [maps[i] for i in take_indices]
        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages behind the last map that is asked for, and the head; returns the maps' indices."""
        take_indices, max_index = feature_take_indices(5, indices)
        for number in range(max_index + 1, 5):
            self.add_module(f"layer{number}", nn.Identity())
        self.num_features = self.feature_info[max_index]["num_chs"]
        if prune_head or max_index < 4:
            self.reset_classifier(0, "")
        return take_indices

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> map (B, num_features, ceil(H / 32), ceil(W / 32))."""
        x = self.act1(self.bn1(self.conv1(x)))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The map -> (B, num_classes); with ``pre_logits`` (B, head_hidden_size)."""
        x = self.head_drop(self.global_pool(x))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) -> (B, num_classes)."""
        return self.forward_head(self.forward_features(x))


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def official_name(key: str) -> str | None:
    """Our key for one of the published code: the same."""
    return key


def checkpoint_filter_fn(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """A published checkpoint or one of ours as a state dict of ``model``."""
    return unwrapped(state_dict)


_cfg = partial(
    untrained_cfg,
    interpolation="bilinear",
    first_conv="conv1",
    classifier="fc",
    license="apache-2.0",
    paper_ids="arXiv:2201.03297",
    paper_name="GhostNets on Heterogeneous Devices via Cheap Operations",
    origin_url="https://github.com/huawei-noah/Efficient-AI-Backbones",
)


default_cfgs = generate_default_cfgs(
    {
        "g_ghost_regnetx_002.untrained": _cfg(),
        "g_ghost_regnetx_004.untrained": _cfg(),
        "g_ghost_regnetx_006.untrained": _cfg(),
        "g_ghost_regnetx_008.untrained": _cfg(),
        "g_ghost_regnetx_016.untrained": _cfg(),
        "g_ghost_regnetx_032.in1k": _cfg(),
        "g_ghost_regnetx_040.in1k": _cfg(),
        "g_ghost_regnetx_064.untrained": _cfg(),
        "g_ghost_regnetx_080.in1k": _cfg(),
        "g_ghost_regnetx_120.untrained": _cfg(),
        "g_ghost_regnetx_160.in1k": _cfg(),
        "g_ghost_regnetx_320.untrained": _cfg(),
        "test_ghost_regnet.untrained": _cfg(input_size=(3, 64, 64), pool_size=(2, 2)),
    }
)

PUBLISHED: dict[str, Published] = {
    "g_ghost_regnetx_002": Published(1_825_440, 0.131, (24, 56, 152, 368)),
    "g_ghost_regnetx_004": Published(2_884_456, 0.221, (32, 64, 160, 384)),
    "g_ghost_regnetx_006": Published(4_029_776, 0.390, (48, 96, 240, 528)),
    "g_ghost_regnetx_008": Published(5_248_328, 0.529, (64, 128, 288, 672)),
    "g_ghost_regnetx_016": Published(7_109_660, 1.021, (72, 168, 408, 912)),
    "g_ghost_regnetx_032": Published(10_511_000, 1.802, (96, 192, 432, 1008), top1=77.8),
    "g_ghost_regnetx_040": Published(15_726_268, 2.228, (80, 240, 560, 1360), top1=78.6),
    "g_ghost_regnetx_064": Published(17_993_748, 4.055, (168, 392, 784, 1624)),
    "g_ghost_regnetx_080": Published(24_586_928, 4.150, (80, 240, 720, 1920), top1=79.0),
    "g_ghost_regnetx_120": Published(30_627_208, 7.378, (224, 448, 896, 2240)),
    "g_ghost_regnetx_160": Published(32_381_704, 8.997, (256, 512, 896, 2048), top1=79.9),
    "g_ghost_regnetx_320": Published(62_815_448, 17.158, (336, 672, 1344, 2520)),
}


def _create(variant: str, pretrained: bool, **kwargs: Any) -> GGhostRegNet:
    return build_model_with_cfg(
        GGhostRegNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg={"out_indices": (0, 1, 2, 3, 4)},
        **kwargs,
    )


def _sized(
    variant: str, pretrained: bool, depths: tuple[int, ...], group_width: int, kwargs: dict[str, Any]
) -> GGhostRegNet:
    size = {"depths": depths, "widths": PUBLISHED[variant].channels, "group_width": group_width}
    return _create(variant, pretrained, **{**size, **kwargs})


@register_backbone
def g_ghost_regnetx_002(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-0.2GF: 1.8 million parameters, 0.1 GMACs."""
    return _sized("g_ghost_regnetx_002", pretrained, (1, 1, 4, 7), 8, kwargs)


@register_backbone
def g_ghost_regnetx_004(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-0.4GF: 2.9 million parameters, 0.2 GMACs."""
    return _sized("g_ghost_regnetx_004", pretrained, (1, 2, 7, 12), 16, kwargs)


@register_backbone
def g_ghost_regnetx_006(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-0.6GF: 4.0 million parameters, 0.4 GMACs."""
    return _sized("g_ghost_regnetx_006", pretrained, (1, 3, 5, 7), 24, kwargs)


@register_backbone
def g_ghost_regnetx_008(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-0.8GF: 5.2 million parameters, 0.5 GMACs."""
    return _sized("g_ghost_regnetx_008", pretrained, (1, 3, 7, 5), 16, kwargs)


@register_backbone
def g_ghost_regnetx_016(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-1.6GF: 7.1 million parameters, 1.0 GMACs."""
    return _sized("g_ghost_regnetx_016", pretrained, (2, 4, 10, 2), 24, kwargs)


@register_backbone
def g_ghost_regnetx_032(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-3.2GF: 10.5 million parameters, 1.8 GMACs."""
    return _sized("g_ghost_regnetx_032", pretrained, (2, 6, 15, 2), 48, kwargs)


@register_backbone
def g_ghost_regnetx_040(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-4GF: 15.7 million parameters, 2.2 GMACs."""
    return _sized("g_ghost_regnetx_040", pretrained, (2, 5, 14, 2), 40, kwargs)


@register_backbone
def g_ghost_regnetx_064(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-6.4GF: 18.0 million parameters, 4.1 GMACs."""
    return _sized("g_ghost_regnetx_064", pretrained, (2, 4, 10, 1), 56, kwargs)


@register_backbone
def g_ghost_regnetx_080(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-8GF: 24.6 million parameters, 4.2 GMACs."""
    return _sized("g_ghost_regnetx_080", pretrained, (2, 5, 15, 1), 120, kwargs)


@register_backbone
def g_ghost_regnetx_120(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-12GF: 30.6 million parameters, 7.4 GMACs."""
    return _sized("g_ghost_regnetx_120", pretrained, (2, 5, 11, 1), 112, kwargs)


@register_backbone
def g_ghost_regnetx_160(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-16GF: 32.4 million parameters, 9.0 GMACs."""
    return _sized("g_ghost_regnetx_160", pretrained, (2, 6, 13, 1), 128, kwargs)


@register_backbone
def g_ghost_regnetx_320(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """G-Ghost RegNetX-32GF: 62.8 million parameters, 17.2 GMACs."""
    return _sized("g_ghost_regnetx_320", pretrained, (2, 7, 13, 1), 168, kwargs)


@register_backbone
def test_ghost_regnet(pretrained: bool = False, **kwargs: Any) -> GGhostRegNet:
    """A small one for tests: plain stages with and without an identity shortcut, one ghost stage."""
    size = {"depths": (1, 2, 4, 1), "widths": (16, 24, 32, 40), "group_width": 8, "stem_width": 8}
    return _create("test_ghost_regnet", pretrained, **{**size, **kwargs})
