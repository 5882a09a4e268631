"""An encoder that computes on the CPU beside a model, as fast as the processor can without saying anything else: in
bfloat16 where that is multiplied, with weights that lie as the multiplication wants them."""

from __future__ import annotations

from typing import Any

ROWS = 64  # tokens of a prompt, as they are cut: what the weights are laid out for


def quick(model: Any) -> Any:
    """The model itself, changed. A processor without bfloat16 computes it as it is; with it the features differ by
    about a hundredth of what they are."""
    import torch

    if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
        model.to(torch.bfloat16)
        with torch.inference_mode():
            _pack(model)
    return model


def _pack(module: Any) -> None:
    """Else each multiplication would lay its weights out anew, which for a single prompt costs a fifth of the time."""
    import torch

    class Packed(torch.nn.Module):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self, linear: Any) -> None:
            super().__init__()
            self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), ROWS)
            self.bias = None if linear.bias is None else linear.bias.detach()

        def forward(self, x: Any) -> Any:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")

    for name, child in list(module.named_children()):
        if type(child) is torch.nn.Linear:
            setattr(module, name, Packed(child))
        else:
            _pack(child)
