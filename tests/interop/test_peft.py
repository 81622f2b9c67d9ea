"""Folders of HF peft: read and written with the same outputs, and refused in one line where that cannot be."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import timm
import torch
import torchvision.models as tv
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import torchgraft as tg
from torchgraft.core.checkpoint import CONFIG, WEIGHTS
from torchgraft.interop import read_peft, write_peft

from ..core.attaching import Remembered, assert_close, disturb
from ..methods.networks import images, tiny

BERT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 30}
VIT = {**BERT, "image_size": 32, "patch_size": 8, "num_labels": 3}
IDS = torch.randint(1, 30, (2, 8), generator=torch.Generator().manual_seed(0))


def bert() -> nn.Module:
    torch.manual_seed(0)
    return hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)).eval()


def hf_vit() -> nn.Module:
    torch.manual_seed(0)
    return hf.ViTForImageClassification(hf.ViTConfig(**{k: v for k, v in VIT.items() if k != "vocab_size"})).eval()


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    model = tv.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=3).eval()
    nn.init.normal_(model.heads.head.weight)  # which torchvision starts at zero
    return model


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "vit": (lambda: tiny("test_vit"), images()),
    "resnet": (lambda: tiny("test_resnet"), images()),
    "efficientnet": (lambda: tiny("test_efficientnet"), images()),
    "bert": (bert, IDS),
    "hf_vit": (hf_vit, images()),
    "torchvision_vit": (torchvision_vit, images()),
}


def out(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x)
    return found if isinstance(found, Tensor) else found.logits


def stirred(model: peft.PeftModel) -> peft.PeftModel:
    """Every trainable tensor moved away from its start."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def from_peft(name: str, config: peft.PeftConfig, folder: Path) -> Tensor:
    """A folder that peft wrote, and what its model returns."""
    make, x = MODELS[name]
    model = stirred(peft.get_peft_model(make(), config))
    model.save_pretrained(folder)
    return out(model, x)


def to_peft(name: str, folder: Path) -> Tensor:
    """What peft's model returns with the folder that we wrote."""
    make, x = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # peft warns of tensors that are missing or left over
        model = peft.PeftModel.from_pretrained(make(), folder).eval()
    return out(model, x)


READ: list[tuple[str, peft.PeftConfig]] = [
    ("vit", peft.LoraConfig(r=4, lora_alpha=6, target_modules=["qkv", "fc1"])),
    ("vit", peft.LoraConfig(r=4, target_modules="all-linear", use_rslora=True, modules_to_save=["head"])),
    ("vit", peft.LoraConfig(r=4, target_modules=["qkv", "fc2"], use_dora=True)),
    (
        "vit",
        peft.LoraConfig(
            r=4, target_modules=["qkv", "proj"], rank_pattern={"qkv": 2}, alpha_pattern={r"blocks\.1\.attn\.proj": 3}
        ),
    ),
    ("vit", peft.LoraConfig(r=100, target_modules=["attn.proj"])),
    ("vit", peft.LoKrConfig(r=2, alpha=3, target_modules=["qkv", "fc1"], decompose_both=True)),
    ("vit", peft.LoKrConfig(r=2, target_modules=["qkv", "fc1"], decompose_factor=8, rank_pattern={"fc1": 32})),
    ("vit", peft.LoHaConfig(r=2, alpha=3, target_modules=["qkv", "fc1"], modules_to_save=["head"])),
    ("vit", peft.LoHaConfig(r=100, target_modules=["attn.proj"])),
    ("vit", peft.IA3Config(target_modules=["qkv", "fc2"], feedforward_modules=["fc2"])),
    ("resnet", peft.LoraConfig(r=4, target_modules=r"layer.*conv[12]|fc")),
    ("resnet", peft.LoraConfig(r=4, target_modules=["conv2"], use_dora=True, modules_to_save=["fc"])),
    ("resnet", peft.LoKrConfig(r=1, target_modules=r"layer.*conv[12]", use_effective_conv2d=True)),
    ("resnet", peft.LoHaConfig(r=2, target_modules=["conv2"], use_effective_conv2d=True)),
    ("resnet", peft.LoHaConfig(r=2, target_modules=["conv2"])),
    ("resnet", peft.IA3Config(target_modules=r"layer.*conv[12]", feedforward_modules=r".*conv1")),
    ("efficientnet", peft.LoraConfig(r=4, target_modules=["conv_pw", "conv_pwl", "conv_stem"])),
    ("efficientnet", peft.LoKrConfig(r=1, target_modules=r".*blocks\.2\..*conv_pw|.*conv_pwl")),
    ("efficientnet", peft.IA3Config(target_modules=["conv_dw", "conv_pwl"], feedforward_modules=["conv_pwl"])),
    ("bert", peft.LoraConfig(r=4, task_type="SEQ_CLS")),
    ("bert", peft.LoKrConfig(r=2, target_modules=["query", "value"], task_type="SEQ_CLS")),
    ("bert", peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value", "output.dense"],
                            feedforward_modules=["output.dense"])),
    ("hf_vit", peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["classifier"])),
    ("hf_vit", peft.LoHaConfig(r=2, target_modules=["fc1", "fc2"])),
    ("torchvision_vit", peft.LoraConfig(r=4, target_modules=["mlp.0", "mlp.3"])),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "config"), READ, ids=[f"{n}-{c.peft_type.value}-{i}" for i, (n, c) in enumerate(READ)]
)
def test_an_adapter_of_peft_gives_the_outputs_of_peft_and_is_written_as_it_was(
    name: str, config: peft.PeftConfig, tmp_path: Path
) -> None:
    wanted = from_peft(name, config, tmp_path / "theirs")
    make, x = MODELS[name]
    model = make()
    plain = out(model, x)
    adapter = tg.load(model, tmp_path / "theirs")
    assert adapter.name == "default"
    assert_close(out(model, x), wanted, 1e-4)
    assert not torch.allclose(out(model, x), plain, atol=1e-3)
    adapter.save(tmp_path / "again", format="peft")
    assert_close(to_peft(name, tmp_path / "again"), wanted, 1e-4)
    adapter.save(tmp_path / "ours")
    twin = make()
    tg.load(twin, tmp_path / "ours")
    assert torch.equal(out(twin, x), out(model, x))
    tg.detach(model)
    assert torch.equal(out(model, x), plain)


