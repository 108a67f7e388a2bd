"""The OpenAPI document's parts that the routes' signatures do not say: bodies and errors."""

from __future__ import annotations

from typing import Any

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
LORA = {"type": "string", "description": "NAME or NAME:STRENGTH of one that the model has, see /v1/models"}
FIELDS: dict[str, Any] = {
    "prompt": {"type": "string", "minLength": 1},
    "model": {"type": "string"},
    "seconds": {"oneOf": [{"type": "string"}, {"type": "number"}]},
    "size": {"type": "string", "pattern": "^[0-9]+x[0-9]+$"},
    "negative_prompt": {"type": "string"},
    "guidance_scale": {"type": "number"},
    "guidance_scale_2": {"type": "number"},
    "boundary_ratio": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "num_inference_steps": {"type": "integer", "minimum": 1, "maximum": 1000},
    "seed": {"type": "integer", "minimum": 0},
    "fps": {"type": "number"},
    "num_frames": {"type": "integer", "minimum": 1},
    "width": {"type": "integer", "minimum": 1},
    "height": {"type": "integer", "minimum": 1},
    "window": {"type": "integer", "minimum": 1},
    "overlap": {"type": "integer", "minimum": 1},
    "flow_shift": {"type": "number"},
    "sampler": {"type": "string"},
    "recipe": {"type": "string", "description": "how distilled weights are sampled"},
    "fit": {"type": "string", "enum": ["crop", "pad", "stretch"]},
    "priority": {"type": "integer", "minimum": -10, "maximum": 10},
    "draft": {"type": "boolean"},
    "expand_prompt": {"type": "boolean"},
    "lora": {"oneOf": [LORA, {"type": "array", "items": LORA, "maxItems": 8}]},
    "quality": {
        "oneOf": [
            {"type": "string", "enum": ["auto", "draft", "low", "standard", "medium", "high", "hd", "fast"]},
            {"type": "number", "exclusiveMinimum": 0, "description": "PSNR against the exact video, in dB"},
        ]
    },
}
PART = {"from": {"type": "integer", "minimum": 0}, "to": {"type": "integer", "minimum": 1}}
CUT = {"type": "object", "properties": PART, "description": "frames of the video, up to before `to`"}
VIDEO = {"type": "object", "properties": {"id": {"type": "string"}, **PART}, "required": ["id"]}
PICTURE = {"type": "string", "description": "a file of the form, or a data: URL"}
KEYFRAME = {
    "type": "object",
    "properties": {
        "frame": {"type": "integer"}, "time": {"type": "number"}, "image": PICTURE, "strength": {"type": "number"},
    },
}  # fmt: skip
CARD = {
    "type": "object",
    "required": ["from", "to", "prompt"],
    "properties": {
        "from": {"type": "number"},
        "to": {"type": "number"},
        "prompt": {"type": "string"},
        "image": PICTURE,
    },
}
SHOWN = {
    "keyframes": {"type": "array", "items": KEYFRAME},
    "storyboard": {"type": "array", "items": CARD},
    "characters": {"type": "array", "items": {"type": "object", "properties": {"id": {"type": "string"}}}},
}
PICTURES = {
    "n": {"type": "integer", "minimum": 1, "maximum": 10},
    "stream": {"type": "boolean"},
    "partial_images": {"type": "integer", "minimum": 0, "maximum": 3},
    "response_format": {"type": "string", "enum": ["b64_json", "url"]},
    "output_format": {"type": "string", "enum": ["png"]},
}
TWO = {
    "videos": {"type": "array", "items": VIDEO, "minItems": 2, "maxItems": 2}, "video": VIDEO, "end_video": VIDEO
}  # fmt: skip
BODIES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "create": (
        {
            **FIELDS, **TWO, "clip": CUT, "loop": {"type": "boolean"},
            "input_reference": PICTURE, "last_frame": PICTURE, **SHOWN,
        },
        ["prompt"],
    ),
    "edit": ({**FIELDS, "video": VIDEO, "clip": CUT, "strength": {"type": "number"}}, ["prompt", "video"]),
    "remix": ({**FIELDS, "clip": CUT, "strength": {"type": "number"}}, ["prompt"]),
    "finish": ({**FIELDS, "strength": {"type": "number"}}, []),
    "character": (
        {"name": {"type": "string", "minLength": 1}, "video": {"oneOf": [PICTURE, VIDEO]}},
        ["name", "video"],
    ),
    "expand": ({"prompt": FIELDS["prompt"], "model": FIELDS["model"]}, ["prompt"]),
    "extend": (
        {**FIELDS, "video": VIDEO, "clip": CUT, "direction": {"type": "string", "enum": ["forward", "backward"]}},
        ["prompt", "video"],
    ),
    "connect": ({**FIELDS, **TWO}, []),
    "provenance": ({"video": VIDEO}, ["video"]),
    "image": ({**FIELDS, **PICTURES}, ["prompt"]),
    "image_edit": (
        {
            **FIELDS, **PICTURES, "image": {"oneOf": [PICTURE, {"type": "array", "items": PICTURE, "maxItems": 16}]},
            "mask": PICTURE, "strength": {"type": "number"},
        },
        ["prompt", "image"],
    ),
}  # fmt: skip
BODIES["plan"] = (
    {**BODIES["create"][0], **BODIES["extend"][0], **BODIES["connect"][0], **BODIES["edit"][0]},
    [],
)
# Any answer that is no success has one shape.
DESCRIPTIONS: dict[str, Any] = {
    "responses": {"default": {"description": "an error", "content": {"application/json": {"schema": ERROR}}}}
}


def describe(body: str) -> dict[str, Any]:
    """Return what the document says of a route that takes a body, by its name."""
    properties, required = BODIES[body]
    schema = {"type": "object", "properties": properties, "required": required}
    content = {kind: {"schema": schema} for kind in ("application/json", "multipart/form-data")}
    return DESCRIPTIONS | {"requestBody": {"required": True, "content": content}}
