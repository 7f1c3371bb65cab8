from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import dynamic_modules_utils
from safetensors.torch import load_file, save_file

from coalescer_fast import CoalescerPipeline, CoalescerUNet
from coalescer_fast.folders import WEIGHTS as EMBEDDED

from .helpers.pipelines import ANCHORED, FREE, noise, tiny_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"
CALL = {"prompt": ["octopus", "cat", ""], "num_images_per_prompt": 2, "guidance_scale": 1.5, "output_type": "pt"}


def draw(pipe: CoalescerPipeline) -> torch.Tensor:
    return pipe(**CALL, latents=noise(6)).images


def same(a: CoalescerPipeline, b: CoalescerPipeline) -> bool:
    """Up to rounding: weights of a file lie in memory as they lie there, and sums go by that."""
    return torch.allclose(draw(a), draw(b), rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pipe() -> CoalescerPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def saved(pipe, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def model(saved, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.fixture
def unvouched(model) -> Path:
    """Without checksums, as folders of an earlier version and of the Hub are."""
    (model / "checksums.json").unlink()
    return model


def change(path: Path, **entries: Any) -> None:
    """Set entries of a JSON file."""
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **entries}), "utf-8")


def refused(folder: Path, **kwargs: Any) -> str:
    with pytest.raises(ValueError, match=r".") as caught:
        CoalescerPipeline.from_pretrained(folder, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_saved_and_loaded(pipe, saved):
    files = {p.relative_to(saved).as_posix() for p in saved.rglob("*") if p.is_file()}
    networks = {
        f"{name}/{file}" for name in ("unet", "vae", "description_encoder") for file in ("config.json", WEIGHTS)
    }
    assert files == {"model_index.json", "pipeline.py", "checksums.json", "scheduler/scheduler_config.json", *networks}
    loaded = CoalescerPipeline.from_pretrained(saved)
    assert type(loaded) is CoalescerPipeline
    assert same(loaded, pipe)
    assert not any(module.training for module in (loaded.unet, loaded.vae, loaded.description_encoder))


def test_the_index_names_this_package(saved):
    index = json.loads((saved / "model_index.json").read_text("utf-8"))
    assert index["_class_name"] == ["pipeline", "CoalescerPipeline"]
    for component in ("unet", "scheduler", "description_encoder", "vae"):
        assert index[component][0].startswith("coalescer_fast.")


@pytest.fixture
def code_cache(monkeypatch, tmp_path):
    """Where diffusers copies the code of folders to."""
    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))


def test_diffusers_loads_it_by_its_code(pipe, saved, code_cache):
    loaded = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
    assert type(loaded) is CoalescerPipeline
    assert same(loaded, pipe)


def test_diffusers_loads_it_with_leave_only(saved, code_cache):
    """docs/diffusers.md says so."""
    with pytest.raises(ValueError, match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(saved)


class Derived(CoalescerPipeline):
    """Somebody's own."""


def test_a_derived_class_loads_what_it_saved(pipe, tmp_path):
    mine = Derived(**pipe.components)
    mine.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text("utf-8"))["_class_name"] == ["pipeline", "Derived"]
    assert f"from {Derived.__module__} import Derived" in (tmp_path / "pipeline.py").read_text("utf-8")
    loaded = Derived.from_pretrained(tmp_path)
    assert type(loaded) is Derived
    assert same(loaded, pipe)
    assert "holds a Derived, not a CoalescerPipeline" in refused(tmp_path)


def test_a_derived_class_loads_what_the_class_saved(saved):
    assert type(Derived.from_pretrained(saved)) is Derived


class WithMore(CoalescerPipeline):
    def __init__(self, unet, scheduler, description_encoder, vae, critic):
        super().__init__(unet, scheduler, description_encoder, vae)
        self.register_modules(critic=critic)


def test_a_derived_class_with_another_component(pipe, tmp_path):
    mine = WithMore(**pipe.components, critic=CoalescerUNet(**FREE))
    mine.save_pretrained(tmp_path)
    loaded = WithMore.from_pretrained(tmp_path)
    assert isinstance(loaded.critic, CoalescerUNet)
    change(tmp_path / "model_index.json", critic=["nowhere.at_all", "Critic"])
    with pytest.raises(ValueError, match=r"critic in .* is nowhere.at_all.Critic"):
        WithMore.from_pretrained(tmp_path)


