"""Settings: typed overrides, presets, TOML, and one clear line for everything that does not fit."""

import dataclasses

import pytest

from ptq161.config import (
    PRESETS,
    Allocation,
    CalibrationConfig,
    Compute,
    Distill,
    Magnitude,
    QuantConfig,
    SalientRange,
    Statistic,
    preset_named,
    read_toml,
    unknown,
)
from ptq161.errors import InputError


def test_defaults_are_the_papers():
    config = QuantConfig()
    assert (config.bits, config.salient_ratio, config.epochs, config.batch_size) == (1.61, None, 20, 1)
    assert (config.lr_scale, config.lr_angular) == (5e-4, 1e-3)
    assert (config.angular, config.row_mean, config.seed) == (True, True, 0)


@pytest.mark.parametrize("settings", [QuantConfig(), CalibrationConfig()])
def test_settings_cannot_be_changed_in_place(settings):
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 1


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("epochs", "3", 3),
        ("epochs", 3, 3),
        ("epochs", 3.0, 3),
        ("lr_scale", "1e-3", 1e-3),
        ("lr_scale", 1, 1.0),
        ("bits", "1.8", 1.8),
        ("statistic", "absmean", Statistic.ABSMEAN),
        ("salient_range", "salient", SalientRange.SALIENT),
        ("magnitude", "l2", Magnitude.L2),
        ("compute", "bfloat16", Compute.BFLOAT16),
        ("angular", "false", False),
        ("angular", "No", False),
        ("angular", "1", True),
        ("row_mean", False, False),
        ("method", "ptq161", "ptq161"),
        ("magnitude", "relative", Magnitude.RELATIVE),
        ("allocation", "uniform", Allocation.UNIFORM),
        ("distill", "required", Distill.REQUIRED),
        ("distill_fresh", "no", False),
        ("distill_tokens", 1e6, 1_000_000),
    ],
)
def test_override_takes_text_and_toml_values(key, text, value):
    changed = QuantConfig().replaced({key: text})
    assert getattr(changed, key) == value
    assert type(getattr(changed, key)) is type(value)
    assert changed.replaced({key: getattr(QuantConfig(), key)}) == QuantConfig()


def test_bits_give_way_to_a_ratio():
    changed = QuantConfig().replaced({"bits": "none", "salient_ratio": "0.2"})
    assert (changed.bits, changed.salient_ratio) == (None, 0.2)


@pytest.mark.parametrize(("value", "expected"), [("a.txt", ("a.txt",)), (["a.txt", "self"], ("a.txt", "self"))])
def test_sources_are_one_or_several(value, expected):
    assert CalibrationConfig().replaced({"sources": value}).sources == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 1}, "unknown setting 'epoch' (did you mean 'epochs'?)"),
        ({"salient-ratio": 0.2}, "unknown setting 'salient-ratio' (did you mean 'salient_ratio'?)"),
        ({"epochs": "many"}, "setting epochs='many': expected int"),
        ({"epochs": 2.5}, "setting epochs=2.5: expected int"),
        ({"epochs": True}, "setting epochs=True: expected int"),
        ({"lr_scale": "fast"}, "setting lr_scale='fast': expected float"),
        ({"lr_scale": True}, "setting lr_scale=True: expected float"),
        ({"lr_scale": [1]}, "setting lr_scale=[1]: expected float"),
        ({"angular": "maybe"}, "setting angular='maybe': expected bool"),
        ({"statistic": "max"}, "setting statistic='max': expected absmax or absmean"),
        ({"distill": "maybe"}, "setting distill='maybe': expected off or auto or required"),
        ({"allocation": "hessian"}, "setting allocation='hessian': expected fisher or uniform"),
        ({"compute": ""}, "setting compute='': expected auto or bfloat16 or float32"),
    ],
)
def test_override_that_does_not_fit_is_named(values, message):
    with pytest.raises(InputError) as error:
        QuantConfig().replaced(values)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "values",
    [
        {"salient_ratio": 0.2},
        {"bits": None},
        {"bits": 1.0},
        {"bits": 8.01},
        {"bits": -1.0},
        {"bits": float("nan")},
        {"bits": float("inf")},
        {"bits": None, "salient_ratio": -0.01},
        {"bits": None, "salient_ratio": 1.01},
        {"bits": None, "salient_ratio": float("nan")},
        {"epochs": -1},
        {"batch_size": 0},
        {"lr_scale": -1e-3},
        {"lr_angular": float("inf")},
        {"lr_latent": float("nan")},
        {"allocation_samples": 0},
        {"distill_tokens": 0},
        {"distill_passes": 0},
        {"distill_batch_size": 0},
        {"distill_lr_latent": -1e-3},
        {"distill_lr_scale": float("inf")},
    ],
)
def test_values_out_of_range_are_refused(values):
    with pytest.raises(InputError, match="|".join(values)) as error:
        QuantConfig(**values)
    assert "expected" in str(error.value) or "set exactly one" in str(error.value)


