from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from coalescer_fast import CoalescerUNet
from coalescer_fast.models.unet import CONFIGURATIONS, LATER, Conditioning

SMALL = {"sample_size": 4, "latent_channels": 3, "norm_num_groups": 4, "description_dim": 6, "embedding_dim": 10}
CONFIGS = {
    "anchor": dict(
        SMALL, block_out_channels=(8, 12), attention_levels=(), mid_attention=False, anchor="mlp", anchor_hidden_dim=7
    ),
    "self-attention": dict(
        SMALL, block_out_channels=(8, 12, 16), layers_per_block=2, attention_levels=(1, 2), num_attention_heads=2
    ),
    "cross-attention": dict(
        SMALL, block_out_channels=(8, 16), attention_levels=(0, 1), num_attention_heads=4, cross_attention_dim=5
    ),
}


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter a random value, the zero-initialised ones too, such that activations stay of size 1."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if parameter.ndim > 1:
                parameter.copy_(noise / math.sqrt(parameter[0].numel()))
            else:
                parameter.copy_(0.3 * noise + ("norm" in name and name.endswith("weight")))
    return model


def small(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes) -> CoalescerUNet:
    return randomise(CoalescerUNet(**{**CONFIGS[name], **changes}), seed).to(dtype).eval()


def inputs(model: CoalescerUNet, n: int = 3, seed: int = 1, size: int | None = None) -> dict[str, torch.Tensor]:
    """R, descriptions with an empty one in the middle, and token rows where the network reads them."""
    generator = torch.Generator().manual_seed(seed)
    config, dtype = model.config, model.dtype
    size = size or config.sample_size
    description = torch.randn(n, config.description_dim, generator=generator).to(dtype)
    description[1:2] = 0
    sample = torch.randn(n, config.latent_channels, size, size, generator=generator).to(dtype)
    if config.cross_attention_dim is None:
        return {"sample": sample, "description": description}
    rows = torch.randn(n, 7, config.cross_attention_dim, generator=generator).to(dtype)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5, 2])[:n, None]
    return {"sample": sample, "description": description, "encoder_hidden_states": rows, "encoder_attention_mask": mask}


