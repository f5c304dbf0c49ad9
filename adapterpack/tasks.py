"""The tasks by their Hugging Face pipeline names: which model class, which heads, which form of data. No heavy import here."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UnknownName, nearest


@dataclass(frozen=True)
class Task:
    """One task. ``heads`` are the module names that a task model adds to its base; they are trained whole."""

    name: str
    auto_class: str
    suffixes: tuple[str, ...]
    heads: tuple[str, ...] = ()
    labelled: bool = False
    generates: bool = False


TASKS = {
    task.name: task
    for task in (
        Task("text-classification", "AutoModelForSequenceClassification", ("ForSequenceClassification",), ("classifier", "score"),
             labelled=True),
        Task("text-generation", "AutoModelForCausalLM", ("ForCausalLM", "LMHeadModel"), generates=True),
        Task("feature-extraction", "AutoModel", ("Model",)),
    )
}


def task_named(name: str) -> Task:
    """The task of that name.

    Raises:
        UnknownName: there is none.

    Example:
        >>> task_named("text-generation").auto_class
        'AutoModelForCausalLM'
    """
    if name not in TASKS:
        raise UnknownName("unknown task", found=repr(name), remedy=nearest(name, TASKS))
    return TASKS[name]


def task_of(architecture: str) -> Task:
    """The task of a model class, told by the end of its name; feature extraction where nothing else fits.

    Example:
        >>> task_of("LlamaForCausalLM").name, task_of("GPT2LMHeadModel").name, task_of("BertModel").name
        ('text-generation', 'text-generation', 'feature-extraction')
    """
    return next((task for task in TASKS.values() if architecture.endswith(task.suffixes)), TASKS["feature-extraction"])
