"""Wraps the two parts of a vision-language model: images to features, and a decoder that reads them.

A model's own code between its modules packs images of several sizes, which no graph can do: the parts call
the modules, and :mod:`adapterpack.runtime.media.image_layouts` does the packing around the graphs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from inspect import signature
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...errors import Unsupported
from ...runtime import image_shape
from ...runtime.media import GRIDS, IMAGES, OFFSETS, PIXELS, SIZES, layout_of
from ...tasks import Arrays
from ...torch_adapters.canaries.inputs import features_of, sees_prompt_ahead, type_name
from .layer_state import LayerStates
from .torch_parts import CausalDecoder, Named, TorchPart

_PROJECTORS = frozenset({"multi_modal_projector", "connector", "embed_vision"})
"""transformers' names for the module between a vision tower and a language model."""
_SEGMENTS = "flash_by_segments"
"""The name of the attention of this module; transformers tells attention that takes the lengths of packed
sequences by ``flash`` in its name.
"""


class Vision(TorchPart):
    """The vision tower and projector of a vision-language model.

    Raises:
        Unsupported: the model's texts have no token for images, or it has no tower.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        tower = model.get_encoder("image")
        seen = hasattr(model.base_model, "get_image_features") and tower not in (None, model)
        if not seen or getattr(self.config, "image_token_id", None) is None:
            raise Unsupported(
                "export needs a model that puts images in the place of a token of the text",
                found=type(model).__name__,
                expected="image_token_id in its config, and a vision tower",
                remedy="run this model under torch",
            )
        if around := getattr(self.config, "visual_indicator_token_ids", None):
            raise Unsupported(
                "this model reads the tokens around an image from its vision tower, too",
                found=f"visual_indicator_token_ids: {around}",
                remedy="run this model under torch",
            )
        takes = signature(tower.forward).parameters
        asked = [
            name for name, one in takes.items() if one.default is one.empty and one.kind != one.VAR_KEYWORD
        ]
        if others := {*asked[1:]} - {"grid_thw", "pixel_position_ids"}:
            raise Unsupported(
                "the vision tower asks for inputs that are not made here",
                found=", ".join(sorted(others)),
                expected="images alone, or patches with their grid",
                remedy="run this model under torch",
            )
        self.patched, sized = "grid_thw" in takes, "image_sizes" in takes
        self.masked = "patch_attention_mask" in takes
        pooled = "pixel_position_ids" in takes
        if pooled:
            self.axes = {"pixel_values": ("patches", None)}
        elif self.patched:
            self.axes = {"pixel_values": ("patches", None)}
            for module in tower.modules():
                if "cu_seqlens" in signature(module.forward).parameters:
                    # the exporter patches the class with attention over windows of one size
                    module.forward = MethodType(type(module).forward, module)
        elif sized:
            self.axes = {"pixel_values": (None, None, "height", "width")}
        grid = [
            *["patch_positions"] * self.patched,
            *["pixel_position_ids"] * pooled,
            *["patch_windows", "window_order"] * hasattr(tower, "fullatt_block_indexes"),
            *["table_places", "table_weights"] * hasattr(tower, "num_grid_per_side"),
        ]
        self.layout = layout_of(self.config.to_dict(), ["pixel_values", *grid], sized)
        if self.layout.fixed:
            with torch.no_grad():
                one = self(torch.zeros(1, *image_shape(self.layout.vision), dtype=model.dtype))
            self.layout.positions = one["image_features"].shape[1]

    def example(self, count: int, rng: np.random.Generator) -> Arrays:
        """Returns random images as the model's processor gives them, of several sizes where it takes any."""
        images = self.layout.example(count, rng)
        return {PIXELS: images[PIXELS][None]} if self.masked else images

    def example_inputs(self, tensors: Named) -> Named:
        """Returns the inputs of the first pass over the example's images."""
        images = {name: tensors[name].numpy() for name in IMAGES if name in tensors}
        feeds, _ = next(self.layout.passes(self.layout.whole(images)))
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in feeds.items()}

    def later_inputs(self, tensors: Named) -> Named:
        """Returns the features of one image, for as many positions as the rows have image tokens, the types
        of tokens where the decoder reads them, and the offsets of positions.
        """
        ids, mask, features = (tensors[name] for name in ("input_ids", "attention_mask", "image_features"))
        token = self.config.image_token_id
        places = torch.arange(int((ids == token).sum(1).max())) % features.shape[1]
        seen = {"image_features": features[:1, places].repeat(len(ids), 1, 1)}
        grids = {name: tensors[name].numpy() for name in (GRIDS, SIZES) if name in tensors}
        if sees_prompt_ahead(self.inner):
            seen["token_type_ids"] = torch.zeros_like(ids)
        offsets = self.layout.offsets(ids.numpy(), mask.numpy(), token, grids)
        return seen if offsets is None else {**seen, OFFSETS: torch.from_numpy(offsets[:, :-1].copy())}

    def forward(
        self, pixel_values: Tensor, pixel_position_ids: Tensor | None = None, **grid: Tensor
    ) -> Named:
        """Returns ``image_features`` ``[rows of pixel_values, positions, hidden]``; of patches, which are one
        image, ``[1, positions, hidden * n]`` with those for the first layers of the decoder after the others.
        A model's feature for the end of a line follows those of each row.
        """
        if self.patched:
            return {"image_features": self._of_patches(pixel_values, **grid)}
        width = self.config.get_text_config().hidden_size
        if pixel_position_ids is not None:
            with _pooled_by_blocks(self.inner.get_encoder("image")):
                features = self._project(pixel_values[None], image_position_ids=pixel_position_ids[None])
            return {"image_features": features.reshape(1, -1, width)}
        features = self._project(pixel_values)
        features = features.reshape(pixel_values.shape[0], -1, width)
        line = next((one for name, one in self.inner.named_parameters() if "image_newline" in name), None)
        if line is not None:
            features = torch.cat([features, line.to(features.dtype).expand(features.shape[0], 1, -1)], 1)
        return {"image_features": features}

    def _of_patches(
        self,
        pixels: Tensor,
        patch_positions: Tensor,
        patch_windows: Tensor | None = None,
        window_order: Tensor | None = None,
        table_places: Tensor | None = None,
        table_weights: Tensor | None = None,
    ) -> Tensor:
        tower = self.inner.get_encoder("image")
        grid = torch.cat([patch_positions.new_zeros(1), patch_positions.amax(0)])[None] + 1
        with _attention_by_segments(tower):
            output = tower(
                pixels,
                grid_thw=grid,
                position_ids=patch_positions,
                cu_seqlens=patch_positions.new_zeros(1),
                max_seqlen=1,
                **({} if patch_windows is None else {"cu_window_seqlens": patch_windows}),
                **({} if window_order is None else {"window_index": window_order, "max_window_seqlen": 1}),
                **({} if table_places is None else {"interp_indices": table_places}),
                **({} if table_weights is None else {"interp_weights": table_weights}),
            )
        return torch.cat([output.pooler_output, *getattr(output, "deepstack_features", ())], -1)[None]

    def _project(self, pixels: Tensor, **places: Tensor) -> Tensor:
        """Runs the model's own code up to the output of its projector."""
        base = self.inner.base_model
        takes = signature(base.get_image_features).parameters
        name, projector = next(
            ((name, one) for name, one in base.named_children() if name in _PROJECTORS), (None, None)
        )
        if self.masked and projector is not None:
            tower = self.inner.get_encoder("image")
            side = tower.config.image_size // tower.config.patch_size
            mask = torch.ones((pixels.shape[0], side, side), dtype=torch.bool)
            return projector(tower(pixels, patch_attention_mask=mask).last_hidden_state)
        sizes = {}
        if "image_sizes" in takes and takes["image_sizes"].default is not None:
            sizes = {"image_sizes": [tuple(pixels.shape[-2:])]}
        if projector is None:
            return features_of(base.get_image_features(pixel_values=pixels, **sizes))

        def stop(*given: Tensor, **named: Tensor) -> None:
            raise _Projected(projector(*given, **named))

        # found before the module of that name, which is no attribute of its own
        base.__dict__[name] = stop
        try:
            base.get_image_features(pixel_values=pixels, **sizes, **places)
        except _Projected as reached:
            return reached.features
        finally:
            del base.__dict__[name]
        raise Unsupported(
            "images do not pass the model's projector where it makes their features", found=name
        )


