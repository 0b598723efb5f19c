"""Models of `transformers`, ready to be asked."""

from __future__ import annotations

from typing import Any

from prefixloss.detect.models.reading import device_of


def whole(kind: Any, name: str, what: str, device: str, dtype: str, trust_remote_code: bool, **options: Any) -> Any:
    """A model of that kind, an Auto class; ValueError where the checkpoint lacks a part: a head made up at random would
    still say something. what: the kind in words."""
    code = {"trust_remote_code": True} if trust_remote_code else {}
    model, report = kind.from_pretrained(name, dtype=dtype, output_loading_info=True, **code, **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise ValueError(f"model: {name} is no {what}: it has no {missing}")
    return model.to(device_of(device)).eval()