WRITTEN = [
    ("vit", "lora"),
    ("vit", "lora[targets=[q, v, proj], dora=true, rank=3]"),
    ("vit", "lora[targets=all, rslora=true, dropout=0.1, rank_pattern=[['blocks[0]', 2]]]"),
    ("vit", "lokr[targets=[qkv, fc1], rank=3]"),
    ("vit", "loha[targets=linear, alpha_pattern=[['blocks[0]', 2]]]"),
    ("vit", "ia3"),
    ("resnet", "lora"),
    ("resnet", "lora[dora=true]"),
    ("resnet", "lokr[rank=2, use_effective_conv2d=true]"),
    ("resnet", "loha[rank=2]"),
    ("resnet", "ia3"),
    ("efficientnet", "lora[targets=pointwise]"),
    ("bert", "lora[targets=all]"),
    ("bert", "ia3"),
    ("hf_vit", "lora"),
    ("hf_vit", "lokr[targets=linear]"),
    ("torchvision_vit", "lora[targets=[fc1, fc2]]"),
]


@pytest.mark.parametrize(("name", "method"), WRITTEN)
def test_peft_computes_with_our_adapter_what_we_do(name: str, method: str, tmp_path: Path) -> None:
    make, x = MODELS[name]
    model = make()
    adapter = disturb(tg.attach(model, method, num_classes=3), 0.1)
    adapter.save(tmp_path, format="peft")
    assert_close(to_peft(name, tmp_path), out(model, x), 1e-4)
    read = make()
    tg.load(read, tmp_path)
    assert_close(out(read, x), out(model, x), 1e-4)


def test_the_precision_of_the_file_can_be_chosen(tmp_path: Path) -> None:
    tg.attach(tiny("test_vit"), "lora").save(tmp_path, dtype="fp16", format="peft")
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}


# -- other models ----------------------------------------------------------------------------------------


def test_a_wrapper_around_the_backbone_does_not_matter(tmp_path: Path) -> None:
    class Wrapper(nn.Module):
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.backbone = backbone

        def forward(self, x: Tensor) -> Tensor:
            return self.backbone(x)

    config = peft.LoraConfig(r=4, target_modules=["qkv"])
    wanted = from_peft("vit", config, tmp_path / "bare")
    model = Wrapper(tiny("test_vit"))
    read_peft(model, tmp_path / "bare", example=((images(),), {}))
    assert_close(out(model, images()), wanted, 1e-4)
    wrapped = stirred(peft.get_peft_model(Wrapper(tiny("test_vit")), config))
    wrapped.save_pretrained(tmp_path / "wrapped")
    bare = tiny("test_vit")
    read_peft(bare, tmp_path / "wrapped")
    assert_close(out(bare, images()), out(wrapped, images()), 1e-4)


