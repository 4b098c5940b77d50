"""diffusers' parameter names -> those of the original single-file Stable Diffusion checkpoints.

The inverse of what stock `from_single_file` does, for tiny models with the standard block layout;
written from the layout of the original code: input_blocks, middle_block, output_blocks.
"""

from __future__ import annotations

import re

from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _unet_key(key: str, layers: int) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if key.startswith(ours + "."):
            return theirs + key[len(ours) :]
    if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.*)", key):
        kind, i, rest = match.groups()
        return f"middle_block.{2 * int(i) if kind == 'resnets' else 1}.{_inner(kind, rest)}"
    match = re.fullmatch(r"(down|up)_blocks\.(\d)\.(\w+)\.(\d)\.(.*)", key)
    assert match, key
    way, block, kind, layer, rest = match.groups()
    b, i = int(block), int(layer)
    if way == "down":
        n = 1 + b * (layers + 1) + (layers if kind == "downsamplers" else i)
        side = "input_blocks"
    else:
        n = b * (layers + 1) + (layers if kind == "upsamplers" else i)
        side = "output_blocks"
    if kind == "downsamplers":
        return f"{side}.{n}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        # Behind the resnet, and behind the attention where the block has one.
        return f"{side}.{n}.UPSAMPLER.{rest}"
    return f"{side}.{n}.{0 if kind == 'resnets' else 1}.{_inner(kind, rest)}"


def _inner(kind: str, rest: str) -> str:
    if kind != "resnets":
        return rest
    name, end = rest.rsplit(".", 1)
    return f"{_RESNET[name]}.{end}"


def unet(tensors: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """A UNet2DConditionModel's state dict under the original names."""
    found = {_unet_key(key, layers): value for key, value in tensors.items()}
    places = {key.split(".UPSAMPLER")[0] for key in found if "UPSAMPLER" in key}
    for place in places:
        attention = any(key.startswith(f"{place}.1.") for key in found)
        found = {
            key.replace(f"{place}.UPSAMPLER", f"{place}.{2 if attention else 1}"): value
            for key, value in found.items()
        }
    return {f"model.diffusion_model.{key}": value for key, value in found.items()}


def vae(tensors: dict[str, Tensor], blocks: int) -> dict[str, Tensor]:
    """An AutoencoderKL's state dict under the original names; attention weights become 1x1."""
    found = {}
    for key, value in tensors.items():
        name = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
        name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
        name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(
            r"up_blocks\.(\d)\.(resnets|upsamplers\.0)",
            lambda m: f"up.{blocks - 1 - int(m[1])}." + {"r": "block", "u": "upsample"}[m[2][0]],
            name,
        )
        name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", name)
        if match := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(weight|bias)", name):
            name = f"{match[1]}mid.attn_1.{_VAE_ATTENTION[match[2]]}.{match[3]}"
            value = value[..., None, None] if value.ndim == 2 else value
        found[f"first_stage_model.{name}"] = value
    return found


def text_encoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A CLIPTextModel's state dict under the original names."""
    return {f"cond_stage_model.transformer.{_clip(key)}": v for key, v in tensors.items()}


def _clip(key: str) -> str:
    return key if key.startswith("text_model.") else f"text_model.{key}"
