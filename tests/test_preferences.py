"""Preference training by TRL's trainers from a configuration: what is learned, what it is compared with, and
whose rewards count.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from transformers import AutoModelForCausalLM, AutoTokenizer

import adapterpack
from adapterpack import LoRA, adapt, attach, load, save, train
from adapterpack.cli.main import main
from adapterpack.errors import AdapterpackError, ConfigError, UnknownName, Unsupported
from adapterpack.sandbox.sandbox import OutOfLimits
from adapterpack.tasks.task import get_task
from adapterpack.torch_adapters.models.load import load_model, load_tokenizer
from adapterpack.training.config.config import read_config
from adapterpack.training.loop.arguments import arguments_of
from adapterpack.training.loop.build_trainer import trainer_for
from adapterpack.training.loop.preparing import prepare
from adapterpack.training.loop.steps import Step

CAUSAL = "text-generation"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The data sets' cache in a folder of the test's own."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield folder


def pairs(count: int = 24) -> list[dict[str, Any]]:
    """Prompts, each with an answer of low words, which is the better one, and one of high words."""
    dice = random.Random(0)
    return [
        {
            "prompt": f"w{dice.randrange(80)} w{dice.randrange(80)}",
            "chosen": f" w{dice.randrange(8)} w{dice.randrange(8)}",
            "rejected": f" w{dice.randrange(40, 48)} w{dice.randrange(40, 48)}",
        }
        for _ in range(count)
    ]


def rows_of(kind: str) -> list[dict[str, Any]]:
    """The same in the form that a kind of training reads."""
    if kind == "grpo":
        return [{"prompt": row["prompt"]} for row in pairs(8)]
    if kind == "kto":
        return [
            {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
            for row in pairs()
            for side in ("chosen", "rejected")
        ]
    return pairs()


def low(completions: list[str], **columns: Any) -> list[float]:
    """A reward: the share of low words in an answer."""
    return [sum(word in {f"w{n}" for n in range(8)} for word in text.split()) / 8 for text in completions]


SETTINGS: dict[str, dict[str, Any]] = {
    "dpo": {"rl": "dpo", "rl_beta": 0.2},  # axolotl's names
    "kto": {"stage": "kto", "pref_beta": 0.2, "kto_rejected_weight": 1.5},  # LLaMA-Factory's
    "orpo": {"trainer": "orpo", "beta": 0.5},
    "cpo": {"rl": "simpo", "simpo_gamma": 0.3, "cpo_alpha": 0.0, "beta": 2.0},
    "reward": {"stage": "rm"},
    "grpo": {"trainer": "grpo", "num_generations": 4, "max_completion_length": 8, "learning_rate": 2e-2},
}


PREFIX = {"method": "prefix_tuning", "num_virtual_tokens": 3}
PROMPT = {"method": "prompt_tuning", "num_virtual_tokens": 3}


def config(base: Path, folder: Path, kind: str, **more: Any) -> dict[str, Any]:
    path = folder / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(kind)))
    rank = {} if "method" in more else {"r": 4}
    return {
        "model_name_or_path": str(base),
        "train_file": str(path),
        "output_dir": str(folder / kind),
        "learning_rate": 1e-2,
        "max_steps": 12,
        "max_length": 32,
        **rank,
        "per_device_train_batch_size": 8,
        "save_strategy": "no",
        **SETTINGS[kind],
        **more,
    }


def margin(model: Any, tokenizer: Any) -> float:
    """How much likelier the better answers are than the others, or how much more they score, in the mean."""

    def value(prompt: str, answer: str) -> float:
        begins = len(tokenizer(prompt)["input_ids"])
        ids = tokenizer(prompt + answer, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        if logits.ndim == 2:
            return float(logits[0, 0])
        return float(logits[0, begins - 1 : -1].log_softmax(-1).gather(-1, ids[0, begins:, None]).sum())

    return sum(
        value(row["prompt"], row["chosen"]) - value(row["prompt"], row["rejected"]) for row in pairs()
    ) / len(pairs())


@pytest.mark.parametrize(
    "kind",
    [
        "dpo",
        "reward",
        *(pytest.param(kind, marks=pytest.mark.long) for kind in ("kto", "orpo", "cpo", "grpo")),
    ],
)
def test_the_better_answers_become_likelier(
    kind: str, tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Under the names of three tools: a valid pack, which on a fresh base prefers the better answers by more
    than the base does; the folder holds nothing else, and the model's own ``forward`` is where it was.
    """
    with caplog.at_level("INFO", "adapterpack"):
        (pack,) = train(config(tiny_llama, tmp_path, kind), rewards=[low] if kind == "grpo" else ())
    assert (": reward" in caplog.text) is (kind != "reward")
    assert adapterpack.validate(tmp_path / kind, tiny_llama).valid
    assert (pack.manifest.training["objective"], pack.manifest.training["steps"]) == (kind, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [kind, f"{kind}.jsonl"]
    task = get_task(pack.manifest.task.type)
    assert (task.name, pack.manifest.problem) == (
        ("text-classification", "regression") if kind == "reward" else (CAUSAL, "single_label_classification")
    )
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = load_model(task, tiny_llama, pack.manifest.task.labels).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    before = margin(model, tokenizer)
    # of its own tries at random, where the others are told what is better
    least = 0.1 if kind == "grpo" else 0.5
    assert margin(attach(model, load(tmp_path / kind)), tokenizer) > before + least


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("dpo", {"reward_margin": "rewards/margins", "reward_accuracy": "rewards/accuracies"}),
        ("kto", {"reward_margin": "rewards/margins"}),
        ("reward", {"win_rate": "accuracy", "margin": "margin"}),
    ],
)
def test_preferences_are_measured_as_trl_measures_them(
    kind: str, theirs: dict[str, str], tiny_llama: Path, tmp_path: Path
) -> None:
    """The margin beyond the base's, times beta, is what TRL's evaluation calls the margin of rewards; of a reward
    model the scores' own are.
    """
    values = config(tiny_llama, tmp_path, kind, per_device_eval_batch_size=48)
    (pack,) = train({**values, "eval_file": values["train_file"]})
    adapterpack.export(tiny_llama, [pack], tmp_path / "bundle", mode="inputs", in_place=False)
    found = adapterpack.evaluate(tmp_path / "bundle", data=values["train_file"])
    claims = {metric["name"]: metric["value"] for metric in pack.manifest.metrics}
    measures = found.measures[pack.name]
    for ours, name in theirs.items():
        beta = 0.2 if name == "rewards/margins" else 1
        assert beta * measures[ours] == pytest.approx(claims[name], rel=1e-4)
    (model,) = (one for one in found.models if one.name == pack.name)
    if kind == "kto":
        good = np.array([row["label"] for row in rows_of(kind)])
        assert measures["reward_accuracy"] == np.mean((model.judgement.rows["reward"] > 0) == good)
    if kind == "reward":
        asked = [
            {"prompt": row["prompt"], "completion": row[side]}
            for row in rows_of(kind)
            for side in ("chosen", "rejected")
        ]
        scores = [
            row["scores"]["score"]
            for row in adapterpack.run(tmp_path / "bundle", asked, adapters=[pack.name])
        ]
        gaps = np.array(scores[::2]) - scores[1::2]
        assert measures["margin"] == pytest.approx(np.mean(gaps), rel=1e-4)
        args = ["run", str(tmp_path / "bundle"), "--input", "-", "--adapter", pack.name]
        printed = CliRunner().invoke(main, args, input=json.dumps(asked[0]))
        assert f"| score {scores[0]:.3f}" in printed.stdout


