"""Version guards."""

from __future__ import annotations

import pytest

from megatron_drpo.errors import PlatformError
from megatron_drpo.platform import versions
from megatron_drpo.platform.versions import SUPPORTED, installed_version, require, require_supported


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Package -> the version that seems to be installed; all others are missing."""
    found: dict[str, str] = {}
    monkeypatch.setattr(versions, "installed_version", found.get)
    return found


@pytest.mark.parametrize("found", ["0.16.1", "0.17.0rc0", "0.19.2", "0.19.9+local"])
def test_versions_inside_the_range_pass(pretend: dict[str, str], found: str) -> None:
    pretend["megatron-core"] = found
    require("megatron-core", SUPPORTED["megatron-core"], "a test")


@pytest.mark.parametrize("found", ["0.16.0", "0.15", "0.20.0", "1.0"])
def test_a_version_outside_the_range_says_what_to_install(pretend: dict[str, str], found: str) -> None:
    pretend["megatron-core"] = found
    with pytest.raises(PlatformError) as error:
        require("megatron-core", ">=0.16.1,<0.20", "the reason")
    message = str(error.value)
    assert f"megatron-core {found} is installed" in message
    assert "the reason" in message
    assert message.endswith("install megatron-core>=0.16.1,<0.20")


def test_a_missing_package_is_named(pretend: dict[str, str]) -> None:
    with pytest.raises(PlatformError, match=r"^psutil is not installed; needed: psutil>=5 \(the reason\)$"):
        require("psutil", ">=5", "the reason")


def test_both_supported_packages_are_required(pretend: dict[str, str]) -> None:
    pretend.update({"megatron-core": "0.16.1", "torch": "2.13.0+cpu"})
    require_supported()
    pretend["torch"] = "2.5.1"
    with pytest.raises(PlatformError, match=r"torch 2\.5\.1"):
        require_supported()


def test_the_environment_of_the_tests_is_supported() -> None:
    require_supported()
    assert installed_version("a-package-nobody-has") is None
