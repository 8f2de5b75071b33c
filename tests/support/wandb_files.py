"""What W&B wrote offline, from its own files (LevelDB's log format around protobuf records), and its agent's words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

from wandb.sdk.launch.sweeps import utils

_HEADER, _BLOCK = 7, 32768


def agent_words(sweep: dict[str, Any], values: dict[str, Any]) -> list[str]:
    """The command line that W&B's agent makes of a sweep for one run."""
    arguments = utils.create_sweep_command_args({"args": {key: {"value": value} for key, value in values.items()}})
    found: list[str] = []
    for word in utils.create_sweep_command(sweep["command"]):
        found += arguments[word[2:-1]] if word.startswith("${") else [str(word)]
    return found


def segments(folder: Path) -> list[Path]:
    """Offline runs below a folder, in the order they began; a resumed run has several."""
    return sorted(folder.glob("wandb/offline-run-*"))  # the time comes first in their names


def run_id(segment: Path) -> str:
    return next(record.run.run_id for record in _records(segment) if record.WhichOneof("record_type") == "run")


def rows(segment: Path) -> list[dict[str, Any]]:
    """What was logged, row by row; of a histogram or picture every fact under a name of its own."""
    return [
        {(item.key or ".".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in _records(segment)
        if record.WhichOneof("record_type") == "history"
    ]


def config(segment: Path) -> dict[str, Any]:
    """The configuration as it is at the end."""
    found = [record.config for record in _records(segment) if record.WhichOneof("record_type") == "config"]
    return {item.key: json.loads(item.value_json) for part in found for item in part.update if item.key}


def summary(segment: Path) -> dict[str, Any]:
    """The last value of everything."""
    found = [record.summary for record in _records(segment) if record.WhichOneof("record_type") == "summary"]
    return {item.key: json.loads(item.value_json) for part in found for item in part.update if item.key}


def charts(segment: Path) -> set[str]:
    """Names of custom charts."""
    found = [record.config for record in _records(segment) if record.WhichOneof("record_type") == "config"]
    keys = [tuple(item.nested_key) for part in found for item in part.update]
    return {key[2] for key in keys if key[:2] == ("_wandb", "visualize")}


def sections(segment: Path) -> set[str]:
    """What comes before the last slash in the names of everything that was logged: W&B's sections."""
    return {name.rpartition("/")[0] for row in rows(segment) for name in row if not name.startswith("_")}


def artifacts(segment: Path, kind: str) -> list[tuple[str, set[str], dict[str, Any]]]:
    """Name, aliases and metadata of each artifact of a kind."""
    found = [record.artifact for record in _records(segment) if record.WhichOneof("record_type") == "artifact"]
    return [(one.name, set(one.aliases), json.loads(one.metadata)) for one in found if one.type == kind]


def group_and_tags(segment: Path) -> tuple[str, list[str]]:
    run = next(record.run for record in _records(segment) if record.WhichOneof("record_type") == "run")
    return run.run_group, list(run.tags)


def _records(segment: Path) -> list[Any]:
    """All records of a run that has ended; W&B's own process may still be writing the last ones."""
    for _ in range(200):
        records = [record for file in segment.glob("run-*.wandb") for record in _parsed(file.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        sleep(0.1)
    raise AssertionError(f"the W&B run in {segment} has not ended")


def _parsed(data: bytes) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    assert data[:4] in (b"", b":W&B")
    at, record = _HEADER, b""
    while at + _HEADER <= len(data):
        left = _BLOCK - at % _BLOCK
        if left < _HEADER:  # too little for another header: the block ends in zeros
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + _HEADER : at + _HEADER + size]
        at += _HEADER + size
        if at > len(data):
            return  # half written
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""
