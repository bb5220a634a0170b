"""A whole pipeline in one file, in the naming of the original Stable Diffusion checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from loratool.base.layout import Headers, Layout
from loratool.names.families import claiming

__all__ = ["LAYOUT"]

BACKBONE: Final = "model.diffusion_model."
ENCODER: Final = "cond_stage_model.transformer."


class Original(Layout):
    """A backbone below ``model.diffusion_model``, perhaps with its text encoder beside it."""

    name = "original"

    def claims(self, headers: Headers) -> int:
        return 3 if any(module.startswith(BACKBONE) for module in headers.modules) else 0

    def paths(self, headers: Headers) -> Mapping[str, str]:
        locals_ = [m.removeprefix(BACKBONE) for m in headers.modules if m.startswith(BACKBONE)]
        family = next(
            (f for f in claiming(locals_) if sum(map(f.has, locals_)) > len(locals_) // 2), None
        )
        component = family.backbone if family else "unet"
        found = {}
        for local in locals_:
            fusion = family.from_native(local) if family else None
            is_one = fusion is not None and len(fusion.modules) == 1 and not fusion.swapped
            name = fusion.modules[0] if fusion is not None and is_one else local
            found[f"{BACKBONE}{local}"] = f"{component}.{name}"
        for module in headers.modules:
            if module.startswith(ENCODER):
                found[module] = f"text_encoder.{module.removeprefix(ENCODER)}"
        return found

    def components(self, headers: Headers) -> tuple[str, ...]:
        paths = self.paths(headers).values()
        return tuple(dict.fromkeys(path.partition(".")[0] for path in paths))


LAYOUT = Original()
