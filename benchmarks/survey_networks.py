"""The networks of the survey, untrained.

They are of torchvision, timm, Hugging Face, segmentation_models_pytorch, MONAI and diffusers. Each has an example. Only
torchvision is a dependency of the package.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torchvision
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_prune.structure import Call, TracedModel

#: timm's networks, many kinds and small ones; timm is no dependency of the package (``pip install timm``).
TIMM = (
    *("resnet26d", "resnetv2_50", "res2net50_26w_4s", "resnest14d", "skresnet18", "seresnet50", "ecaresnet26t"),
    *("dpn68", "dla34", "hrnet_w18_small", "cspresnet50", "darknet53", "ese_vovnet19b_dw", "xception41"),
    *("inception_v4", "inception_resnet_v2", "ghostnet_100", "mobilenetv4_conv_small", "tf_efficientnet_b0"),
    *("mixnet_s", "rexnet_100", "repvgg_a0", "nfnet_l0", "convnextv2_atto", "convmixer_768_32", "mobileone_s0"),
    *("fastvit_t8", "edgenext_xx_small", "efficientformer_l1", "poolformer_s12", "levit_128s", "mobilevit_xxs"),
    *("deit_tiny_patch16_224", "beit_base_patch16_224", "mixer_s32_224", "resmlp_12_224", "gmlp_s16_224"),
    *("pvt_v2_b0", "xcit_nano_12_p16_224", "tiny_vit_5m_224", "focalnet_tiny_srf", "davit_tiny"),
)

#: Decoders of segmentation_models_pytorch, with a ResNet-18 as encoder (SegFormer: its own).
SEGMENTATION = (
    *("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3", "DeepLabV3Plus", "PAN", "UPerNet"),
    "Segformer",
)

#: Networks of MONAI for volumes, and their options beside `_VOLUMES`.
MONAI: dict[str, dict[str, Any]] = {
    "BasicUNet": {},
    "UNet": {"channels": (16, 32, 64), "strides": (2, 2), "num_res_units": 2},
    "AttentionUnet": {"channels": (16, 32, 64), "strides": (2, 2)},
    "DynUNet": {"kernel_size": (3, 3, 3), "strides": (1, 2, 2), "upsample_kernel_size": (2, 2), "res_block": True},
    "SegResNet": {},
    "VNet": {},
    "HighResNet": {},
    "UNETR": {"img_size": (32, 32, 32), "hidden_size": 192, "mlp_dim": 768},
    "SwinUNETR": {"feature_size": 12},
    "DenseNet121": {},
    "SEResNet50": {},
    "ViT": {"img_size": (32, 32, 32), "patch_size": (8, 8, 8), "classification": True, "num_classes": 3},
}
_VOLUMES = {"spatial_dims": 3, "in_channels": 1, "out_channels": 3}

_ATTENTION = {"num_attention_heads": 4, "attention_head_dim": 8, "num_layers": 2, "in_channels": 4, "sample_size": 8}
_IMAGES = {"block_out_channels": (32, 64), "layers_per_block": 1, "norm_num_groups": 8}

#: Small networks of diffusers and their options.
DIFFUSERS: dict[str, dict[str, Any]] = {
    "UNet2DModel": {
        **_IMAGES,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet2DConditionModel": {
        **_IMAGES,
        "attention_head_dim": 8,
        "cross_attention_dim": 16,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "AutoencoderKL": {
        **_IMAGES,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "DiTTransformer2DModel": {**_ATTENTION, "num_embeds_ada_norm": 10, "out_channels": 8},
    "PixArtTransformer2DModel": {
        **_ATTENTION,
        "out_channels": 8,
        "cross_attention_dim": 32,
        "caption_channels": 16,
        "use_additional_conditions": False,
    },
    "SD3Transformer2DModel": {
        **_ATTENTION,
        "patch_size": 2,
        "joint_attention_dim": 16,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 16,
        "out_channels": 4,
    },
    "FluxTransformer2DModel": {
        "in_channels": 4,
        "num_layers": 1,
        "num_single_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "joint_attention_dim": 16,
        "pooled_projection_dim": 16,
        "axes_dims_rope": (4, 4, 8),
    },
}

#: What torchvision's detectors choose their boxes from.
_HEADS = ("head", "rpn.head", *(f"roi_heads.{part}_predictor" for part in ("box", "mask", "keypoint")))

#: Side of the images that detectors get, and that those that resize them make of them.
_DETECTION = 128

#: The folder of torchvision that a network's builder lies in, and its family here.
_FOLDERS = {"segmentation": "segmentation", "detection": "detection", "video": "video", "optical_flow": "optical flow"}


class Placed(nn.Module):
    """A network of diffusers for tokens of an image of 2 x 3 and of a text, at their places."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.image = torch.tensor([[0.0, row, column] for row in range(2) for column in range(3)]).double()

    def forward(self, tokens: Tensor, **options: Tensor) -> Tensor:
        text = torch.zeros(options["encoder_hidden_states"].shape[1], 3).double()
        return self.model(tokens, img_ids=self.image, txt_ids=text, return_dict=False, **options)[0]  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """PyTorch's own transformer encoder at the size of BERT (base), with embeddings and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30522, 768), nn.Parameter(0.02 * torch.randn(128, 768))
        layer = nn.TransformerEncoderLayer(768, 12, 3072, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 12)
        self.head = nn.Linear(768, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits ``(batch, 2)`` of ``tokens`` ``(batch, positions)``."""
        hidden: Tensor = self.layers(self.words(tokens) + self.places[: tokens.shape[1]])
        logits: Tensor = self.head(hidden[:, 0])
        return logits


