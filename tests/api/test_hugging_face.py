"""Pruned transformers models in folders, and what they generate."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from lightning.pytorch import LightningModule
from safetensors.torch import load_file, save_file
from torch import nn

from lightning_prune import SavedModel, Scope, from_pretrained, load, prune, save, save_pretrained
from lightning_prune.structure.tracing import output_tensors
from lightning_prune.surgery import HistoryError, apply_masks, attach_masks, history_of, masks_of
from lightning_prune.surgery.tensors import named

TOKENS = {
    "input_ids": torch.randint(3, 60, (2, 6), generator=torch.Generator().manual_seed(0)),
    "attention_mask": torch.ones(2, 6, dtype=torch.long),
}
IMAGES = {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).view(2, 3, 16, 16)}
SOUND = {"input_features": torch.linspace(-1, 1, 480).view(2, 10, 24), "decoder_input_ids": TOKENS["input_ids"]}
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 24}
TEXT = {"vocab_size": 60, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS_ALONE = "*attention.q_proj"
HALF = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 12}

Build = Callable[[], Any]


@pytest.fixture(autouse=True)
def _no_bars() -> Iterator[None]:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def bert() -> Any:
    return transformers.BertModel(transformers.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=8))


def classifier() -> Any:
    return transformers.BertForSequenceClassification(bert().config)


def vit() -> Any:
    return transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES, image_size=16, patch_size=8))


def llama() -> Any:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "initializer_range": 0.3}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SIZES, **TEXT, **heads}))


def phi3() -> Any:
    """It reads the number of heads from the configuration, which its layers share."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 2, "initializer_range": 0.3}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**{**SIZES, **TEXT, **heads}))


def tied() -> Any:
    """A decoder of two layers, with one tensor for the first and the last."""
    config = transformers.BertConfig(
        **{**SIZES, "num_hidden_layers": 2}, vocab_size=60, max_position_embeddings=8, is_decoder=True
    )
    return transformers.BertLMHeadModel(config)


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16, "initializer_range": 0.3}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**TEXT, **sizes))


def t5() -> Any:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 4, "initializer_factor": 4.0}
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(**sizes, vocab_size=60, decoder_start_token_id=0)
    )


def whisper() -> Any:
    sizes = {"d_model": 32, "num_mel_bins": 10, "max_source_positions": 12, "max_target_positions": 16, "init_std": 0.3}
    for part in ("encoder", "decoder"):
        sizes |= {f"{part}_layers": 1, f"{part}_attention_heads": 4, f"{part}_ffn_dim": 24}
    config = transformers.WhisperConfig(**sizes, **TEXT, decoder_start_token_id=3)
    return transformers.WhisperForConditionalGeneration(config)


