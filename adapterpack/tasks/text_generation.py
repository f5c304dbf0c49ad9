"""Text generation by a causal language model: the continuation of a prompt or a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .conversations.encoding import encode
from .data import Result, Row, map_rows, prompt_of
from .session import Arrays, TaskSession
from .task import DECODER, MAIN, TASKS, Part, Task, TaskTraining


def answer(
    session: TaskSession, rows: Sequence[Row], adapters: Sequence[str | None], sampling: Mapping[str, Any]
) -> list[Result]:
    """Returns for each row ``completion``, why it ended, and the numbers of tokens of prompt and
    completion.
    """
    return completions(session, map_rows(rows, prompt_of), adapters, sampling)


def completions(
    session: TaskSession,
    prompts: Sequence[Any],
    adapters: Sequence[str | None],
    sampling: Mapping[str, Any],
    inputs: Arrays | None = None,
) -> list[Result]:
    """Returns the answers to prompts, to ``inputs`` such as audio features, or to both. On request of
    ``sampling`` they include the tokens' log-probabilities, or several sequences of a beam search with their
    scores.
    """
    _ = session.tokenizer  # an answer is a text here: a bundle without one fails before anything runs
    return [
        describe(completion, session)
        for completion in session.generate(prompts, adapters, given=inputs, **sampling)
    ]


def describe(completion: Any, session: TaskSession) -> Result:
    """Returns the result for a completion, which is a ``Generation``."""
    return {
        "completion": completion.text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.ids),
        **_logprobs(completion.logprobs, session),
        **_sequences(completion.sequences),
    }


def _sequences(sequences: Sequence[Any]) -> Result:
    """Returns the best sequences of a beam search, if there are several."""
    if len(sequences) < 2:
        return {}
    return {
        "sequences": [
            {"completion": one.text, "score": one.score, "finish_reason": one.finish_reason}
            for one in sequences
        ]
    }


def _logprobs(choices: Sequence[Any] | None, session: TaskSession) -> Result:
    """Returns the tokens of an answer in the format of the OpenAI API, with their ids."""
    if choices is None:
        return {}

    def entry(token: int, logprob: float) -> Result:
        return {"id": token, "token": session.tokenizer.decode([token]), "logprob": logprob}

    return {
        "logprobs": [
            {
                **entry(choice.token, choice.logprob),
                "top_logprobs": [entry(*pair) for pair in choice.top_logprobs],
            }
            for choice in choices
        ]
    }


TASKS.register(
    Task(
        "text-generation",
        "AutoModelForCausalLM",
        answer,
        ("ForCausalLM", "LMHeadModel"),
        parts=(Part(MAIN, "decoder", DECODER),),
        prompt=prompt_of,
        training=TaskTraining(encode),
        peft_type="CAUSAL_LM",
    )
)
