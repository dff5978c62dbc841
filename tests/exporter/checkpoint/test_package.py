from __future__ import annotations

import pkgutil
from importlib import import_module

import qwen_export.checkpoint as package


def test_package_exports_a_sorted_complete_list() -> None:
    public = {name for name in vars(package) if not name.startswith("_") and name != "annotations"}
    modules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert set(package.__all__) == public - modules
    assert sorted(package.__all__, key=lambda n: (not n.isupper(), n[0].islower(), n)) == list(
        package.__all__
    )


def test_every_module_exports_what_it_defines() -> None:
    for found in pkgutil.iter_modules(package.__path__):
        module = import_module(f"{package.__name__}.{found.name}")
        defined = {
            name
            for name, value in vars(module).items()
            if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
        }
        assert defined <= set(module.__all__), found.name
        assert all(hasattr(module, name) for name in module.__all__)
