"""``adapterpack chat``."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import click

import adapterpack

from ...errors import (
    AdapterpackError,
    StorageError,
    UnknownName,
    Unsupported,
    nearest,
    printable,
    storage_errors,
)
from ...io import output_file, refuse_existing
from ...runtime.text import read_text
from ...signals import Ended, taken
from ...tasks import require_chat
from .. import (
    common_options,
    device_of,
    device_options,
    divert_stdout,
    guard_stdout,
    load_adapter,
    load_pack,
    log_message,
    open_target,
    option,
    packs_argument,
    parse_pairs,
    print_line,
    print_report,
)
from ..logs import log_failure


def _text(value: str) -> str:
    """Returns a text, or that of the file after an ``@``."""
    if not value.startswith("@"):
        return value
    with storage_errors(value[1:]):
        return read_text(Path(value[1:]).resolve())


class _Terminal:
    """A conversation on standard input and output: runs the commands among the lines, and prints the answers
    to all others.
    """

    def __init__(self, talk: Any, as_json: bool) -> None:
        self.talk = talk
        self.as_json = as_json
        self.images = list[str]()
        self.asks = sys.stdin.isatty() and not as_json

    def run(self) -> None:
        """Answers lines until they end."""
        if self.talk.note:
            self.tell(self.talk.note)
        if self.asks:
            self.list_adapters("")
            self.tell(
                "/help lists the commands; Ctrl-C stops an answer, and at the prompt ends the conversation"
            )
        for line in self._lines():
            try:
                if line.startswith("/"):
                    name, _, rest = line[1:].partition(" ")
                    if name not in _COMMANDS:
                        known = [f"/{one}" for one in _COMMANDS]
                        raise UnknownName(
                            "unknown command", found=f"/{name}", remedy=nearest(f"/{name}", known)
                        )
                    _COMMANDS[name].run(self, rest.strip())
                elif line.strip():
                    self._say(line)
            except AdapterpackError as error:
                if not self.asks:
                    raise
                log_failure(str(error))

    def tell(self, text: str) -> None:
        """Says something besides the answers."""
        if self.asks:
            print_line(text)
        else:
            log_message(text)

    def _lines(self) -> Iterator[str]:
        if not self.asks:
            yield from (line.decode("utf-8", "replace").rstrip("\r\n") for line in sys.stdin.buffer)
            return
        with suppress(ImportError):  # input() then edits lines, and remembers them
            import_module("readline")
        while True:
            try:
                line = input("> ")
                while line.endswith("\\"):
                    line = f"{line[:-1]}\n{input('. ')}"
            except (EOFError, KeyboardInterrupt) as end:
                if isinstance(end, Ended) and end.number != signal.SIGINT:
                    raise
                print_line("")
                return
            yield line

    def _say(self, text: str) -> None:
        stopped: list[bool] = []

        def stop(end: Callable[[], None]) -> None:
            if stopped:
                end()
            stopped.append(True)
            self.talk.stop()

        images = self.images
        self.images = []
        with taken(stop, (signal.SIGINT,)):
            said = self.talk.say(text, images, self._show)
        if self.as_json:
            print_report(said, compact=True)
        else:
            print_line("")

    def _show(self, piece: str) -> None:
        if not self.as_json:
            with guard_stdout():
                click.echo(printable(piece), nl=False)

    def list_adapters(self, rest: str) -> None:
        """Lists who can answer, and marks who does."""
        session = self.talk.session
        base = [] if session.bundle.mode == "folded" else [None]
        for name in (*base, *session.adapters):
            mark = "*" if name == self.talk.adapter else " "
            self.tell(f"{mark} {name or f'the base, {session.bundle.base.name}'}")

    def choose_adapter(self, name: str) -> None:
        """Lets another adapter answer, which may be a pack that is loaded first."""
        if "/" in name:
            name = self.talk.session.load(load_adapter(name))
        self.talk.adapter = name or None
        self.tell(f"{self.talk.adapter or 'the base'} answers from now on")

    def set_system(self, text: str) -> None:
        """Replaces the system message."""
        self.talk.system = _text(text) or None

    def reset(self, rest: str) -> None:
        """Forgets the conversation."""
        self.talk.messages, self.images = [], []

    def add_image(self, path: str) -> None:
        """Adds a picture to the next message."""
        if not self.talk.sees:
            raise Unsupported("this model reads no images", found=self.talk.session.bundle.task)
        if not Path(path).is_file():
            raise StorageError("there is no such file", where=path)
        self.images.append(path)

    def set_option(self, text: str) -> None:
        """Sets a parameter of answers, or shows those that are set."""
        name, _, value = text.replace("=", " ", 1).partition(" ")
        others = {key: one for key, one in self.talk.sampling.items() if key != name}
        if value.strip():
            with suppress(ValueError):
                value = json.loads(value)
            self.talk.sampling = {**others, name: value}
        elif name:
            self.talk.sampling = others
        self.tell(json.dumps(self.talk.sampling) if self.talk.sampling else "as the model's own file says")

    def save(self, path: str) -> None:
        """Writes the conversation as a row that ``run --input`` and ``train`` read."""
        out = Path(path)
        refuse_existing(out)
        before = [] if self.talk.system is None else [{"role": "system", "content": self.talk.system}]
        with output_file(out) as file:
            row = {"messages": [*before, *self.talk.messages], "adapter": self.talk.adapter}
            file.write_text(json.dumps(row) + "\n", "utf-8")
        self.tell(f"saved to {out}")

    def exit(self, rest: str) -> None:
        """Ends the conversation."""
        raise EOFError

    def help(self, rest: str) -> None:
        """Lists the commands."""
        for name, command in _COMMANDS.items():
            self.tell(f"{f'/{name} {command.argument}':24}{command.about}")
        self.tell(r"a line that ends in \ goes on in the next one")


class _Command(NamedTuple):
    """A command of the conversation: its argument, what it does in words, and the function that does it."""

    argument: str
    about: str
    run: Callable[[_Terminal, str], None]


_COMMANDS: Mapping[str, _Command] = {
    "adapter": _Command("[NAME|PATH]", "let another adapter answer, or the base", _Terminal.choose_adapter),
    "adapters": _Command("", "list the adapters", _Terminal.list_adapters),
    "system": _Command("[TEXT|@FILE]", "replace the system message", _Terminal.set_system),
    "set": _Command("[NAME [VALUE]]", "set a parameter: /set temperature 0.7", _Terminal.set_option),
    "image": _Command("PATH", "add a picture to the next message", _Terminal.add_image),
    "reset": _Command("", "forget the conversation", _Terminal.reset),
    "save": _Command("FILE.json", "write the conversation to a new file", _Terminal.save),
    "help": _Command("", "list the commands", _Terminal.help),
    "exit": _Command("", "end the conversation, as Ctrl-D does", _Terminal.exit),
}


@click.command("chat")
@click.argument("bundle", metavar="BUNDLE|BASE")
@packs_argument
@option(
    "--adapter",
    "NAME",
    "The adapter that answers first, by its name or the path of a pack; by default the first PACK, or "
    "the base.",
)
@option("--system", "TEXT|@FILE", "The message of the system, before all others, or a file with it.")
@option(
    "--set sampling",
    "NAME=VALUE",
    "A parameter of answers, such as temperature=0.7, max_new_tokens=200 or seed=1; may be repeated. By "
    "default what the model's generation_config.json says.",
    multiple=True,
    callback=parse_pairs,
)
@device_options
@common_options
def command(
    *,
    bundle: str,
    packs: tuple[str, ...],
    adapter: str | None,
    system: str | None,
    sampling: Mapping[str, Any],
    as_json: bool,
    **parameters: Any,
) -> None:
    """Holds a conversation with a model, and streams each answer.

    At a terminal it asks for one message after the other; /help lists commands, such as /adapter NAME, which
    lets another adapter go on. From a pipe each line is a message. A BASE is exported into the cache first,
    with its PACKs, and the next call finds it there.

    \b
    Example:
      adapterpack chat models/base packs/pirate packs/formal --system "Answer in one sentence."
      adapterpack chat bundle --adapter orders --set temperature=0
      adapterpack chat bundle --json < questions.txt
    """
    before = None if system is None else _text(system)
    first = [] if adapter is None else [load_adapter(adapter)]
    folder, named = open_target(bundle, [*first, *map(load_pack, packs)], partial(require_chat, where=bundle))
    names = [one if isinstance(one, str) else one.name for one in named]
    with divert_stdout():
        talk = adapterpack.chat(
            folder,
            next(iter(names), None),
            packs=[one for one in named if not isinstance(one, str)],
            system=before,
            provider=device_of(parameters),
            **sampling,
        )
    with suppress(EOFError):
        _Terminal(talk, as_json).run()
