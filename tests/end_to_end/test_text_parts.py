"""The text of models of several kinds of input: ranks of the text part compute what transformers' whole wrapper computes of tokens.

What transformers has no class for is the same text model under the names and in the configuration of its wrapper.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline import convert, plan
from pipeline.reporting.verification import verify
from stages.read.ranks import open_checkpoint
from stages.verify.forward.decoder import Decoder
from stages.verify.forward.reference import set_head_epsilon
from tests.end_to_end.test_family_forward import CASES, build, difference
from tests.support.directories import contents
from tests.support.own_names import internlm2

TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 0.01,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
SEEN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "patch_size": 8,
}
HEARD: dict[str, Any] = {"num_mel_bins": 8, "max_source_positions": 8}
CLIP = {"model_type": "clip_vision_model", **SEEN, "image_size": 32, "projection_dim": 32}
SIGLIP = {"model_type": "siglip_vision_model", **SEEN, "image_size": 32}
QWEN_EYES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 64, "patch_size": 8}
MROPE = {"type": "mrope", "mrope_section": [2, 3, 3]}
TOLERANCE = 1e-5


def text(kind: str, **more: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **more}


# The wrapper's class and its configuration, for each the family of the text.
WRAPPERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral3": (
        "Mistral3ForConditionalGeneration",
        "mistral",
        {"text_config": text("mistral", head_dim=24), "vision_config": {"model_type": "pixtral", **SEEN, "image_size": 32}},
    ),
    "llava": ("LlavaForConditionalGeneration", "llama", {"text_config": text("llama"), "vision_config": CLIP}),
    "llava_next": (
        "LlavaNextForConditionalGeneration",
        "mistral",
        {"text_config": text("mistral", sliding_window=7), "vision_config": CLIP},
    ),
    "llava_onevision": (
        "LlavaOnevisionForConditionalGeneration",
        "qwen2",
        {"text_config": text("qwen2"), "vision_config": SIGLIP},
    ),
    "internvl": (
        "InternVLForConditionalGeneration",
        "qwen2",
        {"text_config": text("qwen2"), "vision_config": {"model_type": "internvl_vision", **SEEN, "image_size": [32, 32]}},
    ),
    "qwen2_vl": (
        "Qwen2VLForConditionalGeneration",
        "qwen2_vl",
        {"text_config": text("qwen2_vl_text", rope_scaling=MROPE), "vision_config": QWEN_EYES},
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLForConditionalGeneration",
        "qwen2_vl",
        {
            "text_config": text("qwen2_5_vl_text", rope_scaling=MROPE),
            "vision_config": {**QWEN_EYES, "intermediate_size": 48, "out_hidden_size": 64},
        },
    ),
    "gemma3": (
        "Gemma3ForConditionalGeneration",
        "gemma3",
        {
            "text_config": text("gemma3_text", head_dim=24, query_pre_attn_scalar=24, sliding_window=7),
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 16,
        },
    ),
    "idefics3": (
        "Idefics3ForConditionalGeneration",
        "llama",
        {"text_config": text("llama"), "vision_config": {"model_type": "idefics3_vision", **SEEN, "image_size": 32}},
    ),
    "idefics2": (
        "Idefics2ForConditionalGeneration",
        "mistral",
        {
            "text_config": text("mistral"),
            "vision_config": {"model_type": "idefics2_vision", **SEEN, "image_size": 32},
            "perceiver_config": {"hidden_size": 64, "resampler_n_latents": 4, "resampler_n_heads": 4},
        },
    ),
    "ovis2": (
        "Ovis2ForConditionalGeneration",
        "qwen2",
        {"text_config": text("qwen2"), "vision_config": {**SEEN, "image_size": 32}, "hidden_size": 64, "vocab_size": 99},
    ),
    "phi4_multimodal": (
        "Phi4MultimodalForCausalLM",
        "phi3",
        {
            **TEXT,
            "vision_config": {**SEEN, "image_size": 32, "crop_size": 32, "image_token_id": 97},
            "audio_config": {
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_blocks": 1,
                "num_attention_heads": 2,
                "audio_token_id": 98,
            },
        },
    ),
    "smolvlm": (
        "SmolVLMForConditionalGeneration",
        "llama",
        {"text_config": text("llama"), "vision_config": {"model_type": "smolvlm_vision", **SEEN, "image_size": 32}},
    ),
    "llava_next_video": ("LlavaNextVideoForConditionalGeneration", "llama", {"text_config": text("llama"), "vision_config": CLIP}),
    "vipllava": ("VipLlavaForConditionalGeneration", "llama", {"text_config": text("llama"), "vision_config": CLIP}),
    "video_llava": ("VideoLlavaForConditionalGeneration", "llama", {"text_config": text("llama"), "vision_config": CLIP}),
    "got_ocr2": (
        "GotOcr2ForConditionalGeneration",
        "qwen2",
        {"text_config": text("qwen2"), "vision_config": {**SEEN, "image_size": 32, "output_channels": 8, "mlp_dim": 48}},
    ),
    "qwen2_audio": (
        "Qwen2AudioForConditionalGeneration",
        "qwen2",
        {"text_config": text("qwen2"), "audio_config": {**HEARD, "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2}},
    ),
    "voxtral": (
        "VoxtralForConditionalGeneration",
        "llama",
        {
            "text_config": text("llama"),
            "audio_config": {**SEEN, **HEARD},
        },
    ),
}


@cache
def wrapper(name: str) -> Any:
    """The whole model, seeded so that every parameter of its text matters."""
    architecture, _, config = WRAPPERS[name]
    kind = getattr(transformers, architecture)
    model = kind._from_config(kind.config_class(**config), dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(values if "embed" in parameter_name else values * 2 / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(values * 0.3)
    set_head_epsilon(model, 1e-5)  # TensorRT-LLM's class has no other
    return model


def tokens() -> Tensor:
    return torch.randint(90, (20,), generator=torch.Generator().manual_seed(2))


def logits(output: Path) -> Tensor:
    decoder = Decoder(open_checkpoint(output))
    result = decoder.logits(tokens())
    assert decoder.unused() == []
    return result


def converted(source: Any, output: Path, **options: Any) -> Path:
    where = {"model_dir": source} if isinstance(source, Path) else {"model": source}
    convert(**where, output_dir=output, dtype="float32", scheduler="synchronous", **options)
    return output


@pytest.mark.parametrize("name", WRAPPERS)
def test_ranks_of_the_text_compute_what_the_wrapper_computes(name: str, tmp_path: Path) -> None:
    model = wrapper(name)
    model.save_pretrained(tmp_path / "model")
    stages = 1 if WRAPPERS[name][1] == "phi3" else 2  # of three layers; Phi's class has one stage
    output = converted(tmp_path / "model", tmp_path / "ranks", tp_size=2, pp_size=stages)
    with torch.no_grad():
        theirs = model(input_ids=tokens()[None]).logits[0]
    assert difference(logits(output), theirs) < TOLERANCE
    verify(output, tmp_path / "model", logits=True, tokens=11).check()
    made = plan(model_dir=tmp_path / "model", output_dir=tmp_path / "other")
    assert made.family.name == WRAPPERS[name][1]
    (said,) = [note for note in made.notes if note.startswith(f"text of {WRAPPERS[name][0]}: ")]
    whole = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(map(int, (part.split()[0] for part in said.split("(")[1:]))) == len(whole) - len(made.source.tensors)


@pytest.mark.parametrize("name", WRAPPERS)
def test_names_of_transformers_5_lead_to_the_same_ranks(name: str, tmp_path: Path) -> None:
    """In memory the text is `model.language_model`; on the disk it is what older versions called it."""
    wrapper(name).save_pretrained(tmp_path / "model")
    memory = converted(wrapper(name), tmp_path / "memory", tp_size=2)
    assert contents(memory) == contents(converted(tmp_path / "model", tmp_path / "saved", tp_size=2))


# Wrappers that need code of their own


def prefixed(prefix: str) -> Callable[[str], str]:
    return lambda name: f"{prefix}{name}"


def inner(name: str) -> str:
    return name.replace("model.", "language_model.", 1)


def adapted(name: str) -> str:
    return name.replace("_proj.weight", "_proj.base_layer.weight") if ".layers." in name else name


def nested(key: str, architecture: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {"architectures": [architecture], "model_type": "wrapper", "torch_dtype": "float32", key: config}


def flat(architecture: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda config: {**config, "architectures": [architecture], "model_type": "wrapper"}


EYES = {"vision_model.encoder.layers.0.attn.qkv.weight": torch.ones(8, 8), "mlp1.1.weight": torch.ones(4, 8)}
INSIDE = {"model.vision_tower.vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight": torch.ones(8, 8)}
LORA = {
    f"model.layers.0.self_attn.qkv_proj.lora_{part}.{kind}.weight": torch.ones(8) for part in "AB" for kind in ("vision", "speech")
}
# The text's case, what its configuration and its names become, and what else there is.
REMOTE: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], Callable[[str], str], Mapping[str, Tensor]]] = {
    "internvl chat": ("llama", nested("llm_config", "InternVLChatModel"), prefixed("language_model."), EYES),
    "ultravox": ("llama", nested("text_config", "UltravoxModel"), prefixed("language_model."), EYES),
    "janus": ("llama", nested("language_config", "MultiModalityCausalLM"), prefixed("language_model."), EYES),
    "nemotron nano": ("llama", nested("llm_config", "Llama_Nemotron_Nano_VL"), prefixed("language_model."), EYES),
    "nvlm": ("qwen2", nested("llm_config", "NVLM_D"), prefixed("language_model."), EYES),
    "liuhaotian's llava": (
        "llama",
        flat("LlavaLlamaForCausalLM"),
        str,
        {**INSIDE, "model.mm_projector.0.weight": torch.ones(4, 8)},
    ),
    "llava of mistral": ("mistral_window", flat("LlavaMistralForCausalLM"), str, {**INSIDE, "model.image_newline": torch.ones(8)}),
    "llava of qwen2": ("qwen2_tied", flat("LlavaQwenForCausalLM"), str, INSIDE),
    "phi-3.5-vision": ("phi3_long", flat("Phi3VForCausalLM"), str, {"model.vision_embed_tokens.glb_GN": torch.ones(1, 1, 8)}),
    "phi-4-multimodal": (
        "phi3_partial",
        flat("Phi4MMForCausalLM"),
        adapted,
        {**LORA, "model.embed_tokens_extend.image_embed.img_projection.0.weight": torch.ones(8, 8)},
    ),
    "without a head": ("qwen2_tied", nested("text_config", "LlavaOnevisionForConditionalGeneration"), inner, EYES),
}


@pytest.mark.parametrize("name", REMOTE)
def test_text_of_wrappers_that_need_code_of_their_own(name: str, tmp_path: Path) -> None:
    case, configured, named, beside = REMOTE[name]
    model = build(CASES[case])
    model.save_pretrained(tmp_path / "text")
    tensors = load_file(tmp_path / "text" / "model.safetensors")
    config = json.loads((tmp_path / "text" / "config.json").read_text())
    if name == "internvl chat":
        config, arrays = internlm2(config, {key: values.numpy() for key, values in tensors.items()})
        tensors = {key: torch.from_numpy(values) for key, values in arrays.items()}
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(configured(config)))
    save_file({**{named(key): values for key, values in tensors.items()}, **beside}, source / "model.safetensors")
    output = converted(source, tmp_path / "ranks", tp_size=2)
    with torch.no_grad():
        theirs = model(tokens()[None]).logits[0]
    assert difference(logits(output), theirs) < TOLERANCE
    verify(output, source, logits=True, tokens=11).check()
    alone = converted(tmp_path / "text", tmp_path / "alone", tp_size=2)
    if name != "internvl chat":  # whose config.json is that of another converter
        assert contents(output) == contents(alone)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rotary_scaling", None),
        ("rotary_scaling", {"type": "mrope", "mrope_section": [2, 3, 4]}),
        ("rotary_scaling", {"type": "mrope", "mrope_section": [3, 3, 2]}),  # the class would take it
        ("position_embedding_type", "rope_gpt_neox"),
        ("qwen_type", "qwen2"),
    ],
)
def test_positions_of_several_axes_are_verified(key: str, value: Any, tmp_path: Path) -> None:
    wrapper("qwen2_vl").save_pretrained(tmp_path / "model")
    output = converted(tmp_path / "model", tmp_path / "ranks")
    config = json.loads((output / "config.json").read_text())
    assert config["rotary_scaling"] == {"type": "mrope", "mrope_section": [2, 3, 3]}
    assert (config["position_embedding_type"], config["qwen_type"]) == ("mrope", "qwen2_vl")
    (output / "config.json").write_text(json.dumps({**config, key: value}))
    found = [finding.problem.subject for finding in verify(output, tmp_path / "model").findings]
    assert any(key.partition("_")[0] in subject or "rotary" in subject for subject in found), found
