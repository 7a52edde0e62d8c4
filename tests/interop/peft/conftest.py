"""Adapters, and the folder that they are saved in."""

import shutil

import pytest

from rslora_jax.interop.peft import save_peft

from .folders import CONFIG, llama, random_adapters, wrapped


@pytest.fixture(scope="module")
def lora():
    return wrapped(llama(), CONFIG)


@pytest.fixture(scope="module")
def saved(lora, tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft") / "saved"
    save_peft(folder, lora, random_adapters(lora), base_model="me/base")
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A good adapter's folder that a test may spoil."""
    return shutil.copytree(saved, tmp_path / "adapter")
