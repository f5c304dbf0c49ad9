"""A method in one file: what stands here is all that it takes to train, pack, merge and export with a new
adapter method.

The method scales: y' = o * (W (i * x) + b) + t, with a trained vector on the inputs, one on the outputs, and
a shift. It is (IA)^3 (Liu et al. 2022, arXiv 2205.05638) on both sides of one layer. Run it with `python
examples/new_method.py`. A package of yours brings its method by an entry point:
[project.entry-points."adapterpack.methods"] scaling = "new_method:scaling".
"""

from dataclasses import dataclass

from adapterpack.adapter_methods import Diagonal, Method, NormalForm, SiteConfig, Traits, register, zeros
from adapterpack.testing import prove


@dataclass(frozen=True)
class Scaling(SiteConfig):
    """The hyper-parameters, which are the method's whole schema: command line, YAML and manifest read these
    fields.
    """

    shifted: bool = True


def shapes(cfg, site):
    """Parameter name -> shape; a site says how wide the layer is."""
    vectors = {"input_scale": (site.in_features,), "output_scale": (site.out_features,)}
    return {**vectors, "shift": (site.out_features,)} if cfg.shifted else vectors


def normal_form(cfg, params, site):
    """The mathematics, once: torch runs these lines in training, numpy everywhere else. Forward and fold
    follow from them.
    """
    return NormalForm(
        pre=Diagonal(params["input_scale"]), output_scale=params["output_scale"], shift=params.get("shift")
    )


scaling = Method(
    name="scaling",
    summary="a trained scale on the inputs and outputs of each layer, and a shift",
    paper="https://arxiv.org/abs/2205.05638",
    config=Scaling,
    traits=Traits(additive=False, identity_at_init=True, row_separable=True, low_rank=False),
    shapes=shapes,
    init=zeros(shapes, input_scale=1, output_scale=1),  # a fresh adapter changes nothing, as a trait promises
    normal_form=normal_form,
    examples=(Scaling(), Scaling(shifted=False)),
)

if __name__ == "__main__":
    print(f"{prove(register(scaling))} promises hold")
