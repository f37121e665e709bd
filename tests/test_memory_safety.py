"""The standing check of the C: generated calls under AddressSanitizer and UBSan find nothing.

`LONGSERVE_FUZZ_CALLS=20000` makes so many calls, other ones each time.
"""

from __future__ import annotations

import os

import pytest

from attention import HeadShape
from attention.kernels.softmax import native
from tests import sanitizers

REASON = native.obstacle(HeadShape(4, 2, 64))


@pytest.mark.skipif(REASON is not None, reason=str(REASON))
@pytest.mark.skipif(not sanitizers.runtime(), reason="gcc is missing, or is without AddressSanitizer")
def test_generated_calls_of_the_kernels_touch_no_byte_that_is_not_theirs(pytestconfig: pytest.Config) -> None:
    assert pytestconfig.cache is not None
    built = sanitizers.build(pytestconfig.cache.mkdir("sanitized"))
    calls = int(os.environ.get("LONGSERVE_FUZZ_CALLS", 500))
    ran = sanitizers.run(
        built, ["-m", "pytest", "-q", "-x", "--capture=sys", "-p", "no:cacheprovider", "tests/fuzz.py"], 300 + calls
    )
    case = built / f"case-{os.getpid()}"
    last = case.read_text() if case.exists() else "none"
    case.unlink(missing_ok=True)
    assert ran.returncode == 0, f"{ran.stdout[-6000:]}\n{ran.stderr[-6000:]}\nthe last call: {last}"