class DerivedUNet(CoalescerUNet, ModelMixin):
    """Of a class that is imported already; diffusers looks for ModelMixin beside it."""


def test_a_derived_component(pipe, tmp_path):
    unet = DerivedUNet(**ANCHORED)
    unet.load_state_dict(pipe.unet.state_dict())
    CoalescerPipeline(**{**pipe.components, "unet": unet.eval()}).save_pretrained(tmp_path)
    loaded = CoalescerPipeline.from_pretrained(tmp_path)
    assert type(loaded.unet) is DerivedUNet
    assert same(loaded, pipe)


@pytest.mark.parametrize("name", ["unet", "scheduler", "description_encoder", "vae"])
def test_a_component_that_is_given_need_not_be_there(pipe, model, name):
    shutil.rmtree(model / name)
    assert "is missing" in refused(model)
    loaded = CoalescerPipeline.from_pretrained(model, **{name: getattr(pipe, name)})
    assert getattr(loaded, name) is getattr(pipe, name)
    assert same(loaded, pipe)


@pytest.mark.parametrize("name", ["unet", "scheduler", "description_encoder", "vae"])
def test_a_component_that_is_none(saved, name):
    assert f"{name} is None" in refused(saved, **{name: None})


VARIANTS = [{"variant": "fp16"}, {"max_shard_size": 4000}, {"variant": "fp16", "max_shard_size": 4000}]


@pytest.mark.parametrize("how", VARIANTS, ids=str)
def test_variants_and_shards(saved, tmp_path, how):
    half = CoalescerPipeline.from_pretrained(saved, dtype=torch.float16)
    half.save_pretrained(tmp_path, True, how.get("variant"), how.get("max_shard_size"))  # by position, as in diffusers
    index = tmp_path / "unet" / f"diffusion_pytorch_model.safetensors.index{'.fp16' * ('variant' in how)}.json"
    assert index.exists() == ("max_shard_size" in how)
    loaded = CoalescerPipeline.from_pretrained(tmp_path, variant=how.get("variant"), dtype=torch.float16)
    assert loaded.unet.dtype == torch.float16
    assert same(loaded, half)
    if "variant" in how:
        assert "is missing" in refused(tmp_path)


def test_whole_weights_replace_shards(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path, max_shard_size="4KB")
    assert list((tmp_path / "unet").glob("*.index.json"))
    pipe.save_pretrained(tmp_path)
    assert not list((tmp_path / "unet").glob("*.index.json"))
    torch.testing.assert_close(draw(CoalescerPipeline.from_pretrained(tmp_path)), draw(pipe), rtol=0, atol=1e-5)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match=r"file cannot be written \(.*\): save into a folder that can"):
        tiny_pipeline().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_a_variant_beside_the_rest(pipe, model):
    CoalescerPipeline.from_pretrained(model, dtype=torch.float16).save_pretrained(model, variant="fp16")
    assert same(CoalescerPipeline.from_pretrained(model), pipe)
    assert CoalescerPipeline.from_pretrained(model, variant="fp16", dtype=torch.float16).unet.dtype == torch.float16
    (model / "unet" / WEIGHTS).unlink()  # what is not read need not be there
    CoalescerPipeline.from_pretrained(model, variant="fp16")
    assert f"unet/{WEIGHTS} is missing" in refused(model)


@pytest.mark.parametrize("variant", ["../fp16", "", 16, "fp.16"], ids=repr)
def test_wrong_variants(saved, variant):
    assert f"variant is {variant!r}" in refused(saved, variant=variant)


def test_a_variant_that_there_is_not(saved):
    assert "variant=bf16" in refused(saved, variant="bf16")


@pytest.mark.parametrize("elsewhere", ["../vae/" + WEIGHTS, "/etc/passwd", 3, "weights.bin"], ids=repr)
def test_shards_are_files_of_the_folder(pipe, tmp_path, elsewhere):
    pipe.save_pretrained(tmp_path, max_shard_size=4000)
    index = tmp_path / "unet" / f"{WEIGHTS}.index.json"
    table = json.loads(index.read_text("utf-8"))
    table["weight_map"]["conv_in.weight"] = elsewhere
    index.write_text(json.dumps(table), "utf-8")
    assert "which is no file of weights in this folder" in refused(tmp_path)


