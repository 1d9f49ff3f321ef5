import json
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

from entangle.errors import EntangleError, InvalidInput, NumericalError
from entangle.evaluation import EvaluationText, perplexity
from entangle.experts.checkpoint import load_expanded
from entangle.experts.expand import Expansion, expand
from entangle.models.layers import find_layers
from entangle.models.loading import LanguageModel, as_language_model
from entangle.seeding import torch_rng
from entangle.texts.calibration_set import CalibrationSet
from tests.cli.expansions import experts_of
from tests.saved import without_digests
from tests.tiny_models import TINY

DECODERS = [name for name in TINY if name not in ("bert", "mixtral")]
Tiny = Callable[[str], LanguageModel]


@pytest.fixture(scope="module")
def text() -> EvaluationText:
    ids = torch.randint(4, 90, (5, 16), generator=torch_rng(1, "evaluation"))
    return EvaluationText(ids, "random ids", {})


def run(model: LanguageModel, calibration: CalibrationSet, **settings: object) -> Expansion:
    chosen: dict[str, object] = {"experts": 3, "sparsity": 0.5, "restarts": 2, "progress": False}
    return expand(model, calibration, **{**chosen, **settings})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", DECODERS)
def test_every_mlp_linear_is_replaced_with_the_exact_number_of_zeros(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    before = {key: value.clone() for key, value in model.module.state_dict().items()}
    found = run(model, calibration)
    experts = experts_of(found.model)
    layers = find_layers(model.module, "all", "mlp")
    assert list(experts) == [layer.name for layer in layers]
    for layer in layers:
        zeros = (experts[layer.name] == 0).sum(2)
        assert zeros.eq(round(0.5 * layer.in_features)).all()
    assert all(torch.equal(v, before[k]) for k, v in model.module.state_dict().items())


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_sparsity_zero_is_the_dense_model(
    name: str, tiny: Tiny, calibration: CalibrationSet
) -> None:
    model = tiny(name)
    found = run(model, calibration, sparsity=0.0)
    assert found.model is not None
    ids = calibration.ids[:2]
    torch.testing.assert_close(
        found.model.module(ids).logits, model.module(ids).logits, rtol=1e-4, atol=1e-4
    )
    assert (found.layers["relative_error"] == 0).all()


def test_perplexity_of_the_build_is_that_of_the_built_model(
    tiny: Tiny, calibration: CalibrationSet, text: EvaluationText
) -> None:
    found = run(tiny("llama"), calibration, evaluation=text)
    assert found.perplexity is not None
    assert found.model is not None
    again = perplexity(found.model, text).value
    assert found.perplexity.value == pytest.approx(again, rel=1e-5)


def test_more_clusters_fit_better_than_random_ones(tiny: Tiny, calibration: CalibrationSet) -> None:
    def error(**settings: object) -> float:
        return float(run(tiny("llama"), calibration, layers=0, **settings).layers[
            "relative_error"
        ].mean())  # fmt: skip

    assert error(experts=4) < error(experts=1)
    assert error(experts=4) < error(experts=4, router="random")


def test_costs_by_hand(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    found = run(model, calibration, sparsity=0.75, experts=2)
    linears = [m.weight.numel() for m in model.module.modules() if isinstance(m, torch.nn.Linear)]
    mlp = sum(layer.weight.numel() for layer in find_layers(model.module, "all", "mlp"))
    others = sum(linears) - mlp
    assert found.costs["nonzeros"] == pytest.approx((others + 2 * mlp / 4) / (others + mlp))
    router = sum(2 * width for width in (32, _down_width(model)) for _ in range(3))
    assert found.costs["flops"] == pytest.approx((others + mlp / 4 + router) / (others + mlp))
    packed = 4 * others
    for rows, kept in ((48, 8), (48, 8), (32, 16)):  # of 32, 32 and 48; 12 fill 16 places
        packed += 3 * 2 * (rows * (4 * kept + 8) + 4 * (rows + 1))  # values, bits, starts
    for width in (32, _down_width(model)):  # mean, 2 directions, 2 offsets, in 3 blocks
        packed += 3 * 4 * (width + 2 * width + 2)
    assert found.costs["bytes"] == pytest.approx(packed / (4 * (others + mlp)))


def _down_width(model: LanguageModel) -> int:
    return find_layers(model.module, 0, "down_proj")[0].in_features


def test_an_allocation_decides_every_row(tiny: Tiny, calibration: CalibrationSet) -> None:
    model = tiny("llama")
    layers = find_layers(model.module, "all", "mlp")
    shares = {layer.name: torch.full((layer.out_features,), 0.25) for layer in layers}
    shares[layers[0].name][:3] = 0.0
    experts = experts_of(run(model, calibration, allocation=shares).model)
    assert (experts[layers[0].name][:, :3] == 0).sum() == 0
    assert (experts[layers[0].name][:, 3:] == 0).sum(2).eq(8).all()
    del shares[layers[1].name]
    with pytest.raises(InvalidInput, match=r"`allocation`.*missing"):
        run(model, calibration, allocation=shares)


def test_a_checkpoint_loads_to_the_same_model_and_generates(
    tiny_folder: Callable[[str], Path], calibration: CalibrationSet, tmp_path: Path,
    text: EvaluationText,
) -> None:  # fmt: skip
    from entangle.models.loading import load_model

    model = load_model(str(tiny_folder("llama")), device="cpu")
    found = run(model, calibration, out=tmp_path / "x", evaluation=text)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]
    loaded = load_expanded(tmp_path / "x", device="cpu")
    for name, weight in experts_of(found.model).items():
        assert torch.equal(experts_of(loaded)[name], weight)
    assert found.perplexity is not None
    assert perplexity(loaded, text).value == pytest.approx(found.perplexity.value, rel=1e-5)
    new = loaded.module.generate(  # type: ignore[operator]
        calibration.ids[:1], max_new_tokens=3, do_sample=False
    )
    assert new.shape == (1, 19)


def test_dropped_experts_leave_the_dense_model_behind(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    kept = run(tiny("llama"), calibration, out=tmp_path / "kept")
    dropped = run(tiny("llama"), calibration, out=tmp_path / "dropped", keep=False)
    assert dropped.model is None
    assert kept.layers.equals(dropped.layers)
    assert _bytes(tmp_path / "kept") == _bytes(tmp_path / "dropped")


def test_resume_of_a_finished_build_reads_it(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path, text: EvaluationText,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    first = run(tiny("llama"), calibration, out=tmp_path / "x", evaluation=text)
    before = _bytes(tmp_path / "x")
    from entangle.experts import build

    monkeypatch.delattr(build, "_expand_block")  # nothing is built
    again = run(tiny("llama"), calibration, out=tmp_path / "x", evaluation=text, resume=True)
    assert _bytes(tmp_path / "x") == before
    assert again.layers.equals(first.layers)
    assert first.perplexity is not None
    assert again.perplexity is not None
    assert again.perplexity.value == first.perplexity.value
    with pytest.raises(InvalidInput, match=r"x'.*exists.*--force"):
        run(tiny("llama"), calibration, out=tmp_path / "x", resume=True, sparsity=0.25)


def test_a_build_killed_before_its_plan_is_written_begins_anew(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        """As kill -9: nothing is tidied up."""

    def killed(*_args: object, **_kwargs: object) -> None:
        raise Killed

    from entangle.runs import unfinished

    with monkeypatch.context() as patch:
        patch.setattr(unfinished, "write_json", killed)
        patch.setattr("entangle.runs.unfinished.discard", lambda *_args, **_kwargs: None)
        with pytest.raises(Killed):
            run(tiny("llama"), calibration, out=tmp_path / "x")
    run(tiny("llama"), calibration, out=tmp_path / "x", resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_killed_build_resumes_to_the_same_bytes(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    text: EvaluationText,
) -> None:  # fmt: skip
    whole = run(tiny("gemma3"), calibration, out=tmp_path / "whole", evaluation=text)
    from entangle.experts import build

    plain, calls = build._expand_block, []

    def killed(*args: object) -> object:
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(build, "_expand_block", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tiny("gemma3"), calibration, out=tmp_path / "part", evaluation=text)
    assert not (tmp_path / "part").exists()
    with pytest.raises(InvalidInput, match="part'"):
        run(tiny("gemma3"), calibration, out=tmp_path / "part", evaluation=text)
    monkeypatch.setattr(build, "_expand_block", plain)
    with pytest.raises(InvalidInput, match=r"part'.*settings"):
        run(
            tiny("gemma3"), calibration, out=tmp_path / "part", evaluation=text, resume=True,
            sparsity=0.25,
        )  # fmt: skip
    rest = run(tiny("gemma3"), calibration, out=tmp_path / "part", evaluation=text, resume=True)
    assert _bytes(tmp_path / "whole") == _bytes(tmp_path / "part")
    assert rest.layers.equals(whole.layers)
    assert rest.perplexity is not None
    assert whole.perplexity is not None
    assert (rest.perplexity.window_losses == whole.perplexity.window_losses).all()


def _bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "run.json"}


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing", "manifest"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    run(tiny("llama"), calibration, out=tmp_path / "x", keep=False)
    file = sorted((tmp_path / "x").glob("block-*"))[1]
    content, damaged = bytearray(file.read_bytes()), file
    if damage == "truncated":
        file.write_bytes(content[:-7])
    elif damage == "altered":
        content[-1] ^= 1
        file.write_bytes(content)
    elif damage == "missing":
        file.unlink()
    else:
        damaged = tmp_path / "x" / "manifest.json"
        damaged.write_text("{")
    with pytest.raises(InvalidInput, match=re.escape(f"{damaged.name}'")):
        load_expanded(tmp_path / "x", base=tiny("llama"))


def test_a_manifest_that_lost_a_file_is_refused(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    run(tiny("llama"), calibration, out=tmp_path / "x", keep=False)
    path = without_digests(tmp_path / "x") / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["files"]["block-0001.safetensors"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(InvalidInput, match=r"'model\.layers\.1\.mlp"):
        load_expanded(tmp_path / "x", base=tiny("llama"))


def test_a_base_named_by_a_relative_path_is_found_from_anywhere(
    tiny_folder: Callable[[str], Path], calibration: CalibrationSet, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from entangle.models.loading import load_model

    monkeypatch.chdir(tiny_folder("llama").parent)
    run(load_model("llama", device="cpu"), calibration, out=tmp_path / "x", keep=False)
    monkeypatch.chdir(tmp_path)
    assert experts_of(load_expanded(tmp_path / "x", device="cpu"))


def test_a_layer_that_sees_no_token_is_refused_by_name(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    block = model.module.get_submodule("model.layers.1.mlp")
    block.add_module("unused", torch.nn.Linear(32, 48))
    name = "model.layers.1.mlp.unused"
    with pytest.raises(InvalidInput, match=r"1\.mlp\.unused'"):
        run(model, calibration, layers=[name, "model.layers.1.mlp.up_proj"], proj=None)
    made = run(model, calibration)  # not asked for by name: left as it is
    assert name not in set(made.layers["layer"])
    assert made.manifest["layers_without_tokens"] == [name]


def test_another_base_model_is_refused(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    run(tiny("llama"), calibration, out=tmp_path / "x", keep=False)
    other = as_language_model(TINY["llama"]())
    with torch.no_grad():
        next(other.module.parameters())[0, 0] += 1
    with pytest.raises(InvalidInput, match="was made from"):
        load_expanded(tmp_path / "x", base=other)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"experts": 0}, "`experts` must be an integer of at least 1"),
        ({"experts": 10_000}, "must be at most the number of tokens"),
        ({"sparsity": 1.5}, "must be in"),
        ({"sparsity": -0.1}, "must be in"),
        ({"pattern": "n:5", "sparsity": 0.5}, "multiple of 6 zeros.* 5 columns.* last 2; got 16"),
        ({"pruner": "nosuch"}, "nosuch"),
        ({"layers": "lm_head", "proj": None}, "outside the blocks"),
        ({"layers": 77}, "block index"),
        ({"seed": -1}, "`seed`"),
    ],
)
def test_bad_settings_are_one_clear_line(
    settings: dict[str, object], message: str, tiny: Tiny, calibration: CalibrationSet,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(EntangleError, match=message):
        run(tiny("llama"), calibration, out=tmp_path / "x", **settings)
    assert not (tmp_path / "x").exists()


def test_activations_that_are_not_finite_name_the_layer(calibration: CalibrationSet) -> None:
    model = as_language_model(TINY["llama"]())
    layer = find_layers(model.module, 1, "gate_proj")[0]
    with torch.no_grad():
        layer.weight[0, 0] = torch.nan
    with pytest.raises((NumericalError, InvalidInput), match=r"layers\.1\.mlp|weight"):
        run(model, calibration)


def test_the_manifest_says_what_was_done(
    tiny: Tiny, calibration: CalibrationSet, tmp_path: Path
) -> None:
    run(tiny("llama"), calibration, out=tmp_path / "x", keep=False)
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["kind"] == "expansion"
    assert manifest["calibration"]["digest"] == calibration.digest
    assert manifest["model"]["digest"] == tiny("llama").digest
    assert manifest["settings"]["experts"] == 3
    blocks = {f"block-{i:04d}.{ending}" for i in range(3) for ending in ("safetensors", "build")}
    assert set(manifest["files"]) == blocks | {"dense.safetensors"}


@pytest.mark.parametrize("scale", [torch.nan, 1e6])
def test_a_perplexity_that_is_not_finite_is_kept_by_its_flag(
    scale: float, calibration: CalibrationSet, tmp_path: Path, text: EvaluationText
) -> None:
    model = as_language_model(TINY["llama"]())
    with torch.no_grad():
        model.module.get_parameter("lm_head.weight").mul_(scale)
    found = run(model, calibration, out=tmp_path / "x", evaluation=text)
    assert found.perplexity is not None
    manifest = json.loads((tmp_path / "x" / "manifest.json").read_text())
    assert manifest["perplexity"] is None
    assert manifest["perplexity_flag"] == found.perplexity.flag != ""


def test_texts_of_another_vocabulary_or_too_long_are_refused(
    tiny: Tiny, calibration: CalibrationSet
) -> None:
    foreign = CalibrationSet(torch.full((4, 16), 112), "ids", {})
    with pytest.raises(InvalidInput, match=r"\b112\b.*outside"):
        run(tiny("llama"), foreign)
    with pytest.raises(InvalidInput, match=r"\b112\b.*outside"):
        run(tiny("llama"), calibration, evaluation=EvaluationText(foreign.ids, "ids", {}))
    long = EvaluationText(torch.full((1, 129), 5), "ids", {})
    with pytest.raises(InvalidInput, match=r"\b128\b.*\b129\b"):
        run(tiny("llama"), calibration, evaluation=long)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"restarts": 0}, "`restarts` must be an integer of at least 1; got 0"),
        ({"damping": -1.0}, "`damping` must be finite and at least 0; got -1"),
        ({"bits": True}, "`bits` must be an integer in"),
    ],
)
def test_settings_are_checked_before_anything_is_recorded(
    settings: dict[str, object], message: str, tiny: Tiny, calibration: CalibrationSet,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def never(*_arguments: object, **_named: object) -> None:
        raise AssertionError("the build began")

    monkeypatch.setattr(import_module("entangle.experts.expand"), "build_blocks", never)
    with pytest.raises(EntangleError, match=message):
        run(tiny("llama"), calibration, **settings)


def test_a_mixture_in_an_unknown_layout_is_refused(calibration: CalibrationSet) -> None:
    config = Qwen2MoeConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, num_experts=4, max_position_embeddings=128,
    )  # fmt: skip
    model = as_language_model(Qwen2MoeForCausalLM(config).eval())  # type: ignore[no-untyped-call]
    for block in model.module.get_submodule("model.layers").children():
        experts = block.get_submodule("mlp.experts")
        experts.register_parameter("more", torch.nn.Parameter(torch.zeros(4, 2, 2)))
    with pytest.raises(InvalidInput, match=r"'model\.layers\.0\.mlp\.experts\.\w+' holds its exp"):
        run(model, calibration)
    found = run(model, calibration, layers="*.shared_expert.up_proj", proj=None)
    assert list(found.layers["layer"]) == [
        f"model.layers.{i}.mlp.shared_expert.up_proj" for i in range(2)
    ]
    assert all(one != one for one in found.costs.values())  # NaN: experts that nobody can count
