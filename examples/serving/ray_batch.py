"""Files of rows through a bundle by Ray Data: any number of processes, an adapter a row, JSONL and parquet in
and out.

    pip install 'adapterpack[ray]'
    python examples/serving/ray_batch.py BUNDLE rows.jsonl answers --processes 4 --max-new-tokens 64
    python examples/serving/ray_batch.py BUNDLE rows.parquet answers --as parquet

Rows are those of ``adapterpack run``: ``prompt``, ``messages`` or ``text``, and ``adapter`` (null: the base).
Each process opens the bundle once, and runs the rows of a batch on its engine, where one begins when another
ends. One that cannot be run has ``error`` in its answer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ray

from adapterpack.runtime.sessions.run import row_runner


class Runner:
    """One process of the pool."""

    def __init__(self, bundle: str, options: dict[str, Any]) -> None:
        self.runner = row_runner(bundle, **options)

    def __call__(self, table: Any) -> dict[str, list[Any]]:
        """The rows of a batch with what the bundle says of each: the columns of the answers, what a row does
        not have is null.
        """
        rows = [
            {key: value for key, value in row.items() if value is not None or key == "adapter"}
            for row in table.to_pylist()
        ]
        answers = []
        for outcome in self.runner.outcomes(enumerate(rows, 1)):
            error = outcome.error
            answers.append(outcome.result or {} if error is None else {**outcome.row, "error": str(error)})
        columns = dict.fromkeys(name for answer in answers for name in answer)
        return {
            name: [answer.get(name) for answer in answers]
            for name in [*columns, *({"error"} - columns.keys())]
        }


def rows_of(path: str) -> Any:
    """A file, or a folder of files, as a data set."""
    return (
        ray.data.read_parquet(path) if ".parquet" in path else ray.data.read_json(path, file_extensions=None)
    )


def run(
    bundle: str,
    source: str,
    out: str,
    form: str,
    processes: int,
    cores: float,
    batch: int,
    options: dict[str, Any],
) -> None:
    """Writes a folder of files with the answers, in the order of the rows."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    answers = rows_of(source).map_batches(
        Runner,
        fn_constructor_args=(str(Path(bundle).resolve()), options),
        batch_format="pyarrow",
        batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=processes),
        num_cpus=cores,
    )
    (answers.write_parquet if form == "parquet" else answers.write_json)(str(Path(out).resolve()))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Files of rows through a bundle by Ray Data.")
    parser.add_argument("bundle")
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--as", dest="form", choices=["jsonl", "parquet"], default="jsonl")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--cores",
        type=float,
        default=1,
        help="cores that a process counts as; Ray needs one more to read files",
    )
    parser.add_argument("--batch", type=int, default=256, help="rows that a process is given at a time")
    parser.add_argument("--max-new-tokens", type=int)
    parser.add_argument("--provider")
    given = parser.parse_args()
    options = {"max_new_tokens": given.max_new_tokens, "provider": given.provider}
    run(
        given.bundle,
        given.source,
        given.out,
        given.form,
        given.processes,
        given.cores,
        given.batch,
        {name: value for name, value in options.items() if value is not None},
    )
    print(f"the answers are in {given.out}")


if __name__ == "__main__":
    main()
