"""Which packs are of one base when they are composed: equal bytes, or a variant that one of them declares."""

from __future__ import annotations

import numpy as np
import pytest
from msgspec.structs import replace

from adapterpack import LoRA, compose
from adapterpack.adapter_methods import Site, get
from adapterpack.errors import BaseMismatch
from adapterpack.manifest import manifest as m
from adapterpack.manifest.structs import Variant
from adapterpack.pack.pack import Pack, build

FP32 = m.Base("org/base", None, "llama", "bfp1:" + "1" * 64, "bfp1:" + "a" * 64)
BF16 = m.Base("org/base-bf16", None, "llama", "bfp1:" + "2" * 64, "bfp1:" + "b" * 64)
DECLARING = replace(FP32, variants=(Variant("dtype_cast", BF16.structure, BF16.content),))


def pack(name: str, base: m.Base) -> Pack:
    """A LoRA at one site, of random factors."""
    rng = np.random.default_rng(len(name))
    params = {
        "lora_A": rng.normal(size=(2, 5)).astype(np.float32),
        "lora_B": rng.normal(size=(3, 2)).astype(np.float32),
    }
    return build(
        name,
        get("lora"),
        {Site("layers.0.q", 5, 3): (LoRA(r=2, alpha=2), params)},
        task=m.PackTask("text-generation"),
        base=base,
    )


@pytest.mark.parametrize("turned", [False, True])
def test_a_declared_variant_is_the_same_base(turned: bool) -> None:
    """One pack of the float32 base that declares its bfloat16 cast, one trained on the cast: composed, in any
    order, for the first base.
    """
    packs = [pack("one", DECLARING), pack("three", BF16)]
    composed = compose(packs[::-1] if turned else packs, rule="linear", weights=[0.5, 0.5])
    assert composed.manifest.base == DECLARING


@pytest.mark.parametrize(
    "bases",
    [
        (FP32, BF16),  # nobody says that one is the other
        (DECLARING, replace(BF16, content="bfp1:" + "c" * 64)),  # of the variant's shapes, with other weights
        (DECLARING, replace(BF16, content=None)),  # of the variant's shapes, and nothing shows its weights
        (FP32, replace(FP32, content="bfp1:" + "c" * 64)),
        (m.Base(model_type="llama"), m.Base(model_type="bert")),
    ],
    ids=["undeclared", "other weights", "unknown weights", "fine-tune", "model types"],
)
def test_other_bases_are_refused(bases: tuple[m.Base, m.Base]) -> None:
    with pytest.raises(BaseMismatch, match="different bases"):
        compose([pack("one", bases[0]), pack("three", bases[1])], rule="linear")


def test_a_base_that_is_known_by_name_alone_is_no_other() -> None:
    """Imported packs know no digests: what they do not know is not compared, and the base that is known best
    is kept.
    """
    assert (
        compose([pack("one", m.Base("org/base")), pack("three", FP32)], rule="linear").manifest.base == FP32
    )