@pytest.mark.parametrize(
    ("values", "named"), [({"sources": ()}, "--calib"), ({"samples": 0}, "samples=0"), ({"seqlen": 1}, "seqlen=1")]
)
def test_calibration_out_of_range_is_refused(values, named):
    with pytest.raises(InputError, match=named):
        CalibrationConfig(**values)


def test_presets():
    assert preset_named("paper").quant == QuantConfig()
    assert preset_named("paper").calibration == CalibrationConfig(("wikitext2",), samples=128, seqlen=2048)
    fast, best = preset_named("fast"), preset_named("best")
    assert fast.quant.method == best.quant.method == "mixed"
    assert dataclasses.replace(best.quant, distill=Distill.OFF) == fast.quant
    assert (fast.quant.distill, best.quant.distill) == (Distill.OFF, Distill.AUTO)
    assert fast.calibration == best.calibration == CalibrationConfig(("wikitext2",), samples=32, seqlen=512)
    assert all(entry.purpose for entry in PRESETS.values())
    with pytest.raises(
        InputError, match=r"unknown preset 'papr' \(did you mean 'paper'\?\); expected one of: best, fast, paper"
    ):
        preset_named("papr")


def test_a_name_far_from_all_others_gets_no_suggestion():
    assert unknown("method", "xyz", ["ptq161", "gptq"]) == "unknown method 'xyz'; expected one of: ptq161, gptq"


def test_toml_settings_are_overrides(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('epochs = 2\nstatistic = "absmean"\nlr_scale = 1e-4\nangular = false\n')
    changed = QuantConfig().replaced(read_toml(path))
    assert changed == QuantConfig(epochs=2, statistic=Statistic.ABSMEAN, lr_scale=1e-4, angular=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"epochs = ", "is not valid TOML"),
        (b"name = '\xff'", "is not valid TOML"),
        (b"[quant]\nepochs = 2\n", r"has a table \[quant\]: expected flat key = value lines"),
    ],
)
def test_bad_toml_is_named(tmp_path, content, message):
    path = tmp_path / "settings.toml"
    path.write_bytes(content)
    with pytest.raises(InputError, match=rf"settings\.toml {message}"):
        read_toml(path)


def test_missing_toml_is_named(tmp_path):
    with pytest.raises(InputError, match=r"cannot read settings file .*absent\.toml: No such file"):
        read_toml(tmp_path / "absent.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epochs = " + "[" * 5000 + "]" * 5000, "nested too deeply"),
        ("epochs = " + "9" * 5000, "not valid TOML"),
        ("lr_scale = 0x" + "f" * 5000, "more than 64 bits"),
        ("lr_scale = " + "9" * 400, "more than 64 bits"),
        ("method = [1]", "expected str"),
        ("seed = -1", "out of range"),
    ],
)
def test_hostile_settings_are_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "settings.toml").write_text(content)
    with pytest.raises(InputError, match=said) as error:
        QuantConfig().replaced(read_toml(tmp_path / "settings.toml"))
    assert str(error.value).isprintable()


@pytest.mark.parametrize("sources", [5, [5], [["a"]]])
def test_sources_must_be_text(sources):
    with pytest.raises(InputError, match="expected text, or a list of it"):
        CalibrationConfig().replaced({"sources": sources})
