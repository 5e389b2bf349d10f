"""Version guards: what this project was proven with, and an error outside that range."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from megatron_drpo.errors import PlatformError

OLDEST_TRANSFORMER_ENGINE = ">=2.9"
"""megatron-core 0.16.1's own lower bound."""
SUPPORTED = {"megatron-core": ">=0.16.1,<0.20", "torch": ">=2.6"}


def require(package: str, specifier: str, reason: str) -> None:
    """Check an installed package's version.

    Raises:
        PlatformError: the package is missing or outside `specifier`; quotes `reason`.
    """
    found = installed_version(package)
    if found is None:
        raise PlatformError(f"{package} is not installed; needed: {package}{specifier} ({reason})")
    if not SpecifierSet(specifier).contains(found, prereleases=True):
        raise PlatformError(
            f"{package} {found} is installed, outside the range {specifier} this was proven with ({reason}): "
            f"install {package}{specifier}"
        )


def installed_version(package: str) -> str | None:
    """The version of a distribution, None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def transformer_engine_bounds() -> str:
    """The versions of Transformer Engine that the installed megatron-core asks for in any of its extras.

    ">=2.9" where it sets none.
    """
    requirements = map(Requirement, requires("megatron-core") or [])
    for requirement in requirements:
        if requirement.name == "transformer-engine" and requirement.specifier:
            return str(requirement.specifier)
    return OLDEST_TRANSFORMER_ENGINE


def require_supported() -> None:
    """The packages every platform needs, in the ranges the project supports."""
    for package, specifier in SUPPORTED.items():
        require(package, specifier, "supported range")