class PlainUNet:
    """The network as its docstring describes it, from a state dict and in torch.nn.functional alone."""

    def __init__(self, state: dict[str, torch.Tensor], config):
        self.state, self.config = state, config

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def conv(self, name: str, x: torch.Tensor, stride: int = 1) -> torch.Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(x, weight, self.state[f"{name}.bias"], stride, padding=weight.shape[-1] // 2)

    def group_norm(self, name: str, x: torch.Tensor, eps: float = 1e-5) -> torch.Tensor:
        return F.group_norm(
            x, self.config.norm_num_groups, self.state[f"{name}.weight"], self.state[f"{name}.bias"], eps
        )

    def layer_norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """softmax(Q K^T / sqrt(d)) V, head by head; (N, L, C) each."""
        heads = []
        for q_, k_, v_ in zip(*(x.tensor_split(self.config.num_attention_heads, 2) for x in (q, k, v))):
            scores = q_ @ k_.mT / math.sqrt(q_.shape[2])
            if mask is not None:
                scores = scores.masked_fill(~mask[:, None, :], -math.inf)
            heads.append(scores.softmax(2) @ v_)
        return torch.cat(heads, 2)

    def anchor(self, description: torch.Tensor) -> torch.Tensor:
        x = torch.stack([d if d.any() else self.state["anchor_mlp.null"] for d in description])
        x = F.silu(self.linear("anchor_mlp.linear_in", x))
        for i in range(2):
            x = x + F.silu(self.linear(f"anchor_mlp.linears.{i}", self.layer_norm(f"anchor_mlp.norms.{i}", x)))
        side = self.config.sample_size
        return self.linear("anchor_mlp.linear_out", x).reshape(len(x), self.config.latent_channels, side, side)

    def residual(self, name: str, x: torch.Tensor) -> torch.Tensor:
        scale, shift = self.linear(f"{name}.film", self.embedding).tensor_split(2, 1)
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x)))
        h = self.group_norm(f"{name}.norm2", h) * (1 + scale[..., None, None]) + shift[..., None, None]
        h = self.conv(f"{name}.conv2", F.silu(h))
        return h + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.weight" in self.state else x)

    def attention(self, name: str, x: torch.Tensor) -> torch.Tensor:
        n, c, h, w = x.shape
        if self.rows is None:
            tokens = self.group_norm(f"{name}.norm", x).permute(0, 2, 3, 1).reshape(n, h * w, c)
            tokens = self.linear(
                f"{name}.to_out", self.attend(*self.linear(f"{name}.to_qkv", tokens).tensor_split(3, 2))
            )
        else:
            tokens = self.group_norm(f"{name}.norm", x, 1e-6).permute(0, 2, 3, 1).reshape(n, h * w, c)
            tokens = self.linear(f"{name}.proj_in", tokens)
            qkv = self.linear(f"{name}.to_qkv", self.layer_norm(f"{name}.norm1", tokens)).tensor_split(3, 2)
            tokens = tokens + self.linear(f"{name}.to_out1", self.attend(*qkv))
            q = self.linear(f"{name}.to_q", self.layer_norm(f"{name}.norm2", tokens))
            kv = self.linear(f"{name}.to_kv", self.rows).tensor_split(2, 2)
            tokens = tokens + self.linear(f"{name}.to_out2", self.attend(q, *kv, self.mask))
            value, gate = self.linear(f"{name}.ff_in", self.layer_norm(f"{name}.norm3", tokens)).tensor_split(2, 2)
            tokens = tokens + self.linear(f"{name}.ff_out", value * F.gelu(gate))
            tokens = self.linear(f"{name}.proj_out", tokens)
        return x + tokens.reshape(n, h, w, c).permute(0, 3, 1, 2)

    def part(self, name: str, x: torch.Tensor, attention: bool) -> torch.Tensor:
        x = self.residual(f"{name}.0", x)
        return self.attention(f"{name}.1", x) if attention else x

    def __call__(self, sample, description, encoder_hidden_states=None, encoder_attention_mask=None):
        config, levels = self.config, len(self.config.block_out_channels)
        self.rows, self.mask = encoder_hidden_states, encoder_attention_mask
        x = torch.stack([d if d.any() else self.state["null"] for d in description])
        self.embedding = F.silu(self.linear("embedding.2", F.silu(self.linear("embedding.0", x))))

        anchor = self.anchor(description) if config.anchor else None
        h = self.conv("conv_in", sample if anchor is None else torch.cat([sample, anchor], 1))
        skips, i = [h], 0
        for level in range(levels):
            for _ in range(config.layers_per_block):
                h = self.part(f"down.{i}", h, level in config.attention_levels)
                skips.append(h)
                i += 1
            if level < levels - 1:
                h = self.conv(f"down.{i}.0", h, stride=2)
                skips.append(h)
                i += 1
        h = self.residual("mid.0", h)
        if config.mid_attention:
            h = self.attention("mid.1", h)
        h = self.residual("mid.2" if config.mid_attention else "mid.1", h)
        i = 0
        for level in reversed(range(levels)):
            for _ in range(config.layers_per_block + 1):
                h = self.part(f"up.{i}", torch.cat([h, skips.pop()], 1), level in config.attention_levels)
                i += 1
            if level:
                h = self.conv(f"up.{i}.0", h.repeat_interleave(2, 2).repeat_interleave(2, 3))
                i += 1
        assert not skips
        h = F.silu(self.group_norm("norm_out", h))

        direction = self.conv("direction_head", h)
        distance = F.softplus(self.linear("distance_head", h.mean((2, 3))))[:, 0]
        if anchor is not None:
            way = anchor - sample
            length = way.square().mean((1, 2, 3)).sqrt()
            direction = direction + way / length[:, None, None, None]
            distance = distance * length
        return direction, distance


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """RMS of the difference over the RMS of b."""
    return float((a - b).square().mean().sqrt() / b.square().mean().sqrt())


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_equals_an_independent_network(name, dtype, tolerance):
    model = small(name, dtype)
    assert all(parameter.abs().min() > 0 for parameter in model.parameters())
    batch = inputs(model)
    direction, distance = PlainUNet(model.state_dict(), model.config)(**batch)
    output = model(**batch)
    assert relative_error(output.direction, direction) < tolerance
    assert relative_error(output.distance, distance) < tolerance


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_every_parameter_matters(name):
    """No weight is left out: a change of any tensor changes an output."""
    model = small(name, torch.float64)
    batch = inputs(model)
    before = torch.cat([x.flatten() for x in model(**batch, return_dict=False)])
    for parameter_name, parameter in model.named_parameters():
        saved = parameter.clone()
        parameter.add_(torch.linspace(0.5, 1, parameter.numel(), dtype=parameter.dtype).view(parameter.shape))
        after = torch.cat([x.flatten() for x in model(**batch, return_dict=False)])
        parameter.copy_(saved)
        assert relative_error(after, before) > 1e-6, parameter_name


