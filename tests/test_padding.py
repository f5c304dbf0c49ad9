"""What an adapter makes of a row does not depend on the row's padding, nor on the rows beside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from noise import shake

from adapterpack import Lily, LoRA, adapt, attach, compose, disabled, save
from adapterpack.adapter_methods import Method, methods
from adapterpack.errors import Unsupported

pytestmark = pytest.mark.fast

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
ROWS = [torch.tensor(row) for row in ([5, 0, 40, 3, 61], [9, 50, 2], [3])]
"""With the tokens that some methods act at."""
LENGTH = 7


def llama() -> Any:
    torch.manual_seed(1)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, num_key_value_heads=2)).eval()


@torch.no_grad()
def alone(model: Any, **inputs: Any) -> list[torch.Tensor]:
    return [model(input_ids=row[None], use_cache=False, **inputs).logits[0] for row in ROWS]


@torch.no_grad()
def padded(model: Any, left: bool) -> list[torch.Tensor]:
    """The logits of the rows' own tokens, padded on one side, in one batch."""
    ids, mask = torch.full((len(ROWS), LENGTH), 3), torch.zeros(len(ROWS), LENGTH, dtype=torch.long)
    spans = [slice(LENGTH - len(row), LENGTH) if left else slice(0, len(row)) for row in ROWS]
    for number, (row, span) in enumerate(zip(ROWS, spans, strict=True)):
        ids[number, span], mask[number, span] = row, 1
    places = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if left else {}
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **places).logits
    return [logits[number, span] for number, span in enumerate(spans)]


def require_equal(model: Any) -> None:
    right = alone(model)
    with disabled(model):
        plain = alone(model)
    size = max(float((one - other).abs().max()) for one, other in zip(right, plain, strict=True))
    assert size > 1e-3, "the adapter can be told from the base"
    for left in (False, True):
        for found, wanted in zip(padded(model, left), right, strict=True):
            assert (found - wanted).abs().max() <= 1e-4 * size, f"{left=}"


@pytest.mark.parametrize("method", methods().values(), ids=lambda method: method.name)
def test_no_row_depends_on_padding(method: Method) -> None:
    model = llama()
    require_equal(shake(adapt(model, method.examples[0]), 0.3))


@pytest.mark.parametrize("tree", ["split(a, b, sizes=2:1)", "xlora(a, b, hidden=32)", "arrow(a, b, top_k=1)"])
def test_no_row_depends_on_padding_under_a_router(tree: str) -> None:
    """Positions are counted from a row's own first token."""
    made = [save(shake(adapt(llama(), LoRA(r=2), name), 0.3, seed), None) for seed, name in enumerate("ab")]
    require_equal(attach(llama(), compose(made, tree=tree), "mixed", check_canary=False))


ENCODER = {"d_model": 32, "num_layers": 1, "num_heads": 4, "d_ff": 48, "d_kv": 8, "vocab_size": 96}
TARGETS = torch.tensor([7, 22, 31])


def t5() -> Any:
    torch.manual_seed(3)
    return hf.T5ForConditionalGeneration(
        hf.T5Config(**ENCODER, pad_token_id=0, decoder_start_token_id=0)
    ).eval()


@torch.no_grad()
def test_an_encoder_and_a_decoder_have_padding_of_their_own() -> None:
    """A layer between them that could be given either must be able to tell by their lengths."""
    model = shake(adapt(t5(), Lily(r=2)), 0.3)
    ids, mask, said = torch.full((2, 6), 3), torch.zeros(2, 6), torch.zeros(2, 5)
    decoder = torch.full((2, 5), 9)
    ids[0], mask[0], said[0], decoder[0] = torch.arange(6) + 4, 1, 1, torch.arange(5) + 40
    ids[1, :3], mask[1, :3], said[1, :2], decoder[1, :2] = TARGETS, 1, 1, torch.tensor([0, 12])
    both = model(
        input_ids=ids, attention_mask=mask, decoder_input_ids=decoder, decoder_attention_mask=said
    ).logits
    alone = model(input_ids=TARGETS[None], decoder_input_ids=decoder[1:, :2], use_cache=False).logits
    torch.testing.assert_close(both[1, :2], alone[0], rtol=0, atol=1e-4)
    with pytest.raises(Unsupported, match="may see either"):
        model(
            input_ids=ids[:, :5],
            attention_mask=mask[:, :5],
            decoder_input_ids=decoder,
            decoder_attention_mask=said,
        )


def test_a_new_adapter_that_sees_whole_rows_refuses_a_cache() -> None:
    model = shake(adapt(llama(), Lily(r=2)), 0.3)
    cache = model(input_ids=ROWS[0][None], use_cache=True).past_key_values
    with pytest.raises(Unsupported, match="must see all tokens at once"):
        model(input_ids=ROWS[1][None], past_key_values=cache)
