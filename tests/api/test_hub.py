"""Pruned networks in folders, and on the Hugging Face Hub, which a fake stands in for."""

from __future__ import annotations

import shutil
import sys
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from torch import nn

from lightning_prune import L1, PrunedModel, StructuredPruning, prune, strip
from lightning_prune.reporting.report import Report
from lightning_prune.surgery import HistoryError, history_of
from lightning_prune.surgery.tensors import named


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


VECTORS = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.fixture
def pruned() -> tuple[nn.Module, Report]:
    net = mlp()
    return net, prune(net, VECTORS, pruning_ratio=0.5)


def card_of(folder: Path) -> huggingface_hub.ModelCard:
    return huggingface_hub.ModelCard.load(folder / "README.md")


class TestFolders:
    def test_a_network_comes_back_with_its_history(self, pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
        net, report = pruned
        PrunedModel(net, report).save_pretrained(tmp_path / "small")
        fresh = mlp().eval()
        loaded = PrunedModel.from_pretrained(tmp_path / "small", fresh)
        assert loaded.model is fresh
        assert torch.equal(fresh(VECTORS), net(VECTORS))
        assert not fresh.training
        history, expected = history_of(fresh), history_of(net)
        assert history is not None
        assert expected is not None
        assert history.widths_now == expected.widths_now
        assert {file.name for file in (tmp_path / "small").iterdir()} == {"model.safetensors", "README.md"}
        assert torch.equal(PrunedModel.from_pretrained(f"{tmp_path}/small", mlp()).model(VECTORS), net(VECTORS))

    def test_the_card(self, pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
        net, report = pruned
        data = {"license": "mit", "tags": ["image-classification", "pruning"]}
        PrunedModel(net, report, "my_package.mlp()", data).save_pretrained(tmp_path / "small")
        card = card_of(tmp_path / "small")
        assert card.data.library_name == "lightning-prune"
        assert card.data.license == "mit"
        assert card.data.tags == ["lightning-prune", "pruning", "image-classification"]
        assert "# small" in card.text
        assert "| parameters | 155 | 63 | 40.6 % |" in card.text
        assert "MACs per sample" in card.text
        assert f"Criterion: `{L1()}`." in card.text
        code = card.text.partition("```python\n")[2].partition("```")[0]
        assert len(code.splitlines()) <= 5
        assert "dense = my_package.mlp()" in code
        compile(code, "card", "exec")

    def test_the_code_of_a_card_runs(self, pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
        net, report = pruned
        PrunedModel(net, report, "mlp()").save_pretrained(tmp_path / "small")
        code = card_of(tmp_path / "small").text.partition("```python\n")[2].partition("```")[0]
        names: dict[str, Any] = {"mlp": mlp}
        exec(code, names)
        assert torch.equal(names["model"](VECTORS), net(VECTORS))

    def test_without_a_report_or_history(self, pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
        net, _ = pruned
        PrunedModel(net).save_pretrained(tmp_path / "small")
        text = card_of(tmp_path / "small").text
        assert "| parameters | 155 | 63 | 40.6 % |" in text
        assert "from torch.nn.modules.container import Sequential" in text
        PrunedModel(strip(net)).save_pretrained(tmp_path / "stripped")
        assert "parameters" not in card_of(tmp_path / "stripped").text

    def test_a_card_of_the_users_stays(self, pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
        net, report = pruned
        (tmp_path / "README.md").write_text("mine")
        PrunedModel(net, report).save_pretrained(tmp_path)
        assert (tmp_path / "README.md").read_text() == "mine"

    def test_a_report_without_sizes(self, tmp_path: Path) -> None:
        """Of a run that has not begun."""
        PrunedModel(mlp(), StructuredPruning(0.5).report).save_pretrained(tmp_path)
        assert "parameters" not in card_of(tmp_path).text


class Hub:
    """Repositories in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[tuple[str, dict[str, Any]]]()

    def __call__(self, **options: Any) -> Hub:
        self.calls.append(("HfApi", options))
        return self

    def create_repo(self, repo_id: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("create_repo", options))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id: str, folder_path: str, **options: Any) -> SimpleNamespace:
        self.calls.append(("upload_folder", options))
        shutil.copytree(folder_path, self.folder / repo_id)
        return SimpleNamespace(commit_url=f"https://huggingface.co/{repo_id}/commit/1")

    def download(self, repo_id: str, filename: str, **options: Any) -> str:
        self.calls.append(("hf_hub_download", options))
        return str(self.folder / repo_id / filename)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub = Hub(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub.download)
    return hub


class TestHub:
    def test_there_and_back(self, pruned: tuple[nn.Module, Report], hub: Hub) -> None:
        net, report = pruned
        address = PrunedModel(net, report).push_to_hub("small", private=True, token="secret", revision="main")
        assert address == "https://huggingface.co/me/small/commit/1"
        options = dict(hub.calls)
        assert options["HfApi"]["token"] == "secret"
        assert options["create_repo"] == {"private": True, "exist_ok": True}
        assert options["upload_folder"] == {
            "commit_message": "Add pruned network",
            "revision": "main",
            "create_pr": None,
        }
        text = card_of(hub.folder / "me" / "small").text
        assert "# small" in text
        assert 'from_pretrained("me/small", dense)' in text
        loaded = PrunedModel.from_pretrained("me/small", mlp(), revision="v1", local_files_only=True)
        assert torch.equal(loaded.model(VECTORS), net(VECTORS))
        asked = dict(hub.calls)["hf_hub_download"]
        assert (asked["revision"], asked["local_files_only"]) == ("v1", True)
        assert asked["library_name"] == "lightning-prune"

    def test_the_names_are_those_of_the_real_one(self) -> None:
        """What the fake takes, the installed version of huggingface_hub takes, too."""
        api = huggingface_hub.HfApi
        assert {"token", "library_name", "library_version"} <= signature(api.__init__).parameters.keys()
        assert {"private", "exist_ok"} <= signature(api.create_repo).parameters.keys()
        names = {"repo_id", "folder_path", "commit_message", "revision", "create_pr"}
        assert names <= signature(api.upload_folder).parameters.keys()
        names = {"revision", "token", "cache_dir", "local_files_only", "library_name", "library_version"}
        assert names <= signature(huggingface_hub.hf_hub_download).parameters.keys()


class TestRefusals:
    def test_another_network(self, pruned: tuple[nn.Module, Report], tmp_path: Path) -> None:
        PrunedModel(pruned[0]).save_pretrained(tmp_path)
        other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
        before = {name: tensor.clone() for name, tensor in named(other).items()}
        with pytest.raises(HistoryError, match="another architecture"):
            PrunedModel.from_pretrained(tmp_path, other)
        assert all(torch.equal(tensor, before[name]) for name, tensor in named(other).items())

    @pytest.mark.parametrize("source", [Path("nowhere"), "./nowhere", "/nowhere/at/all", "a/b/c"])
    def test_no_folder(self, source: str | Path) -> None:
        with pytest.raises(FileNotFoundError, match="expected a folder or a repository on the Hub, got '"):
            PrunedModel.from_pretrained(source, mlp())

    def test_an_empty_folder(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match=r"expected `model\.safetensors` in the folder"):
            PrunedModel.from_pretrained(tmp_path, mlp())

    def test_what_is_no_network_or_report(self) -> None:
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got a str"):
            PrunedModel("resnet18")  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"expected `report` to be .*Report or None, got 0\.5"):
            PrunedModel(mlp(), 0.5)  # type: ignore[arg-type]

    def test_without_huggingface_hub(
        self, pruned: tuple[nn.Module, Report], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        with pytest.raises(ModuleNotFoundError, match=r"belongs to the extra `hub`: pip install"):
            PrunedModel(pruned[0]).save_pretrained(tmp_path / "small")
        with pytest.raises(ModuleNotFoundError, match="extra `hub`"):
            PrunedModel.from_pretrained("me/small", mlp())