#: Thirty more, drawn from all names of timm 1.0.31 by ``random.Random(0).sample``, those of at most 60 M parameters.
DRAWN = (
    "repvit_m2_3",
    "convnext_atto_rms",
    "tf_efficientnetv2_b1",
    "swinv2_cr_small_ns_224",
    "resnet26t",
    "mobilevitv2_150",
    "swin_s3_tiny_224",
    "iformer_l",
    "efficientnetv2_rw_m",
    "mobilenetv1_100",
    "efficientnetv2_rw_s",
    "vit_small_patch16_rope_224",
    "efficientvit_b2",
    "cspresnet50w",
    "swiftformer_l1",
    "regnetx_006",
    "hgnet_tiny",
    "xcit_small_24_p8_384",
    "sam2_hiera_small",
    "maxvit_rmlp_pico_rw_256",
    "crossvit_tiny_240",
    "caformer_s18",
    "dla102x",
    "resnet101s",
    "vit_relpos_medium_patch16_cls_224",
    "test_convnext2",
    "pit_s_224",
    "levit_conv_384",
    "nf_resnet26",
    "cs3darknet_focus_l",
)


@dataclass(frozen=True)
class Network:
    """A network and how it is run.

    Attributes:
        model: The network.
        args: Arguments in eval mode, one sample (two where one would be too few for batch norms).
        train: Arguments in train mode, if they are others.
        kwargs: Keyword arguments in both.
        heads: Modules whose outputs are compared instead of the network's: what detectors choose from them hangs on
            the order of scores, and untrained ones have many that are equal.
    """

    model: nn.Module
    args: tuple[Any, ...]
    train: tuple[Any, ...] | None = None
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    heads: tuple[str, ...] = ()

    def traced(self) -> TracedModel:
        """What the engine needs to know."""
        calls = (
            Call(self.args, self.kwargs),
            Call(self.args if self.train is None else self.train, self.kwargs, training=True),
        )
        return TracedModel(self.model, calls)

    def __call__(self, *, training: bool = False) -> list[Tensor]:
        """Every tensor of the output."""
        args = self.train if training and self.train is not None else self.args
        found: list[Any] = []
        watched = [m for name, m in self.model.named_modules() if name in self.heads and not training]
        handles = [m.register_forward_hook(lambda _module, _args, out: found.append(out)) for m in watched]
        out = self.model.train(training)(*args, **self.kwargs)
        for handle in handles:
            handle.remove()
        leaves = tree_leaves(found or out)
        return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def catalogue() -> dict[str, list[str]]:
    """Names by family: all that torchvision has, some of timm's, encoders of text, decoders, networks for volumes."""
    families: dict[str, list[str]] = {"classification": [], **{family: [] for family in _FOLDERS.values()}}
    for name in torchvision.models.list_models():
        folder = torchvision.models.get_model_builder(name).__module__.split(".")[2]
        if folder != "quantization":
            families[_FOLDERS.get(folder, "classification")].append(name)
    return {
        **families,
        "timm": list(TIMM),
        "timm, drawn": list(DRAWN),
        "encoders": ["nn.TransformerEncoder", "BertModel"],
        "segmentation_models_pytorch": [f"smp.{name}" for name in SEGMENTATION],
        "MONAI": [f"monai.{name}" for name in MONAI],
        "diffusers": [f"diffusers.{name}" for name in DIFFUSERS],
    }


