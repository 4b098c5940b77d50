"""Module paths of diffusers' U-Nets and text encoders <-> the flat names of kohya's files.

A flat name has "_" where a path has ".", so that reading one needs to know which words have an
underscore inside. For SDXL kohya names the blocks of the original U-Net (`input_blocks`,
`middle_block`, `output_blocks`), which are numbered through: with n layers a block,

    input_blocks  1 + b (n + 1) + l  = down_blocks b, layer l      (l = n: the downsampler)
    output_blocks     b (n + 1) + l  = up_blocks b, layer l
"""

from __future__ import annotations

import re

from diffkit.errors import UserError

__all__ = ["dotted", "kohya_path", "unet_path"]

# Module names of diffusers and transformers that have an underscore inside.
_WORDS = (
    "add_embedding|conv_in|conv_out|conv_shortcut|down_blocks|linear_1|linear_2|k_proj|mid_block|"
    "out_proj|position_embedding|proj_in|proj_out|q_proj|self_attn|text_model|text_projection|"
    "time_emb_proj|time_embedding|to_k|to_out|to_q|to_v|token_embedding|transformer_blocks|"
    "up_blocks|v_proj"
)
_WORD = re.compile(rf"({_WORDS}|[^_]+)(?:_|$)")

# Parts of a ResNet block, and single modules, in the original U-Net's names.
_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SINGLE = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding.linear_1",
    "time_embed_2": "time_embedding.linear_2",
    "label_emb_0_0": "add_embedding.linear_1",
    "label_emb_0_2": "add_embedding.linear_2",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_RESNET_OUT = {path: name for name, path in _RESNET.items()}
_SINGLE_OUT = {path: name for name, path in _SINGLE.items()}
_MIDDLE_OUT = {path: name for name, path in _MIDDLE.items()}


def unet_path(name: str, layers_per_block: int = 2) -> str:
    """kohya's flat U-Net module name (diffusers' or the original) -> diffusers' module path.

    "input_blocks_4_1_proj_in" -> "down_blocks.1.attentions.0.proj_in"
    """
    if name in _SINGLE:
        return _SINGLE[name]
    if match := re.fullmatch(r"middle_block_([012])_(.+)", name):
        return f"mid_block.{_MIDDLE[match[1]]}.{_inner(match[2])}"
    if match := re.fullmatch(r"(input|output)_blocks_(\d+)_(\d)_(.+)", name):
        return _block_path(match[1], int(match[2]), int(match[3]), match[4], layers_per_block)
    return dotted(name)


def kohya_path(path: str, layers_per_block: int = 2) -> str:
    """diffusers' U-Net module path -> the original U-Net's flat name; inverse of `unet_path`.

    An upsampler is the third part of its output block: in SDXL all blocks with one have attention.
    """
    if path in _SINGLE_OUT:
        return _SINGLE_OUT[path]
    size = layers_per_block + 1
    if match := re.fullmatch(r"mid_block\.((?:resnets|attentions)\.\d)\.(.+)", path):
        return f"middle_block_{_MIDDLE_OUT[match[1]]}_{_outer(match[2])}"
    if match := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv", path):
        return f"input_blocks_{(int(match[1]) + 1) * size}_0_op"
    if match := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv", path):
        return f"output_blocks_{int(match[1]) * size + layers_per_block}_2_conv"
    match = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.+)", path)
    if match is None:
        raise UserError(f"{path}: this module has no name in the original U-Net")
    index = int(match[2]) * size + int(match[4])
    name = f"input_blocks_{index + 1}" if match[1] == "down" else f"output_blocks_{index}"
    return f"{name}_{('resnets', 'attentions').index(match[3])}_{_outer(match[5])}"


def dotted(name: str) -> str:
    """Flat name -> path: "layers_0_self_attn_q_proj" -> "layers.0.self_attn.q_proj"."""
    return ".".join(_WORD.findall(name))


def _block_path(kind: str, index: int, part: int, rest: str, layers_per_block: int) -> str:
    block, layer = divmod(index - (kind == "input"), layers_per_block + 1)
    side = "down_blocks" if kind == "input" else "up_blocks"
    if rest == "op":
        return f"{side}.{block}.downsamplers.0.conv"
    if rest == "conv":
        return f"{side}.{block}.upsamplers.0.conv"
    return f"{side}.{block}.{('resnets', 'attentions')[part]}.{layer}.{_inner(rest)}"


def _inner(name: str) -> str:
    return _RESNET.get(name) or dotted(name)


def _outer(path: str) -> str:
    return _RESNET_OUT.get(path) or path.replace(".", "_")
