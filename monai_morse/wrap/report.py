"""What was done to a bundle and what could not be."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["WrapReport"]


@dataclass
class WrapReport:
    """What :func:`monai_morse.wrap.wrap_bundle` did, and what it could not convert: two lists of lines."""

    done: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left = ["not converted:", *(f"  - {line}" for line in self.left)] if self.left else ["everything was converted"]
        return "\n".join([*self.done, *left])