def build(name: str, family: str) -> Network:
    """An untrained network in float64, and an example."""
    torch.manual_seed(0)
    if family.startswith("timm"):
        import timm

        network = timm.create_model(name).double()
        config = network.default_cfg
        return Network(network, (_image(2, config["input_size"][-1] if config.get("fixed_input_size") else 224),))
    builders = {
        "encoders": _encoder,
        "segmentation_models_pytorch": _decoder,
        "MONAI": _for_volumes,
        "diffusers": _denoiser,
    }
    if family in builders:
        return builders[family](name)
    model = torchvision_model(name).double()
    if family == "detection":
        images = [*_image(2, _DETECTION)]
        target = {"boxes": torch.tensor([[20.0, 30.0, 100.0, 110.0]]).double(), "labels": torch.tensor([1])}
        target["masks"] = torch.ones(1, _DETECTION, _DETECTION, dtype=torch.uint8)
        target["keypoints"] = torch.tensor([[[50.0, 60.0, 1.0]] * 17])  # it wants them in float32
        return Network(model, (images,), (images, [target, target]), heads=_HEADS)
    if family == "video":
        # S3D and MViT have the lengths of their pooling windows and positions built in.
        frames, side = (16, 224) if name.startswith(("s3d", "mvit")) else (8, 64)
        return Network(model, (torch.randn(1, 3, frames, side, side, dtype=torch.float64),))
    if family == "optical flow":
        return Network(model, tuple(_image(1, 128) for _ in range(2)))
    return Network(model, (_image(2, 299 if name == "inception_v3" else 128 if family == "segmentation" else 224),))


def torchvision_model(name: str) -> nn.Module:
    """An untrained torchvision network."""
    options: dict[str, Any] = {"weights": None}
    if any(part in name for part in ("rcnn", "retinanet", "fcos", "ssd", "deeplab", "fcn", "lraspp")):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    if any(part in name for part in ("rcnn", "retinanet", "fcos")):  # the others have their size built in
        options |= {"min_size": _DETECTION, "max_size": _DETECTION}
    if "rcnn" in name:  # few regions: their heads are most of the work
        options |= {"rpn_pre_nms_top_n_test": 50, "rpn_post_nms_top_n_test": 20, "box_detections_per_img": 5}
        options |= {"rpn_post_nms_top_n_train": 50, "box_batch_size_per_image": 32}
    return torchvision.models.get_model(name, **options)


def _encoder(name: str) -> Network:
    tokens = torch.randint(30522, (2, 32))
    if name == "nn.TransformerEncoder":
        return Network(Encoder().double(), (tokens,))
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(attn_implementation="eager")).double()
    return Network(model, (), kwargs={"input_ids": tokens, "return_dict": False})


def _decoder(name: str) -> Network:
    import segmentation_models_pytorch as smp

    name = name.removeprefix("smp.")
    encoder = "mit_b0" if name == "Segformer" else "resnet18"
    model = getattr(smp, name)(encoder, encoder_weights=None, classes=3).double()
    side = 160 if name == "Segformer" else 128  # else it would have as many channels as columns
    return Network(model, (_image(2, side),))


def _for_volumes(name: str) -> Network:
    from monai.networks import nets

    name = name.removeprefix("monai.")
    options = {**_VOLUMES, **MONAI[name]}
    if name == "ViT":
        del options["out_channels"]
    elif name.startswith("SE"):
        options["num_classes"] = options.pop("out_channels")
    model = getattr(nets, name)(**options).double()
    side = 64 if name == "SwinUNETR" else 32
    return Network(model, (torch.randn(2, 1, side, side, side, dtype=torch.float64),))


def _denoiser(name: str) -> Network:
    import diffusers

    name = name.removeprefix("diffusers.")
    model = getattr(diffusers, name)(**DIFFUSERS[name]).double()
    channels, side = (3, 16) if name in ("UNet2DModel", "AutoencoderKL") else (4, 8)
    image, step, text = (
        torch.randn(2, channels, side, side).double(),
        torch.tensor([3, 7]),
        torch.randn(2, 5, 16).double(),
    )
    given = {
        "UNet2DModel": {"timestep": step},
        "UNet2DConditionModel": {"timestep": step, "encoder_hidden_states": text},
        "AutoencoderKL": {},
        "DiTTransformer2DModel": {"timestep": step, "class_labels": step},
        "PixArtTransformer2DModel": {
            "timestep": step,
            "encoder_hidden_states": text,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        "SD3Transformer2DModel": {"timestep": step, "encoder_hidden_states": text, "pooled_projections": text[:, 0]},
    }
    if name == "FluxTransformer2DModel":
        options = {"encoder_hidden_states": text, "pooled_projections": text[:, 0], "timestep": step / 10}
        return Network(Placed(model), (torch.randn(2, 6, 4).double(),), kwargs=options)
    return Network(model, (image,), kwargs={**given[name], "return_dict": False})


def _image(n: int, side: int) -> Tensor:
    return torch.randn(n, 3, side, side, dtype=torch.float64)


def coordinates_in_double(family: str) -> contextlib.AbstractContextManager[Any]:
    """RAFT makes its coordinates in float32, whatever its weights are; within this context not."""
    flow = family == "optical flow"
    return mock.patch.object(Tensor, "float", Tensor.double) if flow else contextlib.nullcontext()


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Numbers that matter: no statistic, scale, bias or head that starts out constant stays so."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            start = 1.0 if tensor.flatten()[0] else 0.0  # a layer scale of 1e-6 would hide what it scales
            tensor.copy_(start + 0.1 * torch.randn_like(tensor))
