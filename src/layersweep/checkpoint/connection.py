"""Whether the hub can be asked: its HTTP client is made of settings that may be unusable.

Proxies, certificates and the token come from the environment. Each fails in a way of its own where
the client is made, before anything is sent, so it is made here first, for every use of the hub.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from huggingface_hub import get_session
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

from layersweep.errors import CheckpointError

PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "all_proxy", "https_proxy", "http_proxy")
CERTIFICATES = ("SSL_CERT_FILE",)  # an SSL_CERT_DIR that is not there is passed over
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
# Of the HTTP library that this release of huggingface_hub is built on; the second is no kind of the
# first there.
TRANSPORT_ERROR: type[Exception] = HfHubHTTPError.__mro__[1]
INVALID_URL: type[Exception] = sys.modules[TRANSPORT_ERROR.__module__].InvalidURL
NO_ANSWER = (TRANSPORT_ERROR, INVALID_URL, OfflineModeIsEnabled, ConnectionError, TimeoutError)


class Unreachable(CheckpointError):
    """No answer from the hub, because of `why`; the cache may still do."""

    def __init__(self, what: str, why: str, remedy: str) -> None:
        super().__init__(
            f"{what}: found no connection to the hub ({why}), needed one",
            hint=f"{remedy}, or give a local folder",
        )
        self.why, self.remedy = why, remedy


def check_client(what: str) -> None:
    """Make the client that asks the hub for `what`. Raises Unreachable, which names the setting
    that it cannot be made of."""
    try:
        get_session()
    except OSError as error:
        raise _unusable(what, CERTIFICATES, "the certificates", error) from error
    except (ValueError, ImportError, INVALID_URL) as error:
        raise _unusable(what, PROXIES, "the system's proxy", error) from error
    try:
        "".join(build_hf_headers().values()).encode("ascii")
    except UnicodeEncodeError:
        failure = ValueError("a character that is not ASCII")
        raise _unusable(what, TOKENS, "the saved token", failure) from None


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _unusable(what: str, variables: Sequence[str], otherwise: str, error: Exception) -> Unreachable:
    named = [name for name in variables if os.environ.get(name)]
    # the text may hold part of a password, where the library took the address apart wrongly
    secret = any("@" in os.environ[name] for name in named)
    setting = " or ".join(named) or otherwise
    why = "unusable" if secret else first_line(error)
    return Unreachable(what, f"{setting}: {why}", f"correct or unset {setting}")