SIZES = {"emoji-64": (10.45e6, 0.01e6), "m": (35.7e6, 0.1e6), "l": (859e6, 1e6)}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_of_the_named_configurations(name):
    assert SIZES.keys() == CONFIGURATIONS.keys()
    with torch.device("meta"):
        model = CoalescerUNet.named(name)
    expected, tolerance = SIZES[name]
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(expected, abs=tolerance)


@pytest.mark.parametrize(("name", "gflop"), [("m", 12.44), ("l", 803)])
@torch.no_grad()
def test_flops_of_the_named_configurations(name, gflop):
    """One evaluation with the descriptions' share computed before, at two operations a multiply-add."""
    with torch.device("meta"):
        model = CoalescerUNet.named(name)
        config = model.config
        sample = torch.empty(1, config.latent_channels, config.sample_size, config.sample_size)
        rows = torch.empty(1, 77, config.cross_attention_dim) if config.cross_attention_dim else None
        conditioning = model.condition(torch.empty(1, config.description_dim), rows)
        with FlopCounterMode(display=False) as counter:
            model(sample, conditioning)
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflop, rel=0.005)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_conditioning_once_equals_descriptions(name):
    model = small(name)
    batch = inputs(model)
    conditioning = model.condition(**{k: v for k, v in batch.items() if k != "sample"})
    for a, b in zip(model(**batch, return_dict=False), model(batch["sample"], conditioning, return_dict=False)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_conditioning_expands(name):
    model = small(name)
    one = {k: v[:1] for k, v in inputs(model).items() if k != "sample"}
    expanded = model.condition(**one).expand(4)
    repeated = model.condition(**{k: v.expand(4, *v.shape[1:]) for k, v in one.items()})
    sample = inputs(model, n=4)["sample"]
    for a, b in zip(model(sample, expanded, return_dict=False), model(sample, repeated, return_dict=False)):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # float32 sums over other strides
    scale, shift = expanded.film[0]
    assert scale.shape[0] == shift.shape[0] == 4
    assert scale.stride(0) == 0  # no copy


@torch.no_grad()
def test_given_anchor_overrides_the_mlp():
    model = small("anchor")
    batch = inputs(model)
    anchor = torch.ones_like(batch["sample"])
    conditioning = model.condition(batch["description"], anchor=anchor)
    assert conditioning.anchor is anchor
    mine = model.condition(batch["description"])
    assert torch.equal(mine.anchor, model.anchor_mlp(batch["description"]))
    assert not torch.allclose(model(batch["sample"], conditioning).direction, model(batch["sample"], mine).direction)


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_bit_for_bit(name, tmp_path):
    model = small(name)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
    loaded = CoalescerUNet.from_pretrained(tmp_path)
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in loaded.config.items()}.items() >= CONFIGS[
        name
    ].items()
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key])
    batch = inputs(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).direction, model(**batch).direction)


