"""How Triton's programs divide feature maps (B, C, H, W) among themselves."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["Tiles", "flat_strides", "flattenable"]

_ENTRIES = 2048  # of a tile: 8 for each thread of 8 warps, 16 bytes of a half-precision load


@dataclass(frozen=True)
class Tiles:
    """A tile is `channels` x `pixels`, both powers of two."""

    channels: int
    pixels: int

    @classmethod
    def rows(cls, maps: Tensor) -> Tiles:
        """For sums over the pixels of each channel: along the axis that lies close in memory."""
        if _channels_last(maps):
            return cls._near_channels(maps)
        return cls(1, min(_ENTRIES, _power_of_two(maps.shape[2] * maps.shape[3])))

    @classmethod
    def columns(cls, maps: Tensor) -> Tiles:
        """For sums over the channels of each pixel: a program goes through all channels."""
        if _channels_last(maps):
            return cls._near_channels(maps)
        return cls(8, min(_ENTRIES // 8, _power_of_two(maps.shape[2] * maps.shape[3])))

    @classmethod
    def _near_channels(cls, maps: Tensor) -> Tiles:
        channels = min(64, _power_of_two(maps.shape[1]))
        pixels = min(_ENTRIES // channels, _power_of_two(maps.shape[2] * maps.shape[3]))
        return cls(channels, pixels)

    @property
    def warps(self) -> int:
        """Warps of a program: 8 entries a thread."""
        return max(1, min(8, self.channels * self.pixels // 256))


def flattenable(maps: Tensor) -> Tensor:
    """The maps, copied only where rows and columns are not one axis of equal steps."""
    one = maps.shape[2] == 1 or maps.stride(2) == maps.shape[3] * maps.stride(3)
    return maps if one else maps.contiguous()


def flat_strides(maps: Tensor | None) -> tuple[int, int, int]:
    """Steps from sample to sample, channel to channel and pixel to pixel."""
    if maps is None:
        return 0, 0, 0
    return maps.stride(0), maps.stride(1), maps.stride(2) if maps.shape[3] == 1 else maps.stride(3)


def _channels_last(maps: Tensor) -> bool:
    return maps.shape[1] > 1 and maps.stride(1) == 1


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
