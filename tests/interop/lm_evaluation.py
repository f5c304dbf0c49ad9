"""lm-evaluation-harness against a server of texts: what it makes of a task's choices and of its texts is what
it makes of the log-probabilities that the server's own answers hold.

``with_servers.py`` starts the server, and ``.ci/client-libraries`` the environment in which this runs: it has
no adapterpack.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import lm_eval
import openai
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager

URL, TOKENIZER = f"{os.environ['OPENAI_BASE_URL']}/completions", os.environ["TOKENIZER"]
ROWS = [
    {
        "text": "The parcel is on its way to",
        "choices": [" Lisbon", " the moon", " a kettle of fish"],
        "gold": 0,
    },
    {"text": "Two mugs and a plate are", "choices": [" three things", " broken"], "gold": 1},
    {"text": "Faro", "choices": [" is a town in the south", "x"], "gold": 0},
]
CHOICES = """
task: own_choices
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: ""
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
ROLLING = """
task: own_text
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
WRITTEN = """
task: own_answer
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: generate_until
generation_kwargs: {until: ["\\n"], max_gen_toks: 5}
doc_to_text: "{{text}}"
doc_to_target: "{{choices[0]}}"
metric_list: [{metric: exact_match}]
"""


def own_score(client: openai.OpenAI, model: str, context: str, text: str) -> float:
    """The log-probability of a text after a context, by the server's own answer to both."""
    answer = client.completions.create(
        model=model, prompt=context + text, max_tokens=0, echo=True, logprobs=1
    ).choices[0]
    scores = answer.logprobs
    assert scores is not None and scores.text_offset and scores.token_logprobs
    return sum(
        value
        for offset, value in zip(scores.text_offset, scores.token_logprobs, strict=True)
        if offset >= len(context) and value is not None
    )


def main() -> None:
    """Three tasks on two models: their samples are the server's numbers."""
    client, accuracies = openai.OpenAI(), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows.json").write_text(json.dumps(ROWS))
        for number, task in enumerate((CHOICES, ROLLING, WRITTEN)):
            (folder / f"{number}.yaml").write_text(task.replace("ROWS", str(folder / "rows.json")))
        manager = TaskManager(include_path=name, include_defaults=False)
        for model in ("base", "alpha"):
            served = LocalCompletionsAPI(
                base_url=URL, model=model, tokenizer=TOKENIZER, batch_size=2, max_length=512
            )
            tasks = ["own_choices", "own_text", "own_answer"]
            found: Any = lm_eval.simple_evaluate(
                served, tasks=tasks, task_manager=manager, log_samples=True, bootstrap_iters=0
            )
            for row, sample in zip(ROWS, found["samples"]["own_choices"], strict=True):
                told = [float(one[0]) for one in sample["filtered_resps"]]
                right = [own_score(client, model, row["text"], text) for text in row["choices"]]
                assert all(math.isclose(*pair, abs_tol=1e-3) for pair in zip(told, right, strict=True))
            for row, sample in zip(ROWS, found["samples"]["own_answer"], strict=True):
                answer = client.completions.create(
                    model=model, prompt=row["text"], max_tokens=5, temperature=0, stop=["\n"]
                )
                assert sample["filtered_resps"] == [answer.choices[0].text]
            accuracies[model] = {name: found["results"][name] for name in tasks}
    assert accuracies["base"]["own_text"] != accuracies["alpha"]["own_text"]
    print(json.dumps(accuracies, default=str))


if __name__ == "__main__":
    main()