@pytest.mark.parametrize("entries", [{"weight_map": []}, {"weight_map": {}}, {"metadata": None}], ids=str)
def test_an_index_of_shards_that_is_none(pipe, tmp_path, entries):
    pipe.save_pretrained(tmp_path, max_shard_size=4000)
    change(tmp_path / "unet" / f"{WEIGHTS}.index.json", **entries)
    assert "no metadata or no weight_map" in refused(tmp_path)


def remove(path: Path) -> None:
    path.unlink()


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def nested(path: Path) -> None:
    path.write_text("[" * 100_000, "utf-8")


def not_a_table(path: Path) -> None:
    path.write_text("[1, 2]", "utf-8")


def no_text(path: Path) -> None:
    path.write_bytes(b'{"\xff": 1}')


def entry(**entries: Any) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        change(path, **entries)

    damage.__name__ = str(entries)
    return damage


def without_unet(path: Path) -> None:
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text("utf-8")).items() if k != "unet"}), "utf-8")


def tensors(function: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        state = load_file(path)
        function(state)
        save_file(state, path, {"format": "pt"})

    return damage


without_a_tensor = tensors(lambda state: state.pop("conv_in.weight"))
with_another_tensor = tensors(lambda state: state.update(more=torch.zeros(1)))
with_another_shape = tensors(lambda state: state.update({"conv_in.bias": torch.zeros(9)}))
with_integers = tensors(lambda state: state.update({"conv_in.bias": torch.zeros(8, dtype=torch.int64)}))
with_a_float_table = tensors(lambda state: state.update(table=state["table"].float()))
with_nan = tensors(lambda state: state["conv_in.bias"].__setitem__(3, torch.nan))
with_infinity = tensors(lambda state: state["latent_norm.running_var"].__setitem__(0, torch.inf))

INDEX = "model_index.json"


@pytest.mark.parametrize(
    ("file", "damage", "words"),
    [
        (INDEX, remove, "no model_index.json"),
        (INDEX, truncate, "model_index.json is damaged"),
        (INDEX, empty, "model_index.json is damaged"),
        (INDEX, nested, "model_index.json is damaged"),
        (INDEX, no_text, "model_index.json is damaged"),
        (INDEX, not_a_table, "model_index.json is damaged: it holds a list"),
        (
            INDEX,
            entry(_class_name="StableDiffusionPipeline"),
            "holds a StableDiffusionPipeline, not a CoalescerPipeline",
        ),
        (INDEX, entry(_class_name=["pipeline", "Other"]), "holds a Other, not a CoalescerPipeline"),
        (INDEX, entry(_class_name=[]), "not a CoalescerPipeline"),
        (INDEX, entry(_class_name={"a": 1}), "not a CoalescerPipeline"),
        (INDEX, without_unet, "names no unet"),
        (INDEX, entry(unet=None), "unet in"),
        (INDEX, entry(unet=[None, None]), "unet in"),
        (INDEX, entry(unet=["diffusers", "UNet2DModel"]), "diffusers.UNet2DModel"),
        (INDEX, entry(unet=["coalescer_fast.models.autoencoder", "CoalescerAutoencoder"]), "not a CoalescerUNet"),
        (INDEX, entry(unet=["os", "system"]), "os.system, which is not a CoalescerUNet"),
        (INDEX, entry(safety=["os", "system"]), "names safety, which no CoalescerPipeline has"),
        ("unet/config.json", remove, "unet/config.json is missing"),
        ("unet/config.json", truncate, "config.json is damaged"),
        ("unet/config.json", nested, "config.json is damaged"),
        (
            "unet/config.json",
            entry(embedding_dim=11),
            "film.weight is F32 [16, 10]; expected F64 or F32 or F16 or BF16 [16, 11]",
        ),
        (
            "unet/config.json",
            entry(embedding_dim=10**12),
            "embedding_dim is 1000000000000, which the weights beside it are not of",
        ),
        ("unet/config.json", entry(layers_per_block=10**6), "layers_per_block is 1000000"),
        ("unet/config.json", entry(latent_channels=-3), "latent_channels is -3"),
        ("unet/config.json", entry(norm_num_groups=0), "unet/config.json is damaged"),
        ("unet/config.json", entry(norm_num_groups="4"), "norm_num_groups is '4'"),
        ("unet/config.json", entry(norm_num_groups=4.0), "norm_num_groups is 4.0"),
        ("unet/config.json", entry(mid_attention=1), "mid_attention is 1"),
        ("unet/config.json", entry(attention_levels=[1.5]), "attention_levels is [1.5]"),
        ("unet/config.json", entry(anchor="cnn"), "anchor is 'cnn'"),
        (
            "unet/config.json",
            entry(quantization_config={"quant_method": "gguf"}),
            "has quantization_config, which no CoalescerUNet has",
        ),
        ("unet/config.json", entry(_class_name="UNet2DModel"), "is of a UNet2DModel, not a CoalescerUNet"),
        (f"unet/{WEIGHTS}", remove, f"unet/{WEIGHTS} is missing"),
        (f"unet/{WEIGHTS}", truncate, f"unet/{WEIGHTS} is damaged"),
        (f"unet/{WEIGHTS}", empty, f"unet/{WEIGHTS} is damaged"),
        (f"unet/{WEIGHTS}", without_a_tensor, "lacks conv_in.weight"),
        (f"unet/{WEIGHTS}", with_another_tensor, "has more, which no CoalescerUNet of this configuration has"),
        (f"unet/{WEIGHTS}", with_another_shape, "conv_in.bias is F32 [9]; expected F64 or F32 or F16 or BF16 [8]"),
        (f"unet/{WEIGHTS}", with_integers, "conv_in.bias is I64 [8]"),
        (f"unet/{WEIGHTS}", with_nan, "unet.conv_in.bias holds a number that is not finite"),
        (f"vae/{WEIGHTS}", remove, f"vae/{WEIGHTS} is missing"),
        (f"vae/{WEIGHTS}", truncate, f"vae/{WEIGHTS} is damaged"),
        (f"vae/{WEIGHTS}", with_infinity, "vae.latent_norm.running_var holds a number that is not finite"),
        ("vae/config.json", entry(decoder_blocks=[1, 10**9]), "decoder_blocks is [1, 1000000000]"),
        ("description_encoder/config.json", remove, "description_encoder/config.json is missing"),
        (f"description_encoder/{WEIGHTS}", truncate, f"description_encoder/{WEIGHTS} is damaged"),
        (f"description_encoder/{WEIGHTS}", with_a_float_table, "table is F32 [13, 6]; expected I8 [13, 6]"),
        ("scheduler/scheduler_config.json", remove, "scheduler/scheduler_config.json is missing"),
        ("scheduler/scheduler_config.json", truncate, "scheduler_config.json is damaged"),
        ("scheduler/scheduler_config.json", entry(etas=[float("nan"), 1.0]), "etas[0] is nan"),
        (
            "scheduler/scheduler_config.json",
            entry(thresholding=True),
            "has thresholding, which no CoalescerScheduler has",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_damaged_folders(unvouched, file, damage, words):
    damage(unvouched / file)
    said = refused(unvouched)
    assert words in said
    assert "model" in said


@pytest.mark.parametrize(
    "file", [INDEX, "unet/config.json", f"unet/{WEIGHTS}", "scheduler/scheduler_config.json", f"vae/{WEIGHTS}"]
)
def test_what_was_saved_is_what_is_loaded(model, file):
    path = model / file
    content = bytearray(path.read_bytes())
    if path.suffix == ".json":
        content += b"\n"
    else:
        content[-1] ^= 1  # the least of the last float's bits
    path.write_bytes(content)
    said = refused(model)
    assert file in said
    assert "is not the file that was saved" in said
    (model / "checksums.json").unlink()  # as the sentence says
    CoalescerPipeline.from_pretrained(model)


def test_a_file_that_was_not_saved_with_the_rest(model):
    table = json.loads((model / "checksums.json").read_text("utf-8"))
    del table["unet/config.json"]
    (model / "checksums.json").write_text(json.dumps(table), "utf-8")
    assert "unet/config.json was not saved with the rest" in refused(model)


@pytest.mark.parametrize("damage", [truncate, empty, nested, not_a_table])
def test_damaged_checksums(model, damage):
    damage(model / "checksums.json")
    assert "checksums.json is damaged" in refused(model)


def test_a_folder_without_checksums(pipe, unvouched):
    assert same(CoalescerPipeline.from_pretrained(unvouched), pipe)


def test_an_index_of_before(pipe, unvouched):
    change(unvouched / INDEX, _class_name="CoalescerPipeline")
    (unvouched / "pipeline.py").unlink()
    assert same(CoalescerPipeline.from_pretrained(unvouched), pipe)


MARKER = "import pathlib; pathlib.Path({!r}).touch()\n"


@pytest.fixture
def trap(tmp_path, monkeypatch) -> Path:
    """A file that comes into being where a module ``trap`` is imported, which can be."""
    marker = tmp_path / "sprung"
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "trap.py").write_text(MARKER.format(str(marker)) + "class CoalescerUNet: pass\n", "utf-8")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    return marker


@pytest.mark.parametrize("given", [False, True], ids=["read", "given"])
@pytest.mark.parametrize("trust", [False, True], ids=["", "trusted"])
def test_no_module_is_imported_that_a_folder_names(pipe, unvouched, trap, given, trust):
    change(unvouched / INDEX, unet=["trap", "CoalescerUNet"])
    kwargs = {"unet": pipe.unet} if given else {}
    assert "trap.CoalescerUNet, which is not a CoalescerUNet that is imported here" in refused(
        unvouched, trust_remote_code=trust, **kwargs
    )
    assert not trap.exists()


@pytest.mark.parametrize("trust", [False, True], ids=["", "trusted"])
def test_code_of_a_folder_is_not_run(pipe, unvouched, trap, trust, code_cache):
    (unvouched / "pipeline.py").write_text(MARKER.format(str(trap)), "utf-8")
    (unvouched / "unet" / "trap.py").write_text(MARKER.format(str(trap)), "utf-8")
    assert same(CoalescerPipeline.from_pretrained(unvouched, trust_remote_code=trust), pipe)
    assert not trap.exists()


class Pickled:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("choice", [True, False, None])
def test_pickles_are_not_opened(model, trap, choice):
    (model / "unet" / WEIGHTS).unlink()
    torch.save(Pickled(trap), model / "unet" / "diffusion_pytorch_model.bin")
    said = refused(model, use_safetensors=choice)
    assert ("is missing" if choice else "use_safetensors can only be True") in said
    assert not trap.exists()


def test_pickles_are_not_written(pipe, tmp_path):
    with pytest.raises(ValueError, match="safe_serialization can only be True"):
        pipe.save_pretrained(tmp_path / "new", safe_serialization=False)
    assert not (tmp_path / "new").exists()


def test_from_the_hub(pipe, model, monkeypatch):
    """A folder that diffusers has fetched is checked as any other."""
    asked = []
    monkeypatch.setattr(
        DiffusionPipeline, "download", lambda name, **kwargs: asked.append((name, kwargs["revision"])) or str(model)
    )
    loaded = CoalescerPipeline.from_pretrained("owner/name", revision="main")
    assert asked == [("owner/name", "main")]
    assert loaded.name_or_path == "owner/name"
    assert same(loaded, pipe)
    change(model / INDEX, unet=["os", "system"])
    with pytest.raises(ValueError, match=r"os.system, which is not a CoalescerUNet"):
        CoalescerPipeline.from_pretrained("owner/name", revision="main")


def test_no_path_of_this_machine_is_saved(saved, tmp_path):
    pipe = CoalescerPipeline.from_pretrained("emoji-64")
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / INDEX).read_text("utf-8"))["_name_or_path"] == "emoji-64"
    assert str(EMBEDDED) not in (tmp_path / INDEX).read_text("utf-8")


def test_what_is_no_model(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    (tmp_path / "empty").mkdir()
    for name in (file, tmp_path / "empty", tmp_path / "nowhere", "emoji-4096", "../emoji-64", "~/emoji-64", ""):
        said = refused(name)
        assert str(name) in said
        assert "model" in said