@pytest.mark.parametrize("kind", ["dpo", "kto", "orpo", "cpo", "grpo"])
def test_a_prompt_keeps_its_last_tokens(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """Cut to one token it trains what the last word alone trains, however long it was."""
    found = []
    begin = ["[BOS]"] if kind in ("orpo", "cpo") else []  # which TRL puts before each of its prompts
    for name, most, start in (("cut", 1 + len(begin), -1), ("short", None, -1), ("whole", None, 0)):
        (tmp_path / name).mkdir()
        values = config(
            tiny_llama, tmp_path / name, kind, max_steps=2, max_prompt_length=most, learning_rate=1e-3
        )
        before = [*["w9"] * values["max_length"], *begin] if most else []
        rows = [
            {**row, "prompt": " ".join([*before, *row["prompt"].split()[start:]])} for row in rows_of(kind)
        ]
        Path(values["train_file"]).write_text("".join(json.dumps(row) + "\n" for row in rows))
        (pack,) = train(values, rewards=[low] if kind == "grpo" else ())
        assert pack.manifest.training["rows"] == len(rows)
        found.append(pack.tensors)
    cut, short, whole = (np.concatenate([np.ravel(one[key]) for key in sorted(one)]) for one in found)
    np.testing.assert_allclose(cut, short, rtol=0, atol=1e-6)
    assert np.abs(cut - whole).max() > 1e-4


def test_answers_are_not_compared_by_a_classifier(tiny_llama: Path, tmp_path: Path) -> None:
    rows = [{"text": f"w{at}", "label": "ab"[at % 2]} for at in range(8)]
    values = config(tiny_llama, tmp_path, "reward")
    (tmp_path / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = {"train_file": str(tmp_path / "labels.jsonl"), "task": "text-classification", "max_steps": 1}
    kept = {key: value for key, value in values.items() if key != "stage"}
    (pack,) = train({**kept, **labels})
    adapterpack.export(tiny_llama, [pack], tmp_path / "bundle", in_place=False)
    with pytest.raises(ConfigError, match=r"this one has labels .*found a, b"):
        adapterpack.evaluate(tmp_path / "bundle", data=values["train_file"])


@pytest.mark.parametrize(
    "kind",
    ["dpo", *(pytest.param(kind, marks=pytest.mark.long) for kind in ("grpo", "kto", "orpo", "reward"))],
)
def test_a_run_goes_on_to_the_same_pack(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    """In another epoch than that of the checkpoint, with dropout, and with the answers of ``grpo``: the bytes
    of a run without a stop.
    """
    values = config(tiny_llama, tmp_path, kind, dropout=0.1, save_strategy="steps", save_steps=3, name=kind)
    rewards = [low] if kind == "grpo" else ()

    def stop(step: Step) -> None:
        if step.done == 5:
            raise RuntimeError("the machine stops")

    with pytest.raises(RuntimeError, match="the machine stops"):
        train(values, progress=stop, rewards=rewards)
    steps: list[Step] = []
    (pack,) = train(values, progress=steps.append, rewards=rewards)
    assert steps[0].done == 4
    assert pack.id == train({**values, "output_dir": str(tmp_path / "whole")}, rewards=rewards)[0].id


@pytest.mark.parametrize(
    ("begins", "method"), [("a pack", {}), ("the base", {}), ("the base", PREFIX), ("the base", PROMPT)]
)
def test_the_reference_is_what_the_adapter_began_as(
    begins: str, method: dict[str, Any], tiny_llama: Path, tmp_path: Path
) -> None:
    """The loss of DPO of a policy that has moved away, against the formula with a second model: the base
    alone, or with the pack that the training goes on from. The reference owns no weight, and the pack that is
    written names its parent. A prompt, which changes the base's outputs from the first step on, is told from
    the base as any other adapter.
    """
    more: dict[str, Any] = {**method}
    started = None
    if begins == "a pack":
        torch.manual_seed(3)
        first = adapt(load_model(get_task(CAUSAL), tiny_llama), LoRA(r=4), "sft")
        for parameter in first.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        started = save(first, tmp_path / "sft", base=tiny_llama)
        more = {"adapter_name_or_path": str(tmp_path / "sft")}
    (settings,), _ = read_config(config(tiny_llama, tmp_path, "dpo", **more))
    tokenizer = load_tokenizer(tiny_llama)
    ready = prepare(settings, get_task(CAUSAL), tiny_llama, tokenizer)
    trainer = trainer_for(settings, ready, arguments_of(settings, tmp_path / "runs"), tokenizer)
    assert sum(parameter.numel() for parameter in trainer.ref_model.parameters()) == 0
    batch = next(iter(trainer.get_train_dataloader()))
    with torch.no_grad():
        assert (float(trainer.compute_loss(ready.model, batch)) == pytest.approx(0.693147, abs=1e-5)) == (
            not method
        )
        for parameter in ready.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    reference = AutoModelForCausalLM.from_pretrained(tiny_llama)
    if started is not None:
        attach(reference, started)

    def answers(model: Any) -> torch.Tensor:
        logits = (
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
            .logits[:, :-1]
            .log_softmax(-1)
        )
        return (
            logits.gather(-1, batch["input_ids"][:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
        ).sum(1)

    ratios = (answers(ready.model) - answers(reference)).chunk(2)
    expected = -torch.nn.functional.logsigmoid(0.2 * (ratios[0] - ratios[1])).mean()
    assert abs(float(expected.detach()) - 0.693147) > 1e-3
    assert float(trainer.compute_loss(ready.model, batch).detach()) == pytest.approx(
        float(expected.detach()), abs=1e-6
    )
    if started is not None:
        (pack,) = train(config(tiny_llama, tmp_path, "dpo", max_steps=1, **more))
        assert [parent.digest for parent in pack.manifest.lineage.parents] == [started.id]
        assert adapterpack.validate(tmp_path / "dpo", tiny_llama).valid
        with pytest.raises(ConfigError, match=r"keeps the settings of its method.*alpha"):
            train(config(tiny_llama, tmp_path, "dpo", output_dir=str(tmp_path / "x"), alpha=3, **more))
        with pytest.raises(ConfigError, match=r"another method.*expected dora, found lora"):
            train(config(tiny_llama, tmp_path, "dpo", output_dir=str(tmp_path / "x"), method="dora", **more))


@pytest.mark.parametrize(
    ("kind", "more", "error", "words"),
    [
        ("grpo", {}, ConfigError, "no function that gives any.*--reward"),
        ("grpo", {"reward_funcs": "x.py"}, ConfigError, "no configuration brings code"),
        ("dpo", {"rl": "dop"}, UnknownName, "unknown trainer.*'dop'"),
        (
            "dpo",
            {"task": "text-classification"},
            ConfigError,
            "dpo does not train this task.*expected text-generation",
        ),
        ("dpo", {"method": "kasa"}, ConfigError, "both have a setting.*beta"),
        ("dpo", {"num_generations": 2}, ConfigError, "a setting of the trainers grpo"),
        ("dpo", {"max_length": 512}, ConfigError, "longer than the model can read.*set max_length to 64"),
        ("dpo", {"group_by_length": True}, ConfigError, "cannot group rows"),
        ("dpo", {"modules_to_save": ["lm_head"]}, Unsupported, "without an adapter of it"),
        (
            "dpo",
            {"method": "cpt", "token_ids": [5, 6, 7], "token_types": [1, 2, 4]},
            Unsupported,
            "does not learn from the labels",
        ),
        (
            "kto",
            {"stage": "dpo", "kto_rejected_weight": None},
            ConfigError,
            "no form of preferences.*chosen",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(
    kind: str,
    more: dict[str, Any],
    error: type[AdapterpackError],
    words: str,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    """A sentence that names the setting; nothing is written."""
    values = {
        key: value for key, value in config(tiny_llama, tmp_path, kind, **more).items() if value is not None
    }
    with pytest.raises(error, match=words):
        train(values)
    assert [path.name for path in tmp_path.iterdir()] == [f"{kind}.jsonl"]


@pytest.mark.fast
def test_rewards_are_named_on_the_command_line_alone(tmp_path: Path) -> None:
    """``file.py:function`` is run and called; a file or a function that is not there is a sentence."""
    from adapterpack.training.loop.rewards import find_reward

    (tmp_path / "mine.py").write_text(
        "def short(completions, **columns):\n    return [-len(text) for text in completions]\n"
    )
    assert find_reward(f"{tmp_path / 'mine.py'}:short")(["ab", ""]) == [-2, 0]
    for text, words in (
        (f"{tmp_path / 'mine.py'}:shor", "no such function.*did you mean 'short'"),
        ("mine", "its file and its function"),
        (f"{tmp_path / 'none.py'}:f", "no such file of rewards"),
    ):
        with pytest.raises(AdapterpackError, match=words):
            find_reward(text)


def test_a_chat_template_that_never_ends_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    """Pairs of chats are rendered by the base's own template, within limits: a plain one trains, one that
    counts for ever is an error.
    """
    base = tmp_path / "base"
    shutil.copytree(tiny_llama, base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    chats = [
        {
            key: [{"role": "user" if key == "prompt" else "assistant", "content": text}]
            for key, text in row.items()
        }
        for row in pairs(8)
    ]
    values = config(base, tmp_path, "dpo", max_steps=1)
    Path(values["train_file"]).write_text("".join(json.dumps(row) + "\n" for row in chats))
    counting = (
        "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}{% endfor %}{% "
        "endfor %}{% endfor %}"
    )
    for template, ends in (("{% for m in messages %} {{ m.content }}{% endfor %}", True), (counting, False)):
        tokenizer.chat_template = template
        tokenizer.save_pretrained(base)
        if ends:
            assert train(values)[0].manifest.training["steps"] == 1
        else:
            with pytest.raises(OutOfLimits, match="the chat template does not render"):
                train({**values, "output_dir": str(tmp_path / "second")})
    assert not (tmp_path / "second").exists()