def test_a_feature_extractor_takes_the_adapter_of_the_classifier_and_keeps_its_head(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=["conv1", "conv2"], exclude_modules=["conv1"], modules_to_save=["fc"])
    from_peft("resnet", config, tmp_path / "theirs")
    features = timm.create_model("test_resnet", features_only=True)
    adapter = tg.load(features, tmp_path / "theirs")
    assert adapter.num_classes == 3
    assert set(adapter.parked) == {"head.weight", "head.bias"}
    adapter.save(tmp_path / "ours")
    whole = tiny("test_resnet")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tg.load(whole, tmp_path / "ours", strict=False)
    twin = tiny("test_resnet")
    tg.load(twin, tmp_path / "theirs")
    assert_close(out(whole, images()), out(twin, images()), 1e-5)


def test_two_of_them_live_on_one_model(tmp_path: Path) -> None:
    first = from_peft("vit", peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]), tmp_path / "a")
    second = from_peft("vit", peft.LoHaConfig(r=2, target_modules=["fc1"]), tmp_path / "b")
    model = tiny("test_vit")
    read_peft(model, tmp_path / "a", "a")
    read_peft(model, tmp_path / "b", "b")
    with tg.route(model, ["a", "b"]):
        together = out(model, images())
    assert_close(together, torch.stack([first[0], second[1]]), 1e-4)


# -- refusals --------------------------------------------------------------------------------------------


def folder_of(
    tmp_path: Path, config: dict[str, Any] | None = None, tensors: Callable[[dict], None] | None = None
) -> Path:
    """A folder of peft, with some options or tensors changed."""
    from_peft("vit", peft.LoraConfig(r=4, target_modules=["qkv"], modules_to_save=["head"]), tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**written, **(config or {})}))
    if tensors is not None:
        held = load_file(tmp_path / WEIGHTS)
        tensors(held)
        save_file(held, tmp_path / WEIGHTS)
    return tmp_path


def refused(folder: Path, said: str) -> None:
    model = tiny("test_vit")
    remembered = Remembered(model, images())
    with pytest.raises(tg.GraftError, match=said) as raised:
        tg.load(model, folder)
    assert "\n" not in str(raised.value)
    remembered.assert_same()


