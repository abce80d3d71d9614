"""Layouts on the command line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_blocksparse import Layout, PerLayer, layout_from_dict, layout_from_name
from hf_blocksparse.model_layouts import ALL_LAYERS, read_section

LAYOUT_HELP = "a preset's name, a kind with its options (sink_window:sink=64,window=960), JSON, or a .json file"


def read_layout(value: str | Mapping[str, Any]) -> Layout:
    """A layout from what a command line or a record can hold.

    Args:
        value: a preset's name; a kind with its options, `sink_window:sink=64,window=960`; JSON, or a file of it, that is a layout's
            `to_dict()` or the section `block_sparse` of a model's configuration; or the dict of such JSON.
    """
    if isinstance(value, Mapping):
        return _from_json(value)
    text = value.strip()
    is_file = text.endswith(".json")
    if is_file:
        if not Path(text).is_file():
            raise ValueError(
                f"layout got {value!r}, which is not a file; it must hold a layout's JSON; correct the path."
            )
        text = Path(text).read_text(encoding="utf-8").strip()
    if not is_file and not text.startswith("{"):
        kind, has_options, options = text.partition(":")
        if not has_options:
            return layout_from_name(kind)
        pairs = [option.partition("=") for option in options.split(",")]
        fields = ", ".join(f'"{name.strip()}": {number or "?"}' for name, _, number in pairs)
        text = f'{{"kind": "{kind}", {fields}}}'
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"layout got {value!r}, which is not JSON ({error}); it must be a preset's name, a kind with options such as "
            'sliding_window:window=1024, a JSON object such as {"kind": "sliding_window", "window": 1024} or a .json file with one; '
            "quote it for the shell."
        ) from error
    return _from_json(parsed)


def _from_json(value: Mapping[str, Any]) -> Layout:
    if not isinstance(value, Mapping) or "layouts" not in value or "kind" in value:
        return layout_from_dict(value)
    by_layer = read_section(value)
    return by_layer[ALL_LAYERS] if ALL_LAYERS in by_layer else PerLayer(by_layer)