def test_later_options_at_their_defaults_leave_no_trace():
    """The configuration, and with it hashes and saved files, is that of a network made before they existed."""
    model = small("cross-attention", norm_eps=1e-5, transformer_layers_per_block=1, sample_residual=0.0)
    assert not LATER.keys() & model.config.keys()
    assert model.config["anchor"] is None
    deep = small("cross-attention", transformer_layers_per_block=(1, 2), num_attention_heads=(2, 4))
    assert deep.config.transformer_layers_per_block == (1, 2)
    assert [layer.num_heads for layer in deep.transformer_layers] == [2, 4, 4, 4, 4, 4, 4, 4, 4, 2, 2]
    with pytest.raises(ValueError, match="num_attention_heads is \\(1, 2, 4\\); expected a number, or one for each of"):
        small("cross-attention", num_attention_heads=(1, 2, 4))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_empty_description_is_the_learned_null(name):
    model = small(name)
    batch = inputs(model)
    stated = batch["description"].clone()
    assert not stated[1].any()
    stated[1] = model.null
    if model.anchor_mlp is not None:
        model.anchor_mlp.null.copy_(model.null)
    expected = model(**{**batch, "description": stated})
    torch.testing.assert_close(model(**batch).direction, expected.direction, rtol=0, atol=0)
    before = model(**batch).direction
    model.null.add_(1.0)
    after = model(**batch).direction
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert not torch.allclose(after[1], before[1])


