"""Pruned networks in folders and repositories of the Hugging Face Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from lightning_prune.api.portable import load, save
from lightning_prune.arguments import Settings
from lightning_prune.extras import require
from lightning_prune.reporting.grid import Grid, count, share
from lightning_prune.reporting.report import Report
from lightning_prune.structure.traced_model import require_network, written
from lightning_prune.surgery import history_of

__all__ = ["PrunedModel"]

#: Name of the package on the Hub, of the file of weights, and of the model card.
_LIBRARY, _WEIGHTS, _CARD = "lightning-prune", "model.safetensors", "README.md"


@dataclass(frozen=True, eq=False)
class PrunedModel(Settings):
    """A pruned network that is saved to and loaded from the Hugging Face Hub, or a folder.

    The mixins of huggingface_hub build the network by ``cls(...)``, in its dense form, into which narrow weights do
    not fit. So this class stands beside the network: what it saves is the file of `save` and a model card.

    Attributes:
        model: The network.
        report: What `prune` returned, or the ``report`` of a callback, for the model card.
        build: The expression that builds the dense network, for the model card, such as
            ``"timm.create_model('resnet18')"``.
        card_data: Metadata of the model card, such as ``{"license": "mit"}``, see ``huggingface_hub.ModelCardData``;
            ``tags`` are added to our own.

    Example:
        >>> import tempfile, torch
        >>> from lightning_prune import PrunedModel, prune
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = prune(net, torch.zeros(2, 4), pruning_ratio=0.5)
        >>> again = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     PrunedModel(net, report).save_pretrained(folder)
        ...     PrunedModel.from_pretrained(folder, again).model
        Sequential(
          (0): Linear(in_features=4, out_features=4, bias=True)
          (1): ReLU()
          (2): Linear(in_features=4, out_features=2, bias=True)
        )
    """

    model: nn.Module
    report: Report | None = None
    build: str | None = None
    card_data: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require_network(self.model)
        super().__post_init__()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.safetensors`` and a model card, ``README.md``, which is not written over.

        Args:
            folder: The folder, which is created if it is missing.

        Raises:
            ModuleNotFoundError: If huggingface_hub is not installed (extra ``hub``).
        """
        self._save(Path(folder), Path(folder).resolve().name, str(folder))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str = "Add pruned network",
        private: bool | None = None,
        token: str | None = None,
        revision: str | None = None,
        create_pr: bool | None = None,
    ) -> str:
        """Upload the network and a model card to the Hub, in one commit.

        Args:
            repo_id: The repository, such as ``"user/resnet18-half"``, which is created if it is missing.
            commit_message: Message of the commit.
            private: Whether a new repository is private; by default, as the account is set up.
            token: Access token; by default that of ``hf auth login``.
            revision: Branch to commit to.
            create_pr: Whether to open a pull request instead.

        Returns:
            Address of the commit.
        """
        hub = require("huggingface_hub", extra="hub")
        api = hub.HfApi(token=token, library_name=_LIBRARY, library_version=version(_LIBRARY))
        repo = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self._save(Path(folder), repo.rpartition("/")[2], repo)
            commit = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
        return str(commit.commit_url)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        dense: nn.Module,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> PrunedModel:
        """Load a network that `save_pretrained` or `push_to_hub` has written.

        Args:
            source: A folder, or a repository on the Hub.
            dense: The network as it was built before it was pruned, which is narrowed in place.
            revision: Branch, tag or commit of the repository.
            token: Access token; by default that of ``hf auth login``.
            cache_dir: Folder of downloads, if not the usual one.
            local_files_only: Whether to take only what was downloaded before.

        Returns:
            The network, as ``model``, with its history and in the mode it was in.

        Raises:
            FileNotFoundError: If the folder has no file of weights.
            HistoryError: If the file is damaged or of another network, see `load`; the network is unchanged.
        """
        if Path(source).is_dir():
            file = Path(source) / _WEIGHTS
            if not file.is_file():
                raise FileNotFoundError(f"from_pretrained: expected `{_WEIGHTS}` in the folder '{source}', got none.")
        elif isinstance(source, Path) or source.startswith((".", "/", "~")) or source.count("/") > 1:
            raise FileNotFoundError(f"from_pretrained: expected a folder or a repository on the Hub, got '{source}'.")
        else:
            hub = require("huggingface_hub", extra="hub")
            file = hub.hf_hub_download(
                source,
                _WEIGHTS,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                library_name=_LIBRARY,
                library_version=version(_LIBRARY),
            )
        return cls(load(dense, file))

    def _save(self, folder: Path, name: str, source: str) -> None:
        hub = require("huggingface_hub", extra="hub")
        folder.mkdir(parents=True, exist_ok=True)
        save(self.model, folder / _WEIGHTS)
        given = dict(self.card_data)
        tags = list(dict.fromkeys([_LIBRARY, "pruning", *(given.pop("tags", None) or ())]))
        data = hub.ModelCardData(**{"library_name": _LIBRARY, **given, "tags": tags})
        if not (folder / _CARD).exists():
            hub.ModelCard(f"---\n{data.to_yaml()}\n---\n\n{self._card(name, source)}").save(folder / _CARD)

    def _card(self, name: str, source: str) -> str:
        """The text of the model card."""
        kind = type(written(self.model))
        load_it = [
            "from lightning_prune import PrunedModel",
            f"from {kind.__module__} import {kind.__qualname__}" if self.build is None else "",
            f"dense = {self.build or f'{kind.__qualname__}(...)  # with the arguments it was built with'}",
            f'model = PrunedModel.from_pretrained("{source}", dense).model.eval()',
        ]
        return "\n\n".join(
            [
                f"# {name}",
                f"A `{kind.__name__}` that was made narrower by structured pruning with `lightning-prune`.",
                *self._sizes(),
                "## How to load it",
                "```python\n" + "\n".join(line for line in load_it if line) + "\n```",
                f"`{_WEIGHTS}` holds weights and pruning history; other programs read it as any safetensors file.",
            ]
        )

    def _sizes(self) -> list[str]:
        """The network before and after."""
        if self.report is not None and self.report.dense is not None:
            criterion = self.report.config.get("criterion")
            ways = [] if criterion is None else [f"Criterion: `{criterion}`."]
            return [self.report.grids()[0].markdown(), *ways]
        history = history_of(written(self.model))
        if history is None:
            return []
        now, dense = sum(parameter.numel() for parameter in self.model.parameters()), history.original
        row = ("parameters", count(dense.params), count(now), share(now, dense.params))
        return [Grid("Before and after", ("", "dense", "pruned", "left"), (row,)).markdown()]
