"""The little of torch that the builder asks for: two GPUs."""

from __future__ import annotations

__version__ = "0"


class cuda:  # noqa: N801
    device = 0

    @staticmethod
    def device_count() -> int:
        return 2

    @classmethod
    def set_device(cls, device: int) -> None:
        assert 0 <= device < cls.device_count()
        cls.device = device
