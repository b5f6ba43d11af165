"""The plug-in for axolotl, called as axolotl 0.21 calls it.

axolotl itself needs packages for GPUs. Where its plug-in interface imports (pip install --no-deps axolotl addict) its
own plug-in manager is asked too; the other tests use a stand-in with the same names and signatures.
"""

from __future__ import annotations

import dataclasses
import importlib
import subprocess
import sys
import types

import pytest
import torch
from paths import HELPERS
from peft import PeftModel, get_peft_model
from tiny_models import tiny, vector_of

from steertune.adapters import SteeringVectorConfig
from steertune.recipes.lab.files import ArmError

PLUGIN = "steertune.recipes.axolotl_plugin"


class Settings(dict):
    """As axolotl's DictDefault: what is not set is None."""

    def __getattr__(self, name):
        return self.get(name)


@dataclasses.dataclass(frozen=True)
class AdapterCapabilities:
    """As axolotl's."""

    name: str
    lora_like: bool = False
    relora: bool = False


@pytest.fixture
def module(monkeypatch):
    """The plug-in, on a stand-in of `axolotl.integrations.base`."""
    base = types.ModuleType("axolotl.integrations.base")
    vars(base).update(BasePlugin=type("BasePlugin", (), {}), AdapterCapabilities=AdapterCapabilities)
    for name in ("axolotl", "axolotl.integrations"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, base.__name__, base)
    monkeypatch.delitem(sys.modules, PLUGIN, raising=False)
    yield importlib.import_module(PLUGIN)
    sys.modules.pop(PLUGIN, None)


def settings(**changes) -> Settings:
    table = {"layers": [1, 2], "init": "random"}
    return Settings({"adapter": "steering_vector", "steering_vector": table, "seed": 3} | changes)


def test_the_adapter_is_the_one_that_the_table_says(module):
    plugin = module.SteeringVectorPlugin()
    assert [c.name for c in plugin.get_adapter_capabilities()] == ["steering_vector"]
    assert plugin.load_adapter(tiny(), settings(adapter="lora")) is None
    model, config = plugin.load_adapter(tiny(), settings())
    base = tiny()
    torch.manual_seed(3)
    same = get_peft_model(base, SteeringVectorConfig(layers=[1, 2], init="random"))
    assert torch.equal(vector_of(model), vector_of(same)) and vector_of(model).requires_grad
    assert config.layers == [1, 2]
    assert plugin.load_adapter(None, settings(), config_only=True) == (
        None,
        module.peft_config(settings().steering_vector),
    )


@pytest.mark.parametrize("inference", [False, True])
def test_a_saved_vector_goes_on(module, inference, tmp_path):
    plugin = module.SteeringVectorPlugin()
    first, _ = plugin.load_adapter(tiny(), settings())
    first.save_pretrained(tmp_path)
    again, _ = plugin.load_adapter(tiny(), settings(lora_model_dir=str(tmp_path)), inference=inference)
    assert isinstance(again, PeftModel) and torch.equal(vector_of(again), vector_of(first))
    assert vector_of(again).requires_grad is not inference


def test_the_keys_of_the_yaml_are_a_class_that_axolotl_can_import(module):
    path, _, name = module.SteeringVectorPlugin().get_input_args().rpartition(".")
    arguments = getattr(importlib.import_module(path), name)
    assert arguments(steering_vector={"layers": 2}).steering_vector == {"layers": 2}
    assert arguments().steering_vector is None


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"layer": 2}, "Did you mean 'layers'"),
        ({"inference_mode": True}, "Unknown key 'inference_mode'"),
        ({"form": "biass"}, "Did you mean 'bias'"),
        ({"init": "mean_difference"}, "no hook for"),
    ],
)
def test_bad_tables_are_refused(module, table, message):
    error = ValueError if "form" in table else ArmError
    with pytest.raises(error, match=message):
        module.SteeringVectorPlugin().load_adapter(tiny(), settings(steering_vector=table))


def test_axolotls_own_manager_loads_it():
    """In a process of its own: a registered plug-in stays registered."""
    code = f"""
import sys
sys.path.insert(0, {str(HELPERS)!r})
try:
    from axolotl.integrations.base import PluginManager
    from axolotl.utils.dict import DictDefault
except ImportError as error:
    sys.exit(f"missing: {{error}}")
from tiny_models import tiny, vector_of
manager = PluginManager.get_instance()
manager.register("{PLUGIN}.SteeringVectorPlugin", required=True)
assert manager.supports_adapter("steering_vector")
assert "{PLUGIN}.SteeringVectorArgs" in manager.get_input_args()
cfg = DictDefault({{"adapter": "steering_vector", "steering_vector": {{"layers": 2}}}})
model, config = manager.load_adapter(tiny(), cfg)
assert vector_of(model).shape == (32,) and config.layers == [2]
assert manager.load_adapter(tiny(), DictDefault({{"adapter": "lora"}})) is None
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if "missing: " in ran.stderr:
        pytest.skip(f"axolotl's plug-in interface does not import here: {ran.stderr.strip().splitlines()[-1]}")
    assert ran.returncode == 0, ran.stderr


def test_the_stand_in_has_axolotls_fields():
    """axolotl 0.21's own dataclass, where it imports."""
    base = pytest.importorskip("axolotl.integrations.base", reason="pip install --no-deps axolotl addict")
    theirs = {field.name: field.default for field in dataclasses.fields(base.AdapterCapabilities)}
    assert theirs == {field.name: field.default for field in dataclasses.fields(AdapterCapabilities)}
