"""Equal packs give equal bytes: whatever the number of threads, the order of the packs, and what else is
composed beside a site.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from threading import Barrier, Thread

import numpy as np
import pytest
from rule_laws import Ours
from threadpoolctl import threadpool_info

from adapterpack import LoRA
from adapterpack.adapter_methods import Site
from adapterpack.adapter_methods.lora import lora
from adapterpack.composing.rules.rule import RULES, rules
from adapterpack.io import safetensors
from adapterpack.io.threads import one_thread_each
from adapterpack.manifest import manifest as m
from adapterpack.pack.pack import Pack, build

pytestmark = pytest.mark.fast
SITES = (Site("a", 260, 300), Site("b", 170, 140), Site("c", 170, 140), Site("d", 170, 140))
WIDE = LoRA(r=24, alpha=8)
SCRIPT = """
import json, os, sys
if sys.argv[2] == "pinned":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
sys.path.insert(0, sys.argv[1])
from test_compose_bytes import hashes
json.dump(hashes(), sys.stdout)
"""


def packs_of(rule: str, sites: tuple[Site, ...] = SITES) -> tuple[list[Pack], list[float]]:
    """Wide enough that a library would share one product among threads; at ``c`` one pack has a row of A
    twice, so that its decomposition takes another way than its neighbours' of the same shape.
    """
    weights = [abs(w) for w in Ours(rule).weights]
    packs = []
    for number in range(len(weights)):
        adapters = {}
        for site in sites:
            rng = np.random.default_rng([number, SITES.index(site)])
            A, B = (
                rng.standard_normal((24, site.in_features or 0)),
                rng.standard_normal((site.out_features or 0, 24)),
            )
            A, B = A + 3, B + 3  # all have something in common
            if site.path == "c":
                A[1] = A[0]
            adapters[site] = WIDE, {"lora_A": A.astype(np.float32), "lora_B": B.astype(np.float32)}
        packs.append(
            build(f"p{number}", lora, adapters, task=m.PackTask("text-generation"), base=m.Base("org/base"))
        )
    return packs, weights


def composed(rule: str, packs: list[Pack], weights: list[float], **params: str) -> dict[str, str]:
    """Tensor name to sha256."""
    rank = 20 if RULES[rule].cut else None
    made = Ours(rule).pack(packs, weights, params or None, rank=rank)
    return {name: entry.sha256 for name, entry in made.manifest.tensors.items()}


def hashes() -> dict[str, dict[str, str]]:
    """Of every rule."""
    return {rule: composed(rule, *packs_of(rule)) for rule in rules()}


@pytest.mark.long
def test_threads_do_not_show() -> None:
    """In processes with one thread and with two, on one core, and here with what there is, every rule makes
    the same tensors.
    """
    found = [hashes()]
    for count, cores in (("1", "all"), ("2", "pinned" if hasattr(os, "sched_setaffinity") else "all")):
        threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), count)
        run = subprocess.run(
            [sys.executable, "-c", SCRIPT, str(Path(__file__).parent), cores],
            env={**os.environ, **threads},
            check=True,
            capture_output=True,
        )
        found.append(json.loads(run.stdout))
    for rule in rules():
        assert found[0][rule] == found[1][rule] == found[2][rule], rule


@pytest.mark.sampled(3)
@pytest.mark.parametrize("rule", rules())
def test_order_and_company_do_not_show(rule: str) -> None:
    """The packs the other way round; and a site alone beside the same site among others, where each is
    measured for itself.
    """
    packs, weights = packs_of(rule)
    whole = composed(rule, packs, weights)
    assert composed(rule, packs[::-1], weights[::-1]) == whole
    params = {"scope": "tensor"} if "scope" in RULES[rule].parameters else {}
    among = composed(rule, packs, weights, **params)
    for site in (SITES[0], SITES[1], SITES[2]):
        alone = composed(rule, *packs_of(rule, (site,)), **params)
        assert alone.items() <= among.items(), site.path


def test_the_library_is_as_it_was() -> None:
    """The limit to one thread holds for every thread, and ends with the last of the blocks that overlap."""
    inside, barrier = [], Barrier(2)

    def counts() -> set[int]:
        return {info["num_threads"] for info in threadpool_info() if info["user_api"] == "blas"}

    def work(last: bool) -> None:
        with one_thread_each():
            barrier.wait()
            inside.append(counts())
            barrier.wait()
            if last:
                time.sleep(0.05)  # the other one has left
                inside.append(counts())

    before = counts()
    both = [Thread(target=work, args=(last,)) for last in (False, True)]
    for one in both:
        one.start()
    for one in both:
        one.join()
    assert inside == [{1}] * 3
    assert counts() == before


@pytest.mark.parametrize("rule", ["svd", "ties", "lora_lego", "robust_merge", "core_ties"])
def test_where_numbers_lie_in_a_file_does_not_show(rule: str, tmp_path: Path) -> None:
    """A header of odd length leaves all numbers unaligned, and compiled code does not take them as they
    lie.
    """
    packs, weights = packs_of(rule)
    read = []
    for pack in packs:
        safetensors.write(tmp_path / pack.name, pack.tensors)
        data = (tmp_path / pack.name).read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        (tmp_path / pack.name).write_bytes((end - 7).to_bytes(8, "little") + data[8:end] + b" " + data[end:])
        file = safetensors.SafetensorsFile(tmp_path / pack.name)
        read.append(dataclasses.replace(pack, tensors={name: file.read(name) for name in file.tensors}))
    assert composed(rule, read, weights) == composed(rule, packs, weights)