OPTIONS = [
    ({"peft_type": "VERA"}, r"peft_type='VERA' is not supported; .*LORA"),
    ({"peft_type": 3}, "peft_type=3 is not supported"),
    ({"bias": "lora_only"}, "bias='lora_only' trains biases of the backbone too"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' changes the backbone's own weights"),
    ({"lora_bias": True}, "the option lora_bias=True of LORA is not supported"),
    ({"layer_replication": [[0, 2]]}, "the option layer_replication"),
    ({"use_qalora": True}, "the option use_qalora=True"),
    ({"option_of_tomorrow": "yes"}, "the option option_of_tomorrow='yes'"),
    ({"lora_alpha": "much"}, "lora_alpha='much' is not valid; expected a number"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan is not valid"),
    ({"lora_dropout": -1}, "lora_dropout=-1 is not valid"),
    ({"alpha_pattern": {"(": 1}}, "alpha_pattern holds a pattern that cannot be read"),
    ({"alpha_pattern": [1]}, r"alpha_pattern=\[1\] is not valid; expected an object"),
]


@pytest.mark.parametrize(("config", "said"), OPTIONS, ids=[str(c) for c, _ in OPTIONS])
def test_options_that_cannot_be_followed_are_refused_by_name(config: dict, said: str, tmp_path: Path) -> None:
    refused(folder_of(tmp_path, config), said)


A, QKV = "lora_A.weight", "base_model.model.blocks.0.attn.qkv."
TENSORS: list[tuple[Callable[[dict], object], str]] = [
    (lambda t: t.pop(QKV + A), r"blocks.0.attn.qkv.lora_A.weight is missing"),
    (lambda t: t.update({QKV + A: torch.zeros(4, 63)}), r"lora_A.weight has shape \(4, 63\), this model n"),
    (lambda t: t.update({QKV + "lora_embedding_A": torch.zeros(4, 63)}), "lora_embedding_A' is no part of LORA"),
    (lambda t: t.update({QKV + "lora_B.bias": torch.zeros(192)}), "lora_B.bias' is no part of LORA"),
    (lambda t: t.update({"base_model.model.blocks.99.attn.qkv." + A: torch.zeros(4, 64)}), "no module 'blocks.99.attn"),
    (lambda t: t.update({"base_model.model.norm.weight": torch.zeros(64)}), r"'norm.weight' \(modules_to_save\)"),
    (lambda t: t.update({"base_model.model.head.weight": torch.zeros(3, 60)}), "the saved classifier's weight"),
    (lambda t: t.pop("base_model.model.head.weight"), "the saved classifier has no weight"),
    (lambda t: t.clear() or t.update(x=torch.zeros(1)), "holds no tensor of LORA"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "said"), TENSORS, ids=[s for _, s in TENSORS])
def test_tensors_that_do_not_fit_are_refused_by_name(change: Callable[[dict], None], said: str, tmp_path: Path) -> None:
    refused(folder_of(tmp_path, tensors=change), said)


def test_missing_and_damaged_files_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a folder")
    folder = folder_of(tmp_path / "folder")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    refused(folder, "is damaged")
    (folder / WEIGHTS).unlink()
    refused(folder, "does not exist")
    (folder / CONFIG).write_text("{")
    refused(folder, "cannot be read as JSON")
    (folder / CONFIG).unlink()
    refused(folder, "does not exist")


def test_what_was_saved_with_the_backbones_own_values_needs_no_place(tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        tensors["base_model.model.norm.weight"] = tiny("test_vit").norm.weight.detach().clone()

    model = tiny("test_vit")
    tg.load(model, folder_of(tmp_path, tensors=add))


@pytest.mark.parametrize(("option", "value"), [("rank_dropout", 0.1), ("module_dropout", 0.1)])
def test_dropout_that_acts_in_training_only_is_left_out_with_a_warning(
    option: str, value: float, tmp_path: Path
) -> None:
    wanted = from_peft("vit", peft.LoHaConfig(r=2, target_modules=["qkv"], **{option: value}), tmp_path)
    model = tiny("test_vit")
    with pytest.warns(UserWarning, match=option):
        tg.load(model, tmp_path)
    assert_close(out(model, images()), wanted, 1e-4)


def test_lora_dropout_is_kept_where_it_can_act(tmp_path: Path) -> None:
    from_peft("vit", peft.LoraConfig(r=2, target_modules=["qkv"], lora_dropout=0.2), tmp_path / "a")
    assert tg.load(tiny("test_vit"), tmp_path / "a").method.dropout == 0.2
    from_peft("vit", peft.LoraConfig(r=2, target_modules=["qkv"], lora_dropout=0.2, use_dora=True), tmp_path / "b")
    with pytest.warns(UserWarning, match="lora_dropout=0.2 acts in training only"):
        assert tg.load(tiny("test_vit"), tmp_path / "b").method.dropout == 0


class Layers(nn.Sequential):
    """Layers for which peft's adapters are something else than a change of their weight."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(4, 4, 3, padding=1, groups=2),
            nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
            timm.layers.StdConv2d(4, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=2, dilation=2),
            nn.ConvTranspose2d(4, 4, 2),
            timm.layers.Conv2dSame(4, 4, 3),
        )


WRITABLE = [
    *((path, method) for path in ("0", "2", "3") for method in ("lokr", "loha", "ia3")),
    ("1", "ia3"),
    ("5", "lora"),
    ("5", "ia3"),
]
"""Layers that are special in some way, and the methods for which that makes no difference."""


@pytest.mark.parametrize(("path", "method"), WRITABLE)
def test_peft_computes_the_same_on_special_convolutions_too(path: str, method: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Layers().eval(), torch.randn(2, 4, 8, 8)
    plain = copy.deepcopy(model)
    adapter = tg.attach(model, f"{method}[targets=all]", include=path, example=((x,), {}))
    disturb(adapter).save(tmp_path, format="peft")
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path).eval()
    assert_close(out(theirs, x), out(model, x), 1e-4)
    read_peft(plain, tmp_path, example=((x,), {}))
    assert_close(out(plain, x), out(model, x), 1e-5)


UNWRITABLE = [
    ("0", "lora", "a grouped convolution is a dense one"),
    ("1", "lora", "peft pads with zeros, the layer by reflect"),
    ("2", "lora", "peft standardises A"),
    ("3", "lora", "peft leaves out the dilation"),
    ("4", "lora", "peft has no LORA for ConvTranspose2d"),
    ("5", "lokr", "peft leaves out the SAME padding"),
    ("1", "loha", "peft pads with zeros"),
]


@pytest.mark.parametrize(("path", "method", "said"), UNWRITABLE)
def test_layers_on_which_peft_computes_something_else_are_refused(
    path: str, method: str, said: str, tmp_path: Path
) -> None:
    x = torch.randn(2, 4, 8, 8)
    model = Layers()
    adapter = tg.attach(model, f"{method}[targets=all, rank=2]", include=path, example=((x,), {}))
    with pytest.raises(tg.GraftError, match=rf"^'{path}' cannot be written for peft: .*{said}.*format='torchgraft'"):
        write_peft(adapter, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


def test_a_product_whose_axes_peft_takes_wrongly_is_refused_both_ways(tmp_path: Path) -> None:
    config = peft.LoKrConfig(r=8, target_modules=["0"])
    stirred(peft.get_peft_model(nn.Sequential(nn.Conv1d(4, 4, 3)), config)).save_pretrained(tmp_path)
    model, example = nn.Sequential(nn.Conv1d(4, 4, 3)), ((torch.randn(1, 4, 8),), {})
    with pytest.raises(tg.GraftError, match="wrong axes"):
        read_peft(model, tmp_path, example=example)
    assert tg.core.adapters(model) == {}
    adapter = tg.attach(model, "lokr[targets=all]", include="0", example=example)
    with pytest.raises(tg.GraftError, match="wrong axes"):
        write_peft(adapter, tmp_path)


@pytest.mark.parametrize("fed", ["(", 3])
def test_a_list_of_inputs_that_cannot_be_read_is_refused(fed: object, tmp_path: Path) -> None:
    from_peft("vit", peft.IA3Config(target_modules=["qkv"], feedforward_modules=[]), tmp_path)
    written = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**written, "feedforward_modules": fed}))
    refused(tmp_path, "feedforward_modules=")


def test_an_adapter_of_peft_on_a_grouped_convolution_is_refused(tmp_path: Path) -> None:
    two = lambda: nn.Sequential(*list(Layers())[:2])  # noqa: E731
    model = stirred(peft.get_peft_model(two(), peft.LoraConfig(r=2, target_modules=["0"])))
    model.save_pretrained(tmp_path)
    with pytest.raises(tg.GraftError, match="'0' cannot be read: peft's LoRA of a grouped convolution is a dense one"):
        read_peft(two(), tmp_path, example=((torch.randn(1, 4, 8, 8),), {}))


REFUSED = [
    ("test_vit", "ssf", "ssf has no counterpart in peft"),
    ("test_vit", "lora + bitfit", "combination has no counterpart"),
    ("test_vit", "lokr", "it changes the rows 0 to 64 only"),
    ("swin", "lora + ssf", "no counterpart"),
]


@pytest.mark.parametrize(("backbone", "method", "said"), REFUSED)
def test_methods_without_a_counterpart_are_refused(backbone: str, method: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(tg.GraftError, match=said):
        tg.attach(tiny(backbone), method).save(tmp_path, format="peft")


def test_layers_that_their_parent_reads_are_refused(tmp_path: Path) -> None:
    beit = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=12, num_heads=2, img_size=32)
    for method in ("lora[targets=qkv]", "ia3"):
        with pytest.raises(tg.GraftError, match="its parent reads its weight"):
            tg.attach(copy.deepcopy(beit), method).save(tmp_path, format="peft")


def test_the_attention_whose_output_peft_changes_twice_is_refused_both_ways(tmp_path: Path) -> None:
    with pytest.raises(tg.GraftError, match=r"cannot be written for peft: .*out_proj of nn.MultiheadAttention twice"):
        tg.attach(torchvision_vit(), "lora").save(tmp_path, format="peft")
    from_peft("torchvision_vit", peft.LoraConfig(r=4, target_modules=["self_attention"]), tmp_path)
    with pytest.raises(tg.GraftError, match=r"cannot be read: .*out_proj of nn.MultiheadAttention twice"):
        tg.load(torchvision_vit(), tmp_path)


def test_statistics_and_merged_adapters_are_refused(tmp_path: Path) -> None:
    with pytest.raises(tg.GraftError, match="no statistics of BatchNorm"):
        tg.attach(tiny("test_resnet"), "lora", batchnorm="adapt").save(tmp_path, format="peft")
    adapter = tg.attach(tiny("test_vit"), "lora")
    tg.merge(adapter.model)
    with pytest.raises(tg.GraftError, match="is merged into the weights"):
        adapter.save(tmp_path, format="peft")


def test_an_unknown_format_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(tg.GraftError, match=r"format='pefd'; .*peft"):
        tg.attach(tiny("test_vit"), "lora").save(tmp_path, format="pefd")  # type: ignore[arg-type]