class SeeingDecoder(CausalDecoder):
    """A causal language model whose image tokens are replaced, in order, by the features of the row's
    images.

    Tokens of an image may attend to later ones of it, as far as one pass reads them; or those of a prompt,
    which then have the type 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        text = model.config.get_text_config()
        self.types = type_name(model)
        by_image = getattr(text, "use_bidirectional_attention", None) == "vision"
        self.ahead = self.types == "token_type_ids" or by_image

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past_key_values: LayerStates,
        image_features: Tensor,
        position_offsets: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> Named:
        """Takes ``image_features`` ``[batch, image_positions, hidden * n]``, at least as many for each row as
        it has image tokens, of which all but the first ``hidden`` are added after the first layers; and
        ``position_offsets`` ``[batch, sequence, 3]``, where the model counts in time, height and width.
        ``token_type_ids`` are 0 at tokens of a prompt that attend to all of it.
        """
        is_image = input_ids == self.config.image_token_id
        table = self.inner.get_input_embeddings()
        count = image_features.shape[1]
        ids = input_ids
        others = {}
        if "per_layer_inputs" in self.takes:
            text = self.config.get_text_config()
            # to the model, tokens of pictures and sounds without one are padding
            named = (getattr(self.config, f"{kind}_token_id", None) for kind in ("image", "video", "audio"))
            for token in named:
                ids = ids if token is None else torch.where(ids == token, text.pad_token_id, ids)
            if text.hidden_size_per_layer_input:
                others = {"per_layer_inputs": self.inner.get_decoder().get_per_layer_inputs(ids)}
        elif self.config.image_token_id >= table.weight.shape[0]:
            ids = torch.where(is_image, 0, ids)
        embeds = table(ids)
        none = image_features.new_zeros((image_features.shape[0], 1, image_features.shape[2]))
        place = torch.where(is_image, is_image.to(torch.int64).cumsum(1) - 1, count)
        seen = place < count  # a model may choose the token of images in an answer, which has none
        place = torch.where(seen, place, count)
        taken = torch.cat([image_features, none], 1).gather(
            1, place[..., None].expand(-1, -1, image_features.shape[2])
        )
        taken, *deeper = taken.split(embeds.shape[-1], -1)
        places = position_ids
        if position_offsets is not None:
            places = position_ids[None] + position_offsets.permute(2, 0, 1)
        types = is_image.to(torch.int64) if token_type_ids is None else token_type_ids
        # what earlier passes read is looked back at
        before = (attention_mask.shape[1] - types.shape[1], 0)
        types = pad(types, before, value=int(token_type_ids is not None))
        with _added_after(self.inner, deeper), self._looking_ahead(attention_mask, types):
            return self.run(
                attention_mask,
                places,
                past_key_values,
                inputs_embeds=torch.where(seen[..., None], taken, embeds),
                **others,
            )

    @contextlib.contextmanager
    def _looking_ahead(self, attention_mask: Tensor, types: Tensor) -> Iterator[None]:
        """Gives the decoder the masks that its model makes for tokens of these types ``[batch, total]``,
        inside the block; the model's own code takes types of a first pass only.
        """

        def masked(
            decoder: nn.Module, given: object, inputs: dict[str, Any]
        ) -> tuple[object, dict[str, Any]]:
            made = self.inner.create_masks_for_generate(
                self.config,
                inputs["inputs_embeds"],
                attention_mask,
                position_ids=None,
                **{str(self.types): types, self.cache: inputs[self.cache]},
            )
            return given, {**inputs, "attention_mask": made}

        with contextlib.ExitStack() as hooks:
            if self.ahead:
                hook = self.inner.get_decoder().register_forward_pre_hook(masked, with_kwargs=True)
                hooks.callback(hook.remove)
            yield


class _Projected(Exception):
    """Carries what a projector gave out of the code that would pack it."""

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.features = features


@contextlib.contextmanager
def _added_after(model: PreTrainedModel, features: list[Tensor]) -> Iterator[None]:
    """Adds ``features`` to the outputs of a decoder's first layers, one after another, inside the block; they
    are 0 at tokens of text.
    """
    layers = getattr(model.get_decoder(), "layers", ())
    with contextlib.ExitStack() as hooks:
        for layer, added in zip(layers, features, strict=False):

            def add(
                module: nn.Module,
                given: object,
                output: Tensor,
                added: Tensor = added,
            ) -> Tensor:
                return output + added

            hooks.callback(layer.register_forward_hook(add).remove)
        yield


@contextlib.contextmanager
def _pooled_by_blocks(tower: PreTrainedModel) -> Iterator[None]:
    """Makes a tower's pooler take patches whose blocks lie together, without padding."""
    pooler = tower.pooler
    size = tower.config.pooling_kernel_size

    def pool(hidden_states: Tensor, **_: object) -> tuple[Tensor, object]:
        blocks = hidden_states.reshape(-1, size**2, hidden_states.shape[-1])
        places = torch.cartesian_prod(torch.arange(size), torch.arange(size)).expand(blocks.shape[0], -1, -1)
        none = torch.zeros(blocks.shape[:2], dtype=torch.bool)
        pooled, _ = type(pooler).forward(pooler, blocks, places, none, 1)
        return pooled.transpose(0, 1), ...  # the tower takes all of them

    pooler.forward = pool
    try:
        yield
    finally:
        del pooler.forward


@contextlib.contextmanager
def _attention_by_segments(tower: PreTrainedModel) -> Iterator[None]:
    """Makes a tower's attention read the segment of each patch in place of the segments' ends."""
    ALL_ATTENTION_FUNCTIONS.register(_SEGMENTS, _by_segments)
    before = tower.config._attn_implementation
    tower.config._attn_implementation = _SEGMENTS
    try:
        yield
    finally:
        tower.config._attn_implementation = before


def _by_segments(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **others: object,
) -> tuple[Tensor, None]:
    """Attention inside segments, given by each patch's own; one number stands for a single segment."""
    same = None if cu_seq_lens_q.shape[0] == 1 else cu_seq_lens_q[:, None] == cu_seq_lens_q[None]
    output = scaled_dot_product_attention(query, key, value, attn_mask=same, scale=scaling)
    return output.transpose(1, 2), None
