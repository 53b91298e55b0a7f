"""What schemathesis cannot make up by itself: image files, and their base64."""

import base64

import schemathesis
from hypothesis import strategies as st
from tiny_bundle import picture

_FILES = [picture(seed, format=kind) for seed, kind in enumerate(("PNG", "JPEG", "WEBP", "GIF"))]

schemathesis.openapi.format("binary", st.sampled_from(_FILES))
schemathesis.openapi.format(
    "byte", st.sampled_from([base64.b64encode(body).decode() for body in _FILES])
)
# Its own files for these types are black, for which the tiny bundle's numbers are not finite.
for kind in ("jpeg", "png", "webp", "gif"):
    schemathesis.openapi.media_type(f"image/{kind}", st.sampled_from(_FILES))
