import threading
import time
from types import SimpleNamespace

import pytest
import transformers.utils.hub
from huggingface_hub import close_session, constants, hf_api
from huggingface_hub.utils import _http, _xet

from hf_longlora.hub import push

from ..trainer.conftest import make  # noqa: F401  (a fixture)
from .server import TOKEN, Hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on the loopback interface, which this process takes for the real one (as if by `HF_ENDPOINT`)."""
    with Hub() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(
            constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", server.url),
        )
        monkeypatch.setattr(hf_api.api, "endpoint", server.url)  # that of huggingface_hub's functions
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made with the endpoint of its time
        # Its own retries wait up to 8 seconds, five times.
        monkeypatch.setattr(_http, "time", SimpleNamespace(**vars(time) | {"sleep": lambda seconds: None}))
        close_session()
        pushers, work = [], push._Pusher._work

        def working(pusher):
            pushers.append((pusher, threading.current_thread()))
            work(pusher)

        monkeypatch.setattr(push._Pusher, "_work", working)
        yield server
    for pusher, thread in pushers:
        with pusher._changed:  # that of a test which failed in mid-training is not told of the end
            pusher._newest = None
            pusher._changed.notify_all()
        thread.join(240)  # the server may have kept it waiting
        assert not thread.is_alive(), f"{thread.name} goes on"
    close_session()


@pytest.fixture
def xet(hub, monkeypatch, tmp_path):
    """Uploads go by Xet, as they do to the real Hub."""
    pytest.importorskip("hf_xet")
    if not hasattr(_xet, "abort_xet_session"):
        pytest.skip("the retries of older versions can't be shortened")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    # By its cache it knows what a server has, by the server's address: an earlier test's may have had the same port.
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_XET_XORB_COMPRESSION_POLICY", "none")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_BASE_DELAY", "10ms")
    yield
    _xet.abort_xet_session()


@pytest.fixture
def token():
    return TOKEN
