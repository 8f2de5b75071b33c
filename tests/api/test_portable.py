"""Files that hold a pruned network: what is saved loads into a new network, bit for bit, or nothing changes."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import lightning_prune
from lightning_prune import load, prune, save
from lightning_prune.api import portable
from lightning_prune.models import CNNClassifier
from lightning_prune.structure import TracedModel, trace
from lightning_prune.surgery import HistoryError, LayerSpec, history_of, masks_of, transaction
from lightning_prune.surgery.masks import apply_masks, attach_masks
from lightning_prune.surgery.tensors import named
from tests.support.damage import damaged, damages


class Block(nn.Module):
    """A residual block behind a stem, with tied heads and a buffer that no file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 8, 1)
        self.first, self.second = nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.linspace(0.5, 2, 8)[:, None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))) * self.scale
        x = (x + self.outer(F.relu(self.inner(x)))).mean((2, 3))
        return self.first(x) + self.second(x)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))


IMAGES, VECTORS = torch.zeros(2, 3, 8, 8), torch.zeros(2, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (mlp, VECTORS),
    "residual": (Block, IMAGES),
    "half": (lambda: mlp().bfloat16(), VECTORS.bfloat16()),
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "small.safetensors"


@pytest.fixture
def saved(file: Path) -> Path:
    """An MLP that was cut, masked and has a replaced layer, saved: a file with all that there is."""
    net = mlp()
    prune(net, VECTORS, pruning_ratio=0.25)
    mask(net)
    prune(net, VECTORS, pruning_ratio={"2": 0.5})
    save(net, file)
    return file


def mask(net: nn.Module) -> None:
    masks = {"0.weight": named(net)["0.weight"].detach() < 0}
    attach_masks(net, masks)
    apply_masks(net, masks)


def state_of(net: nn.Module) -> dict[str, Any]:
    """All that loading may change, to be compared."""
    attributes = {f"{name} attributes": repr(module) for name, module in net.named_modules()}
    present = {name: tensor.detach().clone() for name, tensor in named(net).items()}
    return {**present, **attributes, "history": history_of(net), "masks": dict(masks_of(net))}


def equal(first: dict[str, Any], second: dict[str, Any]) -> bool:
    if first.keys() != second.keys():
        return False
    return all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else isinstance(a, dict) or a == b
        for a, b in ((first[key], second[key]) for key in first)
    )


def rewrite(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change our part of the metadata."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    text = header["__metadata__"]["lightning_prune"]
    header["__metadata__"]["lightning_prune"] = change(json.loads(text))
    put(file, json.dumps(header), content[8 + length :])


def put(file: Path, header: str, rest: bytes) -> None:
    encoded = header.encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + rest)