class Shifted(transformers.BertForSequenceClassification):  # type: ignore[misc,name-defined]
    """With a buffer that is in no file, and which a narrow configuration fills otherwise."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.register_buffer("shift", torch.arange(float(config.hidden_size)), persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.bert(input_ids, attention_mask).pooler_output + self.shift)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Shifted):
            transformers.initialization.copy_(module.shift, torch.arange(float(module.config.hidden_size)))


def shifted() -> Any:
    return Shifted(bert().config)


class Module(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.bert, self.head = bert(), nn.Linear(32, 3)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.head(self.bert(input_ids, attention_mask).last_hidden_state)


INPUTS: dict[Build, dict[str, Any]] = {
    vit: IMAGES,
    whisper: SOUND,
    t5: {**TOKENS, "decoder_input_ids": TOKENS["input_ids"]},
}


@cache
def _pruned(build: Build, layers: str | None) -> Any:
    torch.manual_seed(0)
    model = build().eval()
    prune(model, INPUTS.get(build, TOKENS), pruning_ratio=0.5, layers=layers)
    return model


def pruned(build: Build, layers: str | None = None) -> Any:
    """A copy of a network that is analysed and cut once."""
    return copy.deepcopy(_pruned(build, layers))


def outputs(model: nn.Module, inputs: dict[str, Any]) -> list[torch.Tensor]:
    with torch.no_grad():
        return output_tensors(model(**inputs))


def assert_same(loaded: nn.Module, model: nn.Module, inputs: dict[str, Any] = TOKENS) -> None:
    assert type(loaded) is type(model)
    assert not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    for found, expected in zip(outputs(loaded, inputs), outputs(model, inputs), strict=True):
        torch.testing.assert_close(found, expected)


class TestConfiguration:
    @pytest.mark.parametrize(
        ("build", "changes"),
        [
            (vit, HALF),
            (classifier, HALF),
            (gpt2, {"n_embd": 16, "n_head": 2}),
            (llama, {**HALF, "num_attention_heads": 4, "num_key_value_heads": 2}),
            (phi3, {**HALF, "num_attention_heads": 4, "num_key_value_heads": 2}),
        ],
    )
    def test_equal_widths_are_written_there(self, build: Build, changes: dict[str, int], tmp_path: Path) -> None:
        model, inputs = pruned(build), INPUTS.get(build, TOKENS)
        saved = save_pretrained(model, tmp_path / "small", inputs)
        assert (saved.way, dict(saved.changes)) == ("config", changes)
        loaded = type(model).from_pretrained(tmp_path / "small")
        assert_same(loaded, model, inputs)
        assert_same(from_pretrained(type(model), tmp_path / "small"), model, inputs)
        assert history_of(loaded) is None
        assert not (tmp_path / "small" / "lightning_prune.json").exists()

    def test_heads_alone(self, tmp_path: Path) -> None:
        """The width of a head, which follows from their number, is written too."""
        model = pruned(vit, HEADS_ALONE)
        saved = save_pretrained(model, tmp_path / "small", IMAGES)
        assert saved == SavedModel("config", {"head_dim": 8, "num_attention_heads": 2})
        assert str(saved).startswith("saved with its configuration (head_dim=8, num_attention_heads=2)")
        assert_same(transformers.ViTForImageClassification.from_pretrained(tmp_path / "small"), model, IMAGES)

    def test_a_dense_one(self, tmp_path: Path) -> None:
        model = bert().eval()
        assert save_pretrained(model, tmp_path, TOKENS) == SavedModel("config", {})
        assert_same(transformers.BertModel.from_pretrained(tmp_path), model)


class TestHistory:
    def test_comes_back(self, tmp_path: Path) -> None:
        model = pruned(bert)
        saved = save_pretrained(model, tmp_path, TOKENS)
        assert saved.way == "history"
        assert "no numbers of BertConfig give encoder.layer.0.attention" in str(saved)
        loaded = from_pretrained(transformers.BertModel, tmp_path)
        assert_same(loaded, model)
        history, expected = history_of(loaded), history_of(model)
        assert history is not None
        assert expected is not None
        assert history.widths_now == expected.widths_now
        prune(loaded, TOKENS, pruning_ratio={"encoder.layer.0.intermediate.dense": 0.75})
        assert loaded.encoder.layer[0].intermediate.dense.out_features == 6

    def test_transformers_refuses_the_folder(self, tmp_path: Path) -> None:
        save_pretrained(pruned(bert), tmp_path, TOKENS)
        for options in ({}, {"ignore_mismatched_sizes": True}):
            with pytest.raises(ValueError, match=r"pruned: load it by lightning_prune\.from_pretrained"):
                transformers.BertModel.from_pretrained(tmp_path, **options)

    def test_widths_that_differ_between_layers(self, tmp_path: Path) -> None:
        """With tied weights, in several files, in half precision, and what belongs to `generate`."""
        model = pruned(tied, "bert.encoder.layer.0.intermediate.dense").to(torch.bfloat16)
        model.generation_config.max_new_tokens = 7
        saved = save_pretrained(model, tmp_path / "small", TOKENS, max_shard_size="8KB")
        assert "bert.encoder.layer.0.intermediate.dense.weight is [12, 32] and bert.encoder.layer.1" in str(saved)
        assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
        loaded = from_pretrained(transformers.BertLMHeadModel, tmp_path, subfolder="small")
        assert_same(loaded, model)
        assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight
        assert loaded.generation_config.max_new_tokens == 7
        assert loaded.dtype == torch.bfloat16
        assert from_pretrained(type(model), tmp_path / "small", dtype=torch.float32).dtype == torch.float32

    def test_numbers_of_heads_that_differ_between_layers(self, tmp_path: Path) -> None:
        """Which layers read from the configuration, of which the whole network still has the dense one."""
        model = pruned(phi3, "model.layers.1.self_attn.qkv_proj")
        first, second = (layer.self_attn.config for layer in model.model.layers)
        assert first is model.config
        assert isinstance(second, transformers.Phi3Config)
        assert (first.num_attention_heads, second.num_attention_heads) == (8, 4)
        saved = save_pretrained(model, tmp_path, TOKENS)
        assert saved.way == "history"
        loaded = from_pretrained(type(model), tmp_path)
        assert_same(loaded, model)
        assert loaded.config.num_attention_heads == 8
        for one in (model, loaded):  # masks are made for one implementation, which every layer must use
            one.set_attn_implementation("eager")
            assert {layer.self_attn.config._attn_implementation for layer in one.model.layers} == {"eager"}
        assert_same(loaded, model)

    def test_removed_layers(self, tmp_path: Path) -> None:
        """From which the network is widened again, as by a checkpoint from before."""
        model = vit().eval()
        save(model, tmp_path / "dense.safetensors")
        dense = copy.deepcopy(model)
        scope = Scope("global", min_width=0)
        prune(model, IMAGES, pruning_ratio=0.999, layers="vit.layers.0.mlp.fc1", scope=scope)
        saved = save_pretrained(model, tmp_path / "small", IMAGES)
        assert saved.reason.startswith("layers were removed or replaced, with which vit.layers.0.layernorm_after.bias")
        loaded = from_pretrained(type(model), tmp_path / "small")
        assert_same(loaded, model, IMAGES)
        assert_same(load(loaded, tmp_path / "dense.safetensors"), dense, IMAGES)

    def test_a_buffer_that_is_in_no_file(self, tmp_path: Path) -> None:
        """The configuration gives the shapes, but other contents."""
        model = pruned(shifted)
        saved = save_pretrained(model, tmp_path, TOKENS)
        assert saved.way == "history"
        assert saved.reason == "BertConfig gives the shapes, but the network that is loaded returns something else"
        loaded = from_pretrained(Shifted, tmp_path)
        assert_same(loaded, model)
        assert torch.equal(loaded.shift, model.shift)
        assert len(loaded.shift) == 16
        assert "shift" not in loaded.state_dict()

    def test_masks(self, tmp_path: Path) -> None:
        model, name = bert().eval(), "encoder.layer.0.intermediate.dense.weight"
        attach_masks(model, {name: torch.arange(24 * 32).view(24, 32) % 2 == 0})
        apply_masks(model, masks_of(model))
        saved = save_pretrained(model, tmp_path, TOKENS)
        assert (saved.way, saved.reason) == ("history", "it has masks")
        loaded = from_pretrained(transformers.BertModel, tmp_path)
        assert torch.equal(masks_of(loaded)[name], masks_of(model)[name])
        assert_same(loaded, model)

    def test_a_part_of_the_network_that_was_pruned(self, tmp_path: Path) -> None:
        """The module around it has the history; the hidden width was cut, which alone is an output."""
        module = pruned(Module)
        with pytest.raises(TypeError, match=r"got a LightningModule. Give the transformers model in it, `module.bert`"):
            save_pretrained(module, tmp_path, TOKENS)
        module.bert.pooler.dense = nn.Linear(16, 32)  # which the module does not use, so that it was not cut
        whole = sum(tensor.numel() for tensor in bert().parameters())
        assert history_of(module.bert) is None
        assert save_pretrained(module.bert, tmp_path, TOKENS).way == "history"
        loaded = from_pretrained(transformers.BertModel, tmp_path)
        assert_same(loaded, module.bert)
        history = history_of(loaded)
        assert history is not None
        assert history.original.params == whole
        assert history.widths_now["encoder.layer.0.attention.self.query"] == 2


class TestFolder:
    def test_takes_the_place_of_other_weights(self, tmp_path: Path) -> None:
        (tmp_path / "tokenizer.json").write_text("{}")
        save_pretrained(pruned(bert), tmp_path, TOKENS)
        model = pruned(classifier)
        save_pretrained(model, tmp_path, TOKENS, max_shard_size="8KB")
        assert_same(transformers.BertForSequenceClassification.from_pretrained(tmp_path), model)
        names = {file.name for file in tmp_path.iterdir()}
        assert {"tokenizer.json", "config.json", "model.safetensors.index.json"} <= names
        assert not {"lightning_prune.json", "model.safetensors"} & names
        assert not list(tmp_path.parent.glob(f".{tmp_path.name}*"))

    def test_stays_as_it_was_after_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"BertModel fails on the example, a tensor of shape .*Give an example"):
            save_pretrained(pruned(bert), tmp_path, {"input_ids": torch.full((1, 2), 99)})
        assert list(tmp_path.iterdir()) == []

    def test_the_network_stays_as_it_was(self, tmp_path: Path) -> None:
        model = pruned(classifier).train()
        before = {name: tensor.clone() for name, tensor in named(model).items()}
        config = model.config.to_dict()
        save_pretrained(model, tmp_path, TOKENS)
        assert model.training
        assert model.config.to_dict() == config
        assert all(torch.equal(tensor, before[name]) for name, tensor in named(model).items())


class TestErrors:
    def test_another_kind_of_network(self, tmp_path: Path) -> None:
        with pytest.raises(TypeError, match=r"expected a transformers model, got a Linear. Use `save`"):
            save_pretrained(nn.Linear(2, 2), tmp_path, torch.zeros(1, 2))
        with pytest.raises(TypeError, match="expected the class of the model, such as BertModel, got Linear"):
            from_pretrained(nn.Linear, tmp_path)
        with pytest.raises(TypeError, match=r"got AutoModel\. An Auto class is none"):
            from_pretrained(transformers.AutoModel, tmp_path)

    def test_a_folder_of_the_models_own_save_pretrained(self, tmp_path: Path) -> None:
        pruned(bert).save_pretrained(tmp_path)
        with pytest.raises(HistoryError, match=r"weights that fit the configuration in .* use lightning_prune.save_p"):
            from_pretrained(transformers.BertModel, tmp_path)

    def test_a_folder_of_another_network(self, tmp_path: Path) -> None:
        save_pretrained(pruned(bert), tmp_path, TOKENS)
        with pytest.raises(TypeError, match=r"expected BertModel, the class saved in .*, got BertForMaskedLM"):
            from_pretrained(transformers.BertForMaskedLM, tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 40}))
        with pytest.raises(HistoryError, match="checkpoint of another architecture"):
            from_pretrained(transformers.BertModel, tmp_path)

    def test_lost_weights(self, tmp_path: Path) -> None:
        save_pretrained(pruned(bert), tmp_path, TOKENS)
        weights = load_file(tmp_path / "model.safetensors")
        del weights["pooler.dense.bias"]
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(HistoryError, match=r"expected the weights of all of BertModel in .*, pooler.dense.bias is"):
            from_pretrained(transformers.BertModel, tmp_path)

    def test_a_part_that_lost_layers(self, tmp_path: Path) -> None:
        """Without the history nothing tells what stands in their place."""
        narrow = bert()
        narrow.pooler.dense = nn.Identity()
        with pytest.raises(HistoryError, match="expected a BertModel with its pruning history, or one whose widths"):
            save_pretrained(narrow, tmp_path / "small", TOKENS)
        assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("build", [gpt2, llama, phi3, whisper, pytest.param(t5, marks=pytest.mark.slow)])
def test_generation_after_a_cut(build: Build) -> None:
    """Tokens with a cache of keys and values are those without; heads are cut with the default configuration."""
    model = pruned(build)
    history = history_of(model)
    assert history is not None
    assert any(name.endswith(("c_attn", "q_proj", "qkv_proj", "SelfAttention.q")) for name in history.widths_now)
    prompt = {name: value for name, value in INPUTS.get(build, TOKENS).items() if name != "decoder_input_ids"}
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens = model.generate(**prompt, **options, use_cache=True)
    assert len(tokens[:, -5:].unique()) > 2
    assert torch.equal(tokens, model.generate(**prompt, **options, use_cache=False))
    assert torch.equal(tokens, model.generate(**prompt, **options, cache_implementation="static", disable_compile=True))


def test_a_network_with_two_heads_left_is_pruned_again() -> None:
    """A new trace does not find them where a trial takes one of two heads that windows mask."""
    torch.manual_seed(0)
    config = transformers.SwinConfig(image_size=56, embed_dim=24, depths=[2, 2], num_heads=[3, 6], window_size=7)
    model = transformers.SwinForImageClassification(config).eval()
    images = torch.randn(2, 3, 56, 56)
    heads = "swin.encoder.layers.0.blocks.1.attention.q_proj"
    assert prune(model, images, pruning_ratio=0.5).widths[heads] == 2
    assert prune(model, images, pruning_ratio=0.75).widths[heads] == 1
    assert model(images).logits.shape == (2, 2)
