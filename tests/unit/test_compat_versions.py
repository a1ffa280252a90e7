"""An unverified or edited MindSpore is refused with a message that says what to do."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any, Iterator

import mindspore
import pytest
from mindspore import Parameter

from bmtrain_ms import compat
from bmtrain_ms.compat import autograd, versions
from bmtrain_ms.compat.executor import PyNativeExecutor


@pytest.fixture(autouse=True)
def installed_afterwards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(versions.OVERRIDE, raising=False)
    yield
    monkeypatch.undo()
    compat.install()
    assert compat.status().installed


@pytest.fixture
def unpatched() -> None:
    compat.uninstall()


def test_status_of_this_environment():
    assert compat.status() == compat.Status(True, mindspore.__version__, True, versions.VERIFIED[mindspore.__version__])
    compat.uninstall()
    status = compat.status()
    assert (status.installed, status.verified) == (False, True)
    assert status.fingerprint == versions.VERIFIED[mindspore.__version__], "the patch must not change the fingerprint"


def test_table_of_verified_releases():
    assert list(versions.VERIFIED) == ["2.5.0", "2.5.0.dev20250202", "2.10.0"]
    assert versions.VERIFIED["2.5.0"] == versions.VERIFIED["2.5.0.dev20250202"]


def test_error_is_an_import_error():
    assert issubclass(compat.UnsupportedMindSporeError, ImportError)


def test_unknown_version(unpatched: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "version", lambda: "9.9.9")
    with pytest.raises(compat.UnsupportedMindSporeError) as caught:
        compat.install()
    assert str(caught.value) == (
        f"MindSpore 9.9.9 (fingerprint {versions.fingerprint()}) is not verified with this bmtrain_ms. "
        "Verified releases: 2.5.0, 2.5.0.dev20250202, 2.10.0. Install one of them, or set "
        "BMTRAIN_MS_ALLOW_UNVERIFIED=1 to go on at your own risk (run the test suite first)."
    )
    status = compat.status()
    assert (status.installed, status.version, status.verified) == (False, "9.9.9", False)


def test_known_version_with_other_functions(unpatched: None, monkeypatch: pytest.MonkeyPatch):
    found, fingerprint = versions.version(), versions.fingerprint()
    monkeypatch.setitem(versions.VERIFIED, found, "0123456789abcdef")
    with pytest.raises(compat.UnsupportedMindSporeError) as caught:
        compat.install()
    text = str(caught.value)
    assert text.startswith(
        f"MindSpore {found} is installed, but its Parameter/PyNative functions differ from the verified ones "
        f"(fingerprint {fingerprint}, verified 0123456789abcdef): was its source edited? Verified releases: "
    )
    assert "BMTRAIN_MS_ALLOW_UNVERIFIED=1" in text
    assert not compat.status().installed


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (Parameter, "_get_parameter_new_args"),
        (Parameter, "__new__"),
        (Parameter, "__deepcopy__"),
        (PyNativeExecutor, "grad"),
        (PyNativeExecutor, "call_custom_bprop"),
    ],
)
def test_fingerprint_sees_an_edited_function(owner: type, name: str, unpatched: None, monkeypatch: pytest.MonkeyPatch):
    before = versions.fingerprint()

    def edited(*args: Any) -> None:
        """Not what was verified."""

    keep_static = isinstance(vars(owner)[name], staticmethod)
    monkeypatch.setattr(owner, name, staticmethod(edited) if keep_static else edited)
    assert versions.fingerprint() != before
    assert not compat.status().verified
    monkeypatch.undo()
    assert versions.fingerprint() == before


def test_fingerprint_without_source(unpatched: None, monkeypatch: pytest.MonkeyPatch):
    def no_source(function: Any) -> str:
        raise OSError("could not get source code")

    monkeypatch.setattr(inspect, "getsource", no_source)
    with pytest.raises(compat.UnsupportedMindSporeError, match="functions differ from the verified ones"):
        compat.install()


@pytest.mark.parametrize("reason", ["version", "fingerprint"])
def test_override(reason: str, unpatched: None, monkeypatch: pytest.MonkeyPatch):
    if reason == "version":
        monkeypatch.setattr(versions, "version", lambda: "9.9.9")
    else:
        monkeypatch.setitem(versions.VERIFIED, versions.version(), "0123456789abcdef")
    monkeypatch.setenv("BMTRAIN_MS_ALLOW_UNVERIFIED", "1")
    compat.install()
    status = compat.status()
    assert (status.installed, status.verified) == (True, False)

    class Sub(Parameter):
        pass

    assert isinstance(Sub(1), Sub)


@pytest.mark.parametrize("value", ["", "0", "no", "true"])
def test_other_values_do_not_override(value: str, unpatched: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "version", lambda: "9.9.9")
    monkeypatch.setenv("BMTRAIN_MS_ALLOW_UNVERIFIED", value)
    with pytest.raises(compat.UnsupportedMindSporeError):
        compat.install()


def test_installed_patch_is_not_checked_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(versions, "version", lambda: "9.9.9")
    compat.install()
    assert compat.status().installed


def test_refused_install_leaves_the_executor_alone(unpatched: None, monkeypatch: pytest.MonkeyPatch):
    own = vars(PyNativeExecutor)["grad"]
    assert autograd.original_grad() is own
    monkeypatch.setattr(versions, "version", lambda: "9.9.9")
    with pytest.raises(compat.UnsupportedMindSporeError):
        compat.install()
    assert vars(PyNativeExecutor)["grad"] is own
    monkeypatch.undo()
    compat.install()
    assert vars(PyNativeExecutor)["grad"] is not own
    assert autograd.original_grad() is own
    compat.uninstall()
    assert vars(PyNativeExecutor)["grad"] is own


def test_import_is_refused_on_an_unverified_release():
    code = "import mindspore; mindspore.__version__ = '9.9.9'; import bmtrain_ms"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "UnsupportedMindSporeError: MindSpore 9.9.9 (fingerprint" in ran.stderr.strip().splitlines()[-1]