class TestRoundTrip:
    @pytest.mark.parametrize("name", NETWORKS)
    @pytest.mark.parametrize("ratios", [(), (0.4,), (0.25, 0.6)], ids=["dense", "one cut", "two cuts"])
    def test_a_new_network_takes_the_file(self, name: str, ratios: tuple[float, ...], file: Path) -> None:
        build, example = NETWORKS[name]
        net = build()
        for ratio in ratios:
            prune(net, example, pruning_ratio=ratio)
        save(net, file)
        fresh = build()
        assert load(fresh, file) is fresh
        x = torch.randn_like(example)
        assert torch.equal(fresh.eval()(x), net.eval()(x))
        assert all(torch.equal(tensor, named(net)[name]) for name, tensor in named(fresh).items())
        assert repr(fresh) == repr(net)
        history, expected = history_of(fresh), history_of(net)
        if ratios:
            assert history is not None
            assert expected is not None
            assert history.widths_now == expected.widths_now
            assert history.size == expected.size
            prune(fresh, example, pruning_ratio=0.7)  # amounts still refer to the dense network
            prune(net, example, pruning_ratio=0.7)
            assert torch.equal(fresh(x), net(x))
        else:
            assert history is None

    def test_tied_tensors_are_stored_once_and_stay_tied(self, file: Path) -> None:
        net = Block()
        prune(net, IMAGES, pruning_ratio=0.5)
        save(net, file)
        assert "second.weight" not in load_file(file)
        fresh = load(Block(), file)
        assert fresh.second.weight is fresh.first.weight

    def test_views_are_stored_apart(self, file: Path) -> None:
        """Parameters that share memory without being one tensor."""

        class Views(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                both = torch.randn(6, 3)
                self.upper, self.lower = nn.Parameter(both[:3]), nn.Parameter(both[3:])
                self.across = nn.Parameter(both[:3].t())

        net, fresh = Views(), Views()
        save(net, file)
        load(fresh, file)
        assert all(torch.equal(a, b) for a, b in zip(net.parameters(), fresh.parameters(), strict=True))

    def test_masks_and_replaced_layers(self, file: Path) -> None:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.25)
        mask(net)
        with transaction(net, run=lambda: net(VECTORS)) as change:
            change.replace({"3": LayerSpec("ReLU")}, lambda: trace(TracedModel.of(net, VECTORS)))
        save(net, file)
        fresh = load(mlp(), file)
        x = torch.randn_like(VECTORS)
        assert isinstance(fresh[3], nn.ReLU)
        assert torch.equal(fresh(x), net(x))
        assert masks_of(fresh).keys() == {"0.weight"}
        assert torch.equal(masks_of(fresh)["0.weight"], masks_of(net)["0.weight"])

    def test_numbers_that_json_does_not_have(self, file: Path) -> None:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.25)
        history = history_of(net)
        assert history is not None
        info = {"metric": float("nan"), "gain": float("-inf"), "loss": 0.1}
        edits = tuple(lightning_prune.surgery.Keep(e.axes, e.kept, 0, 0, 0, info) for e in history.edits)
        lightning_prune.surgery.attach(net, type(history)(history.shapes, history.size, edits))
        save(net, file)
        loaded = history_of(load(mlp(), file))
        assert loaded is not None
        assert repr(loaded.edits[0].info) == repr(info)

    def test_a_pruned_network_takes_another_file(self, saved: Path, tmp_path: Path) -> None:
        net = mlp()
        save(net, tmp_path / "dense")
        other = load(mlp(), saved)
        x = torch.randn_like(VECTORS)
        assert torch.equal(load(other, tmp_path / "dense")(x), net(x))
        assert history_of(other) is None
        assert not masks_of(other)

    def test_compiled_networks_have_the_names_of_others(self, file: Path) -> None:
        net = mlp()
        prune(net, VECTORS, pruning_ratio=0.5)
        save(torch.compile(net), file)  # type: ignore[arg-type]
        fresh = mlp()
        fresh[2] = torch.compile(fresh[2])  # type: ignore[assignment]
        with torch.compiler.set_stance("force_eager"):
            assert torch.equal(load(fresh, file)(VECTORS + 1), net(VECTORS + 1))

    def test_a_lightning_module_keeps_its_history_in_checkpoints(self, file: Path) -> None:
        net = CNNClassifier(channels=(4, 4), hidden=(6, 6))
        prune(net, pruning_ratio=0.5)
        save(net, file)
        fresh = load(CNNClassifier(channels=(4, 4), hidden=(6, 6)), file)
        checkpoint: dict[str, Any] = {}
        fresh.on_save_checkpoint(checkpoint)
        assert "lightning_prune" in checkpoint
        assert isinstance(fresh, LightningModule)

    def test_a_new_file_replaces_an_old_one_only_when_it_is_whole(
        self, saved: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = saved.read_bytes()

        def torn(weights: dict[str, Tensor], path: str, metadata: dict[str, str]) -> None:
            Path(path).write_bytes(b"torn")
            raise OSError("No space left on device")

        monkeypatch.setattr("safetensors.torch.save_file", torn)
        with pytest.raises(OSError, match="No space"):
            save(mlp(), saved)
        assert saved.read_bytes() == before
        assert [*saved.parent.iterdir()] == [saved]


class TestRefusals:
    """Whatever is wrong with a file, the network stays as it is, bit for bit."""

    def refused(self, file: Path, match: str, net: nn.Module | None = None) -> None:
        net = mlp() if net is None else net
        before = state_of(net)
        with pytest.raises(HistoryError, match=match):
            load(net, file)
        assert equal(state_of(net), before)

    def test_another_network(self, saved: Path, file: Path) -> None:
        other = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh(), nn.Linear(8, 3))
        self.refused(saved, r"0\.weight was \[8, 6\] before it was cut, here it is \[9, 6\]", other)
        self.refused(saved, r"4\.weight was \[3, 8\] before it was cut, here it is missing", nn.Sequential(*mlp()[:4]))
        self.refused(
            saved, r"5\.bias is missing in the checkpoint; 5\.weight is missing", nn.Sequential(*mlp(), nn.Linear(3, 3))
        )

    def test_a_dense_file_of_another_network(self, file: Path) -> None:
        """Half of the tensors fit, and nothing tells before but their shapes."""
        save(nn.Sequential(*mlp()[:4], nn.Linear(8, 5)), file)
        self.refused(file, r"4\.bias is \[5\], here it is \[3\]; 4\.weight is \[5, 8\], here it is \[3, 8\]")
        save(nn.Sequential(*mlp()[:4]), file)
        self.refused(file, r"4\.bias is missing in the checkpoint; 4\.weight is missing")

    def test_a_module_that_fails_while_it_loads(self, saved: Path) -> None:
        class Careful(nn.Linear):
            def _load_from_state_dict(self, *args: Any) -> None:
                super()._load_from_state_dict(*args)
                args[-1].append("`Careful` takes no weights")

        net = mlp()
        net[4] = Careful(8, 3)
        self.refused(saved, "`Careful` takes no weights", net)

    @pytest.mark.parametrize("bytes_left", [0, 5, 100, -20])
    def test_a_torn_file(self, saved: Path, bytes_left: int) -> None:
        saved.write_bytes(saved.read_bytes()[:bytes_left])
        self.refused(saved, "expected a whole safetensors file")

    def test_another_kind_of_file(self, file: Path) -> None:
        torch.save(mlp().state_dict(), file)
        self.refused(file, r"which `torch\.save` wrote\. .* a `state_dict` by `load_by_shapes`")

    def test_a_part_of_the_pruned_module(self, file: Path) -> None:
        whole = nn.Sequential(nn.Identity(), mlp())
        prune(whole, torch.zeros(2, 6), pruning_ratio=0.5)
        save(whole[1], file)
        self.refused(file, "a part of one: save the whole module that was pruned")
        save(whole, file)
        part = load(nn.ModuleDict({"1": mlp()}), file)["1"]
        assert torch.equal(part(torch.ones(2, 6)), whole(torch.ones(2, 6)))

    def test_no_file(self, file: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load(mlp(), file)

    def test_a_newer_file(self, saved: Path) -> None:
        rewrite(saved, lambda top: json.dumps({**top, "version": 2}))
        self.refused(saved, r"version 2, 1 is the last known\. .*pip install --upgrade")

    def test_a_newer_history(self, saved: Path) -> None:
        rewrite(saved, lambda top: json.dumps({**top, "history": {**top["history"], "version": 99}}))
        self.refused(saved, r"version 99, 3 is the last known\. .*pip install --upgrade")

    @pytest.mark.parametrize(
        ("text", "match"),
        [
            ("", "no JSON that can be read"),
            ("[]", "expected the metadata to be a dict"),
            ("[" * 100_000, "RecursionError"),
            ('{"version": 1, "version": 1, "tied": {}}', "it has 'version' twice"),
            (f'{{"version": {"9" * 5000}}}', "no JSON that can be read"),
            ('{"version": 1, "tied": {"a": "b"}}', "it ties 'a'"),
            ('{"version": 1, "tied": {"0.bias": "0.weight"}}', r"it ties '0\.bias'"),
        ],
        ids=lambda value: value[:12],
    )
    def test_text_that_is_no_history(self, saved: Path, text: str, match: str) -> None:
        rewrite(saved, lambda top: text)
        self.refused(saved, match)

    def test_layers_within_layers(self, saved: Path) -> None:
        """However deep Python's own limits let it be read."""
        content, reasons = saved.read_bytes(), ""
        size = {"params": 1, "macs": 1, "widths": {}, "memory": 1}
        edit = {"kind": "replace", "modules": {"3": "LAYER"}, "widths": {}, "original": size, "new_dense": True}
        edit |= {"epoch": 0, "step": 0, "cut": 0, "info": {}}

        for depth in (100, 460, 480, 1000):
            layer = '{"kind":"Sequential","layers":[' * depth + '{"kind":"Identity","options":{}}' + "]}" * depth

            def nest(top: dict[str, Any], layer: str = layer) -> str:
                top["history"]["edits"].append(edit)
                return json.dumps(top).replace('"LAYER"', layer)

            saved.write_bytes(content)
            rewrite(saved, nest)
            net = mlp()
            before = state_of(net)
            try:
                load(net, saved)
            except HistoryError as error:
                reasons += str(error)
                assert equal(state_of(net), before)
        assert "RecursionError" in reasons

    @pytest.mark.parametrize(
        "positions",
        [[0, 10**30], [0, 2**63], [-1, 0], [3, 1], [1, 1], [0, 1, 8], [], [True], [0.0], ["0"], "01"],
        ids=str,
    )
    def test_positions(self, saved: Path, positions: Any) -> None:
        rewrite(saved, lambda top: json.dumps({**top, "positions": [positions, *top["positions"][1:]]}))
        self.refused(saved, "positions")

    @pytest.mark.parametrize("dim", ["-1", "٣", " 0", "1" * 5000, "2"])
    def test_dimensions(self, saved: Path, dim: str) -> None:
        def change(top: dict[str, Any]) -> str:
            top["history"]["edits"][0]["axes"]["0.weight"] = {dim: 0}
            return json.dumps(top)

        rewrite(saved, change)
        self.refused(saved, "dimension")

    def test_a_tensor_that_is_there_twice(self, file: Path) -> None:
        entry = '"0.bias": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
        put(file, f"{{{entry}, {entry}}}", bytes(4))
        self.refused(file, r"it has '0\.bias' twice")

    def test_a_deeply_nested_header(self, file: Path) -> None:
        put(file, "[" * 100_000, b"")
        self.refused(file, "expected a whole safetensors file")

    def test_every_part_of_the_metadata_damaged_in_every_way(self, saved: Path) -> None:
        """Refused with an error of ours before anything changes, or without effect on the network."""
        content = saved.read_bytes()
        texts: list[dict[str, Any]] = []
        rewrite(saved, lambda top: texts.append(top) or json.dumps(top))
        expected, accepted = state_of(load(mlp(), saved)), set()
        every = list(damages(texts[0], ("version", "tied", "history", "positions", "masks")))
        assert len(every) > 1000
        for damage in every[::7]:
            if isinstance(damage.value, Tensor):
                continue
            saved.write_bytes(content)
            rewrite(saved, lambda top, damage=damage: json.dumps(damaged(top, damage)))  # type: ignore[misc]
            net = mlp()
            before = state_of(net)
            try:
                load(net, saved)
            except HistoryError:
                assert equal(state_of(net), before), damage
            else:
                accepted.add(str(damage.path))
                assert all(torch.equal(tensor, expected[name]) for name, tensor in named(net).items()), (
                    f"{damage} changes the network"
                )
        assert accepted

    def test_contents_that_no_file_holds(self, file: Path) -> None:
        class Extra(nn.Linear):
            def get_extra_state(self) -> dict[str, int]:
                return {"calls": 3}

            def set_extra_state(self, state: dict[str, int]) -> None: ...

        class Spectrum(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.register_buffer("phase", torch.zeros(2, dtype=torch.complex128))

        for net, match in (
            (Extra(2, 2), r"got a dict for '_extra_state'"),
            (Spectrum(), r"torch\.complex128 for 'phase'"),
            (mlp().to("meta"), r"on the meta device for '0\.weight'"),
        ):
            with pytest.raises(ValueError, match=match):
                save(net, file)
        assert not file.exists()

    def test_networks_without_weights(self, saved: Path) -> None:
        with pytest.raises(ValueError, match="on the meta device"):
            load(mlp().to("meta"), saved)
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got the class Block"):
            load(Block, saved)  # type: ignore[type-var]
        with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
            save(mlp().state_dict(), saved)  # type: ignore[arg-type]

    def test_masks_without_room(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(portable, "_LARGEST_TEXT", 50)
        net = mlp()
        mask(net)
        with pytest.raises(ValueError, match="expected history and masks of at most 50 bytes"):
            save(net, file)


class Versioned(nn.Sequential):
    """As torchvision's MNASNet: a state of no version is refused."""

    _version = 2

    def _load_from_state_dict(self, state_dict: Any, prefix: str, local_metadata: Any, *rest: Any) -> None:
        if local_metadata.get("version") != 2:
            raise ValueError(f"version should be 2 instead of {local_metadata.get('version')}")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def test_modules_that_ask_for_the_version_of_their_state(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Versioned(*mlp())
    prune(model, VECTORS, pruning_ratio=0.5)
    save(model, tmp_path / "small.safetensors")
    fresh = load(Versioned(*mlp()), tmp_path / "small.safetensors")
    assert torch.equal(fresh(VECTORS + 1), model(VECTORS + 1))