@torch.no_grad()
def test_untrained_anchored_network_lands_on_the_anchor():
    from coalescer_fast import CoalescerScheduler

    torch.manual_seed(0)
    model = CoalescerUNet(**CONFIGS["anchor"])
    nn.init.normal_(model.anchor_mlp.linear_out.weight)
    batch = inputs(model)
    direction, distance = model(**batch, return_dict=False)
    scheduler = CoalescerScheduler(etas=(1.0,), modes=("raw",))
    landing = scheduler.step(direction, distance, 0, batch["sample"]).prev_sample
    # softplus, |p - R| and its quotient round once each in float32
    torch.testing.assert_close(landing, model.anchor_mlp(batch["description"]), rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_untrained_network_without_anchor_stands_still():
    model = CoalescerUNet(**CONFIGS["self-attention"])
    output = model(**inputs(model))
    assert not output.direction.any()
    torch.testing.assert_close(output.distance, torch.ones(3))


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_sample_does_not_depend_on_its_neighbours(name):
    model = small(name)
    batch = inputs(model, n=5)
    together = model(**batch, return_dict=False)
    for i in range(5):
        alone = model(**{k: v[i : i + 1] for k, v in batch.items()}, return_dict=False)
        for a, b in zip(alone, together):
            torch.testing.assert_close(a[0], b[i], rtol=1e-5, atol=1e-5)  # float32 sums in another order


@torch.no_grad()
def test_masked_token_rows_are_not_seen():
    model = small("cross-attention")
    batch = inputs(model)
    changed = batch["encoder_hidden_states"].masked_fill(~batch["encoder_attention_mask"][..., None], 1e3)
    assert torch.equal(model(**{**batch, "encoder_hidden_states": changed}).direction, model(**batch).direction)


@torch.no_grad()
def test_other_sizes_without_an_anchor():
    model = small("self-attention")
    batch = inputs(model, size=8)
    batch["sample"] = batch["sample"][..., :4]
    output = model(**batch)
    assert output.direction.shape == (3, 3, 8, 4)
    direction, distance = PlainUNet(model.state_dict(), model.config)(**batch)
    assert relative_error(output.direction, direction) < 1e-6
    assert relative_error(output.distance, distance) < 1e-6


@torch.no_grad()
def test_empty_batch():
    for name in CONFIGS:
        model = small(name)
        direction, distance = model(**inputs(model, n=0), return_dict=False)
        assert direction.shape == (0, 3, 4, 4)
        assert distance.shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_lower_precision(name, dtype):
    model = small(name)
    batch = inputs(model)
    expected = model(**batch)
    output = small(name, dtype)(**batch)  # a sampler keeps R in float32
    assert output.distance.dtype == torch.float32
    # some thirty roundings a path, half an ulp each, adding up as a random walk
    assert relative_error(output.direction.float(), expected.direction) < 10 * torch.finfo(dtype).eps
    assert relative_error(output.distance, expected.distance) < 10 * torch.finfo(dtype).eps


def test_gradients_reach_every_parameter():
    for name in CONFIGS:
        model = small(name)
        direction, distance = model(**inputs(model), return_dict=False)
        (direction.square().sum() + distance.square().sum()).backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_an_ensemble_by_vmap(name, memory_format):
    models = [small(name, seed=seed).to(memory_format=memory_format) for seed in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    given = inputs(models[0])

    def outputs(*state) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.func.functional_call(models[0], state, kwargs={**given, "return_dict": False})

    with torch.no_grad():
        for results, *each in zip(
            torch.vmap(outputs)(parameters, buffers), *(m(**given, return_dict=False) for m in models)
        ):
            torch.testing.assert_close(results, torch.stack(each), rtol=1e-4, atol=1e-5)


def test_tuple_output_and_backend():
    model = small("anchor")
    batch = inputs(model)
    with torch.no_grad():
        direction, distance = model(**batch, return_dict=False)
        assert torch.equal(model(**batch).direction, direction)
        model.set_backend("auto")
        assert {m.backend for m in model.modules() if hasattr(m, "backend")} == {"auto"}
        torch.testing.assert_close(model(**batch).distance, distance)
        model.set_backend("magic")
        with pytest.raises(ValueError, match="'magic' is unknown to group_norm_silu"):
            model(**batch)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_native_ops_are_as_accurate_as_the_reference(name, memory_format):
    model, exact = small(name), small(name).double()
    batch = inputs(model)
    model.to(memory_format=memory_format)
    batch["sample"] = batch["sample"].contiguous(memory_format=memory_format)
    with torch.no_grad():
        truth = exact(**{key: value.double() if value.is_floating_point() else value for key, value in batch.items()})
        errors = {}
        for backend in ("reference", "cpu"):
            model.set_backend(backend)
            out = model(**batch)
            errors[backend] = [float((out[key].double() - truth[key]).abs().max()) for key in ("direction", "distance")]
    for mine, plain in zip(errors["cpu"], errors["reference"]):
        assert mine <= 2 * plain + 1e-6, errors


def test_residual_blocks_are_in_the_order_of_running():
    model = small("self-attention")
    ran: list[nn.Module] = []
    for block in model.residual_blocks:
        block.register_forward_hook(lambda module, *_: ran.append(module))
    with torch.no_grad():
        model(**inputs(model))
    assert ran == model.residual_blocks
    assert len(ran) == 3 * 2 + 2 + 3 * 3


def test_wrong_configurations():
    with pytest.raises(ValueError, match="anchor is 'linear'"):
        CoalescerUNet(**{**CONFIGS["anchor"], "anchor": "linear"})
    with pytest.raises(ValueError, match="'xl' is unknown: use emoji-64, m, l"):
        CoalescerUNet.named("xl")


@pytest.mark.parametrize("shape", [(3, 7), (6,), (3, 6, 1)], ids=str)
def test_wrong_descriptions(shape):
    model = small("anchor")
    with pytest.raises(ValueError, match=r"description has shape \(.*\); expected \(N, 6\)"):
        model(inputs(model)["sample"], torch.zeros(shape))


def test_missing_token_rows():
    model = small("cross-attention")
    with pytest.raises(ValueError, match="encoder_hidden_states is missing"):
        model(inputs(model)["sample"], inputs(model)["description"])


@pytest.mark.parametrize("shape", [(3, 4, 4, 4), (3, 3, 5, 5), (3, 3, 4), (2, 3, 4, 4), (3, 3, 8, 8)], ids=str)
def test_wrong_samples(shape):
    """Channels, a side that cannot be halved, no width, another batch size, and a size that the anchor has not."""
    model = small("anchor")
    with pytest.raises((ValueError, RuntimeError)):
        model(torch.zeros(shape), inputs(model)["description"])


def test_configuration_is_plain_json(tmp_path):
    model = small("anchor")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8"))
    assert config["_class_name"] == "CoalescerUNet"
    assert config["anchor"] == "mlp"
    assert config["block_out_channels"] == [8, 12]


def test_conditioning_without_anchor_or_mask_expands():
    film = [(torch.ones(1, 2), torch.zeros(1, 2))]
    expanded = Conditioning(film, None, []).expand(3)
    assert expanded.anchor is None
    assert expanded.mask is None
    assert expanded.keys_values == []
    assert expanded.film[0][0].shape == (3, 2)
